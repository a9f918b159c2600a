"""The server's link over Flower's Grid: a reply that does not come whole holds up no other."""

from __future__ import annotations

import threading
import time

import pytest
import torch

pytest.importorskip("flwr")

from flower_stub import HereGrid, inside_a_run
from flwr.app import Message

from fedmerge.deploy.flower import grid_link
from fedmerge.deploy.flower.grid_link import GridLink
from fedmerge.deploy.flower.wire import records_of
from fedmerge.deploy.link import Contact
from fedmerge.deploy.messages import Letter


class StickyGrid(HereGrid):
    """A grid whose call does not return while a reply of node 1 is on its way."""

    def __init__(self):
        super().__init__(answer=lambda message, context: message, configs={})
        self.whole, self.asked, self.error = threading.Event(), [], None

    def push_messages(self, messages):
        for message in messages:
            message.metadata.__dict__["_message_id"] = f"ticket-{message.metadata.dst_node_id}"
            self.sent.append(message)
        return [message.metadata.message_id for message in messages]

    def pull_messages(self, message_ids):
        self.asked += message_ids
        if self.error is not None:
            raise self.error
        if "ticket-1" in message_ids:
            self.whole.wait()
        by_ticket = {message.metadata.message_id: message for message in self.sent}
        letter = Letter("an answer", {"0": torch.arange(3.0)})
        return [Message(records_of(letter), reply_to=by_ticket[ticket]) for ticket in message_ids]


@pytest.fixture
def link(monkeypatch):
    monkeypatch.setattr(grid_link, "_WAIT", 0.2)
    grid = StickyGrid()
    with inside_a_run():
        made = GridLink(grid, {})
        tickets = [made.push(Contact(k, "", None), "round", Letter("", {}), group="g", seconds=9) for k in (1, 2, 3)]
        yield made, grid, tickets
        grid.whole.set()


def test_a_reply_that_is_on_its_way_for_ever_holds_up_no_other(link):
    made, grid, tickets = link
    began = time.monotonic()
    found = dict(made.pull(tickets))
    assert time.monotonic() - began < 5
    assert sorted(found) == ["ticket-2", "ticket-3"]
    assert torch.equal(found["ticket-2"].tensors["0"], torch.arange(3.0))
    assert made.pull(["ticket-1"]) == []
    assert grid.asked.count("ticket-1") == 1  # the first look goes on; there is no second


def test_a_reply_that_was_on_its_way_is_given_once_when_it_is_whole(link):
    made, grid, tickets = link
    made.pull(tickets)
    grid.whole.set()
    assert [ticket for ticket, _ in made.pull(["ticket-1"])] == ["ticket-1"]
    assert made._looks == {}


def test_a_late_reply_that_nobody_asks_for_any_more_is_dropped(link, monkeypatch):
    made, grid, tickets = link
    made.pull(tickets)
    grid.whole.set()
    made._looks["ticket-1"].join()
    made.pull([])
    assert list(made._looks) == ["ticket-1"]
    monkeypatch.setattr(grid_link, "_FORGOTTEN", 0.0)
    made.pull([])
    assert made._looks == {}


def test_what_the_grid_raises_reaches_who_asks(link):
    made, grid, _ = link
    grid.error = ConnectionError("the SuperLink is gone")
    with pytest.raises(ConnectionError, match="the SuperLink is gone"):
        made.pull(["ticket-2"])


def test_a_reply_that_took_long_is_kept_for_who_asks_next(link, monkeypatch):
    made, grid, tickets = link
    monkeypatch.setattr(grid_link, "_FORGOTTEN", 0.5)
    made.pull(tickets)
    time.sleep(0.6)
    grid.whole.set()
    made._looks["ticket-1"].join()
    made.pull([])  # somebody asks for others meanwhile
    assert [ticket for ticket, _ in made.pull(["ticket-1"])] == ["ticket-1"]
