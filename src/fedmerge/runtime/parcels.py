"""A value as a short message and one block of bytes: how clients and replies travel between processes of one run.

Tensors lie in the block, bit for bit and with their strides; those that both sides have already, like the clients'
examples, are named instead. The message is multiprocessing's own form: it is read only from memory that processes share
because one of them started the other, never from a file, a user or a network.
"""

from __future__ import annotations

import io
import mmap
import os
import tempfile
import weakref
from collections.abc import Iterable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from multiprocessing.reduction import DupFd, ForkingPickler
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_ALIGNED = 64
"""Bytes: where torch's own memory begins, so that no kernel takes another path."""
_PROTOCOL = 5


class Known:
    """Tensors that both sides have: what lies in their memory is named by its place there.

    Args:
        tensors: The same ones, in the same order, on both sides.
    """

    def __init__(self, tensors: Iterable[Tensor] = ()) -> None:
        self.storages: list[torch.UntypedStorage] = []
        self._number: dict[int, int] = {}
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage.data_ptr() and storage.data_ptr() not in self._number:
                self._number[storage.data_ptr()] = len(self.storages)
                self.storages.append(storage)

    def number(self, tensor: Tensor) -> int | None:
        """Which of the storages a tensor lies in."""
        return self._number.get(tensor.untyped_storage().data_ptr())

    def blocks(self) -> list[Tensor]:
        """Every storage as bytes, without copies: `Known` of them, or of copies, knows the same places."""
        return [torch.empty(0, dtype=torch.uint8).set_(storage) for storage in self.storages]


class _Piece(NamedTuple):
    """One tensor of a parcel: where its numbers begin in the block, and in which order they lie there."""

    tensor: Tensor
    start: int
    stride: tuple[int, ...]


