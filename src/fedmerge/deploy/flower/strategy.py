"""FedMerge and other methods as a Flower strategy, for users who have an app of their own.

The ClientApp trains what it is sent and returns it, as for Flower's own strategies; each node is sent a model of its
own. Mathematics, checks and checkpoints are those of a run in one process.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from fedmerge.core.errors import FedmergeError, UsageError, together
from fedmerge.core.files import make_folder
from fedmerge.core.protocol import Algorithm, Update, deliver
from fedmerge.core.replies import Expected, Refusal, Reply, check_of, fault_of, reasons_text, stacked_updates
from fedmerge.core.replies import template_of as template
from fedmerge.core.sums import weighted_sum
from fedmerge.core.text import brief, shortened
from fedmerge.core.vector import twin
from fedmerge.deploy.flower.answers import Asked, Metrics, means, metrics_of, reply_of
from fedmerge.deploy.flower.arrays import record_of, tensors_of, travelling_tensors
from fedmerge.deploy.flower.nodes import Nodes
from fedmerge.deploy.opening import begun, method_of, name_of
from fedmerge.deploy.outbox import Outbox
from fedmerge.deploy.plain_descent import pull_of
from fedmerge.experiment.book import digest_of_request, held
from fedmerge.experiment.checkpoint import Manifest, digest, latest, tensor_bytes, write_slot
from fedmerge.experiment.config import RunOptions
from fedmerge.experiment.participation import Participation, turnout
from fedmerge.experiment.simulation import described, one_thread
from fedmerge.runtime.rounds import refuse_divergence

log = logging.getLogger(__name__)

ARRAYS, CONFIG = "arrays", "config"
"""Where messages hold tensors and settings, as for Flower's FedAvg."""
_BLOCK = 64
"""Clients whose models are in memory together."""


@dataclass
class History:
    """What clients said of themselves, by round and client key.

    Attributes:
        train: Metrics of training replies that were believed.
        evaluate: Metrics of evaluation replies.
    """

    train: dict[int, dict[str, Metrics]] = field(default_factory=dict)
    evaluate: dict[int, dict[str, Metrics]] = field(default_factory=dict)


