"""A site leaves: nothing of it is left in the folder, the others go on, and what cannot be undone is said."""

from __future__ import annotations

import json
import re
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_deployment import HereLink, SlowClock, write_federation

from fedmerge.algorithms import ALGORITHMS
from fedmerge.core.errors import UsageError
from fedmerge.core.protocol import state_tensors, with_tensors
from fedmerge.core.tensor_files import read_tensors
from fedmerge.deploy.deployment import read_deployment
from fedmerge.deploy.federation import FederationConfig, in_client_order, is_tombstone, read_federation
from fedmerge.deploy.forget import Forgotten, forget_own_state, forget_site
from fedmerge.deploy.forget_state import client_axes, forgotten_state
from fedmerge.deploy.link import Contact
from fedmerge.deploy.messages import Kind, Letter
from fedmerge.deploy.plan import plan_of
from fedmerge.deploy.server import serve
from fedmerge.experiment.lock import run_lock
from fedmerge.experiment.record import read_run

NAMES = ("clinic-ant", "clinic-bee", "clinic-cat", "clinic-dog")
GONE, CLIENT, PLACE = "clinic-bee", 1, "forgotten-1"
ROUNDS = 4
TWO_MODELS = {"name": "fedmerge", "num_models": 2, "initial": "independent", "rule": "gradient"}


class StopError(Exception):
    """The server's process is ended from outside."""


class StoppingLink(HereLink):
    """Ends the server's process as soon as a message of a round after `last` is sent."""

    last = 2

    def push(self, contact: Contact, kind: Kind, letter: Letter, *, group: str, seconds: float) -> str | None:
        if kind == "round" and json.loads(letter.text)["round"] > self.last:
            raise StopError
        return super().push(contact, kind, letter, group=group, seconds=seconds)


def started(folder: Path, rounds: int = ROUNDS, **options: Any) -> FederationConfig:
    """Four sites, and a server that was stopped after two rounds."""
    own = {
        "name": "clinics",
        "insecure": True,
        "deadline": 30.0,
        "patience": 60.0,
        "poll": 0.5,
        "start_with": 3,
    }
    federation = write_federation(folder, NAMES, **{"rounds": rounds, "deploy": own, **options})
    with pytest.raises(StopError):
        serve(federation, StoppingLink(federation), clock=SlowClock().clock())
    shutil.rmtree(folder / "sites" / GONE / "state", ignore_errors=True)
    return federation


def forget_there(federation: FederationConfig) -> Forgotten:
    """The site's own machine is another one: its folder on the server holds the invitation alone."""
    (federation.folder / "sites" / GONE / "data.npz").unlink(missing_ok=True)
    shutil.rmtree(federation.folder / "sites" / GONE / "model", ignore_errors=True)
    return forget_site(federation.folder, GONE)


def go_on(folder: Path) -> FederationConfig:
    federation = read_federation(folder)
    serve(federation, HereLink(federation, absent={PLACE}), clock=SlowClock().clock())
    return federation


def contents(folder: Path) -> Iterator[tuple[Path, bytes]]:
    for path in folder.rglob("*"):
        if path.is_file():
            yield path, path.read_bytes()


@pytest.mark.parametrize(
    "method",
    [TWO_MODELS, {"name": "fedamp"}, {"name": "ifca", "num_models": 2}],
    ids=lambda method: str(method["name"]),
)
def test_the_others_go_on_to_the_end_without_it(tmp_path: Path, method: dict[str, Any]) -> None:
    federation = started(tmp_path / "f", method=method)
    before = read_run(federation.run_folder)
    done = forget_there(federation)
    assert (done.client, done.place, done.round, done.last_reply) == (CLIENT, PLACE, 2, 2)
    go_on(federation.folder)
    after = read_run(federation.run_folder)
    assert after.status == "finished"
    assert [line.round for line in after.rounds] == list(range(ROUNDS + 1))
    assert after.client_names == tuple(PLACE if name == GONE else name for name in NAMES)
    assert after.num_train[CLIENT] == 0
    for line, old in zip(after.rounds[1:3], before.rounds[1:3], strict=False):
        others = tuple(i for i in old.cohort if i != CLIENT)
        assert line.cohort == others
    for line in after.rounds:
        if line.test is not None:
            assert line.test.accuracy[CLIENT] is None
            assert line.test.loss[CLIENT] is None
            assert all(value is not None for i, value in enumerate(line.test.accuracy) if i != CLIENT)
    delivered = read_deployment(federation.run_folder)
    assert delivered is not None
    assert set(delivered.delivered) == set(NAMES) - {GONE}


