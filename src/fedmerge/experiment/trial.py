"""A network is tried on a few examples before a run begins: what cannot work is refused before anything is written."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedmerge.core.errors import UsageError
from fedmerge.core.randomness import fresh_module_randomness
from fedmerge.core.vector import Layout, twin
from fedmerge.data import ClientData, FederatedData
from fedmerge.experiment.choice import Runtime
from fedmerge.training import LocalTraining
from fedmerge.training.private import refuse_unfit


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


def runtime_for(training: LocalTraining, runtime: Runtime, module: nn.Module, layout: Layout) -> Runtime:
    """The runtime that was asked for; the sequential one for training that protects each example.

    Args:
        training: What a client does in a round.
        runtime: What was asked for.
        module: The network.
        layout: Of the module.

    Raises:
        UsageError: if examples are to be protected many clients at once, or in a network that does not allow it.
    """
    if training.dp_clip is None:
        return runtime
    if runtime in ("vectorised", "folded"):
        raise UsageError(
            f"training.dp_clip: runtime {runtime!r} has no gradients of single examples; use runtime 'sequential'"
        )
    refuse_unfit(module, layout)
    return "sequential"
