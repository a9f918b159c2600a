"""Where clients are computed: the clients' examples stay there, vectors come and go with a round."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from fedmerge.core.errors import UsageError
from fedmerge.data import Examples
from fedmerge.training import Planned

Arithmetic = Literal["float32", "float64", "tf32", "bfloat16"]


def device_of(name: str) -> torch.device:
    """The device of this name.

    Raises:
        UsageError: if there is none.
    """
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(f"device: got {name!r}, which cannot be used here ({reason}); expected cpu or cuda") from error
    return device


@dataclass(frozen=True)
class Place:
    """A device and its arithmetic.

    Attributes:
        device: Where clients are computed; the server stays on the CPU.
        arithmetic: ``tf32`` and ``bfloat16`` take matrix products and convolutions of float32 vectors in fewer bits.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    arithmetic: Arithmetic = "float32"
    _resident: dict[int, tuple[Examples, Examples]] = field(default_factory=dict, compare=False, repr=False)

    @property
    def is_here(self) -> bool:
        """Whether nothing needs to be moved."""
        return self.device.type == "cpu"

    def there(self, tree: Any) -> Any:
        """Tensors on the device; planned steps on examples that are there already, or stay there from now on."""
        if self.is_here:
            return tree
        return tree_map(self._leaf, tree, is_leaf=lambda leaf: isinstance(leaf, Planned))

    def _leaf(self, leaf: Any) -> Any:
        if isinstance(leaf, Planned):
            return replace(leaf, examples=self._examples(leaf.examples))
        return leaf.to(self.device, non_blocking=True) if isinstance(leaf, Tensor) else leaf

    def _examples(self, examples: Examples) -> Examples:
        known = self._resident.get(id(examples))
        if known is None or known[0] is not examples:  # what is kept keeps its key's owner alive
            known = examples, Examples(examples.inputs.to(self.device), examples.targets.to(self.device))
            self._resident[id(examples)] = known
        return known[1]

    def with_examples(self, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments with planned steps on examples that are there; everything else where it is."""
        return tuple(self.there(leaf) if isinstance(leaf, Planned) else leaf for leaf in arguments)

    def back(self, tree: Any) -> Any:
        """Tensors on the CPU."""
        return tree if self.is_here else tree_map(lambda leaf: leaf.cpu() if isinstance(leaf, Tensor) else leaf, tree)

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Within the block products are computed as `arithmetic` says."""
        if self.arithmetic == "bfloat16":
            # Steps move weights in place: a cached cast of them would be that of the first step.
            with torch.autocast(self.device.type, dtype=torch.bfloat16, cache_enabled=False):
                yield
        elif self.arithmetic == "tf32":
            before = torch.get_float32_matmul_precision()
            convolutions = torch.backends.cudnn.allow_tf32
            torch.set_float32_matmul_precision("high")
            torch.backends.cudnn.allow_tf32 = True
            try:
                yield
            finally:
                torch.set_float32_matmul_precision(before)
                torch.backends.cudnn.allow_tf32 = convolutions
        else:
            yield


HERE = Place()
"""The CPU, in the vectors' own precision."""
