"""A run's folder: created once, written as the run goes, never half."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fedmerge._version import __version__
from fedmerge.core.errors import UsageError
from fedmerge.core.files import write_atomically
from fedmerge.core.protocol import state_tensors
from fedmerge.data import FederatedData
from fedmerge.data.picture import partition_svg
from fedmerge.experiment.config import Config, config_text
from fedmerge.experiment.simulation import Progress


def create_run_folder(folder: Path) -> None:
    """Makes a new, empty run folder.

    Raises:
        UsageError: if it exists with something in it, or cannot be written.
    """
    try:
        if folder.exists() and any(folder.iterdir()):
            raise UsageError(
                f"{folder} exists and is not empty; nothing was overwritten. Choose another --out or remove it first"
            )
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"cannot write run folder {folder}: {reason}. Choose another --out") from error
    if not os.access(folder, os.W_OK):
        raise UsageError(f"cannot write run folder {folder}: no permission")


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
    tensors = {f"server.{name}": tensor for name, tensor in state_tensors(progress.state).items()}
    for i, (private, buffers) in enumerate(zip(progress.fleet.private, progress.fleet.buffers, strict=True)):
        tensors.update({f"client.{i}.{k}": leaf for k, leaf in enumerate(tree_leaves(private))})
        if progress.fleet.policy == "local" and len(buffers):
            tensors[f"buffers.{i}"] = buffers
    content = save({name: _own_memory(tensor) for name, tensor in tensors.items()}, {"round": str(progress.round)})
    write_atomically(path, content, private=True)


def _own_memory(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().clone()


def versions() -> dict[str, Any]:
    """Of what the numbers depend on."""
    return {
        "fedmerge": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": version("numpy"),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
    }
