"""What a method's server keeps of a single client, and the state as if it had never replied."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fedmerge.core.errors import FedmergeError
from fedmerge.core.protocol import own_name, state_tensors, with_tensors
from fedmerge.deploy.plan import Plan
from fedmerge.experiment.federation import drawer

_ROWS = "soup.logits"
"""Merging weights before the softmax: equal ones weigh all models alike."""


def client_axes(plan: Plan) -> dict[str, tuple[int, ...]]:
    """Which axes of the state's tensors go by client, by name; those without one hold what clients made together.

    Found by asking the method, and what is around it, for its first state with one client more.

    Args:
        plan: Of the run.
    """
    setup, terms = plan.setup, plan.federation.terms
    facts, N = setup.facts, setup.facts.num_clients
    groups = None if facts.groups is None else (*facts.groups, facts.groups[-1])
    draw = drawer(terms.model, setup.data, setup.options.seed, setup.layout, setup.options.dtype)
    more = replace(facts, num_clients=N + 1, groups=groups)
    own, larger = (state_tensors(s) for s in (plan.start.state, setup.played.init(draw, more, setup.options.seed)))
    found = {}
    for name, tensor in own.items():
        sizes = zip(tensor.shape, larger[name].shape, strict=True)
        axes = tuple(axis for axis, (size, other) in enumerate(sizes) if (size, other) == (N, N + 1))
        if axes:
            found[name] = axes
    return found


def forgotten_state(plan: Plan, axes: Mapping[str, tuple[int, ...]], state: Any, client: int) -> Any:
    """The state with everything at a client's place as it was before its first reply.

    Its merging weights become uniform. A part whose form has changed since the start (merging weights of models that
    were added later) becomes 0.

    Args:
        plan: Of the run.
        axes: From `client_axes`.
        state: Of the run.
        client: Index.

    Raises:
        FedmergeError: if a tensor has not one entry for each client where it should.
    """
    N, fresh = plan.setup.facts.num_clients, state_tensors(plan.start.state)
    tensors = dict(state_tensors(state))
    for name, own in axes.items():
        if not tensors[name].numel():  # what a method keeps for some rounds only
            continue
        if any(axis >= tensors[name].dim() or tensors[name].shape[axis] != N for axis in own):
            raise FedmergeError(
                f"{name} is {list(tensors[name].shape)}; expected {N} entries on axis {own}: this method's state "
                "cannot forget a client"
            )
        tensors[name] = _blank(tensors[name], fresh[name], own, client, zero=own_name(name) == _ROWS)
    return with_tensors(state, tensors)


def _blank(tensor: Tensor, fresh: Tensor, axes: Sequence[int], client: int, *, zero: bool) -> Tensor:
    found = tensor.clone()
    for axis in axes:
        place, start = found.select(axis, client), fresh.select(axis, client)
        if place.shape == start.shape and not zero:
            place.copy_(start)
        else:
            place.zero_()
    return found


def mixed_parts(plan: Plan, axes: Mapping[str, tuple[int, ...]], state: Any, last_reply: int) -> tuple[str, ...]:
    """What of the state holds a client's replies together with others'."""
    if not last_reply:
        return ()
    fresh, shared = state_tensors(plan.start.state), []
    for name, tensor in state_tensors(state).items():
        if name not in axes and tensor.is_floating_point() and tensor.numel() and not _is(tensor, fresh[name]):
            shared.append(own_name(name))
    method = plan.federation.terms.plain()["method"]["name"]
    found = []
    if shared:
        found.append(
            f"its influence on what all sites trained together up to round {last_reply}: {', '.join(shared)}; only "
            "training anew without it undoes that"
        )
    if axes and method in _OTHERS_ROWS:
        found.append(_OTHERS_ROWS[method])
    return tuple(found)


def _is(tensor: Tensor, other: Tensor) -> bool:
    return tensor.shape == other.shape and torch.equal(tensor, other)


_CLUSTERED = "which sites share a model, and how many models there are, was decided with its replies among the others'"
_OTHERS_ROWS: dict[str, str] = {
    "fedmerge": "other sites' merging weights were learned on models that its replies had moved; models that were "
    "added or groups of layers that were parted were decided with its replies too",
    "dp-fedmerge": "other sites' merging weights were learned on models that its replies had moved; the privacy that "
    "was promised for its replies holds for them as before",
    "fedamp": "the models of other sites, each of which was drawn towards those that were like it, its own among them",
    "cfl": _CLUSTERED,
    "cfl-smoothed": _CLUSTERED,
    "flhc": _CLUSTERED,
    "one-shot": _CLUSTERED,
    "femam": _CLUSTERED,
    "fesem": _CLUSTERED,
    "ifca": _CLUSTERED,
    "fedsoft": _CLUSTERED,
}
"""What remains of a client at the places of other clients, by method."""
