"""The page of what `lora.py` and `lora_lm.py` measured.

Usage: python benchmarks/lora_page.py OUT
writes OUT/measured.md from OUT/measured.json, OUT/lm.json and the runs of `fedmerge bench lora --out OUT`.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Line = dict[str, Any]
TASKS = ("sentiment", "topic", "spam", "supersense", "genre")


def page(folder: Path) -> str:
    """The whole page as Markdown."""
    found = json.loads((folder / "measured.json").read_text(encoding="utf-8"))
    lm = json.loads((folder / "lm.json").read_text(encoding="utf-8"))
    seeds = ", ".join(map(str, found["seeds"]))
    lines = [
        "# Adapters: recovery, spaces, memory, new clients, a language model",
        "",
        "<!-- Written by benchmarks/lora_page.py. -->",
        "",
        "Clients and model as in [the benchmark](README.md), FedMerge as it comes, rate "
        f"{found['lr']}, {found['rounds']} rounds, seeds {seeds}. `python benchmarks/lora.py OUT` made it.",
        "Other processes used the machine (two cores) meanwhile: seconds are upper bounds. ± is the "
        "standard deviation.",
        *_by_task(folder),
        *_spaces(found["spaces"]),
        *_memory(found["memory"]),
        *_clients(found["new_clients"]),
        *_language_model(lm),
    ]
    return "\n".join(lines) + "\n"


def _mean(values: list[float], digits: int = 1, scale: float = 100) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{scale * statistics.fmean(values):.{digits}f} ± {scale * spread:.{digits}f}"


def _each(values: Iterator[Any] | list[Any], form: str = "") -> str:
    return ", ".join("–" if value is None else format(value, form) for value in values)


def _table(heads: list[str], rows: list[list[str]]) -> list[str]:
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "--:|" * (len(heads) - 1)]
    return ["", *lines, *("| " + " | ".join(row) + " |" for row in rows)]


def _average(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{statistics.fmean(known):.2f}" if known else "–"


def _by_task(folder: Path) -> list[str]:
    """Accuracy of every method on every task; clients come task by task, four each."""
    runs = [json.loads(line) for line in (folder / "runs.jsonl").read_text(encoding="utf-8").splitlines()]
    chosen = {(run["label"], run["seed"]): run for run in runs if run["stage"] == "report"}  # the last of each counts
    rows = []
    for label in sorted({label for label, _ in chosen}):
        own = [run["test"] for (name, _), run in sorted(chosen.items()) if name == label]
        tasks = [[statistics.fmean(scores[4 * k : 4 * k + 4]) for scores in own] for k in range(len(TASKS))]
        rows.append([label, *map(_mean, tasks), _mean([statistics.fmean(scores) for scores in own])])
    rows.sort(key=lambda row: -float(row[-1].split()[0]))
    return [
        "",
        "## Task by task",
        "",
        "Test accuracy (%) of the benchmark's runs.",
        *_table(["", *TASKS, "mean"], rows),
    ]


def _spaces(lines: list[Line]) -> list[str]:
    heads = ["merging", "accuracy (%)", "models", "ARI at round 5", "ARI at the end"]
    heads += ["averaging error, rounds 1, 2, 3", "merging error after the split", "bytes each way", "s per round"]
    rows = []
    for name in dict.fromkeys(line["space"] for line in lines):
        own = [line for line in lines if line["space"] == name]
        rows.append(
            [
                name,
                _mean([line["accuracy"] for line in own]),
                _each([line["models"] for line in own]),
                _each([line["ari"]["5"] for line in own], ".2f"),
                _each([list(line["ari"].values())[-1] for line in own], ".2f"),
                ", ".join(_average([line["averaging_error"][r] for line in own]) for r in range(3)),
                _average([line["merging_error"][3] for line in own]),
                f"{own[0]['bytes']:,}",
                f"{statistics.median(line['per_round'] for line in own):.1f}",
            ]
        )
    whole, adapter = lines[0]["full_model_bytes"], lines[0]["bytes"]
    return [
        "",
        "## Tasks recovered, and the space of merging",
        "",
        "ARI compares every client's favourite model with its task. The rate was tuned for `auto` only.",
        *_table(heads, rows),
        "",
        f"The whole network in float32 would be {whole:,} bytes each way, {whole / adapter:.0f} times as much.",
    ]


def _memory(found: dict[str, Line]) -> list[str]:
    ready, trained = found["ready"], found["trained"]
    vector, base, mega = trained["vector_bytes"], trained["base_bytes"], 1e6
    bound = base + 2 * vector * (trained["models"] + 1)
    held = base + trained["server_bytes"] + 2 * vector
    return [
        "",
        "## Memory and time",
        "",
        f"Four tasks, 20 clients, one process, one thread: ten rounds take {trained['seconds'] / 60:.1f} minutes, "
        "everything included.",
        "",
        f"- Peak of the process: {ready['peak'] / mega:.0f} MB when one round is done, {trained['peak'] / mega:.0f} MB "
        f"after ten. Of these {base / mega:.1f} MB are the base (bfloat16) and "
        f"{trained['remembered_bytes'] / mega:.1f} MB what frozen blocks gave; the rest is Python, "
        "torch, transformers, "
        "the texts and one step.",
        f"- An adapter is {vector / 1e3:.0f} kB. Between rounds base, server state (models and momentum) "
        "and one worker's "
        f"adapter and gradient are {held / mega:.2f} MB; base + 2 × adapter × (d + workers) is {bound / mega:.2f} MB.",
        f"- Within a round the replies of all 20 clients are there at once, as a list and stacked "
        f"({40 * vector / mega:.1f} MB), and in the first three rounds their sums "
        f"({20 * vector / mega:.1f} MB): beyond that "
        "bound. Clients' own output layers are not counted.",
    ]


def _clients(lines: list[Line]) -> list[str]:
    ways = list(lines[0]["accuracy"])
    rows = []
    for kind in ("known task", "new task"):
        for task in sorted({line["task"] for line in lines if line["kind"] == kind}):
            own = [line for line in lines if line["kind"] == kind and line["task"] == task]
            cells = [_mean([line["accuracy"][way] for line in own]) for way in ways]
            seconds = f"{statistics.median(line['seconds'] for line in own):.0f}"
            rows.append([f"{kind}: {task}", str(len(own)), *cells, seconds])
    return [
        "",
        "## New clients from 20 texts",
        "",
        "A federation of four of the tasks, then a client of one of them, and one of the task left out, "
        "whose labels are "
        "new. Accuracy (%) on 400 further texts.",
        *_table(["client", "runs", *ways, "seconds"], rows),
    ]


def _language_model(found: dict[str, Any]) -> list[str]:
    rows = []
    for line in found["lines"]:
        runs, states = line["runs"], [run["state"] for run in line["runs"]]
        rows.append(
            [
                line["method"],
                str(line["lr"]),
                _mean([run["loss"] for run in runs], 3, 1),
                _mean([run["accuracy"] for run in runs]),
                _each([state.get("num_models") for state in states]),
                _each([state["gate"] for state in states if state.get("gate") is not None], ".2f") or "–",
            ]
        )
    rows.append(
        ["no adapter", "–", _mean([run["untrained"] for run in found["lines"][0]["runs"]], 3, 1), "–", "–", "–"]
    )
    samples = [
        f"- *{sample['task']}*: {sample['prompt']} **{sample['completion'].strip()}** "
        f"(in the document: {sample['wanted'].strip()[:80]})"
        for sample in (found.get("samples") or [])[:4]
    ]
    return [
        "",
        "## A language model",
        "",
        "A GPT-2 of four blocks of width 128, pretrained on film reviews, adapted to the 15 genres of the Brown corpus "
        "by 30 clients, two of each: LoRA of rank 8, passages cut at 140 characters, prompts of 6 words, loss on the "
        f"completion, {found['rounds']} rounds (`python benchmarks/lora_lm.py OUT`). Nats per token on test texts, "
        f"less is better; the round by validation loss. {_rates(found)}",
        *_table(["method", "rate", "nats per token", "right tokens (%)", "models", "evidence"], rows),
        "",
        *samples,
    ]


def _rates(found: dict[str, Any]) -> str:
    tried = max(len(line["tried"]) for line in found["lines"])
    if tried > 1:
        return f"A method's rate is the best of {tried} by another seed's validation loss."
    return "One rate for all methods, not tuned: look at it as a check that the path works."


def main() -> None:
    folder = Path(sys.argv[1])
    (folder / "measured.md").write_text(page(folder), encoding="utf-8")


if __name__ == "__main__":
    main()
