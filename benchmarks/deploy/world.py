"""A federation on this machine, made of real processes: built, started, looked at, disturbed and ended.

Its sites hold real handwritten digits, each another number of them, and read them by a function of their own that can
be told to take its time; so what is done to a site can be done in the middle of its work.
"""

from __future__ import annotations

import os
import secrets
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fedmerge.deploy import marks
from fedmerge.deploy.address import free_port
from fedmerge.deploy.blueprint import FLOWER_HOME, Blueprint, write_blueprint
from fedmerge.deploy.demo import DATA, demo_names, demo_schema, write_demo_data
from fedmerge.deploy.deployment import read_deployment
from fedmerge.deploy.federation import FederationConfig, read_federation
from fedmerge.deploy.processes import Processes, program
from fedmerge.deploy.status import SiteStatus, Status, read_status
from fedmerge.experiment.config import plain_options
from fedmerge.experiment.record import RunRecord, read_run, read_run_alone

NAMES = demo_names(5)
ROWS = (60, 100, 140, 180, 220)
"""Training examples of the sites; each has another number."""
TAMPERED = Path(__file__).with_name("tampered")

READER = '''"""The site's own examples. A file `pause` says how many seconds it takes to read them."""
import os
import time
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent


def examples():
    with (HERE / "readings").open("a") as readings:
        readings.write(f"{os.getpid()}\\n")
    pause = HERE / "pause"
    if pause.is_file():
        time.sleep(float(pause.read_text()))
    with np.load(HERE / "digits.npz") as data:
        return tuple((data[f"x{split}"], data[f"y{split}"]) for split in ("", "_validation", "_test"))
'''


class Fault(Exception):  # noqa: N818 - a finding, not a failure of the program
    """Something is not as it must be."""


def made(
    folder: Path,
    *,
    names: Sequence[str] = NAMES,
    address: str = "",
    hosts: Sequence[str] = (),
    pause: float = 0.0,
    deploy: Mapping[str, Any] | None = None,
    **config: Any,
) -> FederationConfig:
    """Writes a federation whose sites have uneven numbers of real digits.

    Args:
        folder: Of the federation; new.
        names: Of the sites.
        address: That sites connect to; a free port of the loopback address by default.
        hosts: Further names in the server's certificate.
        pause: Seconds that reading its examples takes a site.
        deploy: Options of table ``deploy``.
        config: Of the ordinary configuration.
    """
    asked = {
        "rounds": 3,
        "evaluate_every": 1,
        "model": {"name": "mlp", "hidden": [16]},
        "training": {"batch_size": 20, "epochs": 1, "lr": 0.1},
        **config,
    }
    blueprint = Blueprint(
        name="disturbed",
        address=address or f"127.0.0.1:{free_port()}",
        listen=address,
        hosts=tuple(hosts),
        sites=tuple(names),
        config=asked,
        data=plain_options(demo_schema()),
        deploy={"deadline": 600.0, "patience": 900.0, "open": bool(address), **(deploy or {})},
        site_data={name: {"python": "reader.py:examples"} for name in names},
    )
    write_blueprint(folder, blueprint)
    write_demo_data(folder, tuple(names))
    for number, name in enumerate(names):
        site = folder / "sites" / name
        _cut(site / DATA, ROWS[number % len(ROWS)])
        (site / "reader.py").write_text(READER, encoding="utf-8")
        if pause:
            pause_site(site, pause)
    return read_federation(folder)


def _cut(path: Path, rows: int) -> None:
    with np.load(path) as data:
        arrays = {key: values[:rows] if key in ("x", "y") else values for key, values in data.items()}
    np.savez(path, **arrays)


def pause_site(site: Path, seconds: float) -> None:
    """Says how long a site's examples take to be read from now on."""
    new = site / "pause.new"
    new.write_text(str(seconds), encoding="utf-8")
    new.replace(site / "pause")


