"""A federation whose sites' folders are all on this machine, run by Flower's simulation: the deployed app on Ray.

The same ServerApp and ClientApp as across machines, and the same numbers; what `fedmerge.deploy.rehearsal` does in one
process takes much longer here. It shows that the app itself works, before anybody has a SuperNode.

What Flower leaves to its users is done here. A worker of Ray that dies is never replaced, and the run goes on without
its sites: it is noticed, and the simulation ends. A ServerApp that stops with an error counts as completed: what is
looked at is the run's own folder. A SuperLink of its own, on a port of its own, is ended with all that it started.
"""

from __future__ import annotations

import importlib.util
import os
import re
import secrets
import shutil
import signal
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli_w

from fedmerge.core.errors import FedmergeError, UsageError
from fedmerge.core.files import make_folder, write_atomically
from fedmerge.core.text import printable, shortened
from fedmerge.deploy import marks
from fedmerge.deploy.address import free_port
from fedmerge.deploy.blueprint import APP, CONNECTION, FLOWER_HOME, SITE_FILE, app_text
from fedmerge.deploy.deployment import read_deployment
from fedmerge.deploy.federation import FILE, FederationConfig, read_federation
from fedmerge.deploy.operate import LOGS, is_done
from fedmerge.deploy.processes import Processes, environment, program, stop_signals
from fedmerge.deploy.site import read_site
from fedmerge.experiment.book import held
from fedmerge.experiment.config import plain_options, read_toml

Teller = Callable[[str], None]
"""Is told what happens, a line at a time."""
FOLDER = "simulation"
_PARTS = ("superlink", "run")
_RAY, _RAY_PREFIX = "ray.txt", "fm-ray-"
_START_SECONDS = 120.0
_LOOK = 0.2
_DEAD_WORKER = re.compile(r"ray\.exceptions\.(Actor|RayActor|Worker|OutOfMemory|NodeDied|RaySystem)\w*")
_ALL_HERE = re.compile(r"(\d+) of \1 sites have reported")
_SITE_FAILS = re.compile(r"WARNING: site \S+: (.+)")
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True)
class Simulated:
    """A simulation that has reached its end.

    Attributes:
        folder: An ordinary run folder.
        start: Seconds until every site had reported.
        rounds: Seconds from there until every site had its model.
    """

    folder: Path
    start: float
    rounds: float


def simulate(
    folder: Path | str, out: Path | str | None = None, *, cpus: int = 2, tell: Teller = lambda _: None
) -> Simulated:
    """Runs a federation on this machine, one virtual node for each site, some of them at a time.

    Sites work with their own data and settings, but on a state of their own in `out`: nothing of a real run is touched.
    One that was stopped goes on from its last round.

    Args:
        folder: The federation's; the sites' folders are in ``sites/``.
        out: Where the simulation and its run are written, ``simulation`` in the federation's folder by default.
        cpus: Sites that compute at the same time, each in a process of its own.
        tell: Is told what Flower and the server say.

    Raises:
        UsageError: if Ray or Flower is missing, a site's folder is not there, or `out` is in use or finished.
        FedmergeError: if a worker of Ray dies, or the run stops before its end; what was reached is kept.
    """
    if importlib.util.find_spec("ray") is None:
        raise UsageError('a simulation needs Ray: pip install "flwr[simulation]>=1.41,<1.43"')
    if cpus < 1:
        raise UsageError(f"cpus: got {cpus}; expected 1 or more")
    federation = read_federation(Path(folder).absolute())
    stage = federation.folder / FOLDER if out is None else Path(out).absolute()
    make_folder(stage)
    with held(stage), ExitStack() as stack:
        _end_orphans(stage)
        port = free_port()
        staged = _staged(federation, stage, port)
        if is_done(staged):
            raise UsageError(f"{stage} holds a simulation that is finished; take another folder, or remove it first")
        began = time.monotonic()
        stop = stack.enter_context(_stop_event())
        ray = stack.enter_context(_ray_folder(stage))
        running = stack.enter_context(Processes(stage / LOGS))
        told = _Told(tell)
        _play(running, staged, _environment(stage, ray), port, cpus, told, stop)
        if not is_done(staged):
            raise FedmergeError(
                f"the simulation stopped before its end: {_why(staged, told)}; look into {stage / LOGS}"
            )
        ended = time.monotonic()
    ready = told.all_here or ended
    return Simulated(staged.run_folder, ready - began, ended - ready)


