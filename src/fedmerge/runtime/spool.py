"""Replies of a round on the disk: the server's memory does not grow with the number of clients that answer."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Set
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedmerge.core.replies import Reply, Template


class Cohort(Set[int]):
    """The clients of a round: 8 bytes for each, where a set of whole numbers takes about 80.

    >>> cohort = Cohort([7, 3, 12])
    >>> list(cohort), 12 in cohort, 4 in cohort, cohort.place(7)
    ([3, 7, 12], True, False, 1)

    Args:
        clients: In any order, each once.
    """

    def __init__(self, clients: Iterable[int] | Tensor) -> None:
        given = clients if isinstance(clients, Tensor) else torch.tensor(list(clients), dtype=torch.int64)
        self.ids = given.sort().values
        """[C] ascending."""
        self._numbers: memoryview[int] = self.ids.numpy().data.cast("B").cast("q")

    def place(self, client: int) -> int:
        """How many clients of the cohort have a smaller number."""
        return bisect_left(self._numbers, client)

    def __contains__(self, client: object) -> bool:
        if not isinstance(client, int):
            return False
        place = self.place(client)
        return place < len(self) and self._numbers[place] == client

    def __iter__(self) -> Iterator[int]:
        return iter(self._numbers)

    def __len__(self) -> int:
        return len(self._numbers)


class Spool:
    """Takes the admitted replies of one round, in any order, and gives them as one update in client order.

    Each tensor of the update is one file, mapped into memory, in which every client of the cohort has its place; the
    system may write it out and drop it from memory at any time. A server step goes over them a block at a time and as
    often as its method needs. FedMerge's default order, weights first, needs all of them before the models move, whose
    shares are those of the new weights; with ``order="together"`` the shares are known before the first reply comes, up
    to a division at the end.

    Args:
        folder: Where the files lie; they are made anew.
        template: Of an update.
        cohort: Clients that may reply.
    """

    def __init__(self, folder: Path, template: Template, cohort: Iterable[int]) -> None:
        self._template = template
        self._cohort = cohort if isinstance(cohort, Cohort) else Cohort(cohort)
        self._counts = torch.zeros(len(self._cohort), dtype=torch.int64)  # 0 for those that have not replied
        self._mapped = {
            name: _mapped(folder / f"reply-{number}", (len(self._cohort), *form.shape), form.dtype)
            for number, (name, form) in enumerate(template.forms.items())
        }

    def take(self, reply: Reply) -> None:
        """Writes one admitted reply to its place.

        Args:
            reply: Of a client of the cohort that has not replied yet.
        """
        place = self._cohort.place(reply.client)
        for name, tensor in reply.tensors.items():
            self._mapped[name][place] = tensor
        self._counts[place] = reply.num_examples

    def gathered(self) -> tuple[Tensor, Any, Tensor]:
        """Clients [C] that replied, ascending; their update with a leading axis C, on the disk; their counts [C].

        Clients that did not reply leave gaps, which are closed in place: nothing can be taken in afterwards.
        """
        places = self._counts.nonzero()[:, 0]
        if len(places) < len(self._cohort):
            for target, source in enumerate(places.tolist()):
                if source != target:
                    for tensor in self._mapped.values():
                        tensor[target] = tensor[source]
        kept: Mapping[str, Tensor] = {name: tensor[: len(places)] for name, tensor in self._mapped.items()}
        return self._cohort.ids[places], self._template.update_of(kept), self._counts[places]


def _mapped(path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor whose memory is a file of its own, private to its owner."""
    size = torch.Size(shape).numel()
    path.unlink(missing_ok=True)
    path.touch(mode=0o600)
    with path.open("rb+") as file:
        file.truncate(max(1, size) * torch.empty((), dtype=dtype).element_size())
    return torch.from_file(str(path), shared=True, size=size, dtype=dtype).reshape(shape)
