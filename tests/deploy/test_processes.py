"""Programs are started, kept, and stopped with all that they started, and nothing else is touched."""

import errno
import json
import os
import signal
import stat
import subprocess
import sys
import time

import pytest

from fedmerge.core.errors import UsageError
from fedmerge.deploy import commands, marks, processes
from fedmerge.deploy.address import free_port
from fedmerge.deploy.blueprint import Blueprint, write_blueprint
from fedmerge.deploy.commands import RunEnd, register_sites
from fedmerge.deploy.members import add_site, make_site_key, remove_site
from fedmerge.deploy.processes import (
    Processes,
    environment,
    program,
    stop_signals,
    stop_signals_interrupt,
    superlink_command,
    supernode_command,
    wait_for_superlink,
)

SLEEPER = "import time; time.sleep(600)"
STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
)
PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
print(child.pid, flush=True)
time.sleep(600)
"""
ORPHANING = PARENT.replace("time.sleep(600)\n", "")


def python(text):
    return [sys.executable, "-c", text]


def until(true, seconds=20):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def lives(pid):
    return marks.birth(pid) is not None


@pytest.fixture
def kept(tmp_path):
    with Processes(tmp_path / "pids", grace=5) as found:
        yield found


def start(kept, name, text, tmp_path, **more):
    return kept.start(name, python(text), env=dict(os.environ), log=tmp_path / f"{name}.log", **more)


def only_mark(kept):
    """Of the one program that was started."""
    (child,) = kept._children.values()
    return child.mark


def told(path):
    until(lambda: path.exists() and path.read_text().endswith("\n"))
    return path.read_text()


def test_a_program_has_a_group_and_a_file_of_its_own_and_ends_with_stop(kept, tmp_path):
    pid = start(kept, "one", SLEEPER, tmp_path)
    assert os.getpgid(pid) == pid != os.getpgid(0)
    assert kept.running("one") == pid
    assert kept.alive("one")
    kept.stop("one")
    assert not lives(pid)
    assert list((tmp_path / "pids").iterdir()) == []


def test_stop_reaches_what_a_program_started_in_a_session_of_its_own(kept, tmp_path):
    start(kept, "one", PARENT, tmp_path)
    child = int(told(tmp_path / "one.log"))
    assert os.getsid(child) == child
    kept.stop()
    assert not lives(child)


@pytest.mark.skipif(sys.platform != "linux", reason="marks can be seen on Linux only")
def test_stop_reaches_an_orphan_too(kept, tmp_path):
    start(kept, "one", ORPHANING, tmp_path, always=False)
    orphan = int(told(tmp_path / "one.log"))
    until(lambda: not kept.alive("one"))
    assert lives(orphan)
    kept.stop()
    assert not lives(orphan)


@pytest.mark.skipif(sys.platform != "linux", reason="marks can be seen on Linux only")
def test_stop_reaches_a_program_that_overwrote_its_environment(kept, tmp_path):
    bare = "import os, sys; os.execve(sys.executable, [sys.executable, '-c', 'import time; time.sleep(600)'], {})"
    pid = start(kept, "one", bare, tmp_path)
    until(lambda: pid not in marks.members([marks.Program(-1, only_mark(kept))]))
    kept.stop()
    assert not lives(pid)


def test_what_does_not_listen_is_ended_after_the_grace(tmp_path):
    with Processes(tmp_path / "pids", grace=0.5) as kept:
        pid = start(kept, "one", STUBBORN, tmp_path)
        told(tmp_path / "one.log")
        began = time.monotonic()
        kept.stop()
        assert 0.5 <= time.monotonic() - began < 5
        assert not lives(pid)


def test_others_live_on(kept, tmp_path):
    other = subprocess.Popen(python(SLEEPER), start_new_session=True)
    try:
        mine, second = start(kept, "one", SLEEPER, tmp_path), start(kept, "two", SLEEPER, tmp_path)
        kept.stop("one")
        assert [lives(mine), lives(second), lives(other.pid), lives(os.getpid())] == [False, True, True, True]
    finally:
        other.kill()
        other.wait()


def test_what_ends_is_started_again_even_with_status_0_and_later_each_time(kept, tmp_path):
    start(kept, "one", "print('x', flush=True)", tmp_path)
    events = []
    began = time.monotonic()
    kept.watch(lambda: (tmp_path / "one.log").read_text().count("x") == 3, tell=events.append)
    assert 3 <= time.monotonic() - began < 10  # after 1 s and after 2 s
    ended = [event for event in events if "ended with status 0" in event]
    assert ended[0].endswith("again in 1 s")
    assert ended[1].endswith("again in 2 s")
    assert sum("started again" in event for event in events) == 2


def test_what_need_not_run_always_stays_ended(kept, tmp_path):
    start(kept, "one", "raise SystemExit(7)", tmp_path, always=False)
    until(lambda: not kept.alive("one"))
    assert kept.status("one") == 7
    assert kept.check() == []


def test_what_a_program_writes_is_its_owners_alone(kept, tmp_path):
    path = tmp_path / "written"
    start(kept, "one", f"open({str(path)!r}, 'w').close(); print('x', flush=True)", tmp_path, always=False)
    told(tmp_path / "one.log")
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "one.log").stat().st_mode) == 0o600


def test_two_of_one_name_do_not_run_at_a_time(kept, tmp_path):
    pid = start(kept, "one", SLEEPER, tmp_path)
    with pytest.raises(UsageError, match=f"one runs already \\(process {pid}\\)"):
        start(kept, "one", SLEEPER, tmp_path)
    with pytest.raises(UsageError, match="runs already"), Processes(tmp_path / "pids") as other:
        start(other, "one", SLEEPER, tmp_path)
    assert lives(pid)


KEEPER = """
import os, signal, sys
from fedmerge.deploy.processes import Processes
kept = Processes(sys.argv[1])
print(kept.start("one", [sys.executable, "-c", sys.argv[2]], env=dict(os.environ), log=sys.argv[3]), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_keeper_left_is_ended_by_the_next_one_with_all_that_it_started(kept, tmp_path):
    command = [*python(KEEPER), tmp_path / "pids", PARENT, tmp_path / "old.log"]
    orphan = int(subprocess.run(command, capture_output=True, check=False).stdout)
    child = int(told(tmp_path / "old.log"))
    assert lives(orphan)
    assert lives(child)
    pid = start(kept, "one", SLEEPER, tmp_path)
    assert kept.running("one") == pid != orphan
    assert not lives(orphan)
    assert not lives(child)


@pytest.mark.parametrize(
    "content",
    ["", "x\ny\n", "1\n", f"{os.getpid()}\n0\n", "99999999\n5\n"],
    ids=["empty", "no numbers", "one line", "another start", "nobody"],
)
def test_a_file_of_another_process_or_of_none_does_not_count(kept, tmp_path, content):
    (tmp_path / "pids").mkdir()
    (tmp_path / "pids" / "one.pid").write_text(content)
    assert kept.running("one") is None
    start(kept, "one", SLEEPER, tmp_path)


def test_a_program_that_is_not_there_leaves_nothing(kept, tmp_path):
    with pytest.raises(FileNotFoundError):
        kept.start("one", ["/no/such/program"], env={})
    assert kept.running("one") is None


def test_a_log_has_bounds(kept, tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "_MOST_LOG_BYTES", 1000)
    start(kept, "one", "while True:\n  print('x' * 100, flush=True)\n  import time; time.sleep(0.01)", tmp_path)
    log = tmp_path / "one.log"
    until(lambda: log.exists() and log.stat().st_size > 1000)
    kept.check()
    assert log.stat().st_size <= 1000
    assert (tmp_path / "one.log.1").stat().st_size > 1000
    assert stat.S_IMODE((tmp_path / "one.log.1").stat().st_mode) == 0o600
    until(lambda: log.stat().st_size > 0)
    assert log.read_bytes()[:1] == b"x"  # no hole


@pytest.mark.skipif(sys.platform != "linux", reason="marks can be seen on Linux only")
def test_marks_of_one_that_was_started_by_another_are_both_there(kept, tmp_path, monkeypatch):
    monkeypatch.setenv(marks.MARK, "/outer")
    pid = start(kept, "one", SLEEPER, tmp_path)
    assert pid in marks.members([marks.Program(-1, "outer")])
    kept.stop()
    assert marks.members([marks.Program(-1, "outer")]) == set()


def test_signals_to_stop_are_heard_and_given_back():
    before = signal.getsignal(signal.SIGTERM)
    with stop_signals() as stopped:
        assert not stopped.is_set()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stopped.wait(5)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_closed_terminal_interrupts_once_and_what_stops_is_left_in_peace():
    before = signal.getsignal(signal.SIGHUP)
    with stop_signals_interrupt():
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGHUP)
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGHUP) is before


