"""What a strategy begins with: method, network, layout and first state, for clients of which nothing is known."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import nn

from fedmerge.algorithms import ALGORITHMS
from fedmerge.core.errors import UsageError, together
from fedmerge.core.keeping import travelling
from fedmerge.core.protocol import Algorithm
from fedmerge.data.federated import without_examples
from fedmerge.experiment.config import RunOptions
from fedmerge.experiment.elsewhere import setup_without_examples, start_of
from fedmerge.experiment.privacy_check import privacy_of
from fedmerge.experiment.simulation import Progress, Setup
from fedmerge.training import LocalTraining


def method_of(method: str | Mapping[str, Any] | Algorithm[Any]) -> Algorithm[Any]:
    """A method by its name, by name and options, or as it is.

    Raises:
        UsageError: if there is no such method or option.
    """
    if not isinstance(method, (str, Mapping)):
        return method
    faults: list[str] = []
    table = {"name": method} if isinstance(method, str) else method
    found: Algorithm[Any] | None = ALGORITHMS.build(table, "method", faults)
    if found is None:
        raise UsageError(together(faults))
    return found


def begun(method: Algorithm[Any], model: Any, num_clients: int, options: RunOptions) -> tuple[Setup, Progress]:
    """All that stays, and the state before the first round.

    Args:
        method: The method.
        model: A module, whose weights are the first ones, or what makes one without arguments.
        num_clients: N.
        options: Seed and the like.

    Raises:
        UsageError: if method and module do not fit each other, or the method promises privacy.
    """
    if not isinstance(model, nn.Module):
        if not callable(model):
            raise UsageError(
                f"model: got a {type(model).__name__}; expected a torch.nn.Module, or a function or class that makes "
                "one without arguments"
            )
        model = partial(_made, model)
    names = [str(i) for i in range(num_clients)]
    setup = setup_without_examples(method, model, LocalTraining(), options, without_examples(names, ("",), None))
    _refuse_private(setup)
    return setup, start_of(setup, model)


def name_of(setup: Setup) -> str:
    """The method's name."""
    return ALGORITHMS.name_of(setup.algorithm)


def _refuse_private(setup: Setup) -> None:
    """What a private method promises depends on what its clients do."""
    travels = travelling(setup.layout, setup.options.keep)
    try:
        promised = (
            privacy_of(setup.algorithm, setup.played, travels, setup.options, setup.facts.num_clients) is not None
        )
    except UsageError:  # it would, under other options
        promised = True
    if promised:
        raise UsageError(
            f"method {name_of(setup)!r} promises privacy, which depends on what clients do; use `fedmerge deploy`, "
            "whose clients do it"
        )


def _made(model: Any) -> nn.Module:
    """Hides the signature of a user's function, which is called without arguments."""
    found: nn.Module = model()
    return found
