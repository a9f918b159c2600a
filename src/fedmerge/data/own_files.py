"""All the examples of one client from one path: a file, a folder with a file per split, or images in class folders."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray

from fedmerge.core.errors import DataError, FedmergeError, UsageError, unknown_name
from fedmerge.core.text import shortened
from fedmerge.data.npz import MOST_BYTES
from fedmerge.data.partition import SPLITS, Split
from fedmerge.data.readers import READERS, Tables
from fedmerge.data.sources._columns import image_array
from fedmerge.data.table import Table

log = logging.getLogger(__name__)

IMAGE_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".bmp": "BMP", ".tif": "TIFF", ".tiff": "TIFF"}
"""Ending -> pillow's name. No others: some of its readers start programs."""
MOST_PIXELS = 2**26
"""Of one image."""


def tables_of_path(path: Path, label_column: str, text_column: str | None = None, *, size: int | None = None) -> Tables:
    """What one client has, by split: always ``train``; others if a file or folder brings them.

    Args:
        path: A .npz, .csv or .parquet file; a folder with ``train``, ``validation`` and ``test`` files of these kinds;
            or a folder with one sub-folder of images per class, for each split or for all.
        label_column: Of tables.
        text_column: Of tables that hold texts.
        size: Images are scaled to this many pixels per side.

    Raises:
        UsageError: if there is nothing at the path, or nothing that can be read.
        DataError: naming the file and row that are wrong.
    """
    if path.is_dir():
        entries = sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
        if any(entry.is_dir() for entry in entries):
            return _images(path, entries, size)
        return _split_files(path, entries, label_column, text_column, size)
    if not path.exists():
        raise UsageError(f"no such file or folder: {path}; expected the client's examples ({', '.join(READERS)})")
    if path.suffix not in READERS:
        raise UsageError(f"{path}: {unknown_name('file ending', path.suffix, READERS)}")
    _refuse_size(size, path)
    return READERS[path.suffix](path, label_column, text_column)


def _refuse_size(size: int | None, path: Path) -> None:
    if size is not None:
        raise UsageError(f"{path}: got size = {size}, which is for folders of images; leave it out")


def _split_files(
    folder: Path, entries: Sequence[Path], label_column: str, text_column: str | None, size: int | None
) -> Tables:
    """One file for each split; a lone .npz file may bring several."""
    _refuse_size(size, folder)
    files = [entry for entry in entries if entry.suffix in READERS and entry.stem in SPLITS]
    if "train" not in [file.stem for file in files]:
        found = ", ".join(entry.name for entry in entries) or "nothing"
        raise DataError(
            f"{folder} has no train{'/train'.join(READERS)} and no sub-folders of images; it has "
            f"{shortened(found, 1000)}. Call its files train, validation and test, or give one file"
        )
    others = [entry.name for entry in entries if entry not in files]
    if others:
        log.warning("%s: not read, because they are no split: %s", folder, shortened(", ".join(others), 1000))
    if len(files) == 1:
        return READERS[files[0].suffix](files[0], label_column, text_column)
    tables: Tables = {}
    for file in files:
        split = cast("Split", file.stem)
        if split in tables:
            raise DataError(f"{folder} has {split} rows in two files; expected one file for each split")
        own = READERS[file.suffix](file, label_column, text_column)
        if len(own) > 1:
            raise DataError(f"{file} brings {', '.join(own)}, and other files stand beside it; expected one of both")
        tables[split] = own["train"]
    return tables


def _images(folder: Path, entries: Sequence[Path], size: int | None) -> Tables:
    """Sub-folders of the splits with sub-folders of classes each, or sub-folders of classes alone."""
    if importlib.util.find_spec("PIL") is None:
        raise FedmergeError(f'{folder}: images need pillow: pip install "fedmerge[huggingface]"')
    stray = [entry.name for entry in entries if not entry.is_dir()]
    if stray:
        log.warning("%s: not read, because they stand in no class: %s", folder, shortened(", ".join(stray), 1000))
    folders = {entry.name: entry for entry in entries if entry.is_dir()}
    if "train" not in folders:
        return {"train": _image_table(folder, folders.values(), size)}
    other = next((name for name in folders if name not in SPLITS), None)
    if other is not None:
        raise DataError(f"{folder}: {unknown_name('split', other, SPLITS)}; a folder of splits holds no classes")
    return {
        split: _image_table(folders[split], [each for each in folders[split].iterdir() if each.is_dir()], size)
        for split in SPLITS
        if split in folders
    }


def _image_table(folder: Path, classes: Iterable[Path], size: int | None) -> Table:
    """Images in the order of their classes and names, labelled by the sub-folder they are in."""
    files = [file for each in sorted(classes) for file in sorted(each.iterdir()) if not file.name.startswith(".")]
    if not files:
        raise DataError(f"{folder} has no images in sub-folders of classes; expected {', '.join(IMAGE_FORMATS)}")
    first: NDArray[np.uint8] | None = None
    images: list[NDArray[np.uint8]] = []
    for file in files:
        image = _image(file, size)
        first = image if first is None else first
        if image.shape[1:] != first.shape[1:]:
            raise DataError(
                f"{file} is {image.shape[1]} x {image.shape[2]} pixels (height, width); expected {first.shape[1]} x "
                f"{first.shape[2]} as {files[0]}; set `size` to scale all images to one"
            )
        if image.nbytes * len(files) > MOST_BYTES:
            raise DataError(f"{folder}: {len(files):,} images like {file.name} are too many to hold; set `size`")
        images.append(image)
    channels = max(len(image) for image in images)
    pixels = np.stack([image if len(image) == channels else np.repeat(image, channels, axis=0) for image in images])
    return Table(str(folder), pixels, np.array([file.parent.name for file in files], dtype=np.str_))


def _image(file: Path, size: int | None) -> NDArray[np.uint8]:
    """One image [c, h, w]: grey or colour."""
    from PIL import Image  # noqa: PLC0415 - optional extra

    if file.suffix.lower() not in IMAGE_FORMATS:
        raise DataError(f"{file} is no image that can be read; accepted: {', '.join(IMAGE_FORMATS)}. Move it away")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file, formats=sorted({*IMAGE_FORMATS.values()})) as image:
                _refuse_larger(image.width, image.height)
                image.load()
                return image_array([image], size, str(file))[0]  # type: ignore[no-any-return]
    except DataError:
        raise
    except Exception as error:  # pillow's readers raise many kinds for damaged files
        raise DataError(f"{file} cannot be read ({shortened(str(error))}); replace or remove it") from error


def _refuse_larger(width: int, height: int) -> None:
    if width * height > MOST_PIXELS:
        raise ValueError(f"it says that it has {width} x {height} pixels")
