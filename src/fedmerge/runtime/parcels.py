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
    """Tuples of tensors that both sides have: they, and whatever lies in their memory, are named by their place.

    Args:
        values: The same ones, in the same order, on both sides; for example the examples of every client.
    """

    def __init__(self, values: Iterable[tuple[Tensor, ...]] = ()) -> None:
        self.values = list(values)
        self.places = {id(value): place for place, value in enumerate(self.values)}
        self.storages: list[torch.UntypedStorage] = []
        self._number: dict[int, int] = {}
        for storage in (tensor.untyped_storage() for value in self.values for tensor in value):
            if storage.data_ptr() and storage.data_ptr() not in self._number:
                self._number[storage.data_ptr()] = len(self.storages)
                self.storages.append(storage)
        self.views = _Views(self.storages)

    def number(self, tensor: Tensor) -> int | None:
        """Which of the storages a tensor lies in."""
        return self._number.get(tensor.untyped_storage().data_ptr())

    def bare(self) -> Known:
        """The same memory without the values."""
        return Known((block,) for block in self.blocks())

    def blocks(self) -> list[Tensor]:
        """Every storage as bytes, without copies: `Known` of each of them, or of copies, has the same storages."""
        return [_whole(storage, torch.uint8) for storage in self.storages]


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
        views = _Views([block.untyped_storage()])
        for tensor, start, stride in self.pieces:
            views.at(0, tensor.dtype, start // tensor.element_size(), tensor.shape, stride).copy_(tensor)


class _Packer(ForkingPickler):
    """Sets tensors aside, wherever in the value they are."""

    def __init__(self, file: io.BytesIO, known: Known) -> None:
        super().__init__(file, _PROTOCOL)
        self._known = known
        self._places: dict[tuple[Any, ...], tuple[Any, ...]] = {}
        self.pieces: list[_Piece] = []
        self.size = 0

    def reducer_override(self, value: Any) -> Any:
        """How a tensor, or what is known, is told; everything else is left to multiprocessing."""
        if type(value) is Tensor:
            return _tensor_at, self._place(value.detach() if value.requires_grad else value)
        place = self._known.places.get(id(value))
        if place is not None:
            return _value_at, (place,)
        if type(value) is nn.Parameter:
            return nn.Parameter, (value.detach(), value.requires_grad)
        return NotImplemented

    def _place(self, tensor: Tensor) -> tuple[Any, ...]:
        shape, stride, number = tuple(tensor.shape), tensor.stride(), self._known.number(tensor)
        if number is not None:
            return number, tensor.dtype, tensor.storage_offset(), shape, stride
        key = tensor.data_ptr(), tensor.dtype, shape, stride
        found = self._places.get(key)
        if found is None:
            if not _is_dense(tensor):
                stride = torch.empty(shape, device="meta").stride()
            self.pieces.append(_Piece(tensor, self.size, stride))
            found = self._places[key] = -1, tensor.dtype, self.size // tensor.element_size(), shape, stride
            self.size += _aligned(tensor.nbytes)
        return found


def _aligned(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED


def _is_dense(tensor: Tensor) -> bool:
    """Whether a tensor's numbers lie side by side in one of the usual orders."""
    return tensor.is_contiguous() or (tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last))


def _whole(storage: torch.UntypedStorage, dtype: torch.dtype) -> Tensor:
    """All of a memory, but for what would be less than a number at its end."""
    return torch.empty(0, dtype=dtype).set_(storage, 0, (storage.nbytes() // dtype.itemsize,), (1,))


class _Views:
    """Tensors that lie in some memories."""

    def __init__(self, storages: Sequence[torch.UntypedStorage]) -> None:
        self._storages = storages
        self._wholes: dict[tuple[int, torch.dtype], Tensor] = {}

    def at(self, number: int, dtype: torch.dtype, start: int, shape: Sequence[int], stride: Sequence[int]) -> Tensor:
        whole = self._wholes.get((number, dtype))
        if whole is None:
            whole = self._wholes[number, dtype] = _whole(self._storages[number], dtype)
        return whole.as_strided(shape, stride, start)


class _Reading(NamedTuple):
    own: _Views
    known: Known
    theirs: _Views
    copied: bool


_READING: ContextVar[_Reading] = ContextVar("_READING")


def _tensor_at(number: int, dtype: torch.dtype, start: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    """The tensor at a place of the parcel that is being read."""
    own, _, theirs, copied = _READING.get()
    if number >= 0:
        return theirs.at(number, dtype, start, shape, stride)
    view = own.at(0, dtype, start, shape, stride)
    return view.clone() if copied else view


def _value_at(place: int) -> tuple[Tensor, ...]:
    """What both sides have at this place."""
    return _READING.get().known.values[place]


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
    token = _READING.set(_Reading(_Views([block.untyped_storage()]), known, known.views, copied))
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
