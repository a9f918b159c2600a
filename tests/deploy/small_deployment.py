"""A small federation of sites with files of their own, and a network that is in this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w

from fedmerge.deploy.client import answer_to
from fedmerge.deploy.federation import FederationConfig, read_federation
from fedmerge.deploy.link import Contact, Failure
from fedmerge.deploy.messages import Kind, Letter
from fedmerge.deploy.roll import Clock
from fedmerge.deploy.site import read_site

NAMES = ("clinic-a", "clinic-b", "clinic-c")


def write_federation(folder: Path, names: Sequence[str] = NAMES, **options: Any) -> FederationConfig:
    """A federation without certificates whose sites have numbers, each with a rule of its own behind its classes."""
    rng = np.random.default_rng(7)
    for number, name in enumerate(names):
        site = folder / "sites" / name
        site.mkdir(parents=True)
        x = rng.normal(size=(40 + 5 * number, 6)).astype(np.float32)
        rule = rng.normal(size=(6, 3))
        np.savez(site / "data.npz", x=x, y=np.argmax(x @ rule, axis=1))
        toml = {"name": name, "server": "127.0.0.1:9092", "data": {"path": "data.npz"}}
        (site / "site.toml").write_text(tomli_w.dumps(toml))
    table = {
        "rounds": 3,
        "evaluate_every": 1,
        "seed": 3,
        "method": {"name": "fedmerge"},
        "model": {"name": "mlp", "hidden": [8]},
        "training": {"batch_size": 10, "epochs": 1, "lr": 0.1},
        "data": {"class_names": ["0", "1", "2"], "shape": [6]},
        "deploy": {"name": "clinics", "insecure": True, "deadline": 30.0, "patience": 60.0, "poll": 0.01},
        "sites": dict.fromkeys(names, ""),
        **options,
    }
    (folder / "federation.toml").write_text(tomli_w.dumps(table))
    return read_federation(folder)


@dataclass
class SlowClock:
    """Time that passes only where somebody waits."""

    time: float = 0.0

    def clock(self) -> Clock:
        """As the server takes it."""
        return Clock(lambda: self.time, self.sleep)

    def sleep(self, seconds: float) -> None:
        """Waits for no time at all."""
        self.time += seconds


Tamper = Callable[[str, Kind, Letter], "Letter | Failure | None"]
"""(site, kind, answer) -> what arrives of it; None: nothing."""


@dataclass
class HereLink:
    """Sites in this process: every letter is answered at once, and the answer waits to be taken."""

    federation: FederationConfig
    tamper: Tamper | None = None
    absent: set[str] = field(default_factory=set)
    since: dict[str, str] = field(default_factory=dict)
    sent: list[tuple[str, Kind]] = field(default_factory=list)
    named: bool = False
    _waiting: dict[str, Letter | Failure] = field(default_factory=dict)

    def contacts(self) -> Sequence[Contact]:
        return [
            Contact(place, self.since.get(name, "start"), name if self.named else None)
            for place, name in enumerate(self.federation.names)
            if name not in self.absent
        ]

    def push(self, contact: Contact, kind: Kind, letter: Letter, *, group: str, seconds: float) -> str | None:
        name = self.federation.names[contact.address]
        self.sent.append((name, kind))
        answer: Letter | Failure | None = answer_to(letter, read_site(self.federation.folder / "sites" / name))
        if self.tamper is not None:
            assert isinstance(answer, Letter)
            answer = self.tamper(name, kind, answer)
        ticket = f"{len(self.sent)}"
        if answer is not None:
            self._waiting[ticket] = answer
        return ticket

    def pull(self, tickets: Sequence[str]) -> Sequence[tuple[str, Letter | Failure]]:
        return [(ticket, self._waiting.pop(ticket)) for ticket in tickets if ticket in self._waiting]
