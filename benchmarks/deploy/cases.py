"""What can happen to a federation, each done to one on real processes; what must be true at the end is said there."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from reference import FILES, Silent, Wanted, differences, ended, rehearsed, without
from world import Fault, World, kill, made, pause_site, until

from fedmerge.deploy import identity
from fedmerge.deploy.blueprint import APP, CONNECTION, FLOWER_HOME
from fedmerge.deploy.federation import FederationConfig
from fedmerge.deploy.processes import Processes, environment, program

PAUSE = 4.0
"""Seconds that reading its examples takes a site, so that it can be met at work."""
ENOUGH = 480.0
"""Seconds within which every run must end on a machine of two cores."""
LAST = ("last.safetensors",)


@dataclass
class Room:
    """Where cases are played.

    Attributes:
        folder: For all of their files.
        deadline: Seconds after which a round goes on without a site, in cases where one is lost.
        wanted: What runs must end with, found before, by name.
    """

    folder: Path
    deadline: float
    wanted: dict[str, Wanted] = field(default_factory=dict)

    def build(self, name: str, **options: Any) -> FederationConfig:
        """A federation in a fresh folder."""
        shutil.rmtree(self.folder / name, ignore_errors=True)
        return made(self.folder / name / "federation", **options)

    def world(self, federation: FederationConfig) -> World:
        """Its processes, none yet."""
        return World(federation, Processes(federation.folder.parent / "said", grace=10.0))

    def undisturbed(self, method: str) -> Wanted:
        """The in-process run of a method."""
        if method not in self.wanted:
            federation = self.build(f"rehearsal-{method}", method={"name": method})
            self.wanted[method] = rehearsed(federation, self.folder / f"rehearsal-{method}" / "run")
        return self.wanted[method]

    def silent(self, name: str, silent: Silent, absent: Sequence[str] = (), **options: Any) -> Wanted:
        """The in-process run where some sites are silent."""
        federation = self.build(f"{name}-here", **options)
        return without(federation, silent, absent)


@dataclass(frozen=True)
class Found:
    """How a case ended.

    Attributes:
        ended: In words.
        unequal: What is not equal to the wanted bits; None where nothing is compared.
        said: The message that was seen.
        faults: What is not as it must be, beside the bits.
    """

    ended: str
    unequal: list[str] | None
    said: str = ""
    faults: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Case:
    """One thing that can happen.

    Attributes:
        name: Of the case.
        done: What is done.
        must: What must be true at the end.
        play: Does it.
        bound: Seconds that it may take.
    """

    name: str
    done: str
    must: str
    play: Callable[[Room], Found]
    bound: float


CASES: dict[str, Case] = {}


def case(name: str, done: str, must: str, bound: float = ENOUGH) -> Callable[[Callable[[Room], Found]], None]:
    """Makes a function one of the cases."""

    def note(play: Callable[[Room], Found]) -> None:
        CASES[name] = Case(name, done, must, play, bound)

    return note


def whole(world: World, wanted: Wanted, **more: Any) -> Found:
    """A run that must have ended as if nothing had happened: all bits, nobody left out, everybody with a model."""
    record, names = world.record(), world.federation.names
    faults = []
    if any(line.dropped or line.refused or line.abandoned for line in record.rounds):
        faults.append(f"left out: {[(line.round, line.dropped, line.refused) for line in record.rounds]}")
    if set(world.delivered()) != set(names):
        faults.append(f"models only at {world.delivered()}")
    found = Found("finished", differences(ended(world.federation), wanted), faults=faults)
    return replace(found, **more)


def line_with(text: str, *words: str) -> str:
    """The last line that holds all words; empty if none does."""
    lines = [line.strip() for line in text.splitlines() if all(word.lower() in line.lower() for word in words)]
    return lines[-1] if lines else ""


# ---------------------------------------------------------------- nothing, and processes that die


def _undisturbed(method: str) -> Callable[[Room], Found]:
    def play(room: Room) -> Found:
        with room.world(room.build(f"undisturbed-{method}", method={"name": method})) as world:
            world.up()
            world.finished(ENOUGH)
            return whole(world, room.undisturbed(method), said=line_with(world.output("up"), "finished:"))

    return play


for _name in ("fedmerge", "ditto"):
    case(f"undisturbed, {_name}", "nothing", "the bits of the rehearsal: last and selected state, every site's model")(
        _undisturbed(_name)
    )


def _killed(name: str, method: str, disturb: Callable[[World], None], *words: str) -> Callable[[Room], Found]:
    """A run by ``fedmerge deploy up`` in which something is killed, once."""

    def play(room: Room) -> Found:
        federation = room.build(name, method={"name": method}, pause=PAUSE)
        with room.world(federation) as world:
            world.up()
            disturb(world)
            world.finished(ENOUGH)
            return whole(world, room.undisturbed(method), said=line_with(world.output("up"), *words))

    return play


def _kill_supernode(world: World) -> None:
    world.wait_for_work("site-3", "round 2")
    kill(world.pids(world.site("site-3")))


def _kill_client(world: World) -> None:
    kill({world.wait_for_work("site-3", "round 2")})


def _kill_superlink(world: World) -> None:
    world.wait_for_work("site-3", "round 2")
    kill(world.pids(world.folder, "flower-superlink"))


SAME = "the run ends by itself with the same bits, nobody left out"
case("SuperNode killed", "SuperNode and client process of one site, kill -9 while it trains (ditto)", SAME)(
    _killed("supernode", "ditto", _kill_supernode, "supernode-site-3 started again")
)
case("client process killed", "client process of one site, kill -9 while it trains (ditto)", SAME)(
    _killed("client", "ditto", _kill_client, "stopped responding")
)
case("SuperLink killed", "SuperLink, kill -9 while sites train", SAME, 600.0)(
    _killed("superlink", "fedmerge", _kill_superlink, "from where the run stands")
)


@case(
    "ServerApp killed three times",
    "ServerApp, kill -9 between the answers of round 1, inside a checkpoint (fsync slowed), while models are handed "
    "over (ditto)",
    SAME,
    900.0,
)
def _serverapp(room: Room) -> Found:
    federation = room.build("serverapp", method={"name": "ditto"})
    for number, name in enumerate(federation.names):
        pause_site(federation.folder / "sites" / name, 1.0 + 3.0 * number)
    with room.world(federation) as world:
        world.tamper("slow-disk", federation.folder)
        world.up()
        moments = []
        until(lambda: 0 < len(world.answered("round 1")) < len(federation.names), 300, "some answers of round 1")
        moments.append(f"{len(world.answered('round 1'))} of 5 answers of round 1 were in")
        kill(world.pids(federation.folder, "flwr-serverapp"))
        until(lambda: bool(_half_written(federation.run_folder)), 400, "a checkpoint that is being written", look=0.01)
        moments.append(f"{', '.join(_half_written(federation.run_folder)) or 'a checkpoint'} was half written")
        kill(world.pids(federation.folder, "flwr-serverapp"))
        until(lambda: 0 < len(world.delivered()) < len(federation.names), 600, "some models handed over", look=0.02)
        moments.append(f"{len(world.delivered())} of 5 models were handed over")
        kill(world.pids(federation.folder, "flwr-serverapp"))
        world.finished(ENOUGH)
        told = world.output("up").count("from where the run stands")
        faults = [] if told >= 3 else [f"the run was submitted again {told} times, expected 3"]
        found = whole(world, room.undisturbed("ditto"), said="; ".join(moments))
        return replace(found, faults=[*found.faults, *faults])


def _half_written(folder: Path) -> list[str]:
    """Files of the state of a round that are being written, after round 1 at least."""
    rounds = folder / "rounds.jsonl"
    if not rounds.is_file() or rounds.stat().st_size == 0:
        return []
    names = [path.name for path in folder.rglob("*.part")]
    return [name for name in names if not name.startswith(("status", "deployment", "run.json", "serving"))]


@case("everything killed", "every process of server and sites, kill -9 at once; all started again (ditto)", SAME, 600.0)
def _everything(room: Room) -> Found:
    with room.world(room.build("everything", method={"name": "ditto"}, pause=PAUSE)) as world:
        world.up()
        world.wait_for_work("site-3", "round 2")
        kill(world.pids())
        until(lambda: not world.pids(), 30, "the end of all processes")
        world.kept.stop("up")
        world.up()
        world.finished(ENOUGH)
        return whole(world, room.undisturbed("ditto"), said=line_with(world.output("up"), "round 2 of 3"))


# ---------------------------------------------------------------- sites that must not be let in


def _outside(room: Room, name: str, change: Callable[[World], None], seen: Callable[[World], str]) -> Found:
    """A run in which the last site is not let in; the others must end as if it were not there."""
    loss = {"start_with": 4, "deadline": room.deadline}
    wanted = room.silent(name, lambda *_: False, ("site-5",), deploy=loss, rounds=2)
    with room.world(room.build(name, deploy=loss, rounds=2)) as world:
        change(world)
        world.up()
        until(world.is_over, ENOUGH, "the end of the rounds")
        said = seen(world)
        faults = [] if said else ["the message that was looked for was not seen"]
        if "site-5" in world.delivered():
            faults.append("the site got a model")
        dropped = [line.dropped for line in world.record().rounds if line.cohort]
        unequal = differences(ended(world.federation), wanted)
        return Found(f"finished without site-5, left out of {len(dropped)} rounds", unequal, said, faults)


WITHOUT = "the others go on after the deadline and end with the bits of a run without it; a clear message"


@case("another authority's certificate", "a site's ca.crt is another authority's", WITHOUT, 900.0)
def _other_authority(room: Room) -> Found:
    def change(world: World) -> None:
        other = world.folder.parent / "other"
        other.mkdir()
        identity.make_authority(other, "another federation", days=30)
        shutil.copy(other / identity.CA, world.site("site-5") / identity.CA)

    def seen(world: World) -> str:
        return _check(world, "site-5", "NO", "certificate") and line_with(world.log_of("site-5"), "certificate")

    return _outside(room, "authority", change, seen)


def _check(world: World, site: str, *words: str) -> str:
    """The line of ``fedmerge deploy check`` with all words."""
    world.start(f"check-{site}", "check", str(world.site(site)))
    world.end(f"check-{site}", 120)
    return line_with(world.output(f"check-{site}"), *words)


@case("unregistered key", "a site comes with a key that nobody registered", WITHOUT, 900.0)
def _unregistered(room: Room) -> Found:
    def change(world: World) -> None:
        for file in (identity.NODE_KEY, identity.NODE_LINE):
            (world.site("site-5") / file).unlink()
        identity.make_key_pair(world.site("site-5"))

    def seen(world: World) -> str:
        return line_with(world.log_of("site-5"), "No SuperNode found") or line_with(world.log_of("site-5"), "code:")

    return _outside(room, "unregistered", change, seen)


@case(
    "another site's name", "a site with its own registered key says in site.toml that it is another one", WITHOUT, 900.0
)
def _claims(room: Room) -> Found:
    def change(world: World) -> None:
        path = world.site("site-5") / "site.toml"
        path.write_text(path.read_text(encoding="utf-8").replace('"site-5"', '"site-4"'), encoding="utf-8")

    def seen(world: World) -> str:
        told = world.site_status("site-5").told
        return told if "says that it is 'site-4'" in told else ""

    return _outside(room, "claims", change, seen)


# ---------------------------------------------------------------- sites that hang, lie, repeat, or are full


@case(
    "a site hangs",
    "reading its examples takes a site for ever from round 2 on",
    "rounds go on after the deadline, with the bits of a run in which it is silent from there on",
    900.0,
)
def _hangs(room: Room) -> Found:
    deploy = {"deadline": room.deadline}
    wanted = room.silent(
        "hangs", lambda name, kind, number: name == "site-5" and (number >= 2 or kind == "final"), deploy=deploy
    )
    with room.world(room.build("hangs", deploy=deploy, pause=PAUSE)) as world:
        pause_site(world.site("site-5"), 0.0)
        world.up()
        until(lambda: world.site_status("site-5").answered == "round 1", 300, "its answer of round 1", look=0.02)
        pause_site(world.site("site-5"), 1e6)
        until(world.is_over, ENOUGH, "the end of the rounds")
        lines = world.record().rounds
        dropped = [line.round for line in lines if line.dropped == (4,)]
        faults = [] if dropped == [2, 3] else [f"left out of rounds {dropped}, expected 2 and 3"]
        longest = max(line.seconds for line in lines)
        if longest > room.deadline + 60:
            faults.append(f"a round took {longest:.0f} s")
        unequal = differences(ended(world.federation), wanted, models=False)
        said = world.site_status("site-5").told or world.status().phase
        return Found(f"finished; longest round {longest:.0f} s, deadline {room.deadline:.0f} s", unequal, said, faults)


@case(
    "a site hangs once",
    "reading its examples takes a site for ever in round 2, and no time again afterwards",
    "rounds go on without it; its program ends itself after twice the deadline, and the site takes part again; the "
    "bits of a run in which it is silent in those rounds",
    900.0,
)
def _hangs_once(room: Room) -> Found:
    options: dict[str, Any] = {"deploy": {"deadline": room.deadline}, "rounds": 9}
    federation = room.build("hangs-once", pause=PAUSE, **options)
    with room.world(federation) as world:
        pause_site(world.site("site-5"), 0.0)
        world.up()
        until(lambda: world.site_status("site-5").answered == "round 1", 300, "its answer of round 1", look=0.02)
        pause_site(world.site("site-5"), 1e6)
        world.wait_for_work("site-5", "round 2")
        pause_site(world.site("site-5"), 0.0)
        world.finished(ENOUGH)
        lost = [line.round for line in world.record().rounds if line.dropped == (4,)]
        wanted = room.silent("hangs-once", lambda name, _, number: name == "site-5" and number in lost, **options)
        faults = [] if lost and lost == [*range(2, 2 + len(lost))] and lost[-1] < 9 else [f"left out of {lost}"]
        said = line_with(world.log_of("site-5"), "is taken to hang")
        if not said:
            faults.append("its log does not say that the program was ended")
        if "site-5" not in world.delivered():
            faults.append("the site got no model")
        unequal = differences(ended(federation), wanted, LAST)
        return Found(f"finished; site-5 left out of rounds {lost[0]} to {lost[-1]} of 9", unequal, said, faults)


@case(
    "a site sends NaN",
    "a number of a site's answer of round 2 is NaN",
    "refused as `values`; the others' average is that of a run in which it is silent in that round",
)
def _nan(room: Room) -> Found:
    wanted = room.silent("nan", lambda name, kind, number: (name, kind, number) == ("site-5", "round", 2))
    federation = room.build("nan")
    with room.world(federation) as world:
        world.tamper("values", world.site("site-5"))
        world.up()
        world.finished(ENOUGH)
        refused = [[dict(refusal) for refusal in line.refused] for line in world.record().rounds]
        faults = [] if refused == [[], [], [{"client": 4, "reason": "values"}], []] else [f"refused: {refused}"]
        unequal = differences(ended(federation), wanted, LAST, models=False)
        return Found("finished", unequal, world.site_status("site-5").told, faults)


@case(
    "a site answers twice",
    "a SuperNode sends its answer of round 1 twice; a second one comes with the key of another site that is there",
    "counted once: the same bits",
)
def _twice(room: Room) -> Found:
    federation = room.build("twice", pause=PAUSE)
    with room.world(federation) as world:
        world.tamper("twice", world.site("site-2"))
        copy = world.folder.parent / "copy"
        shutil.copytree(world.site("site-3"), copy)
        world.up()
        world.wait_for_work("site-3", "round 1")
        world.start("copy", "start", "site", str(copy))
        world.finished(ENOUGH)
        logs = [path.read_text(encoding="utf-8", errors="replace") for path in (world.folder / "sites").rglob("*.log")]
        again = line_with("\n".join(logs), "sent a second time")
        second = line_with(
            (copy / "logs" / "supernode.log").read_text(encoding="utf-8"), "Failed to activate SuperNode"
        )
        found = whole(world, room.undisturbed("fedmerge"), said=f"{again}; {second}")
        faults = [text for text, is_there in (("no answer was sent twice", again), ("no second node", second))
                  if not is_there]  # fmt: skip
        return replace(found, faults=[*found.faults, *faults])


@case(
    "upload cut off",
    "a SuperNode dies when it has announced its answer of round 2 and not sent it (Flower waits 180 s for the rest)",
    "the others' answers are taken meanwhile; the site is asked again: the same bits",
    600.0,
)
def _upload(room: Room) -> Found:
    federation = room.build("upload")
    with room.world(federation) as world:
        world.tamper("upload", world.site("site-1"))
        world.up()
        until((world.site("site-1") / FLOWER_HOME / "upload-cut").exists, ENOUGH, "the cut")
        began = time.monotonic()
        until(lambda: len(world.answered("round 2")) == 4 or world.status().round >= 2, ENOUGH, "the others' answers")
        waited = time.monotonic() - began
        faults = [] if waited < 60 else [f"the others' answers were taken {waited:.0f} s after the cut"]
        world.finished(ENOUGH)
        told = line_with(world.output("up"), "WARNING: site site-1") or line_with(
            world.output("up"), "supernode-site-1"
        )
        found = whole(world, room.undisturbed("fedmerge"), said=told)
        return replace(found, faults=[*found.faults, *faults])


@case(
    "two runs at once",
    "`fedmerge deploy run` beside one that is under way, and `flwr run` by hand beside both",
    "the second follows the first, the one by hand is refused with a message; the same bits",
    600.0,
)
def _two_runs(room: Room) -> Found:
    federation = room.build("two-runs", pause=3 * PAUSE)
    with room.world(federation) as world:
        world.up()
        world.wait_for_work("site-3", "round 1")
        hand = environment(world.folder / FLOWER_HOME, world.env)
        app = str(world.folder / APP)
        world.launch("hand", [program("flwr"), "run", app, CONNECTION, "--stream"], hand)
        world.start("second", "run", str(world.folder))
        by_hand = world.end("hand", 240)
        world.finished(ENOUGH)
        world.finished(60, "second")
        refused = line_with(world.output("hand"), "ERROR", "in use by process").replace(str(world.folder), "FOLDER")
        faults = [] if refused else [f"by hand (status {by_hand}): {world.output('hand')[-300:]}"]
        if "Site" not in world.output("second"):
            faults.append("the second run did not end with the first's scores")
        found = whole(world, room.undisturbed("fedmerge"), said=refused)
        return replace(found, faults=[*found.faults, *faults])


@case(
    "a site's disk is full",
    "no byte is free where a site keeps its private state, in round 2 (ditto)",
    "the server is told; the others go on, and the site goes on from round 1 when there is room again",
    600.0,
)
def _full(room: Room) -> Found:
    wanted = room.silent(
        "full",
        lambda name, kind, number: (name, kind, number) == ("site-5", "round", 2),
        method={"name": "ditto"},
    )
    federation = room.build("full", method={"name": "ditto"}, pause=PAUSE)
    with room.world(federation) as world:
        state = world.site("site-5") / "state"
        state.mkdir(exist_ok=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1M", "tmpfs", str(state)], check=True)
        try:
            pause_site(world.site("site-5"), 0.0)
            world.up()
            until(lambda: world.site_status("site-5").answered == "round 1", 300, "its answer of round 1", look=0.02)
            _fill(state / "ballast")
            until(lambda: world.status().round >= 2, 300, "the end of round 2")
            told = world.site_status("site-5").told
            (state / "ballast").unlink()
            world.finished(ENOUGH)
            dropped = [line.dropped for line in world.record().rounds]
            faults = [] if dropped == [(), (), (4,), ()] else [f"left out: {dropped}"]
            if "No space left" not in told:
                faults.append("the server was not told")
            unequal = differences(ended(federation), wanted, LAST)
            return Found("finished; site-5 left out of round 2 only", unequal, told, faults)
        finally:
            world.kept.stop()
            time.sleep(0.5)
            subprocess.run(["umount", str(state)], check=True)


def _fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            return


__all__ = ["CASES", "FILES", "Case", "Fault", "Found", "Room"]
