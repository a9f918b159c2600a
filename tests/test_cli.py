"""Every command, from its words to its exit code and what it leaves behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedmerge._version import __version__
from fedmerge.algorithms import ALGORITHMS
from fedmerge.cli import main
from fedmerge.core.options import option_fields
from fedmerge.data import PARTITIONS, SOURCES
from fedmerge.experiment.config import RunOptions, build_config, read_toml
from fedmerge.experiment.execute import execute_config
from fedmerge.experiment.record import RoundRecord, read_run
from fedmerge.models import NETWORKS
from fedmerge.training import LocalTraining
from small import WORDS, small

Captured = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")


def exit_code(words: list[str]) -> int:
    """Of a command that ends by itself, as ``--help`` does."""
    with pytest.raises(SystemExit) as caught:
        main(words)
    return int(caught.value.code or 0)


def width_of_table(printed: str) -> int:
    """Of the rule below its headings."""
    return max(len(line.rstrip()) for line in printed.splitlines() if "──" in line)


# ------------------------------------------------------------------------------------------------ run


def test_run_writes_a_folder_a_page_and_a_table(capsys: Captured) -> None:
    assert main(["run", "fedavg", *WORDS]) == 0
    folder = Path("runs/fedavg-seed0")
    assert read_run(folder).status == "finished"
    assert (folder / "report.html").exists()
    printed = capsys.readouterr()
    assert "fedavg" in printed.out
    assert f"run     {folder}" in printed.out
    assert width_of_table(printed.out) <= 80
    assert "2/2 rounds" in printed.err


def test_a_second_run_gets_a_folder_of_its_own() -> None:
    assert [main(["run", "local", *WORDS, "--quiet"]) for _ in range(2)] == [0, 0]
    assert sorted(path.name for path in Path("runs").iterdir()) == ["local-seed0", "local-seed0-2"]


def test_quiet_prints_the_result_only(capsys: Captured) -> None:
    assert main(["run", "fedavg", *WORDS, "--quiet"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "report" in printed.out


def test_options_of_a_method_are_flags_and_settings(capsys: Captured) -> None:
    assert main(["run", "ifca", "--num-models", "2", *WORDS, "--out", "flag"]) == 0
    assert main(["run", "ifca", "method.num_models=2", *WORDS, "--out", "setting"]) == 0
    assert Path("flag/config.toml").read_text() == Path("setting/config.toml").read_text()
    assert read_run("flag").options["num_models"] == 2


def test_words_and_flags_mix_in_any_order() -> None:
    assert main(["run", "rounds=1", "--out", "a", *WORDS[:-1], "ifca", "--num-models=2", "seed=3"]) == 0
    assert (read_run("a").method, read_run("a").seed, len(read_run("a").rounds)) == ("ifca", 3, 2)


def test_a_run_repeats_from_its_own_configuration() -> None:
    assert main(["run", "fedavg", *WORDS, "--out", "one"]) == 0
    assert main(["run", "--config", "one/config.toml", "--out", "two"]) == 0
    assert Path("one/models.safetensors").read_bytes() == Path("two/models.safetensors").read_bytes()
    assert build_config(read_toml("one/config.toml")) == build_config(read_toml("two/config.toml"))


@pytest.mark.parametrize("label", ['say "hi"', "[bold]", ":x: d = 5", "1", "true"])
def test_a_label_is_taken_as_it_is(label: str, capsys: Captured) -> None:
    assert main(["run", "fedavg", *WORDS, "--label", label, "--out", "run"]) == 0
    assert read_run("run").label == label
    assert label in capsys.readouterr().out


def test_a_folder_name_is_not_markup(capsys: Captured) -> None:
    assert main(["run", "fedavg", *WORDS, "--out", "a[/b]"]) == 0
    assert "a[/b]" in capsys.readouterr().out


def test_progress_goes_to_stderr_a_line_for_every_tenth(capsys: Captured) -> None:
    assert main(["run", "fedavg", *WORDS, "rounds=40"]) == 0
    assert len(capsys.readouterr().err.splitlines()) == 10


# ------------------------------------------------------------------------------------------------ compare, report


def test_compare_writes_runs_page_and_table(capsys: Captured) -> None:
    words = ["compare", "fedavg", "fedavg:label=slow,training.lr=0.01", *WORDS, "--see", "0-1", "--out", "cmp"]
    assert main([*words, "--reference", "fedavg"]) == 0
    names = sorted(path.name for path in Path("cmp").iterdir())
    assert names == ["fedavg-seed0", "fedavg-seed1", "report.html", "slow-seed0", "slow-seed1", "table.md"]
    assert read_run("cmp/slow-seed1").options["training"]["lr"] == 0.01
    assert "slow" in Path("cmp/table.md").read_text()
    assert width_of_table(capsys.readouterr().out) <= 80


def test_compare_reads_methods_and_seeds_from_a_file() -> None:
    Path("study.toml").write_text('methods = ["fedavg", {name = "ifca", num_models = 2}]\nseeds = [4]\n')
    assert main(["compare", "--config", "study.toml", *WORDS, "--out", "cmp", "--quiet"]) == 0
    assert {path.name for path in Path("cmp").iterdir() if path.is_dir()} == {"fedavg-seed4", "ifca-seed4"}


def test_the_setting_of_a_run_can_be_compared_on() -> None:
    assert main(["run", "fedavg", *WORDS, "--out", "run", "--quiet"]) == 0
    assert main(["compare", "local", "--config", "run/config.toml", "--out", "cmp", "--quiet"]) == 0
    assert read_run("cmp/local-seed0").data_sha256 == read_run("run").data_sha256


def test_jobs_change_no_number() -> None:
    words = ["compare", "fedavg", "local", *WORDS, "--quiet"]
    assert main([*words, "--out", "one"]) == 0
    assert main([*words, "--out", "two", "--jobs", "2"]) == 0
    for name in ("fedavg-seed0", "local-seed0"):
        assert (
            Path(f"one/{name}/models.safetensors").read_bytes() == Path(f"two/{name}/models.safetensors").read_bytes()
        )


def test_report_writes_everything_that_is_asked_for(capsys: Captured) -> None:
    assert main(["compare", "fedavg", "local", *WORDS, "--out", "cmp", "--quiet"]) == 0
    tables = ["--markdown", "t.md", "--latex", "t.tex", "--csv", "t.csv", "--runs-csv", "runs.csv"]
    assert main(["report", "cmp", "--out", "deep/page.html", *tables]) == 0
    assert Path("deep/page.html").read_text().startswith("<!doctype html>")
    assert all(Path(name).read_text() for name in tables[1::2])
    assert len(Path("runs.csv").read_text().splitlines()) == 1 + 2
    assert "deep/page.html" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------ list, data, help


@pytest.mark.parametrize("kind", [[], ["methods"], ["sources"], ["partitions"], ["models"], ["run"], ["training"]])
def test_list_names_everything(kind: list[str], capsys: Captured) -> None:
    assert main(["list", *kind]) == 0
    printed = capsys.readouterr().out
    expected = {"methods": ALGORITHMS, "sources": SOURCES, "partitions": PARTITIONS, "models": NETWORKS}
    expected |= {"run": option_fields(RunOptions), "training": option_fields(LocalTraining)}
    wanted = expected[kind[0]] if kind else [*ALGORITHMS, *SOURCES, *PARTITIONS, *NETWORKS]
    assert all(name in printed for name in wanted)


@pytest.mark.parametrize(
    ("kind", "name"),
    [(kind, name) for kind, names in (("methods", ALGORITHMS), ("models", NETWORKS)) for name in names],
)
def test_an_entry_is_shown_with_all_its_options(kind: str, name: str, capsys: Captured) -> None:
    assert main(["list", kind, name]) == 0
    printed = capsys.readouterr().out
    registry = {"methods": ALGORITHMS, "models": NETWORKS}[kind]
    assert all(field in printed for field in option_fields(registry[name].cls))


@pytest.mark.parametrize("kind", ["methods", "sources", "partitions", "models", "run", "training", "folder"])
def test_the_documentation_of_a_kind_is_markdown(kind: str, capsys: Captured) -> None:
    assert main(["list", kind, "--markdown"]) == 0
    assert capsys.readouterr().out.startswith("# ")


def test_data_can_be_listed_got_and_shown(capsys: Captured) -> None:
    assert main(["data", "list"]) == 0
    assert main(["data", "get", "digits"]) == 0
    assert main(["data", "show", *WORDS[:7], "--out", "picture.svg"]) == 0
    printed = capsys.readouterr().out
    assert "1,797 items of 1 x 8 x 8, 10 classes" in printed
    assert "5 clients, 10 to 10 training items each" in printed
    assert Path("picture.svg").read_text().startswith("<svg")


@pytest.mark.parametrize("words", [[], ["run"], ["compare"], ["list"], ["data"], ["report"]])
def test_every_command_has_help(words: list[str], capsys: Captured) -> None:
    assert exit_code([*words, "--help"]) == 0
    assert "usage: fedmerge" in capsys.readouterr().out


def test_nothing_at_all_prints_help(capsys: Captured) -> None:
    assert main([]) == 0
    assert "fedmerge compare" in capsys.readouterr().out


@pytest.mark.parametrize("method", list(ALGORITHMS))
def test_help_of_a_method_lists_its_options(method: str, capsys: Captured) -> None:
    assert exit_code(["run", method, "--help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"--{name.replace('_', '-')}" in printed for name in option_fields(ALGORITHMS[method].cls))


def test_the_version_is_printed(capsys: Captured) -> None:
    assert exit_code(["--version"]) == 0
    assert capsys.readouterr().out == f"fedmerge {__version__}\n"


# ------------------------------------------------------------------------------------------------ as a program


def program(*words: str) -> list[str]:
    return [sys.executable, "-m", "fedmerge.cli", *words]


def test_the_program_gives_the_exit_code_and_keeps_streams_apart() -> None:
    done = subprocess.run(program("run", "fedmrge"), capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: method.name: unknown method 'fedmrge'; did you mean 'fedmerge'?")


_HEEDS_CTRL_C = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it and pass that on
from fedmerge.cli import main
sys.exit(main())
"""


