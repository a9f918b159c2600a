"""What a server believes of a reply: lengths and numbers of examples far above those of others are cut.

One client must not outweigh the rest by sending a long update or by claiming many examples, nor by a little of both.
Each is held against the median of what clients sent lately, one vote each, so that fewer than half of them cannot move
it beyond what honest ones send. What is within the limit passes as it is, bit for bit: where nothing is cut, a guarded
run is an unguarded one.
"""

from __future__ import annotations

import typing
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fedmerge.core import around
from fedmerge.core.errors import UsageError
from fedmerge.core.options import check_options, option
from fedmerge.core.protocol import Algorithm, Cost, Draw, Federation, Update
from fedmerge.core.sums import squared_norms

VOTERS = 25
"""How many clients' last replies make up a median, at least, where so many have replied: small cohorts look back."""


@dataclass(frozen=True)
class Defences:
    """How much longer an update, and how much larger a number of examples, may be than those of most clients.

    A client that claims more examples than the median may send so much less: with both defences on, the length of its
    update times what it counts stays below `clip` times the medians of the two.
    """

    clip: float = option(3.0, at_least=0, help="longest update that is believed, times the clients' median; 0: any")
    max_count: float = option(
        3.0, at_least=0, help="largest number of examples that is believed, times the clients' median; 0: any"
    )

    def __post_init__(self) -> None:
        check_options(self)
        faults = [
            f"Defences.{name}: got {value:g}, which would cut the median itself; expected 0 or a number >= 1"
            for name, value in (("clip", self.clip), ("max_count", self.max_count))
            if 0 < value < 1
        ]
        if faults:
            raise UsageError("\n".join(faults))


@dataclass(frozen=True)
class Watched:
    """Server state.

    Attributes:
        method: The method's own.
        edges: [2] where the trainable part and the whole vector end, T and P.
        round: [] completed.
        last: [N] round of each client's last reply; 0 before its first.
        norms: [1, N] or [2, N] lengths of its trainable part and, where there are buffers, of those, as they came.
        counts: [N] number of examples that it claimed.
        clipped: [N] how often an update of this client was cut.
        capped: [N] how often its number of examples was cut.
    """

    method: Any
    edges: Int[Tensor, " 2"]
    round: Int[Tensor, ""]
    last: Int[Tensor, " N"]
    norms: Float[Tensor, "parts N"]
    counts: Int[Tensor, " N"]
    clipped: Int[Tensor, " N"]
    capped: Int[Tensor, " N"]

    def voters(self) -> Bool[Tensor, " N"]:
        """Clients whose last reply counts in a median: those of this round, and the latest before up to `VOTERS`."""
        seen = self.last > 0
        heard = self.last[seen]
        earliest = heard.topk(min(VOTERS, len(heard))).values
        return seen & (self.last >= earliest[-1]) if len(earliest) else seen


@dataclass(frozen=True)
class Guarded:
    """A method whose server cuts what is far above the median before it hands replies on.

    Attributes:
        algorithm: One whose clients send an `Update`; other replies pass as they are.
        defences: Where to cut.
        in_place: Whether updates are cut where they lie: for a server whose replies are the round's own and need not
            be read again, as those of a `fedmerge.runtime.spool.Spool`. Otherwise a copy of all of them is cut.
    """

    algorithm: Algorithm[Any]
    defences: Defences
    in_place: bool = False

    # ---------------------------------------------------------------- server

    def init(self, draw: Draw, federation: Federation, seed: int) -> Watched:
        """The method's state, nobody heard of yet."""
        N, whole = federation.num_clients, len(draw(0))
        parts = 1 if whole == federation.num_trainable else 2
        last, clipped, capped = (torch.zeros(N, dtype=torch.int32) for _ in range(3))  # rounds, of which no run has 2³¹
        return Watched(
            method=self.algorithm.init(draw, federation, seed),
            edges=torch.tensor([federation.num_trainable, whole]),
            round=torch.tensor(0),
            last=last,
            norms=torch.zeros(parts, N, dtype=torch.float64),
            counts=torch.zeros(N, dtype=torch.int64),
            clipped=clipped,
            capped=capped,
        )

    def receive(
        self, state: Watched, clients: Int[Tensor, " C"], update: Any, num_examples: Int[Tensor, " C"]
    ) -> Watched:
        """The method's step with what is believed of the replies."""
        if not isinstance(update, Update):
            return replace(state, method=self.algorithm.receive(state.method, clients, update, num_examples))
        state = _noted(state, clients, update.delta, num_examples)
        counts, capped = self._capped(state, num_examples)
        delta, clipped = self._clipped(state, clients, update.delta, self._reach(state, counts))
        return replace(
            state,
            method=self.algorithm.receive(state.method, clients, Update(delta), counts),
            clipped=_counted(state.clipped, clients[clipped]),
            capped=_counted(state.capped, clients[capped]),
        )

    def _capped(self, state: Watched, num_examples: Int[Tensor, " C"]) -> tuple[Int[Tensor, " C"], Bool[Tensor, " C"]]:
        """Numbers of examples cut to the limit; and whose were."""
        limit = int(self.defences.max_count * float(upper_median(state.counts[state.voters()])))
        large = (num_examples > limit) & (limit > 0)
        return torch.where(large, limit, num_examples), large

    def _reach(self, state: Watched, counts: Int[Tensor, " C"]) -> Float[Tensor, " C"]:
        """How many median lengths each update may have: less for whoever counts for more than the median."""
        if self.defences.clip == 0:
            return torch.full((len(counts),), float("inf"), dtype=torch.float64)
        if self.defences.max_count == 0:
            return torch.full((len(counts),), self.defences.clip, dtype=torch.float64)
        usual = upper_median(state.counts[state.voters()]).double()
        return self.defences.clip * (usual / counts).clamp_max(1.0)

    def _clipped(
        self, state: Watched, clients: Int[Tensor, " C"], delta: Float[Tensor, "C S"], reach: Float[Tensor, " C"]
    ) -> tuple[Float[Tensor, "C S"], Bool[Tensor, " C"]]:
        """Updates cut to the limit, the trainable part and the buffers each by their own; and whose were."""
        voters, middle = state.voters(), _trainable(state, delta)
        believed, cut = delta, torch.zeros(len(clients), dtype=torch.bool)
        for norms, part in zip(state.norms, _parts(middle), strict=False):
            typical, own = upper_median(norms[voters]), norms[clients]
            long = (own > reach * typical) & (typical > 0)
            if believed is delta and not self.in_place and bool(long.any()):
                believed = delta.clone()
            _shorten(believed[:, part], long, reach * typical / own)
            cut |= long
        return believed, cut

    def cost(self, state: Watched) -> Cost:
        """The method's, and what is remembered of the clients."""
        cost = self.algorithm.cost(state.method)
        return replace(cost, server_floats=cost.server_floats + (4 + len(state.norms)) * len(state.last))

    def describe(self, state: Watched) -> Mapping[str, Any]:
        """The method's facts, and how often something was cut since the start."""
        return {
            **self.algorithm.describe(state.method),
            "clipped": int(state.clipped.sum()),
            "capped": int(state.capped.sum()),
        }

    trains_several = around.trains_several
    check_reply = around.check_reply
    silence = around.silence
    send = around.send
    mixing = around.mixing
    start = around.start
    train = around.train
    personal = around.personal


