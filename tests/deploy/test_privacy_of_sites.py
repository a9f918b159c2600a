"""What leaves a site: no value of its data in any text, and no noise that anybody else can tell."""

from __future__ import annotations

import json
import logging
import math
import stat
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from small_deployment import HereLink, SlowClock, write_federation

from fedmerge.core.errors import DataError, FedmergeError, UsageError
from fedmerge.data.federated import Examples
from fedmerge.deploy.client import _secret_seed, answer_to
from fedmerge.deploy.federation import terms_of
from fedmerge.deploy.link import Failure
from fedmerge.deploy.messages import Letter, answer_from, order_from
from fedmerge.deploy.plan import plan_of
from fedmerge.deploy.private_state import BusyError
from fedmerge.deploy.protection import FILE, seed_of_release
from fedmerge.deploy.ready import ready_site
from fedmerge.deploy.server import serve
from fedmerge.deploy.site import read_site
from fedmerge.deploy.telling import TellableError, tellable, told_to_server, told_versions
from fedmerge.experiment.record import read_run
from fedmerge.experiment.simulation import one_thread
from fedmerge.runtime.rounds import ClientRound
from fedmerge.training import Planned, draw_batches
from fedmerge.training.private import noise_of_step

NAME = "Johnathan Smithers"

# --- texts ---


@pytest.fixture
def by_flower():
    """Letters go through the ClientApp, as Flower's own records."""
    pytest.importorskip("flwr")
    # only these tests need Flower
    from flower_stub import RUN, inside_a_run  # noqa: PLC0415
    from flwr.app import Context, Message, RecordDict  # noqa: PLC0415

    from fedmerge.deploy.flower.client_app import app  # noqa: PLC0415
    from fedmerge.deploy.flower.grid_link import _TYPES, _answer_of  # noqa: PLC0415
    from fedmerge.deploy.flower.wire import records_of  # noqa: PLC0415

    @dataclass
    class FlowerLink(HereLink):
        def push(self, contact, kind, letter, *, group, seconds):
            site = self.federation.folder / "sites" / self.federation.names[contact.address]
            self.sent.append((site.name, kind))
            message = Message(records_of(letter), dst_node_id=1, message_type=_TYPES[kind])
            message.metadata.__dict__["_message_id"] = uuid.uuid4().hex
            config = {"site": str(site)}
            context = Context(run_id=RUN, node_id=1, node_config=config, state=RecordDict(), run_config={})
            self._waiting[f"{len(self.sent)}"] = _answer_of(app(message, context))
            return f"{len(self.sent)}"

    with inside_a_run():
        yield FlowerLink


def with_table(federation, site, row):
    """The site's examples as a CSV file with this row among others."""
    folder = federation.folder / "sites" / site
    rows = [f"{k},{k % 3},1,2,3,4,{k % 3}" for k in range(30)]
    (folder / "patients.csv").write_text("\n".join(["a,b,c,d,e,f,label", *rows[:7], row, *rows[7:]]) + "\n")
    toml = folder / "site.toml"
    toml.write_text(toml.read_text().replace("data.npz", "patients.csv"))


def with_function(federation, site, body):
    """The site's examples come from a function of its own."""
    folder = federation.folder / "sites" / site
    (folder / "own.py").write_text(f"def load():\n    {body}\n")
    toml = folder / "site.toml"
    toml.write_text(toml.read_text().replace('path = "data.npz"', f'python = "{folder / "own.py"}:load"'))


