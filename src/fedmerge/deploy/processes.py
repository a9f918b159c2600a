"""Flower's programs as processes: how they are called, watched, restarted and stopped.

``flower-superlink`` runs on the server and ``flower-supernode`` on every site. They start further programs, some in
sessions of their own; what is started here is marked in its environment, so that all of it can be found and stopped,
and nothing else.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import ssl
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from fedmerge.core.errors import UsageError
from fedmerge.core.files import make_folder, write_atomically
from fedmerge.deploy import identity, marks
from fedmerge.deploy.address import host_and_port, is_loopback, local_address
from fedmerge.deploy.blueprint import SITE_FILE
from fedmerge.deploy.roster import OPEN_ADVICE, Roster, read_roster
from fedmerge.deploy.units import check_path
from fedmerge.experiment.config import read_toml

QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "NO_COLOR": "1",
    "OMP_NUM_THREADS": "1",
}
"""Nothing is told to anybody, looked up or installed, and threads do not fight for cores."""

_MOST_LOG_BYTES = 32 * 2**20
_MOST_WAIT = 15.0
"""Seconds before something that keeps ending is started again. Flower refuses a key for up to a minute after its
SuperNode was killed, and every further second of waiting is lost."""
_CLEAN_SLATE = 60.0
"""Seconds after which what ends has not ended too soon."""


def environment(home: Path, base: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of Flower's programs.

    Args:
        home: Where Flower keeps its own files (``FLWR_HOME``).
        base: What they inherit; this process's by default.
    """
    inherited = dict(os.environ if base is None else base)
    beside = str(Path(sys.executable).parent)  # Flower starts its further programs by name
    path = os.pathsep.join([beside, *filter(None, [inherited.get("PATH", os.defpath)])])
    return {**inherited, **QUIET, "PATH": path, "FLWR_HOME": str(home)}


def program(name: str) -> str:
    """The path of one of Flower's programs: beside this interpreter, or else on the path.

    Raises:
        UsageError: if it is not installed.
    """
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if os.access(beside, os.X_OK) else shutil.which(name)
    if found is None:
        raise UsageError(
            f'the program {name} is not installed: pip install "fedmerge[flower]", with Python 3.11 or newer'
        )
    return found


def superlink_command(folder: Path | str) -> list[str]:
    """How the SuperLink of a federation is started.

    It keeps what it knows in memory. In a file of SQLite it loses a site's answer, and says so to nobody but its log,
    when the file is locked for five seconds: with 20 sites on two busy cores that happened within two rounds. Nothing
    in that file is needed: a run goes on from its own checkpoint, and keys are registered before every run.

    Raises:
        UsageError: if the folder is no federation, its certificates do not fit, others than this machine could reach
            the SuperLink, or Flower is not installed.
    """
    roster = read_roster(folder)
    place, (host, port) = roster.folder, host_and_port(roster.link)
    command = [program("flower-superlink"), "--host", host, "--port", str(port)]
    if roster.deploy.insecure:
        _refuse_open(roster.link, "deploy.insecure")
        secrecy = ["--insecure"]
    else:
        if not is_loopback(host) and not roster.deploy.open:
            raise UsageError(f"deploy.listen: got {roster.deploy.listen or 'none'}, so {roster.link}; {OPEN_ADVICE}")
        identity.check_server_files(place)
        files = {"ca-certfile": identity.CA, "certfile": identity.SERVER, "keyfile": identity.SERVER_KEY}
        secrecy = [word for name, file in files.items() for word in (f"--ssl-{name}", str(place / file))]
        secrecy.append("--enable-supernode-auth")
    return [*command, *secrecy, "--disable-runtime-dependency-installation"]


def supernode_command(site_folder: Path | str, port: int) -> list[str]:
    """How the SuperNode of a site is started.

    Args:
        site_folder: Has ``site.toml``, and ``ca.crt`` and ``node.key`` unless the federation does without.
        port: Of the loopback address, for the SuperNode's own programs.

    Raises:
        UsageError: if the folder is no site, lacks a file, or Flower is not installed.
    """
    place = check_path(Path(site_folder))
    path = place / SITE_FILE
    if not path.is_file():
        raise UsageError(f"{site_folder} is no site: it has no {SITE_FILE}, which `fedmerge deploy init` makes")
    table = read_toml(path)
    name, server = table.get("name"), table.get("server")
    if not isinstance(name, str) or not isinstance(server, str):
        raise UsageError(f"{path}: expected name and server, both texts, as `fedmerge deploy init` writes them")
    host_and_port(server)
    command = [program("flower-supernode"), "--superlink", server, "--host", "127.0.0.1", "--port", str(port)]
    told = ["--node-config", f'site="{place}" client-key="{name}"']
    if not (place / identity.CA).exists() and not (place / identity.NODE_KEY).exists():
        _refuse_open(server, f"no {identity.CA} and no {identity.NODE_KEY} in {place}")
        return [*command, "--insecure", *told]
    identity.describe(place / identity.CA)
    identity.line_of_key_file(place / identity.NODE_KEY)
    keys = ["--root-certificates", str(place / identity.CA)]
    keys += ["--auth-supernode-private-key", str(place / identity.NODE_KEY)]
    return [*command, *keys, *told]


