"""The code that the authors of FedMerge published: their server and clients, five shared models, on a processor.

What is ours: data and network are handed in, ``.cuda()`` does nothing, and the packages that only their data sets need
(torchvision, cv2 and the like) are left out; pictures are not transformed. Their local training adds a proximal term
and notes scores of the last epoch; both belong to their method and cannot be switched off.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any, TextIO

import torch
from talk import Peer, marked_network, options, own_channel, serve
from torch import nn
from workloads import SEED, Workload, federation

NUM_MODELS = 5


UNUSED = ("torchvision", "torchvision.transforms", "torchvision.models", "cv2", "tqdm", "PIL")


class Empty(ModuleType):
    """A module that has every name and nothing behind it."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None)

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def authors_modules(checkout: str) -> tuple[Any, Any]:
    """Their server's and clients' modules."""
    sys.path.insert(0, checkout)
    sys.modules.update({name: Empty(name) for name in UNUSED})
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
    nn.Module.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
    return importlib.import_module("server_merging"), importlib.import_module("clients_merging")


def arguments(workload: Workload, folder: str) -> SimpleNamespace:
    """What their command line would say."""
    return SimpleNamespace(
        path=folder,
        data_name="random",
        use_class_partition=True,
        num_client=workload.played,
        num_shared=NUM_MODELS,
        learning_rate_Theta=1,
        learning_rate_W=0.01,
        local_epoch=workload.epochs,
        batch_size=workload.batch,
        model_name="resnet9",
        device=0,
        class_by_client=list(range(workload.classes)),
    )


class Authors:
    """Their main loop's body, cut into what trains and what evaluates."""

    def __init__(self, workload: Workload, checkout: str, folder: str) -> None:
        server_module, client_module = authors_modules(checkout)
        self.args, model = arguments(workload, folder), marked_network(workload)
        server_module.load_model = lambda *_: model
        data = {}
        few = max(1, workload.examples // 10)
        for i, (inputs, targets) in enumerate(federation(workload)):
            part = (list(inputs[:few]), targets[:few].tolist())
            data[f"client{i}"] = {"train": (list(inputs), targets.tolist()), "eval": part, "test": part}
        torch.default_generator.manual_seed(SEED)
        self.clients = [client_module.client(i, self.args, data[f"client{i}"], model) for i in range(workload.played)]
        self.server = server_module.Server(self.args)
        self.server.init_model(data, self.clients)
        self.shape = {i: group[1] for i, group in self.server.structure[0].items()}
        self.epoch = 0

    def _give_out(self) -> None:
        for i, group in self.server.structure[0].items():
            group[1] = self.shape[i]  # their first evaluation takes the modules away, and the next would fail
        self.server.model_distribute(self.epoch, self.clients)

    def play(self) -> None:
        """A round: models out, training, both server steps."""
        self._give_out()
        self.server.train(self.clients)
        self.server.aggregate()
        self.epoch += 1

    def evaluated(self) -> None:
        """A round as their main program has it: scores on the validation part before it and on the test part after."""
        self._give_out()
        self.server.eval(self.clients)
        self.server.train(self.clients)
        self.server.aggregate()
        self._give_out()
        self.server.test(self.clients)
        self.epoch += 1


def main() -> None:
    """Serves; what their server writes goes to a folder that is deleted."""
    channel, asked = own_channel(), options()
    with tempfile.TemporaryDirectory(prefix="authors-") as folder:
        served(Authors(asked.workload, asked.checkout, folder), channel)


def served(run: Authors, channel: TextIO) -> None:
    """Answers, with the parts of a round that are the authors' own."""
    watched = (
        (importlib.import_module("metric").meters, "update_performance", "scores"),
        (importlib.import_module("metric").meters, "produce_metric", "scores"),
        (type(run.clients[0]), "compute_diff_structure", "copies"),
        (type(run.server), "aggregate", "server"),
        (type(run.server), "model_distribute", "server"),
    )
    serve(Peer(run.play, run.evaluated, watched=watched), channel)


if __name__ == "__main__":
    main()
