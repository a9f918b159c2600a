"""What flows between server and clients, and what an algorithm is: pure functions over explicit state.

A round: ``send`` (server) → ``train`` (each client) → ``receive`` (server). Client functions never see the client
axis: a sequential engine loops over them, a vectorised one maps over them, a network calls them one by one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from fedmerge.core.ensemble import Personal
from fedmerge.core.errors import DivergedError, FedmergeError
from fedmerge.core.vector import Layout

StateT = TypeVar("StateT")
Draw = Callable[[int], Tensor]
"""``draw(j)`` is the j-th initial parameter vector [P] of a run; ``draw(0)`` is the same for every method."""


class Batch(NamedTuple):
    """One step of local training, or one piece of an evaluation.

    Attributes:
        inputs: [B, ...].
        targets: [B] class indices, or [B, L] what each token should give.
        weight: [B] 1/(number of real examples) for each of them and 0 for padding; sums to 1. A method may weigh
            examples by multiplying it.
        lr: [] or [T] learning rate of this step; 0 makes it a step that changes nothing (padding).
    """

    inputs: Tensor
    targets: Tensor
    weight: Tensor
    lr: Tensor


Batches = tuple[Batch, ...]


class Slope(NamedTuple):
    """What one batch says about a parameter vector.

    Attributes:
        loss: [] mean loss of the batch.
        gradient: [T] its gradient with respect to the trainable part.
        buffers: [P − T] the buffers (BatchNorm statistics) after the forward pass.
    """

    loss: Tensor
    gradient: Tensor
    buffers: Tensor


Alter = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(features [B, F], extra) -> features [B, F] for the output layer, and a scalar added to the loss."""


