"""Run options `workers` and `cluster`: what they change, which is nothing but time, and what they refuse."""

from __future__ import annotations

import importlib.util
import multiprocessing
from dataclasses import replace

import pytest
from torch import nn

from fedmerge.core.errors import UsageError
from fedmerge.experiment.book import digest_of_request
from fedmerge.experiment.config import build_config
from fedmerge.experiment.execute import execute, execute_config
from fedmerge.experiment.federation import load_data
from fedmerge.experiment.simulation import models_now, prepare
from fedmerge.runtime.workers import Workers
from small import small


def run_of(**changes):
    return execute_config(build_config(small("fedmerge", **changes)))


def numbers(outcome):
    return [repr(replace(line, seconds=0.0)) for line in outcome.record.rounds]  # NaN equals itself as a text


@pytest.mark.parametrize("runtime", ["sequential", "vectorised", "folded"])
def test_a_run_is_the_same_to_the_last_bit_and_leaves_no_process(runtime):
    more = {} if runtime == "sequential" else {"fold": 2}
    alone, together = (run_of(runtime=runtime, workers=workers, finetune_epochs=1, **more) for workers in (1, 2))
    assert numbers(alone) == numbers(together)
    assert alone.record.finetuned == together.record.finetuned
    assert isinstance(together.setup.engine, Workers)
    assert multiprocessing.active_children() == []


def test_models_can_be_asked_for_when_a_run_has_ended():
    together = run_of(workers=2, runtime="sequential")
    assert len(models_now(together.setup, together.progress)) == 5
    together.setup.engine.close()


def test_a_run_may_go_on_with_other_workers():
    config = build_config(small())
    data = load_data(config.source, config.partition, 0, config.model)
    prepared = (
        prepare(config.method, data, config.model, config.training, replace(config.run, workers=n))[0] for n in (1, 3)
    )
    assert len({digest_of_request(setup) for setup in prepared}) == 1


def test_dropout_is_refused_because_its_draws_would_differ():
    config = build_config(small(workers=2))
    data = load_data(config.source, config.partition, 0, config.model)
    net = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 10))
    with pytest.raises(UsageError, match=r"workers: the network draws random numbers in training"):
        execute(config.method, data, net, config.training, config.run, label="dropout")


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="ray is installed")
def test_a_cluster_needs_ray():
    with pytest.raises(UsageError, match="cluster: the package ray is missing"):
        run_of(cluster="local")
