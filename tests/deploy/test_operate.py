"""A run is submitted until it is done, or until trying again brings nothing."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from small_deployment import HereLink, SlowClock, write_federation

from fedmerge.core.errors import FedmergeError, UsageError
from fedmerge.deploy import commands, operate
from fedmerge.deploy.blueprint import Blueprint, write_blueprint
from fedmerge.deploy.commands import RunEnd
from fedmerge.deploy.deployment import new_deployment, write_deployment
from fedmerge.deploy.news import NewLines, NewsFormatter
from fedmerge.deploy.roster import read_roster
from fedmerge.deploy.server import serve


class Submitting:
    """In the place of Flower: each try is a network in this process, or a run that is killed before its first round."""

    def __init__(self, monkeypatch, *tries):
        self.tries, self.made = tries, 0
        monkeypatch.setattr(operate, "_submitted", self)

    def __call__(self, federation, tell):
        link = self.tries[min(self.made, len(self.tries) - 1)]
        self.made += 1
        if link is None:
            return RunEnd("1", "finished:failed", "killed")
        serve(federation, HereLink(federation, **link), clock=SlowClock().clock())
        return RunEnd("1", "finished:completed")


def without_last_model(name, kind, letter):
    return None if (name, kind) == ("clinic-c", "final") else letter


def run(folder):
    said, waited = [], []
    record = operate.run_until_done(folder, said.append, sleep=waited.append)
    return record, said, waited


def test_a_run_that_is_done_is_not_submitted_again(tmp_path, monkeypatch):
    submitting = Submitting(monkeypatch, {})
    write_federation(tmp_path / "f")
    for _ in range(2):
        assert run(tmp_path / "f")[0].status == "finished"
    assert submitting.made == 1


def test_a_site_that_comes_for_its_model_late_gets_it(tmp_path, monkeypatch):
    submitting = Submitting(monkeypatch, {"tamper": without_last_model}, {})
    federation = write_federation(tmp_path / "f")
    run(tmp_path / "f")
    assert operate.is_done(federation)
    assert submitting.made == 2


def test_a_site_that_is_gone_for_good_does_not_make_the_run_fail(tmp_path, monkeypatch):
    submitting = Submitting(monkeypatch, {"tamper": without_last_model})
    federation = write_federation(tmp_path / "f")
    record, said, _ = run(tmp_path / "f")
    assert (record.status, submitting.made) == ("finished", 2)
    assert said[-1] == "the rounds are done; no model yet at clinic-c: run again when they are there"
    assert operate.lacking(federation) == ("clinic-c",)
    assert not operate.is_done(federation)


def test_a_run_that_was_killed_while_it_waited_for_a_site_is_submitted_again(tmp_path, monkeypatch):
    submitting = Submitting(monkeypatch, {"tamper": without_last_model}, None, {})
    federation = write_federation(tmp_path / "f")
    run(tmp_path / "f")
    assert operate.is_done(federation)
    assert submitting.made == 3


def test_a_run_that_ends_again_and_again_without_a_reason_is_told(tmp_path, monkeypatch):
    submitting = Submitting(monkeypatch, None)
    write_federation(tmp_path / "f")
    said, waited = [], []
    with pytest.raises(
        FedmergeError,
        match=r"ended 5 times without coming further than round 0: .*\(killed\)",
    ):
        operate.run_until_done(tmp_path / "f", said.append, sleep=waited.append)
    assert submitting.made == 6
    assert waited == sorted(waited)


def test_a_reason_that_somebody_must_mend_ends_the_run_at_once(tmp_path, monkeypatch):
    submitting = Submitting(monkeypatch, {"absent": {"clinic-b"}})
    write_federation(tmp_path / "f")
    with pytest.raises(FedmergeError, match="2 of 3 sites have reported"):
        run(tmp_path / "f")
    assert submitting.made == 1


def test_a_run_that_failed_before_it_could_say_why_is_not_stopped_for_an_older_reason(tmp_path, monkeypatch):
    Submitting(monkeypatch, {"absent": {"clinic-b"}})
    federation = write_federation(tmp_path / "f")
    with pytest.raises(FedmergeError, match="2 of 3 sites have reported"):
        run(tmp_path / "f")
    submitting = Submitting(monkeypatch, None, {})
    assert (
        run(tmp_path / "f")[1][0]
        == "the run ended before its last round (killed); again in 5 s, from where the run stands"
    )
    assert operate.is_done(federation)
    assert submitting.made == 2


def test_the_same_reason_again_stops_the_run_again(tmp_path, monkeypatch):
    submitting = Submitting(monkeypatch, {"absent": {"clinic-b"}})
    write_federation(tmp_path / "f")
    for made in (1, 2):
        with pytest.raises(FedmergeError, match="2 of 3 sites have reported"):
            run(tmp_path / "f")
        assert submitting.made == made


def test_what_was_asked_to_end_submits_nothing_any_more(tmp_path, monkeypatch):
    submitting = Submitting(monkeypatch, None)
    write_federation(tmp_path / "f")
    ending = threading.Event()
    with pytest.raises(KeyboardInterrupt):
        operate.run_until_done(tmp_path / "f", print, sleep=lambda _: ending.set(), ending=ending)
    assert submitting.made == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_run_whose_terminal_is_closed_is_interrupted(tmp_path, monkeypatch, number):
    Submitting(monkeypatch, None)
    write_federation(tmp_path / "f")
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt):
        operate.run_until_done(tmp_path / "f", print, sleep=lambda _: os.kill(os.getpid(), number))
    assert signal.getsignal(number) is before


def test_no_part_runs_on_when_the_terminal_is_closed(tmp_path, monkeypatch):
    federation = write_federation(tmp_path / "f")
    sleeper = [sys.executable, "-c", "import time; time.sleep(600)"]
    stopped, submitted = [], []

    def submit(*_):
        submitted.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGHUP)
        while not stopped:
            time.sleep(0.05)
        return RunEnd("7", "finished:stopped")

    for name in ("superlink_command", "supernode_command"):
        monkeypatch.setattr(operate.processes, name, lambda *_: sleeper)
    monkeypatch.setattr(operate.processes, "wait_for_superlink", lambda *_, **__: True)
    monkeypatch.setattr(operate, "register_sites", lambda *_: None)
    monkeypatch.setattr(operate, "_submitted", submit)
    monkeypatch.setattr(operate, "open_run", lambda _: "7")
    monkeypatch.setattr(operate, "stop_run", lambda _, run: stopped.append(run))
    with pytest.raises(KeyboardInterrupt):
        operate.run_here(tmp_path / "f", lambda _: None)
    assert stopped == ["7"]
    assert list((federation.folder / operate.LOGS).glob("*.pid")) == []
    time.sleep(0.3)
    assert len(submitted) == 1


NODE = """import sys, time
print("Flower's own line")
print("fedmerge: round 1: trained")
sys.stdout.flush()
time.sleep(600)
"""


def test_the_people_of_a_site_hear_its_news_and_no_more(tmp_path, monkeypatch):
    write_federation(tmp_path / "f")
    place, told = tmp_path / "f/sites/clinic-a", []
    (place / "logs").mkdir()
    (place / "logs/supernode.log").write_text("fedmerge: of an earlier day\n")
    monkeypatch.setattr(operate.processes, "supernode_command", lambda *_: [sys.executable, "-c", NODE])

    def tell(line):
        told.append(line)
        if len(told) == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    operate.start_site(place, tell)
    assert told[0].startswith("site clinic-a runs")
    assert told[1:] == ["round 1: trained"]


def test_new_lines_are_whole_and_survive_a_log_that_begins_anew(tmp_path):
    path = tmp_path / "log"
    new = NewLines(path)
    assert new.take() == []
    path.write_text("one\ntw")
    assert new.take() == ["one"]
    with path.open("a") as file:
        file.write("o\nthree\n")
    assert new.take() == ["two", "three"]
    path.write_text("anew\n")
    assert new.take() == ["anew"]
    assert new.take() == []


def test_the_run_that_came_first_is_the_one_that_is_followed(tmp_path, monkeypatch):
    write_federation(tmp_path / "f")
    runs = [{"run-id": "3", "status": "running"}, {"run-id": "2", "status": "running"}]
    runs.append({"run-id": "1", "status": "finished:failed"})
    monkeypatch.setattr(commands, "_ask", lambda *_: {"runs": runs})
    assert commands.open_run(tmp_path / "f") == "2"


def test_what_somebody_must_mend_and_what_may_go_on_later_end_differently(tmp_path, monkeypatch):
    federation = write_federation(tmp_path / "f")

    def stopping(mend):
        def submit(*_):
            write_deployment(federation.run_folder, replace(known, run=f"run-{mend}", stopped="why", mend=mend))
            return RunEnd("1", "finished:failed", "")

        return submit

    known = new_deployment(federation.terms.digest)
    federation.run_folder.mkdir()
    for mend, error in ((True, UsageError), (False, FedmergeError)):
        monkeypatch.setattr(operate, "_submitted", stopping(mend))
        with pytest.raises(FedmergeError, match="why") as caught:
            run(tmp_path / "f")
        assert type(caught.value) is error


def test_a_run_of_other_terms_is_not_even_submitted(tmp_path, monkeypatch):
    federation = write_federation(tmp_path / "f")
    submitting = Submitting(monkeypatch, {})
    federation.run_folder.mkdir()
    write_deployment(federation.run_folder, new_deployment("0" * 64))
    with pytest.raises(UsageError, match="was run under other terms"):
        run(tmp_path / "f")
    assert submitting.made == 0


def test_whoever_ends_a_run_whose_superlink_is_gone_is_heard(tmp_path, monkeypatch):
    write_federation(tmp_path / "f")

    def gone(*_, **__):
        raise commands.FlowerCommandError("flwr list failed: connection refused")

    def interrupted(*_, **__):
        monkeypatch.setattr(commands, "_ask", gone)
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "_ask", lambda *_, **__: {"runs": []})
    monkeypatch.setattr(commands, "_follow", interrupted)
    with pytest.raises(KeyboardInterrupt):
        commands.submit(tmp_path / "f")


def test_a_superlink_whose_keeper_was_killed_is_ended_before_its_port_is_looked_at(tmp_path, monkeypatch):
    write_federation(tmp_path / "f")
    order = []

    class Kept(operate.processes.Processes):
        def clear(self, name):
            order.append(f"clear {name}")
            super().clear(name)

    def taken(_):
        order.append("port")
        raise UsageError("taken")

    monkeypatch.setattr(operate, "_refuse_taken", taken)
    monkeypatch.setattr(operate.processes, "superlink_command", lambda *_: [sys.executable])
    with Kept(tmp_path / "logs") as kept, pytest.raises(UsageError, match="taken"):
        operate._start_link(kept, read_roster(tmp_path / "f"), print)
    assert order == ["clear superlink", "port"]


def test_every_line_of_a_message_is_news_and_no_line_of_a_traceback():
    try:
        int("odd")
    except ValueError:
        fault = sys.exc_info()
    record = logging.LogRecord("fedmerge", logging.ERROR, "here", 1, "%s", ("one\ntwo",), fault)
    lines = NewsFormatter().format(record).splitlines()
    assert lines[:2] == ["fedmerge: one", "fedmerge: two"]
    assert len(lines) > 3
    assert not any(line.startswith("fedmerge: ") for line in lines[2:])


def test_sites_are_registered_by_one_at_a_time(tmp_path, monkeypatch):
    """The start of the server and a run may both do it; each key must be known under its own number."""
    names = ("clinic-a", "clinic-b", "clinic-c")
    folder = tmp_path / "f"
    plan = {"rounds": 1, "method": {"name": "fedavg"}}
    data = {"class_names": ["0", "1"], "shape": [2]}
    write_blueprint(folder, Blueprint("f", "127.0.0.1:9092", sites=names, config=plan, data=data))
    numbers, lock = {}, threading.Lock()

    def ask(roster, *words, more=()):
        time.sleep(0.02)
        with lock:
            if words[1] == "list":
                return {"nodes": [{"node-id": number, "status": "registered"} for number in numbers.values()]}
            time.sleep(0.02)
            line = Path(words[2]).read_text().strip()
            if line in numbers:
                raise commands.FlowerCommandError(f"flwr failed: {commands._IN_USE}")
            numbers[line] = str(len(numbers) + 1)
            return {"node-id": numbers[line]}

    monkeypatch.setattr(commands, "_ask", ask)
    with ThreadPoolExecutor(2) as pool:
        found = [each.result() for each in [pool.submit(commands.register_sites, folder) for _ in range(2)]]
    assert sorted(len(each.added) for each in found) == [0, 3]
    assert json.loads((folder / "flower/nodes.json").read_text()) == numbers
