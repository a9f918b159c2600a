"""The server's round loop over a network that loses, spoils and repeats: the right model or a clear message."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from small_deployment import HereLink, SlowClock, write_federation

from fedmerge.core.errors import FedmergeError, UsageError
from fedmerge.core.tensor_files import read_tensors
from fedmerge.deploy.deployment import read_deployment
from fedmerge.deploy.federation import read_federation
from fedmerge.deploy.link import Failure
from fedmerge.deploy.messages import Letter
from fedmerge.deploy.office import bases
from fedmerge.deploy.rehearsal import rehearse
from fedmerge.deploy.server import serve
from fedmerge.deploy.status import read_status
from fedmerge.experiment.record import read_run


def run(federation, clock=None, **link):
    network = HereLink(federation, **link)
    serve(federation, network, clock=(clock or SlowClock()).clock())
    return network


def states(folder: Path) -> dict[str, torch.Tensor]:
    files = ("models.safetensors", "last.safetensors")
    found = {f"{file}:{name}": tensor for file in files for name, tensor in read_tensors(folder / file).items()}
    return {name: tensor for name, tensor in found.items() if ":server." in name}


def same(one, other):
    return save(one) == save(other)  # NaN is a value like others


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The state that the small federation ends with, simulated in one process."""
    folder = tmp_path_factory.mktemp("undisturbed")
    rehearse(write_federation(folder / "f"), folder / "run")
    return states(folder / "run")


class Spoiling:
    """Answers of one site's rounds are changed, the first `times` times."""

    def __init__(self, name, change, times=1, kind="round", number=2):
        self.name, self.change, self.left, self.kind, self.number = name, change, times, kind, number
        self.rounds = 0

    def __call__(self, name, kind, letter):
        if name == self.name and kind == self.kind:
            self.rounds += 1
            if self.left and self.rounds >= self.number:
                self.left -= 1
                return self.change(letter)
        return letter


def said(letter, **changes):
    return letter._replace(text=json.dumps({**json.loads(letter.text), **changes}))


def with_nan(letter):
    delta = letter.tensors["delta"].clone()
    delta[3] = torch.nan
    return letter._replace(tensors={"delta": delta})


def test_a_site_that_comes_late_is_waited_for(tmp_path, undisturbed):
    federation = write_federation(tmp_path / "f")
    network = HereLink(federation, absent={"clinic-b"})
    clock = SlowClock()

    def sleep(seconds):
        clock.time += seconds
        if clock.time > 5:
            network.absent.clear()

    clock.sleep = sleep
    serve(federation, network, clock=clock.clock())
    assert clock.time > 5
    assert same(states(federation.run_folder), undisturbed)


@pytest.mark.parametrize("lost", [True, False])
def test_a_site_that_fails_once_is_asked_again(tmp_path, undisturbed, lost):
    federation = write_federation(tmp_path / "f")
    network = run(federation, tamper=Spoiling("clinic-b", lambda _: Failure("its disk was full", lost)))
    assert network.sent.count(("clinic-b", "round")) == network.sent.count(("clinic-a", "round")) + 1
    assert same(states(federation.run_folder), undisturbed)


def test_a_letter_that_is_lost_with_a_connection_is_sent_again(tmp_path, undisturbed):
    federation = write_federation(tmp_path / "f")
    network = HereLink(federation)

    def lose(letter):
        network.since["clinic-b"] = "later"  # it came back at once, and has forgotten what it was asked

    network.tamper = Spoiling("clinic-b", lose)
    clock = SlowClock()
    serve(federation, network, clock=clock.clock())
    assert clock.time < 10  # nobody waited for the deadline
    assert same(states(federation.run_folder), undisturbed)


