r"""Seconds of a round of this package against other simulators and a plain loop, on one core, interleaved.

Run from the repository's root on an otherwise idle machine; every rival needs a Python of its own choice that has
torch of one version, what this package needs (networks and data are its own, from this tree) and the rival::

    python -m venv flower && flower/bin/pip install torch==2.13.0 "flwr[simulation]==1.42.0" -e .
    python -m venv pfl && pfl/bin/pip install torch==2.13.0 pfl==0.6.0 -e .
    python3.14 -m venv blazefl && blazefl/bin/pip install torch==2.13.0 "blazefl[contrib,reproducibility]==3.0.0" -e .
    python -m venv code && code/bin/pip install torch==2.13.0 h5py matplotlib -e .  # the two checkouts run in this one

    python benchmarks/speed/rivals.py --workload logistic mlp cnn resnet9 resnet9-paper lora --repeats 5 \
        --pythons flower=flower/bin/python pfl=pfl/bin/python blazefl=blazefl/bin/python \
                  authors=code/bin/python pfllib=code/bin/python \
        --checkouts authors=FedMerge pfllib=PFLlib

A contestant is a process of its own that is told to play a round (`peers/`); they take turns, one round each. All are
held on one core (Flower with all of Ray's processes), one thread each; those that wait are on the other cores. The
first round is not timed: in it the steps are counted and must be those of the plan. Processor seconds are those of a
contestant's whole process tree. Writes ``rivals-WORKLOAD.json`` and the page ``rivals.md`` to
``benchmarks/results/speed``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_type_hints

import rivals_page
import torch
from rivals_layout import fastest, layers_by_layout
from rivals_tree import cpu_seconds, descendants, hold
from torch import nn
from workloads import WORKLOADS, Workload, flops_per_step, num_parameters, workload_of

from fedmerge import __version__
from fedmerge.experiment.config import RunOptions

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results" / "speed"
SCRIPTS = {
    "fedmerge": "ours.py",
    "naive": "naive.py",
    "authors": "authors_code.py",
    "pfllib": "pfllib_fedavg.py",
    "flower": "flower.py",
    "pfl": "apple_pfl.py",
    "blazefl": "blaze.py",
}
VARIANTS = {
    "logistic": ("reused", "loader"),
    "mlp": ("reused", "loader"),
    "cnn": ("reused", "loader", "channels_last", "channels_last+reused"),
    "resnet9": ("channels_last", "channels_last+reused"),
    "resnet9-paper": ("channels_last",),
    "lora": ("reused",),
}
"""Of the plain loop: what may make a difference on a workload."""
FEWER = {("logistic", "flower"): 100, ("mlp", "flower"): 100, ("logistic", "authors"): 100, ("mlp", "authors"): 100}
"""Clients of a round where a contestant is too slow for all of the workload's: its time per client-step is compared."""


@dataclass
class Contestant:
    """A process that plays rounds, and what was measured of it.

    Attributes:
        name: For example ``fedmerge:sequential``.
        workload: What it plays.
        process: Its driver.
        log: Where the driver's error stream goes.
        greeting: What the driver said of itself.
        steps: In one round.
        rounds: Each timed round: seconds and processor seconds.
        evaluated: The same of rounds with evaluation.
        check: What the first round counted.
        parts: Processor seconds of a profiled round.
    """

    name: str
    workload: Workload
    process: subprocess.Popen[str]
    log: Path
    greeting: dict[str, Any] = field(default_factory=dict)
    rounds: list[dict[str, float]] = field(default_factory=list)
    evaluated: list[dict[str, float]] = field(default_factory=list)
    check: dict[str, Any] = field(default_factory=dict)
    parts: dict[str, float] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """Client-steps of one round."""
        return self.workload.steps * self.workload.played

    def told(self, word: str, core: int) -> dict[str, Any]:
        """Says a word and waits for the answer, on the core that is measured on."""
        hold(self.process.pid, {core})
        before = cpu_seconds(self.process.pid)
        assert self.process.stdin is not None
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()
        answer = self.heard()
        alone = len(descendants(self.process.pid)) == 1
        answer["cpu"] = answer["own_cpu_seconds"] if alone else cpu_seconds(self.process.pid) - before
        hold(self.process.pid, waiting_cores(core))
        return answer

    def heard(self) -> dict[str, Any]:
        """The next answer.

        Raises:
            RuntimeError: if the driver has ended.
        """
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"its driver ended: {last_line(self.log)}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def end(self) -> None:
        """Ends the driver."""
        if self.process.poll() is None and self.process.stdin is not None:
            self.process.stdin.write("end\n")
            self.process.stdin.close()
        self.process.wait(timeout=60)


def waiting_cores(core: int) -> set[int]:
    """Where contestants are while others play."""
    return ALL_CORES - {core} or ALL_CORES


ALL_CORES = os.sched_getaffinity(0)


