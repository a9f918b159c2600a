"""Time and memory of FedMerge's server step: merging, merging weights and models, next to the authors' loop and GEMM.

    git clone https://github.com/shutong043/FedMerge authors
    OMP_NUM_THREADS=1 python benchmarks/speed/server_step.py authors

One thread; seconds of the processor. Our step is ``send`` to all clients and ``deliver`` of all replies, with the
default defences: what a server does in a round where everybody takes part. Of the authors' code its own functions are
called, without its networks and data: ``weighted_average_state_dict`` for every client's model, ``Server.update_W``
and ``Server.update_Theta``, on state dicts with the tensors of a network whose last layer holds `HEAD` of the numbers.
Their networks' extra copies (``load_state_dict``, ``deepcopy``) are left out, to their advantage. GEMM is
``torch.mm`` of the three products that no server can do without, in the types that ours computes in: merging in
float32, replies against models and the models' steps in float64, on slabs of `SLAB` numbers.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import io
import json
import math
import signal
import sys
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedmerge.algorithms.fedmerge import FedMerge
from fedmerge.bench.figures import picture
from fedmerge.core.defences import Defences, guarded
from fedmerge.core.protocol import Algorithm, Federation, Update, deliver
from fedmerge.report.markup import Markup, join
from fedmerge.report.svg import Scale, legend, line, marker, path, text

Size = tuple[int, int, int]
"""N clients, d models, P parameters."""
COMPARED: tuple[Size, ...] = ((50, 5, 100_000), (1000, 15, 1_000_000), (10_000, 15, 100_000))
GROWTH: dict[str, tuple[Size, ...]] = {
    "N": tuple((N, 5, 10_000) for N in (10, 100, 1000, 10_000, 100_000)),
    "d": tuple((100, d, 100_000) for d in (1, 2, 5, 10, 20, 50)),
    "P": tuple((10, 5, P) for P in (10_000, 100_000, 1_000_000, 10_000_000, 100_000_000)),
}
HEAD = 0.065
TENSORS = 20
SLAB = 1 << 25
AT_MOST = 20.0
"""Seconds of one repeat up to which all repeats are made; two above."""
PATIENCE = 120
"""Seconds after which the authors' step is given up."""
Step = Callable[[], Any]


class OutOfTimeError(Exception):
    """The authors' step took longer than `PATIENCE`."""


# ---------------------------------------------------------------- what is measured


def problem(size: Size) -> tuple[Tensor, Tensor]:
    """Replies [N, P] of about the length of a local training, and numbers of examples [N]."""
    N, _, P = size
    source = torch.Generator().manual_seed(1)
    replies = torch.randn(N, P, generator=source).mul_(0.01)
    return replies, torch.randint(10, 100, (N,), generator=source)


def first_state(method: Algorithm[Any], size: Size) -> Any:
    """Models that differ; rows all alike."""
    N, _, P = size
    facts = Federation(N, P, (P - round(HEAD * P), P), ((0, P),))
    return method.init(lambda j: torch.randn(P, generator=torch.Generator().manual_seed(9 * j)), facts, 0)


def our_step(size: Size, replies: Tensor, examples: Tensor, rule: str | None = None) -> Step:
    """A round of the server; `rule` is another than the default."""
    N, d, _ = size
    bare: Any = FedMerge(num_models=d, initial="noise") if rule is None else FedMerge(num_models=d, rule=rule)  # type: ignore[arg-type]
    method, everyone = guarded(bare, Defences()), torch.arange(N)
    state = first_state(method, size)

    def step() -> None:
        method.send(state, everyone)
        deliver(method, state, everyone, Update(replies), examples)

    return step


