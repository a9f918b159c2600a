"""The gradient of a perceptron in closed form: what autograd computes, without its bookkeeping.

Small layers on small batches spend most of their time in autograd and in the transforms that map it over clients. For
linear layers with ReLU between them and cross-entropy the chain rule is a few products, which map over clients as
they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from fedmerge.core.protocol import Batch, Slope
from fedmerge.core.vector import Layout


@dataclass(frozen=True)
class Link:
    """A linear layer.

    Attributes:
        weight: Name of its weight.
        bias: Name of its bias, if it has one.
        relu: Whether ReLU follows.
    """

    weight: str
    bias: str | None
    relu: bool


@dataclass(frozen=True)
class Chain:
    """A perceptron.

    Attributes:
        links: Its layers in the order in which they are applied.
        flattens: Whether it flattens its inputs first.
    """

    links: tuple[Link, ...]
    flattens: bool

    def takes(self, inputs: Tensor) -> bool:
        """Whether `inputs` [B, ...] are vectors to the first layer."""
        return self.flattens or inputs.ndim == 2


def chain_of(module: nn.Module, layout: Layout) -> Chain | None:
    """The linear layers of a plain `nn.Sequential` of Flatten, Linear and ReLU; None for any other network.

    Also None where a layer is frozen, shares a tensor with another, has another dtype or carries a hook, and where the
    network has buffers.
    """
    if type(module) is not nn.Sequential or not layout.has_uniform_dtype or _is_watched(module):
        return None
    if layout.num_params > layout.num_trainable:
        return None
    links: list[Link] = []
    flattens = False
    for name, part in module._modules.items():  # unlike named_children, a module that stands there twice comes twice
        if type(part) is nn.Linear:
            links.append(Link(f"{name}.weight", None if part.bias is None else f"{name}.bias", relu=False))
        elif type(part) is nn.ReLU and links and not links[-1].relu:
            links[-1] = Link(links[-1].weight, links[-1].bias, relu=True)
        elif type(part) is nn.Flatten and not links and (part.start_dim, part.end_dim) == (1, -1):
            flattens = True
        else:
            return None
    tensors = [name for link in links for name in (link.weight, link.bias) if name is not None]
    trainable = [slot.name for slot in layout.slots if slot.role != "buffer"]
    whole = links and not links[-1].relu and sorted(tensors) == sorted(trainable)
    return Chain(tuple(links), flattens) if whole else None


def _is_watched(module: nn.Module) -> bool:
    return any(
        part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks
        for part in module.modules()
    )


def gradient(
    chain: Chain, layout: Layout, params: Float[Tensor, " P"], batch: Batch, offset: Float[Tensor, "B K"] | None = None
) -> Slope:
    """Loss and gradient [T] of the weighted cross-entropy; `offset` is added to the outputs. There are no buffers."""
    tensors = layout.views(params)
    inputs, outputs = [], batch.inputs.flatten(1)
    for link in chain.links:
        inputs.append(outputs)
        outputs = functional.linear(outputs, tensors[link.weight], None if link.bias is None else tensors[link.bias])
        outputs = outputs.relu() if link.relu else outputs
    logs = torch.log_softmax(outputs if offset is None else outputs + offset, dim=1)
    loss = -(logs.gather(1, batch.targets[:, None])[:, 0] * batch.weight).sum()
    right = batch.targets[:, None] == torch.arange(logs.shape[1], device=logs.device)
    slope = (logs.exp() - right.to(logs.dtype)) * batch.weight[:, None]  # of the loss, on the outputs
    slopes: dict[str, Tensor] = {}
    for number, link in reversed(list(enumerate(chain.links))):
        before = inputs[number]
        slopes[link.weight] = slope.T @ before
        if link.bias is not None:
            slopes[link.bias] = slope.sum(dim=0)
        if number:
            slope = slope @ tensors[link.weight]
            slope = torch.where(before > 0, slope, 0) if chain.links[number - 1].relu else slope
    return Slope(loss, layout.flatten(slopes), params[:0])


def outputs(
    chain: Chain, weights: Mapping[str, Tensor], inputs: Float[Tensor, "K B F"]
) -> tuple[list[Tensor], Float[Tensor, "K B C"]]:
    """What each layer of K perceptrons is given, and what the last one gives."""
    given, values = [], inputs
    for link in chain.links:
        given.append(values)
        weight = weights[link.weight].transpose(1, 2)
        bias = None if link.bias is None else weights[link.bias][:, None]
        values = torch.bmm(values, weight) if bias is None else torch.baddbmm(bias, values, weight)
        values = values.relu_() if link.relu else values
    return given, values


def write_slopes(
    chain: Chain,
    weights: Mapping[str, Tensor],
    into: Mapping[str, Tensor],
    batch: Batch,
    offset: Float[Tensor, "K B C"] | None = None,
) -> Float[Tensor, "K B C"]:
    """Writes the gradient of K perceptrons' weighted cross-entropies; `offset` is added to the outputs.

    Args:
        chain: The layers.
        weights: By name, with a leading client axis.
        into: Where the gradient goes, by name, of the same shapes.
        batch: Of all clients, each tensor with a leading client axis.
        offset: If there is one.

    Returns:
        The outputs, offset included.
    """
    given, values = outputs(chain, weights, batch.inputs.flatten(2))
    values = values if offset is None else values + offset
    slope = torch.softmax(values, dim=2)  # of the loss, on the outputs
    slope.scatter_add_(2, batch.targets[:, :, None], -torch.ones_like(slope[:, :, :1]))
    slope.mul_(batch.weight[:, :, None])
    for number, link in reversed(list(enumerate(chain.links))):
        before = given[number]
        torch.bmm(slope.transpose(1, 2), before, out=into[link.weight])
        if link.bias is not None:
            torch.sum(slope, dim=1, out=into[link.bias])
        if number:
            slope = torch.bmm(slope, weights[link.weight])
            slope = slope.mul_(before > 0) if chain.links[number - 1].relu else slope
    return values
