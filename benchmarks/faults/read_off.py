"""How well a client reads another's update off its own models, against what its crowd K_eff says.

Run from the repository's root::

    python benchmarks/faults/read_off.py

Twelve clients of digits whose labels are permuted by group, in clusters of 2, 3, 4, 6 and 12. Before and after every
round each client looks at its own model only, takes away its own part h_ii g_i, and compares what is left with every
other client's update. Written: the crowd, and means over clients and the second half of the rounds of the best cosine
and of the cosine that guessing with its own update would have had with the same client. The server's steps are the
product's own, momentum and shrinkage included.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedmerge.core.crowd import crowd
from fedmerge.experiment.config import build_config
from fedmerge.experiment.federation import load_data
from fedmerge.experiment.simulation import models_now, one_thread, prepare, rounds

CLIENTS = 12
CLUSTERS = (2, 3, 4, 6, 12)
RESULT = Path("benchmarks/results/faults/read_off.md")


class Listening:
    """A method whose server's ear notes the updates; everything else is the method's own."""

    def __init__(self, method: Any) -> None:
        self.method, self.updates = method, torch.empty(0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.method, name)

    def receive(self, state: Any, clients: Tensor, update: Any, num_examples: Tensor) -> Any:
        """Notes [C, P] and passes everything on."""
        self.updates = update.delta.double()
        return self.method.receive(state, clients, update, num_examples)


@dataclass(frozen=True)
class Reading:
    """What one client read in one round."""

    cosine: float
    guess: float
    crowd: float


def readings(method: dict[str, Any], size: int, seed: int, count: int) -> list[Reading]:
    """Of all clients in the second half of the rounds."""
    config = build_config(
        {
            "method": method,
            "source": {"name": "digits"},
            "partition": {
                "name": "permuted", "clients": CLIENTS, "groups": CLIENTS // size, "train": 100, "validation": 20,
                "test": 20,
            },
            "rounds": count,
            "evaluate_every": 1,
            "seed": seed,
            "precision": "float64",
        }
    )  # fmt: skip
    data = load_data(config.source, config.partition, seed, config.model)
    setup, progress = prepare(config.method, data, config.model, config.training, config.run)
    listening = Listening(setup.played)
    setup = replace(setup, played=listening)
    examples = torch.tensor([client.num_train for client in data.clients])
    found, before, weights = [], _models(setup, progress), None
    for now, record in rounds(setup, progress):
        after = _models(setup, now)
        if 2 * record.round > count and weights is not None:
            found += _read(before - after, listening.updates, weights, examples)
        rows = listening.mixing(now.state)
        before, weights = after, torch.ones(CLIENTS, 1, dtype=torch.float64) if rows is None else rows
    return found


def _models(setup: Any, progress: Any) -> Tensor:
    return torch.stack([model for model in models_now(setup, progress) if isinstance(model, Tensor)]).double()


def _read(seen: Tensor, updates: Tensor, weights: Tensor, examples: Tensor) -> list[Reading]:
    said = crowd(weights, examples)
    found = []
    for i in range(CLIENTS):
        left = seen[i] - said.leverage[i] * updates[i]
        cosines = torch.cosine_similarity(left, updates, dim=1)
        guesses = torch.cosine_similarity(updates[i], updates, dim=1)
        cosines[i] = -1
        best = int(cosines.argmax())
        found.append(Reading(float(cosines[best]), float(guesses[best]), float(said.effective[i])))
    return found


METHODS: dict[str, Any] = {
    "oracle (one model per cluster, plain averages)": lambda _: {"name": "oracle"},
    "fedmerge (default, as many models as clusters)": lambda size: {
        "name": "fedmerge", "num_models": CLIENTS // size,
    },
}  # fmt: skip


def page(seeds: int, count: int) -> str:
    """The result as Markdown."""
    lines = [
        f"`{' '.join(['python', *sys.argv])}`",
        "",
        "# What clients read off their own models",
        "",
        "Digits, labels permuted by group, 12 clients with 100 training examples each, perceptron of 64 units, "
        f"{count} rounds with all clients, seeds 0 to {seeds - 1}.",
        "Means over clients, seeds and the second half of the rounds.",
        "",
        "| method | clients in a cluster | crowd K_eff | cosine read | cosine guessed |",
        "|---|--:|--:|--:|--:|",
    ]
    for name, method in METHODS.items():
        for size in CLUSTERS:
            found = [r for seed in range(seeds) for r in readings(method(size), size, seed, count)]
            means = [sum(getattr(r, field) for r in found) / len(found) for field in ("crowd", "cosine", "guess")]
            lines.append(f"| {name} | {size} | {means[0]:.2f} | {means[1]:.3f} | {means[2]:.3f} |")
    return "\n".join([*lines, "", *NOTES, ""])


NOTES = (
    "Cosine read: of what the client has left of its own model's step with the update of the client that it fits best. "
    "Cosine guessed: of its own update with the same client's, which it knows without looking at any model.",
)


def main() -> None:
    """Writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    with one_thread():
        text = page(options.seeds, options.rounds)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(text, encoding="utf-8")
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