def gemm_seconds(size: Size) -> float:
    """Of the three products."""
    N, d, P = size
    columns = min(P, max(1, SLAB // N))
    wide, models = torch.randn(N, columns, dtype=torch.float64), torch.randn(d, columns, dtype=torch.float64)
    weights, single = torch.rand(N, d, dtype=torch.float64), models.float()
    began = time.process_time()
    torch.mm(weights.float(), single)
    torch.mm(wide, models.T)
    torch.mm(weights.T, wide)
    return (time.process_time() - began) * P / columns


def machine() -> dict[str, float]:
    """GB/s of reading and of writing to fresh memory, GFLOP/s of products of 1024 x 1024."""

    def best(work: Step) -> float:
        return min(_seconds(work) for _ in range(5))

    numbers = torch.randn(1 << 26)
    rates = {"read": numbers.nbytes / best(numbers.sum) / 1e9, "write": numbers.nbytes / best(numbers.clone) / 1e9}
    for name, dtype in (("float32", torch.float32), ("float64", torch.float64)):
        square = torch.randn(1024, 1024, dtype=dtype)
        rates[name] = 2 * 1024**3 / best(lambda square=square: square @ square) / 1e9  # type: ignore[misc]
    return rates


def traffic_seconds(size: Size, rates: Mapping[str, float]) -> float:
    """Of reading all replies twice (for the weights and then for the models) and writing what clients receive."""
    N, _, P = size
    return 4 * N * P * (2 / rates["read"] + 1 / rates["write"]) / 1e9


def _seconds(work: Step) -> float:
    """Of the processor: other work on the machine disturbs them less than those of the clock."""
    began = time.process_time()
    work()
    return time.process_time() - began


# ---------------------------------------------------------------- the authors' code


def authors_functions(folder: Path) -> tuple[Any, Any]:
    """Their `Server` class and their functions on state dicts; what they import of data and scores is left empty."""
    for name, members in (("loaddata", ("generate_dataloader", "load_model")), ("metric", ("server_meters",))):
        empty = types.ModuleType(name)
        for member in members:
            setattr(empty, member, None)
        sys.modules[name] = empty
    clusters = types.ModuleType("sklearn.cluster")
    clusters.KMeans = None  # type: ignore[attr-defined]
    sys.modules.setdefault("sklearn", types.ModuleType("sklearn"))
    sys.modules.setdefault("sklearn.cluster", clusters)
    sys.path.insert(0, str(folder))
    import merging_utils  # type: ignore[import-not-found]  # noqa: PLC0415
    import server_merging  # type: ignore[import-not-found]  # noqa: PLC0415

    return server_merging.Server, merging_utils


def state_dict(vector: Tensor) -> dict[str, Tensor]:
    """A vector as the tensors of a network."""
    head = round(HEAD * len(vector))
    body = vector[: len(vector) - head].tensor_split(TENSORS - 1)
    return {f"layer{k}.weight": part for k, part in enumerate(body)} | {"linear.weight": vector[len(vector) - head :]}


def authors_step(folder: Path, size: Size, replies: Tensor, examples: Tensor) -> Step:
    """A round of their server."""
    server_class, utils = authors_functions(folder)
    N, d, P = size
    server = server_class.__new__(server_class)
    server.num_client, server.num_shared, server.learning_rate_W = N, d, 0.01
    server.num_per_client = (examples / examples.sum()).tolist()
    gradients = [state_dict(reply) for reply in replies]
    draws = [torch.randn(P, generator=torch.Generator().manual_seed(9 * j)) for j in range(d)]

    def step() -> None:
        server.Theta, server.W = [state_dict(draw) for draw in draws], np.zeros((N, d))
        with contextlib.redirect_stdout(io.StringIO()):
            merged = [utils.weighted_average_state_dict(server.Theta, utils.row_softmax(row)) for row in server.W]
            server.update_W(gradients, merged)
            server.update_Theta(gradients)

    return step


def within(seconds: int, work: Step) -> float:
    """Seconds that it took; infinity if it was given up."""

    def give_up(*_: object) -> None:
        raise OutOfTimeError

    before = signal.signal(signal.SIGPROF, give_up)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        return _seconds(work)
    except OutOfTimeError:
        return math.inf
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


# ---------------------------------------------------------------- comparison


def compare(size: Size, folder: Path, repeats: int) -> dict[str, list[float]]:
    """Seconds of every repeat, all ways in turn."""
    replies, examples = problem(size)
    ways: dict[str, Callable[[], float]] = {
        "ours": partial(_seconds, our_step(size, replies, examples)),
        "official": partial(_seconds, our_step(size, replies, examples, "official")),
        "gemm": partial(gemm_seconds, size),
        "authors": partial(within, PATIENCE, authors_step(folder, size, replies, examples)),
    }
    ways["ours"]()  # pages and libraries
    found: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats):
        for name, way in ways.items():
            first = found[name][0] if repeat else 0.0
            if first <= AT_MOST or (repeat < 2 and math.isfinite(first)):
                found[name].append(way())
                print(size, name, f"{found[name][-1]:.3f}", file=sys.stderr, flush=True)
    return found


# ---------------------------------------------------------------- growth


def needed(size: Size) -> float:
    """Bytes at the highest point: replies, models and velocity before and after, steps in float64."""
    N, d, P = size
    return P * (4 * N + max(4 * N, 8 * (d + 1)) + 16 * d) + 200 * N


def available() -> float:
    """Bytes that the system would give."""
    return 1024 * float(_field("/proc/meminfo", "MemAvailable"))


def _field(file: str, name: str) -> int:
    return int(next(row for row in Path(file).read_text().splitlines() if row.startswith(name)).split()[1])


def grown(size: Size, repeats: int) -> dict[str, float] | None:
    """Seconds of a step (median), and bytes at its highest above replies and state; None if it does not fit."""
    if needed(size) > 0.7 * available():
        return None
    replies, examples = problem(size)
    step = our_step(size, replies, examples)
    step()
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the highest resident size begins anew
    before = _field("/proc/self/status", "VmRSS")
    times = [_seconds(step)]
    peak = 1024 * (_field("/proc/self/status", "VmHWM") - before)
    times += [_seconds(step) for _ in range(repeats - 1 if times[0] <= AT_MOST else 1)]
    print(size, f"{median(times):.4f} s {peak / 1e6:.1f} MB", file=sys.stderr, flush=True)
    return {"seconds": median(times), "bytes": float(max(peak, 4096))}


def slope(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Of the logarithms, by least squares."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


# ---------------------------------------------------------------- the page


Grown = dict[str, list[tuple[Size, dict[str, float] | None]]]
Found = dict[Size, dict[str, list[float]]]
LEFT, TALL, WIDE, GAP = 56.0, 140.0, 190.0, 36.0


def figure(found: Grown) -> Markup:
    """Time above, memory below; a column for what grows."""
    key, top = legend([("time (s)", 0), ("memory (MB)", 1)], 10)
    parts = [key]
    for row, (what, unit) in enumerate((("seconds", 1.0), ("bytes", 1e6))):
        known = [rest[what] / unit for points in found.values() for _, rest in points if rest]
        upper = top + 22 + row * (TALL + 52)
        y = Scale(10 ** math.floor(math.log10(min(known))), 10 ** math.ceil(math.log10(max(known))), 0, 0, log=True)
        y = Scale(y.low, y.high, upper + TALL, upper, log=True)
        for column, (axis, points) in enumerate(found.items()):
            at = LEFT + column * (WIDE + GAP)
            parts.append(_panel(axis, [(size, rest[what] / unit) for size, rest in points if rest], at, y, row))
    return picture(top + 22 + 2 * (TALL + 52), "Time and memory of the server step as N, d and P grow", *parts)


def _panel(axis: str, points: Sequence[tuple[Size, float]], at: float, y: Scale, row: int) -> Markup:
    place = "NdP".index(axis)
    sizes = [float(size[place]) for size, _ in points]
    x = Scale(min(sizes), max(sizes), at + 6, at + WIDE - 6, log=True)
    parts = [line(at, y(tick), at + WIDE, y(tick), "grid") for tick in y.ticks()]
    if at == LEFT:
        parts += [text(at - 6, y(tick) + 4.5, f"{tick:g}", anchor="end", class_="tick") for tick in y.ticks()[::2]]
    ends = (sizes[0], sizes[-1])
    parts += [
        text(x(end), y.start + 18, f"{end:.0e}".replace("e+0", "e") if end >= 1000 else f"{end:g}", anchor="middle")
        for end in ends
    ]
    parts.append(text((x.start + x.end) / 2, y.start + 18, axis, anchor="middle", class_="axis"))
    parts.append(path([(x(size), y(value)) for size, (_, value) in zip(sizes, points, strict=True)], f"line c{row}"))
    parts += [
        marker(x(size), y(value), row, 4, f"{axis} = {size:g}: {value:.3g}")
        for size, (_, value) in zip(sizes, points, strict=True)
    ]
    return join(*parts)


def comparison_rows(found: Mapping[Size, Mapping[str, list[float]]], rates: Mapping[str, float]) -> Iterator[str]:
    """A line per size."""
    for size, ways in found.items():
        ours, official, gemm, theirs = (median(ways[name]) for name in ("ours", "official", "gemm", "authors"))
        limit = max(gemm, traffic_seconds(size, rates))
        told = f"> {PATIENCE}" if math.isinf(theirs) else f"{theirs:.3g}"
        more = "> " if math.isinf(theirs) else ""
        factor = (PATIENCE if math.isinf(theirs) else theirs) / ours
        yield (
            f"| {size[0]:,}, {size[1]}, {size[2]:,} | {ours:.3g} | {official:.3g} | {told} | {more}{factor:.1f} × | "
            f"{gemm:.3g} | {ours / gemm:.2f} × | {traffic_seconds(size, rates):.3g} | {ours / limit:.2f} × |"
        )


def limits(found: Found) -> Iterator[str]:
    """What the products alone leave possible, and how the goals stand."""
    known = [{name: median(values) for name, values in ways.items()} for ways in found.values()]
    finished = [ways for ways in known if math.isfinite(ways["authors"])]
    bounds = [ways["authors"] / ways["gemm"] for ways in finished]
    if bounds:
        yield f"The products alone are {min(bounds):.1f} to {max(bounds):.1f} × as fast as the authors' loop where it"
        yield "ends in time: a step that is made of them is hardly faster than that."
    fast = sum(ways["authors"] >= 10 * ways["ours"] for ways in known if ways["ours"] * 10 <= PATIENCE)
    near = sum(ways["ours"] <= 1.5 * ways["gemm"] for ways in known)
    yield f"Goals: 10 × the authors' speed at {fast} of {len(known)} sizes, within 1.5 × of GEMM at {near}."


def growth_rows(found: Grown) -> Iterator[str]:
    """A line per size, then the slopes."""
    for axis, points in found.items():
        for (N, d, P), rest in points:
            cells = f"{rest['seconds']:.3g} | {rest['bytes'] / 1e6:.3g}" if rest else "does not fit | "
            yield f"| {axis} | {N:,}, {d}, {P:,} | {cells} |"


def slope_rows(found: Grown) -> Iterator[str]:
    """Over all sizes, and over the largest three."""
    for axis, points in found.items():
        known = [(float(size["NdP".index(axis)]), rest) for size, rest in points if rest]
        cells = [
            f"{slope([size for size, _ in part], [rest[what] for _, rest in part]):.2f}"
            for what in ("seconds", "bytes")
            for part in (known, known[-3:])
        ]
        yield f"| {axis} | {' | '.join(cells)} |"


def page(found: Found, growth: Grown, rates: Mapping[str, float], repeats: int, seconds: float) -> str:
    """The whole page."""
    parts = [
        f"`OMP_NUM_THREADS=1 python benchmarks/speed/server_step.py authors --repeats {repeats}`",
        "",
        "# The server step",
        "",
        "Merging, merging weights and models of one round in which every client replies; float32 vectors, sums in",
        f"float64, default defences; one thread, all ways in turn, medians of {repeats} repeats (fewer where one",
        f"takes more than {AT_MOST:.0f} s). Took {seconds:.0f} s beside other work on two cores.",
        "",
        f"This machine reads {rates['read']:.1f} GB/s, writes {rates['write']:.1f} GB/s to fresh memory, and",
        f"multiplies square matrices at {rates['float32']:.0f} (float32) and {rates['float64']:.0f} (float64) GFLOP/s.",
        "",
        "Seconds of the processor. *Authors*: the functions of their published code on vectors cut into 20 tensors,",
        "their W step on the last of them (6.5 % of the numbers), as they do it; ours on all. *Official*: our",
        "`rule=official`, which is their procedure. *GEMM*: `torch.mm` of the three products in our types. *Traffic*:",
        "reading the replies twice and writing what clients receive, at the rates above; with few models the step is",
        "bound by it.",
        "",
        "| N, d, P | ours | official | authors | authors / ours | GEMM | ours / GEMM | traffic | ours / larger limit |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
        *comparison_rows(found, rates),
        "",
        *limits(found),
        "",
        "## Growth",
        "",
        "![Time and memory of the server step](server_step.svg)",
        "",
        "Memory is the highest resident size within a step above replies and state, what clients receive included.",
        "",
        "| grows | N, d, P | s | MB |",
        "|---|---|---:|---:|",
        *growth_rows(growth),
        "",
        "Exponents of a power law, by least squares on the logarithms:",
        "",
        "| grows | time, all | time, largest three | memory, all | memory, largest three |",
        "|---|---:|---:|---:|---:|",
        *slope_rows(growth),
    ]
    return "\n".join(parts) + "\n"


def raw(found: Found, growth: Grown, rates: Mapping[str, float]) -> dict[str, Any]:
    """All numbers as plain data; infinity is null."""
    return {
        "machine": rates,
        "compared": [
            {
                "size": size,
                "seconds": {
                    name: [value if math.isfinite(value) else None for value in values] for name, values in ways.items()
                },
            }
            for size, ways in found.items()
        ],
        "growth": [
            {"grows": axis, "size": size, **(rest or {"fits": False})}
            for axis, points in growth.items()
            for size, rest in points
        ],
    }


def write(folder: Path, numbers: Mapping[str, Any], drawing: Markup, words: str) -> None:
    """Numbers, figure and page, anew after every size."""
    (folder / "server_step.json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    (folder / "server_step.svg").write_text(str(drawing), encoding="utf-8")
    (folder / "server_step.md").write_text(words, encoding="utf-8")


def main() -> int:
    """Measures and writes the page, its figure and the raw numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("authors", type=Path, help="a clone of the authors' code")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/speed"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.out.mkdir(parents=True, exist_ok=True)
    began, rates = time.perf_counter(), machine()
    growth: Grown = {axis: [(size, grown(size, given.repeats)) for size in sizes] for axis, sizes in GROWTH.items()}
    found: Found = {}
    for size in COMPARED:
        found[size] = compare(size, given.authors, given.repeats)
        took = time.perf_counter() - began
        write(given.out, raw(found, growth, rates), figure(growth), page(found, growth, rates, given.repeats, took))
    return 0


if __name__ == "__main__":
    sys.exit(main())
