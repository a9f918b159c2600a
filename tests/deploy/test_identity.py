"""Keys and certificates: what is written is accepted by those who have to accept it, and by nobody else."""

import contextlib
import datetime
import shutil
import socket
import ssl
import stat
import subprocess
import sys
import threading

import pytest

from fedmerge.core.errors import UsageError
from fedmerge.deploy.address import host_and_port, is_host
from fedmerge.deploy.identity import (
    check_server_files,
    describe,
    fingerprint,
    line_of_key_file,
    make_authority,
    make_key_pair,
    make_server_certificate,
    public_key_bytes,
    public_line,
)

pytest.importorskip("cryptography")

EMPTY_CERTIFICATE = b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"
NOW = datetime.datetime.now(datetime.timezone.utc)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("keys")
    make_authority(place, "clinics", days=3650)
    make_server_certificate(place, "clinics", ["fed.example.org", "10.1.2.3", "::1"], days=90)
    return place


def handshake(server_folder, authority, hostname):
    """What a client that trusts `authority` says of the server's certificate."""
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server.load_cert_chain(server_folder / "server.crt", server_folder / "server.key")
    client = ssl.create_default_context(cafile=str(authority))
    client.verify_flags |= ssl.VERIFY_X509_STRICT
    near, far = socket.socketpair()

    def answer():
        with far, contextlib.suppress(OSError):
            server.wrap_socket(far, server_side=True).close()

    thread = threading.Thread(target=answer)
    thread.start()
    try:
        with near, client.wrap_socket(near, server_hostname=hostname) as connection:
            return connection.getpeercert()
    finally:
        thread.join()


@pytest.mark.parametrize("host", ["fed.example.org", "10.1.2.3", "::1", "localhost", "127.0.0.1"])
def test_a_strict_client_accepts_every_host_of_the_certificate(folder, host):
    assert handshake(folder, folder / "ca.crt", host)["subject"] == ((("commonName", "clinics server"),),)


def test_another_host_is_refused(folder):
    with pytest.raises(ssl.SSLCertVerificationError, match=r"not valid for 'evil\.example\.org'"):
        handshake(folder, folder / "ca.crt", "evil.example.org")


def test_another_authority_is_refused(folder, tmp_path):
    make_authority(tmp_path, "clinics", days=10)
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(folder, tmp_path / "ca.crt", "localhost")


def test_a_server_certificate_cannot_sign_another_one(folder, tmp_path):
    for old, new in (("server.crt", "ca.crt"), ("server.key", "ca.key")):
        shutil.copy(folder / old, tmp_path / new)
    make_server_certificate(tmp_path, "x", ["evil.example.org"], days=10)
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(tmp_path, folder / "ca.crt", "evil.example.org")


