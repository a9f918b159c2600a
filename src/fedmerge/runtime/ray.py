"""Workers that are actors of a Ray cluster. Needs ``fedmerge[ray]``, which is imported here and nowhere else.

The clients' examples lie in the cluster's object store, once on every machine; a call carries the clients' vectors.
"""

from __future__ import annotations

import importlib
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedmerge.core.errors import UsageError
from fedmerge.core.text import brief
from fedmerge.runtime.engines import ClientFunction, Engine
from fedmerge.runtime.parcels import Known, Packed, pack, unpack
from fedmerge.runtime.workers import Death, Done, Failure, Job, packed_outcome, run_job

_Bytes = NDArray[np.uint8]


class Actors:
    """A crew of Ray actors with one processor each. Ray stays connected until this process ends.

    Args:
        engine: Makes a worker's engine.
        size: How many actors.
        known: What need not travel with every call: the clients' examples. They must not change.
        address: Of the cluster, or ``local`` for one that is started here. Ignored where Ray is connected already.

    Raises:
        UsageError: without Ray.
    """

    def __init__(
        self, engine: Callable[[], Engine], size: int, known: Sequence[tuple[Tensor, ...]] = (), *, address: str
    ) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray would report to its makers
        try:
            self._ray: Any = importlib.import_module("ray")
        except ImportError as error:
            raise UsageError(
                "cluster: the package ray is missing; install it with pip install 'fedmerge[ray]', or use workers alone"
            ) from error
        self.size, self._address = size, address
        self._engine, self._known = engine, Known(known)
        self._handed: tuple[Any, Any] | None = None
        self._actors: list[Any] = [None] * size
        self._pending: dict[Any, int] = {}

    def send(self, worker: int, job: Job) -> None:
        """Hands over a job."""
        packed = pack(job.groups, self._known)
        if self._actors[worker] is None:
            self._actors[worker] = self._hired()
        ref = self._actors[worker].compute.remote(job.function, packed.head, _block(packed))
        self._pending[ref] = worker

    def events(self) -> Iterator[tuple[int, Done | Failure | Death]]:
        """What has come from one of the actors; waits for it."""
        (ref,), _ = self._ray.wait(list(self._pending), num_returns=1)
        worker = self._pending.pop(ref)
        try:
            head, block = self._ray.get(ref)
        except self._ray.exceptions.RayActorError as error:
            self._actors[worker] = None
            self._pending = {other: owner for other, owner in self._pending.items() if owner != worker}
            yield worker, Death(f"what Ray calls {type(error).__name__}: {brief(str(error), 200)}")
        else:
            yield worker, unpack(head, _tensor(block), self._known, copied=True)

    def close(self) -> None:
        """Ends all actors and forgets the examples."""
        found = [actor for actor in self._actors if actor is not None]
        self._actors, self._pending, self._handed = [None] * self.size, {}, None
        if self._ray.is_initialized():
            for actor in found:
                self._ray.kill(actor)

    def processes(self) -> list[int]:
        """None: actors are Ray's children."""
        return []

    def _hired(self) -> Any:
        if not self._ray.is_initialized():
            self._connect()
        if self._handed is None:
            blocks = [block.numpy() for block in self._known.blocks()]
            values = pack(self._known.values, self._known.bare())
            self._handed = self._ray.put(self._engine), self._ray.put((blocks, values.head, _block(values)))
        return self._ray.remote(num_cpus=1, max_restarts=0)(_Actor).remote(*self._handed)

    def _connect(self) -> None:
        quiet = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": False}
        here = {"num_cpus": self.size, "include_dashboard": False} if self._address == "local" else {}
        try:
            self._ray.init(address=self._address, **quiet, **here)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise UsageError(
                f"cluster: cannot reach Ray at {brief(self._address)}: {brief(str(error), 300)}; expected an address "
                "like ray://host:10001 or host:6379, or 'local' to start one here"
            ) from error


class _Actor:
    """What runs on the cluster.

    Args:
        make: Makes the engine.
        examples: Their memory, and the parcel that tells what lies where.
    """

    def __init__(self, make: Callable[[], Engine], examples: tuple[Sequence[_Bytes], bytes, _Bytes]) -> None:
        torch.set_num_threads(1)
        blocks, head, rest = examples
        memory = Known((_tensor(block),) for block in blocks)
        self._engine, self._known = make(), Known(unpack(head, _tensor(rest), memory, copied=True))

    def compute(self, function: ClientFunction | None, head: bytes, block: _Bytes) -> tuple[bytes, _Bytes]:
        """The outcome of a job as a parcel."""
        groups = unpack(head, _tensor(block), self._known, copied=False)
        packed = packed_outcome(run_job(self._engine, Job(function, groups)), self._known)
        return packed.head, _block(packed)


def _block(packed: Packed) -> _Bytes:
    block = torch.empty(packed.size, dtype=torch.uint8)
    packed.fill(block)
    array: _Bytes = block.numpy()
    return array


def _tensor(block: _Bytes) -> Tensor:
    with warnings.catch_warnings():  # Ray's memory cannot be written to, and nothing here does
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(block)
