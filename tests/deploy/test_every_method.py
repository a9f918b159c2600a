"""Every registered method runs on a network with the bits of the run in one process: because it is registered."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save
from small_deployment import HereLink, SlowClock, write_federation

from fedmerge.algorithms import ALGORITHMS
from fedmerge.core.errors import DataError
from fedmerge.core.options import option_fields
from fedmerge.core.tensor_files import read_tensors
from fedmerge.deploy.rehearsal import rehearse
from fedmerge.deploy.server import serve
from fedmerge.experiment.record import read_run
from tiny_models import SENTENCES, tiny_bert

METHODS = [name for name in ALGORITHMS if name != "oracle"]


def options_of(name):
    options = {"name": name}
    if name != "fedmerge" and "num_models" in option_fields(ALGORITHMS[name].cls):
        options["num_models"] = 2
    if name == "dp-fedmerge":  # its noise asks for more sites than these
        options |= {"noise_multiplier": 0.0}
    return options


VARIANTS = [
    *(pytest.param({"method": options_of(name)}, id=name) for name in METHODS),
    pytest.param({"keep": ["head"]}, id="own-head"),
    pytest.param({"fraction": 0.6, "evaluate_every": 2, "rounds": 4}, id="some-sites-each-round"),
    pytest.param({"data": {"class_names": ["0", "1", "2"], "shape": [6], "scale": "pooled"}}, id="pooled-scale"),
    pytest.param({"precision": "float64"}, id="float64"),
    pytest.param({"select": "last", "participation": {"sampling": "weighted"}, "fraction": 0.5}, id="weighted"),
    pytest.param({"training": {"batch_size": 10, "lr": 0.1, "schedule": "cosine"}}, id="schedule"),
]


@pytest.mark.parametrize("options", VARIANTS)
def test_a_deployed_run_has_the_bits_of_a_rehearsal(tmp_path, options):
    federation = write_federation(tmp_path / "f", names=("a", "b", "c", "d"), **options)
    serve(federation, HereLink(federation, named=True), clock=SlowClock().clock())
    rehearse(federation, tmp_path / "here")
    there, here = read_run(federation.run_folder), read_run(tmp_path / "here")
    for file in ("models.safetensors", "last.safetensors"):
        wanted, got = (read_tensors(folder / file) for folder in (tmp_path / "here", federation.run_folder))
        wanted = {name: tensor for name, tensor in wanted.items() if name.startswith("server.")}
        assert got.keys() == wanted.keys()  # what clients keep has not come to the server
        assert all(torch.equal(wanted[name], got[name]) for name in wanted)
    for line, other in zip(there.rounds, here.rounds, strict=True):
        facts = (
            "round",
            "cohort",
            "bytes_down",
            "bytes_up",
            "forward",
            "backward",
            "state",
            "mixing",
            "validation",
            "test",
        )
        assert {name: getattr(line, name) for name in facts} == {name: getattr(other, name) for name in facts}
    assert (there.status, there.num_train, there.num_test) == ("finished", here.num_train, here.num_test)


@pytest.mark.parametrize("policy", ["merge", "local", "recalibrate"])
def test_batch_normalisation_keeps_its_policy_on_a_network(tmp_path, policy):
    module = tmp_path / "net.py"
    module.write_text(
        "from torch import nn\n"
        "def net(input_shape, num_classes):\n"
        "    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, num_classes))\n"
    )
    options = {"buffers": policy, "training": {"batch_size": 8}, "model": {"name": "import", "path": f"{module}:net"}}
    federation = write_federation(tmp_path / "f", **options)
    for name in federation.names:  # a network from a file is loaded where the site's own copy of the terms names it
        (tmp_path / "f/sites" / name / "federation.toml").write_bytes((tmp_path / "f/federation.toml").read_bytes())
    serve(federation, HereLink(federation), clock=SlowClock().clock())
    here = rehearse(federation).record
    assert [line.test for line in read_run(federation.run_folder).rounds] == [line.test for line in here.rounds]


def test_adapters_of_a_pretrained_model_run_on_a_network(tmp_path):
    rng = np.random.default_rng(5)
    model = {"name": "hf", "path": tiny_bert(tmp_path / "bert"), "layers": 1, "max_length": 12}
    names = ("a", "b", "c")
    schema = {"class_names": ["bad", "good"], "dtype": "tokens", "text_column": "text", "shape": [12]}
    options = {"model": model, "data": schema, "keep": ["head"], "rounds": 2, "training": {"batch_size": 8}}
    federation = write_federation(tmp_path / "f", names=names, **options)
    for name in names:
        rows = [
            f"{SENTENCES[k % len(SENTENCES)]} {SENTENCES[rng.integers(8)]},{('bad', 'good')[k % 2]}" for k in range(30)
        ]
        site = tmp_path / "f/sites" / name
        (site / "data.csv").write_text("\n".join(["text,label", *rows]) + "\n")
        (site / "site.toml").write_text((site / "site.toml").read_text().replace("data.npz", "data.csv"))
    serve(federation, HereLink(federation), clock=SlowClock().clock())
    rehearse(federation, tmp_path / "here")
    wanted, got = (read_tensors(folder / "last.safetensors") for folder in (tmp_path / "here", federation.run_folder))
    assert save(got) == save({name: wanted[name] for name in got})  # NaN is a value like others
    records = [read_run(folder) for folder in (tmp_path / "here", federation.run_folder)]
    assert [line.test for line in records[0].rounds] == [line.test for line in records[1].rounds]


def test_a_method_that_must_know_the_groups_is_refused(tmp_path):
    federation = write_federation(tmp_path / "f", method={"name": "oracle"})
    with pytest.raises(DataError, match="averages inside the true groups"):
        serve(federation, HereLink(federation), clock=SlowClock().clock())
