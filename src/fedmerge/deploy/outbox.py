"""What the server sends to each site, made when it is needed, and what it expects back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fedmerge.core.protocol import take
from fedmerge.core.replies import Template, template_of
from fedmerge.data import Examples
from fedmerge.data.encoding import Kind
from fedmerge.data.form import TOKENS
from fedmerge.deploy.messages import Letter, Order, text_of
from fedmerge.deploy.schema import DataSchema
from fedmerge.deploy.trees import form_of
from fedmerge.experiment.simulation import Setup
from fedmerge.runtime import first_fleet
from fedmerge.runtime.rounds import ClientRound
from fedmerge.training import LocalTraining, Planned

MOST_BYTES = 1 << 29
"""Of messages that are made at once."""
FEWEST = 16
"""Messages that are made at once, if there are so many sites."""
_EXAMPLES = 4
"""Of the made-up site that shows what an update looks like; normalisation over a batch needs several."""

NO_UPDATE = template_of(())
"""What comes back where nobody trains."""


class Outbox:
    """The messages of a round to some clients, a block of them in memory at a time.

    Products of matrices round a row alike whatever rows stand beside it, but not where there are only a few: of 16
    and more, all rows had the bits that they have among all. So a block has that many, and the last one overlaps.

    Args:
        setup: Of the run.
        state: The server's.
        clients: Of all that are to get one, ascending.
        most_bytes: Of a block.
    """

    def __init__(self, setup: Setup, state: Any, clients: Sequence[int], *, most_bytes: int = MOST_BYTES) -> None:
        self._setup, self._state, self._clients = setup, state, list(clients)
        self._place = {client: place for place, client in enumerate(self._clients)}
        each = max(1, setup.played.cost(state).bytes_down)
        self._size = max(FEWEST, most_bytes // each)
        self._start, self._made = -1, None

    def of(self, client: int) -> Any:
        """What one client gets: a tree of tensors."""
        place = self._place[client]
        start = min(place - place % self._size, max(0, len(self._clients) - self._size))
        if start != self._start:
            block = torch.tensor(self._clients[start : start + self._size], dtype=torch.int64)
            self._start, self._made = start, self._setup.played.send(self._state, block)
        return take(self._made, place - start)


class Templates:
    """What an update looks like, as the method's own code makes it: a made-up client takes one step.

    It depends on the form of what the client received, so that one template serves all rounds that send alike.

    Args:
        setup: Of the run.
        schema: Form of the data.
    """

    def __init__(self, setup: Setup, schema: DataSchema) -> None:
        self._setup, self._schema = setup, schema
        self._known: dict[str, Template] = {}

    def answering(self, received: Any) -> Template:
        """Of the update of a client that received this tree."""
        key = repr((form_of(received), [(leaf.shape, leaf.dtype) for leaf in tree_leaves(received)]))
        if key not in self._known:
            self._known[key] = self._made(received)
        return self._known[key]

    def _made(self, received: Any) -> Template:
        setup = self._setup
        layout, options = setup.layout, setup.options
        training = replace(setup.training, steps=1, epochs=LocalTraining.epochs)  # more steps have the same form
        fleet = first_fleet(setup.played, layout.read(setup.module), 1, layout.num_trainable, options.buffers)
        plan = Planned(_made_up(self._schema, options.dtype), training, training.lr, options.seed, 1, 0)
        job = (received, fleet.private[0], plan, fleet.buffers[0])
        update, _, _ = setup.engine.map(ClientRound(setup.played, fleet.rules), [job])[0]
        return template_of(update)


def _made_up(schema: DataSchema, dtype: torch.dtype) -> Examples:
    shape = (_EXAMPLES, *schema.input_shape)
    kind: Kind = schema.kind
    if schema.form.dtype == TOKENS:
        inputs: Tensor = torch.zeros(shape, dtype=torch.int64)
    else:
        inputs = torch.linspace(-1, 1, torch.Size(shape).numel()).reshape(shape).to(dtype)
    targets = torch.arange(_EXAMPLES) % schema.num_classes
    return Examples(inputs, targets if kind == "classes" else torch.zeros(shape, dtype=torch.int64))


def lettered(order: Order, tree: Any) -> Letter:
    """An order with the tensors of the tree that goes with it."""
    return Letter(text_of(order), {str(k): leaf for k, leaf in enumerate(tree_leaves(tree))})