def test_no_byte_of_the_folder_holds_its_name_or_its_row(tmp_path: Path) -> None:
    federation = started(tmp_path / "f", method=TWO_MODELS)
    run = federation.run_folder
    logits = next(t for n, t in read_tensors(run / "models.safetensors").items() if n.endswith("soup.logits"))
    last = next(t for n, t in read_tensors(run / "last.safetensors").items() if n.endswith("soup.logits"))
    rows = [part[:, CLIENT].contiguous().numpy().tobytes() for part in (logits, last)]
    told = [json.dumps(line.mixing[CLIENT])[1:-1] for line in read_run(run).rounds if line.mixing is not None]
    counts = read_run(run).num_train[CLIENT]
    assert len(torch.unique(last[0], dim=0)) == len(NAMES)  # every row is its own
    assert any(rows[1] in content for _, content in contents(run))
    done = forget_there(federation)
    for path, content in contents(federation.folder):
        assert GONE.encode() not in content, path
        assert GONE not in str(path)
        assert not any(row in content for row in rows if any(row)), path
        if path.name == "rounds.jsonl":
            assert not any(text.encode() in content for text in told if text != "0.5, 0.5")
    assert counts not in read_run(run).num_train
    assert done.left == ()
    found = next(t for n, t in read_tensors(run / "last.safetensors").items() if n.endswith("soup.logits"))
    assert torch.equal(found[:, CLIENT], torch.zeros_like(found[:, CLIENT]))
    others = [i for i in range(len(NAMES)) if i != CLIENT]
    assert torch.equal(found[:, others], last[:, others])
    go_on(federation.folder)
    assert not [path for path, content in contents(federation.folder) if GONE.encode() in content]


def test_the_others_numbers_are_those_of_a_run_in_which_it_stopped_answering(tmp_path: Path) -> None:
    """Plain averages keep nothing of single clients: the server's model goes on to the same bits."""
    federation = started(tmp_path / "f", method={"name": "fedavg"})
    shutil.copytree(federation.folder, tmp_path / "silent")
    forget_there(federation)
    go_on(federation.folder)
    silent = read_federation(tmp_path / "silent")
    serve(silent, HereLink(silent, absent={GONE}), clock=SlowClock().clock())
    wanted, found = (read_tensors(f.run_folder / "last.safetensors") for f in (silent, federation))
    assert wanted.keys() == found.keys()
    assert all(
        torch.equal(wanted[name], found[name]) for name in wanted if not name.endswith(("last", "norms", "counts"))
    )


def test_a_finished_run_can_forget_too(tmp_path: Path) -> None:
    federation = write_federation(tmp_path / "f", NAMES)
    serve(federation, HereLink(federation), clock=SlowClock().clock())
    before = read_run(federation.run_folder)
    done = forget_there(federation)
    after = read_run(federation.run_folder)
    assert after.status == "finished"
    assert after.selected().round == before.selected().round
    assert done.round == before.rounds[-1].round
    assert GONE not in (federation.run_folder / "run.json").read_text()
    go_on(federation.folder)  # which finds that everybody has a model


