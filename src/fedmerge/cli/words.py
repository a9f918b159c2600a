"""What command-line words mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fedmerge.experiment.config import read_toml


def split_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Names, and key=value settings; a name may carry options behind a colon."""
    settings = [word for word in words if "=" in word and ":" not in word.partition("=")[0]]
    return [word for word in words if word not in settings], settings


def table_from(config: str | None) -> dict[str, Any]:
    """The table of a configuration file; an empty one without a file."""
    return {} if config is None else read_toml(config)


def sentence(text: str) -> str:
    """A line of help as a sentence.

    >>> sentence("run it on Flower")
    'Run it on Flower.'
    """
    return f"{text[:1].upper()}{text[1:]}."