def test_a_closed_terminal_does_not_end_what_was_started_under_nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        for block in (stop_signals_interrupt(), stop_signals()):
            with block:
                assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_logs_are_in_a_folder_that_others_cannot_enter(kept, tmp_path):
    kept.start("one", python("print('x')"), env=dict(os.environ), log=tmp_path / "logs" / "one.log")
    assert stat.S_IMODE((tmp_path / "logs").stat().st_mode) == 0o700


def test_the_environment_is_quiet_and_finds_flowers_further_programs(tmp_path):
    found = environment(tmp_path, {"PATH": "/bin", "A": "1", "OMP_NUM_THREADS": "9"})
    assert found["PATH"].split(os.pathsep) == [os.path.dirname(sys.executable), "/bin"]
    assert found["FLWR_HOME"] == str(tmp_path)
    assert found["A"] == "1"
    quiet = ("FLWR_TELEMETRY_ENABLED", "FLWR_DISABLE_UPDATE_CHECK", "RAY_USAGE_STATS_ENABLED", "OMP_NUM_THREADS")
    assert [found[name] for name in quiet] == ["0", "1", "0", "1"]


def test_without_flower_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UsageError, match=r'flower-superlink is not installed: pip install "fedmerge\[flower\]"'):
        program("flower-superlink")