def test_one_ctrl_c_ends_the_program_with_a_readable_run() -> None:
    words = ["run", "fedavg", *WORDS, "rounds=1000000", "evaluate_every=1000000", "--out", "run", "--quiet"]
    running = subprocess.Popen(
        [sys.executable, "-c", _HEEDS_CTRL_C, *words], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        rounds, end = Path("run/rounds.jsonl"), time.monotonic() + 60
        while not (rounds.exists() and rounds.read_bytes().count(b"\n") > 3) and time.monotonic() < end:
            time.sleep(0.05)
        running.send_signal(signal.SIGINT)
        printed, said = running.communicate(timeout=60)
    finally:
        running.kill()
    assert running.returncode == 130
    assert said == "interrupted; what was finished so far is kept\n"
    assert printed == ""
    record = read_run("run")
    assert record.status == "interrupted"
    assert [r.round for r in record.rounds] == list(range(len(record.rounds)))
    assert Path("run/models.safetensors").exists()
    assert not list(Path("run").glob("*.part"))


def test_a_closed_pipe_is_no_traceback() -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(program("list"), stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert "Traceback" not in done.stderr
    assert done.returncode == 1


def test_ctrl_c_inside_the_process_returns_130(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fedmerge.cli.training._watched", interrupt)
    assert main(["run", "fedavg", *WORDS, "--out", "run"]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert read_run("run").status == "interrupted"


def test_an_interrupted_run_is_resumed_by_its_folder(tmp_path: Path, capsys: Captured) -> None:
    def stop(record: RoundRecord) -> None:
        if record.round == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        execute_config(build_config(small(rounds=40)), folder=tmp_path / "run", watch=stop)
    assert main(["resume", str(tmp_path / "run"), "--quiet"]) == 0
    assert str(tmp_path / "run") in capsys.readouterr().out
    assert (tmp_path / "run" / "report.html").is_file()
    assert main(["resume", str(tmp_path / "run")]) == 2
    assert "is finished after 40 rounds; there is nothing to resume" in capsys.readouterr().err