@dataclass
class _Told:
    """What was said so far, in so far as it matters."""

    tell: Teller
    all_here: float = 0.0
    error: str = ""
    dead: str = ""
    failures: Counter[str] = field(default_factory=Counter)

    def take(self, line: str) -> None:
        """Takes in a line of the run."""
        text = printable(_COLOUR.sub("", line).rstrip("\n"))
        if _ALL_HERE.search(text):
            self.all_here = time.monotonic()
        if text.startswith("ERROR"):
            self.error = text.removeprefix("ERROR").lstrip(" :")
        failure = _SITE_FAILS.match(text)
        if failure and not self.all_here:
            self.failures[failure[1]] += 1
        if not self.dead and _DEAD_WORKER.search(text):
            self.dead = text
        self.tell(text)


def _play(
    running: Processes,
    staged: FederationConfig,
    env: dict[str, str],
    port: int,
    cpus: int,
    told: _Told,
    stop: threading.Event,
) -> None:
    """Starts Flower and follows the run until it ends."""
    stage = staged.folder
    log = stage / LOGS / "run.log"
    log.unlink(missing_ok=True)
    link = [program("flower-superlink"), "--insecure", "--simulation", "--host", "127.0.0.1", "--port", str(port)]
    link.append("--disable-runtime-dependency-installation")
    running.start("superlink", link, env=env, cwd=Path.cwd(), log=stage / LOGS / "superlink.log", always=False)
    _wait_for(running, port, stage, stop)
    resources = f"num-supernodes={len(_site_folders(stage))} init-args-num-cpus={cpus} client-resources-num-cpus=1"
    run = [program("flwr"), "run", str(stage / APP), CONNECTION, "--stream", "--federation-config", resources]
    running.start("run", run, env=env, cwd=Path.cwd(), log=log, always=False)
    with log.open(encoding="utf-8", errors="replace") as lines:
        ended = False
        while not ended:
            ended = not running.alive("run")  # before the last look at what it said
            for line in lines:
                told.take(line)
            _refuse_dead(running, told, staged, stop)
            time.sleep(0 if ended else _LOOK)


def _refuse_dead(running: Processes, told: _Told, staged: FederationConfig, stop: threading.Event) -> None:
    """Ends what would only wait: for a worker that is gone, or for a site that is here and cannot work."""
    stage = staged.folder
    if stop.is_set():
        raise KeyboardInterrupt
    if told.dead:
        raise FedmergeError(
            f"a worker of Ray died ({shortened(told.dead, 300)}); Ray never replaces one, and later rounds would lack "
            f"its sites. Often memory was short: take fewer cpus. What was reached is kept: simulate again to go on"
        )
    lost = [why for why, times in told.failures.items() if times >= staged.deploy.attempts]
    if lost:
        raise FedmergeError(f"a site cannot take part: {lost[0]}; here it is in {stage / LOGS}")
    if not running.alive("superlink"):
        raise FedmergeError(
            f"Flower's SuperLink ended with status {running.status('superlink')}; look into {stage / LOGS}"
        )


def _wait_for(running: Processes, port: int, stage: Path, stop: threading.Event) -> None:
    end = time.monotonic() + _START_SECONDS
    while not _answers(port):
        if stop.is_set():
            raise KeyboardInterrupt
        if time.monotonic() > end or not running.alive("superlink"):
            raise FedmergeError(f"Flower's SuperLink does not answer; look into {stage / LOGS / 'superlink.log'}")
        time.sleep(_LOOK)


def _answers(port: int) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://127.0.0.1:{port}/health", timeout=5.0):
            return True
    except OSError:
        return False


def _why(staged: FederationConfig, told: _Told) -> str:
    deployment = read_deployment(staged.run_folder)
    if deployment is not None and deployment.stopped:
        return deployment.stopped
    return told.error or "Flower's process ended without a word"


# ---------------------------------------------------------------- the folder of a simulation


