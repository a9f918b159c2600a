"""Runs whose clients' examples, and what clients keep, are elsewhere: all that a server or a reader of models needs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fedmerge.core.protocol import Algorithm
from fedmerge.core.vector import Layout, layout_of
from fedmerge.data import FederatedData
from fedmerge.experiment.choice import Choice, objective_of
from fedmerge.experiment.config import RunOptions
from fedmerge.experiment.federation import drawer, federation_facts, make_module
from fedmerge.experiment.simulation import Progress, Setup, played_method
from fedmerge.runtime import Fleet, Sequential
from fedmerge.training import LocalTraining

_NOTHING = torch.empty(0)


def setup_without_examples(
    algorithm: Algorithm[Any],
    model: Any,
    training: LocalTraining,
    options: RunOptions,
    data: FederatedData,
    choice: Choice | None = None,
) -> Setup:
    """The setup of a run whose clients' examples are elsewhere.

    Args:
        algorithm: The method.
        model: A recipe, a module, or a function that makes one.
        training: What a client does in a round.
        options: Rounds, seed and the like.
        data: From `fedmerge.data.federated.without_examples`.
        choice: What runs the clients where they are.
    """
    module = make_module(model, data, options.seed, dtype=options.dtype)
    layout = layout_of(module, head=options.head, frozen=options.frozen)
    return setup_on(module, layout, algorithm, training, options, data, choice)


def setup_on(
    module: nn.Module,
    layout: Layout,
    algorithm: Algorithm[Any],
    training: LocalTraining,
    options: RunOptions,
    data: FederatedData,
    choice: Choice | None = None,
) -> Setup:
    """`setup_without_examples` on a network that has been made.

    Args:
        module: The network.
        layout: Of the module.
        algorithm: As for `setup_without_examples`, like all that follow.
        training: What a client does in a round.
        options: Rounds, seed and the like.
        data: Clients without examples.
        choice: What runs the clients.
    """
    return Setup(
        algorithm=algorithm,
        played=played_method(algorithm, layout, options),
        data=data,
        module=module,
        layout=layout,
        engine=Sequential(module, layout, training.descent(), objective=objective_of(data)),
        choice=choice or Choice("sequential"),
        training=training,
        options=options,
        facts=federation_facts(data, layout),
    )


def start_of(setup: Setup, model: Any) -> Progress:
    """Before the first round.

    Args:
        setup: From `setup_without_examples`.
        model: Which that was given.
    """
    draw = drawer(model, setup.data, setup.options.seed, setup.layout, setup.options.dtype)
    return Progress(setup.played.init(draw, setup.facts, setup.options.seed), fleet_elsewhere(setup), 0)


def fleet_elsewhere(setup: Setup) -> Fleet:
    """Clients that keep what they keep for themselves."""
    N = len(setup.data.clients)
    return Fleet(((),) * N, (_NOTHING,) * N, setup.options.buffers, setup.layout.num_trainable)
