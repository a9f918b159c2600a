"""The examples run as their texts say, and the one-file FedMerge has the library's numbers."""

import importlib.util
import runpy
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import parameters_to_vector

import fedmerge
from fedmerge.algorithms.fedmerge import FedMerge
from fedmerge.cli import main as cli
from fedmerge.core.protocol import Federation, Update, deliver
from fedmerge.core.randomness import fresh_module_randomness, generator
from fedmerge.core.soup import Soup
from fedmerge.data import PARTITIONS, SOURCES, Examples
from fedmerge.experiment.federation import load_data

FOLDER = Path(__file__).parents[1] / "examples"
ROUNDS = 16


def load(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


one_file = load("fedmerge_in_100_lines")


def digits(partition, **options):
    sizes = {"train": 50, "validation": 5, "test": 25}
    dealer = PARTITIONS.build({"name": partition, "clients": 16, **sizes, **options}, "partition", [])
    return load_data(SOURCES.build({"name": "digits"}, "data", []), dealer, 3)


def shortened(data):
    """Clients keep 35, 40, 45 or 50 of their train examples, so that they count differently."""
    clients = [
        replace(client, train=Examples(*(part[: 35 + 5 * (i % 4)] for part in client.train)))
        for i, client in enumerate(data.clients)
    ]
    return replace(data, clients=tuple(clients))


def network():
    with fresh_module_randomness(5, "initial weights", 0):
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))


def as_tuples(data):
    splits = [(client.train, client.test) for client in data.clients]
    return [(train.inputs.double(), test.inputs.double(), train.targets, test.targets) for train, test in splits]


def by_library(data, method):
    """Without defences, which the one file has not."""
    return fedmerge.run(
        data,
        method={"name": method, "max_gap": 0} if method == "fedmerge" else method,
        model=network(),
        rounds=ROUNDS,
        evaluate_every=ROUNDS,
        seed=7,
        precision="float64",
        defences={"clip": 0, "max_count": 0},
    )


def accuracies(net, theta, clients):
    return tuple(one_file.accuracy(net, own, x, y) for own, (_, x, _, y) in zip(theta, clients, strict=True))


FEDERATIONS = {  # with the number of models that the rule finds there, right or wrong
    "four sides, no sharp elbow": (lambda: digits("rotations", groups=4), 4),
    "four sides, clients of unequal size": (lambda: shortened(digits("rotations", groups=4)), 4),
    "two classes a client, a sharp elbow": (lambda: digits("pathological", classes_per_client=2), 13),
    "no structure": (lambda: digits("iid"), 1),
}


@pytest.mark.parametrize(("make", "num_models"), FEDERATIONS.values(), ids=FEDERATIONS.keys())
def test_one_file_gives_the_numbers_of_the_library(make, num_models):
    data = make()
    clients, net = as_tuples(data), network().double()
    Theta, W = one_file.run(clients, net, ROUNDS, seed=7)
    library = by_library(data, "fedmerge")
    soup = library.outcome.progress.state.soup
    assert len(Theta) == len(soup.models) == num_models
    torch.testing.assert_close(Theta, soup.models, rtol=0, atol=1e-8)
    torch.testing.assert_close(W, soup.logits[0], rtol=0, atol=1e-8)
    torch.testing.assert_close(W.softmax(1), library.mixing(), rtol=0, atol=1e-8)
    theta = W.softmax(1) @ Theta
    for i, own in enumerate(theta):
        torch.testing.assert_close(own, parameters_to_vector(library.client_model(i).parameters()), rtol=0, atol=1e-8)
    assert accuracies(net, theta, clients) == library.record.last().test.accuracy


def test_its_baselines_have_the_numbers_of_the_library():
    """The two lines at its end: average the replies of equally large clients, or keep each to its client."""
    data = digits("rotations", groups=4)
    clients, net = as_tuples(data), network().double()
    fedavg = local = parameters_to_vector(net.parameters()).detach().repeat(len(clients), 1)
    for t in range(1, ROUNDS + 1):
        fedavg = fedavg - one_file.replies(net, fedavg, clients, t, seed=7, pull=0).mean(0)
        local = local - one_file.replies(net, local, clients, t, seed=7, pull=0)
    assert accuracies(net, fedavg, clients) == by_library(data, "fedavg").record.last().test.accuracy
    assert accuracies(net, local, clients) == by_library(data, "local").record.last().test.accuracy


