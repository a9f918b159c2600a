"""What the benchmark `lora` does not measure: recovery of the tasks, merging spaces, memory, seconds, new clients.

Five text tasks, four clients each, MiniLM-L6 with LoRA of rank 8 on its last two blocks, as in `fedmerge bench lora`.

Usage: python benchmarks/lora.py OUT [--seeds 10,11,12] [--lr 0.002] [--rounds 15]
writes OUT/measured.json; `python benchmarks/lora_page.py OUT` makes a page of it.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import adjusted_rand_score

import fedmerge
from fedmerge.data import FederatedData, deal
from fedmerge.data.partitions.task import Task
from fedmerge.data.pool import Pool
from fedmerge.data.sources.text_tasks import TextTasks
from fedmerge.models.hf import Hf
from fedmerge.training import Descent, ModuleTask

MODEL: dict[str, Any] = {"path": "minilm", "layers": 2, "rank": 8, "max_length": 32, "dtype": "bfloat16"}
TRAINING = {"epochs": 1, "batch_size": 16, "optimizer": "adamw"}
TASKS = ("sentiment", "topic", "spam", "supersense", "genre")
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "auto": ({}, {}),
    "product": ({}, {"merging": "product"}),
    "frozen A": ({"train_a": False}, {}),
}
SAMPLES, TESTED = 20, 400
LEFT_OUT = ("spam",)


def clients(tasks: tuple[str, ...], seed: int, recipe: Hf, per_task: int = 4) -> FederatedData:
    """Clients of these tasks."""
    pool = TextTasks(tasks=tasks).load()
    return deal(pool, Task(clients_per_task=per_task).split(pool, seed), recipe.encoder())


def trained(data: FederatedData, recipe: Hf, seed: int, options: argparse.Namespace, **more: Any) -> Any:
    """One run of FedMerge as it comes, output layers kept."""
    return fedmerge.run(
        data,
        model=recipe,
        method="fedmerge",
        keep=["head"],
        seed=seed,
        rounds=more.pop("rounds", options.rounds),
        evaluate_every=5,
        training={**TRAINING, "lr": options.lr},
        **more,
    )


def spaces(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Each merging space on each seed: accuracy, tasks recovered, errors, bytes, seconds."""
    lines = []
    for seed in options.seeds:
        for name, (of_model, of_run) in VARIANTS.items():
            recipe = Hf(**{**MODEL, **of_model})
            began = time.perf_counter()
            run = trained(clients(TASKS, seed, recipe), recipe, seed, options, **of_run)
            record = run.record
            found = {r.round: np.argmax(r.mixing, axis=1) for r in record.evaluated() if r.mixing and r.round}
            lines.append(
                {
                    "space": name,
                    "seed": seed,
                    "accuracy": record.selected().test.mean_accuracy(),
                    "models": record.rounds[-1].state["num_models"],
                    "evidence": record.rounds[-1].state["gate"],
                    "ari": {r: float(adjusted_rand_score(record.groups, labels)) for r, labels in found.items()},
                    "averaging_error": [r.state.get("averaging_error") for r in record.rounds[1:]],
                    "merging_error": [r.state.get("merging_error") for r in record.rounds[1:]],
                    "bytes": record.rounds[1].bytes_down // 20,
                    "per_round": statistics.median(r.seconds for r in record.rounds[1:]),
                    "seconds": time.perf_counter() - began,
                    "full_model_bytes": 4 * sum(p.numel() for p in run.outcome.setup.module.parameters()),
                }
            )
            print(json.dumps(lines[-1])[:300], flush=True)
    return lines


