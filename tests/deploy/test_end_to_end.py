"""A federation on real processes of Flower, with certificates and keys: the bits of the run in one process."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save

from fedmerge.core.tensor_files import read_tensors
from fedmerge.deploy import marks
from fedmerge.deploy.address import free_port
from fedmerge.deploy.blueprint import Blueprint, write_blueprint
from fedmerge.deploy.deployment import read_deployment
from fedmerge.deploy.federation import read_federation
from fedmerge.deploy.operate import run_here
from fedmerge.deploy.rehearsal import rehearse
from fedmerge.deploy.site_use import read_site_model
from fedmerge.exporting import client_of, trained_of_folder

pytest.importorskip("flwr")
pytest.importorskip("cryptography")
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("flower")]

NAMES = ("clinic-a", "clinic-b", "clinic-c")
MARK = "the-end-to-end-test"


def write_federation(folder):
    """Three sites, each with a rule of its own behind its classes and another number of examples."""
    blueprint = Blueprint(
        name="clinics",
        address=f"127.0.0.1:{free_port()}",
        sites=NAMES,
        config={
            "rounds": 2,
            "evaluate_every": 1,
            "select": "last",
            "model": {"name": "mlp", "hidden": [8]},
            "training": {"batch_size": 10, "epochs": 1, "lr": 0.1},
        },
        data={"class_names": ["0", "1", "2"], "shape": [6]},
        deploy={"deadline": 120.0, "patience": 120.0},
        site_data={name: {"path": "data.npz"} for name in NAMES},
    )
    write_blueprint(folder, blueprint)
    rng = np.random.default_rng(7)
    for number, name in enumerate(NAMES):
        x, rule = rng.normal(size=(40 + 15 * number, 6)).astype(np.float32), rng.normal(size=(6, 3))
        np.savez(folder / "sites" / name / "data.npz", x=x, y=np.argmax(x @ rule, axis=1))
    return read_federation(folder)


@pytest.fixture
def marked(monkeypatch):
    """What is started within the test is known by its mark, and nothing of it is left, also when the test fails."""
    monkeypatch.setenv(marks.MARK, MARK)
    yield
    program = marks.Program(-1, MARK)
    left = marks.members([program])
    marks.end([program], grace=0.0)
    assert not left, "what was started ends with the run"


def test_three_sites_on_real_processes_end_with_the_bits_of_a_rehearsal(tmp_path, marked):
    federation = write_federation(tmp_path / "f")
    said = []
    record = run_here(federation.folder, said.append)
    rehearsal = rehearse(federation, tmp_path / "here")
    assert (record.status, [line.test for line in record.rounds]) == (
        "finished",
        [line.test for line in rehearsal.record.rounds],
    )
    assert [(line.dropped, line.refused) for line in record.rounds] == [((), ())] * 3
    for file in ("models.safetensors", "last.safetensors"):
        wanted, got = (read_tensors(folder / file) for folder in (tmp_path / "here", federation.run_folder))
        assert got.keys() == {name for name in wanted if name.startswith("server.")}
        assert save(got) == save({name: wanted[name] for name in got})  # NaN is a value like others
    trained = trained_of_folder(tmp_path / "here")
    for name in NAMES:
        own = read_site_model(federation.folder / "sites" / name).client.personal
        assert torch.equal(own, client_of(trained, name).personal)
    assert sorted(read_deployment(federation.run_folder).delivered) == sorted(NAMES)
    assert "SuperLink and 3 sites are running" in said
