"""Local training that protects each example: per-example gradients by Opacus, clipped, summed, with noise (DP-SGD).

Abadi et al., CCS 2016, arXiv:1607.00133. Every example is drawn by itself for every step, the sum of clipped gradients
is divided by the expected size of a batch, and one client's steps are all that its data touch: whatever a method asks
beyond them is refused.
"""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fedmerge.core import completing
from fedmerge.core.errors import UsageError
from fedmerge.core.protocol import Batch, Batches, Slope
from fedmerge.core.randomness import generator
from fedmerge.core.vector import Layout, twin
from fedmerge.training.objective import CLASSES, Objective

_WHO = "training.dp_clip"


@dataclass(frozen=True)
class Protection:
    """What the steps of one client's round are protected with.

    Attributes:
        clip: C, largest length of one example's gradient; infinity leaves gradients as they are.
        noise: z; noise of z·C on every number of a step's sum.
        expected: Expected number of examples of a step, by which the sum is divided.
        seed: The run's; a secret of 256 bits where the run's is known to whom the noise is to hold off.
        round: Counted from 1.
        client: Its index.
    """

    clip: float
    noise: float
    expected: int
    seed: int = 0
    round: int = 1
    client: int = 0


class PrivateBatches(tuple[Batch, ...]):
    """Steps of a client whose examples are protected; a tuple of batches that knows how."""

    protection: Protection

    def __new__(cls, batches: Batches, protection: Protection) -> PrivateBatches:
        """The batches with their protection."""
        made = super().__new__(cls, batches)
        made.protection = protection
        return made


def noise_of_step(protection: Protection, step: int, size: int) -> Float[Tensor, " T"]:
    """N(0, (z·C)²) in float64; depends on (seed, round, client, step) alone. No noise at z = 0.

    Args:
        protection: Of the round.
        step: From 0.
        size: T.
    """
    if protection.noise == 0:
        return torch.zeros(size, dtype=torch.float64)
    rng = generator(protection.seed, "example noise", protection.round, protection.client, step)
    return protection.noise * protection.clip * torch.from_numpy(rng.standard_normal(size))


class ExampleGradients:
    """Sums of clipped gradients of single examples.

    Args:
        module: Copied but for frozen parameters; a network in which examples do not meet, and without buffers.
        layout: Of the module.
        objective: What outputs are held against.

    Raises:
        UsageError: without Opacus, or for a network that it rejects.
    """

    def __init__(self, module: nn.Module, layout: Layout, objective: Objective = CLASSES) -> None:
        refuse_unfit(module, layout)
        self._layout, self._objective = layout, objective
        self._module: Any = _opacus("grad_sample").GradSampleModule(twin(module).train(), loss_reduction="sum")
        self._parameters = dict(self._module._module.named_parameters())

    def clipped_sum(self, params: Float[Tensor, " P"], batch: Batch, weights: Tensor, clip: float) -> Tensor:
        """Σ_b min(1, C/‖g_b‖) g_b in float64 with g_b = weights_b ∇ℓ_b.

        Args:
            params: Where.
            batch: May be empty.
            weights: [B].
            clip: C.
        """
        T = self._layout.num_trainable
        if len(batch.targets) == 0:
            return torch.zeros(T, dtype=torch.float64)
        each = self._of_each(params, batch, weights)
        lengths = each.norm(dim=1)
        factors = torch.where(lengths <= clip, 1.0, clip / lengths)
        return factors @ each

    def _of_each(self, params: Tensor, batch: Batch, weights: Tensor) -> Float[Tensor, "B T"]:
        self._layout.write(params, self._module._module)
        self._module.zero_grad()
        with warnings.catch_warnings():  # inputs need no gradient, which torch's hooks find worth a warning
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            losses = self._objective.losses(self._module(batch.inputs), batch.targets)
            (losses * weights).sum().backward()  # type: ignore[no-untyped-call]
        size = len(batch.targets)
        views = self._layout.views(params[: self._layout.num_trainable])
        found = [self._parameters[name].grad_sample for name in views]
        flat = [
            view.new_zeros(size, view.numel()) if grads is None else grads.reshape(size, -1)
            for view, grads in zip(views.values(), found, strict=True)
        ]
        return torch.cat(flat, dim=1).double()


