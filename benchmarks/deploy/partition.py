"""A network that falls apart: server and sites in network namespaces of their own, joined by a bridge that is cut."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from cases import ENOUGH, PAUSE, Found, Room, case, whole
from world import NAMES, World, until

SECONDS = 30.0
"""That the network is cut for."""
SERVER = "10.213.77.1"
PORT = 9092


class Network:
    """Namespaces ``<prefix>0`` for the server and ``<prefix>1...`` for the sites, on one bridge.

    Args:
        sites: How many.
    """

    def __init__(self, sites: int) -> None:
        self.prefix = f"fm{os.getpid() % 100000}-"
        self.bridge, self.sites = f"{self.prefix}br", sites

    def _inner(self, place: int) -> str:
        return f"{self.prefix}n{place}"

    def _plug(self, place: int) -> str:
        return f"{self.prefix}v{place}"

    def within(self, place: int) -> list[str]:
        """Words before a command that is to run at a place: 0 for the server."""
        return ["ip", "netns", "exec", self._inner(place)]

    def build(self) -> None:
        """Makes it."""
        _ip("link", "add", self.bridge, "type", "bridge")
        _ip("link", "set", self.bridge, "up")
        for place in range(self.sites + 1):
            inner, plug = self._inner(place), self._plug(place)
            _ip("netns", "add", inner)
            _ip("link", "add", plug, "type", "veth", "peer", "name", "eth0", "netns", inner)
            _ip("link", "set", plug, "master", self.bridge, "up")
            _ip("-n", inner, "address", "add", f"10.213.77.{place + 1}/24", "dev", "eth0")
            _ip("-n", inner, "link", "set", "eth0", "up")
            _ip("-n", inner, "link", "set", "lo", "up")

    def remove(self) -> None:
        """Takes it away, as far as it is there."""
        for place in range(self.sites + 1):
            subprocess.run(["ip", "link", "delete", self._plug(place)], check=False, capture_output=True)
            subprocess.run(["ip", "netns", "delete", self._inner(place)], check=False, capture_output=True)
        subprocess.run(["ip", "link", "delete", self.bridge], check=False, capture_output=True)

    def cut(self, places: Sequence[int]) -> None:
        """Pulls plugs out of the bridge: nothing arrives, and nobody is told."""
        for place in places:
            _ip("link", "set", self._plug(place), "nomaster")

    def join(self, places: Sequence[int]) -> None:
        """Puts them back."""
        for place in places:
            _ip("link", "set", self._plug(place), "master", self.bridge)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@contextmanager
def network(sites: int) -> Iterator[Network]:
    """A network that is gone afterwards."""
    made = Network(sites)
    made.remove()
    try:
        made.build()
        yield made
    finally:
        made.remove()


@case(
    "network cut",
    "server and sites in network namespaces; one site, then all sites cut off for 30 s while they train",
    "it heals by itself: the same bits, nobody left out",
    900.0,
)
def _cut(room: Room) -> Found:
    address = f"{SERVER}:{PORT}"
    federation = room.build("cut", address=address, pause=PAUSE)
    with network(len(NAMES)) as net, room.world(federation) as world:
        world.start("server", "start", "server", str(world.folder), before=net.within(0))
        for place, name in enumerate(NAMES, start=1):
            world.start(name, "start", "site", str(world.site(name)), before=net.within(place))
        world.start("run", "run", str(world.folder), before=net.within(0))
        world.wait_for_work("site-3", "round 1", ENOUGH)
        one = _gap(world, net, [3], "round 1")
        world.wait_for_work("site-3", "round 2", ENOUGH)
        everyone = _gap(world, net, list(range(1, len(NAMES) + 1)), "round 2")
        world.finished(ENOUGH, "run")
        said = (
            f"after one site was cut off, round 1 took {one:.0f} s more; after all were, round 2 took {everyone:.0f} s"
        )
        return replace(whole(world, room.undisturbed("fedmerge")), said=said + " more")


def _gap(world: World, net: Network, places: Sequence[int], what: str) -> float:
    """Cuts sites off for a while; seconds from the healing to the end of the round."""
    number = int(what.rsplit(maxsplit=1)[-1])
    net.cut(places)
    try:
        time.sleep(SECONDS)
    finally:
        net.join(places)
    healed = time.monotonic()
    until(lambda: world.status().round >= number, ENOUGH, f"the end of {what}")
    return time.monotonic() - healed
