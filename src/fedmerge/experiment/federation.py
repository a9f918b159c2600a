"""From a configuration to data and network."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fedmerge.core.errors import DataError, FedmergeError, UsageError
from fedmerge.core.protocol import Federation
from fedmerge.core.randomness import fresh_module_randomness
from fedmerge.core.vector import Layout, twin
from fedmerge.data import ClientData, Examples, FederatedData, FolderOptions, deal, from_folder
from fedmerge.data.encoding import Encoder
from fedmerge.models import accepted


def load_data(source: Any, partition: Any, seed: int, model: Any = None) -> FederatedData:
    """The clients that a configuration asks for.

    Args:
        source: A registered source or `FolderOptions`.
        partition: A registered partition; None for a folder.
        seed: Of the partition.
        model: The network's recipe, whose encoder reads texts.
    """
    encoder = encoder_of(model)
    if isinstance(source, FolderOptions):
        return from_folder(source, seed=seed, encoder=encoder)
    pool = source.load()
    _refuse_crowd(partition, len(pool), pool.name)
    return deal(pool, partition.split(pool, seed), encoder)


_MOST_CLIENTS_PER_ITEM = 100  # some ways of dealing out give an item to several clients


def _refuse_crowd(partition: Any, num_items: int, pool: str) -> None:
    """Refuses numbers of clients that no pool can serve before anything of that size is made."""
    for name in ("clients", "clients_per_domain", "clients_per_task"):
        asked = getattr(partition, name, None)
        if isinstance(asked, int) and asked > _MOST_CLIENTS_PER_ITEM * num_items:
            raise DataError(
                f"partition.{name}: got {asked} for {pool}, which has {num_items} items; every client needs one at "
                "least: take fewer clients"
            )


def encoder_of(model: Any) -> Encoder | None:
    """What makes texts into tokens for a network; None for networks that read numbers."""
    return model.encoder() if hasattr(model, "encoder") else None


def in_precision(data: FederatedData, dtype: torch.dtype) -> FederatedData:
    """The same clients with inputs of another floating-point type; whole numbers stay."""

    def cast(examples: Examples) -> Examples:
        if not examples.inputs.is_floating_point():
            return examples
        return Examples(examples.inputs.to(dtype), examples.targets)

    def cast_client(client: ClientData) -> ClientData:
        return replace(client, train=cast(client.train), validation=cast(client.validation), test=cast(client.test))

    return replace(data, clients=tuple(cast_client(client) for client in data.clients))


def channels_last(data: FederatedData) -> FederatedData:
    """The same clients with images laid out as convolutions like them; other inputs as they are."""

    def lay(examples: Examples) -> Examples:
        if examples.inputs.dim() != 4:
            return examples
        return Examples(examples.inputs.contiguous(memory_format=torch.channels_last), examples.targets)

    clients = [replace(c, train=lay(c.train), validation=lay(c.validation), test=lay(c.test)) for c in data.clients]
    return replace(data, clients=tuple(clients))


def make_module(
    model: Any, data: FederatedData, seed: int, draw: int = 0, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """The `draw`-th fresh network of a run; the same for every method.

    Args:
        model: A recipe, a module (copied as it is for draw 0, re-initialised after that), or a function or class
            that makes one; it is given `input_shape` and `num_classes` if it takes them.
        data: Gives input shape and number of classes.
        seed: The run's.
        draw: Which of the run's initial networks.
        dtype: Of its floating-point tensors.
    """
    with fresh_module_randomness(seed, "initial weights", draw):
        if isinstance(model, nn.Module):
            module = _copied(model, dtype) if draw == 0 else _redrawn(model)
        else:
            module = _made(model, data)
    if not isinstance(module, nn.Module):
        raise UsageError(f"model: your function gave a {type(module).__name__}; expected a torch.nn.Module")
    return module.to(dtype) if dtype == torch.float64 else module


def _made(model: Any, data: FederatedData) -> Any:
    """What a recipe or a user's function makes."""
    if not callable(model) and not hasattr(model, "build"):
        raise UsageError(
            f"model: got a {type(model).__name__}; expected a name, a torch.nn.Module, or a function that makes one"
        )
    try:
        if not callable(model):
            return model.build(data.input_shape, data.num_classes)
        return model(**accepted(model, {"input_shape": data.input_shape, "num_classes": data.num_classes}))
    except FedmergeError:
        raise
    except Exception as error:  # too large for this machine, or whatever a user's function raises
        name = getattr(model, "__name__", type(model).__name__)
        raise UsageError(f"model {name} could not be made: {type(error).__name__}: {error}") from error


def _copied(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy that shares frozen parameters, unless they are to be of another type than the caller's."""
    return copy.deepcopy(module) if dtype == torch.float64 else twin(module)


def _redrawn(module: nn.Module) -> nn.Module:
    """A copy with fresh weights, by each layer's own ``reset_parameters``."""
    redrawn = copy.deepcopy(module)
    lacking = [
        name
        for name, part in redrawn.named_modules()
        if any(True for _ in part.parameters(recurse=False)) and not hasattr(part, "reset_parameters")
    ]
    if lacking:
        raise UsageError(
            f"this method starts from several draws, but {', '.join(repr(name) for name in lacking)} of your module "
            "has no reset_parameters(); give a function that makes a fresh module instead of a module"
        )
    for part in redrawn.modules():
        reset = getattr(part, "reset_parameters", None)
        if callable(reset):
            reset()
    return redrawn


def drawer(model: Any, data: FederatedData, seed: int, layout: Layout, dtype: torch.dtype) -> Callable[[int], Tensor]:
    """``draw(j)``: the j-th initial parameter vector."""
    return lambda j: layout.read(make_module(model, data, seed, j, dtype))


def federation_facts(data: FederatedData, layout: Layout) -> Federation:
    """What a method is told before the first round."""
    return Federation(
        num_clients=len(data.clients),
        num_trainable=layout.num_trainable,
        head=layout.head,
        layers=layout.layers,
        norms=layout.norms,
        head_bias=layout.head_bias,
        groups=data.groups,
        adapters=layout.has_adapters,
    )