def refuse_unfit(module: nn.Module, layout: Layout) -> None:
    """Raises UsageError for a network whose examples cannot be protected one by one."""
    errors = _opacus("validators").ModuleValidator.validate(module, strict=False)
    if errors:
        first = str(errors[0]).split(". ")[0].splitlines()[0]
        raise UsageError(
            f"{_WHO}: got a {type(module).__name__} that Opacus rejects ({first}); expected a network in which "
            "examples do not meet: use GroupNorm or LayerNorm instead of BatchNorm"
        )
    if layout.num_params != layout.num_trainable:
        raise UsageError(
            f"{_WHO}: got a {type(module).__name__} with {layout.num_params - layout.num_trainable} numbers in "
            "buffers, which would leave the client unprotected; expected a network without"
        )


def _opacus(part: str) -> Any:
    try:
        return importlib.import_module(f"opacus.{part}")
    except ImportError as error:
        raise UsageError(
            f"{_WHO}: the package opacus is missing; install it with pip install 'fedmerge[privacy]'"
        ) from error


def _beyond(what: str) -> UsageError:
    return UsageError(
        f"{_WHO}: this method's clients do more with their examples than the accountant counts: it {what}; expected "
        "one protected step per batch. Use fedavg, fedavgm, fedprox, fedmerge or dp-fedmerge, or leave dp_clip out"
    )


def _refused(what: str) -> Callable[..., Any]:
    """A part of a task that would show more of the examples than the accountant counts."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise _beyond(what)

    return refuse


class PrivateTask:
    """A task whose every look at the protected batches is a clipped and noisy one, once for each of them.

    Its losses are NaN: they are not protected, and a method that used one would be refused by its result.

    Args:
        task: The task; trains with its optimiser.
        gradients: Of single examples.
        batches: Those of this client's round.
    """

    def __init__(self, task: Any, gradients: ExampleGradients, batches: PrivateBatches) -> None:
        self._task, self._gradients, self._batches = task, gradients, batches
        self._used: set[int] = set()
        self.layout = task.layout

    def gradient(self, params: Float[Tensor, " P"], batch: Batch, offset: Tensor | None = None) -> Slope:
        """(Σ_b clipped g_b + noise)/expected; a batch whose weights a method changed is clipped after the change."""
        if offset is not None:
            raise _beyond("adds to the outputs what it knows of the client's classes")
        step, protection = self._step(batch), self._batches.protection
        weights = batch.weight * protection.expected
        total = self._gradients.clipped_sum(params, batch, weights, protection.clip)
        slope = (total + noise_of_step(protection, step, len(total))) / protection.expected
        return Slope(params.new_tensor(math.nan), slope.to(params.dtype), params[:0])

    def _step(self, batch: Batch) -> int:
        found = [s for s, own in enumerate(self._batches) if own.inputs is batch.inputs]
        if not found:
            raise _beyond("makes batches of its own")
        if found[0] in self._used:
            raise _beyond("looks at a batch more than once")
        self._used.add(found[0])
        return found[0]

    train = completing.train
    descend = completing.descend
    slope_through = _refused("trains through changed features")
    features = _refused("looks at features")
    predict = _refused("looks at outputs")
    losses = _refused("looks at losses")
    loss = _refused("looks at losses")
    right = _refused("looks at answers")


def protected_task(task: Any, gradients: Callable[[], ExampleGradients], arguments: tuple[Any, ...]) -> Any:
    """The task for one client: protected if one of its arguments is `PrivateBatches`.

    Args:
        task: The plain one.
        gradients: Called only if needed.
        arguments: What the client's function gets after the task.
    """
    for argument in arguments:
        if isinstance(argument, PrivateBatches):
            return PrivateTask(task, gradients(), argument)
    return task


def _is_protected(argument: Any) -> bool:
    """Whether an argument is protected steps, drawn or planned."""
    training = getattr(argument, "training", None)
    return isinstance(argument, PrivateBatches) or getattr(training, "dp_clip", None) is not None


def refuse_protected(clients: Sequence[tuple[Any, ...]]) -> None:
    """Raises UsageError if the examples of any client are to be protected: for engines that cannot."""
    if any(_is_protected(argument) for arguments in clients for argument in arguments):
        raise UsageError(f"{_WHO}: runtime 'vectorised' has no gradients of single examples; use runtime 'sequential'")
