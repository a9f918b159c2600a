"""A real SuperLink behind a real nginx: sites with registered keys get through, and nobody else gets anything."""

import contextlib
import json
import os
import shutil
import socket
import sqlite3
import ssl
import subprocess
import time

import pytest

from fedmerge.core.errors import UsageError
from fedmerge.deploy import marks
from fedmerge.deploy.address import free_port
from fedmerge.deploy.blueprint import CONNECTION, Blueprint, write_blueprint
from fedmerge.deploy.commands import NODES, open_run, register_sites, submit
from fedmerge.deploy.identity import public_key_bytes
from fedmerge.deploy.members import add_site, make_site_key, remove_site
from fedmerge.deploy.processes import (
    Processes,
    environment,
    program,
    superlink_command,
    supernode_command,
    wait_for_superlink,
)
from fedmerge.deploy.reach import check_server
from fedmerge.deploy.roster import read_roster

NGINX = shutil.which("nginx", path=os.environ.get("PATH", "") + ":/usr/sbin")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("flower"),
    pytest.mark.skipif(NGINX is None, reason="needs nginx (Debian package nginx-light)"),
]
pytest.importorskip("flwr")
pytest.importorskip("cryptography")

APP = """
import time
from flwr.serverapp import ServerApp
from flwr.clientapp import ClientApp

server = ServerApp()
client = ClientApp()

@server.main()
def main(grid, context):
    print("nodes", len(list(grid.get_node_ids())), "of", context.run_config["folder"], flush=True)
"""


@pytest.fixture(scope="module")
def door(tmp_path_factory):
    """A federation's folder whose SuperLink, proxy and site ``a`` run."""
    folder = tmp_path_factory.mktemp("door") / "federation"
    address, link = f"localhost:{free_port()}", f"127.0.0.1:{free_port()}"
    write_blueprint(folder, Blueprint(name="f", address=address, listen=link, sites=("a",)))
    with Processes(folder / "pids") as kept:
        home = environment(folder / "flower")
        command = [*superlink_command(folder), "--database", str(folder / "superlink.db")]  # so that tests can look
        kept.start("superlink", command, env=home, cwd=folder, log=folder / "logs" / "superlink.log")
        command = [NGINX, "-e", "stderr", "-c", str(folder / "nginx.conf")]
        kept.start("proxy", command, env=dict(os.environ), cwd=folder, log=folder / "logs" / "proxy.log")
        assert wait_for_superlink(folder, 60, alive=lambda: kept.alive("superlink"))
        assert register_sites(folder).added == ("a",)
        start_site(kept, folder, "a")
        programs = [marks.Program(kept.running(name), "none") for name in ("superlink", "proxy", "node-a")]
        yield folder
    assert marks.members(programs) == set()


def start_site(kept, folder, name):
    site = folder / "sites" / name
    kept.start(
        f"node-{name}",
        supernode_command(site, free_port()),
        env=environment(site / "state" / "flower"),
        cwd=site,
        log=folder / "logs" / f"{name}.log",
        always=False,
    )


def rows(folder, query):
    with contextlib.closing(sqlite3.connect(f"file:{folder}/superlink.db?mode=ro", uri=True)) as database:
        return database.execute(query).fetchall()


def nodes(folder):
    """What the SuperLink keeps of its nodes: public key -> status."""
    return dict(rows(folder, "select public_key, status from node"))


def runs(folder):
    return rows(folder, "select count(*) from run")


def until(true, seconds=40):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.1)


def ask(folder, request, *, address=None):
    """The head of the answer to raw bytes, from the proxy."""
    host, _, port = (address or read_roster(folder).deploy.address).partition(":")
    context = ssl.create_default_context(cafile=str(folder / "ca.crt"))
    with (
        socket.create_connection((host, int(port)), timeout=20) as plain,
        context.wrap_socket(plain, server_hostname=host) as connection,
    ):
        with contextlib.suppress(OSError):  # an answer may come before the whole question has gone
            connection.sendall(request)
        told = b""
        while b"\r\n\r\n" not in told and (piece := connection.recv(65536)):
            told += piece
    return told.decode("latin-1")


def status(folder, path, method="POST", **more):
    head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/protobuf\r\nContent-Length: 0\r\n\r\n"
    return int(ask(folder, head.encode("latin-1"), **more).split()[1])


