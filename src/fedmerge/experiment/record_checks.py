"""What a run's record must be beyond the type of each value: everything about clients has one entry for each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fedmerge.core.text import brief
from fedmerge.experiment.choice import RUNTIMES

if TYPE_CHECKING:
    from fedmerge.experiment.record import RoundRecord, RunRecord, Scores

_LARGEST_WEIGHT = 1e6  # sums over any number of models stay finite
_MOST_FOLD = 1 << 20
_COUNTED = ("seed", "num_params", "seconds")
_PER_CLIENT = ("groups", "num_train", "num_validation", "num_test", "class_counts", "tasks")
_NUMBERS_OF_STATE = ("gate", "num_models", "server_floats", "averaging_error")
_COUNTED_IN_ROUND = ("round", "seconds", "bytes_down", "bytes_up", "forward", "backward")


def faults_of_run(run: RunRecord) -> list[str]:
    """One line for everything about a run without its rounds that no run writes; none for a sound one."""
    return list(_of_run(run))


def faults_of_round(record: RoundRecord, num_clients: int) -> list[str]:
    """The same for one of its rounds."""
    return list(_of_round(record, num_clients))


def _of_run(run: RunRecord) -> Iterator[str]:
    N, K = len(run.client_names), len(run.class_names)
    if not N:
        yield "client_names: got none; expected at least one"
    yield from _below_zero(run, _COUNTED)
    for name in _PER_CLIENT:
        yield from _count(getattr(run, name), N, name)
    for name in ("num_train", "num_validation", "num_test", "groups"):
        if any(number < 0 for number in getattr(run, name) or ()):
            yield f"{name}: got {brief(getattr(run, name))}; expected whole numbers >= 0"
    for row in run.class_counts or ():
        if len(row) != K or min(row, default=0) < 0:
            yield f"class_counts: got {brief(row)}; expected {K} whole numbers >= 0 for each client"
            break
    for name in ("finetuned", "finetuned_validation"):
        yield from _of_scores(getattr(run, name), N, name)
    if len({*run.client_names}) < N:
        yield f"client_names: got {brief(run.client_names)}; expected each name once"
    yield from _of_options(run)
    yield from _of_samples(run.samples or ())
    if run.engine is not None and (run.engine.runtime not in RUNTIMES or not 0 < (run.engine.most or 1) <= _MOST_FOLD):
        yield f"engine: got {brief(run.engine)}; expected a runtime and how many clients run at once"


def _of_options(run: RunRecord) -> Iterator[str]:
    """Those that pages and tables print as what they are."""
    yield from _not_numbers(run.options, "options", ("gate",))
    if not isinstance(run.options.get("training", {}), dict):
        yield f"options.training: got {brief(run.options['training'])}; expected a table"


def _not_numbers(table: Mapping[str, Any], where: str, names: Sequence[str]) -> Iterator[str]:
    for name in names:
        value = table.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            yield f"{where}.{name}: got {brief(value)}; expected a number"


_SAMPLE_KEYS = ("client", "task", "prompt", "completion", "wanted")


def _of_samples(samples: Sequence[Any]) -> Iterator[str]:
    for sample in samples:
        if set(sample) != set(_SAMPLE_KEYS) or not all(isinstance(text, str) for text in sample.values()):
            yield f"samples: got {brief(sample)}; expected texts {', '.join(_SAMPLE_KEYS)}"
            return


def _of_round(record: RoundRecord, N: int) -> Iterator[str]:
    yield from _below_zero(record, _COUNTED_IN_ROUND)
    yield from _not_numbers(record.state, "state", _NUMBERS_OF_STATE)
    if any(not 0 <= client < N for client in record.cohort):
        yield f"cohort: got {brief(record.cohort)}; expected clients 0..{N - 1}"
    yield from _of_scores(record.validation, N, "validation")
    yield from _of_scores(record.test, N, "test")
    if record.mixing is not None:
        widths = {len(row) for row in record.mixing}
        if len(record.mixing) != N or len(widths) != 1 or not min(widths):
            yield f"mixing: got {brief(record.mixing)}; expected {N} rows with one number for each model"
        if not all(0 <= weight <= _LARGEST_WEIGHT for row in record.mixing for weight in row):
            yield f"mixing: got {brief(record.mixing)}; expected numbers 0..{_LARGEST_WEIGHT:g}"


def _of_scores(scores: Scores | None, N: int, name: str) -> Iterator[str]:
    if scores is None:
        return
    yield from _count(scores.accuracy, N, f"{name}.accuracy")
    yield from _count(scores.loss, N, f"{name}.loss")
    if any(value is not None and not 0 <= value <= 1 for value in scores.accuracy):
        yield f"{name}.accuracy: got {brief(scores.accuracy)}; expected shares 0..1, or null"


def _count(values: Sequence[Any] | None, N: int, name: str) -> Iterator[str]:
    if values is not None and len(values) != N:
        yield f"{name}: got {len(values)} entries; expected {N}, one for each client"


def _below_zero(record: Any, names: Sequence[str]) -> Iterator[str]:
    for name in names:
        if not getattr(record, name) >= 0:
            yield f"{name}: got {brief(getattr(record, name))}; expected a number >= 0"
