"""How long the server waits, for whom, and what sites can and cannot make it believe or do."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from small_deployment import HereLink, SlowClock, write_federation
from test_server import Spoiling, interrupt, run, said, same, states, with_nan

from fedmerge.core.errors import DivergedError, FedmergeError, UsageError
from fedmerge.deploy.client import answer_to
from fedmerge.deploy.deployment import read_deployment
from fedmerge.deploy.federation import DeployOptions, read_federation
from fedmerge.deploy.link import Contact, Failure
from fedmerge.deploy.messages import Letter, Order, answer_from, order_from, text_of
from fedmerge.deploy.private_state import BusyError, PrivateState, site_held
from fedmerge.deploy.ready import ready_site
from fedmerge.deploy.roll import pulled
from fedmerge.deploy.server import serve
from fedmerge.deploy.site import read_site
from fedmerge.deploy.status import read_status
from fedmerge.experiment.record import RoundRecord, Scores, read_run, read_run_alone, select

QUICK = {"insecure": True, "deadline": 5000.0, "patience": 90000.0, "absent": 300.0, "poll": 5.0}


class Absent(Spoiling):
    """A site that goes away at one of its answers, for good or for so long."""

    def __init__(self, network, clock, name, number, seconds=float("inf")):
        super().__init__(name, self.go, number=number)
        self.network, self.clock, self.until, self.seconds = network, clock, None, seconds
        network.tamper = self
        inner = clock.sleep

        def sleep(seconds):
            inner(seconds)
            if self.until is not None and clock.time >= self.until:
                network.absent.discard(name)
                network.since[name] = "later"

        clock.sleep = sleep

    def go(self, letter):
        self.network.absent.add(self.name)
        self.until = self.clock.time + self.seconds


def going_away(federation, name, number, seconds=float("inf")):
    clock, network = SlowClock(), HereLink(federation)
    Absent(network, clock, name, number, seconds)
    return clock, network


def serve_with(federation, clock, network):
    serve(federation, network, clock=clock.clock())


def test_a_site_that_is_gone_costs_minutes_and_one_that_works_slowly_its_time(tmp_path):
    federation = write_federation(tmp_path / "gone", deploy=QUICK)
    clock, network = going_away(federation, "clinic-b", 2)
    serve_with(federation, clock, network)
    messages = 4  # rounds 2 and 3, the last scores, the models
    assert messages * 300 <= clock.time < messages * 300 + 100
    slow = write_federation(tmp_path / "slow", deploy=QUICK)
    clock = SlowClock()
    run(slow, clock, tamper=Spoiling("clinic-b", lambda _: None))
    assert 5000 <= clock.time < 5100  # it was connected all the time


def test_a_site_that_is_back_within_minutes_has_missed_nothing(tmp_path):
    federation, whole = write_federation(tmp_path / "f", deploy=QUICK), write_federation(tmp_path / "w", deploy=QUICK)
    clock, network = going_away(federation, "clinic-b", 2, seconds=200)
    serve_with(federation, clock, network)
    run(whole)
    assert same(states(federation.run_folder), states(whole.run_folder))


def test_a_run_that_goes_on_does_not_wait_for_all_sites(tmp_path):
    federation = write_federation(tmp_path / "f", deploy=QUICK)
    with pytest.raises(KeyboardInterrupt):
        run(federation, tamper=Spoiling("clinic-b", interrupt, number=3))
    clock = SlowClock()
    run(federation, clock, absent={"clinic-b"})
    record = read_run(federation.run_folder)
    assert clock.time < 2000
    assert record.status == "finished"
    assert record.num_train[1] == 31  # what was known of it stays


def test_a_run_that_goes_on_asks_nobody_who_they_are_where_keys_say_it(tmp_path):
    federation = write_federation(tmp_path / "f", deploy=QUICK)
    with pytest.raises(KeyboardInterrupt):
        run(federation, named=True, tamper=Spoiling("clinic-b", interrupt, number=3))
    assert {kind for _, kind in run(federation, named=True).sent} == {"round", "final"}


def test_sites_that_all_fail_for_a_while_are_asked_again(tmp_path):
    federation, whole = write_federation(tmp_path / "f", deploy=QUICK), write_federation(tmp_path / "w", deploy=QUICK)
    clock = SlowClock()

    def share_is_gone(name, kind, letter):
        down = kind == "round" and 100 < clock.time < 1000
        return Failure("its file share is gone", lost=False) if down else letter

    clock.time = 90.0
    link = HereLink(federation, tamper=share_is_gone)
    inner = link.push

    def push(contact, kind, letter, **more):
        clock.time += 5
        return inner(contact, kind, letter, **more)

    link.push = push
    serve_with(federation, clock, link)
    run(whole)
    assert clock.time > 1000
    assert same(states(federation.run_folder), states(whole.run_folder))


def test_a_busy_site_does_not_lose_its_tries(tmp_path):
    federation = write_federation(tmp_path / "f", deploy={**QUICK, "attempts": 1})
    busy = Spoiling("clinic-b", lambda _: Failure("in use by process 7", lost=True), times=5)
    run(federation, tamper=busy)
    assert busy.left == 0
    assert [line.dropped for line in read_run(federation.run_folder).rounds] == [()] * 4


def test_a_site_that_was_turned_away_is_asked_again_later(tmp_path):
    federation = write_federation(tmp_path / "f", deploy=QUICK)
    wrong = Spoiling("clinic-b", lambda letter: said(letter, site="clinic-x"), kind="hello", number=1)
    clock = SlowClock()
    run(federation, clock, named=True, tamper=wrong)
    assert 60 <= clock.time < 100
    assert read_run(federation.run_folder).status == "finished"


def test_a_site_that_has_not_introduced_itself_is_asked_for_no_round(tmp_path):
    federation = write_federation(tmp_path / "f", deploy={**QUICK, "start_with": 2})
    wrong = Spoiling("clinic-b", lambda letter: said(letter, site="clinic-a"), kind="hello", number=1, times=99)
    network = run(federation, named=True, tamper=wrong)
    assert {kind for name, kind in network.sent if name == "clinic-b"} == {"hello"}
    status = read_status(federation.run_folder)
    assert "says that it is 'clinic-a'" in status.sites["clinic-b"].told


def test_a_site_whose_introduction_fails_is_asked_ever_more_rarely(tmp_path):
    federation = write_federation(tmp_path / "f", deploy=QUICK)
    clock = SlowClock()
    failing = Spoiling("clinic-b", lambda _: Failure("no data", lost=False), times=8, kind="hello", number=1)
    network = run(federation, clock, tamper=failing)
    assert network.sent.count(("clinic-b", "hello")) == 9
    assert clock.time > 2 + 4 + 8 + 16 + 32 + 64 + 128 + 256


# ---------------------------------------------------------------- what is believed


@pytest.mark.parametrize("changes", [{"passed": 2**63 - 1}, {"num_validation": 2**60}, {"site": "x" * 10**6}])
def test_numbers_and_names_that_no_file_could_hold_are_refused(tmp_path, changes):
    federation = write_federation(tmp_path / "f")
    run(federation, tamper=Spoiling("clinic-b", lambda letter: said(letter, **changes)))
    record = read_run(federation.run_folder)
    assert [dict(refusal)["reason"] for refusal in record.rounds[2].refused] == ["malformed"]


def test_nothing_of_a_refused_answer_counts(tmp_path):
    federation = write_federation(tmp_path / "f")
    lie = {"test": {"accuracy": 1.0, "loss": 0.0}, "validation": {"accuracy": 1.0, "loss": 0.0}, "num_train": 999}
    run(federation, tamper=Spoiling("clinic-b", lambda letter: said(with_nan(letter), **lie)))
    record = read_run(federation.run_folder)
    assert record.rounds[1].test.accuracy[1] is None
    assert record.num_train[1] == 31


def test_a_note_is_one_short_line(tmp_path):
    federation = write_federation(tmp_path / "f")
    run(federation, tamper=Spoiling("clinic-b", lambda letter: said(letter, note="\x1b[2J\nINFO: finished\n" * 1000)))
    told = read_status(federation.run_folder).sites["clinic-b"].told
    assert len(told) <= 600
    assert told.isprintable()


def test_rounds_are_compared_on_the_clients_they_share():
    def line(number, *accuracy):
        scores = Scores(accuracy, (0.0,) * len(accuracy))
        return RoundRecord(number, (), 0.0, 0, 0, 0, 0, {}, validation=scores, test=scores)

    weak_one_away = line(2, 0.6, None, 0.5)
    assert select([line(1, 0.5, 0.1, 0.5), weak_one_away, line(3, 0.7, 0.2, 0.5)]).round == 3
    assert select([line(1, 0.6, 0.1, 0.5), line(2, 0.6, None, 0.5)]).round == 1
    assert select([line(0, 0.1, None, None), line(5, None, 0.9, 0.9)]).round == 5  # nothing speaks for round 0
    assert select([line(4, 0.5, 0.5, 0.5), line(5, None, None, None)]).round == 4


# ---------------------------------------------------------------- at the site


def order_for(federation, **changes):
    """The first order of a round that a server sends to clinic-a, changed."""
    caught = []
    link = HereLink(federation)
    inner = link.push

    def push(contact: Contact, kind, letter, **more):
        if kind == "round":
            caught.append(letter)
            raise KeyboardInterrupt
        return inner(contact, kind, letter, **more)

    link.push = push
    with pytest.raises(KeyboardInterrupt):
        serve_with(federation, SlowClock(), link)
    return Letter(json.dumps({**json.loads(caught[0].text), **changes}), caught[0].tensors)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"round": 9}, "asks for round 9; the terms have 3"),
        ({"round": -1}, "asks for round -1"),
        ({"rate": 5.0}, "asks for rate 5.0 in round 1"),
        ({"client": 2}, "calls this site client 2; in .* it is 0"),
        ({"site": "clinic-b"}, "is for site 'clinic-b'; this is 'clinic-a'"),
    ],
)
def test_a_site_refuses_what_was_not_agreed(tmp_path, changes, told):
    federation = write_federation(tmp_path / "f")
    site = federation.folder / "sites/clinic-a"
    (site / "federation.toml").write_bytes((federation.folder / "federation.toml").read_bytes())
    with pytest.raises(UsageError if "site" not in changes else FedmergeError, match=told):
        answer_to(order_for(federation, **changes), read_site(site))


def test_a_late_order_removes_nothing_newer(tmp_path):
    federation = write_federation(tmp_path / "f", method={"name": "ditto"})
    site = read_site(federation.folder / "sites/clinic-a")
    old = order_for(federation)
    answer_to(old, site)
    (folder,) = site.state_folder.glob("*/")
    for number in (2, 3):
        (folder / f"private-{number}.safetensors").write_bytes((folder / "private-1.safetensors").read_bytes())
    answer_to(old, site)
    assert sorted(path.name for path in folder.iterdir()) == [f"private-{k}.safetensors" for k in (1, 2, 3)]


def test_the_same_order_has_the_same_answer(tmp_path):
    federation = write_federation(tmp_path / "f", method={"name": "ditto"})
    site, order = read_site(federation.folder / "sites/clinic-a"), order_for(federation)
    first, second = (answer_to(order, site) for _ in range(2))
    assert torch.equal(first.tensors["delta"], second.tensors["delta"])
    answers = [replace(answer_from(each.text), seconds=0.0) for each in (first, second)]
    assert answers[0] == answers[1]


def test_states_of_other_runs_are_removed_in_the_end(tmp_path):
    federation = write_federation(tmp_path / "f", method={"name": "ditto"})
    other = federation.folder / "sites/clinic-a/state/0123456789abcdef"
    kept = federation.folder / "sites/clinic-a/state/notes"
    for folder in (other, kept):
        folder.mkdir(parents=True)
    run(federation)
    assert not other.exists()
    assert kept.exists()


def test_a_site_at_work_says_that_it_is_busy(tmp_path):
    folder = tmp_path / "state"
    busy = pytest.raises(BusyError, match="in use by process")
    with site_held(folder, 0.0), busy, site_held(folder, 0.0):
        pass


def test_a_damaged_private_state_is_told(tmp_path):
    federation = write_federation(tmp_path / "f", method={"name": "ditto"})
    run(federation)
    site = federation.folder / "sites/clinic-a"
    (path,) = (site / "state").glob("*/private-3.safetensors")
    path.write_bytes(path.read_bytes()[:-9])
    ready = ready_site(read_site(site), federation.terms)
    state = PrivateState(site / "state", read_status(federation.run_folder).run, ready.fresh())
    with pytest.raises(FedmergeError, match="is needed to go on"):
        state.at(3)
    assert state.at(3, anew=True)[1].startswith("its private state of round 3 is gone")


def test_a_finished_run_of_other_sites_hands_nothing_over(tmp_path):
    federation = write_federation(tmp_path / "f")
    run(federation, tamper=lambda name, kind, letter: None if (name, kind) == ("clinic-c", "final") else letter)
    path = tmp_path / "f/federation.toml"
    path.write_text(path.read_text().replace('clinic-a = ""\n', ""))
    with pytest.raises(UsageError, match="was begun with the sites clinic-a, clinic-b, clinic-c"):
        run(read_federation(tmp_path / "f"))


def test_sums_that_cannot_be_are_turned_away_and_the_site_is_named(tmp_path):
    schema = {"class_names": ["0", "1", "2"], "shape": [6], "scale": "pooled"}
    federation = write_federation(tmp_path / "f", data=schema, deploy=QUICK)
    odd = {"moments": {"count": 30, "total": [1.0] * 5, "squares": [1.0] * 5}}
    clock = SlowClock()
    run(federation, clock, tamper=Spoiling("clinic-b", lambda letter: said(letter, **odd), kind="hello", number=1))
    assert 60 <= clock.time < 100  # it was asked again, and told the right ones
    assert any("clinic-b" in text for text in read_status(federation.run_folder).strangers)


def test_a_site_with_other_programs_is_told_in_the_status(tmp_path):
    federation = write_federation(tmp_path / "f")

    def older(name, kind, letter):
        if name != "clinic-b":
            return letter
        answer = json.loads(letter.text)
        answer["versions"]["fedmerge"] = "0.0.9\nand a line"
        return letter._replace(text=json.dumps(answer))

    run(federation, tamper=older)
    told = {name: site.told for name, site in read_status(federation.run_folder).sites.items()}
    assert told["clinic-b"].startswith("it has fedmerge '0.0.9\\nand a line' instead of")
    assert told["clinic-a"] == told["clinic-c"] == ""


def test_people_at_a_site_are_told_what_it_did(tmp_path, caplog):
    federation = write_federation(tmp_path / "f")
    caplog.set_level("INFO", "fedmerge.deploy.client")
    run(federation)
    news = [record.getMessage() for record in caplog.records if record.name == "fedmerge.deploy.client"]
    assert sum("the server knows this site, which has" in line for line in news) == 3
    assert sum(line.startswith("round 2: trained; the model that came has accuracy 0.") for line in news) == 3
    assert sum(line.startswith("round 4: scored without training; the model") for line in news) == 3
    assert sum("this site's own model, of round" in line for line in news) == 3


HANGING = """import logging, sys, time
from fedmerge.deploy.time_limit import time_limit
logging.basicConfig(format="%(message)s")
with time_limit(float(sys.argv[1])):
    time.sleep(float(sys.argv[2]))