def new_clients(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A federation without one task; then a new client of a known task and one of the task left out, 20 texts each."""
    lines = []
    everything = TextTasks().load()
    for seed in options.seeds:
        for absent in LEFT_OUT:
            recipe = Hf(**MODEL)
            known = tuple(task for task in TASKS if task != absent)
            run = trained(clients(known, seed, recipe), recipe, seed, options)
            for kind, task in (("known task", "topic"), ("new task", absent)):
                line = {"seed": seed, "left_out": absent, "kind": kind, "task": task}
                lines.append({**line, **onboarded(run, everything, task, seed)})
                print(json.dumps(lines[-1])[:300], flush=True)
    return lines


def onboarded(run: Any, pool: Pool, task: str, seed: int) -> dict[str, Any]:
    """Test accuracy on texts that nobody trained on."""
    used = {str(text) for text in _texts_of(run)}
    own = np.flatnonzero(pool.domain == pool.domain_names.index(task))
    free = [row for row in np.random.default_rng(seed).permutation(own) if str(pool.inputs[row]) not in used]
    train, test = free[:SAMPLES], free[SAMPLES : SAMPLES + TESTED]
    names = [pool.class_names[k] for k in pool.targets]
    found: dict[str, Any] = {"accuracy": {}}
    given = [str(pool.inputs[row]) for row in train], [names[row] for row in train]
    made = fedmerge.onboard(run, given)
    classes = list(made.server.record.class_names)
    wanted = np.array([classes.index(names[row]) if names[row] in classes else -1 for row in test])
    with torch.no_grad():
        outputs = made.module()(_tokens(run, [str(pool.inputs[row]) for row in test]))
    found["accuracy"]["onboarded"] = float((outputs.argmax(dim=1).numpy() == wanted).mean())
    found |= {"way": made.way, "row": made.row.tolist(), "seconds": made.seconds}
    found["accuracy"]["frozen base, own output layer"] = _frozen(run, pool, train, test)
    return found


def _texts_of(run: Any) -> list[str]:
    partition = run.outcome.setup.data.partition
    pool = TextTasks(tasks=tuple(dict.fromkeys(run.record.tasks))).load()
    rows = np.concatenate([np.concatenate([c.train, c.validation, c.test]) for c in partition.clients])
    return [str(text) for text in pool.inputs[rows]]


def _tokens(run: Any, texts: list[str]) -> torch.Tensor:
    return torch.from_numpy(run.outcome.model.encoder().encode(texts, None, ()).inputs)


def _frozen(run: Any, pool: Pool, train: list[int], test: list[int]) -> float:
    """Logistic regression on the pretrained model's own means, without any adapter."""
    setup = run.outcome.setup
    start = setup.layout.read(setup.module)  # B = 0
    task = ModuleTask(setup.module, setup.layout, Descent())
    features = [
        task.features(start, _tokens(run, [str(pool.inputs[r]) for r in rows])).double().numpy()
        for rows in (train, test)
    ]
    fit = LogisticRegression(max_iter=300).fit(features[0], pool.targets[train])
    return float(fit.score(features[1], pool.targets[test]))


def memory(options: argparse.Namespace) -> dict[str, Any]:
    """Peak memory of a process that only makes ready, and of one that trains ten rounds, on four tasks."""
    found = {}
    for what in ("ready", "trained"):
        command = [sys.executable, __file__, str(options.out), "--only", what, "--lr", str(options.lr)]
        found[what] = json.loads(
            subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
        )
    return found


def one_process(what: str, options: argparse.Namespace) -> None:
    """Body of the two processes of `memory`: 20 clients, 4 tasks, one round or ten."""
    recipe = Hf(**MODEL)
    data = clients(TASKS[:4], 10, recipe, per_task=5)
    began = time.perf_counter()
    run = trained(data, recipe, 10, options, rounds=10 if what == "trained" else 1)
    setup, state = run.outcome.setup, run.record.rounds[-1].state
    print(
        json.dumps(
            {
                "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
                "seconds": time.perf_counter() - began,
                "models": state["num_models"],
                "server_bytes": 4 * state["server_floats"],
                "vector_bytes": run.record.rounds[1].bytes_down // len(data.clients),
                "base_bytes": sum(
                    p.numel() * p.element_size() for p in setup.module.parameters() if not p.requires_grad
                ),
                "remembered_bytes": setup.module.memory.num_bytes if setup.module.memory else 0,
            }
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=lambda text: [int(word) for word in text.split(",")], default=[10, 11, 12])
    parser.add_argument("--lr", type=float, default=0.002)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--parts", default="memory,spaces,new_clients", help="further parts of OUT/measured.json stay")
    parser.add_argument("--only", choices=("ready", "trained"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.only:
        one_process(options.only, options)
        return
    options.out.mkdir(parents=True, exist_ok=True)
    parts = {"memory": memory, "spaces": spaces, "new_clients": new_clients}
    path = options.out / "measured.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    found |= {"lr": options.lr, "rounds": options.rounds, "seeds": options.seeds}
    for name in options.parts.split(","):
        found[name] = parts[name](options)
        path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
