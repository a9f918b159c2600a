"""What a site is told about its server: true, with advice, in time, and never a traceback."""

import contextlib
import datetime
import socket
import ssl
import threading
import time
from email.utils import format_datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmerge.deploy.address import free_port
from fedmerge.deploy.identity import make_authority, make_server_certificate
from fedmerge.deploy.reach import check_server

pytest.importorskip("cryptography")

UTC = datetime.timezone.utc
NOW = datetime.datetime.now(UTC)


def certified(folder, hosts=(), days=90, now=NOW):
    folder.mkdir(exist_ok=True)
    make_authority(folder, "f", days=3650, now=now)
    make_server_certificate(folder, "f", hosts, days=days, now=now)
    return folder


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    return certified(tmp_path_factory.mktemp("keys") / "k")


def answer(status=401, date=None, more=b""):
    head = f"HTTP/1.1 {status} X\r\n"
    if date is not None:
        head += f"Date: {format_datetime(date, usegmt=True)}\r\n"
    return head.encode() + b"\r\n" + more


@contextlib.contextmanager
def serving(reply, folder=None):
    """A server on loopback; `reply` gets the path that was asked for and gives the bytes, or pieces of them."""
    context = None
    if folder is not None:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(folder / "server.crt", folder / "server.key")
    ended = threading.Event()

    def talk(connection):
        with contextlib.suppress(OSError, IndexError), connection:
            connection.settimeout(10)
            if context is not None:
                connection = context.wrap_socket(connection, server_side=True)
            with connection:
                told = reply(connection.recv(4096).split()[1].decode("latin-1"))
                for piece in [told] if isinstance(told, bytes) else told:
                    connection.sendall(piece)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.1)
        threads = []

        def accept():
            while not ended.is_set():
                with contextlib.suppress(TimeoutError):
                    thread = threading.Thread(target=talk, args=(listener.accept()[0],))
                    thread.start()
                    threads.append(thread)

        accepting = threading.Thread(target=accept)
        accepting.start()
        try:
            yield f"127.0.0.1:{listener.getsockname()[1]}"
        finally:
            ended.set()
            accepting.join()
            for thread in threads:
                thread.join()


def federation(path, *, ahead=0.0, fleet=401, control=403):
    date = datetime.datetime.now(UTC) - datetime.timedelta(seconds=ahead)
    return answer(fleet if path.startswith("/v1/fleet/") else control, date)


def found(address, folder, **more):
    return {each.name: each for each in check_server(address, folder and folder / "ca.crt", seconds=2, **more)}


def test_a_server_as_it_should_be_passes(keys):
    with serving(federation, keys) as address:
        findings = found(address, keys)
    assert list(findings) == ["reachable", "certificate", "days left", "clock", "fleet API", "control API"]
    assert all(each.ok for each in findings.values()), findings


def test_a_server_without_certificates_is_asked_the_rest():
    with serving(federation) as address:
        findings = found(address, None)
    assert list(findings) == ["reachable", "clock", "fleet API", "control API"]
    assert all(each.ok for each in findings.values()), findings


@pytest.mark.parametrize(
    ("ahead", "ok"), [(0, True), (3, True), (8, False), (-20, True), (-40, False), (86400, False), (-86400, False)]
)
def test_a_clock_may_lag_30_seconds_and_lead_4(ahead, ok):
    with serving(lambda path: federation(path, ahead=ahead)) as address:
        clock = found(address, None)["clock"]
    assert clock.ok is ok, clock
    assert ("ahead of" in clock.detail) == (ahead > 1)
    assert ("set both by NTP" in clock.detail) != ok


@pytest.mark.parametrize("reply", [answer(401), b"HTTP/1.1 401 X\r\nDate: yesterday\r\n\r\n"])
def test_a_server_without_a_time_is_not_ours(reply):
    with serving(lambda path: reply) as address:
        assert "does not say what time" in found(address, None)["clock"].detail


@pytest.mark.parametrize(
    ("status", "part"),
    [
        (403, "the proxy does not pass /v1/fleet/"),
        (404, "something else listens"),
        (502, "start the SuperLink behind it"),
    ],
)
def test_an_interface_for_sites_that_is_not_there_is_told(status, part):
    with serving(lambda path: federation(path, fleet=status)) as address:
        fleet = found(address, None)["fleet API"]
    assert not fleet.ok
    assert part in fleet.detail


def test_an_open_control_interface_is_a_fault_unless_only_this_machine_reaches_it(monkeypatch):
    with serving(lambda path: federation(path, control=200)) as address:
        assert found(address, None)["control API"].ok
        monkeypatch.setattr("fedmerge.deploy.reach.is_loopback", lambda host: False)
        control = found(address, None)["control API"]
    assert not control.ok
    assert "can start runs and let sites in; put the proxy" in control.detail


