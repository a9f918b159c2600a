"""Small federations on tiny pretrained models, trained once per session, and how their exports are read back.

Nobody has validation examples, so that the round which is exported is the last one, whatever was learned.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor

import fedmerge
import tiny_models
from fedmerge.data import from_arrays, from_texts
from fedmerge.models.hf import Hf
from tiny_models import SENTENCES

TRAINING = {"optimizer": "adamw", "lr": 0.02, "batch_size": 8, "epochs": 2}
UNSEEN = ["the food was good", "a bad day with cold wind and rain again", "gold and oil"]
"""Texts that no client has, of several lengths."""
TWO_MODELS = {"name": "fedmerge", "num_models": 2, "search_rounds": 1, "lean": 0.7}


def texts(labels: tuple[str, ...], seed: int, count: int = 24) -> tuple[list[str], list[str]]:
    """Shuffled words with labels by their first letter, so that something can be learned."""
    rng = np.random.default_rng([11, seed])
    own = [" ".join(rng.permutation(SENTENCES[rng.integers(len(SENTENCES))].split())) for _ in range(count)]
    return own, [labels[ord(text[0]) % len(labels)] for text in own]


def classified(recipe: Hf, num_classes: tuple[int, int] = (2, 3)) -> Any:
    """Four clients of two tasks without a common class."""
    own = [tuple(f"{task}{k}" for k in range(count)) for task, count in zip("ab", num_classes, strict=True)]
    clients = {f"site-{i}": texts(own[i // 2], i) for i in range(4)}
    return from_texts(clients, recipe.encoder(), validation=0.0, tasks="by-label")


def tagged(recipe: Hf) -> Any:
    """Four clients; those of the second half know one tag more."""

    def tags(text: str, client: int) -> str:
        kinds = ("short", "long", "other")[: 2 + client // 2]
        return " ".join(kinds[len(word) % len(kinds)] for word in text.split())

    clients = {}
    for i in range(4):
        own, _ = texts(("",), i)
        clients[f"site-{i}"] = (own, [tags(text, i) for text in own])
    return from_texts(clients, recipe.encoder(), validation=0.0)


def completed(recipe: Hf) -> Any:
    """Four clients; half of them answer yes where the others answer no."""
    clients = {}
    for i in range(4):
        own, letters = texts(("yes", "no"), i)
        turned = {"yes": "no", "no": "yes"}
        clients[f"site-{i}"] = (own, [turned[word] if i < 2 else word for word in letters])
    return from_texts(clients, recipe.encoder(), validation=0.0)


def pictured() -> Any:
    """Four clients with grey images of 8 x 8; brightness tells the class."""
    clients = {}
    for i in range(4):
        rng = np.random.default_rng([12, i])
        labels = rng.integers(2 + i // 2, size=24)
        pixels = rng.integers(60, size=(24, 1, 8, 8)) + 60 * ((labels + i // 2) % 3)[:, None, None, None]
        clients[f"site-{i}"] = (pixels.astype(np.uint8), np.array([f"class {k}" for k in labels]))
    return from_arrays(clients, validation=0.0)


@dataclass(frozen=True)
class Case:
    """One kind of pretrained model.

    Attributes:
        maker: Of the tiny checkpoint.
        options: Of `Hf`.
        loader: Class of transformers that loads the base; ``AutoModel`` has no output layer.
        run: Options of the run.
    """

    maker: str
    options: dict[str, Any]
    loader: str
    run: dict[str, Any]


CASES = {
    "mean": Case("tiny_bert", {}, "AutoModel", {"keep": ["head"], "method": TWO_MODELS}),
    "mean of a language model": Case("tiny_gpt2", {"pooling": "mean"}, "AutoModel", {}),
    "own head": Case("tiny_bert", {"pooling": "model"}, "AutoModelForSequenceClassification", {"method": TWO_MODELS}),
    "own head of a language model": Case("tiny_gpt2", {}, "AutoModelForSequenceClassification", {"keep": ["head"]}),
    "tags": Case("tiny_bert", {"task": "tag"}, "AutoModelForTokenClassification", {"method": "fedper"}),
    "completions": Case("tiny_gpt2", {"task": "complete"}, "AutoModelForCausalLM", {"method": TWO_MODELS}),
    "llama": Case("tiny_llama", {"task": "complete"}, "AutoModelForCausalLM", {"method": "local"}),
    "images": Case(
        "tiny_vit", {"task": "images", "targets": ("q_proj", "v_proj")}, "AutoModelForImageClassification", {}
    ),
    "dora": Case("tiny_bert", {"adapter": "dora"}, "AutoModel", {}),
    "ia3": Case("tiny_bert", {"adapter": "ia3"}, "AutoModel", {"method": TWO_MODELS}),
    "last block": Case("tiny_bert", {"layers": 1, "pooling": "model"}, "AutoModelForSequenceClassification", {}),
    "embeddings": Case("tiny_bert", {"targets": ("word_embeddings", "query")}, "AutoModel", {}),
    "frozen A": Case("tiny_bert", {"train_a": False}, "AutoModel", {"method": TWO_MODELS}),
}
CLIENT = 2
"""Of the second task; the classes of the first are cut off."""


class Federations:
    """The trained federation of each case, made when it is first asked for.

    Args:
        place: Where checkpoints and run folders go.
    """

    def __init__(self, place: Path) -> None:
        self.place = place
        self.run = lru_cache(maxsize=None)(self._run)
        self.checkpoint = lru_cache(maxsize=None)(self._checkpoint)

    def _checkpoint(self, maker: str) -> str:
        return str(getattr(tiny_models, maker)(self.place / maker))

    def recipe(self, name: str) -> Hf:
        case = CASES[name]
        return Hf(self.checkpoint(case.maker), max_length=16, rank=4, **case.options)

    def folder(self, name: str) -> Path:
        self.run(name)
        return self.place / f"run {name}"

    def _run(self, name: str) -> fedmerge.Run:
        recipe, options = self.recipe(name), {"method": "fedmerge", "rounds": 3, **CASES[name].run}
        data = {"classify": classified, "tag": tagged, "complete": completed, "images": lambda _: pictured()}[
            recipe.task
        ](recipe)
        return fedmerge.run(data, model=recipe, training=TRAINING, out=self.place / f"run {name}", **options)

    def unseen(self, name: str) -> Tensor:
        """Inputs that the network is given for `UNSEEN`, or for images that no client has."""
        recipe = self.recipe(name)
        if recipe.task == "images":
            form = self.run(name).outcome.setup.data.form
            assert form is not None
            return form.scaled(images())
        if recipe.task == "classify":
            encoder = recipe.encoder()
            assert encoder is not None
            return torch.from_numpy(encoder.encode(UNSEEN, None, ()).inputs)
        encoder = recipe.encoder()
        assert encoder is not None
        if recipe.task == "tag":
            words = list(UNSEEN)
            return torch.from_numpy(
                encoder.encode(words, [" ".join("x" for _ in t.split()) for t in words], ("x",)).inputs
            )
        prompts = [encoder.prompt(text) for text in UNSEEN]
        padded = torch.full((len(prompts), max(map(len, prompts))), -1)
        for row, ids in zip(padded, prompts, strict=True):
            row[: len(ids)] = torch.tensor(ids)
        return padded

    def outputs(self, name: str, client: int = CLIENT) -> Tensor:
        """Of the client's model on unseen inputs, for its own classes only."""
        run = self.run(name)
        with torch.no_grad():
            found: Tensor = run.client_model(client)(self.unseen(name))
        return found[..., own_classes(run, client)] if self.recipe(name).task != "complete" else found


def own_classes(run: fedmerge.Run, client: int = CLIENT) -> list[int]:
    counts = run.record.class_counts
    assert counts is not None
    return [k for k, count in enumerate(counts[client]) if count]


def images() -> np.ndarray[Any, Any]:
    return np.random.default_rng(13).integers(255, size=(3, 1, 8, 8)).astype(np.uint8)


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    """Within the block this is the current folder; what the libraries warn of is theirs to mend."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        os.chdir(before)


def snippet_of(folder: Path) -> dict[str, Any]:
    """What the card's code defines, run in the folder."""
    names: dict[str, Any] = {}
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    with inside(folder):
        exec(compile(code, str(folder / "README.md"), "exec"), names)  # noqa: S102 - the card's own example
    return names


def with_plain_peft(base: Any, folder: Path) -> Any:
    """What ``PeftModel.from_pretrained`` makes of a base and a folder."""
    with inside(folder):
        return PeftModel.from_pretrained(base, str(folder)).eval()
