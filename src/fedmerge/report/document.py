"""A whole HTML document: its head, its style, and the rule that nothing is loaded and nothing runs."""

from __future__ import annotations

from importlib import resources

from fedmerge.report.markup import Markup, element

# Nothing may be loaded and nothing may run, whatever a client is called.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def document(title: str, main: Markup) -> str:
    """The text of a page that needs no network and no script.

    Args:
        title: Of the window.
        main: What is shown.
    """
    style = resources.files("fedmerge.report").joinpath("style.css").read_text(encoding="utf-8")
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", f"fedmerge: {title}"),
        element("style", Markup(style)),
    )
    return f"<!doctype html>\n{element('html', head, element('body', main), lang='en')}\n"