def _staged(federation: FederationConfig, stage: Path, port: int) -> FederationConfig:
    """The same federation without keys, whose sites have a state of their own."""
    table = read_toml(federation.folder / FILE)
    own = {"insecure": True, "address": f"127.0.0.1:{port}", "listen": ""}
    folders = {name: federation.folder / "sites" / name for name in federation.names}
    folders = {name: place for name, place in folders.items() if federation.sites[name] or place.is_dir()}
    table = {**table, "deploy": {**table.get("deploy", {}), **own}, "sites": dict.fromkeys(federation.names, "")}
    make_folder(stage)
    write_atomically(stage / FILE, tomli_w.dumps(table))
    for name, place in folders.items():
        _stage_site(place, stage / "sites" / name, f"127.0.0.1:{port}")
    connection = {"address": f"127.0.0.1:{port}", "insecure": True}
    flower = {"superlink": {"default": CONNECTION, CONNECTION: connection}}
    make_folder(stage / FLOWER_HOME)
    write_atomically(stage / FLOWER_HOME / "config.toml", tomli_w.dumps(flower))
    make_folder(stage / APP)
    write_atomically(stage / APP / "pyproject.toml", app_text(stage))
    return read_federation(stage)


def _stage_site(place: Path, target: Path, server: str) -> None:
    """A site with the data of another and a state of its own."""
    site = read_site(place)
    make_folder(target)
    table: dict[str, Any] = {"name": site.name, "server": server, "device": site.device}
    table["data"] = {key: value for key, value in plain_options(site.data).items() if value != []}
    write_atomically(target / SITE_FILE, tomli_w.dumps(table), private=True)
    if (place / FILE).is_file():
        shutil.copyfile(place / FILE, target / FILE)


def _site_folders(stage: Path) -> list[Path]:
    return sorted(path.parent for path in stage.glob(f"sites/*/{SITE_FILE}"))


# ---------------------------------------------------------------- processes


def _environment(stage: Path, ray: str) -> dict[str, str]:
    """Flower's and Ray's: files where they are removed, no cluster that runs already, devices as the sites ask."""
    env = {**environment(stage / FLOWER_HOME), "RAY_TMPDIR": ray, "PYTHONUNBUFFERED": "1"}
    env["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    env.pop("RAY_ADDRESS", None)
    return env


def _end_orphans(stage: Path) -> None:
    """Ends what a simulation in this folder that was killed has left running, and removes what it has left behind."""
    running = Processes(stage / LOGS)
    found = [pid for pid in map(running.running, _PARTS) if pid is not None]
    marks.end([marks.Program(pid, secrets.token_hex(8)) for pid in found], grace=10.0)
    note = stage / LOGS / _RAY
    if note.is_file():
        left = Path(note.read_text(encoding="utf-8").strip())
        if left.name.startswith(_RAY_PREFIX) and left.parent == Path(tempfile.gettempdir()):
            shutil.rmtree(left, ignore_errors=True)
        note.unlink()


@contextmanager
def _ray_folder(stage: Path) -> Iterator[str]:
    """A folder for Ray's own files that lasts as long as the block.

    Names of Ray's sockets may have 107 letters, so that it must not lie deep.
    """
    with tempfile.TemporaryDirectory(prefix=_RAY_PREFIX, ignore_cleanup_errors=True) as folder:
        make_folder(stage / LOGS)
        write_atomically(stage / LOGS / _RAY, folder + "\n")
        try:
            yield folder
        finally:
            _end_of_ray(folder)
    (stage / LOGS / _RAY).unlink(missing_ok=True)


def _end_of_ray(folder: str) -> None:
    """Ends agents of Ray that outlive it for a while, having overwritten the mark in their environment (Linux)."""
    told = f"RAY_TMPDIR={folder}".encode()
    for place in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # gone, or somebody else's
            if told in (place / "environ").read_bytes().split(b"\0"):
                os.kill(int(place.name), signal.SIGKILL)


@contextmanager
def _stop_event() -> Iterator[threading.Event]:
    """Set by SIGTERM, SIGHUP and Ctrl-C, where this thread may ask for them."""
    if threading.current_thread() is not threading.main_thread():
        yield threading.Event()
        return
    with stop_signals() as event:
        yield event
