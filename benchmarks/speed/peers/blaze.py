"""BlazeFL: its FedAvg with the serial client trainer.

The package asks for Python 3.14 because it names classes in their own annotations; under an older Python its files are
read with annotations put off, which changes nothing that is measured.
"""

from __future__ import annotations

import importlib.machinery
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from talk import Peer, marked_network, options, own_channel, serve
from torch import Generator, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from workloads import SEED, Workload, federation

_ANNOTATIONS_PUT_OFF = importlib.import_module("__future__").annotations.compiler_flag


@contextmanager
def annotations_put_off() -> Iterator[None]:
    """Within the block imported files are compiled as if each began with the import that puts annotations off."""
    loader: Any = importlib.machinery.SourceFileLoader
    before = loader.source_to_code

    def compiled(_: Any, data: Any, path: Any, **__: Any) -> Any:
        return compile(data, path, "exec", flags=_ANNOTATIONS_PUT_OFF, dont_inherit=True)

    if sys.version_info < (3, 14):
        loader.source_to_code = compiled
        loader.get_code = _from_source
    try:
        yield
    finally:
        loader.source_to_code = before
        if "get_code" in vars(loader):
            del loader.get_code


def _from_source(self: Any, name: str) -> Any:
    path = self.get_filename(name)
    return self.source_to_code(self.get_data(path), path)


class Selector:
    """Gives the workload's network whatever is asked for.

    Args:
        workload: What is trained.
    """

    def __init__(self, workload: Workload) -> None:
        self.workload = workload

    def select_model(self, model_name: str) -> nn.Module:
        """The network."""
        del model_name
        return marked_network(self.workload)


class Clients:
    """The clients' examples behind the package's loaders.

    Args:
        workload: What is trained.
    """

    def __init__(self, workload: Workload) -> None:
        self.data = [TensorDataset(*examples) for examples in federation(workload)]

    def get_dataset(self, type_: Any, cid: int | None) -> Dataset[Any]:
        """One client's."""
        del type_
        return self.data[cid or 0]

    def set_dataset(self, type_: Any, cid: int | None, dataset: Any) -> None:
        """Replaces one client's."""
        del type_
        self.data[cid or 0] = dataset

    def get_dataloader(
        self, type_: Any, cid: int | None, batch_size: int | None, generator: Generator | None
    ) -> DataLoader[Any]:
        """A shuffling loader."""
        return DataLoader(self.get_dataset(type_, cid), batch_size or 1, shuffle=True, generator=generator)


class Blaze:
    """Server and trainer of the package."""

    def __init__(self, workload: Workload) -> None:
        with annotations_put_off():
            fedavg: Any = importlib.import_module("blazefl.contrib.fedavg")
        selector, clients = Selector(workload), Clients(workload)
        self.server = fedavg.FedAvgBaseServerHandler(
            selector, "network", clients, 1 << 30, workload.played, 1.0, "cpu", workload.batch, SEED
        )
        self.trainer = fedavg.FedAvgBaseClientTrainer(
            selector, "network", clients, "cpu", workload.played, workload.epochs, workload.batch, workload.lr, SEED
        )

    def play(self) -> None:
        """One round."""
        sampled, broadcast = self.server.sample_clients(), self.server.downlink_package()
        self.trainer.local_process(broadcast, sampled)
        for package in self.trainer.uplink_package():
            self.server.load(package)


def main() -> None:
    """Serves."""
    channel, asked = own_channel(), options()
    run = Blaze(asked.workload)
    fedavg: Any = importlib.import_module("blazefl.contrib.fedavg")
    watched = (
        (fedavg, "deserialize_model", "copies"),
        (fedavg, "serialize_model", "copies"),
        (type(run.server), "load", "server"),
    )
    serve(Peer(run.play, watched=watched, package="blazefl"), channel)


if __name__ == "__main__":
    main()
