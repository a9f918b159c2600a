"""Configuration: what goes in comes out, and every fault is named at once."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

import pytest
import tomllib
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from fedmerge.algorithms import ALGORITHMS
from fedmerge.core.errors import UsageError
from fedmerge.core.options import option_fields
from fedmerge.data import PARTITIONS, SOURCES
from fedmerge.experiment.config import (
    RunOptions,
    build_config,
    config_text,
    default_partition,
    override,
    parse_value,
    read_toml,
    to_table,
)
from fedmerge.experiment.participation import Participation
from fedmerge.models import NETWORKS
from fedmerge.training import LocalTraining

REGISTRIES = {"method": ALGORITHMS, "partition": PARTITIONS, "model": NETWORKS, "source": SOURCES}
NEEDED = {"huggingface": {"path": "owner/name"}, "import": {"path": "package:Name"}, "hf": {"path": "minilm"}}
EVERY_NAME = [(kind, name) for kind, registry in REGISTRIES.items() for name in registry]


def faults_of(table: dict[str, Any]) -> list[str]:
    with pytest.raises(UsageError) as caught:
        build_config(table)
    return str(caught.value).splitlines()


# ------------------------------------------------------------------------------------------------ round trip


@pytest.mark.parametrize(("kind", "name"), EVERY_NAME)
def test_every_registered_name_survives_toml(kind: str, name: str) -> None:
    config = build_config({kind: {"name": name, **NEEDED.get(name, {})}})
    assert build_config(tomllib.loads(config_text(config))) == config


def test_a_folder_of_own_clients_survives_toml() -> None:
    config = build_config({"source": {"name": "folder", "path": "clients", "class_names": ["a", "b"]}})
    assert config.partition is None
    assert build_config(tomllib.loads(config_text(config))) == config


def numbers(bounds: dict[str, float], *, whole: bool) -> st.SearchStrategy[Any]:
    low = bounds.get("at_least", bounds.get("above", -1e6))
    high = bounds.get("at_most", bounds.get("below", low + 1e6))
    if whole:
        return st.integers(int(low) + ("above" in bounds), int(high) - ("below" in bounds))
    return st.floats(low, high, exclude_min="above" in bounds, exclude_max="below" in bounds)


def values(field: dataclasses.Field[Any], annotation: Any) -> st.SearchStrategy[Any]:
    """Values that one option accepts."""
    kinds = typing.get_args(annotation)
    if typing.get_origin(annotation) is typing.Literal:
        return st.sampled_from(kinds)
    if kinds and typing.get_origin(annotation) is tuple:
        return st.lists(values(field, kinds[0]), max_size=3)
    if kinds:
        return st.one_of([values(field, kind) for kind in kinds if kind is not type(None)])
    if annotation in (int, float):
        return numbers(field.metadata["bounds"], whole=annotation is int)
    return st.booleans() if annotation is bool else st.text("aß\"'\n\\ ", max_size=8)


@st.composite
def options(draw: DrawFn, cls: type, leave_out: tuple[str, ...] = ()) -> dict[str, Any]:
    """Some of a dataclass's options with values that each may have."""
    fields = {name: entry for name, entry in option_fields(cls).items() if name not in leave_out}
    chosen = draw(st.sets(st.sampled_from(sorted(fields))))
    return {name: draw(values(*fields[name])) for name in sorted(chosen)}


@settings(deadline=None, derandomize=True)
@given(
    options(RunOptions, leave_out=("participation", "defences", "attack")),
    options(LocalTraining, leave_out=("steps", "dp_clip", "dp_noise")),
    options(ALGORITHMS["fedmerge"].cls),
)
def test_any_options_survive_toml(run: dict[str, Any], training: dict[str, Any], method: dict[str, Any]) -> None:
    table = {**run, "training": training, "method": {"name": "fedmerge", **method}}
    faults: list[str] = []
    if ALGORITHMS.build(table["method"], "method", faults) is None:  # two options that exclude each other
        assert all(fault.startswith("method.") for fault in faults)
        return
    if training.get("optimizer") == "adamw" and training.get("momentum"):
        assert faults_of(table) == ["training.momentum: got one for adamw, which has its own; leave it out"]
        return
    config = build_config(table)
    assert build_config(tomllib.loads(config_text(config))) == config


