"""One client's model as a folder that other programs load."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from fedmerge.core.errors import UsageError, unknown_name
from fedmerge.core.files import write_atomically
from fedmerge.exporting.card import Card, card_text, difference_text
from fedmerge.exporting.client import Client
from fedmerge.exporting.files import arriving
from fedmerge.exporting.mergekit import RECIPE, write_mergekit
from fedmerge.exporting.pretrained import Pretrained, write_merged, write_peft
from fedmerge.exporting.small import write_onnx, write_torch
from fedmerge.exporting.snippets import snippet
from fedmerge.models._adapted import Adapted

Kind = Literal["peft", "merged", "mergekit", "onnx", "torch"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        folder: Where.
        kind: As what.
        files: Their names within, sorted.
        difference: Of kind ``mergekit``: how far the recipe's result is from the client's model, see
            `fedmerge.exporting.mergekit.difference`. Of kind ``onnx``: the largest difference of outputs on three
            random inputs. None for the others.
        private: Names of the files that hold the client's merging weights, which say whom it is like: only their owner
            may read them, and they are not for publication.
    """

    folder: Path
    kind: Kind
    files: tuple[str, ...]
    difference: float | None = None
    private: tuple[str, ...] = ()


def export_client(client: Client, out: Path, kind: str | None = None, *, row: bool = False) -> Exported:
    """Writes a client's model and its card.

    Args:
        client: Whose.
        out: Created; must be empty.
        kind: One of `KINDS`; by default ``peft`` for pretrained models and ``torch`` for others.
        row: Whether the card tells the client's merging weights.

    Raises:
        UsageError: if the kind does not exist or does not fit the network or the method, or the folder is not empty.
        FedmergeError: if a library is missing.
    """
    chosen = _kind(client, kind)
    with arriving(out) as part:
        card, difference = _WRITERS[chosen](client, part)
        tells = row and client.row() is not None
        write_atomically(part / "README.md", card_text(client, card, row=tells), private=tells)
        files = tuple(sorted(str(path.relative_to(part)) for path in part.rglob("*") if path.is_file()))
    private = (*(("README.md",) if tells else ()), *((RECIPE,) if chosen == "mergekit" else ()))
    return Exported(out, chosen, files, difference, private)


def write_kind(client: Client, folder: Path, kind: Kind) -> Card:
    """Writes the files of one kind into a folder that is there, for a card that the caller writes.

    Raises:
        UsageError: if the kind does not fit the network or the method.
        FedmergeError: if a library is missing.
    """
    return _WRITERS[kind](client, folder)[0]


def default_kind(client: Client) -> Kind:
    """``peft`` for pretrained models and ``torch`` for others."""
    return "peft" if isinstance(client.trained.module, Adapted) else "torch"


def _kind(client: Client, kind: str | None) -> Kind:
    if kind is None:
        return default_kind(client)
    known = next((own for own in KINDS if own == kind), None)
    if known is None:
        raise UsageError(unknown_name("kind", kind, KINDS))
    return known


def _as_peft(client: Client, folder: Path) -> tuple[Card, None]:
    parts = write_peft(client, folder)
    write_form(client, folder, parts)
    title = f"Adapter of {client.name} for {parts.base_title}"
    return Card(title, block(snippet(parts, "peft")), base=parts), None


def _as_merged(client: Client, folder: Path) -> tuple[Card, None]:
    parts = write_merged(client, folder)
    write_form(client, folder, parts)
    title = f"{parts.base_title} with the adapter of {client.name} folded in"
    facts = (("weights", f"{parts.recipe.dtype}, {type(parts.body.get_base_model()).__name__}"),)
    return Card(title, block(snippet(parts, "merged")), facts, base=parts), None


