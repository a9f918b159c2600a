"""Texts to tokens by a pretrained model's own tokenizer."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmerge.core.errors import RowError, UsageError
from fedmerge.data.encoding import NO_TARGET, Encoded, Kind
from fedmerge.models._weights import quietly, weights_folder

log = logging.getLogger(__name__)

PADDING = -1


@dataclass(frozen=True)
class Tokens:
    """A tokenizer and what its texts are answered by.

    Attributes:
        path: Of the pretrained model.
        kind: One class per text, one tag per word, or a completion.
        max_length: Tokens that are kept of a text. Longer texts lose their end; a prompt loses its beginning; a
            completion that does not fit is refused.
        separator: Stands between prompt and completion.
    """

    path: str
    kind: Kind
    max_length: int
    separator: str = "\n"

    @property
    def key(self) -> str:
        """Of the tokenizer's whole definition and the options."""
        definition = _tokenizer(self.path).backend_tokenizer.to_str()
        digest = hashlib.sha256(definition.encode()).hexdigest()
        return f"tokens 1 {digest} {self.kind} {self.max_length} {self.separator!r}"

    def encode(self, texts: Sequence[str], answers: Sequence[str] | None, tags: Sequence[str]) -> Encoded:
        """Tokens of all texts, padded to `max_length`.

        Args:
            texts: Texts; words with spaces between them for ``tags``; prompts for ``completions``.
            answers: Tags with spaces between them, or completions; None for ``classes``.
            tags: All names of tags, in order of their numbers.

        Raises:
            RowError: for the first text that cannot be used.
        """
        if self.kind == "classes":
            return self._classes(texts)
        if answers is None:
            raise UsageError(f"texts for {self.kind} need an answer each")
        if self.kind == "tags":
            return self._tags(texts, answers, {name: number for number, name in enumerate(tags)})
        return self._completions(texts, answers)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, special ones left out."""
        return str(_tokenizer(self.path).decode([t for t in tokens if t >= 0], skip_special_tokens=True))

    def prompt(self, text: str) -> list[int]:
        """Tokens of a prompt, as `encode` makes them before a completion."""
        start = _tokenizer(self.path).bos_token_id
        ids = _ids(self.path, [text + self.separator if text else ""])[0]
        return [*([] if start is None else [start]), *ids]

    @property
    def end(self) -> int | None:
        """Token that ends a completion, where the tokenizer has one."""
        found = _tokenizer(self.path).eos_token_id
        return None if found is None else int(found)

    def _classes(self, texts: Sequence[str]) -> Encoded:
        ids = _ids(self.path, texts, special=True, most=self.max_length)
        empty = next((row for row, own in enumerate(ids) if not own), None)
        if empty is not None:
            raise RowError(empty, f"the tokenizer makes nothing of {_brief(texts[empty])}; drop this text")
        full = sum(len(own) == self.max_length for own in ids)
        if full:
            log.info("%d of %d texts fill all %d tokens and may have been cut", full, len(texts), self.max_length)
        return Encoded(_padded(ids, self.max_length, PADDING), None)

    def _tags(self, texts: Sequence[str], answers: Sequence[str], numbers: dict[str, int]) -> Encoded:
        words, tags = [text.split() for text in texts], [answer.split() for answer in answers]
        for row, (own, given) in enumerate(zip(words, tags, strict=True)):
            if len(own) != len(given):
                raise RowError(row, f"{len(own)} words and {len(given)} tags; expected one tag for each word")
            unknown = [tag for tag in given if tag not in numbers]
            if unknown:
                raise RowError(row, f"unknown tag {unknown[0]!r}; known: {', '.join(numbers)}")
        with quietly():
            batch = _tokenizer(self.path)(
                words, is_split_into_words=True, truncation=True, max_length=self.max_length, padding=False
            )
        targets = [
            _first_pieces(batch.word_ids(row), [numbers[tag] for tag in given]) for row, given in enumerate(tags)
        ]
        lost = [row for row, own in enumerate(targets) if sum(t != NO_TARGET for t in own) < len(tags[row])]
        if lost:
            log.info(
                "%d of %d texts are longer than %d tokens: their end is cut", len(lost), len(texts), self.max_length
            )
        return Encoded(
            _padded(batch["input_ids"], self.max_length, PADDING), _padded(targets, self.max_length, NO_TARGET)
        )

    def _completions(self, texts: Sequence[str], answers: Sequence[str]) -> Encoded:
        """The last prompt token gives the first of the completion, and so on; the end token is part of it."""
        ends = [] if self.end is None else [self.end]
        completions = _ids(self.path, answers)
        inputs, targets = [], []
        for row, (text, own) in enumerate(zip(texts, completions, strict=True)):
            completion, prompt = [*own, *ends], self.prompt(text)
            if not own or len(completion) + bool(prompt) > self.max_length + 1:
                raise RowError(
                    row,
                    f"the completion has {len(own)} tokens; expected 1 to {self.max_length - len(ends)} "
                    "(model.max_length less the end); shorten it or raise model.max_length",
                )
            room = self.max_length + 1 - len(completion)
            prompt = prompt[-room:] if len(prompt) > room else prompt
            whole = prompt + completion
            counted = [NO_TARGET] * max(0, len(prompt) - 1) + whole[max(1, len(prompt)) :]
            inputs.append(whole[:-1])
            targets.append(counted)
        return Encoded(_padded(inputs, self.max_length, PADDING), _padded(targets, self.max_length, NO_TARGET))


def _first_pieces(words: Sequence[int | None], numbers: Sequence[int]) -> list[int]:
    """A target for the first token of each word."""
    before = [None, *words[:-1]]
    return [
        NO_TARGET if word is None or word == last else numbers[word] for word, last in zip(words, before, strict=True)
    ]


def _padded(rows: Sequence[Sequence[int]], length: int, filler: int) -> NDArray[np.int64]:
    padded = np.full((len(rows), length), filler, dtype=np.int64)
    for row, values in zip(padded, rows, strict=True):
        row[: len(values)] = values
    return padded


def _ids(path: str, texts: Sequence[str], *, special: bool = False, most: int | None = None) -> list[list[int]]:
    if not texts:
        return []
    with quietly():
        batch = _tokenizer(path)(
            list(texts), add_special_tokens=special, truncation=most is not None, max_length=most, padding=False
        )
    ids: list[list[int]] = batch["input_ids"]
    return ids


def _brief(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:39] + "…")


@lru_cache(maxsize=4)
def _tokenizer(path: str) -> Any:
    from transformers import AutoTokenizer  # noqa: PLC0415 - optional extra

    folder = weights_folder(path)
    try:
        with quietly():
            tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(f"model.path: {path!r} has no tokenizer that can be loaded: {reason}") from error
    if not getattr(tokenizer, "is_fast", False):
        raise UsageError(f"model.path: {path!r} has no fast tokenizer (tokenizer.json), which is needed")
    return tokenizer
