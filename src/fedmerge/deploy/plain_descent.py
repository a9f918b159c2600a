"""Which methods a client can play that knows nothing of them: those that ask for local training and nothing else.

A method is not asked for its name but watched: it is given a task that only writes down what it is asked for.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from fedmerge.core.errors import UsageError
from fedmerge.core.protocol import Algorithm, Batches, Update, take
from fedmerge.core.vector import Layout


class _OtherWorkError(Exception):
    """The method asks a client for something else than training."""


def _other(*_: Any, **__: Any) -> NoReturn:
    raise _OtherWorkError


class _Watched:
    """A task that writes down how it is asked to train; everything else is refused."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.pulls: list[float] = []
        self.starts: list[Tensor] = []

    def train(self, params: Tensor, batches: Batches, *, pull: float = 0.0, towards: Tensor | None = None) -> Tensor:
        """Moves every entry by one."""
        if batches or not (towards is None or towards is params):
            raise _OtherWorkError
        self.pulls.append(float(pull))
        self.starts.append(params)
        return params - 1

    gradient = slope_through = features = predict = losses = right = loss = descend = staticmethod(_other)


def pull_of(method: Algorithm[Any], state: Any, layout: Layout, *, name: str) -> float:
    """How strongly a method's clients are pulled to the model that they receive: μ in ``μ/2 · ‖θ − θ_received‖²``.

    Args:
        method: As it is played.
        state: The server's, before any round.
        layout: Of the network.
        name: Of the method, for the message.

    Raises:
        UsageError: if its clients do more than train the received vector [P], reply with an `Update` and use what they
            receive.
    """
    try:
        pull = _pull_seen(method, state, layout)
    except Exception as error:  # whatever a method does with a task that is none
        raise _refusal(name) from error
    if pull is None:
        raise _refusal(name)
    return pull


def _pull_seen(method: Algorithm[Any], state: Any, layout: Layout) -> float | None:
    """The pull, if the client's whole round is one training from what it receives; None if not."""
    task = _Watched(layout)
    down = take(method.send(state, torch.tensor([0])), 0)
    if not isinstance(down, Tensor) or down.shape != (layout.num_params,) or method.start(down) != ():
        return None
    update, private = method.train(down, (), (), task)
    if type(update) is not Update or private != () or [start is down for start in task.starts] != [True]:
        return None
    if not torch.equal(update.delta, down - (down - 1)) or method.personal(down, (), (), task) is not down:
        return None
    return task.pulls[0]


def _refusal(name: str) -> UsageError:
    return UsageError(
        f"method {name!r}: its clients do more than train the model that they receive, which a "
        "ClientApp of your own cannot know; take another method (fedmerge, fedavg, fedprox, ...), or let "
        "`fedmerge deploy` run the clients, which does all that a method asks"
    )