def test_the_selected_round_stays_the_one_whose_model_was_kept(tmp_path: Path) -> None:
    """Only the site that leaves liked the selected round: without it another one would look best."""
    federation = write_federation(tmp_path / "f", NAMES)
    serve(federation, HereLink(federation), clock=SlowClock().clock())
    run, chosen = federation.run_folder, 1
    lines = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    for number, line in enumerate(lines):
        line["validation"]["accuracy"] = [0.5, 1.0 if number == chosen else 0.0, 0.5, 0.5 + 0.1 * (number == 2)]
    (run / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_run(run).selected().round == chosen
    done = forget_there(federation)
    assert read_run(run).selected().round == chosen
    assert done.unscored == (0, 2)
    assert [line.round for line in read_run(run).evaluated()] == [1, 3]


def test_what_is_done_is_written_down_without_the_name(tmp_path: Path) -> None:
    federation = started(tmp_path / "f", method=TWO_MODELS)
    done = forget_there(federation)
    (entry,) = json.loads((federation.folder / "forgotten.json").read_text())
    assert entry["id"] == done.id
    assert re.fullmatch("[0-9a-f]{16}", done.id)
    assert entry["remains"] == list(done.remains)
    assert "soup.models" in " ".join(done.remains)
    assert "round 2" in " ".join(done.remains)
    assert "soup.logits" in " ".join(done.removed)
    assert stat.S_IMODE((federation.folder / "forgotten.json").stat().st_mode) == 0o600
    other = forget_site(federation.folder, "clinic-ant")
    assert other.place == "forgotten-0"
    assert len(json.loads((federation.folder / "forgotten.json").read_text())) == 2
    assert read_federation(federation.folder).names == ("forgotten-0", PLACE, "clinic-cat", "clinic-dog")
    assert [place.split(":")[0] for place in other.left] == ["sites/clinic-ant"]  # its own examples are there


def test_a_site_that_never_replied_leaves_nothing_in_the_state(tmp_path: Path) -> None:
    federation = write_federation(tmp_path / "f", NAMES)
    shutil.rmtree(federation.folder / "sites" / GONE)
    done = forget_site(federation.folder, GONE)
    assert done.last_reply == 0
    assert not any("influence" in text for text in done.remains)
    assert read_federation(federation.folder).living == tuple(name for name in NAMES if name != GONE)


def test_a_process_that_is_killed_before_the_name_is_out_of_the_file_can_do_it_again(tmp_path: Path) -> None:
    federation = started(tmp_path / "f")
    text = (federation.folder / "federation.toml").read_text()
    forget_there(federation)
    (federation.folder / "federation.toml").write_text(text)  # as it was when the process died
    with pytest.raises(UsageError, match="has others now"):
        serve(read_federation(federation.folder), HereLink(federation), clock=SlowClock().clock())
    forget_site(federation.folder, GONE)
    go_on(federation.folder)
    assert read_run(federation.run_folder).status == "finished"


def test_a_run_in_progress_unknown_sites_and_the_last_site_are_refused(tmp_path: Path) -> None:
    federation = started(tmp_path / "f")
    with run_lock(federation.run_folder), pytest.raises(UsageError, match="in use"):
        forget_site(federation.folder, GONE)
    with pytest.raises(UsageError, match="clinic-bee"):
        forget_site(federation.folder, "clinic-be")
    forget_there(federation)
    with pytest.raises(UsageError, match="site"):
        forget_site(federation.folder, PLACE)
    alone = write_federation(tmp_path / "alone", ("only",), method={"name": "fedavg"})
    with pytest.raises(UsageError, match="only site"):
        forget_site(alone.folder, "only")


def test_comments_that_name_it_go_and_others_stay(tmp_path: Path) -> None:
    federation = write_federation(tmp_path / "f", NAMES)
    path = federation.folder / "federation.toml"
    path.write_text("# for the ministry\n" + path.read_text())
    shutil.rmtree(federation.folder / "sites" / GONE)
    forget_site(federation.folder, GONE)
    assert "# for the ministry" in path.read_text()
    path.write_text(f"# ask clinic-cat's doctor\n{path.read_text()}")
    shutil.rmtree(federation.folder / "sites" / "clinic-cat")
    forget_site(federation.folder, "clinic-cat")
    assert "clinic-cat" not in path.read_text()


# ---------------------------------------------------------------- every method


def federation_of(tmp_path: Path, name: str) -> FederationConfig:
    names = [f"site-{letter}" for letter in "abcdefg"]
    return write_federation(tmp_path / "f", names, method={"name": name}, rounds=20)


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Bit for bit, where what is not known (NaN) equals itself."""
    return one.dtype == other.dtype and np.array_equal(one.numpy(), other.numpy(), equal_nan=one.is_floating_point())


def changed_at(state: Any, axes: dict[str, tuple[int, ...]], client: int, amount: int) -> Any:
    """The state with other values everywhere at a client's place."""
    tensors = {}
    for name, tensor in state_tensors(state).items():
        found = tensor.clone()
        for axis in axes.get(name, ()):
            place = found.select(axis, client)
            place.copy_(torch.full_like(place, amount % 2) if place.dtype == torch.bool else place + amount)
        tensors[name] = found
    return with_tensors(state, tensors)


NOT_DEPLOYED = ("oracle", "dp-fedmerge")
"""Needs true groups; refuses a run of this kind without what a private run needs."""
KEEPS = {
    "apfl": (),
    "cfl": ("assigned", "progress"),
    "cfl-smoothed": ("assigned", "progress"),
    "ditto": (),
    "fedadam": (),
    "fedala": (),
    "fedamp": ("models", "replied"),
    "fedavg": (),
    "fedavg-ft": (),
    "fedavgm": (),
    "fedbabu": (),
    "fedbn": (),
    "feddbe": (),
    "fedem": (),
    "fedmerge": ("moments", "progress", "seen", "soup.logits"),
    "fedper": (),
    "fedprox": (),
    "fedrep": (),
    "fedrod": (),
    "fedsoft": ("importance",),
    "fedyogi": (),
    "femam": ("assigned",),
    "fesem": ("assigned",),
    "flhc": ("assigned", "heard", "progress"),
    "gated-mixture": (),
    "ifca": ("chosen",),
    "lg-fedavg": (),
    "local": ("clients",),
    "one-shot": ("assigned", "heard", "progress"),
    "per-fedavg": (),
    "pfedme": (),
    "scaffold": (),
}
"""What each method's server keeps of single clients, beside what the defences count."""


@pytest.mark.parametrize("name", [name for name in ALGORITHMS if name not in NOT_DEPLOYED])
def test_nothing_at_its_place_depends_on_it_any_more_whatever_the_method(tmp_path: Path, name: str) -> None:
    plan = plan_of(federation_of(tmp_path, name))
    axes, state, client = client_axes(plan), plan.start.state, 3
    own = {axis.removeprefix("method.") for axis in axes}
    watched = {"last", "norms", "counts", "clipped", "capped"}
    assert own - watched == set(KEEPS[name])
    used, other = (changed_at(state, axes, client, amount) for amount in (1, 2))
    found = state_tensors(forgotten_state(plan, axes, used, client))
    again = state_tensors(forgotten_state(plan, axes, other, client))
    fresh = state_tensors(state)
    rest = torch.tensor([i for i in range(7) if i != client])
    for key, tensor in found.items():
        assert same(tensor, again[key]), key
        for axis in axes.get(key, ()):
            assert same(tensor.index_select(axis, rest), fresh[key].index_select(axis, rest)), key
        if key not in axes:
            assert same(tensor, fresh[key]), key
    plan.setup.played.send(with_tensors(state, found), torch.arange(7))


# ---------------------------------------------------------------- places and the site's side


def test_places_of_forgotten_sites_stay_in_their_order(tmp_path: Path) -> None:
    assert in_client_order(["b", "forgotten-2", "z", "forgotten-0"]) == ["forgotten-0", "b", "forgotten-2", "z"]
    assert [is_tombstone(name) for name in ("forgotten-10", "forgotten-01", "forgotten-x", "forgotten")] == [
        True,
        False,
        False,
        False,
    ]
    for sites, match in (
        ({"a": "", "forgotten-5": ""}, "2 places"),
        ({"a": "", "forgotten-0": "key"}, "key for the place"),
        ({"forgotten-0": ""}, "all of them were forgotten"),
    ):
        with pytest.raises(UsageError, match=match):
            write_federation(tmp_path / match, ("a",), sites=sites)


def test_a_site_removes_its_states_and_keeps_its_examples(tmp_path: Path) -> None:
    federation = write_federation(tmp_path / "f", method={"name": "ditto"})
    serve(federation, HereLink(federation), clock=SlowClock().clock())
    site = federation.folder / "sites" / "clinic-a"
    (site / "state" / "notes.txt").write_text("the doctor's")
    done = forget_own_state(site)
    assert len(done.removed) == 1
    assert any("notes.txt" in text for text in done.kept)
    assert not list(site.rglob("private-*"))
    assert (site / "model").is_dir()
    assert forget_own_state(site, model=True).removed == ("model",)
    assert np.load(site / "data.npz")["x"].shape[1] == 6
    assert (site / "site.toml").is_file()


def test_what_still_names_it_is_listed(tmp_path: Path) -> None:
    federation = write_federation(tmp_path / "f", NAMES)
    folder = federation.folder
    (folder / "logs").mkdir()
    (folder / "logs" / "server.log").write_text(f"site {GONE} is late\n")
    (folder / "logs" / "other.log").write_text(f"site {GONE}-2 and old-{GONE} are late\n")
    (folder / "removed" / f"{GONE}.1").mkdir(parents=True)
    (folder / "removed" / f"{GONE}.1" / "site.toml").write_text(f'name = "{GONE}"\n')
    done = forget_site(folder, GONE)
    assert [text.split(":")[0] for text in done.left] == [f"sites/{GONE}", "logs/server.log"]
    assert not (folder / "removed" / f"{GONE}.1").exists()
    assert (folder / "sites" / GONE / "data.npz").is_file()
    assert GONE not in (folder / "forgotten.json").read_text()


def test_a_federation_with_keys_stays_one(tmp_path: Path) -> None:
    """The place of a forgotten site is the only one without a key."""
    own = {"name": "clinics", "address": "127.0.0.1:9092"}
    keys = {name: f"ecdsa-sha2-nistp384 key-of-{name}" for name in NAMES}
    federation = write_federation(tmp_path / "f", NAMES, deploy=own, sites=keys)
    shutil.rmtree(federation.folder / "sites" / GONE)
    forget_site(federation.folder, GONE)
    found = read_federation(federation.folder)
    assert found.sites == {PLACE if name == GONE else name: "" if name == GONE else keys[name] for name in NAMES}
    assert keys[GONE] not in (federation.folder / "federation.toml").read_text()


def test_a_pooled_scale_is_kept_and_told(tmp_path: Path) -> None:
    data = {"class_names": ["0", "1", "2"], "shape": [6], "scale": "pooled"}
    federation = started(tmp_path / "f", data=data, method={"name": "fedavg"})
    before = read_deployment(federation.run_folder)
    done = forget_there(federation)
    assert any("pooled" in text for text in done.remains)
    go_on(federation.folder)
    after = read_deployment(federation.run_folder)
    assert before is not None
    assert after is not None
    assert (after.mean, after.std, after.run) == (before.mean, before.std, before.run)
    assert read_run(federation.run_folder).status == "finished"