def test_a_port_that_nobody_serves_and_a_host_that_is_none():
    refused = found(f"127.0.0.1:{free_port()}", None)
    assert list(refused) == ["reachable"]
    assert "is the server (or the proxy before it) started?" in refused["reachable"].detail
    unknown = found("no-such-host.invalid:9092", None)["reachable"]
    assert not unknown.ok
    assert "check the name" in unknown.detail


def test_a_host_that_swallows_connections_is_told_in_time():
    with socket.create_server(("127.0.0.1", 0), backlog=1) as full:
        port = full.getsockname()[1]
        with contextlib.ExitStack() as stack:
            for _ in range(8):  # until nobody is let in any more
                waiting = stack.enter_context(socket.socket())
                waiting.setblocking(False)
                waiting.connect_ex(("127.0.0.1", port))
            began = time.monotonic()
            (finding,) = check_server(f"127.0.0.1:{port}", None, seconds=0.5)
            assert time.monotonic() - began < 3
    assert not finding.ok
    assert "a firewall on the way may drop" in finding.detail


def test_a_server_of_another_authority_is_refused(keys, tmp_path):
    with serving(federation, certified(tmp_path / "other")) as address:
        findings = found(address, keys)
    assert list(findings) == ["reachable", "certificate"]
    assert "not of this federation's authority" in findings["certificate"].detail


@pytest.mark.parametrize(
    ("age", "part"), [(100, "make a new one on the server"), (-100, "is this machine's clock right?")]
)
def test_a_certificate_out_of_its_time_is_told(tmp_path, age, part):
    folder = certified(tmp_path / "k")
    make_server_certificate(folder, "f", [], days=90, now=NOW - datetime.timedelta(days=age))
    with serving(federation, folder) as address:
        assert part in found(address, folder)["certificate"].detail


def test_a_certificate_for_another_host_is_told(keys):
    with serving(federation, keys) as address:
        finding = found(address.replace("127.0.0.1", "127.0.0.2"), keys)["reachable"]
        assert not finding.ok  # the server is bound to the other one
    with serving(federation, keys) as address, socket.create_server(("127.0.0.2", 0)) as listener:
        port = listener.getsockname()[1]
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(keys / "server.crt", keys / "server.key")

        def talk():
            for _ in range(2):
                connection = listener.accept()[0]
                with contextlib.suppress(OSError), connection:
                    context.wrap_socket(connection, server_side=True).close()

        thread = threading.Thread(target=talk)
        thread.start()
        finding = found(f"127.0.0.2:{port}", keys)["certificate"]
        thread.join()
    assert "the server's certificate must name 127.0.0.2" in finding.detail


def test_a_certificate_that_ends_soon_is_a_fault_that_does_not_stop_the_rest(tmp_path):
    folder = certified(tmp_path / "k", days=5)
    with serving(federation, folder) as address:
        findings = found(address, folder)
    assert [name for name, each in findings.items() if not each.ok] == ["days left"]
    assert "ends in 5 days; on the server `fedmerge deploy renew` makes another" in findings["days left"].detail
    assert len(findings) == 6


def test_a_server_that_drips_is_not_waited_for(keys):
    def drip(path):
        for letter in b"HTTP/1.1 200 OK\r\nX: " + b"y" * 1000:
            time.sleep(0.2)
            yield bytes([letter])

    with serving(drip) as address:
        began = time.monotonic()
        findings = {each.name: each for each in check_server(address, None, seconds=0.7)}
        assert time.monotonic() - began < 4
    assert findings["fleet API"].detail.startswith("no answer within 0.7 s")
    assert not findings["control API"].ok


def test_a_plain_server_is_no_tls_and_a_silent_one_neither(keys):
    with serving(federation) as address:
        assert "no TLS connection" in found(address, keys)["certificate"].detail
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        finding = check_server(address, keys / "ca.crt", seconds=0.3)[-1]
    assert "no TLS answer within 0.3 s" in finding.detail


@settings(max_examples=20, deadline=None)
@given(st.binary(max_size=200))
def test_whatever_a_server_says_there_is_an_answer(content):
    with serving(lambda path: content) as address:
        findings = found(address, None)
    assert list(findings) == ["reachable", "clock", "fleet API", "control API"]
    assert all(each.detail.isprintable() for each in findings.values())


@pytest.mark.parametrize("content", [None, b"", b"no certificate"])
def test_an_authority_that_cannot_be_used_is_told(tmp_path, content):
    path = tmp_path / "ca.crt"
    if content is not None:
        path.write_bytes(content)
    (finding,) = check_server("127.0.0.1:1", path)
    assert not finding.ok
    assert "copy ca.crt from the server again" in finding.detail


def test_an_address_that_is_none_is_told():
    (finding,) = check_server("nonsense", None)
    assert not finding.ok
    assert "expected host:port" in finding.detail
