"""The README of an exported model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from fedmerge._version import __version__
from fedmerge.exporting.client import Client
from fedmerge.exporting.pretrained import Pretrained
from fedmerge.models.hf import weights_sha256

_LARGEST_ROUNDING = 1e-5
_TELLS = "The merging weights above say whom this client is like: this file is not for publication."


@dataclass(frozen=True)
class Card:
    """What a card says beside the run.

    Attributes:
        title: Its first line.
        use: How the model is loaded, Markdown.
        facts: Further rows of its table.
        limits: Sentences.
        base: Of a pretrained model.
    """

    title: str
    use: str
    facts: tuple[tuple[str, str], ...] = ()
    limits: tuple[str, ...] = ()
    base: Pretrained | None = None


def card_text(client: Client, card: Card, *, row: bool) -> str:
    """A model card in Markdown.

    Args:
        client: Whose model it is.
        card: What the kind of file adds.
        row: Whether its merging weights are told, which say whom it is like.
    """
    facts = [*_base_facts(card.base), *_facts(client, card.base), *card.facts]
    weights = client.row() if row else None
    if weights is not None:
        facts.append(("merging weights", ", ".join(f"{weight:.4f}" for weight in weights)))
    told = [] if weights is None else [_TELLS]
    limits = [*card.limits, *told, *_limits(client, card)]
    return f"""# {card.title}

Made by fedmerge {__version__} for one client of a federation.

| | |
|---|---|
{_rows(facts)}

## Use

{card.use}
## Limits

{chr(10).join(f"- {limit}" for limit in limits)}
"""


def _rows(facts: Sequence[tuple[str, str]]) -> str:
    return "\n".join(f"| {name} | {_cell(value)} |" for name, value in facts)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _base_facts(base: Pretrained | None) -> list[tuple[str, str]]:
    if base is None:
        return []
    sha256 = weights_sha256(base.recipe.path)
    weights = "" if sha256 is None else f", weights sha256 `{sha256}`"
    adapter = base.recipe.adapter if base.recipe.adapter == "ia3" else f"{base.recipe.adapter}, rank {base.recipe.rank}"
    return [("base", f"`{base.base_name}`{weights}"), ("adapter", adapter)]


_MEASURED = {"tag": "of the words of {} texts", "complete": "of the tokens of {} completions"}


def _facts(client: Client, base: Pretrained | None) -> list[tuple[str, str]]:
    record, kind = client.trained.record, None if base is None else base.recipe.task
    measured = _MEASURED.get(kind or "", "of {} examples")
    options = dict(record.options)
    return [
        ("client", client.name),
        *([] if record.tasks is None else [("task", record.tasks[client.index])]),
        *([] if kind == "complete" else [("classes", ", ".join(client.own_class_names))]),
        ("trained on", f"{record.num_train[client.index]} examples of its own, and through the server on others'"),
        ("accuracy, test", _score(client, "test", measured)),
        ("accuracy, validation", _score(client, "validation", measured)),
        ("method", f"{record.method} `{json.dumps(options)}`"),
        ("seed", str(record.seed)),
        ("round", f"{client.trained.progress.round}, {client.why_round or _why_this_round(client)}"),
        ("data sha256", f"`{record.data_sha256}`"),
        ("run made by", f"fedmerge {record.versions.get('fedmerge', 'of unknown version')}"),
        *client.facts,
    ]


def _why_this_round(client: Client) -> str:
    if any(client.trained.record.num_validation):
        return "chosen by the clients' mean accuracy on validation"
    return "the last: nobody has validation examples"


def _score(client: Client, split: str, measured: str) -> str:
    found = client.score(split)
    return "not known" if found is None else f"{100 * found[0]:.1f} % {measured.format(found[1])}"


def _limits(client: Client, card: Card) -> list[str]:
    limits = []
    if 0 < len(client.own_classes) < len(client.trained.record.class_names) and card.base is not None:
        limits.append(
            "Accuracies were measured in the run, before the output layer was cut to the classes that this client has "
            "training examples of; it cannot give any other class."
        )
    limits.append("The accuracies are those of one seed on this client's own examples; other data may differ.")
    if card.base is not None:
        limits.append(f"The licence of the base `{card.base.base_name}` holds for this model too; see there.")
    limits.append("The weights come from training on clients' data and may tell about it.")
    return limits


def difference_text(difference: float) -> str:
    """What a relative difference between a recipe's result and the client's model means."""
    if difference <= _LARGEST_ROUNDING:
        return "the client's model, up to rounding"
    return (
        "near the client's model: the product B A of its adapters' factors is "
        f"{100 * difference:.2g} % away from the weighted mean of the server's products, which the recipe gives"
    )
