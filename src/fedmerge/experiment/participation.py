"""Who is asked, who answers, and who is too late: availability, drop-outs and stragglers on a virtual clock."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fedmerge.core.errors import DataError, UsageError, unknown_name
from fedmerge.core.options import check_options, option
from fedmerge.core.randomness import generator

Sampling = Literal["uniform", "poisson", "weighted", "round-robin"]
Clients = NDArray[np.int64]
_COLUMNS = ["client", "from", "to"]
_MOST_BYTES = 1 << 26
_MOST_LETTERS = 40


@dataclass(frozen=True)
class Participation:
    """Which clients take part in a round and which of them answer in time."""

    sampling: Sampling = option(
        "uniform",
        help="how the share `fraction` is drawn: so many of all, each by itself, by number of examples, or in turn",
    )
    dropout: float = option(0.0, at_least=0, below=1, help="chance that a client that was asked never answers")
    quorum: float = option(
        0.3, at_least=0, at_most=1, help="share of the clients asked below which a round is abandoned"
    )
    availability: str = option(
        "always", help="always, diurnal, or a CSV file: client,from,to (rounds; to is empty for ever)"
    )
    awake: float = option(0.5, above=0, at_most=1, help="share of a day that a client is there (diurnal)")
    day: int = option(24, at_least=1, help="rounds of a day (diurnal)")
    deadline: float | None = option(
        None,
        above=0,
        help="virtual seconds after which replies of a round are late; a typical client passes 100 examples a second",
    )
    spread: float = option(0.0, at_least=0, help="standard deviation of the logarithm of the clients' speeds")
    jitter: float = option(0.0, at_least=0, help="the same for one client from round to round")

    def __post_init__(self) -> None:
        check_options(self)
        defaults = type(self)
        idle = [
            *(("awake", "day") if self.availability != "diurnal" else ()),
            *(("spread", "jitter") if self.deadline is None else ()),
        ]
        needs = {"awake": "availability='diurnal'", "day": "availability='diurnal'"}
        faults = [
            f"Participation.{name}: got {getattr(self, name)!r}, which has no effect without "
            f"{needs.get(name, 'a deadline')}; leave it out"
            for name in idle
            if getattr(self, name) != getattr(defaults, name)
        ]
        if faults:
            raise UsageError("\n".join(faults))


SPEED = 100.0
"""Training examples that a client of typical speed passes in a virtual second."""


@dataclass(frozen=True)
class Presence:
    """When the clients of a trace are there.

    Attributes:
        spans: For every client its (first, last) rounds; both included.
    """

    spans: tuple[tuple[tuple[int, float], ...], ...]

    def there(self, round_number: int) -> NDArray[np.bool_]:
        """[N] whether each client can be asked in a round."""
        return np.array([any(a <= round_number <= b for a, b in spans) for spans in self.spans])


@dataclass(frozen=True)
class Turnout:
    """What became of the clients of a round.

    Attributes:
        cohort: Clients that were asked, ascending.
        dropped: Those of them that never answer.
        late: Those that answer after the deadline.
        quorum: Replies that are needed.
        seconds: Virtual time that the round took; None without a deadline.
    """

    cohort: tuple[int, ...]
    dropped: frozenset[int]
    late: frozenset[int]
    quorum: int
    seconds: float | None

    @property
    def training(self) -> tuple[int, ...]:
        """Clients whose replies arrive in time."""
        return tuple(i for i in self.cohort if i not in self.dropped and i not in self.late)


def presence_of(participation: Participation, names: Sequence[str]) -> Presence | None:
    """The trace that the options name, read; None where they name none.

    Args:
        participation: The options.
        names: [N] of the clients.

    Raises:
        UsageError: if there is no such file.
        DataError: naming file and line of what is wrong.
    """
    if participation.availability in ("always", "diurnal"):
        return None
    path = Path(participation.availability)
    try:
        if not path.is_file():
            raise UsageError(
                f"participation.availability: got {str(path)!a}; expected 'always', 'diurnal' or a CSV file with the "
                f"columns {', '.join(_COLUMNS)}"
            )
        if path.stat().st_size > _MOST_BYTES:
            raise DataError(f"{path}: a trace of {path.stat().st_size:,} bytes; expected {_MOST_BYTES:,} at most")
        with path.open(encoding="utf-8", newline="") as file:
            return Presence(_spans(csv.reader(file, strict=True), str(path), names))
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{path} is not a CSV file in UTF-8: {error}") from error


def _spans(rows: Iterable[list[str]], where: str, names: Sequence[str]) -> tuple[tuple[tuple[int, float], ...], ...]:
    spans: dict[str, list[tuple[int, float]]] = {name: [] for name in names}
    for number, row in enumerate(rows, 1):
        if number == 1:
            if row != _COLUMNS:
                raise DataError(f"{where}, line 1: got {str(row)[:_MOST_LETTERS]!a}; expected {','.join(_COLUMNS)}")
        elif row:
            name, span = _span(row, f"{where}, line {number}", spans)
            spans[name].append(span)
    return tuple(tuple(sorted(found)) for found in spans.values())


def _span(row: list[str], where: str, known: Mapping[str, object]) -> tuple[str, tuple[int, float]]:
    if len(row) != len(_COLUMNS):
        raise DataError(f"{where}: got {len(row)} values; expected {', '.join(_COLUMNS)}")
    name, first, last = row
    if name not in known:
        raise DataError(f"{where}: {unknown_name('client', name[:_MOST_LETTERS], known)}")
    span = _round(first, where), math.inf if last == "" else _round(last, where)
    if span[0] > span[1]:
        raise DataError(f"{where}: got from {first} to {last}; expected the first round before the last")
    return name, span


def _round(text: str, where: str) -> int:
    if text.isascii() and text.isdigit() and len(text) < 10 and int(text) >= 1:
        return int(text)
    raise DataError(f"{where}: got {text[:_MOST_LETTERS]!a} for a round; expected a whole number, 1 or more")


def turnout(
    participation: Participation,
    *,
    fraction: float,
    seed: int,
    round_number: int,
    num_examples: Sequence[int],
    passes: Sequence[int],
    presence: Presence | None = None,
) -> Turnout:
    """Who is asked in a round and who answers; the same for every method.

    Args:
        participation: The options.
        fraction: Share of the clients that is asked.
        seed: Of the run; the draws depend on it and on the round alone.
        round_number: From 1.
        num_examples: [N] training examples.
        passes: [N] training examples that each client passes in a round; not looked at without a deadline.
        presence: The trace, if the options name one.
    """
    there = _there(participation, seed, round_number, len(num_examples), presence)
    cohort = _asked(participation.sampling, there, fraction, seed, round_number, np.asarray(num_examples))
    lost = generator(seed, "drop-outs", round_number).random(len(num_examples)) < participation.dropout
    dropped = frozenset(i for i in cohort if lost[i])
    quorum = max(1, math.ceil(participation.quorum * len(cohort)))
    if participation.deadline is None:
        return Turnout(cohort, dropped, frozenset(), quorum, None)
    needed = _seconds(participation, seed, round_number, np.asarray(passes, dtype=np.float64))
    late = frozenset(i for i in cohort if i not in dropped and not needed[i] <= participation.deadline)
    waits = bool(dropped or late)
    seconds = participation.deadline if waits else max((float(needed[i]) for i in cohort), default=0.0)
    return Turnout(cohort, dropped, late, quorum, seconds)


def _there(
    participation: Participation, seed: int, round_number: int, num_clients: int, presence: Presence | None
) -> Clients:
    """Indices of the clients that can be asked."""
    if presence is not None:
        return np.flatnonzero(presence.there(round_number))
    if participation.availability != "diurnal":
        return np.arange(num_clients)
    begins = generator(seed, "time zones").random(num_clients)
    hour = ((round_number - 1) / participation.day - begins) % 1.0
    return np.flatnonzero(hour < participation.awake)


def _asked(
    sampling: Sampling, there: Clients, fraction: float, seed: int, round_number: int, num_examples: Clients
) -> tuple[int, ...]:
    """Clients of the cohort, ascending."""
    rng, N = generator(seed, "cohort", round_number), len(num_examples)
    if sampling == "poisson":
        return tuple(there[(rng.random(N) < fraction)[there]].tolist())
    if fraction >= 1 or len(there) == 0:
        return tuple(there.tolist())
    size = min(max(1, round(fraction * N)), len(there))
    if sampling == "round-robin":
        first = (round_number - 1) * size
        return tuple(sorted({int(there[(first + k) % len(there)]) for k in range(size)}))
    weights = None if sampling == "uniform" else num_examples[there] / num_examples[there].sum()
    chosen = there[rng.choice(len(there), size, replace=False, p=weights)]
    return tuple(np.sort(chosen).tolist())


def _seconds(
    participation: Participation, seed: int, round_number: int, passes: NDArray[np.float64]
) -> NDArray[np.float64]:
    """[N] virtual seconds that each client needs in this round."""
    steady = generator(seed, "speeds").normal(size=len(passes)) * participation.spread
    varying = generator(seed, "speeds of a round", round_number).normal(size=len(passes)) * participation.jitter
    slow: NDArray[np.float64] = np.exp(steady + varying)
    return passes / SPEED * slow