def library_state(algorithm, num_clients, P):
    facts = Federation(num_clients, num_trainable=P, head=(0, P), layers=((0, P),))
    return algorithm.init(lambda j: torch.full((P,), 1.0 + j, dtype=torch.float64), facts, 0)


def received(algorithm, state, g, num_examples):
    return deliver(algorithm, state, torch.arange(len(g)), Update(g), num_examples)


def some_progress(rng, n):
    """From hardly any structure, round the gate, to more groups than models may be, [n, 12]."""
    means = float(10 ** rng.uniform(-1, 1.5)) * rng.normal(size=(int(rng.integers(1, 30)), 12))
    return torch.from_numpy(means[rng.integers(len(means), size=n)] + rng.normal(size=(n, 12)) + rng.uniform(0, 6))


def sizes_of(h):
    """Numbers of examples for which size alone is evidence in some cases and not in others."""
    return 2 + torch.arange(len(h)) % 5


def file_groups(h):
    return one_file.groups_of(h, sizes_of(h).double())


def library_groups(h):
    algorithm = FedMerge(search_rounds=1)
    state = received(algorithm, library_state(algorithm, *h.shape), h, sizes_of(h))
    return state.soup.logits[0].argmax(dim=1)


def test_its_search_decides_like_the_library():
    found = set()
    for case in range(500):
        rng = generator(1, "progress", case)
        h = some_progress(rng, int(rng.integers(4, 60)))
        group = file_groups(h)
        found.add(int(group.max()) + 1)
        assert torch.equal(group, library_groups(h)), case
    assert found == set(range(1, 16))


def test_its_search_changes_its_mind_where_the_library_does():
    """Between two h with different numbers of groups, bisection finds where it changes: thresholds agree to 1e-6."""
    for case in range(100):
        rng = generator(3, "progress", case)
        n = int(rng.integers(4, 30))
        ends = [some_progress(rng, n), some_progress(rng, n)]
        for _ in range(20):
            middle = (ends[0] + ends[1]) / 2
            alike = file_groups(middle).max() == file_groups(ends[0]).max()
            ends[0 if alike else 1] = middle
        for h in ends:
            assert torch.equal(file_groups(h), library_groups(h)), case


@pytest.mark.parametrize("case", range(20))
def test_its_server_step_is_the_library_s(case):
    """Random models, logits and replies; one hardly, one negligibly, one not at all towards a model."""
    rng = generator(2, "server step", case)
    C, d, P = int(rng.integers(6, 12)), int(rng.integers(2, 6)), 9
    Theta, W, g = (torch.from_numpy(rng.normal(size=shape)) for shape in ((d, P), (C, d), (C, P)))
    g = g * float(10 ** rng.uniform(-1, 1)) + torch.from_numpy(rng.normal(size=P)) * case / 5
    centred = Theta - Theta.mean(0)
    spanned = torch.linalg.qr(centred.T).Q
    beside = nn.functional.normalize(g[0] - spanned @ (spanned.T @ g[0]), dim=0)
    towards = nn.functional.normalize(centred[0], dim=0)
    g[-3], g[-2], g[-1] = beside + 3e-5 * towards, beside + 3e-7 * towards, 0
    counts = torch.from_numpy(rng.integers(1, 100, size=C))
    algorithm = FedMerge(num_models=d, initial="noise")
    state = replace(library_state(algorithm, C, P), soup=Soup(Theta, W[None]))
    after = received(algorithm, state, g, counts).soup
    new_W, step = one_file.server_step(Theta, W, g, counts / counts.sum().double())
    torch.testing.assert_close(new_W, after.logits[0], rtol=0, atol=1e-10)
    torch.testing.assert_close(Theta - step, after.models, rtol=0, atol=1e-10)
    assert torch.equal(new_W[-2:], W[-2:])
    assert (new_W[:-2] != W[:-2]).any(dim=1).all()


