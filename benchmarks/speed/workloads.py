"""What every contestant of `rivals.py` trains: networks, clients' examples and the order of their batches.

Numbers are random, of the shapes named here: speed does not depend on what the pictures show. A contestant gets the
same start, the same examples, the same number of steps and plain SGD in float32 (float64 in the tests).
"""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from fedmerge.core.randomness import fresh_module_randomness, generator
from fedmerge.models import NETWORKS

SEED = 0
VOCABULARY = 30_522  # of BERT and MiniLM


@dataclass(frozen=True)
class Workload:
    """One federation.

    Attributes:
        name: On the command line.
        model: Name of a network of this package with its options; ``lora`` for a random transformer with adapters;
            ``basic-blocks`` for the network that the authors of FedMerge train.
        shape: Of one input; of ``lora`` the number of tokens.
        clients: As many as the federation has.
        played: As many as a contestant plays in a round: time per client-step does not depend on it.
        examples: Of each client; a multiple of the batch size, because PFLlib drops a batch that is not full.
        batch: Examples of a step.
        epochs: Passes over a client's examples in a round.
        lr: Of local SGD.
        classes: K.
        dtype: Of inputs and parameters.
    """

    name: str
    model: str
    shape: tuple[int, ...]
    clients: int
    played: int
    examples: int
    batch: int
    epochs: int = 1
    lr: float = 0.01
    classes: int = 10
    options: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32

    @property
    def steps(self) -> int:
        """Steps of one client in a round."""
        return self.epochs * math.ceil(self.examples / self.batch)


class Examples(NamedTuple):
    """One client's inputs [n, ...] and targets [n]."""

    inputs: Tensor
    targets: Tensor


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("logistic", "mlp", (784,), 1000, 1000, 60, 20, options={"hidden": ()}),
        Workload("mlp", "mlp", (784,), 1000, 1000, 60, 20, options={"hidden": (100,)}),
        Workload("cnn", "cnn", (1, 28, 28), 100, 100, 128, 32),
        Workload("resnet9", "resnet9", (3, 32, 32), 50, 6, 896, 32, epochs=2),
        Workload("resnet9-paper", "basic-blocks", (3, 32, 32), 50, 6, 896, 32, epochs=2, classes=100),
        Workload("lora", "lora", (32,), 20, 4, 32, 16),
    )
}


def workload_of(name: str, played: int | None = None) -> Workload:
    """A workload by name, with another number of clients in a round if that is given."""
    found = WORKLOADS[name]
    return found if played is None else replace(found, played=played)


def network(workload: Workload) -> nn.Module:
    """The network, with the same fresh weights in every process."""
    with fresh_module_randomness(SEED, "speed: initial weights"):
        module = _MADE.get(workload.model, _registered)(workload)
    if workload.dtype == torch.float32:
        return module
    return copy.deepcopy(module).to(workload.dtype)  # a frozen base is shared, and would change for all


def _registered(workload: Workload) -> nn.Module:
    recipe: Any = NETWORKS[workload.model].cls(**workload.options)
    module: nn.Module = recipe.build(workload.shape, workload.classes)
    return module


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut, which is a 1x1 convolution where the shape changes; BatchNorm.

    He et al., CVPR 2016, arXiv:1512.03385.

    Args:
        fan_in: Channels that come in.
        fan_out: Channels that go out.
        stride: Of the first convolution.
    """

    def __init__(self, fan_in: int, fan_out: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Sequential(_convolution(fan_in, fan_out, 3, stride), nn.ReLU())
        self.second = _convolution(fan_out, fan_out, 3, 1)
        changed = stride != 1 or fan_in != fan_out
        self.shortcut = _convolution(fan_in, fan_out, 1, stride) if changed else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """ReLU of the sum of both ways."""
        return functional.relu(self.second(self.first(x)) + self.shortcut(x))


def _convolution(fan_in: int, fan_out: int, size: int, stride: int) -> nn.Sequential:
    layer = nn.Conv2d(fan_in, fan_out, size, stride=stride, padding=size // 2, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(fan_out))


def _basic_blocks(workload: Workload) -> nn.Module:
    """One block at each of 8, 16, 32 and 64 channels: the residual network of the authors' ``ResNet9``."""
    widths = (8, 8, 16, 32, 64)
    stem = nn.Sequential(_convolution(workload.shape[0], widths[0], 3, 1), nn.ReLU())
    blocks = [BasicBlock(a, b, 1 if a == b else 2) for a, b in pairwise(widths)]
    return nn.Sequential(stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], workload.classes))


def _transformer(workload: Workload) -> nn.Module:
    """Six blocks of width 384, as in MiniLM, with LoRA of rank 8 on queries and values of all; not pretrained."""
    from fedmerge.models.hf import Hf  # noqa: PLC0415 - optional extra

    return Hf(path=_checkpoint(), rank=8).build(workload.shape, workload.classes)


_MADE: dict[str, Callable[[Workload], nn.Module]] = {"lora": _transformer, "basic-blocks": _basic_blocks}


@cache
def _checkpoint() -> str:
    """A folder with a transformer of random weights, deleted at the end of the process."""
    from transformers import BertConfig, BertModel  # noqa: PLC0415 - optional extra

    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
        max_position_embeddings=512,
    )
    folder = tempfile.TemporaryDirectory(prefix="speed-")
    _KEPT.append(folder)
    with fresh_module_randomness(SEED, "speed: frozen weights"):
        BertModel(config).save_pretrained(folder.name)
    return str(Path(folder.name))


_KEPT: list[tempfile.TemporaryDirectory[str]] = []


def examples(workload: Workload, client: int) -> Examples:
    """A client's own examples: normal numbers or uniform tokens, and uniform labels."""
    rng = generator(SEED, "speed: examples", client)
    size = (workload.examples, *workload.shape)
    targets = torch.from_numpy(rng.integers(workload.classes, size=workload.examples))
    if workload.model == "lora":
        return Examples(torch.from_numpy(rng.integers(1, VOCABULARY, size=size)), targets)
    return Examples(torch.from_numpy(rng.standard_normal(size, dtype=np.float32)).to(workload.dtype), targets)


def federation(workload: Workload) -> list[Examples]:
    """The examples of all clients that are played."""
    return [examples(workload, client) for client in range(workload.played)]


def order(workload: Workload, round_number: int, client: int) -> list[NDArray[np.int64]]:
    """Indices of each step, as the package itself draws them; for contestants that can be told."""
    rng = generator(SEED, "batches", round_number, client)
    shuffled = [rng.permutation(workload.examples) for _ in range(workload.epochs)]
    cuts = np.arange(workload.batch, workload.examples, workload.batch)
    return [step for epoch in shuffled for step in np.split(epoch, cuts)]


def flops_per_step(workload: Workload) -> int:
    """Floating-point operations of one step's products, forward and backward, as torch counts them (2 per addition)."""
    module, (inputs, targets) = network(workload).train(), examples(workload, 0)
    with FlopCounterMode(display=False) as counter:
        functional.cross_entropy(module(inputs[: workload.batch]), targets[: workload.batch]).backward()  # type: ignore[no-untyped-call]
    return int(counter.get_total_flops())


def num_parameters(workload: Workload) -> tuple[int, int]:
    """Trainable parameters, and all."""
    parameters = list(network(workload).parameters())
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)
