"""Keeping a federation going: parts are started, watched and restarted, and the run is submitted until it is done."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

from fedmerge.core.errors import FedmergeError, UsageError
from fedmerge.core.text import printable
from fedmerge.deploy import processes
from fedmerge.deploy.address import free_port, host_and_port
from fedmerge.deploy.blueprint import FLOWER_HOME, SITE_FILE, write_derived
from fedmerge.deploy.commands import FlowerCommandError, RunEnd, open_run, register_sites, stop_run, submit
from fedmerge.deploy.deployment import FILE as DEPLOYMENT
from fedmerge.deploy.deployment import read_deployment, refuse_other_terms
from fedmerge.deploy.federation import FederationConfig, read_federation
from fedmerge.deploy.news import NEWS, NewLines
from fedmerge.deploy.roster import Roster, read_roster
from fedmerge.experiment.record import RunRecord, read_run, read_run_alone

Teller = Callable[[str], None]
"""Is told what happens, a line at a time."""
_FEWEST_SECONDS = 5.0
_MOST_TRIES = 5
"""Times in a row that a run may end without having come a round further."""
_START_SECONDS = 60.0
LOGS = "logs"


def start_server(folder: Path | str, tell: Teller) -> None:
    """Runs the SuperLink of a federation until this process is told to end; it is started again whenever it ends.

    Raises:
        UsageError: if it runs already, or the folder or its certificates cannot be used.
    """
    roster = read_roster(folder)
    with processes.Processes(roster.folder / LOGS) as running, processes.stop_signals() as stop:
        _start_link(running, roster, tell)
        tell(f"the SuperLink of {roster.deploy.name} listens at {roster.link}; end it with Ctrl-C or SIGTERM")
        running.watch(stop.is_set, tell=tell)


def _start_link(running: processes.Processes, roster: Roster, tell: Teller) -> None:
    """Starts a SuperLink, waits until it answers, and lets the sites' keys in.

    Raises:
        UsageError: if something else has its port.
        FedmergeError: if it does not answer.
    """
    place, log = roster.folder, roster.folder / LOGS / "superlink.log"
    settle(roster, tell)
    running.clear("superlink")
    command = processes.superlink_command(place)
    _refuse_taken(roster.link)
    tell(f"starting the SuperLink; what it says: {log}")
    running.start("superlink", command, env=processes.environment(place / FLOWER_HOME), cwd=place, log=log)
    if not processes.wait_for_superlink(place, _START_SECONDS, alive=lambda: running.alive("superlink")):
        raise FedmergeError(f"the SuperLink does not start; it says why in {log}")
    if not roster.deploy.insecure:
        register_sites(place)


def settle(roster: Roster, tell: Teller) -> None:
    """Brings what Flower reads up to the folder as it is now; tells if that was moved."""
    moved = write_derived(roster)
    if moved is None:
        return
    tell(
        f"this folder was {moved.before} before; its units, nginx.conf and compose.yaml name {roster.folder} now: "
        "copies of them that were installed must be installed again"
    )
    if moved.changed:
        tell(f"but {', '.join(moved.changed)} were changed by hand and are left as they are: write the new path there")


def _refuse_taken(link: str) -> None:
    host, port = host_and_port(link)
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind((host, port))
        except OSError as error:
            raise UsageError(
                f"the SuperLink cannot listen at {link}: {error.strerror}; end what uses that port, or change "
                "deploy.listen (and deploy.address, where sites connect to it directly)"
            ) from error


def start_site(folder: Path | str, tell: Teller) -> None:
    """Runs the SuperNode of a site until this process is told to end; it is started again whenever it ends.

    Raises:
        UsageError: if it runs already, or the folder lacks a file.
    """
    place = Path(folder).absolute()
    with processes.Processes(place / LOGS) as running, processes.stop_signals() as stop:
        path = place / LOGS / "supernode.log"
        new = NewLines(path)
        _start_node(running, place)
        tell(f"site {place.name} runs; end it with Ctrl-C or SIGTERM. Everything that it says: {path}")

        def is_over() -> bool:
            for line in new.take():
                if line.startswith(NEWS):
                    tell(printable(line.removeprefix(NEWS)))
            return stop.is_set()

        running.watch(is_over, tell=lambda line: tell(_of_site(line)))


def _of_site(line: str) -> str:
    """What happened to a site's program; the likeliest reason, where it ended."""
    why = (
        "the server is not there yet, does not know the site's key, has not noticed that the site was away, or has a "
        "second program with the same key; the log says which"
    )
    return f"{line}: {why}" if " ended with status " in line else line