def _as_mergekit(client: Client, folder: Path) -> tuple[Card, float]:
    parts, difference = write_mergekit(client, folder)
    write_form(client, folder, parts)
    run = (
        "`mergekit-yaml recipe.yaml merged --lora-merge-cache cache`, called in this folder, writes the merged weights "
        "to `merged` (mergekit keeps each model there with its adapter folded in, in `cache`). Then:\n\n"
    )
    gives = difference_text(difference)
    limits = (
        f"The recipe's result is {gives}.",
        f"`{RECIPE}` holds this client's merging weights, which say whom it is like, and the folder all models of the "
        "server: they tell about other clients too and are not for publication. Only its owner may read the recipe.",
    )
    title = f"Recipe for the model of {client.name} on {parts.base_title}"
    facts = (("the recipe gives", gives),)
    return Card(title, run + block(snippet(parts, "mergekit")), facts, limits, base=parts), difference


def write_form(client: Client, folder: Path, parts: Pretrained | None) -> bool:
    """``inputs.json``: shape and scaling of raw inputs as in ``serving.json``; none for texts, or if unknown."""
    form = client.trained.serving.form
    if form is None or (parts is not None and parts.image is None):
        return False
    (folder / "inputs.json").write_text(json.dumps(form.plain(), indent=1) + "\n", encoding="utf-8")
    return True


def _as_torch(client: Client, folder: Path) -> tuple[Card, None]:
    module = write_torch(client, folder)
    scaled = write_form(client, folder, None)
    imports, make = building(client)
    load = 'network.load_state_dict(load_file("model.safetensors"))\nnetwork.eval()'
    lines = [*imports, "from safetensors.torch import load_file", "", f"network = {make}", load]
    use = block("\n".join(lines)) + of_outputs(client, scaled=scaled)
    return Card(f"Network of {client.name}", use, (("network", type(module).__name__),)), None


def building(client: Client) -> tuple[list[str], str]:
    """Imports and the expression that makes the client's network, as Python; ``...`` where the recipe is not known."""
    recipe, shape = client.trained.serving.model, client.trained.input_shape
    if recipe is None or recipe["name"] == "import" or shape is None:
        return [], f"...  # the {type(client.trained.module).__name__} that the run was made with"
    classes = len(client.trained.record.class_names)
    make = f"NETWORKS.build({recipe!r}, 'model', []).build({tuple(shape)!r}, {classes})"
    return ["from fedmerge.models import NETWORKS"], make


_ONNX = """\
import json

import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession("model.onnx")
with open("inputs.json") as file:
    inputs = json.load(file)
mean, std = (np.array(inputs[name], dtype=np.float32) for name in ("mean", "std"))


def outputs(raw):
    return session.run(None, {"inputs": (np.asarray(raw, dtype=np.float32) - mean) / std})[0]"""
_ONNX_AS_IT_IS = """\
import onnxruntime

session = onnxruntime.InferenceSession("model.onnx")


def outputs(inputs):
    return session.run(None, {"inputs": inputs})[0]"""


def _as_onnx(client: Client, folder: Path) -> tuple[Card, float]:
    module, difference = write_onnx(client, folder)
    scaled = write_form(client, folder, None)
    facts = (
        ("network", f"{type(module).__name__}, float32"),
        ("largest difference of outputs", f"{difference:.1e} on three random inputs"),
    )
    use = block(_ONNX if scaled else _ONNX_AS_IT_IS) + of_outputs(client, scaled=scaled)
    return Card(f"Network of {client.name}", use, facts), difference


def of_outputs(client: Client, *, scaled: bool) -> str:
    """How inputs are scaled and what outputs mean, Markdown."""
    names = client.trained.record.class_names
    scaling = (
        "The network is given `(x - mean) / std` with `mean` and `std` of `inputs.json`, which also has shape and type "
        "of raw inputs x."
        if scaled
        else "Inputs are given as the run's clients gave them; their scaling is not known."
    )
    return f"\n{scaling} Output k, from 0, stands for class k of {', '.join(names)}.\n\n"


def block(code: str) -> str:
    """Python as Markdown."""
    return f"```python\n{code}\n```\n"


_WRITERS: dict[Kind, Callable[[Client, Path], tuple[Card, float | None]]] = {
    "peft": _as_peft,
    "merged": _as_merged,
    "mergekit": _as_mergekit,
    "onnx": _as_onnx,
    "torch": _as_torch,
}
