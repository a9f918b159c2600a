"""The round loop: the same bits whenever nothing that matters differs, and counts that can be made by hand."""

from __future__ import annotations

import dataclasses
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fedmerge.algorithms import ALGORITHMS
from fedmerge.core.errors import FedmergeError, UsageError
from fedmerge.core.protocol import state_tensors
from fedmerge.data import FederatedData
from fedmerge.experiment.comparison import plan, run_jobs
from fedmerge.experiment.config import RunOptions, build_config
from fedmerge.experiment.execute import Outcome, execute, execute_config
from fedmerge.experiment.federation import load_data
from fedmerge.experiment.participation import Participation, turnout
from fedmerge.experiment.record import RoundRecord, read_run, to_plain
from fedmerge.training import LocalTraining, draw_batches
from small import TABLE, small

METHODS = {name: {"name": name} for name in ALGORITHMS} | {
    "fesem": {"name": "fesem", "num_models": 2},
    "ifca": {"name": "ifca", "num_models": 2},
    "fedmerge": {"name": "fedmerge", "num_models": 2, "initial": "noise"},
}
METHODS["dp-fedmerge"] = {"name": "dp-fedmerge", "noise_multiplier": 0}  # with noise it has conditions of its own
each_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def outcome(method: Any = "fedavg", **changes: Any) -> Outcome:
    return execute_config(build_config(small(method, **changes)))


def clients(seed: int = 0) -> FederatedData:
    config = build_config(small())
    return load_data(config.source, config.partition, seed)


def tensors(result: Outcome) -> dict[str, Tensor]:
    return state_tensors(result.progress.state)


def same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """NaN, which stands for what is not known yet, equals itself here."""
    return one.keys() == other.keys() and all(_bytes(one[name]) == _bytes(other[name]) for name in one)


def _bytes(tensor: Tensor) -> tuple[tuple[int, ...], bytes]:
    return tuple(tensor.shape), tensor.numpy().tobytes()


def timeless(record: RoundRecord) -> Any:
    return to_plain(dataclasses.replace(record, seconds=0.0))


# ------------------------------------------------------------------------------------------------ same and different


@each_method
def test_the_same_seed_gives_the_same_bits(method: Any, tmp_path: Path) -> None:
    records = [execute_config(build_config(small(method)), folder=tmp_path / name).record for name in ("one", "two")]
    one, two = (load_file(tmp_path / name / "models.safetensors") for name in ("one", "two"))
    assert same_bits(one, two)
    assert [timeless(record) for record in records[0].rounds] == [timeless(record) for record in records[1].rounds]


def test_another_seed_gives_other_clients_and_models() -> None:
    one, other = outcome(), outcome(seed=1)
    assert one.record.data_sha256 != other.record.data_sha256
    assert not same_bits(tensors(one), tensors(other))


def test_dropout_draws_the_same_masks_for_the_same_seed() -> None:
    def run(seed: int) -> dict[str, Tensor]:
        options = RunOptions(rounds=2, finetune_epochs=1, seed=seed)
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Dropout(0.5), nn.Linear(8, 10))
        for parameter in net.parameters():
            nn.init.constant_(parameter, 0.01)
        method = ALGORITHMS["fedavg"].cls()
        return tensors(execute(method, clients(), net, LocalTraining(epochs=1), options, label="dropout"))

    assert same_bits(run(0), run(0))
    assert not same_bits(run(0), run(1))


def test_runs_side_by_side_give_the_same_bits_as_one_by_one(tmp_path: Path) -> None:
    jobs = plan(TABLE, [METHODS["fedmerge"], "fedavg"], [0])
    one = run_jobs(jobs, tmp_path / "one", processes=1)
    two = run_jobs(jobs, tmp_path / "two", processes=2)
    for job, a, b in zip(jobs, one, two, strict=True):
        saved = [load_file(tmp_path / name / job.name / "models.safetensors") for name in ("one", "two")]
        assert same_bits(*saved)
        assert [timeless(record) for record in a.rounds] == [timeless(record) for record in b.rounds]


PARTIAL: Any = {"fraction": 0.4, "rounds": 3}


@cache
def partial_fedavg() -> Outcome:
    return outcome("fedavg", **PARTIAL)


@each_method
def test_every_method_meets_the_same_cohorts_start_and_batches(method: Any) -> None:
    found, reference = outcome(method, **PARTIAL), partial_fedavg()
    assert [r.cohort for r in found.record.rounds] == [r.cohort for r in reference.record.rounds]
    assert found.record.data_sha256 == reference.record.data_sha256
    start = [r.setup.layout.read(r.setup.module) for r in (found, reference)]
    assert torch.equal(*start)
    cost = found.setup.played.cost(found.progress.state)
    for ours, theirs in zip(found.record.rounds, reference.record.rounds, strict=True):
        assert ours.backward == round(theirs.backward * (1 + cost.extra_backward))