def test_a_round_goes_on_without_a_site_that_hangs(tmp_path):
    federation = write_federation(tmp_path / "f")
    clock = SlowClock()
    run(federation, clock, tamper=Spoiling("clinic-b", lambda _: None))
    record = read_run(federation.run_folder)
    assert 30 <= clock.time < 60
    assert [line.dropped for line in record.rounds] == [(), (), (1,), ()]
    assert record.rounds[1].test.accuracy[1] is None  # its score came with the answer that did not
    assert record.status == "finished"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (with_nan, "values"),
        (lambda letter: letter._replace(tensors={"delta": letter.tensors["delta"][:-1]}), "shape"),
        (lambda letter: letter._replace(tensors={"delta": letter.tensors["delta"].double()}), "dtype"),
        (lambda letter: letter._replace(tensors={}), "names"),
        (lambda letter: letter._replace(text="{"), "malformed"),
        (lambda letter: said(letter, extra=1), "malformed"),
        (lambda letter: said(letter, num_train=0), "count"),
        (lambda letter: said(letter, num_train=10**12), "count"),
        (lambda letter: said(letter, round=1), "round"),
        (lambda letter: said(letter, run="another"), "run"),
        (lambda letter: said(letter, site="clinic-a"), "client"),
        (lambda letter: said(letter, client=0), "client"),
        (lambda letter: said(letter, test={"accuracy": 7.0, "loss": 0.0}), "malformed"),
    ],
)
def test_a_spoiled_answer_is_refused_and_changes_nothing(tmp_path, change, reason):
    federation, silent = write_federation(tmp_path / "f"), write_federation(tmp_path / "silent")
    run(federation, tamper=Spoiling("clinic-b", change))
    run(silent, tamper=Spoiling("clinic-b", lambda _: None))
    record = read_run(federation.run_folder)
    assert [dict(refusal) for refusal in record.rounds[2].refused] == [{"client": 1, "reason": reason}]
    last = [{k: v for k, v in states(f.run_folder).items() if "last" in k} for f in (federation, silent)]
    assert same(*last)  # which round is selected may depend on its scores, if those were believed
    assert read_status(federation.run_folder).sites["clinic-b"].refusals == 1


def test_private_state_follows_admitted_answers_only(tmp_path):
    """A refused reply is as if the site had not trained: also for what the site keeps to itself."""
    options = {"method": {"name": "ditto"}, "rounds": 4}
    federation, silent = write_federation(tmp_path / "f", **options), write_federation(tmp_path / "s", **options)
    run(federation, tamper=Spoiling("clinic-b", with_nan))
    run(silent, tamper=Spoiling("clinic-b", lambda letter: said(letter, num_train=0)))
    tests = [[line.test for line in read_run(each.run_folder).rounds] for each in (federation, silent)]
    assert tests[0] == tests[1]
    (state,) = (federation.folder / "sites/clinic-b/state").glob("*/")
    kept = sorted(path.name for path in state.iterdir())
    assert kept[-1] == "private-4.safetensors"
    assert "private-2.safetensors" not in kept


def test_too_few_answers_end_with_a_message_and_the_run_goes_on_later(tmp_path, undisturbed):
    federation = write_federation(tmp_path / "f")
    with pytest.raises(FedmergeError, match="round 2: 0 of 1 answers that are needed came within 60 s"):
        run(federation, tamper=lambda name, kind, letter: letter if json.loads(letter.text)["round"] < 2 else None)
    assert read_run(federation.run_folder).status == "failed"
    assert "round 2" in read_deployment(federation.run_folder).stopped
    network = run(federation)
    assert network.sent.count(("clinic-a", "round")) == 3  # rounds 2 and 3, and the last scores
    assert same(states(federation.run_folder), undisturbed)
    assert read_deployment(federation.run_folder).stopped == ""


def test_sites_that_never_report_end_with_a_message(tmp_path):
    federation = write_federation(tmp_path / "f")
    with pytest.raises(FedmergeError, match="2 of 3 sites have reported within 60 s"):
        run(federation, absent={"clinic-c"})


@pytest.mark.parametrize("stop", range(1, 14))
@pytest.mark.parametrize("method", ["fedmerge", "ditto"])
def test_a_server_that_dies_at_any_message_goes_on_with_the_same_bits(tmp_path, stop, method):
    """Every message in turn is the one at which the server dies."""
    federation = write_federation(tmp_path / "f", method={"name": method})
    whole = write_federation(tmp_path / "whole", method={"name": method})
    run(whole)
    told = 0

    def dying(name, kind, letter):
        nonlocal told
        told += 1
        if told == stop:
            raise KeyboardInterrupt
        return letter

    with pytest.raises(KeyboardInterrupt):
        run(federation, tamper=dying)
    run(federation)
    assert same(states(federation.run_folder), states(whole.run_folder))
    records = [read_run(each.run_folder) for each in (federation, whole)]
    assert [line.test for line in records[0].rounds] == [line.test for line in records[1].rounds]


def test_a_finished_run_hands_models_to_sites_that_lack_one(tmp_path):
    federation = write_federation(tmp_path / "f")
    run(federation, tamper=lambda name, kind, letter: None if (name, kind) == ("clinic-c", "final") else letter)
    assert read_deployment(federation.run_folder).delivered == ("clinic-a", "clinic-b")
    network = run(federation)
    assert network.sent[-1:] == [("clinic-c", "final")]
    assert {kind for _, kind in network.sent} == {"hello", "final"}
    assert read_deployment(federation.run_folder).delivered == ("clinic-a", "clinic-b", "clinic-c")


