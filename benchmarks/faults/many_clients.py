"""Memory of a server with 100,000 clients, a fifth of them in every round, over 200 rounds.

    python benchmarks/faults/many_clients.py > benchmarks/results/faults/many_clients.md

The server alone: FedMerge with its default defences and d = 5 models that start apart (the search for d holds N·T
numbers and is no part of this). Replies are made up in time for each, pass the gate, and go to files that are mapped
into memory (`runtime/spool.py`); one client of a hundred sends ten times the length, which is cut where it lies. What
is measured is the process's anonymous memory (RssAnon), which the system cannot
drop, above that after a round with 20 clients: between rounds, and the highest seen by a thread that looks every 2 ms.
The allocator gives freed blocks of 128 KiB and more back at once, as with ``MALLOC_MMAP_THRESHOLD_=131072`` in the
environment: otherwise it keeps some 5 MB of holes.
"""

from __future__ import annotations

import ctypes
import gc
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedmerge.algorithms.fedmerge import FedMerge
from fedmerge.core.defences import Defences, guarded
from fedmerge.core.protocol import Algorithm, Federation, Update, deliver
from fedmerge.core.replies import Expected, Reply, fault_of, template_of
from fedmerge.runtime.spool import Cohort, Spool

D, P, SHARE = 5, 2410, 0.2
METHOD: Algorithm[Any] = guarded(FedMerge(num_models=D, initial="noise"), Defences(), in_place=True)


def anonymous() -> int:
    """Bytes of this process that are no file's."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("RssAnon")).split()[1])


class Peak:
    """The highest `anonymous` while it runs."""

    def __init__(self) -> None:
        self.highest, self._going = 0, True
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while self._going:
            self.highest = max(self.highest, anonymous())
            time.sleep(0.002)

    def stop(self) -> int:
        """Ends it and gives the highest."""
        self._going = False
        self._thread.join()
        return self.highest


def beginning(num_clients: int) -> Any:
    """The state before the first round."""
    draws = np.random.default_rng(0).normal(size=(D + 1, P)).astype(np.float32)
    facts = Federation(num_clients, P, (P - 330, P), ((0, P),))
    return METHOD.init(lambda j: torch.from_numpy(draws[j]), facts, 0)


def one_round(state: Any, number: int, num_clients: int, folder: Path) -> Any:
    """One round of the server."""
    rng = np.random.default_rng([1, number])
    order = rng.choice(num_clients, int(SHARE * num_clients), replace=False)
    cohort, template = Cohort(torch.from_numpy(order)), template_of(Update(torch.empty(P)))
    expected = Expected("run", number, cohort, template)
    spool = Spool(folder, template, cohort)
    for client in map(int, order):
        length = 0.1 if client % 100 == 0 else 0.01
        vector = torch.from_numpy(rng.standard_normal(P, dtype=np.float32)) * length
        reply = Reply("run", number, client, 10 + client % 90, {"delta": vector})
        if fault_of(reply, expected) is not None:
            raise AssertionError("the gate refused an honest reply")
        spool.take(reply)
    clients, update, counts = spool.gathered()
    return deliver(METHOD, state, clients, update, counts)


LIBC = ctypes.CDLL("libc.so.6")
M_MMAP_THRESHOLD = -3
"""Of `mallopt`: blocks of this many bytes and more are the system's own; without it the number grows by itself."""


def _given_back() -> None:
    gc.collect()
    LIBC.malloc_trim(0)


def main(num_clients: int, rounds: int) -> None:
    """Runs and prints a page."""
    LIBC.mallopt(M_MMAP_THRESHOLD, 1 << 17)
    began, after, peaks = time.perf_counter(), [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        one_round(beginning(100), 1, 100, folder)
        _given_back()
        base = anonymous()
        state = beginning(num_clients)
        for number in range(1, rounds + 1):
            peak = Peak()
            state = one_round(state, number, num_clients, folder)
            peaks.append(peak.stop() - base)
            _given_back()
            after.append(anonymous() - base)
    limit = 1.2 * D * P * 8 + 200 * num_clients
    command = f"python benchmarks/faults/many_clients.py {num_clients} {rounds}"
    print(f"    {command} > benchmarks/results/faults/many_clients.md\n\n# Many clients\n")
    print(f"{num_clients:,} clients, {SHARE:.0%} in each of {rounds} rounds, d = {D}, P = {P:,}, default defences,")
    print(f"updates of one client in a hundred cut; {time.perf_counter() - began:.0f} s.")
    print(f"Limit: 1.2 · d·P·8 B + 200 B per client = {limit / 1e6:.1f} MB.\n")
    print("| MB above the base | round 1 | highest of first 10 | of last 10 | of all |\n|---|---:|---:|---:|---:|")
    for what, sizes in (("between rounds", after), ("highest in a round", peaks)):
        cells = (sizes[0], max(sizes[:10]), max(sizes[-10:]), max(sizes))
        print(f"| {what} | {' | '.join(f'{size / 1e6:.1f}' for size in cells)} |")
    print(f"\nBase: {base / 1e6:.0f} MB (the libraries). Between rounds {after[-1] / num_clients:.0f} B per client.")
    for what, sizes in (("Between rounds", after), ("Within a round", peaks)):
        print(f"{what}: {'within' if max(sizes) <= limit else 'above'} the limit.")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 100_000, int(sys.argv[2]) if len(sys.argv) > 2 else 200)
