"""A client's model that is several networks at once: one file of tensors, and how their outputs become one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from fedmerge.core.ensemble import Additive, Ensemble, Gated, Mixture, members
from fedmerge.core.vector import Layout
from fedmerge.exporting.card import Card
from fedmerge.exporting.client import Client
from fedmerge.exporting.export import block, building, default_kind, of_outputs, write_form, write_kind
from fedmerge.exporting.files import write_tensors
from fedmerge.models._adapted import Adapted

TENSORS = "model.safetensors"
DRAWN = "drawn."
_COMBINING: dict[type, tuple[str, str]] = {
    Mixture: (
        "probabilities are averaged; outputs are their logarithms",
        'log_weights = tensors["ensemble.weights"].log()[:, None, None]\n'
        "    return (each.log_softmax(dim=2) + log_weights).logsumexp(dim=0)",
    ),
    Gated: (
        "probabilities are averaged with weights that depend on the input; outputs are their logarithms",
        'gate = tensors["ensemble.gate"]\n'
        "    score = inputs.flatten(1) @ gate[:-1] + gate[-1]\n"
        "    log_weights = torch.nn.functional.logsigmoid(torch.stack([score, -score]))[:, :, None]\n"
        "    return (each.log_softmax(dim=2) + log_weights).logsumexp(dim=0)",
    ),
    Additive: (
        "outputs of the active ones are added",
        'return (each * tensors["ensemble.active"][:, None, None]).sum(dim=0)',
    ),
}


def member_prefix(number: int) -> str:
    """What the names of one network's tensors begin with.

    >>> member_prefix(0) + "out.weight"
    'networks.0.out.weight'
    """
    return f"networks.{number}."


def personal_tensors(client: Client) -> dict[str, Tensor]:
    """Everything of a client's model by name: what ``model.safetensors`` of its own folder holds.

    Of one small network its ``state_dict``; of an adapted one what was trained. Of several networks the same of each
    below `member_prefix`, and what combines them as ``ensemble.<field>``. Factors of adapters that were drawn and never
    trained stand beside them as ``drawn.<name>``: another torch may draw others.
    """
    vectors = members(client.personal)
    drawn = {DRAWN + name: factor for name, factor in drawn_factors(client.trained.module).items()}
    if isinstance(client.personal, Tensor):
        return {**_network_tensors(client, vectors[0]), **drawn}
    found = {
        member_prefix(k) + name: tensor
        for k, vector in enumerate(vectors)
        for name, tensor in _network_tensors(client, vector).items()
    }
    combining = {f"ensemble.{name}": tensor for name, tensor in combining_tensors(client.personal).items()}
    return {**found, **combining, **drawn}


def drawn_factors(module: nn.Module) -> dict[str, Tensor]:
    """The factors A of LoRA that a network drew and never trains, by name; see `serving.frozen_draw`."""
    return {
        name: parameter.detach()
        for name, parameter in module.named_parameters()
        if ".lora_A." in name and not parameter.requires_grad
    }


def _network_tensors(client: Client, vector: Tensor) -> dict[str, Tensor]:
    if isinstance(client.trained.module, Adapted):
        return dict(client.trained.setup.layout.views(vector))
    return dict(client.module_of(vector).state_dict())


def combining_tensors(ensemble: Ensemble) -> dict[str, Tensor]:
    """The fields of an ensemble beside its members."""
    fields: Sequence[str] = getattr(ensemble, "_fields", ())
    return {name: getattr(ensemble, name) for name in fields if name != "models"}


def vectors_of(tensors: Mapping[str, Tensor], count: int, layout: Layout) -> list[Tensor]:
    """[P] of each network, from what `personal_tensors` gave.

    Args:
        tensors: Of several networks, or of one without prefix if `count` is 0.
        count: K; 0 for a model that is one network.
        layout: Of the network.
    """
    if not count:
        return [layout.flatten(tensors)]
    names = [slot.name for slot in layout.slots]
    return [layout.flatten({name: tensors[member_prefix(k) + name] for name in names}) for k in range(count)]


def write_personal(client: Client, folder: Path) -> Card:
    """The client's model in the form that suits it, for a card that the caller writes.

    ``model.safetensors`` with `personal_tensors` always; for an adapted network also PEFT's own files.
    """
    if not isinstance(client.personal, Tensor):
        return _write_ensemble(client, folder, client.personal)
    kind = default_kind(client)
    card = write_kind(client, folder, kind)
    if kind == "peft":
        write_tensors(folder / TENSORS, personal_tensors(client))
    return card


def _write_ensemble(client: Client, folder: Path, ensemble: Ensemble) -> Card:
    write_tensors(folder / TENSORS, personal_tensors(client))
    scaled = write_form(client, folder, None)
    count, name = len(ensemble.models), type(client.trained.module).__name__
    told, combine = _COMBINING.get(type(ensemble), (f"combined by {type(ensemble).__qualname__}", "..."))
    use = block(_snippet(client, count, combine)) + of_outputs(client, scaled=scaled)
    return Card(f"Networks of {client.name}", use, (("networks", f"{count} times {name}: {told}"),))


def _snippet(client: Client, count: int, combine: str) -> str:
    imports, make = building(client)
    return f"""\
import torch
{chr(10).join([*imports, "from safetensors.torch import load_file"])}

tensors = load_file("{TENSORS}")


def network(k):
    made = {make}
    own = f"networks.{{k}}."
    found = {{name.removeprefix(own): value for name, value in tensors.items() if name.startswith(own)}}
    made.load_state_dict(found)
    return made.eval()


networks = [network(k) for k in range({count})]


def outputs(inputs):
    each = torch.stack([made(inputs) for made in networks])
    {combine}"""