def _node_command(place: Path) -> list[str]:
    """How a SuperNode is started now: a port that was free before may have been taken."""
    return processes.supernode_command(place, free_port())


def _start_node(running: processes.Processes, place: Path, name: str = "supernode") -> None:
    home = processes.environment(place / FLOWER_HOME)
    command = partial(_node_command, place)
    running.start(name, command, env=home, cwd=place, log=place / LOGS / "supernode.log")


def run_until_done(
    folder: Path | str,
    tell: Teller,
    *,
    sleep: Callable[[float], object] = time.sleep,
    ending: threading.Event | None = None,
) -> RunRecord:
    """Runs a federation to its last round, however often a part of it dies on the way.

    A run goes on from its checkpoint, so that it is submitted again when it ended without having said why. What would
    only end again is told instead; so is which sites have not got their models, if one more try gave none of them one.

    Args:
        folder: The federation's; its SuperLink runs or will.
        tell: Is told what happens.
        sleep: Waits.
        ending: Once it is set nothing is submitted any more.

    Raises:
        UsageError: if the run stopped for a reason that somebody must mend.
        FedmergeError: if too few sites came, or the run ends again and again.
        KeyboardInterrupt: if it was asked to end, also by SIGTERM or a closed terminal; the run is stopped then.
    """
    with processes.stop_signals_interrupt():
        return _run_until_done(read_federation(folder), tell, sleep, ending or threading.Event())


def _run_until_done(
    federation: FederationConfig, tell: Teller, sleep: Callable[[float], object], ending: threading.Event
) -> RunRecord:
    tries, reached, why = 0, -1, ""
    while not is_done(federation):
        if tries:
            wait = min(60.0, _FEWEST_SECONDS * 2.0 ** (tries - 1))
            tell(f"{why}; again in {wait:.0f} s, from where the run stands")
            sleep(wait)
        if ending.is_set():
            raise KeyboardInterrupt
        deployment = read_deployment(federation.run_folder)
        if deployment is not None:
            refuse_other_terms(deployment, federation)
        before = _stamp(federation)
        end = _submitted(federation, tell)
        why = end if isinstance(end, str) else f"the run ended before its last round ({end.details or end.status})"
        if not isinstance(end, str) and _stamp(federation) != before:
            _refuse_stopped(federation)
        now, left = _reached(federation), lacking(federation)
        if left and now <= reached and not isinstance(end, str) and end.exit_status == 0:
            tell(f"the rounds are done; no model yet at {', '.join(left)}: run again when they are there")
            break
        tries, reached = (tries + 1, reached) if now <= reached else (1, now)
        if tries > _MOST_TRIES and not is_done(federation):
            raise FedmergeError(
                f"the run ended {_MOST_TRIES} times without coming further than round {max(now, 0)}: {why}; look into "
                f"{federation.folder / LOGS}"
            )
    return read_run(federation.run_folder)


def is_done(federation: FederationConfig) -> bool:
    """Whether the rounds are done and every site has its model."""
    return lacking(federation) == ()


def lacking(federation: FederationConfig) -> tuple[str, ...] | None:
    """Sites that have no model yet though the rounds are done; None before that."""
    deployment = read_deployment(federation.run_folder)
    if deployment is None or not (federation.run_folder / "run.json").is_file():
        return None
    if read_run_alone(federation.run_folder).status != "finished":
        return None
    return tuple(name for name in federation.living if name not in deployment.delivered)


