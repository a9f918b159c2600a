"""Sites to try a federation with: real handwritten digits, dealt to sites that do not agree on which way is up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedmerge.core.files import make_folder
from fedmerge.data import PARTITIONS, SOURCES, ClientData
from fedmerge.data.form import InputForm
from fedmerge.data.partition import SPLITS
from fedmerge.deploy.schema import DataSchema, schema_of_form
from fedmerge.experiment.federation import load_data

DATA = "digits.npz"
_IMAGES = 1797
"""That the handwritten digits are."""


def demo_names(number: int) -> tuple[str, ...]:
    """Names for so many sites, in order."""
    digits = len(str(number))
    return tuple(f"site-{place:0{digits}d}" for place in range(1, number + 1))


def demo_schema() -> DataSchema:
    """The form of the demo's data: images of 8 by 8 pixels, scaled already."""
    form = InputForm((1, 8, 8), "float32", torch.tensor(0.0), torch.tensor(1.0))
    return schema_of_form(form, class_names=[str(digit) for digit in range(10)])


def demo_site_table() -> dict[str, Any]:
    """Table ``data`` of every demo site's ``site.toml``."""
    return {"path": DATA}


def write_demo_data(folder: Path, names: tuple[str, ...]) -> None:
    """One file for each site, into its folder.

    Args:
        folder: Of the federation.
        names: Of the sites.
    """
    faults: list[str] = []
    table = {"name": "rotations", "clients": len(names), **_sizes(len(names))}
    partition = PARTITIONS.build(table, "partition", faults)
    clients = load_data(SOURCES["digits"].cls(), partition, 0).clients
    for name, client in zip(names, clients, strict=True):
        site = folder / "sites" / name
        make_folder(site)
        np.savez_compressed(site / DATA, **_arrays(client))


def _sizes(number: int) -> dict[str, int]:
    """Images of each site by split: as many as there are for so many sites, but not more than suit a first look."""
    each = min(480, _IMAGES // number)
    return {"train": each * 5 // 8, "validation": each // 8, "test": each // 4}


def _arrays(client: ClientData) -> dict[str, Any]:
    found = {}
    for split in SPLITS:
        ending, examples = "" if split == "train" else f"_{split}", getattr(client, split)
        found[f"x{ending}"], found[f"y{ending}"] = examples.inputs.numpy(), examples.targets.numpy()
    return found
