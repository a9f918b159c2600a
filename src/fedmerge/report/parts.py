"""The parts that chapters of the page are made of: figures, tables, legends."""

from __future__ import annotations

from collections.abc import Mapping

from fedmerge.report.markup import Markup, element, join, shorten
from fedmerge.report.study import Study
from fedmerge.report.svg import Figure, colour
from fedmerge.report.table import Table

LONG = 40  # characters of a text from which its column is wide


def figure(found: Figure) -> Markup:
    """A figure between its heading and its caption."""
    caption = element("figcaption", found.caption)
    return element("figure", element("p", found.title, class_="title"), found.svg, caption)


def figures(*found: Figure | None) -> Markup:
    """Figures side by side where there is room; nothing without any."""
    drawn = [figure(each) for each in found if each is not None]
    return element("div", *drawn, class_="figures") if drawn else Markup("")


def table(found: Table, study: Study | None = None, *, longest: int | None = None) -> Markup:
    """A table that scrolls in its own box.

    Args:
        found: Its rows.
        study: With it, rows of methods carry their colours.
        longest: Texts of more characters are cut; a pointer that rests on one shows the whole.
    """
    kinds = ["text" if column.unit == "text" else "number" for column in found.columns]
    head = [
        element("th", column.title, scope="col", class_=kind, title=column.meaning or None)
        for column, kind in zip(found.columns, kinds, strict=True)
    ]
    rows = [
        element(
            "tr",
            element(
                "th",
                _swatch(row[0], study),
                element("bdi", shorten(row[0], longest or len(row[0]))),
                scope="row",
                title=row[0],
            ),
            *(_cell(text, kind, longest) for text, kind in zip(row[1:], kinds[1:], strict=True)),
            class_="reference" if study and row[0] == study.reference else None,
        )
        for row in found.texts()
    ]
    body = element("table", element("thead", element("tr", *head)), element("tbody", *rows))
    box = element("div", body, class_="scroll", role="region", aria_label=found.caption, tabindex=0)
    return join(box, *(element("p", note, class_="note") for note in found.notes))


def _swatch(label: str, study: Study | None) -> Markup | None:
    if study is None or label not in study.colours:
        return None
    return element("span", class_=f"swatch {colour(study.colours[label])}")


def _cell(text: str, kind: str, longest: int | None) -> Markup:
    """A text, cut if it is longer than asked for, or a number with its ± set apart."""
    if kind == "text" and longest is not None:
        class_ = "text long" if len(text) > LONG else "text"
        return element("td", element("bdi", shorten(text, longest)), class_=class_, title=text)
    mean, sign, half = text.partition(" ± ")
    return element("td", mean, element("span", f" ± {half}", class_="half") if sign else None, class_=kind)


def legend(found: Table) -> Markup:
    """What the columns mean, folded."""
    told = [column for column in found.columns if column.meaning]
    entries = [join(element("dt", column.title), element("dd", column.meaning)) for column in told]
    return element("details", element("summary", "What the columns mean"), element("dl", *entries))


def copies(found: Table) -> Markup:
    """The table in forms to paste elsewhere, folded."""
    forms = {"Markdown": found.markdown(), "LaTeX": found.latex(), "CSV": found.csv()}
    parts = [join(element("p", name, class_="title"), element("pre", text, tabindex=0)) for name, text in forms.items()]
    return element("details", element("summary", "This table as Markdown, LaTeX or CSV"), *parts, class_="copies")


def definitions(entries: Mapping[str, str]) -> Markup:
    """Names with what they stand for."""
    return element("dl", *(join(element("dt", name), element("dd", text)) for name, text in entries.items()))
