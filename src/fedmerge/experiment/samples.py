"""What the clients' language models make of a few of their own test prompts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fedmerge.core.vector import twin
from fedmerge.data.encoding import NO_TARGET
from fedmerge.experiment.federation import encoder_of
from fedmerge.experiment.simulation import Progress, Setup, models_now

_CLIENTS, _PROMPTS, _TOKENS = 8, 2, 40


def written_samples(setup: Setup, progress: Progress, model: Any) -> tuple[Mapping[str, str], ...] | None:
    """Greedy completions of two test prompts of one client per task, at most eight clients; None for other networks.

    Args:
        setup: Of the run.
        progress: Whose models write.
        model: The run's recipe, whose encoder knows the texts.
    """
    encoder: Any = encoder_of(model)
    if setup.data.kind != "completions" or encoder is None or not hasattr(setup.module, "complete"):
        return None
    models = models_now(setup, progress)
    network: Any = twin(setup.module).eval()
    samples: list[Mapping[str, str]] = []
    for i in _spread(setup):
        vector, client = models[i], setup.data.clients[i]
        if not isinstance(vector, Tensor):
            return None
        setup.layout.write(vector, network)
        for tokens, targets in list(zip(*client.test, strict=True))[:_PROMPTS]:
            prompt, wanted = _parts(tokens, targets)
            completion = network.complete(prompt, min(_TOKENS, len(wanted) + 10), encoder.end)
            task = setup.data.tasks[i] if setup.data.tasks else ""
            texts = {"prompt": prompt, "completion": completion, "wanted": wanted}
            samples.append({"client": client.name, "task": task, **{k: encoder.decode(v) for k, v in texts.items()}})
    return tuple(samples)


def _spread(setup: Setup) -> list[int]:
    """The first client of each task, or the first clients."""
    if setup.data.tasks is None:
        return list(range(min(_CLIENTS, len(setup.data.clients))))
    return sorted({task: i for i, task in reversed(list(enumerate(setup.data.tasks)))}.values())[:_CLIENTS]


def _parts(tokens: Tensor, targets: Tensor) -> tuple[list[int], list[int]]:
    """The prompt and the completion of one example."""
    counted = torch.nonzero(targets != NO_TARGET).flatten()
    return tokens[: int(counted[0]) + 1].tolist(), targets[counted].tolist()
