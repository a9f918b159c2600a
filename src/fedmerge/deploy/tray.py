"""Where the answers of a round are laid: each is checked on its own, and what is believed waits on the disk."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from fedmerge.core.errors import FedmergeError
from fedmerge.core.protocol import tree_bytes
from fedmerge.core.replies import Expected, Reason, Refusal, Reply, fault_of
from fedmerge.deploy.messages import Answer, Letter, Score, answer_from
from fedmerge.deploy.status import Board
from fedmerge.deploy.telling import note_of
from fedmerge.experiment.record import Scores
from fedmerge.runtime.spool import Spool


@dataclass
class Tray:
    """The answers of one round.

    Attributes:
        expected: What a reply of this round must be.
        index: A site's index by its name.
        board: Where people see what was refused.
        spool: Takes the updates; None if nobody was asked to train.
        reports: What each site last said of itself, by name; goes along.
        admitted: Clients whose updates count.
        refusals: Of the others that came.
        scores: Of the received models on validation and test, by client.
        passed: Training examples passed, all together.
        bytes_up: Of the updates that came.
    """

    expected: Expected
    index: Mapping[str, int]
    board: Board
    spool: Spool | None
    reports: dict[str, Answer]
    admitted: set[int] = field(default_factory=set)
    refusals: list[Refusal] = field(default_factory=list)
    scores: dict[int, tuple[Score, Score]] = field(default_factory=dict)
    passed: int = 0
    bytes_up: int = 0

    def take(self, name: str, letter: Letter) -> Refusal | None:
        """Takes in one answer; why not, if it is not believed."""
        client = self.index[name]
        refusal = self._refusal_of(client, name, letter)
        if refusal is not None:
            self.refusals.append(refusal)
            self.board.refused(name, f"{refusal.reason}: {refusal.detail}")
        return refusal

    def _refusal_of(self, client: int, name: str, letter: Letter) -> Refusal | None:
        try:
            answer = answer_from(letter.text)
        except FedmergeError as error:
            return Refusal(client, "malformed", str(error))
        if answer.site != name or answer.client != client:
            said = f"it says that it is {answer.site!r}, client {answer.client}"
            return Refusal(client, "client", f"the answer came from {name!r}, client {client}; {said}")
        if answer.run != self.expected.run or answer.round != self.expected.round:
            wanted = f"expected round {self.expected.round} of run {self.expected.run}"
            reason: Reason = "run" if answer.run != self.expected.run else "round"
            return Refusal(client, reason, f"got round {answer.round} of run {answer.run}; {wanted}")
        refusal = self._update_refusal(client, answer, letter) if client in self.expected.cohort else None
        if refusal is None:
            self.reports[name] = answer
            self.scores[client] = (answer.validation, answer.test)
            self.board.told(name, note_of(answer.note, answer.versions))
        return refusal

    def _update_refusal(self, client: int, answer: Answer, letter: Letter) -> Refusal | None:
        reply = Reply(answer.run, answer.round, client, answer.num_train, letter.tensors)
        self.bytes_up += tree_bytes(dict(letter.tensors))
        refusal = fault_of(reply, self.expected, self.admitted)
        if refusal is not None:
            return refusal
        assert self.spool is not None  # noqa: S101 - somebody was asked to train
        self.spool.take(reply)
        self.admitted.add(client)
        self.passed += answer.passed
        return None

    def scores_of(self, split: int, clients: Collection[int]) -> Scores:
        """Scores on validation (0) or test (1) of all clients; None for those that did not say."""
        found = [self.scores[i][split] if i in self.scores else Score() for i in clients]
        return Scores(tuple(each.accuracy for each in found), tuple(each.loss for each in found))
