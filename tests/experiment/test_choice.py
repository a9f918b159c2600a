"""Which engine runs the clients: what was asked for, the rule, or what was measured here before."""

import json
import logging
from dataclasses import replace

import pytest
import torch
from torch import nn

from fedmerge.core.errors import UsageError
from fedmerge.core.vector import layout_of
from fedmerge.data import ClientData, FederatedData
from fedmerge.data.federated import Examples
from fedmerge.experiment import choice as choices
from fedmerge.experiment import fastest as measuring
from fedmerge.experiment import simulation
from fedmerge.experiment.choice import Choice, Trial, choose_engine
from fedmerge.experiment.config import build_config
from fedmerge.experiment.execute import execute_config
from fedmerge.experiment.fastest import Workload, fastest_engine
from fedmerge.experiment.record import read_run_alone
from fedmerge.experiment.resume import resume_run
from fedmerge.models import NETWORKS
from fedmerge.runtime import Folded, Sequential, Vectorised
from fedmerge.training import Descent, LocalTraining
from fedmerge.training.native import available
from fedmerge.training.native.layers import Staged
from small import small

LONG, SHORT = (Workload(LocalTraining(batch_size=4, epochs=1), rounds, 1.0) for rounds in (10**9, 2))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDMERGE_CACHE", str(tmp_path / "cache"))


def clients(shape=(1, 8, 8), count=5):
    random = torch.Generator().manual_seed(0)

    def one():
        return Examples(torch.randn(8, *shape, generator=random), torch.arange(8) % 3)

    return FederatedData(tuple(ClientData(str(i), one(), one(), one()) for i in range(count)), ("a", "b", "c"))


def network(name="mlp", **options):
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return NETWORKS[name].cls(**options).build((1, 8, 8), 3)


def fastest(module, work, runtime="auto", most=None, kernels="torch"):
    return fastest_engine(runtime, module, layout_of(module), Descent(), clients(), work, most, kernels=kernels)