DATA = "the site's data cannot be used as they are; the site's own log says more"
SITE = "something in the site's folder or settings cannot be used as it is; the site's own log says more"
AT_SITES = ("fedmerge.deploy.flower.client_app", "fedmerge.deploy.site_data")
"""Who writes to a site's log."""
FAULTS = {
    "a name among numbers": (lambda f: with_table(f, "clinic-b", f"{NAME},1,1,2,3,4,1"), DATA),
    "a name among classes": (lambda f: with_table(f, "clinic-b", f"3,1,1,2,3,4,{NAME}"), DATA),
    "a function that names a row": (lambda f: with_function(f, "clinic-b", f"raise KeyError({NAME!r})"), DATA),
    "an array that fails": (
        lambda f: with_function(
            f, "clinic-b", f"return type('X', (), {{'__array__': lambda *_: {{}}[{NAME!r}]}})(), [0]"
        ),
        "the site's program failed unexpectedly (KeyError); the site's own log says more",
    ),
    "a file that is not there": (lambda f: (f.folder / "sites/clinic-b/data.npz").rename(f.folder / NAME), SITE),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_nothing_of_a_site_s_data_is_told_to_the_server(tmp_path, by_flower, caplog, fault):
    options = {"name": "clinics", "insecure": True, "deadline": 5.0, "patience": 10.0, "poll": 0.5}
    federation = write_federation(tmp_path / "home", deploy=options)
    spoil, sentence = FAULTS[fault]
    spoil(federation)
    caplog.set_level(logging.DEBUG)
    with pytest.raises(FedmergeError) as caught:
        serve(federation, by_flower(federation, named=True), clock=SlowClock().clock())
    at_site = [str(record.exc_info or record.getMessage()) for record in caplog.records if record.name in AT_SITES]
    told = [record.getMessage() for record in caplog.records if record.name not in AT_SITES]
    written = [path.read_text() for path in federation.run_folder.rglob("*.json")]
    assert any(NAME in line or "data.npz" in line for line in at_site), "else the test says nothing"
    assert any(sentence in line for line in told)
    assert sentence in (federation.run_folder / "status.json").read_text()
    for text in [*told, *written, str(caught.value)]:
        for secret in (NAME, "Smithers", "patients.csv", "data.npz", "own.py", "line 9"):
            assert secret not in text


def test_the_server_is_told_what_is_wrong_with_its_own_terms(tmp_path, by_flower):
    federation = write_federation(tmp_path / "home")
    own = federation.folder / "sites/clinic-b/federation.toml"
    own.write_text((federation.folder / "federation.toml").read_text().replace("rounds = 3", "rounds = 2"))
    link, said = by_flower(federation, named=True), []
    pull = link.pull
    link.pull = lambda tickets: [said.append(found[1]) or found for found in pull(tickets)]
    clock = replace(federation.deploy, deadline=5.0, patience=10.0)
    with pytest.raises(FedmergeError):
        serve(replace(federation, deploy=clock), link, clock=SlowClock().clock())
    reasons = {found.reason for found in said if isinstance(found, Failure)}
    (reason,) = reasons
    assert reason.startswith("the server asks for other terms than federation.toml holds (rounds: agreed 2, asked 3)")
    assert str(tmp_path) not in reason


class _OwnError(ValueError):
    """An error of a site's own program."""


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (DataError(NAME), DATA),
        (UsageError(NAME), SITE),
        (FedmergeError(NAME), "the site cannot do what it was asked for; the site's own log says more"),
        (BusyError(NAME), "another process of the site is at work; it answers when it is asked later"),
        (MemoryError(NAME), "the site has not enough memory; the site's own log says more"),
        (
            FileNotFoundError(2, NAME, NAME),
            "the site cannot read or write something (No such file or directory); the site's own log says more",
        ),
        (OSError(NAME), "the site cannot read or write something (OSError); the site's own log says more"),
        (_OwnError(NAME), "the site's program failed unexpectedly (ValueError); the site's own log says more"),
        (TellableError("round 9 of 3"), "round 9 of 3"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_error_has_a_sentence_of_its_own(error, told):
    assert told_to_server(error) == told


def test_what_is_tellable_names_no_folder(tmp_path):
    with pytest.raises(TellableError, match=r"^got federation.toml$"), tellable(tmp_path):
        raise UsageError(f"got {tmp_path}/federation.toml")


def test_versions_say_nothing_of_the_machine():
    assert set(told_versions()) == {"fedmerge", "python", "torch"}


# --- noise ---


PRIVATE = {"batch_size": 8, "lr": 0.1, "dp_clip": 1.0, "dp_noise": 1.1}


@dataclass
class Recording(HereLink):
    """Keeps the letters of rounds and what each site answered."""

    def __post_init__(self):
        self.letters: list[tuple[str, Letter, Letter]] = []

    def push(self, contact, kind, letter, *, group, seconds):
        ticket = super().push(contact, kind, letter, group=group, seconds=seconds)
        if kind == "round":
            self.letters.append((self.federation.names[contact.address], letter, self._waiting[ticket]))
        return ticket


@pytest.fixture(scope="module")
def protected(tmp_path_factory) -> Iterator[Recording]:
    pytest.importorskip("opacus")
    federation = write_federation(
        tmp_path_factory.mktemp("protected") / "f", training=PRIVATE, method={"name": "fedavg"}
    )
    link = Recording(federation)
    serve(federation, link, clock=SlowClock().clock())
    assert read_run(federation.run_folder).status == "finished"
    return link


def changed(letter, **changes):
    return letter._replace(text=json.dumps({**json.loads(letter.text), **changes}))


def test_a_repeated_message_gets_the_same_bits(protected):
    for name, letter, answer in protected.letters:
        again = answer_to(letter, read_site(protected.federation.folder / "sites" / name))
        assert again.tensors.keys() == answer.tensors.keys()
        assert all(torch.equal(again.tensors[key], answer.tensors[key]) for key in answer.tensors)


@pytest.mark.parametrize("what", ["the received model", "its examples"])
def test_two_answers_that_differ_a_little_do_not_show_by_how_little(protected, tmp_path, what):
    """Clipped gradients of almost the same model and examples are almost the same; their noise must not be."""
    name, letter, _ = protected.letters[0]
    site = replace(read_site(protected.federation.folder / "sites" / name), state=str(tmp_path / "state"))
    first = answer_to(letter, site).tensors["delta"]
    if what == "the received model":
        letter = letter._replace(tensors={"0": letter.tensors["0"] * (1 + 1e-6)})
    else:
        with np.load(str(site.data.path)) as given:
            np.savez(tmp_path / "data.npz", x=given["x"] * np.float32(1 + 1e-6), y=given["y"])
        site = replace(site, data=replace(site.data, path=str(tmp_path / "data.npz")))
    second = answer_to(letter, site).tensors["delta"]
    steps = 2 * math.ceil(answer_from(answer_to(letter, site).text).num_train / 8)
    noise = 0.1 * 1.1 / 8 * math.sqrt(2 * steps)  # standard deviation of a number in the difference, at the least
    assert float((second - first).std()) > noise / 2


def test_another_site_with_the_same_data_has_other_noise(protected, tmp_path):
    name, letter, answer = protected.letters[0]
    site = read_site(protected.federation.folder / "sites" / name)
    other = answer_to(letter, replace(site, state=str(tmp_path / "state")))
    assert not torch.equal(other.tensors["delta"], answer.tensors["delta"])


def update_with(seed, protected, letter, name):
    """What the site's update would be if its batches and noise came from this seed."""
    order = order_from(letter.text)
    config = read_site(protected.federation.folder / "sites" / name)
    site = ready_site(config, terms_of(order.terms))
    fleet = site.fresh()
    plan = Planned(site.client.train, site.training, order.rate, seed, order.round, order.client)
    with one_thread():
        job = (letter.tensors["0"], fleet.private[0], plan, fleet.buffers[0])
        return site.engine.map(ClientRound(site.played, fleet.rules), [job])[0][0].delta


def test_whoever_knows_the_seed_cannot_take_the_noise_away(protected):
    """With noise of the run's seed, whoever guesses the examples could compute the update and compare."""
    name, letter, answer = protected.letters[0]
    terms = terms_of(order_from(letter.text).terms)
    site = ready_site(read_site(protected.federation.folder / "sites" / name), terms)
    order, fleet = order_from(letter.text), site.fresh()
    secret = _secret_seed(site, order, letter.tensors["0"], fleet)
    assert torch.equal(update_with(secret, protected, letter, name), answer.tensors["delta"])
    assert not torch.equal(update_with(terms.options.seed, protected, letter, name), answer.tensors["delta"])
    stored = json.loads((site.config.state_folder / FILE).read_text())["secret"]
    for text in (letter.text, answer.text):
        assert not any(told in text for told in (stored, str(int(stored, 16)), str(secret)))


def test_no_two_answers_share_noise(tmp_path):
    """Their difference would be free of it."""
    tree = {"received": torch.zeros(3), "examples": torch.arange(4)}
    base = {"run": "r", "rounds": 9, "facts": (1, 0, 0.1), "tree": tree}
    variants = [
        {},
        {"run": "other"},
        {"facts": (2, 0, 0.1)},
        {"facts": (1, 0, 0.2)},
        {"tree": {**tree, "received": torch.tensor([0.0, 0.0, -0.0])}},
        {"tree": {**tree, "received": torch.zeros(3, dtype=torch.float64)}},
        {"tree": {**tree, "examples": torch.tensor([0, 1, 2, 4])}},
        {"tree": {**tree, "examples": torch.arange(4).reshape(2, 2)}},
    ]
    seeds = [seed_of_release(tmp_path, **{**base, **change}) for change in variants]
    assert len({*seeds}) == len(variants)
    assert [seed_of_release(tmp_path, **{**base, **change}) for change in variants] == seeds
    assert 2**200 < max(seeds) < 2**256


def test_noise_of_a_secret_is_gaussian_and_its_batches_are_poisson(tmp_path, protected):
    name, letter, _ = protected.letters[0]
    site = protected.federation.folder / "sites" / name
    training = replace(protected.federation.terms.training, epochs=40)
    seed = seed_of_release(tmp_path, run="r", rounds=1, facts=(), tree=())
    n = answer_from(answer_to(letter, read_site(site)).text).num_train
    steps = draw_batches(
        Examples(torch.zeros(n, 6), torch.zeros(n, dtype=torch.int64)),
        training,
        lr=0.1,
        seed=seed,
        round_number=1,
        client=0,
    )
    noise = torch.cat([noise_of_step(steps.protection, step, 1000) for step in range(len(steps))])
    sizes = torch.tensor([float(len(step.targets)) for step in steps])
    assert abs(float(noise.std()) - 1.1) < 5 * 1.1 / math.sqrt(2 * len(noise))
    assert abs(float(sizes.mean()) - 8) < 5 * math.sqrt(8 * (1 - 8 / n) / len(sizes))


def test_the_secret_is_made_once_and_is_the_owner_s_alone(protected):
    secrets = []
    for name in protected.federation.names:
        path = read_site(protected.federation.folder / "sites" / name).state_folder / FILE
        found = json.loads(path.read_text())
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert len(bytes.fromhex(found["secret"])) == 32
        assert [len(marks) for marks in found["answered"].values()] == [3], "one for each round"
        secrets.append(found["secret"])
    assert len({*secrets}) == len(secrets)


def test_the_size_of_drawn_batches_is_not_told(protected):
    for _, _, letter in protected.letters:
        answer = answer_from(letter.text)
        if letter.tensors:
            assert answer.passed == 2 * math.ceil(answer.num_train / 8) * 8


def test_a_run_gets_no_more_different_answers_than_it_has_rounds(tmp_path):
    facts = {"run": "r", "rounds": 2, "tree": ()}
    seeds = [seed_of_release(tmp_path, facts=(number,), **facts) for number in (1, 2)]
    with pytest.raises(FedmergeError, match=r"has had 2 different protected updates .* expected 2 at most"):
        seed_of_release(tmp_path, facts=(3,), **facts)
    assert [seed_of_release(tmp_path, facts=(number,), **facts) for number in (1, 2)] == seeds


def test_a_further_run_is_told_in_the_site_s_log(tmp_path, caplog):
    for number, run in enumerate(("r", "s", "s", "t")):
        seed_of_release(tmp_path, run=run, rounds=3, facts=(number,), tree=())
    assert [record.getMessage()[:5] for record in caplog.records] == ["run 2", "run 3"]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"secret": "ab"}', '{"secret": "zz", "answered": {}}', '{"secret": 3}']
)
def test_a_damaged_secret_is_not_replaced_by_another(tmp_path, text):
    (tmp_path / FILE).write_text(text)
    with pytest.raises(FedmergeError, match=r"protection.json is damaged"):
        seed_of_release(tmp_path, run="r", rounds=3, facts=(), tree=())
    assert (tmp_path / FILE).read_text() == text


