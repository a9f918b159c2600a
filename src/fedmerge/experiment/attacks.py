"""Clients that lie: what becomes of the replies of a round if some of those who send them attack.

Attackers are given more than real ones would have: they train as honest clients do, see every reply of the round
before they send their own, and know the server's limits. Randomness is (seed, purpose, client), as everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fedmerge.core.defences import Defences
from fedmerge.core.errors import UsageError
from fedmerge.core.options import check_options, option
from fedmerge.core.randomness import generator
from fedmerge.core.replies import MOST_EXAMPLES, Reply

Kind = Literal["none", "push", "collude", "sign-flip", "inflate", "nan", "free-ride", "edge", "turncoat", "mimic"]
JUST_BELOW = 0.99
"""Of a limit that an attacker knows."""
FREE = 10.0
"""Length of a false update, times the honest one, where the server believes any."""
NOISE = 1e-6
"""Of a free rider, times the length of an honest update: enough to look different from others."""


@dataclass(frozen=True)
class Attack:
    """Which clients lie and how.

    ``push``: a direction of its own, drawn once, instead of what it learnt; ``collude``: one direction for all;
    ``sign-flip``: away from what it learnt; ``inflate``: the honest update, and `inflation` times its number of
    examples; ``nan``: no numbers; ``free-ride``: nothing learnt, a little noise.

    Those that know the server's defences: ``edge``: away from the honest clients' mean, update and number of examples
    just below the limits; ``turncoat``: honest before round `turn`, from then on ``edge``; ``mimic``: before `turn`
    the reply of one honest client, the same for all attackers, so that they come into its group, and from then on away
    from that client's reply, just below the limits.
    """

    kind: Kind = option("none", help="what attackers do")
    share: float = option(0.2, at_least=0, below=1, help="of the clients, drawn from the seed")
    strength: float = option(
        10.0, above=0, help="length of a false update, times the honest one (push, collude, sign-flip)"
    )
    inflation: float = option(1e6, above=1, help="of the number of examples (inflate)")
    turn: int = option(10, at_least=1, help="first round in which turncoats and mimics show what they are")

    def __post_init__(self) -> None:
        check_options(self)
        used = _USED.get(self.kind, ("share",))
        faults = [
            f"Attack.{name}: got {getattr(self, name)!r}, which has no effect with kind={self.kind!r}; leave it out"
            for name in ("share", "strength", "inflation", "turn")
            if name not in used and getattr(self, name) != getattr(type(self), name)
        ]
        if faults:
            raise UsageError("\n".join(faults))


_USED: Mapping[str, tuple[str, ...]] = {
    "none": (),
    "push": ("share", "strength"),
    "collude": ("share", "strength"),
    "sign-flip": ("share", "strength"),
    "inflate": ("share", "inflation"),
    "turncoat": ("share", "turn"),
    "mimic": ("share", "turn"),
}
"""Options that a kind reads; the others read `share` only."""


def attackers(attack: Attack, num_clients: int, seed: int) -> tuple[int, ...]:
    """The clients that lie, ascending: a share of all, rounded, drawn from the seed.

    >>> len(attackers(Attack("push", share=0.2), 50, seed=0)), attackers(Attack(), 50, seed=0)
    (10, ())
    """
    if attack.kind == "none":
        return ()
    drawn = generator(seed, "attackers").permutation(num_clients)[: round(attack.share * num_clients)]
    return tuple(sorted(drawn.tolist()))


@dataclass(frozen=True)
class Scene:
    """What attackers know when they make up their replies.

    Attributes:
        attack: What they have agreed on.
        seed: The run's.
        honest: Replies of honest clients in this round.
        believed: The server's limits.
    """

    attack: Attack
    seed: int
    honest: tuple[Reply, ...]
    believed: Defences

    def most_examples(self, own: int) -> int:
        """The largest number of examples that passes; `own` is the attacker's, which stands in if it is alone."""
        counts = [reply.num_examples for reply in self.honest] or [own]
        return max(1, int(JUST_BELOW * (self.believed.max_count or 1) * float(np.median(counts))))

    def longest(self, own: float) -> float:
        """The longest update that passes with that many examples; `own` is the attacker's honest length."""
        lengths = [length_of(reply.tensors) for reply in self.honest] or [own]
        believed = self.believed.clip / max(1.0, self.believed.max_count) if self.believed.clip else FREE
        return JUST_BELOW * believed * float(np.median(lengths))