def known_contestants(workload: Workload, pythons: dict[str, str], checkouts: dict[str, str]) -> list[str]:
    """Every contestant that can take part: all runtimes of this package, the plain loop, rivals with a Python.

    ``naive@RIVAL`` is the plain loop under a rival's Python.
    """
    runtimes = get_args(get_type_hints(RunOptions)["runtime"])
    found = [f"fedmerge:{runtime}" for runtime in runtimes]
    found += ["naive", *(f"naive:{variant}" for variant in VARIANTS[workload.name])]
    if workload.model == "lora":
        return [name for name in found if name != "fedmerge:vectorised"]  # a slow loop under vmap
    rivals = [name for name in SCRIPTS if name in pythons and (name not in ("authors", "pfllib") or name in checkouts)]
    if "blazefl" in rivals:
        rivals.append("naive@blazefl")  # it may need another Python than the others, which has a speed of its own
    if workload.name == "resnet9-paper":
        rivals = [name for name in rivals if name == "authors"]
    if "authors" in rivals:
        found += [f"fedmerge:{runtime}+authors" for runtime in runtimes if runtime not in ("auto", "vectorised")]
    return found + rivals


def started(name: str, workload: Workload, asked: argparse.Namespace, log: Path) -> Contestant:
    """A contestant's process, ready to play."""
    kind, _, variant = name.partition(":")
    kind, _, host = kind.partition("@")
    played = min(workload.played, FEWER.get((workload.name, kind), workload.played))
    if asked.clients:
        played = min(played, asked.clients)
    python = asked.pythons.get(host or kind, sys.executable)
    command = [python, str(HERE / "peers" / SCRIPTS[kind]), "--workload", workload.name, "--clients", str(played)]
    command += ["--variant", variant, "--checkout", asked.checkouts.get(kind, "")]
    threads = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "MKL", "OPENBLAS")}
    paths = {"PYTHONPATH": os.pathsep.join(map(str, (HERE, HERE / "peers", HERE.parents[1] / "src")))}
    with log.open("a") as errors:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**os.environ, **threads, **paths},
        )
    hold(process.pid, {asked.core})
    contestant = Contestant(name, workload_of(workload.name, played), process, log)
    contestant.greeting = contestant.heard()
    contestant.check = contestant.told("count", asked.core)
    if contestant.check["steps"] not in (contestant.steps, None):
        told(f"{name}: {contestant.check['steps']} steps counted, {contestant.steps} planned")
    return contestant


def started_or_reason(name: str, workload: Workload, asked: argparse.Namespace, log: Path) -> Contestant | str:
    """A contestant, or why it cannot take part."""
    try:
        contestant = started(name, workload, asked, log)
    except (RuntimeError, OSError) as error:
        told(f"{workload.name}: {name} cannot take part: {error}")
        return str(error)
    told(f"{workload.name}: {name} ready, {contestant.check}")
    return contestant


