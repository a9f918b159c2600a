"""What Flower's command ``flwr`` is asked to do on the server: let sites in, start a run, follow it, stop it."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedmerge.core.errors import FedmergeError, UsageError, together
from fedmerge.core.files import write_atomically
from fedmerge.core.text import printable, shortened
from fedmerge.deploy import identity
from fedmerge.deploy.blueprint import APP, CONNECTION, FLOWER_HOME
from fedmerge.deploy.processes import environment, program
from fedmerge.deploy.roster import Roster, read_roster
from fedmerge.experiment.lock import patient_lock

_log = logging.getLogger(__name__)

NODES = "nodes.json"
"""In the folder ``flower``: the number that the SuperLink gave to every key, also to removed ones."""

_COMMAND_SECONDS = 120.0
"""That one command may take; following a run may take as long as it likes."""
_ENDING_SECONDS = 30.0
"""Between the last line that a run says and its end."""
_IN_USE = "already in use"
"""What Flower says of a key that it has, whether or not it was removed; it does not say under which number."""
_STARTED = re.compile(r"Successfully started run (\d+)")
_OPEN = ("pending", "starting", "running")


@dataclass(frozen=True)
class Registered:
    """What registering has changed.

    Attributes:
        added: Sites whose keys are new to the SuperLink.
        kept: Sites whose keys it had.
        removed: Numbers of nodes that are no site's any more.
    """

    added: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()


def register_sites(folder: Path | str) -> Registered:
    """Makes the SuperLink, which must be running, accept the keys in ``federation.toml`` and no others.

    Whatever is right already is left alone, so this can be called at any time. Killed at any moment, it goes on when it
    is called again.

    Flower lists nodes by number alone. A key that it has under a number that is lost (killed between two steps,
    ``nodes.json`` gone) is taken to be registered; while there is such a one, only nodes that are known to be no
    site's are removed.

    Raises:
        UsageError: if a key was removed before (Flower never takes it again).
        FedmergeError: if the SuperLink does not answer.
    """
    roster = read_roster(folder)
    if roster.deploy.insecure:
        return Registered(kept=tuple(roster.sites))
    with patient_lock(roster.folder / FLOWER_HOME, _REGISTERING_SECONDS):  # the server's start and a run may both do it
        return _registered(roster)


def _registered(roster: Roster) -> Registered:
    missing = [f"sites.{name}: no public key; make one with `fedmerge deploy key`" for name in roster.sites]
    missing = [line for line, key in zip(missing, roster.sites.values(), strict=True) if not key]
    if missing:
        raise UsageError(together(missing))
    status = {str(node["node-id"]): str(node["status"]) for node in _ask(roster, "supernode", "list")["nodes"]}
    lines = {name: identity.public_line(key) for name, key in roster.sites.items()}
    nodes = {line: node for line, node in _read_nodes(roster).items() if node in status}
    retired = [name for name, line in lines.items() if status.get(nodes.get(line, "")) == "unregistered"]
    if retired:
        raise UsageError(together(_retired(name) for name in retired))
    added = [name for name, line in lines.items() if line not in nodes and _let_in(roster, name, line, nodes)]
    kept = [name for name in lines if name not in added]
    unknown = [name for name, line in lines.items() if line not in nodes]
    ours = {nodes[line] for line in lines.values() if line in nodes}
    foreign = set(nodes.values()) - ours if unknown else set(status) - ours
    removed = [node for node in status if node in foreign and status[node] != "unregistered"]
    if unknown:
        _log.warning(_UNKNOWN, ", ".join(unknown))
    for node in removed:
        _ask(roster, "supernode", "unregister", node)
    return Registered(tuple(added), tuple(kept), tuple(removed))


_UNKNOWN = (
    "the SuperLink has the keys of %s under numbers that are not known here: keys of other sites that were removed may "
    "still be let in by it until it is started again"
)


def _let_in(roster: Roster, name: str, line: str, nodes: dict[str, str]) -> bool:
    """Whether a site's key is new to the SuperLink, which has it afterwards; its number is noted."""
    number = _register(roster, name, line)
    if number is None:
        return False
    nodes[line] = number
    _write_nodes(roster, nodes)
    return True


def _retired(name: str) -> str:
    return (
        f"sites.{name}: the SuperLink had this key before, and Flower never takes a removed one again; make a new key "
        "for the site, or start the server again, which forgets it (nothing is lost: runs have files of their own)"
    )


def _register(roster: Roster, name: str, line: str) -> str | None:
    """The number of a new node; None if the SuperLink has its key already."""
    path = roster.folder / FLOWER_HOME / "registering.pub"
    write_atomically(path, line + "\n")
    try:
        return str(_ask(roster, "supernode", "register", str(path), more=(f"--name={name}",))["node-id"])
    except FlowerCommandError as error:
        if _IN_USE in str(error):
            return None
        raise
    finally:
        path.unlink(missing_ok=True)


