"""Bad replies by the thousand against the gate: none may change anything, each is refused by name.

    python benchmarks/faults/replies.py [COUNT] > benchmarks/results/faults/replies.md

Every case takes one round's honest replies of a small federation, spoils one of them in one of the ways below (or makes
one up), sends all through the gate in a random order, and hands on what was admitted. The server's state must be the
one that the honest others alone give, to the last bit, and the refusal must carry the right reason.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedmerge.algorithms.fedmerge import FedMerge
from fedmerge.core.protocol import Federation, Update, deliver, state_tensors
from fedmerge.core.replies import Expected, Reply, admit, stacked_updates, template_of

P, RUN, ROUND = 12, "run", 3
METHOD = FedMerge(num_models=2, initial="noise")
Rng = np.random.Generator
Spoiled = tuple[Reply, str]


@dataclass(frozen=True)
class World:
    """One round: the server's state, what it expects, and honest replies."""

    state: Any
    expected: Expected
    replies: tuple[Reply, ...]


def world(seed: int, clients: int = 4) -> World:
    """A federation in its third round: so many honest clients, one that is late, and one that was not asked."""
    N = clients + 2
    rng = np.random.default_rng([seed, 11])
    facts = Federation(N, P, (P - 3, P), ((0, P),))
    start = torch.from_numpy(rng.normal(size=(3, P)))
    deltas = torch.from_numpy(rng.normal(size=(N, P)))
    state = METHOD.init(lambda j: start[j], facts, 0)
    state = deliver(METHOD, state, torch.arange(N), Update(deltas), torch.full((N,), 10))
    fresh = torch.from_numpy(rng.normal(size=(N, P)))
    replies = tuple(Reply(RUN, ROUND, i, 10 + i, {"delta": fresh[i]}) for i in range(N - 1))
    expected = Expected(RUN, ROUND, frozenset(range(N - 1)), template_of(Update(fresh[0])), late=frozenset({N - 2}))
    return World(state, expected, replies[:clients])


def _with(reply: Reply, tensor: object) -> Reply:
    return replace(reply, tensors={"delta": tensor})


def _anywhere(reply: Reply, rng: Rng, value: float) -> Reply:
    spoiled = reply.tensors["delta"].clone()
    spoiled[rng.integers(P)] = value
    return _with(reply, spoiled)


def _pick(rng: Rng, values: Sequence[Any]) -> Any:
    return values[int(rng.integers(len(values)))]


_ODD: tuple[Any, ...] = (None, True, "1", b"\x00", 1.0, float("nan"), [], {}, -1, 10**30, "\x1b[2J", object())


def _odd_number(rng: Rng, right: int) -> Any:
    return _pick(rng, [value for value in (*_ODD, right + 1, right - 1, -right) if value is True or value != right])


def _shape(reply: Reply, rng: Rng) -> Reply:
    delta = reply.tensors["delta"]
    shapes = (delta[:1], delta[:-1], delta[None], delta[0], torch.cat([delta, delta]), delta[:0], delta[:, None])
    return _with(reply, _pick(rng, shapes))


def _dtype(reply: Reply, rng: Rng) -> Reply:
    kinds = (torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.complex128)
    return _with(reply, reply.tensors["delta"].to(_pick(rng, kinds)))


def _names(reply: Reply, rng: Rng) -> Reply:
    delta = reply.tensors["delta"]
    tables: Sequence[Mapping[Any, Tensor]] = (
        {},
        {"Delta": delta},
        {"delta": delta, "more": delta},
        {"../delta": delta},
        {"delta ": delta},
        {0: delta},
    )
    return replace(reply, tensors=_pick(rng, tables))


def _malformed(reply: Reply, rng: Rng) -> Reply:
    delta = reply.tensors["delta"]
    things = (
        delta.tolist(),
        delta.numpy(),
        "delta",
        None,
        delta.to_sparse(),
        torch.empty(P, device="meta", dtype=delta.dtype),
        torch.nn.Parameter(delta.clone()),
    )
    if rng.random() < 0.2:
        return replace(reply, tensors=_pick(rng, (None, [delta], "delta", 7)))
    return _with(reply, _pick(rng, things))


