"""What cannot go on is refused with the reason, and what is damaged gives way; nothing is begun afresh silently."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from resuming import config_of, left_behind, stopped_at

from fedmerge.core.errors import FedmergeError, UsageError
from fedmerge.data import FederatedData
from fedmerge.experiment.checkpoint import SLOTS
from fedmerge.experiment.config import RunOptions, read_toml
from fedmerge.experiment.execute import execute_config
from fedmerge.experiment.federation import load_data
from fedmerge.experiment.resume import resume_run
from fedmerge.training import LocalTraining

# ---------------------------------------------------------------- what is refused


@pytest.fixture(scope="module")
def one_stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        stopped_at(folder, config_of(), 2, monkeypatch)
    return folder


@pytest.fixture
def stopped(one_stopped: Path, tmp_path: Path) -> Path:
    """A run that was stopped after round 2, its slots holding rounds 1 and 2."""
    return Path(shutil.copytree(one_stopped, tmp_path / "run"))


def newest(folder: Path) -> Path:
    paths = [folder / slot for slot in SLOTS]
    return max(paths, key=lambda path: path.stat().st_mtime_ns)


def damage(path: Path) -> None:
    """The lowest bit of the last byte is another one."""
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


@pytest.mark.parametrize(
    ("key", "value"), [("rounds", 9), ("method", {"name": "fedavg"}), ("training", {"lr": 0.2}), ("seed", 1)]
)
def test_another_configuration_is_refused(stopped: Path, key: str, value: Any) -> None:
    before = content_of(stopped)
    (stopped / "config.toml").write_text(tomli_w.dumps({**read_toml(stopped / "config.toml"), key: value}))
    changed = (stopped / "config.toml").read_bytes()
    with pytest.raises(UsageError, match=r"another configuration|other data"):
        resume_run(stopped)
    assert content_of(stopped) == {**before, "config.toml": changed}


def content_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_other_data_are_refused(stopped: Path) -> None:
    table = read_toml(stopped / "config.toml")
    table["partition"]["train"] = 9
    (stopped / "config.toml").write_text(tomli_w.dumps(table))
    with pytest.raises(UsageError, match="was made on other data than are there now"):
        resume_run(stopped)


def test_the_rate_of_checkpoints_may_change(stopped: Path, tmp_path: Path) -> None:
    table = {**read_toml(stopped / "config.toml"), "checkpoint_every": 2}
    (stopped / "config.toml").write_text(tomli_w.dumps(table))
    resume_run(stopped)
    execute_config(config_of(), folder=tmp_path / "whole")
    assert left_behind(stopped) == left_behind(tmp_path / "whole")


def test_a_finished_run_is_refused(tmp_path: Path) -> None:
    execute_config(config_of(), folder=tmp_path / "run")
    before = content_of(tmp_path / "run")
    with pytest.raises(UsageError, match=r"finished after 3 rounds; there is nothing to resume"):
        resume_run(tmp_path / "run")
    assert content_of(tmp_path / "run") == before


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FedmergeError, match=r"is not a run: it has no run\.json"):
        resume_run(tmp_path)


def test_data_beside_a_configuration_are_refused(stopped: Path) -> None:
    config = config_of()
    data: FederatedData = load_data(config.source, config.partition, 0, config.model)
    with pytest.raises(UsageError, match="leave `data` and `model` out"):
        resume_run(stopped, data=data)


def test_a_run_without_checkpoints_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped_at(tmp_path / "run", config_of(checkpoint_every=0), 2, monkeypatch)
    before = content_of(tmp_path / "run")
    with pytest.raises(UsageError, match="holds 3 rounds and no checkpoint"):
        resume_run(tmp_path / "run")
    assert content_of(tmp_path / "run") == before


def test_a_run_whose_checkpoints_were_removed_is_refused(stopped: Path) -> None:
    for path in stopped.glob("checkpoint-*"):
        path.unlink()
    before = content_of(stopped)
    with pytest.raises(UsageError, match="holds 3 rounds and no checkpoint"):
        resume_run(stopped)
    assert content_of(stopped) == before


def test_a_run_that_announced_nothing_begins_anew_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As a process leaves it that was killed while it wrote its first checkpoint."""
    folder = tmp_path / "run"
    stopped_at(folder, config_of(), 0, monkeypatch)
    for path in folder.glob("checkpoint-*"):
        path.unlink()
    resume_run(folder)
    assert "it begins anew" in caplog.text
    execute_config(config_of(), folder=tmp_path / "whole")
    assert left_behind(folder) == left_behind(tmp_path / "whole")


# ---------------------------------------------------------------- damage