class FedMergeStrategy(Strategy):
    """Every client trains, and is evaluated on, a model of its own.

    What your ClientApp is sent: ``arrays`` (load them into your module; frozen parameters are not in them) and
    ``config`` with ``server-round`` and ``proximal-mu``, the strength μ of a pull ``μ/2 · ‖θ − θ_received‖²`` that the
    method would like added to the loss (as in Flower's FedProx; 0 for most methods). What it returns: one array record
    with the same names, shapes and dtypes, and one metric record with ``num-examples``.

    Start it with ``strategy.start(grid, strategy.arrays(), num_rounds=...)``. Models of single clients: `arrays_of`.

    Args:
        method: A registered method by name or with options, or an object; its clients may only train what they receive.
        model: A module, whose weights are the first ones, or a function or class that makes one without arguments.
        num_clients: N, all that may ever take part.
        seed: Decides first weights of a function's module, and cohorts.
        min_nodes: Clients that must be connected before a round begins; all of them by default.
        fraction: Share of the N clients that is asked to train in a round.
        folder: Where the state after every round is written; a strategy made again with the same folder goes on there.
        patience: Seconds to wait for `min_nodes`.
        query_seconds: Seconds to wait for a node that is asked for its client key, see `tell_client_key`.
        evaluate: Whether clients are asked to evaluate their models after each round.
        head: Sub-module that is the output layer; the last one with parameters by default.
        frozen: Sub-modules whose parameters are neither trained nor sent.

    Raises:
        UsageError: if the method needs clients that do more than train, or the module cannot be used.
    """

    def __init__(
        self,
        method: str | Mapping[str, Any] | Algorithm[Any] = "fedmerge",
        *,
        model: Any,
        num_clients: int,
        seed: int = 0,
        min_nodes: int | None = None,
        fraction: float = 1.0,
        folder: Path | str | None = None,
        patience: float = 3600.0,
        query_seconds: float = 300.0,
        evaluate: bool = True,
        head: str | None = None,
        frozen: tuple[str, ...] = (),
    ) -> None:
        _refuse_numbers(num_clients, num_clients if min_nodes is None else min_nodes, patience, query_seconds)
        self.history = History()
        self._fraction, self._patience, self._evaluate = fraction, patience, evaluate
        self._min_nodes = num_clients if min_nodes is None else min_nodes
        options = RunOptions(seed=seed, fraction=fraction, head=head, frozen=frozen, kernels="torch")
        with one_thread():
            self._setup, start = begun(method_of(method), model, num_clients, options)
            self._pull = pull_of(self._setup.played, start.state, self._setup.layout, name=name_of(self._setup))
        self._module = twin(self._setup.module)
        tensors = travelling_tensors(self._module, self._setup.layout)
        self._sent = template(tensors)
        self._update = template(Update(self._setup.layout.read(self._setup.module)))
        self._asked = Asked("", {})
        self._hold, self._folder = ExitStack(), None if folder is None else Path(folder)
        self._slot, self._progress = 1, start
        if self._folder is not None:
            make_folder(self._folder)
            self._hold.enter_context(held(self._folder))
            self._go_on(self._folder)
        self._nodes = Nodes(num_clients, self._folder, query_seconds)

    def close(self) -> None:
        """Lets go of the folder; the end of the process does so too."""
        self._hold.close()

    # ------------------------------------------------------------ what there is

    @property
    def rounds(self) -> int:
        """Completed rounds."""
        return self._progress.round

    @property
    def clients(self) -> Mapping[int, str]:
        """Each known client's key by its index."""
        return self._nodes.keys

    @property
    def mixing(self) -> Tensor | None:
        """[N, d] how much of each server model every client's model holds; None where the question makes no sense."""
        return self._setup.played.mixing(self._progress.state)

    def arrays(self) -> ArrayRecord:
        """The mean of all N clients' models: one model for whoever must have one. Clients are not sent it."""
        return self._record(self._mean())

    def arrays_of(self, key: str) -> ArrayRecord:
        """The model of one client.

        Raises:
            UsageError: if no client has this key.
        """
        index = next((index for index, own in self._nodes.keys.items() if own == key), None)
        if index is None:
            raise UsageError(
                f"client {brief(key)} is not known; known: {', '.join(self._nodes.keys.values()) or 'none'}"
            )
        everyone = range(self._setup.facts.num_clients)  # fewer rows are rounded differently
        return self._record(self._outbox(everyone).of(index))

    def _mean(self) -> Tensor:
        N, state = self._setup.facts.num_clients, self._progress.state
        total = torch.zeros(1, self._setup.layout.num_params, dtype=torch.float64)
        for start in range(0, N, _BLOCK):
            some = torch.arange(start, min(start + _BLOCK, N))
            models = self._setup.played.send(state, some)
            total += weighted_sum(torch.full((len(some), 1), 1 / N, dtype=torch.float64), models)
        return total[0].to(self._setup.layout.dtype)

    def _outbox(self, clients: Iterable[int]) -> Outbox:
        return Outbox(self._setup, self._progress.state, sorted(clients))

    def _record(self, vector: Tensor) -> ArrayRecord:
        self._setup.layout.write(vector, self._module)
        return record_of(travelling_tensors(self._module, self._setup.layout))

    # ------------------------------------------------------------ training

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """One message for each node that is asked, with its own model; none for a round that was made before.

        Raises:
            UsageError: if the first `arrays` are not those that the strategy begins with.
            FedmergeError: if too few clients are connected within the patience.
        """
        if server_round <= self._progress.round:
            log.info("round %d was made before: nothing to do", server_round)
            return []
        if server_round == 1:
            self._refuse_other_start(arrays)
        self._nodes.wait(grid, self._min_nodes, self._patience)
        here, cohort = self._nodes.present(grid), self._cohort(server_round)
        return self._messages(
            MessageType.TRAIN, server_round, {i: node for i, node in here.items() if i in cohort}, config
        )

    def _cohort(self, server_round: int) -> tuple[int, ...]:
        options = self._setup.options
        return turnout(
            Participation(),
            fraction=options.fraction,
            seed=options.seed,
            round_number=server_round,
            num_examples=[1] * self._setup.facts.num_clients,
            passes=(),
        ).cohort

    def _messages(self, kind: str, server_round: int, nodes: Mapping[int, int], config: ConfigRecord) -> list[Message]:
        told = ConfigRecord({**config, "server-round": server_round, "proximal-mu": self._pull})
        with one_thread():
            box = self._outbox(nodes)
            messages = [
                Message(
                    RecordDict({ARRAYS: self._record(box.of(client)), CONFIG: told}),
                    node,
                    kind,
                    group_id=str(server_round),
                )
                for client, node in nodes.items()
            ]
        run = str(messages[0].metadata.run_id) if messages else ""
        self._asked = Asked(run, {node: client for client, node in nodes.items()})
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Checks every reply and moves the server's models and merging weights by those that hold.

        Returns:
            `arrays` after the round, and the means of the clients' metrics by their numbers of examples.

        Raises:
            FedmergeError: if most of the clients sent NaN or infinite values.
        """
        if server_round <= self._progress.round:
            return self.arrays(), None
        began = time.perf_counter()
        with one_thread():
            admitted, metrics = self._admitted(server_round, replies)
            state = self._progress.state
            if admitted:
                clients = torch.tensor([reply.client for reply in admitted], dtype=torch.int64)
                counts = torch.tensor([reply.num_examples for reply in admitted], dtype=torch.int64)
                state = deliver(self._setup.played, state, clients, stacked_updates(admitted, self._update), counts)
            else:
                log.warning("round %d: no reply that counts; the models stay as they were", server_round)
            self._progress = replace(self._progress, state=state, round=server_round)
            self._save(time.perf_counter() - began)
            self.history.train[server_round] = metrics
            weights = {self._nodes.keys[reply.client]: reply.num_examples for reply in admitted}
            return self.arrays(), self._record_of_means(metrics, weights)

    def _admitted(self, server_round: int, replies: Iterable[Message]) -> tuple[list[Reply], dict[str, Metrics]]:
        """Replies that hold, in client order, their tensors the method's update; and what their clients measured."""
        cohort = frozenset(self._asked.clients.values())
        expected = Expected(self._asked.run, server_round, cohort, self._sent)
        box, layout = self._outbox(cohort), self._setup.layout
        admitted: dict[int, Reply] = {}
        metrics: dict[str, Metrics] = {}
        refusals: list[Refusal] = []
        for message in replies:
            if message.has_error():
                self._tell_failure(message)
                continue
            reply, own = reply_of(message, self._asked)
            refusal = fault_of(reply, expected, admitted.keys())
            if refusal is None:
                delta = box.of(reply.client) - layout.flatten(reply.tensors)
                reply = replace(reply, tensors={"delta": delta})
                further = replace(expected, template=self._update, further=check_of(self._setup.played))
                refusal = fault_of(reply, further, admitted.keys())
            if refusal is None:
                admitted[reply.client] = reply
                metrics[self._nodes.keys[reply.client]] = own
            else:
                refusals.append(refusal)
        if refusals:
            log.warning("round %d: replies refused: %s; %s", server_round, reasons_text(refusals), refusals[0].detail)
        refuse_divergence(refusals, len(cohort))
        return [admitted[client] for client in sorted(admitted)], metrics

    def _tell_failure(self, message: Message) -> None:
        client = self._asked.clients.get(message.metadata.src_node_id)
        name = self._nodes.keys.get(-1 if client is None else client, f"node {message.metadata.src_node_id}")
        log.warning("client %s failed: %s", name, shortened(str(message.error.reason), 500))

    def _record_of_means(self, metrics: Mapping[str, Metrics], weights: Mapping[str, int]) -> MetricRecord:
        """Means over clients of the metrics that all of them gave, and what the server's state says of itself."""
        facts = described(self._setup.played, self._progress.state)
        numbers = {"num-models": facts["num_models"]} if "num_models" in facts else {}
        return MetricRecord({**means(metrics, weights), "num-clients": len(metrics), **numbers})

    # ------------------------------------------------------------ evaluation

    def configure_evaluate(
        self,
        server_round: int,
        arrays: ArrayRecord,  # noqa: ARG002 - clients are sent their own
        config: ConfigRecord,
        grid: Grid,
    ) -> list[Message]:
        """One message for each node that is connected, with its own model."""
        if not self._evaluate or server_round < self._progress.round:
            return []
        return self._messages(MessageType.EVALUATE, server_round, self._nodes.present(grid), config)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Keeps every client's metrics in `history`; gives their means by ``num-examples``, or plain ones without."""
        metrics: dict[str, Metrics] = {}
        weights: dict[str, int] = {}
        for message in replies:
            client = self._asked.clients.get(message.metadata.src_node_id)
            if message.has_error():
                self._tell_failure(message)
            elif client is not None:
                count, metrics[self._nodes.keys[client]] = metrics_of(message)
                weights[self._nodes.keys[client]] = count if isinstance(count, int) and count > 0 else 0
        if not metrics:
            return None
        self.history.evaluate[server_round] = metrics
        if not all(weights.values()):
            weights = dict.fromkeys(metrics, 1)
        return MetricRecord({**means(metrics, weights), "num-clients": len(metrics)})

    def summary(self) -> None:
        """Says what runs."""
        setup = self._setup
        log.info(
            "method %s, %d clients, %d numbers",
            name_of(setup),
            setup.facts.num_clients,
            setup.layout.num_params,
        )
        log.info("clients are asked for a pull proximal-mu = %g; after round %d", self._pull, self.rounds)

    # ------------------------------------------------------------ going on

    def _refuse_other_start(self, arrays: ArrayRecord) -> None:
        """The first arrays are the strategy's own or none: others would be accepted and ignored."""
        if not arrays:
            return
        given, elsewhere = tensors_of(arrays), self._module.state_dict().keys() - self._sent.forms.keys()
        given = {name: tensor for name, tensor in given.items() if name not in elsewhere}
        starts = (self.arrays(), self._record(self._setup.layout.read(self._setup.module)))
        if not any(_same(given, tensors_of(start)) for start in starts):
            raise UsageError(
                "initial_arrays: other names or values than the strategy begins with; give strategy.arrays(), and "
                "weights of your own as model=<a module that has them>"
            )

    def _go_on(self, folder: Path) -> None:
        found, faults = latest(folder, self._progress, request=digest_of_request(self._setup), data=self._identity())
        for fault in faults:
            log.warning("a checkpoint cannot be used: %s", fault)
        if found is not None:
            self._slot, self._progress = found.slot, found.last
            log.info("going on after round %d", found.manifest.round)
        elif faults:
            raise FedmergeError("no checkpoint can be used; restore one, or take another folder:\n" + together(faults))

    def _identity(self) -> str:
        return digest(f"{self._setup.facts.num_clients} clients of a Flower app".encode())

    def _save(self, seconds: float) -> None:
        if self._folder is None:
            return
        tensors = tensor_bytes(self._progress)
        manifest = Manifest(
            round=self._progress.round,
            request=digest_of_request(self._setup),
            data=self._identity(),
            tensors=digest(tensors),
            lines=0,
            records=digest(b""),
            selected=-1,
            best="",
            seconds=seconds,
        )
        self._slot = 1 - self._slot
        write_slot(self._folder, self._slot, manifest, tensors)


def _same(some: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> bool:
    return some.keys() == others.keys() and all(torch.equal(some[name], others[name]) for name in some)


def _refuse_numbers(num_clients: int, min_nodes: int, patience: float, query_seconds: float) -> None:
    faults = []
    if num_clients < 1:
        faults.append(f"num_clients: got {num_clients}; expected 1 or more")
    if not 1 <= min_nodes <= max(1, num_clients):
        faults.append(f"min_nodes: got {min_nodes}; expected 1..{num_clients}, the number of clients")
    faults += [
        f"{name}: got {value}; expected seconds > 0"
        for name, value in (("patience", patience), ("query_seconds", query_seconds))
        if not value > 0
    ]
    if faults:
        raise UsageError(together(faults))
