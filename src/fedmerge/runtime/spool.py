"""Replies of a round on the disk: the server's memory does not grow with the number of clients that answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedmerge.core.replies import Reply, Template


class Spool:
    """Takes the admitted replies of one round, in any order, and gives them as one update in client order.

    Each tensor of the update is one file, mapped into memory, in which every client of the cohort has its place; the
    system may write it out and drop it from memory at any time.

    Args:
        folder: Where the files lie; they are made anew.
        template: Of an update.
        cohort: Clients that may reply, ascending.
    """

    def __init__(self, folder: Path, template: Template, cohort: Sequence[int]) -> None:
        self._template, self._cohort = template, tuple(cohort)
        self._place = {client: place for place, client in enumerate(self._cohort)}
        self._counts: dict[int, int] = {}
        self._mapped = {
            name: _mapped(folder / f"reply-{number}", (len(self._cohort), *form.shape), form.dtype)
            for number, (name, form) in enumerate(template.forms.items())
        }

    def take(self, reply: Reply) -> None:
        """Writes one admitted reply to its place.

        Args:
            reply: Of a client of the cohort that has not replied yet.
        """
        place = self._place[reply.client]
        for name, tensor in reply.tensors.items():
            self._mapped[name][place] = tensor
        self._counts[reply.client] = reply.num_examples

    def gathered(self) -> tuple[Tensor, Any, Tensor]:
        """Clients [C] that replied, ascending; their update with a leading axis C, on the disk; their counts [C].

        Clients that did not reply leave gaps, which are closed in place: nothing can be taken in afterwards.
        """
        replied = [client for client in self._cohort if client in self._counts]
        for target, client in enumerate(replied):
            source = self._place[client]
            if source != target:
                for tensor in self._mapped.values():
                    tensor[target] = tensor[source]
        kept: Mapping[str, Tensor] = {name: tensor[: len(replied)] for name, tensor in self._mapped.items()}
        counts = torch.tensor([self._counts[client] for client in replied], dtype=torch.int64)
        return torch.tensor(replied, dtype=torch.int64), self._template.update_of(kept), counts


def _mapped(path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor whose memory is a file of its own, private to its owner."""
    size = torch.Size(shape).numel()
    path.unlink(missing_ok=True)
    path.touch(mode=0o600)
    with path.open("rb+") as file:
        file.truncate(max(1, size) * torch.empty((), dtype=dtype).element_size())
    return torch.from_file(str(path), shared=True, size=size, dtype=dtype).reshape(shape)
