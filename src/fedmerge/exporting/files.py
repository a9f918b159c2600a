"""A folder that is there whole or not at all, and the tensors in it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from fedmerge.core.errors import UsageError


@contextmanager
def arriving(folder: Path) -> Iterator[Path]:
    """A new folder to write into, whose files take their place when the block ends without a fault.

    Raises:
        UsageError: if there is something at that place already, or it cannot be written.
    """
    folder = folder.resolve()
    part = folder.with_name(f"{folder.name}.{os.getpid()}.part")
    try:
        if folder.is_file() or (folder.exists() and any(folder.iterdir())):
            raise UsageError(f"{folder} exists and is not empty; nothing was overwritten. Choose another folder")
        part.mkdir(parents=True)
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"cannot write {folder}: {reason}. Choose another folder") from error
    try:
        yield part
        folder.mkdir(exist_ok=True)  # it may be there, empty, and somebody's current folder
        for child in part.iterdir():
            child.replace(folder / child.name)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file that everybody may read; tied tensors are written once for each name."""
    own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    path.write_bytes(save(own, {"format": "pt"}))