def test_batches_depend_on_seed_round_and_client_alone() -> None:
    train = clients().clients[0].train

    def drawn(**changes: int) -> Tensor:
        counters = {"seed": 0, "round_number": 1, "client": 0} | changes
        return torch.cat([batch.targets for batch in draw_batches(train, LocalTraining(epochs=4), lr=0.1, **counters)])

    assert torch.equal(drawn(), drawn())
    assert all(not torch.equal(drawn(), drawn(**{name: 7})) for name in ("seed", "round_number", "client"))


# ------------------------------------------------------------------------------------------------ cohorts, schedules


def asked(fraction: float, clients: int, round_number: int) -> tuple[int, ...]:
    counts = [10] * clients
    turned_out = turnout(
        Participation(), fraction=fraction, seed=0, round_number=round_number, num_examples=counts, passes=counts
    )
    return turned_out.cohort


def test_a_cohort_is_a_share_of_the_clients_in_ascending_order() -> None:
    cohorts = [list(asked(0.3, 10, number)) for number in range(1, 40)]
    assert all(len(cohort) == 3 and cohort == sorted(set(cohort)) for cohort in cohorts)
    assert {client for cohort in cohorts for client in cohort} == set(range(10))


def test_the_smallest_fraction_still_asks_one_client() -> None:
    assert len(asked(0.001, 10, 1)) == 1


def test_all_clients_take_part_where_the_fraction_is_one() -> None:
    assert asked(1.0, 3, 1) == (0, 1, 2)


def test_a_cosine_schedule_ends_slower_than_a_constant_one() -> None:
    shared = {"epochs": 1, "lr": 0.1}
    constant = outcome(rounds=4, training=shared)
    cosine = outcome(rounds=4, training={**shared, "schedule": "cosine"})

    def last_step(run: Outcome) -> float:
        return float(tensors(run)["method.velocity"].norm())  # without momentum: the last averaged update

    # rate of round 4 of 4: 0.1 · (1 + cos(3π/4))/2 = 0.1 · 0.146
    assert last_step(cosine) < 0.3 * last_step(constant)


def test_round_zero_and_every_kth_and_the_last_round_are_evaluated() -> None:
    record = outcome(rounds=5, evaluate_every=2).record
    assert [r.round for r in record.rounds] == [0, 1, 2, 3, 4, 5]
    assert [r.round for r in record.evaluated()] == [0, 2, 4, 5]


def test_evaluation_does_not_change_the_training() -> None:
    assert same_bits(tensors(outcome(evaluate_every=1)), tensors(outcome(evaluate_every=2)))


def test_fine_tuning_stands_beside_the_plain_result() -> None:
    plain, tuned = outcome(), outcome(finetune_epochs=3)
    assert plain.record.finetuned is None
    assert tuned.record.finetuned is not None
    assert tuned.record.finetuned != tuned.record.last().test
    assert [timeless(r) for r in plain.record.rounds] == [timeless(r) for r in tuned.record.rounds]
    assert same_bits(tensors(plain), tensors(tuned))


# ------------------------------------------------------------------------------------------------ precision, runtime


def test_float64_runs_in_float64_throughout() -> None:
    run = outcome(precision="float64")
    assert tensors(run)["method.models"].dtype == torch.float64
    assert run.setup.data.clients[0].train.inputs.dtype == torch.float64
    assert tensors(outcome())["method.models"].dtype == torch.float32


@pytest.mark.no_cover  # the other tests of each method go through the same lines
@each_method
def test_runtimes_agree(method: Any) -> None:
    runs = [
        outcome(method, precision="float64", rounds=3, runtime=runtime).record
        for runtime in ("sequential", "vectorised", "auto")
    ]
    for one, two in ((runs[0], runs[1]), (runs[1], runs[2])):
        for a, b in zip(one.rounds, two.rounds, strict=True):
            for split in ("validation", "test"):
                x, y = getattr(a, split), getattr(b, split)
                assert x.accuracy == pytest.approx(y.accuracy, abs=1e-10)
                assert x.loss == pytest.approx(y.loss, abs=1e-10)


# ------------------------------------------------------------------------------------------------ counts by hand

# Inputs of 64 pixels, 8 hidden units, 10 classes.
P = 64 * 8 + 8 + 8 * 10 + 10
FLOAT32 = 4


