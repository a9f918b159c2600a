"""A run's folder: created once, written as the run goes, never half."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from fedmerge._version import __version__
from fedmerge.core.files import write_atomically
from fedmerge.data import FederatedData
from fedmerge.data.picture import partition_svg
from fedmerge.experiment.checkpoint import own_tensors
from fedmerge.experiment.config import Config, config_text
from fedmerge.experiment.simulation import Progress


def write_inputs(folder: Path, config: Config | None, data: FederatedData) -> None:
    """Configuration (for runs made from one), partition and its picture; the last two tell of every client."""
    if config is not None:
        write_atomically(folder / "config.toml", config_text(config))
    if data.partition is not None:
        data.partition.save(folder / "partition.json", private=True)
    write_atomically(folder / "partition.svg", partition_svg(data), private=True)


def write_models(path: Path, progress: Progress) -> None:
    """The server's state as ``server.*``, and what clients keep as ``client.<i>.<k>`` and ``buffers.<i>``.

    The state holds the merging weights, which say who is like whom: only the owner may read the file.
    """
    content = save(own_tensors(progress), {"round": str(progress.round)})
    write_atomically(path, content, private=True)


def versions() -> dict[str, Any]:
    """Of what the numbers depend on."""
    return {
        "fedmerge": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": version("numpy"),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
    }