def test_tables_within_the_run_options_survive_toml() -> None:
    table = {
        "participation": {"dropout": 0.25, "quorum": 0.5, "deadline": 3.0, "spread": 0.5},
        "defences": {"clip": 2.0, "max_count": 0},
        "attack": {"kind": "push", "share": 0.1},
    }
    config = build_config(table)
    assert config.run.participation == Participation(dropout=0.25, quorum=0.5, deadline=3.0, spread=0.5)
    assert config.run.defences.clip == 2.0
    assert build_config(tomllib.loads(config_text(config))) == config


def test_every_fault_of_a_table_within_a_table_is_named() -> None:
    assert faults_of({"participation": {"quorum": 2, "dropot": 0.1}, "attack": 5}) == [
        "run.participation.quorum: got 2; expected a number >= 0 and <= 1",
        "run.participation: unknown option 'dropot'; did you mean 'dropout'? Known: availability, awake, day, "
        "deadline, dropout, jitter, quorum, sampling, spread",
        "run.attack: got 5; expected a table",
    ]


def test_resolving_twice_changes_nothing() -> None:
    table = to_table(build_config({"method": {"name": "ifca", "num_models": 2}, "label": "two", "rounds": 7}))
    assert to_table(build_config(table)) == table


def test_a_name_alone_is_a_table_with_that_name() -> None:
    assert build_config({"model": "cnn"}) == build_config({"model": {"name": "cnn"}})


def test_the_embedded_digits_come_with_a_partition_that_they_have_items_for() -> None:
    partition = default_partition("digits")
    assert partition["clients"] * (partition["train"] + partition["validation"] + partition["test"]) <= 1797
    assert build_config({"partition": {"clients": 3}}).partition.train == partition["train"]


# ------------------------------------------------------------------------------------------------ overrides


def test_overrides_reach_every_level() -> None:
    table = override({"rounds": 5}, ["rounds=9", "training.lr=0.5", "model=cnn", "model.channels=[4, 8]", "label=x y"])
    assert table == {
        "rounds": 9,
        "training": {"lr": 0.5},
        "model": {"name": "cnn", "channels": [4, 8]},
        "label": "x y",
    }


def test_choosing_another_name_drops_the_old_options() -> None:
    file = {"model": {"name": "cnn", "channels": [4]}}
    assert override(file, ["model=mlp"]) == {"model": {"name": "mlp"}}
    assert override(file, ["model=cnn"]) == file


def test_the_order_of_words_does_not_drop_options() -> None:
    assert override({}, ["model.channels=[4]", "model=cnn"]) == {"model": {"name": "cnn", "channels": [4]}}


def test_a_name_alone_in_the_file_can_be_overridden() -> None:
    assert override({"model": "cnn"}, ["model=mlp"]) == {"model": {"name": "mlp"}}
    assert override({"model": "cnn"}, ["model.norm=none"]) == {"model": {"name": "cnn", "norm": "none"}}


def test_override_leaves_its_argument_alone() -> None:
    table = {"model": {"name": "import", "options": {"width": 3}}}
    override(table, ["model.options.width=4"])
    assert table == {"model": {"name": "import", "options": {"width": 3}}}


@pytest.mark.parametrize("word", ["rounds", "=5", "rounds.deep=5", ""])
def test_a_word_that_sets_nothing_is_refused(word: str) -> None:
    with pytest.raises(UsageError, match=r"expected key=value|is a plain value"):
        override({"rounds": 5}, [word])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1),
        ("-2.5", -2.5),
        ("1e3", 1000.0),
        ("false", False),
        ('"1"', "1"),
        ("", ""),
        ("0-4", "0-4"),
        ("a=b", "a=b"),
    ],
)
def test_words_become_the_values_they_spell(text: str, value: Any) -> None:
    assert parse_value(text) == value
    assert type(parse_value(text)) is type(value)


@pytest.mark.parametrize("text", ["1\nseed = 2", "1\n[training]", "9" * 5000, "[" * 5000])
def test_a_word_that_is_no_single_value_stays_a_text(text: str) -> None:
    assert parse_value(text) == text


# ------------------------------------------------------------------------------------------------ faults


def test_all_faults_are_reported_at_once() -> None:
    found = faults_of(
        {
            "rounds": 0,
            "frction": 0.5,
            "training": {"lr": "fast"},
            "method": {"name": "fedmrge"},
            "model": {"name": "cnn", "chanels": [4]},
            "partition": {"name": "iid", "clients": 2.5},
            "source": 3,
            "label": 4,
        }
    )
    assert found == [
        found[0],
        "run.rounds: got 0; expected a whole number >= 1",
        "training.lr: got 'fast'; expected a number > 0",
        "source: got 3; expected a table",
        "partition.clients: got 2.5; expected a whole number >= 1",
        "model: unknown option 'chanels'; did you mean 'channels'? Known: channels, norm",
        found[6],
        found[7],
    ]
    assert found[0].startswith("unknown option 'frction'; did you mean 'fraction'?")
    assert found[6].startswith("method.name: unknown method 'fedmrge'; did you mean 'fedmerge'?")
    assert found[7].startswith("label: got 4; expected a text")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 0, -1, True, "1", [], {}])