@pytest.fixture
def flower(monkeypatch):
    monkeypatch.setattr(processes, "program", lambda name: f"/bin/{name}")


@pytest.fixture
def federation(tmp_path):
    pytest.importorskip("cryptography")
    link = free_port()
    folder = tmp_path / "a federation"
    write_blueprint(
        folder, Blueprint(name="x", address="fed.example.org:9092", listen=f"127.0.0.1:{link}", sites=("a",))
    )
    return folder


def test_the_superlink_asks_sites_for_keys(federation, flower):
    command = superlink_command(federation)
    assert command[:2] == ["/bin/flower-superlink", "--host"]
    assert "--enable-supernode-auth" in command
    assert command[command.index("--ssl-ca-certfile") + 1] == str(federation / "ca.crt")
    assert "--database" not in command, "a locked file loses answers"
    assert "--insecure" not in command


def test_a_site_has_its_folder_and_name_from_its_own_command(federation, flower):
    site = federation / "sites" / "a"
    command = supernode_command(site, 5)
    assert command[command.index("--superlink") + 1] == "fed.example.org:9092"
    assert command[command.index("--node-config") + 1] == f'site="{site}" client-key="a"'
    assert command[command.index("--auth-supernode-private-key") + 1] == str(site / "node.key")
    config = pytest.importorskip("flwr.common.config")
    assert config.parse_config_args([command[-1]]) == {"site": str(site), "client-key": "a"}


def test_without_certificates_only_the_loopback_address_will_do(tmp_path, flower):
    folder = tmp_path / "f"
    write_blueprint(folder, Blueprint(name="x", address="127.0.0.1:9092", insecure=True, sites=("a",)))
    assert "--insecure" in superlink_command(folder)
    site = folder / "sites" / "a"
    assert "--insecure" in supernode_command(site, 5)
    for path in (site / "site.toml", folder / "federation.toml"):
        path.write_text(path.read_text().replace("127.0.0.1", "10.0.0.1"))
    for command in (lambda: supernode_command(site, 5), lambda: superlink_command(folder)):
        with pytest.raises(UsageError, match="anybody could read and change what is sent"):
            command()


def test_a_superlink_that_other_machines_reach_must_be_asked_for(federation, flower):
    path = federation / "federation.toml"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(line for line in lines if not line.startswith("listen = ")))
    with pytest.raises(UsageError, match=r"deploy\.listen: got none, so fed\.example\.org:9092; .*deploy\.open = true"):
        superlink_command(federation)
    path.write_text(path.read_text().replace("[deploy]", "[deploy]\nopen = true"))
    assert superlink_command(federation)[2] == "fed.example.org"


