"""Flower's simulation on Ray: a ServerApp with the FedAvg strategy, a ClientApp with the usual PyTorch loop.

Ray is given one processor, hence one actor; all its processes are held on the same core as the server. The round is
``strategy.start`` with one round on the arrays of the one before; federated evaluation is off (``fraction_evaluate=0``)
unless asked for: it is on by default.
"""

from __future__ import annotations

from typing import Any, TextIO

from flower_client import client_app
from flwr.app import ArrayRecord, ConfigRecord, Context, MetricRecord, RecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from talk import Peer, options, own_channel, serve
from workloads import Workload, network


def summed(contents: list[RecordDict], _: str) -> MetricRecord:
    """Sums over clients in place of averages."""
    records = [content.metric_records["metrics"] for content in contents]
    return MetricRecord({name: sum(float(str(record[name])) for record in records) for name in records[0]})


class Flower:
    """The server's side of a run that goes on round by round."""

    def __init__(self, workload: Workload, grid: Grid) -> None:
        self.workload, self.grid = workload, grid
        self.arrays = ArrayRecord(network(workload).state_dict())

    def play(self, *, count: bool = False, evaluate: bool = False) -> dict[str, float]:
        """One round; sums over its clients."""
        played = self.workload.played
        strategy = FedAvg(
            fraction_evaluate=float(evaluate),
            min_train_nodes=played,
            min_evaluate_nodes=played if evaluate else 0,
            min_available_nodes=played,
            train_metrics_aggr_fn=summed,
        )
        result = strategy.start(
            grid=self.grid,
            initial_arrays=self.arrays,
            num_rounds=1,
            train_config=ConfigRecord({"count": count}),
        )
        self.arrays = result.arrays
        return {name: float(str(value)) for name, value in result.train_metrics_clientapp[1].items()}

    def counted(self) -> dict[str, Any]:
        """Steps that the clients counted."""
        return {"steps": int(self.play(count=True)["steps"])}

    def parts(self) -> dict[str, float]:
        """Processor seconds in the clients' loops; the rest is Flower, Ray, making the network, the average."""
        return {"clients' loops": self.play()["seconds"]}


def server_app(workload: Workload, channel: TextIO) -> ServerApp:
    """Answers `rivals.py` from within the server."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        del context
        run = Flower(workload, grid)
        peer = Peer(
            run.play,
            lambda: run.play(evaluate=True),
            run.counted,
            run.parts,
            package="flwr",
        )
        serve(peer, channel)

    return app


def main() -> None:
    """Serves."""
    channel, asked = own_channel(), options()
    run_simulation(
        server_app(asked.workload, channel),
        client_app(asked.workload),
        num_supernodes=asked.workload.played,
        backend_config={
            "init_args": {"num_cpus": 1, "include_dashboard": False, "log_to_driver": False},
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
        },
    )


if __name__ == "__main__":
    main()
