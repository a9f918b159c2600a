"""A network is tried on a few examples before a run begins: what cannot work is refused before anything is written."""

from __future__ import annotations

import logging
import warnings
from typing import Literal

import torch
from torch import Tensor, nn

from fedmerge.core.errors import UsageError
from fedmerge.core.protocol import Batches, Task
from fedmerge.core.randomness import fresh_module_randomness
from fedmerge.core.vector import Layout, twin
from fedmerge.data import ClientData, Examples, FederatedData
from fedmerge.runtime import Engine, Sequential, Vectorised
from fedmerge.training import Descent, LocalTraining, draw_batches
from fedmerge.training.objective import CLASSES, TOKENS, Objective, classes_of_tasks
from fedmerge.training.private import refuse_unfit
from fedmerge.training.task import has_dropout, is_batch_coupled

log = logging.getLogger(__name__)

Runtime = Literal["auto", "sequential", "vectorised"]


def check_module(module: nn.Module, data: FederatedData, training: LocalTraining) -> None:
    """Refuses a network that cannot be trained on the clients' examples.

    Args:
        module: Tried as a copy.
        data: The clients, in the run's precision.
        training: Says how small a batch can be.

    Raises:
        UsageError: if the forward pass fails on the smallest batch of the run, or gives something else than [B, K].
    """
    client = min(data.clients, key=lambda client: _smallest_batch(client, training))
    size = _smallest_batch(client, training)
    inputs, targets = client.train.inputs[:size], client.train.targets[:size]
    for mode in (True, False):
        outputs = _outputs(module, inputs, training=mode, whose=client.name)
        shape = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        if data.kind == "classes":
            fits = shape == (len(inputs), data.num_classes)
            expected = f"a tensor {(len(inputs), data.num_classes)}: one number per example and class"
        else:
            fits = isinstance(shape, tuple) and len(shape) == 3 and shape[2] > int(targets.max())
            expected = (
                f"a tensor [{len(inputs)}, tokens, more than {int(targets.max())}]: one number per token and class"
            )
        if not fits:
            raise UsageError(f"model {type(module).__name__} gives {shape} for {_text(inputs)}; expected {expected}")


def _smallest_batch(client: ClientData, training: LocalTraining) -> int:
    """Size of the last batch of an epoch."""
    return client.num_train % training.batch_size or training.batch_size


def _outputs(module: nn.Module, inputs: Tensor, *, training: bool, whose: str) -> object:
    tried = twin(module).train(training)
    try:
        with torch.no_grad(), fresh_module_randomness(0, "trial"):
            return tried(inputs)
    except Exception as error:  # a user's module may raise anything
        raise UsageError(
            f"model {type(module).__name__} cannot be {'trained on' if training else 'used for'} {_text(inputs)}, which"
            f" client {whose!r} has: {type(error).__name__}: {error}"
        ) from error


def _text(inputs: Tensor) -> str:
    return f"a batch of {len(inputs)} inputs {list(inputs.shape[1:])} of {inputs.dtype}"


def choose_engine(runtime: Runtime, module: nn.Module, layout: Layout, descent: Descent, data: FederatedData) -> Engine:
    """The engine that runs the clients.

    ``auto`` takes the vectorised one for networks that it is faster for (no convolutions, BatchNorm or dropout), if a
    step on a few examples gives the same numbers as the sequential one.

    Args:
        runtime: What was asked for.
        module: The network.
        layout: Of the module.
        descent: The local optimiser.
        data: The clients, in the run's precision.

    Raises:
        UsageError: if ``vectorised`` was asked for and does not give the sequential numbers.
    """
    objective = objective_of(data)
    sequential = Sequential(module, layout, descent, objective=objective)
    if runtime == "sequential" or (runtime == "auto" and not _is_faster_vectorised(module)):
        return sequential
    vectorised = Vectorised(module, layout, descent, objective=objective)
    fault = _disagreement(vectorised, sequential, layout.read(module), _trial_batches(module, data))
    if fault is None:
        return vectorised
    if runtime == "vectorised":
        raise UsageError(
            f"runtime 'vectorised' cannot run {type(module).__name__}: {fault}. Use runtime 'auto' or 'sequential'"
        )
    log.info("%s runs sequentially, because vectorised %s", type(module).__name__, fault)
    return sequential


def runtime_for(training: LocalTraining, runtime: Runtime, module: nn.Module, layout: Layout) -> Runtime:
    """The runtime that was asked for; the sequential one for training that protects each example.

    Args:
        training: What a client does in a round.
        runtime: What was asked for.
        module: The network.
        layout: Of the module.

    Raises:
        UsageError: if examples are to be protected in the vectorised runtime, or in a network that does not allow it.
    """
    if training.dp_clip is None:
        return runtime
    if runtime == "vectorised":
        raise UsageError(
            "training.dp_clip: runtime 'vectorised' has no gradients of single examples; use runtime 'sequential'"
        )
    refuse_unfit(module, layout)
    return "sequential"


def objective_of(data: FederatedData) -> Objective:
    """What a network's outputs are held against on these clients."""
    if data.kind != "classes":
        return TOKENS
    return classes_of_tasks(data.class_tasks) if len(set(data.class_tasks)) > 1 else CLASSES


def _is_faster_vectorised(module: nn.Module) -> bool:
    if any(not parameter.requires_grad for parameter in module.parameters()):
        return False  # a frozen base: its products are large already
    convolutions = any(isinstance(part, nn.modules.conv._ConvNd) for part in module.modules())
    return not convolutions and not is_batch_coupled(module) and not has_dropout(module)


def _trial_batches(module: nn.Module, data: FederatedData) -> list[Batches]:
    """One step of two clients; of unequal size where batches may be padded, so that padding is tried too."""
    inputs, targets = data.clients[0].train
    size = min(4, len(targets))
    sizes = size, size if is_batch_coupled(module) else max(1, size - 1)
    once = LocalTraining(steps=1)
    return [
        draw_batches(Examples(inputs[:n], targets[:n]), once, lr=1.0, seed=0, round_number=1, client=0) for n in sizes
    ]


def _disagreement(engine: Engine, reference: Engine, params: Tensor, batches: list[Batches]) -> str | None:
    """Why `engine` cannot stand in for `reference`; None if both make the same step."""
    arguments = [(params, steps) for steps in batches]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # torch warns where it would fall back to a slow loop
            found = engine.map(_step_and_loss, arguments)
    except Exception as error:  # whatever torch.func says about a user's module
        return f"it fails ({type(error).__name__}: {str(error).splitlines()[0][:200]})"
    wanted = reference.map(_step_and_loss, arguments)
    close = all(
        torch.allclose(a, b, rtol=0, atol=1e-3 * float(b.abs().max()) + 1e-6)
        for ours, theirs in zip(found, wanted, strict=True)
        for a, b in zip(ours, theirs, strict=True)
    )
    return None if close else "its numbers differ from the sequential ones: some layer looks across a batch"


def _step_and_loss(task: Task, params: Tensor, steps: Batches) -> tuple[Tensor, Tensor]:
    return params - task.train(params, steps), task.loss(params, steps[0])