def _refuse_open(address: str, because: str) -> None:
    if not is_loopback(host_and_port(address)[0]):
        raise UsageError(
            f"{because}: without certificates and keys anybody could read and change what is sent; "
            f"got {address}; expected a loopback address, or the missing files"
        )


def wait_for_superlink(
    folder: Path | str, seconds: float, *, alive: Callable[[], bool] = lambda: True, pause: float = 0.25
) -> bool:
    """Waits until the SuperLink of a federation answers on this machine; whether it did in time.

    Args:
        folder: The federation's.
        seconds: To wait at most.
        alive: Whether waiting makes sense still.
        pause: Between two questions.
    """
    roster = read_roster(folder)
    end = time.monotonic() + seconds
    while True:
        if _answers(roster, max(0.1, min(5.0, end - time.monotonic()))):
            return True
        if not alive() or time.monotonic() + pause > end:
            return False
        time.sleep(pause)


def _answers(roster: Roster, seconds: float) -> bool:
    insecure = roster.deploy.insecure
    context = None if insecure else ssl.create_default_context(cafile=str(roster.folder / identity.CA))
    opener = urllib.request.build_opener(
        urllib.request.ProxyHandler({}), *([] if context is None else [urllib.request.HTTPSHandler(context=context)])
    )
    try:
        url = f"http{'' if insecure else 's'}://{local_address(roster.link)}/health"
        with opener.open(url, timeout=seconds) as answer:
            return bool(answer.status == 200)
    except (OSError, ValueError):
        return False


class _Child:
    """One program that is kept."""

    def __init__(
        self,
        name: str,
        command: Sequence[str] | Callable[[], Sequence[str]],
        env: Mapping[str, str],
        cwd: Path,
        log: Path | None,
    ) -> None:
        self.name, self.command, self.env, self.cwd, self.log = name, command, dict(env), cwd, log
        self.mark = secrets.token_hex(8)
        self.process: subprocess.Popen[bytes] | None = None
        self.always, self.began, self.due, self.failures = True, 0.0, 0.0, 0