def test_other_terms_than_the_run_was_begun_with_are_refused(tmp_path):
    run(write_federation(tmp_path / "f"))
    path = tmp_path / "f/federation.toml"
    path.write_text(path.read_text().replace("lr = 0.1", "lr = 0.2"))
    with pytest.raises(UsageError, match="was run under other terms"):
        run(read_federation(tmp_path / "f"))


def test_other_sites_than_the_run_was_begun_with_are_refused(tmp_path):
    federation = write_federation(tmp_path / "f")
    with pytest.raises(KeyboardInterrupt):
        run(federation, tamper=Spoiling("clinic-b", interrupt))
    path = tmp_path / "f/federation.toml"
    path.write_text(path.read_text().replace('clinic-b = ""', 'clinic-b = ""\nclinic-d = ""'))
    with pytest.raises(UsageError, match="was begun with the sites clinic-a, clinic-b, clinic-c; the federation has"):
        run(read_federation(tmp_path / "f"))


def interrupt(letter):
    raise KeyboardInterrupt


def test_a_site_refuses_other_terms_than_it_has_agreed_to(tmp_path):
    federation = write_federation(tmp_path / "f")
    text = (tmp_path / "f/federation.toml").read_text().replace("lr = 0.1", "lr = 0.2")
    (tmp_path / "f/sites/clinic-b/federation.toml").write_text(text)
    with pytest.raises(UsageError, match=r"training.lr: agreed 0.2, asked 0.1"):
        run(federation)


def test_a_server_cannot_make_a_site_load_code(tmp_path):
    (tmp_path / "net.py").write_text("raise SystemExit('code of the server ran at a site')\n")
    federation = write_federation(tmp_path / "f")
    model = {"name": "import", "path": f"{tmp_path / 'net.py'}:net"}
    text = json.dumps(
        {
            "kind": "hello",
            "run": "r",
            "round": 0,
            "client": 0,
            "site": "clinic-a",
            "terms": {**federation.terms.plain(), "model": model},
        }
    )
    link = HereLink(federation)
    with pytest.raises(UsageError, match="a network from a file of its user's own"):
        link.push(link.contacts()[0], "hello", Letter(text, {}), group="", seconds=1)


def test_a_second_server_on_the_same_run_is_refused(tmp_path):
    federation = write_federation(tmp_path / "f")

    def second(name, kind, letter):
        if kind == "round":
            with pytest.raises(UsageError, match="is in use by process"):
                run(federation)
        return letter

    run(federation, tamper=second)
    assert read_run(federation.run_folder).status == "finished"


def test_a_site_that_claims_another_key_is_not_taken_in(tmp_path):
    federation = write_federation(tmp_path / "f", deploy={"insecure": True, "deadline": 5.0, "patience": 5.0})
    claims = Spoiling("clinic-b", lambda letter: said(letter, site="clinic-a"), kind="hello", number=1)
    with pytest.raises(FedmergeError, match="2 of 3 sites have reported"):
        run(federation, named=True, tamper=claims)
    status = read_status(federation.run_folder)
    assert "says that it is 'clinic-a'" in status.sites["clinic-b"].told


def test_a_lost_private_state_is_told_and_can_be_begun_anew(tmp_path):
    federation = write_federation(tmp_path / "f", method={"name": "ditto"}, rounds=4)
    site = federation.folder / "sites/clinic-b"

    def losing(letter):
        for path in (site / "state").glob("*/*.safetensors"):
            path.unlink()
        return letter

    with pytest.raises(FedmergeError, match="private state of round 2 is needed to go on"):
        run(federation, tamper=Spoiling("clinic-b", losing))
    text = (site / "site.toml").read_text()
    (site / "site.toml").write_text("anew = true\n" + text)
    run(federation)
    assert "it began anew" in read_status(federation.run_folder).sites["clinic-b"].told


def test_the_base_of_a_client_is_its_latest_admitted_round(tmp_path):
    federation = write_federation(tmp_path / "f")
    run(federation, tamper=Spoiling("clinic-b", with_nan, number=3))
    lines = read_run(federation.run_folder).rounds
    assert bases(lines, 3) == [3, 2, 3]
    assert bases(lines[:2], 3) == [1, 1, 1]
    assert bases([*lines[:3], replace(lines[3], abandoned=True)], 3) == [2, 2, 2]
