"""What a federation must end with: the same run in one process, whose sites are silent where the real ones were."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save

from fedmerge.core.tensor_files import read_tensors
from fedmerge.deploy.client import answer_to
from fedmerge.deploy.federation import FederationConfig
from fedmerge.deploy.link import Contact, Failure
from fedmerge.deploy.messages import Kind, Letter, order_from
from fedmerge.deploy.rehearsal import rehearse
from fedmerge.deploy.roll import Clock
from fedmerge.deploy.server import serve
from fedmerge.deploy.site import read_site
from fedmerge.deploy.site_use import read_site_model
from fedmerge.exporting import client_of, trained_of_folder

FILES = ("last.safetensors", "models.safetensors")

Silent = Callable[[str, Kind, int], bool]
"""(site, kind of message, round) -> whether the site does not answer."""


@dataclass(frozen=True)
class Wanted:
    """What a run must end with, as bytes.

    Attributes:
        states: The server's state by file: the last one and that of the selected round.
        models: Of the sites, by name.
    """

    states: dict[str, bytes]
    models: dict[str, bytes]


def rehearsed(federation: FederationConfig, run: Path) -> Wanted:
    """The ordinary in-process run, where nobody is silent."""
    rehearse(federation, run)
    trained = trained_of_folder(run)
    return Wanted(states_in(run), {name: _bytes(client_of(trained, name).personal) for name in federation.names})


def without(federation: FederationConfig, silent: Silent, absent: Sequence[str] = ()) -> Wanted:
    """The run over a network in this process, where some sites do not answer some messages, or are never there."""
    clock = _Clock()
    serve(federation, _Here(federation, silent, absent), clock=Clock(lambda: clock.time, clock.sleep))
    return ended(federation)


def ended(federation: FederationConfig) -> Wanted:
    """What a run has ended with."""
    places = {name: federation.folder / "sites" / name for name in federation.names}
    models = {name: _model_in(place) for name, place in places.items() if (place / "model").is_dir()}
    return Wanted(states_in(federation.run_folder), models)


def _model_in(place: Path) -> bytes:
    return _bytes(read_site_model(place).client.personal)


def _bytes(model: object) -> bytes:
    assert isinstance(model, torch.Tensor)
    return save({"model": model.contiguous()})


def states_in(run: Path) -> dict[str, bytes]:
    """The server's part of a run's states. As bytes, since NaN is a value like others."""
    found = {}
    for file in FILES:
        tensors = read_tensors(run / file)
        found[file] = save({name: tensor for name, tensor in tensors.items() if name.startswith("server.")})
    return found


def differences(got: Wanted, wanted: Wanted, files: Sequence[str] = FILES, *, models: bool = True) -> list[str]:
    """What is not equal bit for bit."""
    found = [file for file in files if got.states[file] != wanted.states[file]]
    if not models:
        return found
    if got.models.keys() != wanted.models.keys():
        found.append(f"models at {sorted(got.models)}, expected at {sorted(wanted.models)}")
    common = got.models.keys() & wanted.models.keys()
    return found + [f"model of {name}" for name in sorted(common) if got.models[name] != wanted.models[name]]


@dataclass
class _Clock:
    """Time that passes only where somebody waits."""

    time: float = 0.0

    def sleep(self, seconds: float) -> None:
        self.time += seconds


@dataclass
class _Here:
    """A network in this process; an answer waits until it is taken."""

    federation: FederationConfig
    silent: Silent
    absent: Sequence[str]
    _waiting: dict[str, Letter | Failure] = field(default_factory=dict)
    _sent: int = 0

    def contacts(self) -> Sequence[Contact]:
        names = self.federation.names
        return [Contact(place, "start", name) for place, name in enumerate(names) if name not in self.absent]

    def push(self, contact: Contact, kind: Kind, letter: Letter, *, group: str, seconds: float) -> str | None:  # noqa: ARG002
        self._sent += 1
        name = self.federation.names[contact.address]
        if not self.silent(name, kind, order_from(letter.text).round):
            site = read_site(self.federation.folder / "sites" / name)
            self._waiting[str(self._sent)] = answer_to(letter, site)
        return str(self._sent)

    def pull(self, tickets: Sequence[str]) -> Sequence[tuple[str, Letter | Failure]]:
        return [(ticket, self._waiting.pop(ticket)) for ticket in tickets if ticket in self._waiting]