def test_a_damaged_checkpoint_gives_way_to_the_other(
    stopped: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bad = newest(stopped)
    damage(bad)
    announced: list[int] = []
    with caplog.at_level(logging.WARNING):
        resume_run(stopped, watch=lambda line: announced.append(line.round))
    assert f"{bad}: the digest of its tensors does not fit" in caplog.text
    assert "going on from the other one, after round 1" in caplog.text
    assert announced == [2, 3]
    execute_config(config_of(), folder=tmp_path / "whole")
    assert left_behind(stopped) == left_behind(tmp_path / "whole")


def test_with_both_damaged_nothing_is_begun_afresh(stopped: Path) -> None:
    for slot in SLOTS:
        damage(stopped / slot)
    before = content_of(stopped)
    with pytest.raises(FedmergeError, match="no checkpoint of this run can be used") as caught:
        resume_run(stopped)
    assert all(slot in str(caught.value) for slot in SLOTS)
    assert content_of(stopped) == before


TAILS = {
    "torn": b'{"round": 3, "cohort": [0, 1',
    "torn without a line break's worth": b"{",
    "whole": None,
    "blocks that never reached the disk": b"\0" * 512 + b"\n",
    "no text": b"\xff\xfe\n",
}


@pytest.mark.parametrize("tail", TAILS.values(), ids=TAILS)
def test_what_stands_behind_the_checkpoints_rounds_does_not_matter(
    stopped: Path, tmp_path: Path, tail: bytes | None
) -> None:
    path = stopped / "rounds.jsonl"
    last = path.read_bytes().splitlines(keepends=True)[-1]
    with path.open("ab") as file:
        file.write(last.replace(b'"round": 2', b'"round": 3') if tail is None else tail)
    resume_run(stopped)
    execute_config(config_of(), folder=tmp_path / "whole")
    assert left_behind(stopped) == left_behind(tmp_path / "whole")


def test_rounds_that_the_newest_saw_and_are_gone_lead_to_the_other(
    stopped: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = stopped / "rounds.jsonl"
    path.write_bytes(path.read_bytes()[:-1])
    resume_run(stopped)
    assert "rounds.jsonl does not begin with the rounds that it saw" in caplog.text
    execute_config(config_of(), folder=tmp_path / "whole")
    assert left_behind(stopped) == left_behind(tmp_path / "whole")


def test_a_changed_round_is_noticed(stopped: Path) -> None:
    path = stopped / "rounds.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"bytes_up": ', b'"bytes_up":  ', 1))
    with pytest.raises(FedmergeError, match="does not begin with the rounds that it saw"):
        resume_run(stopped)


def test_a_lost_best_state_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Learning makes it worse here: round 0 stays selected, and both slots refer to its state."""
    config = replace(config_of("local"), training=LocalTraining(lr=1e-9, epochs=1))
    folder = tmp_path / "run"
    stopped_at(folder, config, 2, monkeypatch)
    best = folder / "checkpoint-best-0"
    assert [path.name for path in folder.glob("checkpoint-best-*")] == [best.name]
    content = best.read_bytes()
    damage(best)
    with pytest.raises(FedmergeError, match="checkpoint-best-0 does not have the digest that it should have"):
        resume_run(folder)
    best.unlink()
    with pytest.raises(FedmergeError, match="no checkpoint of this run can be used"):
        resume_run(folder)
    best.write_bytes(content)
    caplog.clear()
    resume_run(folder)
    execute_config(config, folder=tmp_path / "whole")
    assert left_behind(folder) == left_behind(tmp_path / "whole")
    assert caplog.text == ""


def test_a_best_state_that_was_not_needed_is_made_whole_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Round 0 is selected at round 0: its state stands in the slot, and the file beside it is not read."""
    config = replace(config_of("local"), training=LocalTraining(lr=1e-9, epochs=1))
    folder = tmp_path / "run"
    stopped_at(folder, config, 0, monkeypatch)
    content = (folder / "checkpoint-best-0").read_bytes()
    damage(folder / "checkpoint-best-0")
    stopped_at(folder, config, 1, monkeypatch)
    assert (folder / "checkpoint-best-0").read_bytes() == content


# ---------------------------------------------------------------- files


def test_a_finished_run_needs_no_checkpoints(stopped: Path) -> None:
    (stopped / "checkpoint-a.part").write_bytes(b"of a process that was killed")
    (stopped / "checkpoint-best-1.part").write_bytes(b"of a process that was killed")
    assert {slot for slot in SLOTS if (stopped / slot).exists()} == set(SLOTS)
    resume_run(stopped)
    assert not list(stopped.glob("*checkpoint*"))
    assert not list(stopped.glob("*.part"))
    assert not (stopped / ".lock").exists()


def test_a_finished_run_that_was_killed_at_its_end_is_tidied_up(tmp_path: Path) -> None:
    execute_config(config_of(), folder=tmp_path / "run")
    names = sorted(path.name for path in (tmp_path / "run").iterdir())
    for name in (*SLOTS, "checkpoint-best-2", ".lock"):
        (tmp_path / "run" / name).write_text("1\n")
    with pytest.raises(UsageError, match="nothing to resume"):
        resume_run(tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == names


def test_the_disk_never_holds_more_than_a_few_states(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looked at before every rename, when the new file and those that it replaces are all there."""
    seen: list[list[str]] = []
    move = Path.replace

    def looked_at(path: Path, target: Path) -> Path:
        seen.append(sorted(p.name for p in path.parent.iterdir()))
        return move(path, target)

    monkeypatch.setattr(Path, "replace", looked_at)
    config = replace(config_of(), run=RunOptions(rounds=12, evaluate_every=1))
    execute_config(config, folder=tmp_path / "run")
    assert any("checkpoint-a" in names and "checkpoint-b.part" in names for names in seen)
    for names in seen:
        states = [name for name in names if name.startswith("checkpoint-") and not name.endswith(".part")]
        assert len([name for name in states if name in SLOTS]) <= 2
        assert len([name for name in states if name not in SLOTS]) <= 3
        assert len([name for name in names if name.endswith(".part")]) <= 1
