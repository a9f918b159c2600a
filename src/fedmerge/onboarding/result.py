"""What a new client gets: a model, how it came about, and how good it is."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Float
from safetensors.torch import save
from torch import Tensor, nn

from fedmerge._version import __version__
from fedmerge.core.errors import UsageError
from fedmerge.core.files import write_atomically
from fedmerge.experiment.record import to_plain
from fedmerge.onboarding.card import model_card
from fedmerge.onboarding.fit import Fit
from fedmerge.onboarding.server import Server

_Z = 1.959963984540054
"""97.5 % quantile of the normal distribution."""


@dataclass(frozen=True)
class Estimate:
    """How good the model is expected to be on further samples of this client.

    Attributes:
        accuracy: Share of right answers on held-out samples, 0..1.
        low: Lower end of its 95 % Wilson interval.
        high: Upper end.
        loss: Mean cross-entropy in nats.
        count: Held-out samples.
        how: Where they come from.
    """

    accuracy: float
    low: float
    high: float
    loss: float
    count: int
    how: str

    def __str__(self) -> str:
        return f"{self.accuracy:.1%} ({self.low:.1%} to {self.high:.1%}), {self.how} of {self.count} samples"


def estimate_of(losses: Float[Tensor, " m"], right: Tensor, how: str) -> Estimate:
    """The estimate from the held-out samples."""
    hits, count = int(right.sum()), len(right)
    low, high = wilson(hits, count)
    return Estimate(hits / count, low, high, float(losses.mean()), count, how)


def wilson(hits: int, count: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson, Journal of the American Statistical Association, 1927).

    >>> [round(end, 3) for end in wilson(8, 10)]
    [0.49, 0.943]
    """
    share, room = hits / count, _Z**2 / count
    middle = (share + room / 2) / (1 + room)
    half = _Z / (1 + room) * math.sqrt(share * (1 - share) / count + room / (4 * count))
    return max(0.0, middle - half), min(1.0, middle + half)


@dataclass(frozen=True)
class Tried:
    """One way that was tried, on the held-out samples.

    Attributes:
        way: Its name.
        epochs: Of fine-tuning, the best of those tried; 0 for ways without.
        accuracy: Share of right answers, 0..1; None if nothing was held out.
        loss: Mean cross-entropy in nats; None if nothing was held out.
        chosen: Whether it is the client's.
    """

    way: str
    epochs: int
    accuracy: float | None
    loss: float | None
    chosen: bool


@dataclass(frozen=True, repr=False)
class Onboarded:
    """A new client's model.

    Attributes:
        way: How it was made.
        epochs: Of fine-tuning; 0 if there was none.
        row: [d] its merging weights, or [G, d] where groups of layers have rows of their own. After fine-tuning it is
            the row that tuning started from.
        params: [P] the model as one vector.
        estimate: How good it is expected to be; None with too few samples.
        missing: Why there is no estimate; empty if there is one.
        candidates: All that was tried.
        fit: How the client compares with the known ones.
        num_samples: That the model was made from.
        seconds: From samples to model.
        server: The run.
    """

    way: str
    epochs: int
    row: Tensor
    params: Tensor
    estimate: Estimate | None
    missing: str
    candidates: tuple[Tried, ...]
    fit: Fit
    num_samples: int
    seconds: float
    server: Server

    def __repr__(self) -> str:
        accuracy = "no estimate" if self.estimate is None else f"accuracy {self.estimate}"
        return f"<Onboarded by {self.way!r}: {accuracy}; {self.fit.verdict}>"

    def module(self) -> nn.Module:
        """The network, ready to use, in evaluation mode."""
        return self.server.module_of(self.params)

    def plain(self) -> dict[str, Any]:
        """Everything but the parameters, as what JSON knows."""
        record, serving = self.server.record, self.server.serving
        fields = ("way", "epochs", "estimate", "missing", "candidates", "fit", "num_samples", "seconds")
        found: dict[str, Any] = to_plain({name: getattr(self, name) for name in fields})
        return {
            "format": "fedmerge onboarded 1",
            "fedmerge": __version__,
            "run": {"label": record.label, "method": record.method, "seed": record.seed, "setting": record.setting},
            **found,
            "row": self.row.tolist(),
            "class_names": list(record.class_names),
            "model": serving.model,
            "inputs": None if serving.form is None else serving.form.plain(),
        }

    def save(self, folder: Path | str) -> Path:
        """Writes ``model.safetensors``, ``onboard.json`` and ``README.md``; nothing in them can execute code.

        The last two hold the client's merging weights and name the clients nearest to it: only their owner may read
        them.

        Args:
            folder: Created; files of these names are refused, not overwritten.

        Raises:
            UsageError: if one of the files is there already or the folder cannot be written.
        """
        folder = Path(folder)
        taken = [name for name in ("model.safetensors", "onboard.json", "README.md") if (folder / name).exists()]
        if taken:
            raise UsageError(f"{folder} holds {', '.join(taken)} already; nothing was overwritten. Give another folder")
        tensors = {name: tensor.detach().contiguous().clone() for name, tensor in self.module().state_dict().items()}
        plain = self.plain()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            card = model_card(plain, type(self.server.module).__name__)
            write_atomically(folder / "onboard.json", json.dumps(plain, indent=1) + "\n", private=True)
            write_atomically(folder / "README.md", card, private=True)
            (folder / "model.safetensors").write_bytes(save(tensors))
        except OSError as error:
            raise UsageError(f"cannot write {folder}: {error.strerror}. Give another folder") from error
        return folder


def row_of(rows: Float[Tensor, "G d"]) -> Tensor:
    """[d] where there is one group of layers, else [G, d]."""
    return rows[0] if len(rows) == 1 else rows