@pytest.mark.parametrize("missing", ["ca.crt", "node.key"])
def test_a_site_that_lost_one_of_its_files_does_not_fall_back(federation, flower, missing):
    site = federation / "sites" / "a"
    (site / missing).unlink()
    with pytest.raises(UsageError, match=f"cannot read .*{missing}: No such file"):
        supernode_command(site, 5)


def test_a_folder_that_is_no_site_and_a_server_with_another_key_are_refused(federation, flower, tmp_path):
    with pytest.raises(UsageError, match=r"it has no site\.toml"):
        supernode_command(tmp_path, 5)
    (federation / "server.key").write_bytes((federation / "ca.key").read_bytes())
    with pytest.raises(UsageError, match=r"server\.key is not the key of"):
        superlink_command(federation)


def test_waiting_for_a_superlink_has_an_end(federation):
    began = time.monotonic()
    assert not wait_for_superlink(federation, 0.6)
    assert time.monotonic() - began < 5
    assert not wait_for_superlink(federation, 60, alive=lambda: False)


FLWR = """
import json, os, pathlib, sys
here = pathlib.Path(os.environ["FLWR_HOME"])
book = here / "book.json"
nodes = json.loads(book.read_text()) if book.exists() else {}
words = sys.argv[1:]
with (here / "calls").open("a") as calls:
    calls.write(" ".join(words[:2]) + chr(10))
answer = {"success": True}
if words[:2] == ["supernode", "list"]:
    answer["nodes"] = [{"node-id": number, "status": node["status"]} for number, node in nodes.items()]
elif words[:2] == ["supernode", "register"]:
    key = pathlib.Path(words[2]).read_text()
    if any(node["key"] == key for node in nodes.values()):
        answer = {"success": False, "error-message": "Public key already in use."}
    else:
        number = str(100 + len(nodes))
        nodes[number] = {"key": key, "status": "registered"}
        answer["node-id"] = int(number)
elif words[:2] == ["supernode", "unregister"]:
    nodes[words[2]]["status"] = "unregistered"
book.write_text(json.dumps(nodes))
print("a line before")
print(json.dumps(answer, indent=1))
"""


@pytest.fixture
def pretended(federation, tmp_path, monkeypatch):
    """A command that keeps books as Flower's own does (which the tests of the proxy use)."""
    command = tmp_path / "flwr"
    command.write_text(f"#!{sys.executable}\n{FLWR}")
    command.chmod(0o755)
    monkeypatch.setattr(commands, "program", lambda name: str(command))
    return federation


def calls(folder):
    path = folder / "flower" / "calls"
    found = path.read_text().split("\n")[:-1] if path.exists() else []
    path.unlink(missing_ok=True)
    return found


def test_registering_twice_changes_nothing_the_second_time(pretended):
    assert register_sites(pretended).added == ("a",)
    assert calls(pretended) == ["supernode list", "supernode register"]
    assert register_sites(pretended) == commands.Registered(kept=("a",))
    assert calls(pretended) == ["supernode list"]


def test_a_site_that_left_is_removed_and_a_foreign_node_too(pretended):
    add_site(pretended, "b")
    register_sites(pretended)
    remove_site(pretended, "b")
    book = pretended / "flower" / "book.json"
    nodes = json.loads(book.read_text())
    book.write_text(json.dumps({**nodes, "7": {"key": "somebody's", "status": "online"}}))
    assert set(register_sites(pretended).removed) == {"101", "7"}
    assert register_sites(pretended).removed == ()


def test_a_key_that_was_removed_is_never_taken_again(pretended):
    register_sites(pretended)
    book = pretended / "flower" / "book.json"
    book.write_text(book.read_text().replace('"registered"', '"unregistered"'))
    with pytest.raises(UsageError, match=r"sites\.a: .*never takes a removed one again; make a new key"):
        register_sites(pretended)


def test_registering_that_was_killed_before_its_note_locks_nobody_out(pretended, caplog):
    register_sites(pretended)
    (pretended / "flower" / "nodes.json").unlink()
    assert register_sites(pretended) == commands.Registered(kept=("a",))
    assert "keys of a under numbers that are not known" in caplog.text
    assert json.loads((pretended / "flower" / "book.json").read_text())["100"]["status"] == "registered"