def _read_nodes(roster: Roster) -> dict[str, str]:
    """Node number by public line, as far as is known."""
    try:
        table = json.loads((roster.folder / FLOWER_HOME / NODES).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {str(line): str(node) for line, node in table.items()} if isinstance(table, dict) else {}


def _write_nodes(roster: Roster, nodes: Mapping[str, str]) -> None:
    write_atomically(roster.folder / FLOWER_HOME / NODES, json.dumps(dict(nodes), indent=1) + "\n")


@dataclass(frozen=True)
class RunEnd:
    """How a run of Flower's ended.

    Attributes:
        run: Flower's number of it.
        status: ``finished:completed``, ``finished:failed`` or ``finished:stopped``; another one if it is not over.
        details: What Flower says of it.
    """

    run: str
    status: str
    details: str = ""

    @property
    def exit_status(self) -> int:
        """0: completed. 1: anything else."""
        return 0 if self.status == "finished:completed" else 1


_REGISTERING_SECONDS = 3600.0
"""That are waited for somebody else who registers sites: each takes Flower a second or two."""
_FRAME = " \t\n╭╮╰╯│─"
"""What is drawn around Flower's own messages."""
_LINES_KEPT = 20


def submit(folder: Path | str, *, tell: Callable[[str], None] = lambda _: None) -> RunEnd:
    """Starts the federation's run on the SuperLink, which must be running, and follows it to its end.

    A run that is under way already is followed instead: there is never a second one at the same time. Interrupted
    (Ctrl-C), it is stopped.

    Args:
        folder: The federation's.
        tell: Gets every line that Flower says.

    Raises:
        FedmergeError: if it cannot be started, or the SuperLink goes away.
    """
    roster = read_roster(folder)
    run = open_run(folder)
    try:
        if run is None:
            run = _follow(roster, ("run", str(roster.folder / APP), CONNECTION, "--stream"), tell)
        while not (end := _end_of(roster, run)).status.startswith("finished"):
            _follow(roster, ("log", run, CONNECTION, "--stream"), tell)  # the line to the SuperLink was cut
    except KeyboardInterrupt:
        with suppress(FedmergeError):  # the SuperLink may be what is gone
            run = run or open_run(folder)
            if run is not None:
                stop_run(folder, run)
        raise
    return end


def open_run(folder: Path | str) -> str | None:
    """Number of the run that waits or is under way; None if there is none.

    Of several the one that came first: it has the run's folder, and those after it are refused.

    Raises:
        FedmergeError: if the SuperLink does not answer.
    """
    newest_first = _ask(read_roster(folder), "list")["runs"]
    return next((str(run["run-id"]) for run in reversed(newest_first) if run["status"] in _OPEN), None)


def stop_run(folder: Path | str, run: str) -> None:
    """Stops a run; one that is over already stays so.

    Raises:
        FedmergeError: if the SuperLink does not answer.
    """
    roster = read_roster(folder)
    if not _status_of(roster, run).status.startswith("finished"):
        _ask(roster, "stop", run)


def _follow(roster: Roster, words: tuple[str, ...], tell: Callable[[str], None]) -> str:
    """Passes on what a command says until it ends; gives the number of the run that it started, empty if none."""
    said, run = list[str](), ""
    with subprocess.Popen(
        [program("flwr"), *words],
        env={**environment(roster.folder / FLOWER_HOME), "PYTHONUNBUFFERED": "1", "COLUMNS": "200"},
        cwd=roster.folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
    ) as process:
        try:
            for line in process.stdout or ():
                said = [*said[-_LINES_KEPT:], line.strip(_FRAME)]
                run = run or (found[1] if (found := _STARTED.search(line)) else "")
                tell(printable(line.rstrip("\n")))
        except BaseException:
            process.terminate()
            raise
    if words[0] == "run" and not run:
        raise FlowerCommandError(f"flwr run failed: {shortened(' '.join(filter(None, said)), 1000)}")
    return run


def _end_of(roster: Roster, run: str) -> RunEnd:
    """A run's status, once it is over or after a while: it ends a little after its last line."""
    end = time.monotonic() + _ENDING_SECONDS
    while True:
        found = _status_of(roster, run)
        if found.status.startswith("finished") or time.monotonic() > end:
            return found
        time.sleep(1.0)


def _status_of(roster: Roster, run: str) -> RunEnd:
    found = _ask(roster, "list", more=("--run-id", run))["runs"][0]
    return RunEnd(run, str(found["status"]), str(found.get("status-details", "")))


class FlowerCommandError(FedmergeError):
    """A command of ``flwr`` failed; the message is its own."""


def _ask(roster: Roster, *words: str, more: tuple[str, ...] = ()) -> dict[str, Any]:
    """What a command of ``flwr`` answers as JSON."""
    command = [program("flwr"), *words, CONNECTION, "--format", "json", *more]
    try:
        done = subprocess.run(
            command,
            env=environment(roster.folder / FLOWER_HOME),
            cwd=roster.folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_COMMAND_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise FlowerCommandError(f"flwr {' '.join(words)} took more than {_COMMAND_SECONDS:.0f} seconds") from error
    answer = _last_json(done.stdout.decode("utf-8", "replace"))
    if done.returncode or answer is None or not answer.get("success"):
        said = (answer or {}).get("error-message") or (done.stderr or done.stdout).decode("utf-8", "replace")
        raise FlowerCommandError(f"flwr {' '.join(words)} failed: {shortened(str(said).strip(), 500)}")
    return answer


def _last_json(text: str) -> dict[str, Any] | None:
    for start in (place for place, letter in enumerate(text) if letter == "{"):
        with suppress(ValueError):
            answer = json.loads(text[start:])
            return answer if isinstance(answer, dict) else None
    return None