print("went on")
"""


@pytest.mark.parametrize(("limit", "works", "ends"), [(0.5, 60, True), (60, 0.01, False), (0, 0.01, False)])
def test_a_program_that_hangs_ends_itself_and_says_so(limit, works, ends):
    command = [sys.executable, "-c", HANGING, str(limit), str(works)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == ends
    assert done.stdout == ("" if ends else "went on\n")
    assert ("is taken to hang: it is ended" in done.stderr) == ends
    assert ("in <module>" in done.stderr) == ends, "where it hung"


def test_sites_are_told_how_long_anybody_waits(tmp_path):
    federation = write_federation(tmp_path / "f")
    link, told = HereLink(federation), []
    push = link.push

    def noted(contact, kind, letter, **more):
        told.append((kind, order_from(letter.text).seconds))
        return push(contact, kind, letter, **more)

    link.push = noted
    serve(federation, link, clock=SlowClock().clock())
    assert {kind for kind, _ in told} == {"hello", "round", "final"}
    assert {seconds for kind, seconds in told if kind != "hello"} == {2 * federation.deploy.deadline}
    assert {seconds for kind, seconds in told if kind == "hello"} == {6 * 3600.0}
    with pytest.raises(FedmergeError, match="seconds: got -1"):
        order_from(text_of(Order("hello", "r", 0, 0, "a", {}, seconds=-1.0)))


def test_a_run_of_known_keys_that_was_killed_in_its_first_round_begins_anew(tmp_path):
    """The server knew all counts already, and waited for sites to say them that it did not ask."""
    federation = write_federation(tmp_path / "f", deploy=QUICK)
    clock = SlowClock()
    with pytest.raises(KeyboardInterrupt):
        serve(federation, HereLink(federation, named=True, tamper=Spoiling("clinic-b", interrupt, number=1)))
    assert read_run_alone(federation.run_folder).num_train[0] > 0
    serve(federation, HereLink(federation, named=True), clock=clock.clock())
    assert read_run(federation.run_folder).status == "finished"
    assert clock.time < 100


def test_the_last_scores_are_waited_for_when_nobody_is_there(tmp_path):
    """Else the round that is selected would be one from before the network was cut."""
    federation = write_federation(tmp_path / "f", deploy=QUICK)
    undisturbed = write_federation(tmp_path / "g", deploy=QUICK)
    run(undisturbed)
    clock = SlowClock()

    class Cut(HereLink):
        """A network that is cut for 3,000 seconds after round 3."""

        trained = 0

        def push(self, contact, kind, letter, **more):
            order = order_from(letter.text)
            if self.trained == 3 and clock.time < 3000:
                self.absent = set(federation.names)
                return None
            self.trained += order.train and order.round == 3
            return super().push(contact, kind, letter, **more)

        def contacts(self):
            self.absent = self.absent if clock.time < 3000 else set()
            return super().contacts()

    serve(federation, Cut(federation), clock=clock.clock())
    found, wanted = read_run(federation.run_folder), read_run(undisturbed.run_folder)
    assert 3000 <= clock.time < 3100
    assert found.selected().round == wanted.selected().round
    assert found.selected().test == wanted.selected().test


def test_a_site_that_is_asked_again_gets_twice_as_long():
    options = DeployOptions(deadline=100.0, patience=1000.0)
    assert [options.limit(failures) for failures in range(5)] == [200.0, 400.0, 800.0, 1000.0, 1000.0]
    assert DeployOptions(deadline=100.0, patience=1.0).limit(7) == 200.0
    assert DeployOptions(deadline=1e15).limit(10**6) == 1e9


def test_a_site_slower_than_the_limit_ends_its_round_when_it_is_asked_again(tmp_path):
    federation = write_federation(tmp_path / "f", deploy={**QUICK, "deadline": 100.0})
    told = []

    class Slow(HereLink):
        """Sites whose programs need 300 seconds, and end themselves after their limit."""

        def push(self, contact, kind, letter, **more):
            ticket = super().push(contact, kind, letter, **more)
            seconds = order_from(letter.text).seconds
            if kind == "round":
                told.append(seconds)
                if seconds < 300:
                    self._waiting[ticket] = Failure("ClientApp stopped responding", lost=False)
            return ticket

    serve(federation, Slow(federation), clock=SlowClock().clock())
    assert read_run(federation.run_folder).status == "finished"
    assert sorted(set(told)) == [200.0, 400.0]


def test_large_answers_are_taken_one_after_the_other():
    asked = []

    class Counting:
        def pull(self, tickets):
            asked.append(len(tickets))
            return [(ticket, Failure("", lost=True)) for ticket in tickets]

    tickets = [str(number) for number in range(20)]
    for size, wanted in ((0, [16, 4]), (1 << 27, [4] * 5), (1 << 31, [1] * 20)):
        asked.clear()
        assert len(list(pulled(Counting(), tickets, size))) == 20
        assert asked == wanted


def test_most_sites_that_diverge_stop_the_run_for_somebody_to_mend_it(tmp_path):
    federation = write_federation(tmp_path / "f")

    def diverged(name, kind, letter):
        return with_nan(letter) if kind == "round" and name != "clinic-a" and letter.tensors else letter

    with pytest.raises(DivergedError, match="their training diverged"):
        run(federation, tamper=diverged)
    found = read_deployment(federation.run_folder)
    assert found.mend
    assert "diverged" in found.stopped
