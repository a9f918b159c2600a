"""Run records whose every number is known beforehand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from fedmerge.experiment.record import RoundRecord, RunRecord, Scores

Row = Sequence[float | None]
Mixing = Sequence[Sequence[float]]


def scores(accuracy: Row) -> Scores:
    return Scores(tuple(accuracy), tuple(None if value is None else 1 - value for value in accuracy))


def round_record(
    number: int, test: Row | None = None, validation: Row | None = None, *, mixing: Mixing | None = None, **changes
) -> RoundRecord:
    """A round in which clients 0 and 1 took part and moved 100 bytes down and 50 up each; round 0 moved nothing."""
    trained = number > 0
    values = {
        "round": number,
        "cohort": (0, 1) if trained else (),
        "seconds": 2.0 * trained,
        "bytes_down": 200 * trained,
        "bytes_up": 100 * trained,
        "forward": 40 * trained,
        "backward": 30 * trained,
        "state": {"server_floats": 1000},
        "mixing": None if mixing is None else tuple(tuple(row) for row in mixing),
        "validation": None if validation is None else scores(validation),
        "test": None if test is None else scores(test),
        **changes,
    }
    return RoundRecord(**values)


def run_record(label: str, seed: int, rounds: Sequence[RoundRecord], **changes) -> RunRecord:
    """A finished run; the data hash depends on the seed alone, as it does in an experiment."""
    clients = next(len(record.test.accuracy) for record in rounds if record.test)
    there = [tuple(client for client in record.cohort if client < clients) for record in rounds]
    values = {
        "label": label,
        "method": label,
        "options": {"lr": 0.1},
        "seed": seed,
        "status": "finished",
        "client_names": tuple(f"client {index}" for index in range(clients)),
        "groups": None,
        "num_train": (20,) * clients,
        "num_validation": (10,) * clients,
        "num_test": (10,) * clients,
        "class_names": ("yes", "no"),
        "num_params": 25,
        "setting": "digits, two groups",
        "data_sha256": f"{seed:064x}",
        "versions": {"fedmerge": "0.1", "python": "3.11"},
        "seconds": 9.0,
        "rounds": tuple(replace(record, cohort=cohort) for record, cohort in zip(rounds, there, strict=True)),
        **changes,
    }
    return RunRecord(**values)


def flat_run(label: str, seed: int, accuracy: Row, **changes) -> RunRecord:
    """A run that has the same accuracies on validation and test, before and after its only round."""
    mixing = changes.pop("mixing", None)
    rounds = [round_record(number, accuracy, accuracy, mixing=mixing) for number in (0, 1)]
    return run_record(label, seed, rounds, **changes)


def means_of(table: Mapping[str, Sequence[float]], clients: int = 2, **changes) -> list[RunRecord]:
    """Label -> mean accuracy per seed; clients lie 0.1 above and below in turn."""
    return [
        flat_run(label, seed, [mean + (0.1 if client % 2 else -0.1) for client in range(clients)], **changes)
        for label, means in table.items()
        for seed, mean in enumerate(means)
    ]