def tampered(
    attack: Attack,
    replies: Sequence[Reply],
    *,
    attackers: Collection[int],
    seed: int,
    believed: Defences | None = None,
) -> tuple[Reply, ...]:
    """The replies of a round as they leave the clients, in the given order.

    Args:
        attack: What attackers do.
        replies: What every client would send if it were honest.
        attackers: Clients that lie, see `attackers`.
        seed: The run's.
        believed: The server's limits, for attackers that know them; the default ones if not given.
    """
    if attack.kind == "none":
        return tuple(replies)
    honest = tuple(reply for reply in replies if reply.client not in attackers)
    scene = Scene(attack, seed, honest, believed or Defences())
    lie = _LIES[attack.kind]
    return tuple(lie(scene, reply) if reply.client in attackers else reply for reply in replies)


def length_of(tensors: Mapping[str, Tensor]) -> float:
    """Euclidean, of all floating-point tensors of a reply together."""
    squares = [float(t.double().square().sum()) for t in tensors.values() if t.is_floating_point()]
    return math.sqrt(sum(squares))


# ---------------------------------------------------------------- lies


def _push(scene: Scene, reply: Reply) -> Reply:
    return _drawn(scene, reply, reply.client)


def _collude(scene: Scene, reply: Reply) -> Reply:
    return _drawn(scene, reply, 0)


def _drawn(scene: Scene, reply: Reply, which: int) -> Reply:
    """A fixed direction, as long as the attack is strong."""
    rng = generator(scene.seed, f"direction of {scene.attack.kind}", which)
    direction = _each(reply, lambda t: torch.from_numpy(rng.standard_normal(t.shape)).to(t.dtype))
    return _as_long_as(direction, scene.attack.strength * length_of(reply.tensors))


def _sign_flip(scene: Scene, reply: Reply) -> Reply:
    return _each(reply, lambda t: -scene.attack.strength * t)


def _inflate(scene: Scene, reply: Reply) -> Reply:
    return replace(reply, num_examples=min(MOST_EXAMPLES, int(scene.attack.inflation * reply.num_examples)))


def _nan(scene: Scene, reply: Reply) -> Reply:  # noqa: ARG001
    return _each(reply, lambda t: torch.full_like(t, float("nan")))


def _free_ride(scene: Scene, reply: Reply) -> Reply:
    rng = generator(scene.seed, "noise of free riders", reply.client, reply.round)
    noise = _each(reply, lambda t: torch.from_numpy(rng.standard_normal(t.shape)).to(t.dtype))
    return _as_long_as(noise, NOISE * length_of(reply.tensors))


def _edge(scene: Scene, reply: Reply) -> Reply:
    """Away from the honest mean."""
    if not scene.honest:
        return _just_below(scene, reply, _each(reply, torch.neg))
    means = {
        name: torch.stack([other.tensors[name].double() for other in scene.honest]).mean(dim=0)
        for name in reply.tensors
    }
    return _just_below(scene, reply, _each_named(reply, lambda name, t: -means[name].to(t.dtype)))


def _turncoat(scene: Scene, reply: Reply) -> Reply:
    return reply if reply.round < scene.attack.turn else _edge(scene, reply)


def _mimic(scene: Scene, reply: Reply) -> Reply:
    """Like the victim, then against it; honest in rounds without honest clients."""
    if not scene.honest:
        return reply
    victim = scene.honest[int(generator(scene.seed, "victim").integers(1 << 30)) % len(scene.honest)]
    if reply.round < scene.attack.turn:
        return replace(reply, tensors=dict(victim.tensors))
    return _just_below(scene, reply, _each_named(reply, lambda name, _: -victim.tensors[name]))


_LIES: Mapping[Kind, Callable[[Scene, Reply], Reply]] = {
    "push": _push,
    "collude": _collude,
    "sign-flip": _sign_flip,
    "inflate": _inflate,
    "nan": _nan,
    "free-ride": _free_ride,
    "edge": _edge,
    "turncoat": _turncoat,
    "mimic": _mimic,
}


def _just_below(scene: Scene, honest: Reply, false: Reply) -> Reply:
    """A false reply as long, and with as many examples, as passes."""
    scaled = _as_long_as(false, scene.longest(length_of(honest.tensors)))
    return replace(scaled, num_examples=scene.most_examples(honest.num_examples))


def _as_long_as(reply: Reply, length: float) -> Reply:
    found = length_of(reply.tensors)
    return _each(reply, lambda t: t * (length / found)) if found > 0 else reply


def _each(reply: Reply, change: Callable[[Tensor], Tensor]) -> Reply:
    return _each_named(reply, lambda _, t: change(t))


def _each_named(reply: Reply, change: Callable[[str, Tensor], Tensor]) -> Reply:
    """The reply with every floating-point tensor changed; whole numbers stay."""
    changed = {name: change(name, t) if t.is_floating_point() else t for name, t in reply.tensors.items()}
    return replace(reply, tensors=changed)
