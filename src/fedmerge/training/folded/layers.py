"""Layers that K clients share a call of, each client with weights of its own.

Activations lie in one of two forms. *Channels*: [B, K·C, ...], the clients' channels side by side, which convolutions
take in groups. *Rows*: [K·B, ..., F], the clients' batches one after another, which everything else takes. In both,
whatever a network does to single entries (ReLU, sums, pooling) it does for all clients as for one, so its own code runs
as it is. Weights are [K·O, I, ...] for convolutions and [K, ...] elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

Form = Literal["channels", "rows"]


class Folded(nn.Module):
    """A layer of K clients.

    Args:
        layer: The layer of one client; supplies everything but the tensors, which the fold registers under its names.
        clients: K.
        form: Of the activations.
    """

    layer: Any
    weight: Any
    bias: Any

    def __init__(self, layer: nn.Module, clients: int, form: Form) -> None:
        super().__init__()
        self.clients, self.form = clients, form
        object.__setattr__(self, "layer", layer)  # its own tensors are not this module's

    def hold(self, name: str, tensor: Tensor | None) -> None:
        """Registers a tensor of all clients under its name in the layer."""
        if tensor is None or isinstance(tensor, nn.Parameter):
            self.register_parameter(name, tensor)
        else:
            self.register_buffer(name, tensor)

    def every(self, name: str) -> Any:
        """A tensor of all clients [K, n] as the one [K·n] of a layer that is K times as wide; None if there is none."""
        tensor = getattr(self, name)
        return None if tensor is None else tensor.flatten(0, 1)


class FoldedLinear(Folded):
    """``nn.Linear``: one batched product."""

    def forward(self, inputs: Tensor) -> Tensor:
        """[B, K·I] -> [B, K·O] or [K·B, ..., I] -> [K·B, ..., O]."""
        K, weight = self.clients, self.weight.transpose(1, 2)
        if self.form == "channels":
            rows = inputs.reshape(len(inputs), K, -1).transpose(0, 1)
            return self._product(rows, weight).transpose(0, 1).flatten(1)
        found = self._product(inputs.reshape(K, -1, inputs.shape[-1]), weight)
        return found.view(*inputs.shape[:-1], found.shape[-1])

    def _product(self, rows: Tensor, weight: Tensor) -> Tensor:
        return torch.bmm(rows, weight) if self.bias is None else torch.baddbmm(self.bias[:, None], rows, weight)


class FoldedConvolution(Folded):
    """``nn.Conv1d`` and ``nn.Conv2d``: K times as many groups."""

    def forward(self, inputs: Tensor) -> Tensor:
        """[B, K·C, ...] -> [B, K·O, ...]."""
        layer, groups = self.layer, self.clients * self.layer.groups
        flat = isinstance(layer, nn.Conv1d)
        weight, apply = (self.every("weight"), functional.conv1d) if flat else (self.weight, functional.conv2d)
        found: Tensor = apply(inputs, weight, self.every("bias"), layer.stride, layer.padding, layer.dilation, groups)
        return found


class FoldedBatchNorm(Folded):
    """``nn.BatchNorm1d`` and ``nn.BatchNorm2d``: statistics of each channel of each client."""

    num_batches_tracked: Any

    def forward(self, inputs: Tensor) -> Tensor:
        """[B, K·C, ...] -> the same shape; moves the running statistics in training."""
        layer = self.layer
        if self.training and layer.track_running_stats:
            self.num_batches_tracked += 1
        return functional.batch_norm(
            inputs,
            self.every("running_mean"),
            self.every("running_var"),
            self.every("weight"),
            self.every("bias"),
            self.training or not layer.track_running_stats,
            layer.momentum,
            layer.eps,
        )


class FoldedGroupNorm(Folded):
    """``nn.GroupNorm``: K times as many groups."""

    def forward(self, inputs: Tensor) -> Tensor:
        """[B, K·C, ...] -> the same shape."""
        layer = self.layer
        groups = self.clients * layer.num_groups
        return functional.group_norm(inputs, groups, self.every("weight"), self.every("bias"), layer.eps)


class FoldedLayerNorm(Folded):
    """``nn.LayerNorm``: each client's own scale and shift of what is normalised for all."""

    def forward(self, inputs: Tensor) -> Tensor:
        """[K·B, ..., F] -> the same shape."""
        layer, K = self.layer, self.clients
        found = functional.layer_norm(inputs, layer.normalized_shape, eps=layer.eps)
        if self.weight is None:
            return found
        split: Tensor = found.view(K, -1, *layer.normalized_shape)
        split = split * self.weight[:, None]
        split = split if self.bias is None else split + self.bias[:, None]
        return split.view(inputs.shape)


class FoldedEmbedding(Folded):
    """``nn.Embedding``: one table of K·V rows."""

    def forward(self, inputs: Tensor) -> Tensor:
        """[K·B, ...] -> [K·B, ..., F]."""
        K, V = self.clients, self.weight.shape[1]
        first = torch.arange(K, device=inputs.device).repeat_interleave(len(inputs) // K) * V
        places = inputs + first.view(-1, *[1] * (inputs.dim() - 1))
        return functional.embedding(places, self.weight.flatten(0, 1))


def _plain_embedding(layer: nn.Embedding) -> str | None:
    plain = layer.max_norm is None and not layer.sparse and layer.padding_idx is None
    return None if plain else "embeddings with padding, sparse gradients or a largest norm"


def _plain_convolution(layer: nn.Conv1d | nn.Conv2d) -> str | None:
    return None if layer.padding_mode == "zeros" else "convolutions that pad with other than zeros"


def _plain_batch_norm(layer: nn.BatchNorm1d | nn.BatchNorm2d) -> str | None:
    return None if layer.momentum is not None else "BatchNorm with a cumulative mean"


def _always(_: nn.Module) -> None:
    return None


KNOWN: dict[type[nn.Module], tuple[type[Folded], tuple[Form, ...], Callable[..., str | None]]] = {
    nn.Linear: (FoldedLinear, ("channels", "rows"), _always),
    nn.Conv1d: (FoldedConvolution, ("channels",), _plain_convolution),
    nn.Conv2d: (FoldedConvolution, ("channels",), _plain_convolution),
    nn.BatchNorm1d: (FoldedBatchNorm, ("channels",), _plain_batch_norm),
    nn.BatchNorm2d: (FoldedBatchNorm, ("channels",), _plain_batch_norm),
    nn.GroupNorm: (FoldedGroupNorm, ("channels",), _always),
    nn.LayerNorm: (FoldedLayerNorm, ("rows",), _always),
    nn.Embedding: (FoldedEmbedding, ("rows",), _plain_embedding),
}
"""Layers that can be folded: by what, in which forms of activations, and what of them cannot (None: all)."""