def test_fedavg_sends_one_model_each_way() -> None:
    record = outcome(fraction=0.4).record.rounds[1]
    assert len(record.cohort) == 2  # of 5 clients
    assert record.bytes_down == record.bytes_up == 2 * P * FLOAT32
    assert record.forward == record.backward == 2 * 10  # one epoch over 10 examples each


def test_epochs_multiply_the_passes() -> None:
    record = outcome(training={"epochs": 3}).record.rounds[1]
    assert record.forward == record.backward == 5 * 3 * 10


def test_steps_count_their_batches() -> None:
    record = outcome(training={"steps": 4, "batch_size": 4}).record.rounds[1]
    # 10 examples in batches of 4, 4, 2 and, of the next epoch, 4
    assert record.forward == record.backward == 5 * (4 + 4 + 2 + 4)


def test_ifca_sends_all_models_and_looks_at_each() -> None:
    record = outcome(METHODS["ifca"]).record.rounds[1]
    index = 8  # bytes of an int64
    assert record.bytes_down == 5 * 2 * P * FLOAT32
    assert record.bytes_up == 5 * (P * FLOAT32 + index)
    assert record.backward == 5 * 10
    assert record.forward == 5 * 10 * (1 + 2)


def test_local_training_sends_nothing() -> None:
    record = outcome("local").record.rounds[1]
    assert (record.bytes_down, record.bytes_up, record.backward) == (0, 0, 5 * 10)


def test_round_zero_costs_nothing() -> None:
    first = outcome().record.rounds[0]
    assert (first.bytes_down, first.bytes_up, first.forward, first.backward, first.cohort) == (0, 0, 0, 0, ())


# ------------------------------------------------------------------------------------------------ stopped runs


def test_ctrl_c_keeps_what_was_finished(tmp_path: Path) -> None:
    def interrupt(record: RoundRecord) -> None:
        if record.round == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        execute_config(build_config(small(rounds=5)), folder=tmp_path / "run", watch=interrupt)
    record = read_run(tmp_path / "run")
    assert record.status == "interrupted"
    done = len(record.rounds) - 1  # the run may be ahead of what it has announced
    assert [r.round for r in record.rounds] == list(range(done + 1))
    assert 2 <= done <= 5
    as_far = state_tensors(outcome(rounds=done).progress.state)
    saved = load_file(tmp_path / "run" / "last.safetensors")
    assert all(torch.equal(saved[f"server.{name}"], tensor) for name, tensor in as_far.items())


def test_the_saved_models_are_those_of_the_selected_round(tmp_path: Path) -> None:
    result = execute_config(build_config(small("local", rounds=12, training={"lr": 1.0})), folder=tmp_path / "run")
    assert result.selected.round == result.record.selected().round < result.progress.round == 12
    saved = load_file(tmp_path / "run" / "models.safetensors")
    assert all(torch.equal(saved[f"server.{n}"], t) for n, t in state_tensors(result.selected.state).items())


def test_a_failing_run_says_so_and_keeps_its_rounds(tmp_path: Path) -> None:
    with pytest.raises(FedmergeError, match="lower the learning rate"):
        execute_config(build_config(small(training={"lr": 1e30})), folder=tmp_path / "run")
    record = read_run(tmp_path / "run")
    assert record.status == "failed"
    assert [r.round for r in record.rounds] == [0]


def test_diverged_local_training_is_an_error_too() -> None:
    with pytest.raises(FedmergeError, match=r"clients client-0.*NaN or infinite.*lower the learning rate"):
        outcome("local", training={"lr": 1e30})


def test_a_refused_run_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="at most one model per client"):
        execute_config(build_config(small({"name": "ifca", "num_models": 6})), folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_finished_folder_holds_everything(tmp_path: Path) -> None:
    execute_config(build_config(small()), folder=tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "config.toml",
        "last.safetensors",
        "models.safetensors",
        "partition.json",
        "partition.svg",
        "rounds.jsonl",
        "run.json",
        "serving.json",
    ]


def test_fine_tuning_moves_models_even_where_the_schedule_ended_at_zero() -> None:
    result = outcome("fedavg", rounds=4, finetune_epochs=3, training={"schedule": "cosine", "lr": 0.5})
    selected = result.record.selected().test
    assert result.record.finetuned is not None
    assert selected is not None
    assert result.record.finetuned.loss != selected.loss


def test_the_run_file_names_the_selected_round(tmp_path: Path) -> None:
    result = execute_config(build_config(small()), folder=tmp_path / "run")
    plain = json.loads((tmp_path / "run" / "run.json").read_text())
    assert plain["selected_round"] == result.record.selected().round