class Processes:
    """Programs that run beside this one: started in sessions of their own, restarted, and all stopped in the end.

    Ctrl-C in a terminal does not reach them; `stop` does, with all that they started themselves.
    """

    def __init__(self, folder: Path | str, *, grace: float = 15.0) -> None:
        """Nothing is started yet.

        Args:
            folder: Where ``NAME.pid`` is written for each.
            grace: Seconds between asking a process to end and ending it.
        """
        self.folder, self.grace = Path(folder), grace
        self._children: dict[str, _Child] = {}

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(
        self,
        name: str,
        command: Sequence[str] | Callable[[], Sequence[str]],
        *,
        env: Mapping[str, str],
        cwd: Path | str = ".",
        log: Path | str | None = None,
        always: bool = True,
    ) -> int:
        """Starts a program and gives its process number.

        Args:
            name: For the file with its number; no other program of this kind may have it.
            command: The words, or what gives them anew at every start.
            env: Its whole environment.
            cwd: Where it runs.
            log: What it says is appended here; None: to this process's own output.
            always: Whether `check` starts it again when it ends, whatever its status.

        One of that name whose keeper was killed is ended first, with all that it started.

        Raises:
            UsageError: if one of that name runs already, kept by this process or another.
            OSError: if it cannot be started.
        """
        self.clear(name)
        _make_private(self.folder)
        child = _Child(name, command, env, Path(cwd), None if log is None else Path(log))
        child.always = always
        pid = self._launch(child)
        self._children[name] = child
        return pid

    def clear(self, name: str) -> None:
        """Ends what a killed keeper has left of a program, with all that it started.

        Raises:
            UsageError: if one of that name runs, kept by this process or another.
        """
        if orphan := self._orphan(name):
            marks.end(orphan, grace=self.grace)
        running = self.running(name)
        if running is not None or name in self._children:
            raise UsageError(f"{name} runs already (process {running}); stop it first")

    def running(self, name: str) -> int | None:
        """Number of the process that a file names, if it is that process still and not another with its number."""
        with suppress(OSError, ValueError):
            pid, born, *_ = (self.folder / f"{name}.pid").read_text(encoding="utf-8").splitlines()
            if marks.birth(int(pid)) == born:
                return int(pid)
        return None

    def _orphan(self, name: str) -> list[marks.Program]:
        """What a keeper that was killed has left running; empty if the keeper lives, or none is known."""
        with suppress(OSError, ValueError):
            _, _, mark, keeper, born = (self.folder / f"{name}.pid").read_text(encoding="utf-8").splitlines()
            if marks.birth(int(keeper)) != born and re.fullmatch(r"[0-9a-f]+", mark):
                return [marks.Program(self.running(name) or -1, mark)]
        return []

    def alive(self, name: str) -> bool:
        """Whether a program that was started here runs at this moment."""
        process = self._children[name].process
        return process is not None and process.poll() is None

    def status(self, name: str) -> int | None:
        """Exit status of a program that has ended; None while it runs."""
        process = self._children[name].process
        return None if process is None else process.poll()

    def check(self) -> list[str]:
        """Starts again what has ended and should not have; to be called every second or so. Gives what happened."""
        told = []
        for child in self._children.values():
            now = time.monotonic()
            if child.log is not None:
                _bound(child.log)
            if child.process is not None and child.process.poll() is not None and child.always:
                lived, code = now - child.began, child.process.returncode
                child.failures = 0 if lived >= _CLEAN_SLATE else child.failures + 1
                wait = min(_MOST_WAIT, 2.0 ** max(0, child.failures - 1))
                marks.end([marks.Program(child.process.pid, child.mark)], grace=0.0)
                child.process, child.due = None, now + wait
                told.append(f"{child.name} ended with status {code} after {lived:.0f} s; again in {wait:.0f} s")
            if child.process is None and now >= child.due:
                told.append(self._launched_again(child))
        return told

    def _launched_again(self, child: _Child) -> str:
        try:
            return f"{child.name} started again (process {self._launch(child)})"
        except UsageError as error:  # a file that it needs is gone for the moment
            child.due = time.monotonic() + _MOST_WAIT
            return f"{child.name} cannot be started: {error}; again in {_MOST_WAIT:.0f} s"

    def watch(self, until: Callable[[], bool], *, tell: Callable[[str], None] = lambda _: None) -> None:
        """Keeps everything running until something is true."""
        while not until():
            for line in self.check():
                tell(line)
            time.sleep(0.25)

    def stop(self, name: str | None = None) -> None:
        """Ends one program or all, with everything that they started: asks first, ends what remains after `grace`."""
        names = list(self._children) if name is None else [name]
        children = [self._children.pop(each) for each in names]
        processes = {child: child.process for child in children if child.process is not None}
        programs = [marks.Program(process.pid, child.mark) for child, process in processes.items()]
        programs += [marks.Program(-1, child.mark) for child in children if child.process is None]
        marks.end(programs, grace=self.grace)
        for process in processes.values():
            process.wait()
        for child in children:
            (self.folder / f"{child.name}.pid").unlink(missing_ok=True)

    def _launch(self, child: _Child) -> int:
        outer = os.environ.get(marks.MARK, "")
        env = {**child.env, marks.MARK: f"{outer}/{child.mark}"}
        output = None if child.log is None else _opened(child.log)
        try:
            child.process = subprocess.Popen(
                tuple(child.command() if callable(child.command) else child.command),
                env=env,
                cwd=child.cwd,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=None if output is None else subprocess.STDOUT,
                start_new_session=True,
                umask=0o077,  # databases and models are for their owner's eyes
            )
        finally:
            if output is not None:
                os.close(output)
        child.began = time.monotonic()
        pid, keeper = child.process.pid, os.getpid()
        lines = (pid, marks.birth(pid), child.mark, keeper, marks.birth(keeper))
        write_atomically(self.folder / f"{child.name}.pid", "".join(f"{line}\n" for line in lines))
        return pid


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """Within the block SIGTERM, SIGHUP and Ctrl-C set an event instead of ending this process; main thread only."""
    event = threading.Event()
    with _handled((signal.SIGTERM, signal.SIGINT, signal.SIGHUP), lambda *_: event.set()):
        yield event


@contextmanager
def stop_signals_interrupt() -> Iterator[None]:
    """Within the block SIGTERM and SIGHUP do once what Ctrl-C does, so that what was started is stopped.

    Further ones are not heard: what stops has its own time limits. In another thread than the main one, which never
    gets signals, nothing changes.
    """
    heard = False

    def interrupt(*_: object) -> None:
        nonlocal heard
        heard, first = True, not heard
        if first:
            raise KeyboardInterrupt

    with _handled((signal.SIGTERM, signal.SIGHUP), interrupt):
        yield


@contextmanager
def _handled(numbers: Sequence[signal.Signals], handler: Callable[..., None]) -> Iterator[None]:
    """Handles signals within the block; SIGHUP stays ignored under nohup."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    taken = [number for number in numbers if not (nohup and number == signal.SIGHUP)]
    before = [signal.signal(number, handler) for number in taken]
    try:
        yield
    finally:
        for number, old in zip(taken, before, strict=True):
            signal.signal(number, old)


def _make_private(folder: Path) -> None:
    """Makes a folder that its owner alone can enter; one that is there stays as it is."""
    if not folder.is_dir():
        make_folder(folder)
        folder.chmod(0o700)


def _opened(log: Path) -> int:
    _make_private(log.parent)
    return os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)


def _bound(log: Path) -> None:
    """Keeps a log's size within bounds while a process writes to it: what is too old goes to ``.1``."""
    with suppress(OSError):  # no log yet, or a full disk: the program goes on
        if log.stat().st_size > _MOST_LOG_BYTES:
            older = log.with_name(log.name + ".1")
            older.unlink(missing_ok=True)
            os.close(os.open(older, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))  # before anything is in it
            shutil.copyfile(log, older)
            os.truncate(log, 0)  # whoever appends goes on at the new end