@dataclass(frozen=True)
class Packed:
    """A value that is ready to be written into a block.

    Attributes:
        head: The message.
        pieces: The tensors to be written.
        size: Bytes of the block.
    """

    head: bytes
    pieces: list[_Piece]
    size: int

    def fill(self, block: Tensor) -> None:
        """Writes the tensors into a block of at least `size` bytes."""
        storage = block.untyped_storage()
        for tensor, start, stride in self.pieces:
            _view(storage, tensor.dtype, start // tensor.element_size(), tensor.shape, stride).copy_(tensor)


class _Packer(ForkingPickler):
    """Sets tensors aside, wherever in the value they are."""

    def __init__(self, file: io.BytesIO, known: Known) -> None:
        super().__init__(file, _PROTOCOL)
        self._known = known
        self._places: dict[tuple[Any, ...], tuple[Any, ...]] = {}
        self.pieces: list[_Piece] = []
        self.size = 0

    def reducer_override(self, value: Any) -> Any:
        """How a tensor is told; everything else is left to multiprocessing."""
        if type(value) is Tensor:
            return _tensor_at, self._place(value.detach())
        if type(value) is nn.Parameter:
            return nn.Parameter, (value.detach(), value.requires_grad)
        return NotImplemented

    def _place(self, tensor: Tensor) -> tuple[Any, ...]:
        shape, stride, number = tuple(tensor.shape), tensor.stride(), self._known.number(tensor)
        if number is not None:
            return number, tensor.dtype, tensor.storage_offset(), shape, stride
        key = tensor.data_ptr(), tensor.dtype, shape, stride
        if key not in self._places or not tensor.numel():
            stride = stride if _is_dense(tensor) else torch.empty(shape, device="meta").stride()
            self._places[key] = -1, tensor.dtype, self.size // tensor.element_size(), shape, stride
            self.pieces.append(_Piece(tensor, self.size, stride))
            self.size += _aligned(tensor.numel() * tensor.element_size())
        return self._places[key]


def _aligned(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED


def _is_dense(tensor: Tensor) -> bool:
    """Whether a tensor's numbers lie side by side in one of the usual orders."""
    return tensor.is_contiguous() or (tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last))


def _view(
    storage: torch.UntypedStorage, dtype: torch.dtype, start: int, shape: Iterable[int], stride: Iterable[int]
) -> Tensor:
    return torch.empty(0, dtype=dtype).set_(storage, start, tuple(shape), tuple(stride))


class _Reading(NamedTuple):
    own: torch.UntypedStorage
    known: list[torch.UntypedStorage]
    copied: bool


_READING: ContextVar[_Reading] = ContextVar("_READING")


def _tensor_at(number: int, dtype: torch.dtype, start: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    """The tensor at a place of the parcel that is being read."""
    own, known, copied = _READING.get()
    if number >= 0:
        return _view(known[number], dtype, start, shape, stride)
    view = _view(own, dtype, start, shape, stride)
    return view.clone() if copied else view


def pack(value: Any, known: Known) -> Packed:
    """Any value that multiprocessing can send, its tensors apart.

    Args:
        value: For example the arguments of some clients.
        known: What the other side has already.

    Raises:
        TypeError: if it cannot be sent (a function that was made within another one).
    """
    file = io.BytesIO()
    packer = _Packer(file, known)
    try:
        packer.dump(value)
    except Exception as error:  # pickle raises several kinds, AttributeError among them
        raise TypeError(f"cannot be sent to another process: {error}") from error
    return Packed(file.getvalue(), packer.pieces, packer.size)


def unpack(head: bytes | memoryview, block: Tensor, known: Known, *, copied: bool) -> Any:
    """The value again.

    Args:
        head: The message.
        block: [bytes] as `Packed.fill` left it.
        known: The same tensors as on the other side.
        copied: Whether tensors are the value's own; else they lie in `block`.
    """
    token = _READING.set(_Reading(block.untyped_storage(), known.storages, copied))
    try:
        return ForkingPickler.loads(head)
    finally:
        _READING.reset(token)


class Arena:
    """Memory that two processes share: an open file without a name, which both map and which grows when needed.

    Nothing is left behind, whoever is killed: the system frees it with the last process that has it open.

    Args:
        file: Its descriptor, owned from now on; a new one by default.
    """

    def __init__(self, file: int | None = None) -> None:
        self.file = _nameless() if file is None else file
        self._mapped = torch.empty(0, dtype=torch.uint8)
        weakref.finalize(self, os.close, self.file)

    def lay(self, blocks: Sequence[Tensor]) -> list[tuple[int, int]]:
        """Puts bytes there once and for all; where each begins and how many it has, for `lying`."""
        places, size = [], 0
        for block in blocks:
            places.append((size, len(block)))
            size += _aligned(len(block))
        whole = self.block(size)
        for block, (start, length) in zip(blocks, places, strict=True):
            whole[start : start + length] = block
        return places

    def lying(self, places: Iterable[tuple[int, int]]) -> list[Tensor]:
        """The bytes of `lay` as tensors that each begin a memory of their own, as far as torch sees."""
        there = os.fstat(self.file).st_size
        shared = mmap.mmap(self.file, there) if there else b""
        return [torch.frombuffer(shared, dtype=torch.uint8, offset=start, count=size) for start, size in places]

    def block(self, size: int) -> Tensor:
        """At least the first `size` bytes, as both sides see them.

        Raises:
            OSError: if memory is short.
        """
        if size > len(self._mapped):
            there = os.fstat(self.file).st_size
            if there < size:
                there = -(-max(size, 2 * there) // mmap.PAGESIZE) * mmap.PAGESIZE
                _grow(self.file, there)
            self._mapped = torch.frombuffer(mmap.mmap(self.file, there), dtype=torch.uint8)
        return self._mapped


def _nameless() -> int:
    """A file in memory where the system has such (it needs no room on /dev/shm), else one that is unlinked at once."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("fedmerge")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _grow(file: int, size: int) -> None:
    """Claims the room at once where the system can, so that a lack of it is an error here and no death later."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)
    else:
        os.ftruncate(file, size)


def _arena_of(descriptor: Any) -> Arena:
    return Arena(descriptor.detach())


def _handed_on(arena: Arena) -> tuple[Any, ...]:
    return _arena_of, (DupFd(arena.file),)


ForkingPickler.register(Arena, _handed_on)
