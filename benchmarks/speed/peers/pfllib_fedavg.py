"""PFLlib's FedAvg: the body of its server's round, which evaluates in every round unless told otherwise.

Its clients read their examples from a file in every round; the files are made here, in a folder that is deleted.
"""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from talk import Peer, marked_network, options, own_channel, serve
from workloads import Workload, federation

DATA = "random"


def written(workload: Workload, root: Path) -> None:
    """Each client's examples as PFLlib's files; a tenth of them as test examples."""
    few = max(1, workload.examples // 10)
    for kind in ("train", "test"):
        (root / "dataset" / DATA / kind).mkdir(parents=True)
    (root / "system").mkdir()
    for i, (inputs, targets) in enumerate(federation(workload)):
        x, y = inputs.numpy(), targets.numpy()
        for kind, part in (("train", {"x": x, "y": y}), ("test", {"x": x[:few], "y": y[:few]})):
            with (root / "dataset" / DATA / kind / f"{i}.npz").open("wb") as file:
                np.savez(file, data=np.array(part, dtype=object))


def arguments(workload: Workload, model: Any) -> SimpleNamespace:
    """What its command line would say."""
    return SimpleNamespace(
        model=model,
        device="cpu",
        dataset=DATA,
        num_classes=workload.classes,
        global_rounds=1,
        local_epochs=workload.epochs,
        batch_size=workload.batch,
        local_learning_rate=workload.lr,
        learning_rate_decay=False,
        learning_rate_decay_gamma=0.99,
        num_clients=workload.played,
        join_ratio=1.0,
        random_join_ratio=False,
        few_shot=0,
        algorithm="FedAvg",
        time_select=False,
        goal="speed",
        time_threthold=1e9,
        save_folder_name="items",
        top_cnt=100,
        auto_break=False,
        eval_gap=1,
        client_drop_rate=0.0,
        train_slow_rate=0.0,
        send_slow_rate=0.0,
        dlg_eval=False,
        dlg_gap=100,
        batch_num_per_client=2,
        num_new_clients=0,
        fine_tuning_epoch_new=0,
    )


class Pfllib:
    """Its server, and the body of its loop."""

    def __init__(self, workload: Workload, checkout: str) -> None:
        sys.path.insert(0, str(Path(checkout) / "system"))
        module = importlib.import_module("flcore.servers.serveravg")
        self.server = module.FedAvg(arguments(workload, marked_network(workload)), 0)

    def play(self, *, evaluate: bool = False) -> None:
        """One round."""
        server = self.server
        server.selected_clients = server.select_clients()
        server.send_models()
        if evaluate:
            server.evaluate()
        for client in server.selected_clients:
            client.train()
        server.receive_models()
        server.aggregate_parameters()


def main() -> None:
    """Serves from a folder of its own."""
    channel, asked = own_channel(), options()
    checkout = str(Path(asked.checkout).resolve())
    with tempfile.TemporaryDirectory(prefix="pfllib-") as folder:
        written(asked.workload, Path(folder))
        os.chdir(Path(folder) / "system")
        run = Pfllib(asked.workload, checkout)
        client_base, server = importlib.import_module("flcore.clients.clientbase"), type(run.server)
        watched = (
            (client_base, "read_client_data", "batches"),
            (server, "send_models", "server"),
            (server, "receive_models", "server"),
            (server, "aggregate_parameters", "server"),
        )
        serve(Peer(run.play, lambda: run.play(evaluate=True), watched=watched), channel)
        os.chdir("/")


if __name__ == "__main__":
    main()