@runtime_checkable
class Task(Protocol):
    """What a client can compute on its own data, on flat vectors [P] whose first T entries are trainable.

    Attributes:
        layout: Which entries of the vector are what.
    """

    layout: Layout

    def gradient(self, params: Tensor, batch: Batch, offset: Tensor | None = None) -> Slope:
        """Loss, gradient and new buffers in training mode; `offset` [B, K] is added to the outputs."""
        ...

    def slope_through(self, params: Tensor, extra: Tensor, batch: Batch, alter: Alter) -> tuple[Slope, Tensor]:
        """`gradient` with the output layer's input changed by `alter`; also the gradient on `extra`."""
        ...

    def features(self, params: Tensor, inputs: Tensor) -> Tensor:
        """Input of the output layer in evaluation mode, [B, F]."""
        ...

    def predict(self, params: Tensor, inputs: Tensor) -> Tensor:
        """Outputs in evaluation mode, [B, K]."""
        ...

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Loss of each example, [B]."""
        ...

    def right(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """How right each answer is, 0..1, [B]."""
        ...

    def loss(self, params: Tensor, batch: Batch) -> Tensor:
        """Mean loss of a batch in evaluation mode, a scalar."""
        ...

    def train(self, params: Tensor, batches: Batches, *, pull: float = 0.0, towards: Tensor | None = None) -> Tensor:
        """Local SGD over `batches`: the vector after training.

        Args:
            params: Where to start.
            batches: One step each.
            pull: Adds ``pull · (θ − towards)`` to the gradient, the slope of ``pull/2 · ‖θ − towards‖²``.
            towards: Centre of the pull; `params` by default.
        """
        ...

    def descend(
        self,
        params: Tensor,
        batches: Batches,
        gradient: Callable[[Tensor, Batch], Slope],
        *,
        pull: float = 0.0,
        towards: Tensor | None = None,
    ) -> Tensor:
        """`train` on another slope than the task's own, with the same local optimiser.

        Args:
            params: Where to start, a vector of any length: entries beyond those of the slope are its buffers.
            batches: One step each; a step of learning rate 0 (padding) changes nothing.
            gradient: Slope at a vector like `params`.
            pull: As for `train`.
            towards: As for `train`.
        """
        ...


class Update(NamedTuple):
    """What a client sends back.

    Attributes:
        delta: [P] parameters before − after local training, the pseudo-gradient g_i.
    """

    delta: Tensor


@dataclass(frozen=True)
class Federation:
    """Public facts that a server knows before the first round.

    Attributes:
        num_clients: N.
        num_trainable: T; entries T..P of every vector are buffers.
        head: Range of the output layer in the vector.
        layers: Ranges of the trainable layers, in order; together they are 0..T.
        norms: Ranges of the trainable entries of normalisation layers.
        head_bias: Range of the biases of a linear output layer, one for each class; None for any other head.
        groups: [N] true groups where they are known (for the oracle only), else None.
        adapters: Whether what is trained are adapters of a pretrained network.
    """

    num_clients: int
    num_trainable: int
    head: tuple[int, int]
    layers: tuple[tuple[int, int], ...]
    norms: tuple[tuple[int, int], ...] = ()
    head_bias: tuple[int, int] | None = None
    groups: tuple[int, ...] | None = None
    adapters: bool = False


@dataclass(frozen=True)
class Cost:
    """What one round costs one client, and what the server keeps.

    Attributes:
        bytes_down: From server to client.
        bytes_up: From client to server.
        server_floats: Numbers the server keeps between rounds.
        extra_forward: Forward passes per training example beside those of training one model.
        extra_backward: Backward passes per training example beside those of training one model.
    """

    bytes_down: int
    bytes_up: int
    server_floats: int
    extra_forward: float = 0
    extra_backward: float = 0


@runtime_checkable
class Algorithm(Protocol[StateT]):
    """A federated method: a frozen dataclass of hyper-parameters with these pure functions.

    Server: ``init``, ``send``, ``receive``, ``cost``, ``describe``, ``mixing``. Client: ``start``, ``train``,
    ``personal``. `State` is a frozen dataclass of tensors; `Local`, which never leaves its client, any tree of tensors.
    A method whose clients train several vectors of the network in a round says so: ``trains_several: ClassVar = True``.
    """

    def init(self, draw: Draw, federation: Federation, seed: int) -> StateT:
        """State before the first round."""
        ...

    def send(self, state: StateT, clients: Int[Tensor, " C"]) -> Any:
        """What each client receives: a tree of tensors with leading axis C."""
        ...

    def receive(
        self, state: StateT, clients: Int[Tensor, " C"], update: Any, num_examples: Int[Tensor, " C"]
    ) -> StateT:
        """State after the replies of one round; call it through `deliver`, which puts clients in id order."""
        ...

    def start(self, params: Float[Tensor, " P"]) -> Any:
        """A client's private state before it first takes part; ``()`` where there is none."""
        ...

    def train(self, down: Any, local: Any, batches: Batches, task: Task) -> tuple[Any, Any]:
        """One client's round: what it sends back and its new private state."""
        ...

    def personal(self, down: Any, local: Any, batches: Batches, task: Task) -> Personal:
        """The model this client would use now; `batches` is one pass over its training data at the first rate."""
        ...

    def cost(self, state: StateT) -> Cost:
        """Declared cost of a round from this state; tests hold it against what is sent."""
        ...

    def describe(self, state: StateT) -> Mapping[str, Any]:
        """Plain facts about the state for records and reports."""
        ...

    def mixing(self, state: StateT) -> Float[Tensor, "N d"] | None:
        """How much of each server model every client's model holds; None where the question makes no sense."""
        ...


def deliver(
    algorithm: Algorithm[StateT],
    state: StateT,
    clients: Int[Tensor, " C"],
    update: Any,
    num_examples: Int[Tensor, " C"],
) -> StateT:
    """Hands the replies of a round to ``receive`` in client-id order: who answered first does not matter.

    Raises:
        FedmergeError: if a client is there twice, a reply is missing, a count is not positive, or a value is not
            finite; the state is untouched then.
    """
    ascending = bool((clients[1:] > clients[:-1]).all())
    order = slice(None) if ascending else torch.argsort(clients)
    clients = clients[order]
    if not ascending and len(torch.unique(clients)) != len(clients):
        raise FedmergeError(f"a client replied twice in one round: {clients.tolist()}")
    if len(num_examples) != len(clients) or any(len(leaf) != len(clients) for leaf in tree_leaves(update)):
        raise FedmergeError(f"expected one reply from each of the {len(clients)} clients of this round")
    if not bool((num_examples > 0).all()):
        raise FedmergeError(f"number of examples must be positive; got {num_examples.tolist()}")
    if not ascending:  # replies that lie on the disk are ordered already, and not to be copied
        update = tree_map(lambda leaf: leaf[order], update)
    for leaf in tree_leaves(update):
        _refuse_non_finite(leaf, clients)
    return algorithm.receive(state, clients, update, num_examples[order])