def test_training_without_protection_needs_no_secret(tmp_path):
    federation = write_federation(tmp_path / "f", rounds=1)
    serve(federation, HereLink(federation), clock=SlowClock().clock())
    assert not list(tmp_path.rglob(FILE))


# --- terms that void a promise ---

CLIENTS = {"name": "dp-fedmerge", "secret_noise": True, "force": True, "num_models": 1}
CONDITIONS = {
    "method": CLIENTS,
    "select": "last",
    "participation": {"sampling": "poisson", "quorum": 0.0},
    "defences": {"clip": 0.0, "max_count": 0.0},
}


def test_noise_that_every_site_could_take_away_is_refused(tmp_path):
    options = {**CONDITIONS, "method": {**CLIENTS, "secret_noise": False}}
    with pytest.raises(UsageError, match=r"method.secret_noise: got false; expected true: every site has the run's"):
        plan_of(write_federation(tmp_path / "f", **options))


def test_cohorts_that_every_site_could_tell_are_refused(tmp_path):
    options = {**CONDITIONS, "fraction": 0.5, "method": {**CLIENTS, "sampling_rate": 0.5}}
    with pytest.raises(UsageError, match=r"method.sampling_rate: got 0.5; expected 1: cohorts come from the seed"):
        plan_of(write_federation(tmp_path / "f", **options))


@pytest.mark.parametrize("options", [CONDITIONS, {"training": PRIVATE}], ids=["clients", "examples"])
def test_sums_without_noise_are_refused_beside_a_promise(tmp_path, options):
    federation = write_federation(tmp_path / "f", **options)
    pooled = replace(federation.terms.schema, scale="pooled")
    for schema in (pooled, pooled.with_scale([0.0], [1.0])):
        with pytest.raises(UsageError, match=r"data.scale: got 'pooled'; expected 'given'"):
            plan_of(replace(federation, terms=replace(federation.terms, schema=schema)))


def test_a_promise_that_can_be_kept_runs(tmp_path):
    federation = write_federation(tmp_path / "f", **CONDITIONS)
    serve(federation, HereLink(federation), clock=SlowClock().clock())
    found = read_run(federation.run_folder)
    assert (found.status, len(found.rounds)) == ("finished", 4)


def test_without_noise_nothing_is_promised_and_nothing_is_refused(tmp_path):
    plan_of(write_federation(tmp_path / "f", method={"name": "dp-fedmerge", "noise_multiplier": 0.0, "num_models": 2}))
    plan_of(write_federation(tmp_path / "g", training={**PRIVATE, "dp_noise": 0.0}))