def _shorten(part: Float[Tensor, "C S"], long: Bool[Tensor, " C"], scale: Float[Tensor, " C"]) -> None:
    """Multiplies these rows by their `scale`; every other row stays to the last bit."""
    for place in long.nonzero()[:, 0].tolist():
        part[place] = part[place].double() * scale[place]


def _counted(times: Int[Tensor, " N"], clients: Int[Tensor, " k"]) -> Int[Tensor, " N"]:
    """One more for each of these clients."""
    return times.index_add(0, clients, torch.ones_like(clients, dtype=times.dtype)) if len(clients) else times


def _parts(middle: int) -> tuple[slice, slice]:
    """The trainable part of a reply, and its buffers."""
    return slice(0, middle), slice(middle, None)


def _trainable(state: Watched, delta: Float[Tensor, "C S"]) -> int:
    """Where the trainable part of a reply ends; a method that sends a part of the vector is cut as a whole."""
    trainable, whole = state.edges.tolist()
    return int(trainable) if delta.shape[1] == whole else delta.shape[1]


def _noted(
    state: Watched, clients: Int[Tensor, " C"], delta: Float[Tensor, "C S"], num_examples: Int[Tensor, " C"]
) -> Watched:
    """The state that knows of this round's replies."""
    middle = _trainable(state, delta)
    number, norms = state.round + 1, state.norms.clone()
    for row, part in zip(norms, _parts(middle), strict=False):
        row[clients] = squared_norms(delta[:, part]).sqrt()
    return replace(
        state,
        round=number,
        last=state.last.index_fill(0, clients, int(number)),
        norms=norms,
        counts=state.counts.index_put((clients,), num_examples),
    )


def upper_median(values: Tensor) -> Tensor:
    """The middle value, the larger of two: never above all of a majority of the values, and never below them.

    >>> upper_median(torch.tensor([1.0, 2.0, 9.0])), upper_median(torch.tensor([1.0, 9.0]))
    (tensor(2.), tensor(9.))
    """
    return values.sort().values[len(values) // 2]


def guarded(method: Algorithm[Any], defences: Defences, *, in_place: bool = False) -> Algorithm[Any]:
    """The method behind these defences; the method itself if they are off or do not fit its clients' replies.

    They fit replies that are an `Update`. Methods whose clients send something else (ifca, fedem, fedsoft, feddbe and
    scaffold, of those registered) are not guarded: what may be cut there is another question for each.
    """
    off = defences.clip == 0 and defences.max_count == 0
    return method if off or not _sends_update(method) else Guarded(method, defences, in_place)


def _sends_update(method: Algorithm[Any]) -> bool:
    """Whether the method's `train` says that it gives an `Update`, or does not say what it gives."""
    while hasattr(method, "algorithm"):  # a method may be wrapped in a merging space
        method = method.algorithm
    parts = typing.get_args(typing.get_type_hints(type(method).train).get("return"))
    return not parts or parts[0] in (Update, Any)


def unguarded(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the method's own state, by name, out of those of a guarded one; others as they are.

    Args:
        tensors: Of a server's state, see `protocol.state_tensors`.
    """
    own = {field.name for field in fields(Watched)} - {"method"}
    if not own <= tensors.keys():
        return dict(tensors)
    return {name.removeprefix("method."): tensor for name, tensor in tensors.items() if name not in own}