def _refuse_non_finite(replies: Tensor, clients: Tensor) -> None:
    if replies.numel() == 0:
        return
    rows = replies.reshape(len(replies), -1)
    if bool(torch.isfinite(rows.sum(dim=1)).all()):  # a sum with NaN or infinity in it is not finite
        return
    finite = torch.isfinite(rows.amin(dim=1)) & torch.isfinite(rows.amax(dim=1))  # NaN is both
    if not bool(finite.all()):
        raise DivergedError(
            f"clients {clients[~finite].tolist()} sent NaN or infinite values: their training diverged; "
            "lower the learning rate (training.lr) or check their data"
        )


def state_tensors(state: Any, prefix: str = "") -> dict[str, Tensor]:
    """Every tensor of a state by dotted field name, for saving.

    Raises:
        TypeError: if a field is neither a tensor nor a dataclass of tensors.
    """
    found: dict[str, Tensor] = {}
    for field in dataclasses.fields(state):
        value, name = getattr(state, field.name), prefix + field.name
        if isinstance(value, Tensor):
            found[name] = value
        elif dataclasses.is_dataclass(value):
            found.update(state_tensors(value, name + "."))
        else:
            raise TypeError(f"state field {name} is a {type(value).__name__}; states hold tensors only")
    return found


def with_tensors(state: StateT, tensors: Mapping[str, Tensor], prefix: str = "") -> StateT:
    """A state like `state` with its tensors replaced: the inverse of `state_tensors`.

    Raises:
        FedmergeError: if a tensor is missing, or one of another dtype.
    """
    values: dict[str, Any] = {}
    for field in dataclasses.fields(state):  # type: ignore[arg-type]
        old, name = getattr(state, field.name), prefix + field.name
        if not isinstance(old, Tensor):
            values[field.name] = with_tensors(old, tensors, name + ".")
        elif name not in tensors:
            raise FedmergeError(f"the saved state has no {name!r}; it holds {', '.join(sorted(tensors))}")
        else:
            values[field.name] = in_type(tensors[name], old.dtype)
            if values[field.name] is None:
                raise FedmergeError(f"the saved state's {name!r} is {tensors[name].dtype}; expected {old.dtype}")
    return dataclasses.replace(state, **values)  # type: ignore[type-var]


_COUNTS = (torch.int32, torch.int64)


def in_type(found: Tensor, dtype: torch.dtype) -> Tensor | None:
    """A saved tensor in the type that it has now; None if that is another one than it was saved in.

    Whole numbers may have been wider or narrower, as long as every one of them fits.
    """
    if found.dtype == dtype:
        return found
    if found.dtype not in _COUNTS or dtype not in _COUNTS:
        return None
    cast = found.to(dtype)
    return cast if torch.equal(cast.long(), found.long()) else None


SERVER_MODELS = ("soup.models", "averages.models", "models")
"""Where states keep the server's models [d, P], by dotted field name."""


def innermost(state: Any) -> Any:
    """The method's own state: a method around a method keeps that of the inner one as ``method``."""
    while hasattr(state, "method"):
        state = state.method
    return state


def own_name(name: str) -> str:
    """A tensor's name in the method's own state.

    >>> own_name("method.method.soup.models"), own_name("models")
    ('soup.models', 'models')
    """
    while name.startswith("method."):
        name = name.removeprefix("method.")
    return name


def server_models(state: Any) -> Tensor | None:
    """The server's models in a state, that of a method around a method included; None where it keeps none."""
    tensors = state_tensors(innermost(state))
    found = (tensors[name] for name in SERVER_MODELS if name in tensors)
    return next((models for models in found if models.dim() == 2), None)


def with_server_models(state: StateT, models: Tensor) -> StateT:
    """The state with other models on the server."""
    tensors = state_tensors(state)
    names = {own_name(name): name for name in tensors}
    name = next(names[known] for known in SERVER_MODELS if known in names)
    return with_tensors(state, {**tensors, name: models})


def tree_bytes(tree: Any) -> int:
    """Bytes of all tensors in a tree, as they would travel."""
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def take(tree: Any, index: int) -> Any:
    """One client's part of a tree with a leading client axis."""
    return tree_map(lambda leaf: leaf[index], tree)


def stack(trees: Sequence[Any]) -> Any:
    """Trees of single clients as one tree with a leading client axis."""
    return tree_map(lambda *leaves: torch.stack(leaves), *trees)
