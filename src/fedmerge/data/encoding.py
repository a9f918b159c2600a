"""Texts on their way to tokens: what a language model must offer, and what comes out, kept so that it is done once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

from numpy.typing import NDArray

from fedmerge.core.errors import DataError, RowError
from fedmerge.data.cache import cached_arrays
from fedmerge.data.pool import Ints, Pool

Kind = Literal["classes", "tags", "completions"]
"""What a text is answered by: one class, one tag per word, or a text."""

NO_TARGET = -100
"""Target of a token that does not count: padding, a prompt, the later pieces of a word."""


class Encoded(NamedTuple):
    """Texts as tokens.

    Attributes:
        inputs: [n, L] token numbers; −1 is padding, which stands at the end.
        targets: [n, L] what each position should give, `NO_TARGET` where it does not count; None for kind ``classes``.
    """

    inputs: Ints
    targets: Ints | None


@runtime_checkable
class Encoder(Protocol):
    """A language model's own way from texts to tokens.

    Attributes:
        kind: What its texts are answered by.
        key: Identity: two encoders with one key give the same tokens.
    """

    @property
    def kind(self) -> Kind:
        """What texts are answered by."""
        ...

    @property
    def key(self) -> str:
        """Identity."""
        ...

    def encode(self, texts: Sequence[str], answers: Sequence[str] | None, tags: Sequence[str]) -> Encoded:
        """Tokens of all texts, padded to one length.

        Args:
            texts: Of kind ``tags``: words with spaces between them. Of kind ``completions``: the prompts.
            answers: Of kind ``tags``: one tag per word, with spaces between them. Of kind ``completions``: the
                completions. None for ``classes``.
            tags: All names of tags, in order of their numbers.

        Raises:
            RowError: for the first text that cannot be used.
        """
        ...


@dataclass(frozen=True)
class Texts:
    """Texts with what the encoder made of them.

    Attributes:
        inputs: [n, L] tokens.
        targets: [n, L] for ``tags`` and ``completions``, else None.
        tags: Names of the tags in order; empty for the other kinds.
    """

    inputs: Ints
    targets: Ints | None
    tags: tuple[str, ...]


def encode_pool(pool: Pool, encoder: Encoder | None) -> Texts:
    """The tokens of a pool of texts, from the cache where they were made before.

    Raises:
        DataError: without an encoder, or naming the text that cannot be used.
    """
    if encoder is None:
        raise DataError(
            f"{pool.name} holds texts, which this network cannot read; "
            "use a language model: model='hf:FOLDER-OR-HUB-NAME' (model.name=hf model.path=...)"
        )
    tags = tag_names(pool.answers, encoder, pool.name)

    def build() -> dict[str, NDArray[Any]]:
        made = encoded(pool.inputs, pool.answers, encoder, tags, lambda row: f"{pool.name}, text {row} from 0")
        return {"inputs": made.inputs, **({} if made.targets is None else {"targets": made.targets})}

    arrays = cached_arrays("tokens", (pool.sha256(), encoder.key, repr(tags)), build)
    return Texts(arrays["inputs"], arrays.get("targets"), tags)


def tag_names(answers: NDArray[Any] | None, encoder: Encoder, origin: str) -> tuple[str, ...]:
    """Every tag in the answers, sorted; none for other kinds than ``tags``.

    Raises:
        DataError: if the encoder's kind needs answers and there are none.
    """
    if encoder.kind == "classes":
        return ()
    if answers is None:
        wanted = {"tags": "one tag per word", "completions": "a completion for each prompt"}[encoder.kind]
        raise DataError(f"{origin} has a class for each text only; the model's task needs {wanted}")
    return tuple(sorted({tag for text in answers for tag in str(text).split()})) if encoder.kind == "tags" else ()


def encoded(
    texts: NDArray[Any],
    answers: NDArray[Any] | None,
    encoder: Encoder,
    tags: Sequence[str],
    at: Callable[[int], str],
) -> Encoded:
    """Tokens of the texts; a fault names where its row stands.

    Args:
        texts: [n].
        answers: [n], for kinds that need them.
        encoder: The model's.
        tags: Names of all tags.
        at: Says where a row stands.

    Raises:
        DataError: naming the first row that cannot be used.
    """
    try:
        return encoder.encode(
            [str(text) for text in texts],
            None if answers is None or encoder.kind == "classes" else [str(answer) for answer in answers],
            tags,
        )
    except RowError as error:
        raise DataError(f"{at(error.row)}: {error}") from error
