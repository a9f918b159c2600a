"""The deployed app on Flower's simulation: the bits of one process, an end where a worker dies, nothing left behind."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import tomli_w
import torch
from small_deployment import write_federation

pytest.importorskip("flwr")

from fedmerge.core.errors import FedmergeError, UsageError
from fedmerge.core.tensor_files import read_tensors
from fedmerge.deploy.flower import simulate as simulation
from fedmerge.deploy.flower.simulate import _Told, simulate
from fedmerge.deploy.rehearsal import rehearse
from fedmerge.experiment.record import read_run

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")

DYING = """
import os, pathlib
import numpy as np

def examples():
    here = pathlib.Path(__file__).parent
    looks = len(list(here.glob("look-*")))
    (here / f"look-{looks}").touch()
    if looks == 2:  # while it works for round 2
        os._exit(9)
    data = np.load(here / "data.npz")
    return data["x"], data["y"]
"""


def marked_processes(folder: Path) -> list[str]:
    """Commands of processes, other than this one's own, that were started for a folder."""
    said = subprocess.run(["ps", "axeww", "-o", "pid,command"], capture_output=True, text=True, check=True).stdout
    return [line for line in said.splitlines() if f"FLWR_HOME={folder}" in line]


@needs_ray
@pytest.mark.slow
def test_the_simulated_federation_has_the_bits_of_the_run_in_one_process(tmp_path: Path) -> None:
    federation = write_federation(tmp_path / "f")
    before = sorted(path for path in federation.folder.rglob("*"))
    lines: list[str] = []
    found = simulate(federation.folder, tmp_path / "simulation", cpus=2, tell=lines.append)
    here = rehearse(federation, tmp_path / "here")
    for file in ("models.safetensors", "last.safetensors"):
        wanted, got = read_tensors(tmp_path / "here" / file), read_tensors(found.folder / file)
        names = [name for name in wanted if name.startswith("server.")]
        assert names
        assert all(torch.equal(got[name], wanted[name]) for name in names)
    there = read_run(found.folder)
    assert [line.test for line in there.rounds] == [line.test for line in here.record.rounds]
    assert [line.dropped for line in there.rounds] == [()] * 4
    assert found.start > 0
    assert found.rounds > 0
    assert any("3 of 3 sites have their models" in line for line in lines)
    assert sorted(path for path in federation.folder.rglob("*")) == before, "the real federation is as it was"
    assert marked_processes(tmp_path / "simulation") == []
    with pytest.raises(UsageError, match="is finished"):
        simulate(federation.folder, tmp_path / "simulation")


@needs_ray
@pytest.mark.slow
def test_a_worker_that_dies_ends_the_simulation_and_it_can_go_on(tmp_path: Path) -> None:
    federation = write_federation(tmp_path / "f")
    site = federation.folder / "sites" / "clinic-b"
    (site / "reader.py").write_text(DYING)
    table = {"name": "clinic-b", "server": "127.0.0.1:9092", "data": {"python": "reader.py:examples"}}
    (site / "site.toml").write_text(tomli_w.dumps(table))
    with pytest.raises(FedmergeError, match=r"a worker of Ray died .*simulate again to go on"):
        simulate(federation.folder, cpus=2)
    assert marked_processes(federation.folder / "simulation") == []
    found = simulate(federation.folder, cpus=1)
    there, here = read_run(found.folder), rehearse(federation).record
    assert [line.test for line in there.rounds] == [line.test for line in here.rounds]


@needs_ray
@pytest.mark.slow
def test_a_site_that_cannot_work_ends_the_simulation_and_is_not_waited_for(tmp_path: Path) -> None:
    federation = write_federation(tmp_path / "f", deploy={"insecure": True, "poll": 0.1})
    assert federation.deploy.patience == 86400, "a day"
    (federation.folder / "sites" / "clinic-c" / "data.npz").write_bytes(b"no data")
    with pytest.raises(FedmergeError, match="a site cannot take part: the site's data cannot be used as they are"):
        simulate(federation.folder)
    logs = (federation.folder / "simulation/logs").glob("*.log")
    assert any("data.npz" in path.read_text(errors="replace") for path in logs)
    assert marked_processes(federation.folder / "simulation") == []


@needs_ray
@pytest.mark.slow
def test_what_stops_the_server_is_told_although_flower_calls_the_run_completed(tmp_path: Path) -> None:
    federation = write_federation(tmp_path / "f", deploy={"insecure": True, "patience": 0.5, "poll": 0.1})
    with pytest.raises(FedmergeError, match=r"stopped before its end: \d of 3 sites have reported within 0\.5 s"):
        simulate(federation.folder)


def test_without_ray_the_message_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install \"flwr\[simulation\]"):
        simulate(tmp_path)


def test_a_simulation_works_on_copies_of_settings_and_on_no_state_of_the_sites(tmp_path: Path) -> None:
    federation = write_federation(tmp_path / "f", sites={"clinic-a": "a key", "clinic-b": "b", "clinic-c": "c"},
                                  deploy={"name": "clinics", "address": "fed.example.org:443"})  # fmt: skip
    site = federation.folder / "sites" / "clinic-a"
    table = {"name": "clinic-a", "server": "fed.example.org:443", "state": str(tmp_path / "real"), "anew": True}
    (site / "site.toml").write_text(tomli_w.dumps({**table, "data": {"path": "data.npz"}}))
    (site / "federation.toml").write_bytes((federation.folder / "federation.toml").read_bytes())
    staged = simulation._staged(federation, tmp_path / "stage", 1234)
    assert staged.deploy.insecure
    assert set(staged.sites.values()) == {""}
    assert staged.terms == federation.terms
    own = simulation.read_site(tmp_path / "stage" / "sites" / "clinic-a")
    assert own.state_folder == tmp_path / "stage" / "sites" / "clinic-a" / "state"
    assert own.data.path == str(site / "data.npz")
    assert (own.folder / "federation.toml").is_file()
    assert [place.name for place in simulation._site_folders(tmp_path / "stage")] == [
        "clinic-a",
        "clinic-b",
        "clinic-c",
    ]


@pytest.mark.parametrize(
    ("line", "dead"),
    [
        ("site clinic-b: <class 'ray.exceptions.ActorDiedError'>:<'The actor died'>", True),
        ("ray.exceptions.OutOfMemoryError: Task was killed due to the node running low on memory", True),
        ("ray.exceptions.RayTaskError(ClientAppException): ray::ClientAppActor.run()", False),
        ("WARNING: site clinic-b: row 3 of data.csv holds NaN", False),
    ],
)
def test_a_dead_worker_is_told_from_a_site_that_fails(line: str, dead: bool) -> None:
    told = _Told(lambda _: None)
    told.take(f"\x1b[91mERROR \x1b[0m:  {line}\n")
    assert bool(told.dead) == dead
    assert told.error == line


def test_cpus_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: sys)
    with pytest.raises(UsageError, match="cpus: got 0"):
        simulate(tmp_path, cpus=0)
