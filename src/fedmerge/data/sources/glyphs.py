"""Characters drawn from the 465 typefaces of the Debian package fonts-aenigma."""

from __future__ import annotations

import io
import string
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from fedmerge.core.options import check_options, option
from fedmerge.data.archive import read_deb_folder
from fedmerge.data.fetch import Package, Progress, quiet
from fedmerge.data.pool import Pool
from fedmerge.data.sources._registry import Facts, load_packaged, pool_name, source

_FOLDER = "usr/share/fonts/"
_CHARSETS = {
    "digits": string.digits,
    "case36": string.digits + string.ascii_uppercase + string.ascii_lowercase,
    "alnum62": string.digits + string.ascii_uppercase + string.ascii_lowercase,
    "ascii94": "".join(map(chr, range(33, 127))),
}
_DRAWN_AT = 84  # pixels of the outline before it is cut out and scaled: three times the largest size
_SAME = 2.0  # mean difference in grey levels below which two drawings of 28x28 are the same


@source("glyphs", citation="fonts by Brian Kent (Ænigma)")
@dataclass(frozen=True)
class Glyphs:
    """Characters drawn from 465 typefaces; a typeface family is a natural user.

    Near-copies are the same character in variants of one family (outlined, reversed, wide ...), so `item` is the
    pair of family and class.
    """

    facts: ClassVar[Facts] = Facts(
        description="40,690 drawings of 94 characters (28,144 of 62) in 292 families of typefaces, 28x28 grey",
        licence="the author's own: use, change and redistribute, fonts stay attributed to Brian Kent",
        packages=(
            Package(
                client="apt",
                name="fonts-aenigma",
                version="0.0.20080511+dfsg-4",
                sha256="882e38d90ad0a42a1227b1c8d670e2e6fb65364cba29e22fd2715648a0f6e90b",
                megabytes=7.4,
                folder=_FOLDER,
            ),
        ),
        extra="glyphs",
        modules=("PIL", "fontTools"),
    )
    version: ClassVar[int] = 1

    charset: Literal["ascii94", "alnum62", "case36", "digits"] = option(
        "ascii94", help="classes: printable ASCII, letters and digits, the same without case, or digits alone"
    )
    size: Literal[28, 14] = option(28, help="pixels per side")

    def __post_init__(self) -> None:
        check_options(self)

    def load(self, progress: Progress = quiet) -> Pool:
        """The items, font by font; fetched through apt-get and drawn if not in the cache."""
        return load_packaged(self, progress)

    def parse(self, archives: tuple[Path, ...], progress: Progress) -> Pool:
        """The items from the Debian package."""
        fonts = sorted(read_deb_folder(archives[0], _FOLDER).items())
        images, classes, families = [], [], []
        for done, (_, font) in enumerate(fonts):
            progress("drawing characters", done, len(fonts))
            name = family(font)
            for character, image in draw_font(font, _CHARSETS[self.charset], self.size):
                images.append(image)
                classes.append(character.upper() if self.charset == "case36" else character)
                families.append(name)
        return self._pool(np.stack(images)[:, None], classes, families)

    def _pool(self, inputs: NDArray[np.uint8], classes: list[str], families: list[str]) -> Pool:
        class_names = tuple(
            dict.fromkeys(c.upper() if self.charset == "case36" else c for c in _CHARSETS[self.charset])
        )
        index = {name: number for number, name in enumerate(class_names)}
        targets = np.array([index[name] for name in classes], dtype=np.int64)
        user_names, user = np.unique(families, return_inverse=True)
        return Pool(
            name=pool_name(self),
            inputs=inputs,
            targets=targets,
            class_names=class_names,
            user=user.astype(np.int64),
            item=user.astype(np.int64) * len(class_names) + targets,
            user_names=tuple(map(str, user_names)),
        )


def family(font: bytes) -> str:
    """The first word of a font's family name, in lower case.

    These fonts name their variants by further words ("Binary X CHR", "Crackdown O1"), many of which are the same
    drawings; the first word keeps them together and joins only one pair of unrelated ones (Ink Swipes, Ink Tank).
    """
    from fontTools.ttLib import TTFont  # noqa: PLC0415 - optional extra

    return str(TTFont(io.BytesIO(font), lazy=True)["name"].getDebugName(1)).split()[0].lower()


def draw_font(font: bytes, characters: str, size: int) -> Iterator[tuple[str, NDArray[np.uint8]]]:
    """The characters that a font has, each drawn white on black [size, size].

    Characters without ink are left out, and so are the small letters of a font that repeats its capitals for them.
    """
    from fontTools.ttLib import TTFont  # noqa: PLC0415 - optional extra
    from PIL import ImageFont  # noqa: PLC0415 - optional extra

    known = TTFont(io.BytesIO(font), lazy=True).getBestCmap() or {}
    face = ImageFont.truetype(io.BytesIO(font), _DRAWN_AT, layout_engine=ImageFont.Layout.BASIC)
    drawn = {c: image for c in characters if ord(c) in known and (image := _draw(face, c, 28)) is not None}
    repeated = _repeated_letters(drawn)
    for character in [c for c in drawn if c not in repeated]:
        image = drawn[character] if size == 28 else _draw(face, character, size)
        if image is not None:
            yield character, image


def _draw(face: Any, character: str, size: int) -> NDArray[np.uint8] | None:
    """One character, scaled to fit into the image less a border of a ninth, and centred; None if it has no ink."""
    from PIL import Image, ImageOps  # noqa: PLC0415 - optional extra

    mask = face.getmask(character, mode="L")
    image = Image.frombytes("L", mask.size, bytes(mask))
    box = image.getbbox()
    if box is None:
        return None
    border = size // 9
    inner = size - 2 * border
    fitted = ImageOps.pad(image.crop(box), (inner, inner), method=Image.Resampling.LANCZOS)
    return np.asarray(ImageOps.expand(fitted, border), dtype=np.uint8)


def _repeated_letters(drawn: dict[str, NDArray[np.uint8]]) -> set[str]:
    """The small letters, if the font has more than 15 of both cases and draws over 7 in 10 of them alike."""
    both = [c for c in string.ascii_lowercase if c in drawn and c.upper() in drawn]
    alike = [np.abs(drawn[c].astype(int) - drawn[c.upper()]).mean() < _SAME for c in both]
    return set(both) if len(both) > 15 and np.mean(alike) > 0.7 else set()