def test_private_keys_are_their_owners_alone(folder, tmp_path):
    make_key_pair(tmp_path)
    for path in (folder / "ca.key", folder / "server.key", tmp_path / "node.key"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_certificate_is_described(folder):
    facts = describe(folder / "server.crt", now=NOW)
    assert facts.subject == "CN=clinics server"
    assert facts.issuer == "CN=clinics authority"
    assert facts.hosts == ("fed.example.org", "10.1.2.3", "::1", "localhost", "127.0.0.1")
    assert 89.9 < facts.days_left < 90.1
    assert describe(folder / "ca.crt").hosts == ()
    later = NOW + datetime.timedelta(days=100)
    assert -10.1 < describe(folder / "server.crt", now=later).days_left < -9.9


def test_openssl_reads_the_same(folder):
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("needs openssl")
    command = [openssl, "x509", "-in", folder / "server.crt", "-noout", "-fingerprint", "-sha256"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert told.strip().partition("=")[2] == describe(folder / "server.crt").fingerprint
    verified = subprocess.run(
        [openssl, "verify", "-x509_strict", "-CAfile", folder / "ca.crt", folder / "server.crt"], check=False
    )
    assert verified.returncode == 0


def test_a_server_outlives_no_authority(tmp_path):
    make_authority(tmp_path, "short", days=10)
    with pytest.raises(UsageError, match=r"got 11 days.*ends in 10; give fewer days"):
        make_server_certificate(tmp_path, "short", [], days=11)


@pytest.mark.parametrize("days", [0, -1, 36501])
def test_days_have_a_range(tmp_path, days):
    with pytest.raises(UsageError, match="expected 1 to 36500"):
        make_authority(tmp_path, "x", days=days)


@pytest.mark.parametrize("host", ["a b", "ünï.example", "x/y", "", "300.1.1.1", "*"])
def test_a_host_that_cannot_be_one_is_refused(folder, tmp_path, host):
    for name in ("ca.crt", "ca.key"):
        shutil.copy(folder / name, tmp_path / name)
    with pytest.raises(UsageError, match="expected a DNS name"):
        make_server_certificate(tmp_path, "x", [host], days=1)


def test_a_long_name_still_fits(tmp_path):
    make_authority(tmp_path, "n" * 200, days=10)
    assert describe(tmp_path / "ca.crt").subject.endswith("authority")


def test_keys_that_are_there_are_never_replaced(folder, tmp_path):
    make_key_pair(tmp_path)
    with pytest.raises(UsageError, match="the server knows this site by it; move it away"):
        make_key_pair(tmp_path)
    with pytest.raises(UsageError, match="would be worthless"):
        make_authority(folder, "x", days=1)


def test_files_that_belong_together_pass_and_others_do_not(folder, tmp_path):
    check_server_files(folder)
    make_authority(tmp_path, "other", days=100)
    make_server_certificate(tmp_path, "other", [], days=10)
    shutil.copy(folder / "server.crt", tmp_path / "server.crt")
    with pytest.raises(UsageError, match=r"server\.key is not the key of .*server\.crt"):
        check_server_files(tmp_path)
    shutil.copy(folder / "server.key", tmp_path / "server.key")
    with pytest.raises(UsageError, match="was not signed by"):
        check_server_files(tmp_path)


@pytest.mark.parametrize("content", [b"", b"nonsense", b"\x00" * 100, EMPTY_CERTIFICATE])
def test_damaged_files_have_one_clear_message(tmp_path, content):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(UsageError, match="is no certificate"):
        describe(tmp_path / "x")
    with pytest.raises(UsageError, match="is no private key of a site"):
        line_of_key_file(tmp_path / "x")


def test_a_cut_certificate_and_a_missing_and_a_huge_file(folder, tmp_path):
    whole = (folder / "server.crt").read_bytes()
    (tmp_path / "cut").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "huge").write_bytes(b"x" * 100_000)
    with pytest.raises(UsageError, match="is no certificate"):
        describe(tmp_path / "cut")
    with pytest.raises(UsageError, match=r"cannot read .*missing: No such file"):
        describe(tmp_path / "missing")
    with pytest.raises(UsageError, match="100,000 bytes"):
        describe(tmp_path / "huge")


def test_a_key_pair_is_what_ssh_keygen_would_have_made(tmp_path):
    line = make_key_pair(tmp_path)
    assert line.startswith("ecdsa-sha2-nistp384 AAAA")
    assert (tmp_path / "node.pub").read_text() == line + "\n"
    assert line_of_key_file(tmp_path / "node.key") == line
    keygen = shutil.which("ssh-keygen")
    if keygen is None:
        pytest.skip("needs ssh-keygen")
    told = subprocess.run([keygen, "-lf", tmp_path / "node.pub"], capture_output=True, text=True, check=True).stdout
    assert told.split()[1] == fingerprint(line)
    derived = subprocess.run([keygen, "-yf", tmp_path / "node.key"], capture_output=True, text=True, check=True).stdout
    assert public_line(derived) == line


def test_a_comment_does_not_count(tmp_path):
    line = make_key_pair(tmp_path)
    assert public_line(f"  {line} somebody@somewhere \n") == line
    assert public_key_bytes(line + " x") == public_key_bytes(line)


@pytest.mark.parametrize(
    "line",
    [
        "",
        "ecdsa-sha2-nistp384",
        "ecdsa-sha2-nistp384 AAAA",
        "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGf0m0l1m6v0Qx0oY0aP0mC6wq1s8bJmX0eXcXvR8f0Y",
        "x" * 5000,
        "two\nlines",
    ],
)
def test_what_is_no_public_key_is_refused(line):
    with pytest.raises(UsageError, match="expected one line that begins with ecdsa-sha2-nistp384"):
        public_key_bytes(line)


def test_two_lines_are_not_one(tmp_path):
    line = make_key_pair(tmp_path)
    with pytest.raises(UsageError, match="expected one line"):
        public_line(f"{line}\n{line}")


def test_flower_keeps_the_same_bytes(tmp_path):
    register = pytest.importorskip("flwr.cli.supernode.register")
    line = make_key_pair(tmp_path)
    assert public_key_bytes(line) == register.try_load_public_key(tmp_path / "node.pub")


def test_without_cryptography_the_message_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "cryptography", None)
    with pytest.raises(UsageError, match=r'pip install "fedmerge\[flower\]"'):
        make_key_pair(tmp_path)


@pytest.mark.parametrize(
    "address", ["host", "host:", ":1", "host:0", "host:70000", "::1:9092", "[::1]", "a b:1", "[x]:1", "1.2.3:5"]
)
def test_an_address_that_cannot_be_one_is_refused(address):
    with pytest.raises(UsageError, match="expected host:port"):
        host_and_port(address)


def test_a_name_of_253_letters_is_a_host_and_one_more_is_not():
    name = ".".join(["a" * 63, "b" * 63, "c" * 63, "d" * 61])
    assert len(name) == 253
    assert is_host(name)
    assert not is_host(name + "d")