def flwr(folder, *words, home):
    command = [program("flwr"), *words]
    return subprocess.run(
        command, env=environment(home), cwd=folder, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.fixture(scope="module")
def outsider(door):
    """Flower's own folder of somebody who has ca.crt and the public address."""
    home = door.parent / "outsider"
    home.mkdir()
    roster = read_roster(door)
    text = (door / "flower" / "config.toml").read_text()
    assert roster.link in text
    (home / "config.toml").write_text(text.replace(roster.link, roster.deploy.address))
    return home


def test_a_site_with_a_registered_key_connects_through_the_proxy(door):
    key = public_key_bytes(read_roster(door).sites["a"])
    until(lambda: nodes(door)[key] == "online")


def test_the_superlink_keeps_keys_as_we_say(door):
    assert set(nodes(door)) >= {public_key_bytes(line) for line in read_roster(door).sites.values()}


def test_a_site_finds_everything_in_order(door):
    findings = check_server(read_roster(door).deploy.address, door / "sites" / "a" / "ca.crt")
    assert [each.name for each in findings] == [
        *("reachable", "certificate", "days left", "clock", "fleet API", "control API")
    ]
    assert [each for each in findings if not each.ok] == []
    assert findings[-1].detail == "closed from here (status 403)"


def test_flowers_own_command_works_on_the_server_and_is_refused_through_the_proxy(door, outsider):
    here = flwr(door, "list", CONNECTION, home=door / "flower")
    assert here.returncode == 0, here.stderr
    key = door.parent / "mine"
    make_site_key(key)
    before = nodes(door), runs(door)
    for words in (("run", "app", CONNECTION), ("supernode", "register", str(key / "node.pub"), CONNECTION)):
        there = flwr(door, *words, home=outsider)
        assert there.returncode != 0
        assert "403 Forbidden" in there.stderr, there.stderr
    assert (nodes(door), runs(door)) == before


@pytest.mark.parametrize(
    "path",
    [
        *("/", "/health", "/docs", "/openapi.json", "/v1", "/v1/fleet", "/v1/fleet/"),
        *("/v1/control/list-nodes", "/v1/control/start-run", "/v1/runtime/acquire-task", "/v1/runtime/responses"),
        *("//v1/control/list-nodes", "/v1//control/list-nodes", "/./v1/control/list-nodes"),
        *(
            "/v1/fleet/../control/list-nodes",
            "/v1/fleet/%2e%2e/control/list-nodes",
            "/v1/fleet/..%2fcontrol/list-nodes",
        ),
        *("/v1/fleet/%2e%2e%2fcontrol%2flist-nodes", "/v1/fleet/%252e%252e/control/list-nodes"),
        *("/v1/fleet/..;/control/list-nodes", "/v1/fleet/x%00/../../control/list-nodes", "/v1/fleet/\\..\\control"),
        *("/v1/control%2flist-nodes", "/%76%31/control/list-nodes"),
        "https://localhost/v1/control/list-nodes",
    ],
)
def test_every_other_path_is_refused_however_it_is_written(door, path):
    assert status(door, path) == (400 if "%00" in path else 403)


def test_a_question_mark_ends_the_path(door):
    assert status(door, "/v1/fleet/x?/../../control/list-nodes") == 404  # the SuperLink's: it has no /v1/fleet/x


def test_the_paths_that_are_refused_are_there_behind_the_proxy(door):
    link = read_roster(door).link
    assert status(door, "/health", "GET", address=link) == 200
    assert status(door, "/v1/control/list-nodes", address=link) == 200


def test_what_sites_ask_asks_for_a_key(door):
    for name in ("register-node", "activate-node", "pull-messages", "push-object", "get-fab"):
        assert status(door, f"/v1/fleet/{name}") == 401


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "OPTIONS", "TRACE", "CONNECT"])
def test_sites_only_post(door, method):
    assert status(door, "/v1/fleet/pull-messages", method) in (400, 403, 405)


def test_a_large_body_passes_and_one_beyond_the_bound_does_not(door):
    head = "POST /v1/fleet/push-messages HTTP/1.1\r\nHost: x\r\n"
    head += "Content-Type: application/protobuf\r\nContent-Length: {}\r\n\r\n"
    told = ask(door, head.format(40_000_000).encode() + b"\0" * 40_000_000)
    assert told.split()[1] in ("400", "401"), told  # read as a whole, and found to be no message and without a key
    assert ask(door, head.format(3 * 2**30).encode()).split()[1] == "413"


def test_a_site_whose_key_is_not_registered_does_not_get_in(door):
    add_site(door, "stranger")
    with Processes(door / "pids") as kept:
        start_site(kept, door, "stranger")
        until(lambda: not kept.alive("node-stranger"))
        assert kept.status("node-stranger") != 0
    assert public_key_bytes(read_roster(door).sites["stranger"]) not in nodes(door)
    remove_site(door, "stranger")


def test_a_site_that_left_is_registered_no_more(door):
    place = add_site(door, "guest")
    key = public_key_bytes((place / "node.pub").read_text())
    assert register_sites(door).added == ("guest",)
    assert nodes(door)[key] == "registered"
    remove_site(door, "guest")
    assert len(register_sites(door).removed) == 1
    assert nodes(door)[key] == "unregistered"
    book = door / "flower" / NODES
    known = book.read_bytes()
    add_site(door, "guest", (door / "removed" / "guest" / "node.pub").read_text())
    try:
        with pytest.raises(UsageError, match=r"sites\.guest: .*Flower never takes a removed one again"):
            register_sites(door)
        line = read_roster(door).sites["a"]
        book.write_text(json.dumps({line: json.loads(known)[line]}))
        assert "guest" in register_sites(door).kept  # its number is lost: that it was removed cannot be known
    finally:
        remove_site(door, "guest")
        book.write_bytes(known)


@contextlib.contextmanager
def tiny_app(door, does):
    """Gives the federation's app another one's code meanwhile."""
    path, code = door / "app" / "pyproject.toml", door / "app" / "tiny.py"
    before = text = path.read_text()
    for kind in ("server", "client"):
        text = text.replace(f"fedmerge.deploy.flower.{kind}_app:app", f"tiny:{kind}")
    try:
        path.write_text(text)
        code.write_text(f"{APP}    {does}\n")
        yield
    finally:
        path.write_text(before)
        code.unlink()


@pytest.mark.parametrize(("does", "ended"), [("pass", "finished:completed"), ("1 / 0", "finished:failed")])
def test_a_run_is_followed_to_its_end(door, does, ended):
    lines = []
    with tiny_app(door, does):
        end = submit(door, tell=lines.append)
    assert (end.status, end.exit_status) == (ended, int(ended != "finished:completed")), lines
    assert any(line.endswith(f"of {door}") for line in lines), lines


def test_a_run_that_is_interrupted_is_stopped(door):
    def interrupt(line):
        if line.endswith(f"of {door}"):
            raise KeyboardInterrupt

    with tiny_app(door, "time.sleep(600)"), pytest.raises(KeyboardInterrupt):
        submit(door, tell=interrupt)
    assert open_run(door) is None