def test_one_file_has_at_most_100_lines_and_stands_alone():
    lines = (FOLDER / "fedmerge_in_100_lines.py").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 100
    assert not [line for line in lines if line.startswith(("import fedmerge", "from fedmerge"))]


def test_one_file_run_as_a_script_beats_its_baselines(capsys):
    with torch.random.fork_rng():
        runpy.run_path(str(FOLDER / "fedmerge_in_100_lines.py"), run_name="__main__")
    printed = [line.rsplit(" % ", 1)[0].split() for line in capsys.readouterr().out.splitlines()]
    assert printed[0][:4] == ["FedMerge,", "d", "=", "4"]
    assert [words[0] for words in printed[1:]] == ["FedAvg", "Local"]
    merged, *others = (float(words[-1]) for words in printed)
    assert merged > max(others) + 5


def shell_form(name, **replacements):
    """The words of the command that an example's text gives, without the leading `fedmerge`."""
    text = load(name).__doc__
    command = next(line for line in text.splitlines() if line.startswith("From the shell:")).partition(":")[2]
    for old, new in replacements.items():
        command = command.replace(old, str(new))
    words = shlex.split(command)
    assert words[0] == "fedmerge"
    return words[1:]


def test_own_module_has_the_same_numbers_from_python_and_from_the_shell(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(FOLDER.parent)
    load("own_module").main(rounds=4)
    printed = capsys.readouterr().out
    assert cli([*shell_form("own_module"), "rounds=4", "--quiet", "--out", str(tmp_path / "run")]) == 0
    record = fedmerge.load_run(tmp_path / "run")
    assert record.num_params == (9 * 8 + 8) + (8 * 4 * 4 * 10 + 10)  # a 3 x 3 convolution, a linear layer
    assert f"mean accuracy {100 * record.selected().test.mean_accuracy():.1f} %\n" in printed
    for name, accuracy in zip(record.client_names, record.selected().test.accuracy, strict=True):
        row = next(line for line in printed.splitlines() if f" {name} " in line)
        assert float(row.split()[-1]) == accuracy
    assert "(head): Linear(in_features=128, out_features=10, bias=True)" in printed


def test_own_module_takes_options_from_the_shell(tmp_path, monkeypatch):
    monkeypatch.chdir(FOLDER.parent)
    words = [*shell_form("own_module"), "model.options.width=12", "rounds=1", "--quiet", "--out", str(tmp_path / "run")]
    assert cli(words) == 0
    assert fedmerge.load_run(tmp_path / "run").num_params == (9 * 12 + 12) + (12 * 4 * 4 * 10 + 10)


def test_own_files_have_the_same_numbers_from_python_and_from_the_shell(tmp_path, capsys):
    load("own_files").main(tmp_path / "clinics", rounds=4)
    printed = capsys.readouterr().out
    words = shell_form("own_files", FOLDER=tmp_path / "clinics")
    assert cli([*words, "rounds=4", "--quiet", "--out", str(tmp_path / "runs")]) == 0
    assert (tmp_path / "runs" / "table.md").read_text(encoding="utf-8").strip() == printed.strip()
    names = fedmerge.load_run(tmp_path / "runs" / "fedmerge-seed0").client_names
    assert names == tuple(f"clinic-{number}" for number in range(6))
    suffixes = {path.suffix for path in (tmp_path / "clinics").iterdir()}
    assert suffixes == {".npz", ".csv"}


def test_own_files_profit_from_merging_clinics_of_one_habit(tmp_path):
    """Every other clinic calls the same measurement ill: neither one model for all nor six alone do as well."""
    example = load("own_files")
    example.write_files(tmp_path)
    runs = fedmerge.compare(fedmerge.from_folder(tmp_path), methods=["fedmerge", "fedavg", "local"], rounds=20).frame()
    mean = runs.set_index("label")["mean"]
    assert mean["fedmerge"] > mean["fedavg"] + 0.1
    assert mean["fedmerge"] > mean["local"]
