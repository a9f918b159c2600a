"""A suite says everything that is wrong with it, and takes a new method in three lines."""

from __future__ import annotations

import pytest
from small_suite import PARTITION, suite, table

from fedmerge.bench.suite import narrowed
from fedmerge.bench.suite_file import BUILT_IN, read_suite, suite_of
from fedmerge.core.errors import UsageError


def faults_of(**changes: object) -> list[str]:
    with pytest.raises(UsageError) as caught:
        suite_of(table(**changes))
    return str(caught.value).splitlines()


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_built_in_suites_are_valid(name: str) -> None:
    found = read_suite(name)
    assert {"fedmerge", "fedavg", "local"} <= set(found.methods)
    assert all("fedmerge" in setting.labels for setting in found.settings.values())


def test_every_fault_is_reported_at_once() -> None:
    found = faults_of(
        seeds=[0, 1000],
        methods={
            "fedavg": {"name": "fedavg", "server_momentum": 1.5},
            "b": {"name": "fedagv"},
            "c": {"name": "local", "lr": [0.2]},
            "d": {"name": "fedprox", "options_grid": {"proximal": [0.1, 1.0, 10.0]}},
        },
        settings={"x": {"partition": {**PARTITION, "clients": 0}, "roundz": 3, "methods": ["fedavg", "nobody"]}},
        goals=[{"key": "g", "setting": "y", "left": "a", "right": "b", "demand": 0}],
    )
    text = "\n".join(found)
    assert "suite.tuning_seed: got 1000, which is among the reported seeds" in text
    assert "methods.fedavg: method.server_momentum: got 1.5; expected a number >= 0 and < 1" in text
    assert "methods.b: method.name: unknown method 'fedagv'; did you mean 'fedavg'?" in text
    assert "methods.c.lr: got [0.2]; expected rates of the ladder" in text
    assert "methods.d.options_grid" in text
    assert "2 in all at most" in text
    assert "settings.x: partition.clients: got 0" in text
    assert "settings.x: unknown option 'roundz'; did you mean 'rounds'?" in text
    assert "settings.x: unknown method 'nobody'" in text
    assert "goals.g.setting: unknown setting 'y'" in text
    assert len(found) == len(set(found))


def test_a_goal_names_methods_that_run_on_its_setting() -> None:
    goal = {"key": "g", "setting": "alike", "left": "oracle", "right": "fedavg", "demand": 0.0}
    assert faults_of(goals=[goal]) == [
        "goals.g: unknown method of setting 'alike' 'oracle'. Known: fedavg, ifca, local"
    ]


def test_a_control_that_needs_groups_skips_settings_without() -> None:
    found = suite()
    assert found.settings["turned"].labels == ("fedavg", "local", "oracle", "ifca")
    assert found.settings["alike"].labels == ("fedavg", "local", "ifca")


def test_a_setting_names_excludes_and_adds_methods() -> None:
    methods = {**table()["methods"], "extra": {"name": "fedprox", "everywhere": False}}
    base = {"partition": PARTITION, "groups": 2}
    settings = {
        "all": base,
        "some": {**base, "methods": ["fedavg", "extra"]},
        "less": {**base, "exclude": ["ifca"], "also": ["extra"]},
    }
    found = suite(methods=methods, settings=settings, goals=[]).settings
    assert found["all"].labels == ("fedavg", "local", "oracle", "ifca")
    assert found["some"].labels == ("fedavg", "extra")
    assert found["less"].labels == ("fedavg", "local", "oracle", "extra")
    assert [found[key].ranked for key in ("all", "some", "less")] == [True, False, True]


def test_a_told_method_without_a_number_to_tell_is_a_fault() -> None:
    settings = {"s": {"partition": PARTITION}}
    assert faults_of(settings=settings, goals=[]) == [
        "settings.s.told: missing; expected the number of models that methods are told here, or `groups`"
    ]


def test_defaults_reach_every_setting_and_training_tables_are_merged() -> None:
    settings = {"s": {"partition": PARTITION, "groups": 2, "rounds": 7, "training": {"epochs": 3}}}
    base = suite(settings=settings, goals=[]).settings["s"].base
    assert base["rounds"] == 7
    assert base["training"] == {"epochs": 3, "batch_size": 8}
    assert base["source"] == {"name": "digits"}


def test_a_part_of_a_suite_keeps_its_order_and_refuses_unknown_names() -> None:
    found = narrowed(suite(), settings=["alike"], methods=["ifca", "fedavg"], seeds=[2])
    assert list(found.settings) == ["alike"]
    assert found.settings["alike"].labels == ("fedavg", "ifca")
    assert found.protocol.seeds == (2,)
    with pytest.raises(UsageError, match="unknown setting 'alik'; did you mean 'alike'") as caught:
        narrowed(suite(), settings=["alik"], methods=["nobody"], seeds=[9])
    assert len(str(caught.value).splitlines()) == 3


def test_a_method_says_its_name_and_leaves_its_rate_to_the_tuning() -> None:
    assert "methods.fedavg.name: missing; expected the name of a method" in faults_of(methods={"fedavg": {}})[0]
    found = faults_of(methods={"fedavg": {"name": "fedavg", "training": {"lr": 0.5}}}, goals=[])
    assert found == ["methods.fedavg.training.lr: got 0.5, but rates are tuned; give `lr = [...]` to a method"]
    found = faults_of(defaults={"training": {"lr": 0.5}})
    assert "settings.turned.training.lr: got 0.5, but rates are tuned; give `lr = [...]` to a method" in found


def test_a_setting_is_called_so_that_figures_can_be() -> None:
    found = faults_of(settings={"a/b": {"partition": PARTITION, "groups": 2}}, goals=[])
    assert found == ["settings.a/b: got 'a/b'; expected a name of one line without slashes: figures are called by it"]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"settings": []}, "--settings: got []; expected at least one, each once"),
        ({"methods": []}, "--methods: got []; expected at least one, each once"),
        ({"seeds": [0, 0]}, "--seeds: got [0, 0]; expected at least one, each once"),
    ],
)
def test_a_part_of_a_suite_is_not_empty_and_names_nothing_twice(asked: dict[str, list[int]], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        narrowed(suite(), **asked)  # type: ignore[arg-type]
    assert str(caught.value) == message