SPOILERS: dict[str, Callable[[Reply, Rng], Spoiled]] = {
    "NaN": lambda r, g: (_anywhere(r, g, float("nan")), "values"),
    "infinite": lambda r, g: (_anywhere(r, g, _pick(g, (float("inf"), -float("inf")))), "values"),
    "huge": lambda r, g: (_anywhere(r, g, _pick(g, (1e13, -1e300))), "values"),
    "another shape": lambda r, g: (_shape(r, g), "shape"),
    "another dtype": lambda r, g: (_dtype(r, g), "dtype"),
    "other names": lambda r, g: (_names(r, g), "names"),
    "no tensors": lambda r, g: (_malformed(r, g), "malformed"),
    "count": lambda r, g: (replace(r, num_examples=_pick(g, (0, -5, 10**9 + 1, 1.5, "7", None, True))), "count"),
    "another round": lambda r, g: (replace(r, round=_odd_number(g, ROUND)), "round"),
    "another run": lambda r, g: (replace(r, run=_pick(g, ("", "Run", "run\n", None, 3, b"run"))), "run"),
    "not asked": lambda r, g: (replace(r, client=_pick(g, (5, 6, -1, 2**70, "0", None, True, 0.0))), "client"),
    "late": lambda r, _: (replace(r, client=4), "late"),
}


def outcome(case: World, replies: Sequence[Reply]) -> tuple[Any, tuple[str, ...]]:
    """The state after these replies, and the reasons of the refusals."""
    admission = admit(replies, case.expected)
    reasons = tuple(refusal.reason for refusal in admission.refusals)
    if not admission.admitted:
        return case.state, reasons
    clients = torch.tensor([reply.client for reply in admission.admitted])
    counts = torch.tensor([reply.num_examples for reply in admission.admitted])
    update = stacked_updates(admission.admitted, case.expected.template)
    return deliver(METHOD, case.state, clients, update, counts), reasons


def bits(state: Any) -> bytes:
    """Every bit of a state."""
    return b"".join(tensor.numpy().tobytes() for tensor in state_tensors(state).values())


def check(case: World, kind: str, rng: Rng) -> str | None:
    """What is wrong with how the gate took one spoiled reply; None if nothing is."""
    place = int(rng.integers(len(case.replies)))
    honest = [reply for k, reply in enumerate(case.replies) if k != place]
    if kind == "duplicate":
        replies, reason, honest = [*case.replies, replace(case.replies[place])], "duplicate", list(case.replies)
    else:
        bad, reason = SPOILERS[kind](case.replies[place], rng)
        replies = [*honest, bad]
    before = bits(case.state)
    order = rng.permutation(len(replies))
    found, reasons = outcome(case, [replies[k] for k in order])
    wanted, none = outcome(case, honest)
    if reasons != (reason,) or none:
        return f"{kind}: refused for {reasons}, expected {reason}"
    if bits(found) != bits(wanted):
        return f"{kind}: the state is not that of the honest replies alone"
    return None if bits(case.state) == before else f"{kind}: the state before was changed in place"


MANY = 40
KINDS = (*SPOILERS, "duplicate")


def main(count: int) -> None:
    """Runs the cases and prints a page."""
    began, tried, faults = time.perf_counter(), Counter[str](), []
    case = world(0)
    for number in range(count):
        if number % 1000 == 0:
            case = world(number)
        rng = np.random.default_rng([number, 5])
        kind = KINDS[number % len(KINDS)]
        tried[kind] += 1
        fault = check(case, kind, rng)
        faults += [fault] if fault else []
    orders = permutations(1000)
    print(f"    python benchmarks/faults/replies.py {count} > benchmarks/results/faults/replies.md\n\n# Bad replies\n")
    print(f"{count:,} spoiled replies in {time.perf_counter() - began:.0f} s: {len(faults)} of them changed a state or")
    print(f"were refused for another reason. 1,000 orders of arrival of {MANY} replies gave {orders} result(s).\n")
    print("| spoiled by | cases |\n|---|---:|")
    print("\n".join(f"| {kind} | {tried[kind]:,} |" for kind in KINDS))
    print("\n".join(f"\n{fault}" for fault in faults[:20]))


def permutations(count: int) -> int:
    """How many different states `count` orders of arrival of the same replies give."""
    case = world(1, MANY)
    found = set()
    for number in range(count):
        order = np.random.default_rng([number, 6]).permutation(len(case.replies))
        state, _ = outcome(case, [case.replies[k] for k in order])
        found.add(bits(state))
    return len(found)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 100_000)
