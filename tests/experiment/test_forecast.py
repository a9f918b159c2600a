"""What a run says of itself before it begins."""

import pytest

import fedmerge.cli
import fedmerge.experiment.federation
import tiny_models
from fedmerge.algorithms.fedavg import FedAvg
from fedmerge.data import from_texts
from fedmerge.experiment.config import RunOptions, build_config
from fedmerge.experiment.execute import execute_config
from fedmerge.experiment.forecast import forecast
from fedmerge.experiment.simulation import prepare
from fedmerge.models.hf import Hf
from fedmerge.training import LocalTraining

SMALL = {"rounds": 4, "partition": {"name": "iid", "clients": 4, "train": 40, "validation": 10, "test": 10}}


def test_it_is_told_once_and_before_the_first_round():
    told, rounds = [], []
    config = build_config({**SMALL, "method": "fedavg"})
    outcome = execute_config(
        config, watch=lambda record: rounds.append((record.round, len(told))), foretell=told.append
    )
    assert rounds[0] == (0, 1)
    assert len(told) == 1
    assert told[0].seconds > 0
    assert told[0].base_bytes == told[0].remembered_bytes == 0
    assert told[0].vector_bytes == outcome.record.rounds[1].bytes_down // 4


def test_measuring_changes_no_number():
    config = build_config(SMALL)
    plain, told = (execute_config(config, foretell=tell).record for tell in (None, lambda _: None))
    assert plain.last().test == told.last().test


def test_twice_the_rounds_take_about_twice_as_long():
    """Time is measured on this machine while others use it: wide bounds, and the best of three."""
    seconds = {}
    for rounds in (100, 200):
        config = build_config({**SMALL, "rounds": rounds, "evaluate_every": rounds})
        from_config = fedmerge.experiment.federation.load_data(config.source, config.partition, 0)
        setup, progress = prepare(config.method, from_config, config.model, config.training, config.run)
        seconds[rounds] = min(forecast(setup, progress).seconds for _ in range(3))
    assert 1 < seconds[200] / seconds[100] < 4


def test_a_frozen_base_counts_once_and_adapters_per_client(tmp_path):
    recipe = Hf(tiny_models.tiny_bert(tmp_path), layers=1, max_length=16)
    texts = [
        f"the {word} was {state}" for word in ("food", "room", "film", "day") for state in ("good", "bad", "clean")
    ]
    labels = [text.split()[-1] for text in texts]
    data = from_texts({"a": (texts, labels), "b": (texts, labels)}, recipe.encoder())
    setup, progress = prepare(FedAvg(), data, recipe, LocalTraining(optimizer="adamw", lr=0.01), RunOptions(rounds=2))
    found = forecast(setup, progress)
    assert found.base_bytes == 4 * sum(p.numel() for p in setup.module.parameters() if not p.requires_grad)
    assert found.vector_bytes == 4 * setup.layout.num_params
    assert found.remembered_bytes > 0
    assert all(word in str(found) for word in ("per client and direction", "frozen base", "frozen outputs", "memory"))


@pytest.mark.parametrize("quiet", [True, False])
def test_the_command_tells_it_for_pretrained_models(quiet, tmp_path, capsys):
    base = tiny_models.tiny_bert(tmp_path / "model")
    lines = [
        f"the {word} was {state},{state}" for word in ("food", "room", "film") for state in ("good", "bad", "clean")
    ]
    for site in ("a", "b"):
        (tmp_path / "sites").mkdir(exist_ok=True)
        (tmp_path / "sites" / f"{site}.csv").write_text("text,label\n" + "\n".join(lines))
    words = ["run", "fedavg", f"model=hf:{base}", "model.max_length=16", "source=folder", "rounds=1"]
    words += [f"source.path={tmp_path / 'sites'}", "source.text_column=text", "--out", str(tmp_path / "run")]
    assert fedmerge.cli.main([*words, *(["--quiet"] if quiet else [])]) == 0
    assert ("forecast about" in capsys.readouterr().err) is not quiet
