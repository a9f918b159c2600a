"""What rounds over Flower's processes cost beside the same rounds in one process, by number of sites and size of model.

Run from the repository's root on an otherwise idle machine::

    OMP_NUM_THREADS=1 python benchmarks/deploy/flower_cost.py

All sites, the SuperLink and the ServerApp share this machine, with certificates and node keys on the loopback address:
the seconds of a round with many sites are mostly those of their processes waiting for the same cores, which sites on
machines of their own do not. Settings take turns, and medians over rounds are told.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

import flwr
import numpy as np
import torch
from world import World, made, until

from fedmerge import __version__
from fedmerge.deploy.demo import demo_names
from fedmerge.deploy.federation import FederationConfig
from fedmerge.deploy.processes import Processes
from fedmerge.deploy.rehearsal import rehearse

RESULTS = Path("benchmarks/results/deploy")
BYTES_PER_UNIT = 4 * (64 + 1 + 10)
"""Of the perceptron, in float32: weights from 64 pixels, a bias, weights to 10 classes."""
ENOUGH = 1800.0

READER = '''"""The site's own examples; and the processor time of its process when it reads them, and at its end."""
import atexit
import os
import time
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent


def note(what):
    if HERE.is_dir():  # gone where the rehearsal's process ends
        with (HERE / "times").open("a") as times:
            times.write(f"{os.getpid()} {what} {time.process_time()}\\n")


def examples():
    note("start")
    atexit.register(note, "end")
    with np.load(HERE / "digits.npz") as data:
        return tuple((data[f"x{split}"], data[f"y{split}"]) for split in ("", "_validation", "_test"))
