"""The model of its own that a site has after training."""

from __future__ import annotations

from typing import TYPE_CHECKING

from safetensors.torch import save

from fedmerge.core.ensemble import Personal, members
from fedmerge.core.files import make_folder, write_atomically
from fedmerge.deploy.messages import Answer, Order

if TYPE_CHECKING:
    from fedmerge.deploy.client import Site


def write_site_model(site: Site, model: Personal, order: Order, answer: Answer) -> None:
    """Writes the site's model into its folder."""
    folder = site.config.folder / "model"
    make_folder(folder)
    for number, vector in enumerate(members(model)):
        site.layout.write(vector, site.module)
        state = {name: tensor.detach().contiguous().clone() for name, tensor in site.module.state_dict().items()}
        write_atomically(folder / f"model-{number}.safetensors", save(state), private=True)