class Scaled(nn.Module):
    """Can be vectorised and not folded."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.linear = nn.Parameter(torch.ones(64)), nn.Linear(64, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.linear(x.flatten(1) * self.scale)
        return y


@pytest.mark.parametrize(
    ("module", "kind", "name"),
    [
        (network(), Folded, "folded"),
        (Scaled(), Vectorised, "vectorised"),
        (network("cnn"), Sequential, "sequential"),
        (nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 3)), Sequential, "sequential"),
        (nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 3)), Sequential, "sequential"),
    ],
    ids=["perceptron", "scaled", "convolutions", "batch norm", "dropout"],
)
def test_short_runs_follow_the_rule_and_measure_nothing(module, kind, name, monkeypatch, tmp_path):
    monkeypatch.setattr(measuring, "_milliseconds", lambda *_: pytest.fail("measured"))
    engine, choice = fastest(module, SHORT)
    assert type(engine) is kind
    assert choice == Choice(name, None, "the rule for networks like this")
    assert not (tmp_path / "cache").exists()


def test_a_long_run_takes_the_fastest_and_remembers_it(monkeypatch, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    times = {None: 9.0, 2: 6.0, 4: 5.0}
    asked = []

    def milliseconds(engine, *_):
        most = engine._most if isinstance(engine, Folded) else None
        asked.append(most)
        return times[most]

    monkeypatch.setattr(measuring, "_milliseconds", milliseconds)
    module = network("cnn")
    engine, choice = fastest(module, LONG)
    assert isinstance(engine, Folded)
    assert engine._most == 4
    assert asked == [None, 2, 4]  # 8 clients at once are more than there are
    assert choice.why == "measured milliseconds per step of a client: sequential 9, folded by 2 6, folded by 4 5"
    times.update({2: 1.0})
    assert fastest(module, LONG)[1] == choice  # from the file: nothing is measured again
    assert asked == [None, 2, 4]
    assert fastest(network("cnn", channels=(4, 8)), LONG)[1] != choice  # another network is another question
    assert len(list((tmp_path / "cache" / "engines").iterdir())) == 2


def has_kernels(engine):
    """Of one client's network, or of several clients'."""
    if isinstance(engine, Sequential):
        module = engine._task._module
    else:
        module = network("cnn") if engine._finish is None else engine._finish(network("cnn"))
    return any(isinstance(part, Staged) for part in module.modules())


needs_kernels = pytest.mark.skipif(available() is not None, reason="no compiler here")


@needs_kernels
@pytest.mark.parametrize(
    ("times", "taken"),
    [
        ({(0, False): 9, (0, True): 9, (2, False): 9, (4, False): 9}, Choice("sequential")),
        ({(0, False): 9, (0, True): 3, (2, True): 4, (4, True): 4}, Choice("sequential", kernels=True)),
        ({(0, False): 9, (0, True): 3, (2, True): 4, (4, True): 1}, Choice("folded", 4, kernels=True)),
        ({(0, False): 9, (0, True): 3, (2, True): 2, (4, True): 2.5}, Choice("folded", 2, kernels=True)),
        ({(0, False): 3, (0, True): 9, (2, False): 2, (4, False): 1}, Choice("folded", 4)),
    ],
)
def test_compiled_kernels_are_taken_where_they_are_fastest(monkeypatch, times, taken):
    def milliseconds(engine, *_):
        return times[engine._most if isinstance(engine, Folded) else 0, has_kernels(engine)]

    monkeypatch.setattr(measuring, "_milliseconds", milliseconds)
    engine, choice = fastest(network("cnn"), LONG, kernels="auto")
    assert replace(choice, why="") == taken
    assert has_kernels(engine) == taken.kernels
    assert "sequential with compiled kernels" in choice.why


@needs_kernels
@pytest.mark.parametrize(("runtime", "most"), [("auto", None), ("folded", 4)])
def test_compiled_kernels_that_are_asked_for_are_there(runtime, most):
    engine, choice = fastest(network("cnn"), SHORT, runtime, kernels="compiled")
    assert (choice.kernels, choice.most, has_kernels(engine)) == (True, most, True)


def test_compiled_kernels_that_cannot_be_there_are_refused(monkeypatch):
    with pytest.raises(UsageError, match="kernels: got 'compiled', but Sequential has no convolutions"):
        fastest(network(), SHORT, kernels="compiled")
    with pytest.raises(UsageError, match="but Sequential cannot use them in runtime 'vectorised'; expected 'torch'"):
        fastest(network("cnn"), SHORT, "vectorised", kernels="compiled")
    with pytest.raises(UsageError, match="is not computed in float32 on the CPU"):
        fastest(network("cnn").double(), SHORT, kernels="compiled")
    monkeypatch.setattr(choices, "available", lambda: "no compiler was found")
    with pytest.raises(UsageError, match="has none on this machine: no compiler was found"):
        fastest(network("cnn"), SHORT, kernels="compiled")


@pytest.mark.parametrize("two", [8.8, 20.0])
def test_a_gain_of_a_few_percent_is_none(monkeypatch, two):
    monkeypatch.setattr(measuring, "_milliseconds", lambda engine, *_: two if isinstance(engine, Folded) else 9.0)
    assert fastest(network("cnn"), LONG)[1].runtime == "sequential"


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"runtime": "folded"',
        '{"runtime": "else", "most": 2, "why": ""}',
        '{"runtime": "folded", "most": -1, "why": ""}',
        '{"runtime": "folded", "most": "2", "why": ""}',
        '{"runtime": ["folded"], "most": 2, "why": ""}',
        '{"runtime": "folded", "most": 2, "why": "", "more": 1}',
    ],
)
def test_a_damaged_memory_is_measured_again(monkeypatch, tmp_path, content):
    monkeypatch.setattr(measuring, "_milliseconds", lambda engine, *_: 1.0 if isinstance(engine, Folded) else 9.0)
    module = network("cnn")
    _, choice = fastest(module, LONG)
    (path,) = (tmp_path / "cache" / "engines").iterdir()
    path.write_text(content)
    assert fastest(module, LONG)[1] == choice
    assert json.loads(path.read_text())["runtime"] == "folded"


def test_a_real_measurement_gives_a_time_for_each(caplog):
    caplog.set_level(logging.INFO)
    _, choice = fastest(network("cnn"), LONG)
    assert choice.why.startswith("measured milliseconds per step of a client: sequential ")
    assert "folded by 2 " in choice.why


def test_what_is_asked_for_is_what_runs():
    module = network("cnn")
    assert fastest(module, LONG, "sequential")[1] == Choice("sequential", None, "asked for")
    engine, choice = fastest(module, LONG, "folded", 3)
    assert (engine._most, choice) == (3, Choice("folded", 3, "asked for"))
    assert fastest(module, LONG, "folded")[1].most == 4
    with pytest.raises(UsageError, match="runtime 'folded' cannot run Scaled: a layer of class Scaled has weights"):
        choose_engine(Trial(Scaled(), layout_of(Scaled()), Descent(), clients()), "folded")


class Mixed(nn.Module):
    """Folded, its clients would meet: it takes a mean over its batch."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.linear(x.flatten(1))
        return y - y.mean(0)


class Peeking(Mixed):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.linear(x.flatten(1))
        return 2 * y if y.sum() > 0 else y


@pytest.mark.parametrize(("module", "told"), [(Mixed, "looks across a batch"), (Peeking, "looks at numbers")])
def test_a_network_in_which_clients_would_meet_is_not_folded(module, told):
    net = module()
    with pytest.raises(UsageError, match=f"runtime 'folded' cannot run {module.__name__}: .*{told}"):
        choose_engine(Trial(net, layout_of(net), Descent(), clients()), "folded")


def test_a_run_says_what_ran_it_and_goes_on_with_that(tmp_path, monkeypatch):
    folder = tmp_path / "run"

    def stop(record):
        if record.round == 2:
            raise KeyboardInterrupt

    config = build_config(small(rounds=4, runtime="folded", fold=2))
    with pytest.raises(KeyboardInterrupt):
        execute_config(config, folder=folder, watch=stop)
    assert read_run_alone(folder).engine == Choice("folded", 2, "asked for")
    monkeypatch.setattr(simulation, "fastest_engine", lambda *_: pytest.fail("chosen again"))
    outcome = resume_run(folder)
    assert outcome.setup.engine._most == 2
    assert read_run_alone(folder).engine == Choice("folded", 2, "asked for")
