"""A language model's way from texts to tokens, small enough to read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fedmerge.core.errors import RowError
from fedmerge.data.encoding import NO_TARGET, Encoded, Kind


@dataclass
class Letters:
    """A letter is a token, a = 0; a word is its first letter where words are tagged. Other characters do not count.

    Attributes:
        kind: What texts are answered by.
        length: Tokens of a text that are used.
        calls: Number of texts of every call, so that tests see when nothing is encoded again.
    """

    kind: Kind = "classes"
    length: int = 6
    calls: list[int] = field(default_factory=list)

    @property
    def key(self) -> str:
        return f"letters {self.kind} {self.length}"

    def encode(self, texts: Sequence[str], answers: Sequence[str] | None, tags: Sequence[str]) -> Encoded:
        self.calls.append(len(texts))
        assert (answers is None) == (self.kind == "classes")
        inputs = np.full((len(texts), self.length), -1, dtype=np.int64)
        targets = np.full_like(inputs, NO_TARGET)
        for row, text in enumerate(texts):
            tokens = [letter for letter in map(_number, text) if letter is not None]
            if self.kind == "tags":
                tokens = [_number(word[0]) or 0 for word in text.split()]
                own = [tags.index(tag) for tag in answers[row].split()] if answers else []
                if len(own) != len(tokens):
                    raise RowError(row, f"{len(tokens)} words and {len(own)} tags; expected one tag per word")
                targets[row, : len(own)] = own[: self.length]
            elif self.kind == "completions" and answers:
                completion = [letter for letter in map(_number, answers[row]) if letter is not None]
                targets[row, len(tokens) : len(tokens) + len(completion)] = completion
                tokens += completion
            if not tokens:
                raise RowError(row, f"got {text!r}, in which no letter is known; expected one at least")
            inputs[row, : len(tokens)] = tokens[: self.length]
        return Encoded(inputs, None if self.kind == "classes" else targets)


def _number(character: str) -> int | None:
    place = ord(character) - ord("a")
    return place if 0 <= place < 26 else None


def padded(*tokens: int, length: int = 6, fill: int = -1) -> list[int]:
    """Tokens with padding behind them."""
    return [*tokens, *[fill] * (length - len(tokens))]


def arrays_of(texts: Sequence[str]) -> Any:
    """Texts as a pool holds them."""
    return np.array(list(texts), dtype=np.str_)
