"""The stack of equal blocks that a transformer is, and a memory of what its frozen lower part makes of an example."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence


def stack_of_blocks(body: nn.Module) -> tuple[str, nn.ModuleList] | None:
    """Name and list of the largest stack of blocks of one class; None if there is none of two or more."""
    stacks = [
        (name, part)
        for name, part in body.named_modules()
        if isinstance(part, nn.ModuleList) and len(part) > 1 and len({type(block) for block in part}) == 1
    ]
    return max(stacks, key=lambda entry: sum(p.numel() for p in entry[1].parameters()), default=None)


def frozen_below(blocks: Iterable[nn.Module]) -> int:
    """How many blocks come before the first that is trained."""
    trained = [i for i, block in enumerate(blocks) if any(p.requires_grad for p in block.parameters())]
    return trained[0] if trained else 0


class Memory:
    """Outputs of the frozen part by example, shared by every copy of its network.

    Attributes:
        outputs: What is remembered, by the bytes of an input row.
    """

    def __init__(self) -> None:
        self.outputs: dict[bytes, Tensor] = {}
        self._given: Tensor | None = None
        self._noted: list[Tensor] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Memory:
        return self

    @property
    def num_bytes(self) -> int:
        """Size of all that is remembered."""
        return sum(output.numel() * output.element_size() for output in self.outputs.values())

    def recalled(self, inputs: Int[Tensor, "B l"]) -> Float[Tensor, "B l H"] | None:
        """Remembered outputs of a batch, padded with 0; None if one is not known."""
        if not self.outputs:
            return None
        found = [self.outputs.get(key) for key in _keys(inputs)]
        known = [output for output in found if output is not None]
        return pad_sequence(known, batch_first=True) if len(known) == len(found) else None

    def unknown(self, inputs: Int[Tensor, "n L"]) -> list[int]:
        """Rows to be computed, each text once: none if exactly these are known, else all, and the others are forgotten.

        What is computed together rounds together: a run gives the same bits whatever its process did before.
        """
        first = {key: row for row, key in reversed(list(enumerate(_keys(inputs))))}
        if self.outputs.keys() == first.keys():
            return []
        self.outputs = {}
        return sorted(first.values())

    def learn(self, inputs: Int[Tensor, "B l"], outputs: Float[Tensor, "B l H"]) -> None:
        """Keeps the outputs of a batch, each as long as its example."""
        for key, output, length in zip(_keys(inputs), outputs, row_lengths(inputs), strict=True):
            self.outputs[key] = output[:length].clone()

    @contextmanager
    def giving(self, outputs: Tensor | None) -> Iterator[None]:
        """Within the block the frozen part gives these outputs instead of computing; None: it computes."""
        self._given = outputs
        try:
            yield
        finally:
            self._given = None

    @contextmanager
    def noting(self, noted: list[Tensor]) -> Iterator[None]:
        """Within the block the outputs of the frozen part are appended to `noted`."""
        self._noted = noted
        try:
            yield
        finally:
            self._noted = None

    def passed(self, block: nn.Module, hidden: Tensor, is_last: bool, *args: Any, **kwargs: Any) -> Any:
        """What a frozen block gives: its own output, or what is remembered."""
        if self._given is not None:
            return self._given if is_last else hidden
        output = block(hidden, *args, **kwargs)
        if is_last and self._noted is not None:
            self._noted.append((output[0] if isinstance(output, tuple) else output).detach())
        return output


class Remembering(nn.Module):
    """A frozen block whose work can be skipped where the outcome is known.

    Args:
        block: Gives a tensor, or a tuple whose first is one; only blocks that give a tensor are ever skipped.
        memory: Shared by all blocks of the frozen part.
        is_last: Whether it is the last of them.
    """

    def __init__(self, block: nn.Module, memory: Memory, *, is_last: bool) -> None:
        super().__init__()
        self.block, self.memory, self.is_last = block, memory, is_last

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The block's output."""
        return self.memory.passed(self.block, hidden, self.is_last, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """What its network asks of a block (kind of attention, say) is the block's own answer."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)


def remembering(blocks: nn.ModuleList, count: int, memory: Memory) -> None:
    """Makes the first `count` blocks of a stack, in place, ones whose work can be skipped."""
    for i in range(count):
        blocks[i] = Remembering(blocks[i], memory, is_last=i == count - 1)


def row_lengths(inputs: Int[Tensor, "B l"]) -> list[int]:
    """Tokens of each row, padding (negative numbers, at the end) not counted."""
    lengths: list[int] = (inputs >= 0).sum(dim=1).tolist()
    return lengths


def _keys(inputs: Int[Tensor, "B l"]) -> list[bytes]:
    """Each row's tokens, padding left out."""
    rows = inputs.detach().cpu().contiguous().numpy()
    return [row[:length].tobytes() for row, length in zip(rows, row_lengths(inputs), strict=True)]
