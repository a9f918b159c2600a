"""Layers that K clients share a call of, each client with weights of its own.

Activations lie in one of two forms. *Channels*: [B, K·C, ...], the clients' channels side by side, which convolutions
take in groups. *Rows*: [K·B, ..., F], the clients' batches one after another, which everything else takes. In both,
whatever a network does to single entries (ReLU, sums, pooling) it does for all clients as for one, so its own code runs
as it is.

In channels, convolutions and norms are torch's own, K times as wide and with K times as many groups; their tensors are
those of all clients one after another, [K·O, I, ...] and [K·C]. The tensors of all other layers are [K, ...].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import skip_init

Form = Literal["channels", "rows"]


class Folded(nn.Module):
    """A layer of K clients, without tensors as it is made.

    Args:
        layer: The layer of one client; supplies everything but the tensors.
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
        for name in layer._parameters:
            self.register_parameter(name, None)


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


def wide_convolution(layer: nn.Conv1d | nn.Conv2d, clients: int, form: Form) -> nn.Module:
    """The convolution of K clients' channels, [B, K·C, ...] -> [B, K·O, ...]."""
    del form
    made: nn.Module = skip_init(  # type: ignore[no-untyped-call]
        type(layer),
        clients * layer.in_channels,
        clients * layer.out_channels,
        layer.kernel_size,
        stride=layer.stride,
        padding=layer.padding,
        dilation=layer.dilation,
        groups=clients * layer.groups,
        bias=layer.bias is not None,
        padding_mode=layer.padding_mode,
    )
    return made


def wide_norm(layer: nn.GroupNorm | nn.BatchNorm1d | nn.BatchNorm2d, clients: int, form: Form) -> nn.Module:
    """The norm of K clients' channels: groups or channels are each client's own anyway."""
    del form
    if isinstance(layer, nn.GroupNorm):
        return nn.GroupNorm(clients * layer.num_groups, clients * layer.num_channels, layer.eps, layer.affine)
    features, tracks = clients * layer.num_features, layer.track_running_stats
    return type(layer)(features, layer.eps, layer.momentum, layer.affine, tracks)


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


def _plain_batch_norm(layer: nn.BatchNorm1d | nn.BatchNorm2d) -> str | None:
    return None if layer.momentum is not None else "BatchNorm with a cumulative mean"


def _always(_: nn.Module) -> None:
    return None


WIDE = (nn.Conv1d, nn.Conv2d, nn.BatchNorm1d, nn.BatchNorm2d, nn.GroupNorm)
"""Layers that stay what they are, K times as wide."""

KNOWN: dict[type[nn.Module], tuple[Callable[..., nn.Module], tuple[Form, ...], Callable[..., str | None]]] = {
    nn.Linear: (FoldedLinear, ("channels", "rows"), _always),
    nn.Conv1d: (wide_convolution, ("channels",), _always),
    nn.Conv2d: (wide_convolution, ("channels",), _always),
    nn.BatchNorm1d: (wide_norm, ("channels",), _plain_batch_norm),
    nn.BatchNorm2d: (wide_norm, ("channels",), _plain_batch_norm),
    nn.GroupNorm: (wide_norm, ("channels",), _always),
    nn.LayerNorm: (FoldedLayerNorm, ("rows",), _always),
    nn.Embedding: (FoldedEmbedding, ("rows",), _plain_embedding),
}
"""Layers that can be folded: how, in which forms of activations, and what of them cannot (None: all)."""