def _submitted(federation: FederationConfig, tell: Teller) -> RunEnd | str:
    """Submits the run and follows it to its end; why not, if that could not be done."""
    if not processes.wait_for_superlink(federation.folder, _START_SECONDS):
        link = read_roster(federation.folder).link
        return f"no SuperLink answers at {link}; start it with `fedmerge deploy start server`"
    try:
        settle(read_roster(federation.folder), tell)
        if not federation.deploy.insecure:
            register_sites(federation.folder)
        return submit(federation.folder, tell=lambda line: _pass_on(line, tell))
    except FlowerCommandError as error:
        return str(error)


def _pass_on(line: str, tell: Teller) -> None:
    """Tells what the server says of the run; Flower's own lines are in its logs."""
    level, _, text = line.partition(": ")
    if level in ("INFO", "WARNING", "ERROR") and text.strip():
        tell(text if level == "INFO" else line)


def _refuse_stopped(federation: FederationConfig) -> None:
    """Tells why the run stopped, if submitting it again at once would not help.

    Raises:
        UsageError: if somebody must change something first.
        FedmergeError: if it may go on later.
    """
    deployment = read_deployment(federation.run_folder)
    if deployment is not None and deployment.stopped:
        raise (UsageError if deployment.mend else FedmergeError)(deployment.stopped)


def _stamp(federation: FederationConfig) -> tuple[int, int]:
    """Another one whenever what is known of the run was written anew: by a server that came to hold its folder."""
    try:
        found = (federation.run_folder / DEPLOYMENT).stat()
    except OSError:
        return 0, 0
    return found.st_ino, found.st_mtime_ns


def _reached(federation: FederationConfig) -> int:
    """Rounds done; one more for each site that has its model at the end."""
    path = federation.run_folder / "run.json"
    deployment = read_deployment(federation.run_folder)
    if deployment is None or not path.is_file():
        return -1
    return len(read_run(federation.run_folder).rounds) + len(deployment.delivered)


def run_here(folder: Path | str, tell: Teller) -> RunRecord:
    """All parts of a federation on this machine, until its rounds are done: SuperLink, every site, and the run.

    Raises:
        UsageError: if a part runs already or a site's folder is not here.
        FedmergeError: as `run_until_done`.
        KeyboardInterrupt: as `run_until_done`; no part runs on.
    """
    federation = read_federation(folder)
    place = federation.folder.absolute()
    away = [name for name in federation.living if not (place / "sites" / name / SITE_FILE).is_file()]
    if away:
        raise UsageError(f"{place}/sites has no folder of {', '.join(away)}; start such sites on their own machines")
    with processes.stop_signals_interrupt(), processes.Processes(place / LOGS) as running:
        _start_link(running, read_roster(place), tell)
        for name in federation.living:
            _start_node(running, place / "sites" / name, f"supernode-{name}")
        tell(f"SuperLink and {len(federation.living)} sites are running")
        return _followed(running, place, tell)


def _followed(running: processes.Processes, folder: Path, tell: Teller) -> RunRecord:
    """The run, in a thread of its own, while all parts are kept alive."""
    found: list[RunRecord] = []
    failed: list[BaseException] = []
    ending = threading.Event()

    def work() -> None:
        try:
            found.append(run_until_done(folder, tell, sleep=ending.wait, ending=ending))
        except BaseException as error:  # raised again in the main thread
            failed.append(error)

    thread = threading.Thread(target=work, name="fedmerge-run", daemon=True)
    thread.start()
    try:
        running.watch(lambda: not thread.is_alive(), tell=tell)
    except BaseException:
        ending.set()  # before the run is stopped, so that the thread does not submit it again
        with suppress(FedmergeError):  # the SuperLink may be what is gone
            run = open_run(folder)
            if run is not None:
                stop_run(folder, run)
        raise
    if failed:
        raise failed[0]
    return found[0]