def told(text: str) -> None:
    """Says what goes on."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def measured(workload: Workload, asked: argparse.Namespace) -> dict[str, Any]:
    """All contestants on one workload."""
    began, load = time.time(), os.getloadavg()
    names = asked.rivals or known_contestants(workload, asked.pythons, asked.checkouts)
    tried = {name: started_or_reason(name, workload, asked, asked.log) for name in names}
    contestants = [found for found in tried.values() if isinstance(found, Contestant)]
    absent = {name: found for name, found in tried.items() if isinstance(found, str)}
    limits = [machine_limits(asked.core)]
    try:
        play_all(contestants, asked)
    finally:
        for contestant in contestants:
            contestant.end()
    limits.append(machine_limits(asked.core))
    with only_on(asked.core):
        layers = layers_by_layout(workload) if len(workload.shape) == 3 else {}
    trainable, parameters = num_parameters(workload)
    return {
        "workload": {
            **{key: value for key, value in vars(workload).items() if key != "dtype"},
            "steps": workload.steps,
            "trainable": trainable,
            "parameters": parameters,
            "flops_per_step": flops_per_step(workload),
        },
        "machine": {"cpu": cpu_name(), "cores": len(ALL_CORES), "limits": limits},
        "layers": layers,
        "load": {"before": load, "after": os.getloadavg()},
        "seconds": time.time() - began,
        "versions": {"fedmerge": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "commit": commit(),
        "command": shlex.join(["python", "benchmarks/speed/rivals.py", *asked.told]),
        "repeats": asked.repeats,
        "preliminary": asked.preliminary,
        "absent": absent,
        "contestants": [summary(contestant) for contestant in contestants],
    }


def play_all(contestants: list[Contestant], asked: argparse.Namespace) -> None:
    """Timed rounds in turns, each repeat beginning with another contestant; evaluated and profiled rounds at the end.

    Args:
        contestants: Their measurements are added to.
        asked: The command line.
    """
    for repeat in range(asked.repeats):
        first = repeat % max(1, len(contestants))
        for contestant in contestants[first:] + contestants[:first]:
            contestant.rounds.append(contestant.told("round", asked.core))
    for contestant in contestants:
        for _ in range(min(asked.evaluations, asked.repeats) if contestant.greeting["evaluates"] else 0):
            contestant.evaluated.append(contestant.told("evaluated", asked.core))
        profiled = contestant.told("profile", asked.core)
        parts = profiled["parts"]
        contestant.parts = {**parts, "rest": profiled["cpu"] - sum(parts.values())}


def summary(contestant: Contestant) -> dict[str, Any]:
    """Milliseconds per client-step and the rest that was measured."""
    scale = 1000 / contestant.steps
    return {
        "name": contestant.name,
        "clients": contestant.workload.played,
        "steps": contestant.steps,
        "versions": contestant.greeting["versions"],
        "engine": contestant.greeting.get("engine"),
        "check": contestant.check,
        "wall": [scale * r["seconds"] for r in contestant.rounds],
        "cpu": [scale * r["cpu"] for r in contestant.rounds],
        "evaluated_wall": [scale * r["seconds"] for r in contestant.evaluated],
        "evaluated_cpu": [scale * r["cpu"] for r in contestant.evaluated],
        "parts": {name: scale * seconds for name, seconds in contestant.parts.items()},
    }


def machine_limits(core: int) -> dict[str, float]:
    """What one core reaches now: GFLOP/s of float32 products of 1024 x 1024 in two ways of torch, GB/s of a copy."""
    torch.set_num_threads(1)
    a, b = torch.ones(1024, 1024), torch.ones(1024, 1024)
    pixels, layer = torch.ones(1, 1024, 32, 32), nn.Conv2d(1024, 1024, 1, bias=False)
    source, target = torch.ones(1 << 26), torch.empty(1 << 26)
    with torch.no_grad(), only_on(core):
        return {
            "gflops_matrix_product": 2 * 1024**3 / fastest(lambda: torch.mm(a, b)) / 1e9,
            "gflops_convolution_1x1": 2 * 1024**3 / fastest(lambda: layer(pixels)) / 1e9,
            "gbytes_copied": 2 * source.nbytes / fastest(lambda: target.copy_(source), times=5) / 1e9,
        }


@contextmanager
def only_on(core: int) -> Iterator[None]:
    """Within the block this process is held on one core."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def last_line(path: Path) -> str:
    """The last line of a file that says something."""
    lines = [line.strip() for line in path.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:200] if lines else "it said nothing"


def commit() -> str:
    """Of the tree that is measured, marked if it was changed; empty where Git does not know it."""
    asked = ["git", "-C", str(HERE), "describe", "--always", "--dirty"]
    return subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()


def cpu_name() -> str:
    """As the kernel calls it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def pairs(words: list[str]) -> dict[str, str]:
    """``name=path`` words; paths are made absolute without following links, which would leave a virtual environment."""
    found = (word.partition("=") for word in words)
    return {name: str(Path.cwd() / path) for name, _, path in found}


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", nargs="*", default=list(WORKLOADS), choices=list(WORKLOADS))
    parser.add_argument("--rivals", nargs="*", help="contestants; by default all that can take part")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--evaluations", type=int, default=1, help="rounds with evaluation at most")
    parser.add_argument("--clients", type=int, help="clients of a round at most")
    parser.add_argument("--core", type=int, default=max(ALL_CORES))
    parser.add_argument("--pythons", nargs="*", default=[], metavar="NAME=PATH")
    parser.add_argument("--checkouts", nargs="*", default=[], metavar="NAME=PATH")
    parser.add_argument("--preliminary", default="", help="why the numbers are not final; said on the page")
    parser.add_argument("--log", type=Path, default=Path(tempfile.gettempdir()) / "rivals.log", help="of the drivers")
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args()
    asked.told = spoken(asked)
    asked.pythons, asked.checkouts = pairs(asked.pythons), pairs(asked.checkouts)
    asked.out.mkdir(parents=True, exist_ok=True)
    for name in asked.workload:
        found = measured(WORKLOADS[name], asked)
        (asked.out / f"rivals-{name}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        told(f"{name}: {found['seconds']:.0f} s")
        for row in found["contestants"]:
            told(
                f"  {row['name']}: {statistics.median(row['wall']):.3f} ms, cpu {statistics.median(row['cpu']):.3f} ms"
            )
    (asked.out / "rivals.md").write_text(rivals_page.page(asked.out), encoding="utf-8")


def spoken(asked: argparse.Namespace) -> list[str]:
    """The command line as it can be shown: without the paths of one machine."""
    words = ["--workload", *asked.workload, "--repeats", str(asked.repeats)]
    words += ["--rivals", *asked.rivals] if asked.rivals else []
    words += ["--clients", str(asked.clients)] if asked.clients else []
    for option, given in (("--pythons", asked.pythons), ("--checkouts", asked.checkouts)):
        words += [option, *(f"{word.partition('=')[0]}=..." for word in given)] if given else []
    return words


if __name__ == "__main__":
    main()
