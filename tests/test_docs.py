"""What the documentation shows is run: fenced examples of README.md and docs/, and the examples in docstrings.

Of a Markdown file, ```python blocks run one after another in one namespace, and lines that begin with ``fedmerge``
(or ``$ fedmerge``) of ```console and ```sh blocks run as commands, all in one empty folder. A block right below
``<!-- not run: reason -->`` is left out.
"""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
import shlex
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import fedmerge
import tiny_models
from fedmerge.cli import main

ROOT = Path(__file__).parents[1]
TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.md"))
PAGES = [page for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))) if page not in TUTORIALS]
NAMES = [module.name for module in pkgutil.walk_packages(fedmerge.__path__, "fedmerge.")]
MODULES = ["fedmerge", *(name for name in NAMES if not name.endswith("__main__"))]
FENCE = re.compile(
    r"^(?P<skip><!-- not run: [^\n]+ -->\n+)?```(?P<kind>\w+)[^\n]*\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL
)


class Block(NamedTuple):
    """One fenced example."""

    kind: str
    body: str
    line: int


def blocks(text: str) -> list[Block]:
    """The examples of a page that are to be run."""
    return [
        Block(found["kind"], found["body"], text.count("\n", 0, found.start("body")) + 1)
        for found in FENCE.finditer(text)
        if not found["skip"] and found["kind"] in ("python", "console", "sh")
    ]


def commands(body: str) -> list[list[str]]:
    """The words of every fedmerge command of a console block; a backslash continues a line."""
    lines = re.sub(r"\\\n\s*", " ", body).splitlines()
    bare = [line.removeprefix("$ ").strip() for line in lines]
    return [shlex.split(line, comments=True)[1:] for line in bare if line.startswith("fedmerge ")]


def run_page(page: Path, *, instead: dict[str, str] | None = None) -> int:
    """Runs a page's examples in the current folder, some texts replaced by others; the number of them."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    text = page.read_text(encoding="utf-8")
    for old, new in (instead or {}).items():
        assert old in text, f"{page.name} has no {old!r}"
        text = text.replace(old, new)
    found = blocks(text)
    for block in found:
        where = f"{page.name}, line {block.line}"
        if block.kind == "python":
            # blank lines before it make the line numbers of a traceback those of the page
            exec(compile("\n" * (block.line - 1) + block.body, str(page), "exec"), namespace)  # noqa: S102
            continue
        for words in commands(block.body):
            assert _code(words) == 0, f"{where}: fedmerge {' '.join(words)}"
    return len(found)


def _code(words: list[str]) -> int:
    try:
        return main(words)
    except SystemExit as ended:  # --help
        return int(ended.code or 0)


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_the_examples_of_a_page_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_page(page)


@pytest.mark.parametrize("page", TUTORIALS, ids=[page.name for page in TUTORIALS])
def test_a_tutorial_runs_on_a_small_model(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a network of a few thousand parameters in place of the one that a reader fetches."""
    small = tiny_models.tiny_bert(tmp_path / "small-model")
    monkeypatch.chdir(tmp_path)
    run_page(page, instead={"hf:minilm": f"hf:{small}"})


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_in_docstrings_are_right(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(name)
    assert doctest.testmod(module).failed == 0


def test_the_harness_runs_and_skips_what_it_should(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = tmp_path / "page.md"
    page.write_text(
        "# Page\n```python\nx = 1\n```\n```python\nassert x == 1\n```\n"
        "<!-- not run: needs a network -->\n```python\nraise SystemError\n```\n"
        "```toml\nraise = 1\n```\n"
        "```console\n$ fedmerge list \\\n    methods  # all of them\nfedmerge data list\noutput\n```\n"
    )
    assert run_page(page) == 3
    assert commands(blocks(page.read_text())[-1].body) == [["list", "methods"], ["data", "list"]]
    page.write_text("text\n```sh\nfedmerge list nothing\n```\n")
    with pytest.raises(AssertionError, match=r"page\.md, line 3: fedmerge list nothing"):
        run_page(page)
    page.write_text("```python\nraise KeyError('here')\n```\n")
    with pytest.raises(KeyError, match="here"):
        run_page(page)