def test_a_learning_rate_is_a_positive_finite_number(value: Any) -> None:
    (fault,) = faults_of({"training": {"lr": value}})
    assert fault == f"training.lr: got {value!r}; expected a number > 0"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("fraction", 1.0001),
        ("fraction", 0.0),
        ("seed", -1),
        ("rounds", True),
        ("rounds", 1.0),
        ("runtime", "parallel"),
        ("precision", "float16"),
        ("frozen", "body"),
        ("frozen", [1]),
        ("head", 3),
    ],
)
def test_run_options_outside_their_range_are_refused(key: str, value: Any) -> None:
    (fault,) = faults_of({key: value})
    assert fault.startswith(f"run.{key}: got {value!r}; expected ")


@pytest.mark.parametrize("kind", [*REGISTRIES, "training"])
@pytest.mark.parametrize("value", [5, [1], True, [{"name": "x"}]])
def test_a_plain_value_where_a_table_is_expected(kind: str, value: Any) -> None:
    assert faults_of({kind: value}) == [f"{kind}: got {value!r}; expected a table"]


def test_a_table_where_a_plain_value_is_expected() -> None:
    assert faults_of({"rounds": {"number": 3}}) == ["run.rounds: got {'number': 3}; expected a whole number >= 1"]


@pytest.mark.parametrize("name", [None, 3, ["iid"], {"a": 1}, ""])
@pytest.mark.parametrize("kind", REGISTRIES)
def test_a_name_that_is_no_name(kind: str, name: Any) -> None:
    (fault,) = faults_of({kind: {"name": name}})
    assert fault.startswith(f"{kind}.name: unknown {kind} {name!r}")


@pytest.mark.parametrize("label", ["a/b", "a\\b", "..", "a\nb", "a\0b", "x" * 201, "\udcff", 3, ["a"]])
def test_a_label_must_be_able_to_name_a_folder(label: Any) -> None:
    (fault,) = faults_of({"label": label})
    assert fault.startswith("label: got ")


@pytest.mark.parametrize("label", ["", "FedMerge, d = 5", "ünïcode ✓", '"quoted"', "[bold]"])
def test_other_labels_are_kept_as_they_are(label: str) -> None:
    assert build_config({"label": label}).label == label


def test_steps_and_epochs_exclude_each_other() -> None:
    (fault,) = faults_of({"training": {"steps": 3, "epochs": 5}})
    assert "got both steps and epochs" in fault


def test_a_folder_takes_no_partition() -> None:
    (fault,) = faults_of({"source": {"name": "folder", "path": "x"}, "partition": {"name": "iid"}})
    assert "leave it out" in fault


# ------------------------------------------------------------------------------------------------ files


def test_a_missing_file_is_named(tmp_path: Any) -> None:
    with pytest.raises(UsageError, match=r"missing\.toml: No such file"):
        read_toml(tmp_path / "missing.toml")


def test_a_folder_is_no_file(tmp_path: Any) -> None:
    with pytest.raises(UsageError, match="Is a directory"):
        read_toml(tmp_path)


@pytest.mark.parametrize(
    "content", [b"rounds = ", b"\xff\xfe", b"a = 1\na = 2", b"a = " + b"9" * 5000, b"a=" + b"[" * 5000]
)
def test_a_file_that_is_not_toml_is_named(tmp_path: Any, content: bytes) -> None:
    path = tmp_path / "run.toml"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"run\.toml is not valid TOML"):
        read_toml(path)


@pytest.mark.parametrize(
    ("word", "home"), [("lr=0.1", "training.lr"), ("steps=3", "training.steps"), ("num_models=3", "method.num_models")]
)
def test_an_option_of_another_table_is_told_where_it_belongs(word: str, home: str) -> None:
    with pytest.raises(UsageError, match=home):
        build_config(override({}, [word]))


def test_an_unknown_source_is_told_of_the_folder_too() -> None:
    with pytest.raises(UsageError, match=r"unknown source 'floder'; did you mean 'folder'\?"):
        build_config({"source": "floder"})