@dataclass
class World:
    """A federation and its processes.

    Attributes:
        federation: Its folder, read.
        kept: What was started here.
        mark: In the environment of all of it.
        env: Of all of it.
        said: Where each program's output goes, by name.
    """

    federation: FederationConfig
    kept: Processes
    mark: str = field(default_factory=lambda: secrets.token_hex(8))
    env: dict[str, str] = field(default_factory=lambda: {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"})

    def __enter__(self) -> World:
        os.environ[marks.MARK] = self.mark
        return self

    def __exit__(self, *_: object) -> None:
        self.kept.stop()
        marks.end([self.program], grace=3.0)
        del os.environ[marks.MARK]
        left = marks.members([self.program])
        if left:
            raise Fault(f"processes are left: {left}")

    @property
    def program(self) -> marks.Program:
        """All of it."""
        return marks.Program(-1, self.mark)

    @property
    def folder(self) -> Path:
        """Of the federation."""
        return self.federation.folder

    def site(self, name: str) -> Path:
        """A site's folder."""
        return self.folder / "sites" / name

    def tamper(self, what: str, where: Path) -> None:
        """Changes the programs whose Flower home is within a folder, see ``tampered/sitecustomize.py``."""
        path = os.pathsep.join(filter(None, [str(TAMPERED), self.env.get("PYTHONPATH", "")]))
        self.env |= {"PYTHONPATH": path, "FEDMERGE_TAMPERED": f"{what}:{where / FLOWER_HOME}"}

    # ------------------------------------------------------------ starting and ending

    def start(self, name: str, *words: str, before: Sequence[str] = ()) -> None:
        """Starts ``fedmerge deploy WORDS``, after further words if there are any."""
        command = [*before, program("fedmerge"), "deploy", *words]
        self.launch(name, command)

    def launch(self, name: str, command: Sequence[str], env: Mapping[str, str] | None = None) -> None:
        """Starts any program."""
        log = self.kept.folder / f"{name}.log"
        self.kept.start(name, command, env={**self.env, **(env or {})}, log=log, always=False)

    def up(self) -> None:
        """All parts, by ``fedmerge deploy up``."""
        self.start("up", "up", str(self.folder))

    def output(self, name: str) -> str:
        """What a program has said."""
        path = self.kept.folder / f"{name}.log"
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""

    def end(self, name: str, seconds: float) -> int:
        """Waits for a program to end; its status."""
        until(lambda: self.kept.status(name) is not None, seconds, f"the end of {name}")
        return int(self.kept.status(name) or 0)

    def finished(self, seconds: float, name: str = "up") -> None:
        """Waits for a program that must end well."""
        status = self.end(name, seconds)
        if status:
            raise Fault(f"{name} ended with status {status}: {self.output(name)[-600:]}")

    # ------------------------------------------------------------ looking

    def status(self) -> Status:
        """What the server last said."""
        return read_status(self.federation.run_folder) or Status()

    def site_status(self, name: str) -> SiteStatus:
        """What the server last said of a site."""
        found: SiteStatus = self.status().sites.get(name, SiteStatus())
        return found

    def record(self) -> RunRecord:
        """The run."""
        return read_run(self.federation.run_folder)

    def is_over(self) -> bool:
        """Whether the rounds are done and the server waits for nobody any more."""
        folder = self.federation.run_folder
        over = (folder / "run.json").is_file() and read_run_alone(folder).status == "finished"
        return over and self.status().phase.startswith("finished")

    def delivered(self) -> tuple[str, ...]:
        """Sites that have their models."""
        deployment = read_deployment(self.federation.run_folder)
        return () if deployment is None else deployment.delivered

    def answered(self, what: str) -> list[str]:
        """Sites whose latest answer is that of a round."""
        return [name for name in self.federation.names if self.site_status(name).answered == what]

    def working(self, name: str, what: str) -> int | None:
        """Number of the process that does a site's work of a round now; None if there is none."""
        site = self.site_status(name)
        if site.asked != what or site.answered == what:
            return None
        readings = self.site(name) / "readings"
        numbers = readings.read_text(encoding="utf-8").split() if readings.is_file() else []
        found = int(numbers[-1]) if numbers else -1
        return found if found in self.pids(self.site(name), "flwr-clientapp") else None

    def wait_for_work(self, name: str, what: str, seconds: float = 240.0) -> int:
        """Waits until a site works for a round; the number of its process."""
        until(lambda: self.working(name, what) is not None, seconds, f"{name} at work for {what}")
        return self.working(name, what) or -1

    def pids(self, home: Path | None = None, word: str = "") -> set[int]:
        """Processes of this federation.

        Args:
            home: A folder: only those of the federation's server, or of a site.
            word: Only those with it in their command.
        """
        found = marks.members([self.program])
        if home is not None:
            wanted = f"FLWR_HOME={home / FLOWER_HOME}".encode()
            found = {pid for pid in found if wanted in _read(pid, "environ").split(b"\0")}
        return {pid for pid in found if word.encode() in _read(pid, "cmdline")}

    def log_of(self, site: str) -> str:
        """What a site's SuperNode has said."""
        path = self.site(site) / "logs" / "supernode.log"
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _read(pid: int, file: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{file}").read_bytes()
    except OSError:  # gone
        return b""


def kill(pids: set[int]) -> None:
    """Ends processes at once, as a crash does.

    Raises:
        Fault: if there are none: nothing was disturbed.
    """
    if not pids:
        raise Fault("there was no process to kill")
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def until(true: Callable[[], bool], seconds: float, what: str, *, look: float = 0.1) -> None:
    """Waits.

    Raises:
        Fault: if it does not become true in time.
    """
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            raise Fault(f"waited {seconds:.0f} s for {what}")
        time.sleep(look)