'''


@dataclass(frozen=True)
class Setting:
    """What is measured.

    Attributes:
        sites: Number of sites.
        megabytes: Of a model, as it travels: once to the site and once back.
    """

    sites: int
    megabytes: float

    @property
    def name(self) -> str:
        """For folders and tables."""
        return f"{self.sites} sites, {self.megabytes:g} MB"

    @property
    def hidden(self) -> int:
        """Units of the perceptron."""
        return max(1, round(self.megabytes * 1e6 / BYTES_PER_UNIT))


SETTINGS = (
    *(Setting(3, size) for size in (0.02, 0.5, 5.0, 50.0)),
    *(Setting(number, 0.02) for number in (10, 20)),
)


@dataclass
class Measured:
    """What runs of a setting took.

    Attributes:
        rounds: [R] seconds of each round over Flower.
        here: [R] of the same rounds in one process.
        starts: Processor seconds that client processes had used when they read their examples.
        whole: Those that they had used when they ended.
        megabytes: Most memory of the programs, by name.
        loads: Processes that waited for a processor when a run began.
    """

    rounds: list[float] = field(default_factory=list)
    here: list[float] = field(default_factory=list)
    starts: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    megabytes: dict[str, float] = field(default_factory=dict)
    loads: list[float] = field(default_factory=list)


def built(folder: Path, setting: Setting, rounds: int) -> FederationConfig:
    """A federation of a setting; training is little, so that the rest shows."""
    names = demo_names(setting.sites)
    federation = made(
        folder,
        names=names,
        rounds=rounds,
        evaluate_every=rounds,
        model={"name": "mlp", "hidden": [setting.hidden]},
        training={"batch_size": 20, "epochs": 1, "lr": 0.01},
    )
    for name in names:
        (folder / "sites" / name / "reader.py").write_text(READER, encoding="utf-8")
    return federation


def measure(setting: Setting, rounds: int, room: Path, into: Measured) -> None:
    """One run over Flower, and one in this process."""
    federation = built(room / "federation", setting, rounds)
    into.here += [line.seconds for line in rehearse(federation).record.rounds[1:]]
    for path in federation.folder.rglob("times"):
        path.unlink()
    into.loads.append(os.getloadavg()[0])
    with World(federation, Processes(room / "said", grace=10.0)) as world:
        world.up()
        until(lambda: _watched(world, into), ENOUGH, f"the end of {setting.name}", look=1.0)
        world.finished(1)
        into.rounds += [line.seconds for line in world.record().rounds[1:]]
    for path in federation.folder.rglob("times"):
        lines = [line.split() for line in path.read_text(encoding="utf-8").splitlines()]
        into.starts += [float(seconds) for _, what, seconds in lines if what == "start"][1:-1]
        into.whole += [float(seconds) for _, what, seconds in lines if what == "end"][1:-1]


def _watched(world: World, into: Measured) -> bool:
    """Whether the run is over; notes memory meanwhile."""
    for name in ("flower-superlink", "flwr-serverapp", "flower-supernode", "flwr-clientapp"):
        most = max((_peak(pid) for pid in world.pids(word=name)), default=0.0)
        into.megabytes[name] = max(most, into.megabytes.get(name, 0.0))
    return world.kept.status("up") is not None


def _peak(pid: int) -> float:
    """Megabytes that a process had in memory at most."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError:  # gone
        return 0.0
    return next((float(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("VmHWM")), 0.0)


def fit(settings: Sequence[Setting], measured: dict[str, Measured]) -> tuple[float, float]:
    """Seconds per message and its answer, and seconds per megabyte, by least squares of relative residuals."""
    sizes = np.array([setting.megabytes for setting in settings])
    extra = np.array([_per_message(setting, measured[setting.name]) for setting in settings])
    matrix = np.stack([np.ones_like(sizes), sizes], axis=1) / extra[:, None]
    fixed, slope = np.linalg.lstsq(matrix, np.ones_like(extra), rcond=None)[0]
    return float(fixed), float(slope)


def _per_message(setting: Setting, found: Measured) -> float:
    return (median(found.rounds) - median(found.here)) / setting.sites


def page(measured: dict[str, Measured], asked: argparse.Namespace, repeats: int) -> str:
    """What was found as Markdown."""
    rounds = asked.rounds
    settings = [setting for setting in SETTINGS if setting.name in measured and measured[setting.name].rounds]
    loads = [load for setting in settings for load in measured[setting.name].loads]
    lines = [
        f"`OMP_NUM_THREADS=1 python benchmarks/deploy/flower_cost.py --rounds {rounds} --repeats {repeats} "
        f"--most-sites {asked.most_sites}`",
        "",
        "# What Flower's processes cost",
        "",
        f"FedMerge on digits, perceptrons of one hidden layer, one epoch; fedmerge {__version__}, flwr",
        f"{flwr.__version__}, torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}.",
        f"SuperLink, ServerApp and all sites share {os.cpu_count()} cores of one machine, over TLS with node keys on",
        f"the loopback address. Settings take turns; runs: {repeats} of {rounds} rounds each; medians over rounds,",
        "with the smallest and the largest.",
        f"Load when runs began: {min(loads):.1f} to {max(loads):.1f} (`uptime`); above",
        "about 1, other work was in the way and seconds are too many.",
        "",
        "| sites | MB per model | seconds per round | in one process | seconds per message and answer, beside that |",
        "|--:|--:|--:|--:|--:|",
    ]
    for setting in settings:
        found = measured[setting.name]
        lines.append(
            f"| {setting.sites} | {setting.megabytes:g} | {median(found.rounds):.1f} ({min(found.rounds):.1f} – "
            f"{max(found.rounds):.1f}) | {median(found.here):.3f} | {_per_message(setting, found):.2f} |"
        )
    lines += [
        "",
        "| sites | MB per model | processor seconds of a client process | of these until it reads its examples "
        "| most MB in memory: SuperLink | ServerApp | SuperNode | client process |",
        "|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for setting in settings:
        found = measured[setting.name]
        memory = " | ".join(f"{most:.0f}" for most in found.megabytes.values())
        lines.append(
            f"| {setting.sites} | {setting.megabytes:g} | {median(found.whole):.2f} | {median(found.starts):.2f} "
            f"| {memory} |"
        )
    lines += ["", *_fit_lines([setting for setting in settings if setting.sites == 3], measured)]
    lines += [
        "",
        "A site looks for messages every 3 seconds (Flower's own pace), and every message starts a fresh client",
        "process that loads Python, torch and Flower. On machines of their own sites do this at the same time, so that",
        "a round takes about as long as its slowest site, whatever their number.",
    ]
    return "\n".join(lines) + "\n"


def _fit_lines(settings: Sequence[Setting], measured: dict[str, Measured]) -> list[str]:
    if len(settings) < 3:
        return []
    fixed, slope = fit(settings, measured)
    return [
        f"Three sites, by size: seconds per message and answer ≈ **{fixed:.2f} + {slope:.3f} · MB** (least squares of",
        "relative residuals; MB of the model, which travels once each way).",
    ]


def main() -> None:
    """Measures and writes after every run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--most-sites", type=int, default=20)
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    settings = [setting for setting in SETTINGS if setting.sites <= asked.most_sites]
    measured = {setting.name: Measured() for setting in settings}
    for repeat in range(asked.repeats):
        for setting in settings:
            room = Path(tempfile.mkdtemp(prefix="fedmerge-"))
            try:
                measure(setting, asked.rounds, room, measured[setting.name])
            finally:
                shutil.rmtree(room, ignore_errors=True)
            sys.stderr.write(f"{repeat} {setting.name}: {measured[setting.name].rounds}\n")
            text = json.dumps({name: asdict(found) for name, found in measured.items()}, indent=1)
            (asked.out / "flower_cost.json").write_text(text + "\n", encoding="utf-8")
            (asked.out / "flower_cost.md").write_text(page(measured, asked, repeat + 1), encoding="utf-8")


if __name__ == "__main__":
    main()
