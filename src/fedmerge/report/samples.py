"""What the clients' language models make of a few test prompts, the methods side by side."""

from __future__ import annotations

from collections.abc import Mapping

from fedmerge.experiment.record import RunRecord
from fedmerge.report.study import Study
from fedmerge.report.table import Cell, Column, Table

PROMPTS = 60
EMPTY = "(nothing)"

_Prompt = tuple[str, str, str, str]  # client, task, prompt, what is wanted


def samples_table(study: Study) -> Table | None:
    """A row per prompt of the first seed that has any, a column per method; None without samples."""
    seed = next((seed for seed in study.seeds if any(_samples(runs.get(seed)) for runs in study.runs.values())), None)
    if seed is None:
        return None
    told = {label: _completions(runs[seed]) for label, runs in study.runs.items() if _samples(runs.get(seed))}
    prompts = tuple(dict.fromkeys(prompt for found in told.values() for prompt in found))
    tasks = any(task for _, task, _, _ in prompts)
    columns = (
        Column("Client", "text"),
        *((Column("Task", "text"),) if tasks else ()),
        Column("Prompt", "text"),
        Column("Wanted", "text"),
        *(Column(label, "text") for label in told),
    )
    rows: list[tuple[Cell, ...]] = [
        (prompt[0], *(prompt[1:] if tasks else prompt[2:]), *(found.get(prompt) for found in told.values()))
        for prompt in prompts[:PROMPTS]
    ]
    shown = f"{len(rows)} of {len(prompts)}" if len(rows) < len(prompts) else f"All {len(prompts)}"
    notes = (f"{shown} test prompts that were kept, seed {seed}; rest on a text that is cut to see all of it.",)
    return Table(columns, tuple(rows), f"What the models write, seed {seed}", notes)


def _samples(run: RunRecord | None) -> tuple[Mapping[str, str], ...]:
    return () if run is None else run.samples or ()


def _completions(run: RunRecord) -> dict[_Prompt, str]:
    """Prompt -> what the client's model writes."""
    return {_prompt(sample): str(sample.get("completion", "")) or EMPTY for sample in _samples(run)}


def _prompt(sample: Mapping[str, str]) -> _Prompt:
    client, task, prompt, wanted = (str(sample.get(key, "")) for key in ("client", "task", "prompt", "wanted"))
    return client, task, prompt, wanted