def test_without_its_notes_it_removes_nobody_and_takes_in_who_is_new(pretended):
    register_sites(pretended)
    (pretended / "flower" / "nodes.json").unlink()
    add_site(pretended, "b")
    assert register_sites(pretended) == commands.Registered(added=("b",), kept=("a",))
    remove_site(pretended, "b")
    assert register_sites(pretended) == commands.Registered(kept=("a",), removed=("101",))
    add_site(pretended, "b", (pretended / "removed" / "b" / "node.pub").read_text())
    with pytest.raises(UsageError, match=r"sites\.b: .*never takes a removed one again"):
        register_sites(pretended)


def test_a_site_with_another_key_is_let_in_with_that_one_only(pretended, tmp_path):
    register_sites(pretended)
    add_site(pretended, "a", make_site_key(tmp_path / "home"))
    assert register_sites(pretended) == commands.Registered(added=("a",), removed=("100",))
    assert register_sites(pretended) == commands.Registered(kept=("a",))


def test_a_superlink_with_a_new_database_gets_all_keys_again(pretended):
    register_sites(pretended)
    (pretended / "flower" / "book.json").unlink()
    assert register_sites(pretended).added == ("a",)


def test_a_site_without_a_key_is_named(pretended):
    path = pretended / "federation.toml"
    lines = path.read_text().splitlines()
    path.write_text("\n".join('a = ""' if line.startswith("a = ") else line for line in lines))
    with pytest.raises(UsageError, match=r"sites\.a: no public key"):
        register_sites(pretended)


def test_flowers_own_words_are_in_the_message(federation, tmp_path, monkeypatch):
    command = tmp_path / "flwr"
    command.write_text(f"#!{sys.executable}\nimport sys; print('\\x1b[31mno SuperLink', file=sys.stderr); sys.exit(1)")
    command.chmod(0o755)
    monkeypatch.setattr(commands, "program", lambda name: str(command))
    with pytest.raises(commands.FlowerCommandError, match=r"flwr supernode list failed: \\x1b\[31mno SuperLink"):
        register_sites(federation)


BOXED = """
import json, sys
if sys.argv[1] == "list":
    print(json.dumps({"success": True, "runs": []}))
else:
    print("╭─ Error ───╮\\n│ no such   │\\n│ module    │\\n╰───────────╯", file=sys.stderr)
    sys.exit(1)
"""


def test_a_run_that_cannot_be_started_says_why(federation, tmp_path, monkeypatch):
    command = tmp_path / "flwr"
    command.write_text(f"#!{sys.executable}\n{BOXED}", encoding="utf-8")
    command.chmod(0o755)
    monkeypatch.setattr(commands, "program", lambda name: str(command))
    lines = []
    with pytest.raises(commands.FlowerCommandError, match="flwr run failed: Error no such module"):
        commands.submit(federation, tell=lines.append)
    assert len(lines) == 4


def test_only_a_completed_run_has_status_0():
    statuses = ["finished:completed", "finished:failed", "finished:stopped", "running", "pending"]
    assert [RunEnd("1", status).exit_status for status in statuses] == [0, 1, 1, 1, 1]


def test_a_site_makes_its_own_key(tmp_path):
    pytest.importorskip("cryptography")
    line = make_site_key(tmp_path / "site")
    assert (tmp_path / "site" / "node.pub").read_text() == line + "\n"


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no handles of processes")
@pytest.mark.parametrize("how", ["missing", "refused"])
def test_stop_works_where_processes_have_no_handles(kept, tmp_path, monkeypatch, how):
    pid = start(kept, "one", SLEEPER, tmp_path)

    def refuse(_):
        raise OSError(errno.ENOSYS, "not implemented")

    if how == "missing":
        monkeypatch.delattr(os, "pidfd_open")
    else:
        monkeypatch.setattr(os, "pidfd_open", refuse)
    kept.stop()
    assert not lives(pid)


def test_what_cannot_be_started_again_for_the_moment_is_tried_later(kept, tmp_path):
    commands = [python("raise SystemExit(3)")]

    def command():
        if not commands:
            raise UsageError("node.key is gone")
        return commands.pop()

    kept.start("one", command, env=dict(os.environ), log=tmp_path / "one.log")
    said = []
    until(lambda: said.extend(kept.check()) or any("cannot be started" in line for line in said))
    assert said[-1] == "one cannot be started: node.key is gone; again in 15 s"
    assert kept.check() == []
