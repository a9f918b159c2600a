"""What a site can find out about its server over the network before it takes part. Every question has a time limit."""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from pathlib import Path

from fedmerge.core.errors import UsageError
from fedmerge.core.text import shortened
from fedmerge.deploy.address import host_and_port, is_loopback

FEWEST_DAYS = 14.0
"""Of a certificate's life, below which somebody should do something."""
MOST_SECONDS_BEHIND = 30.0
MOST_SECONDS_AHEAD = 4.0
"""Of a site's clock: Flower refuses what was signed more than 5 seconds in the server's future."""

_MOST_HEAD = 2**16
_FLEET = "/v1/fleet/pull-messages"
_CONTROL = "/v1/control/list-nodes"


@dataclass(frozen=True)
class Finding:
    """The answer to one question.

    Attributes:
        name: What was asked.
        ok: Whether all is well.
        detail: What was found, and what to do if it is not well.
    """

    name: str
    ok: bool
    detail: str


@dataclass(frozen=True)
class _Answer:
    status: int
    date: datetime | None
    seconds: float


def check_server(address: str, authority: Path | None, *, seconds: float = 10.0) -> list[Finding]:
    """Asks a federation's server all that can be asked without a key; later questions need the earlier ones.

    Looking up a host's name takes as long as this machine's resolver lets it; all else `seconds` per question.

    Args:
        address: ``host:port`` as in ``site.toml``.
        authority: The federation's ``ca.crt``; None for one without certificates.
        seconds: For each question.
    """
    try:
        host, port = host_and_port(address)
        context = None if authority is None else ssl.create_default_context(cafile=str(authority))
    except UsageError as error:
        return [Finding("address", False, str(error))]
    except (OSError, ValueError) as error:  # no such file; no certificate in it
        return [
            Finding("authority", False, f"cannot use {authority}: {_said(error)}; copy ca.crt from the server again")
        ]
    findings = [_reachable(host, port, seconds)]
    if findings[-1].ok and context is not None:
        findings += _certificate(host, port, context, seconds)
    if not all(finding.ok or finding.name == "days left" for finding in findings):
        return findings
    ask = _asker(host, port, context, seconds)
    fleet, control = ask(_FLEET), ask(_CONTROL)
    return [*findings, _clock(fleet), _open(fleet), _closed(control, host)]


def _reachable(host: str, port: int, seconds: float) -> Finding:
    try:
        with socket.create_connection((host, port), timeout=seconds):
            return Finding("reachable", True, f"{host} accepts connections on port {port}")
    except socket.gaierror as error:
        detail = f"no machine is called {host} here ({_said(error)}); check the name, or this machine's DNS"
    except TimeoutError:
        detail = f"{host}:{port} does not answer within {seconds:g} s; a firewall on the way may drop the connection"
    except ConnectionRefusedError:
        detail = f"{host} refuses connections on port {port}; is the server (or the proxy before it) started?"
    except OSError as error:
        detail = f"{host}:{port} cannot be reached: {_said(error)}"
    return Finding("reachable", False, detail)


def _certificate(host: str, port: int, context: ssl.SSLContext, seconds: float) -> list[Finding]:
    try:
        with (
            socket.create_connection((host, port), timeout=seconds) as plain,
            context.wrap_socket(plain, server_hostname=host) as secure,
        ):
            told = secure.getpeercert() or {}
    except ssl.SSLCertVerificationError as error:
        return [Finding("certificate", False, f"{_said(error)}; {_advice(error.verify_code, host)}")]
    except TimeoutError:
        detail = f"no TLS answer within {seconds:g} s; something else may listen there, or the server is overloaded"
        return [Finding("certificate", False, detail)]
    except OSError as error:
        detail = (
            f"no TLS connection: {_said(error)}; something else listens there, or a federation without certificates"
        )
        return [Finding("certificate", False, detail)]
    good = Finding("certificate", True, f"the server proves to be {host} by this federation's authority")
    days = (ssl.cert_time_to_seconds(str(told["notAfter"])) - time.time()) / 86400
    advice = (
        "" if days >= FEWEST_DAYS else "; on the server `fedmerge deploy renew` makes another (sites need nothing new)"
    )
    return [good, Finding("days left", days >= FEWEST_DAYS, f"the certificate ends in {days:.0f} days{advice}")]


def _advice(code: int, host: str) -> str:
    """What to do about a certificate that OpenSSL refuses (its X509_V_ERR numbers)."""
    if code == 9:
        return "is this machine's clock right?"
    if code == 10:
        return "make a new one on the server (`fedmerge deploy renew`), or correct this machine's clock"
    if code in (62, 64):
        return f"the server's certificate must name {host} (`fedmerge deploy renew --host`), or use a name that it has"
    return "it is not of this federation's authority: another server, a proxy that opens TLS, or an old ca.crt"


def _asker(host: str, port: int, context: ssl.SSLContext | None, seconds: float) -> Callable[[str], _Answer | str]:
    """A question by path: the answer, or what went wrong."""

    def ask(path: str) -> _Answer | str:
        end = time.monotonic() + seconds
        try:
            with socket.create_connection((host, port), timeout=seconds) as plain:
                if context is None:
                    return _exchange(plain, host, path, end)
                with context.wrap_socket(plain, server_hostname=host) as secure:
                    return _exchange(secure, host, path, end)
        except TimeoutError:
            return f"no answer within {seconds:g} s"
        except (OSError, ValueError) as error:
            return _said(error)

    return ask


def _exchange(connection: socket.socket, host: str, path: str, end: float) -> _Answer:
    """Sends an empty request and reads the head of the answer, however slowly it drips, until `end`."""
    began = time.monotonic()
    name = f"[{host}]" if ":" in host else host
    lines = [f"POST {path} HTTP/1.1", f"Host: {name}", "Content-Type: application/protobuf", "Content-Length: 0"]
    connection.sendall("\r\n".join([*lines, "Connection: close", "", ""]).encode("ascii"))
    head = b""
    while b"\r\n\r\n" not in head and len(head) < _MOST_HEAD:
        left = end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        connection.settimeout(left)
        piece = connection.recv(4096)
        if not piece:
            break
        head += piece
    first, *rest = head.partition(b"\r\n\r\n")[0].decode("latin-1").split("\r\n")
    words = first.split()
    if len(words) < 2 or not words[0].startswith("HTTP/") or not (words[1].isascii() and words[1].isdigit()):
        raise ValueError(f"the answer is no HTTP: {shortened(first, 80)!r}")
    return _Answer(int(words[1]), _date_of(rest), time.monotonic() - began)


def _date_of(lines: list[str]) -> datetime | None:
    told = next((line.partition(":")[2].strip() for line in lines if line.lower().startswith("date:")), None)
    try:
        found = None if told is None else parsedate_to_datetime(told)
    except (ValueError, OverflowError):
        return None
    return found.replace(tzinfo=timezone.utc) if found is not None and found.tzinfo is None else found


def _clock(answer: _Answer | str, now: datetime | None = None) -> Finding:
    if isinstance(answer, str):
        return Finding("clock", False, f"the server's time is not known: {answer}")
    if answer.date is None:
        return Finding("clock", False, "the server does not say what time it has; something else listens there")
    # The header has whole seconds, and the answer took a moment: the truth lies in between.
    ahead = ((now or datetime.now(timezone.utc)) - answer.date).total_seconds() - 0.5 - answer.seconds / 2
    ok = -MOST_SECONDS_BEHIND <= ahead <= MOST_SECONDS_AHEAD
    told = f"this machine's clock is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} the server's"
    told = "this machine's clock and the server's agree" if abs(ahead) < 1.5 else told
    advice = "; set both by NTP: signatures from another time are refused" if not ok else ""
    return Finding("clock", ok, told + advice)


def _open(answer: _Answer | str) -> Finding:
    """Whether the interface for sites is there; without a key it answers, but not with what it is asked for."""
    if isinstance(answer, str):
        return Finding("fleet API", False, f"{answer}; is the SuperLink started?")
    if answer.status in (502, 503, 504):
        return Finding("fleet API", False, f"the proxy answers with {answer.status}: start the SuperLink behind it")
    if answer.status in (403, 404):
        detail = f"refused with {answer.status}: something else listens there, or the proxy does not pass /v1/fleet/"
        return Finding("fleet API", False, detail)
    return Finding("fleet API", True, f"the SuperLink answers (status {answer.status} without a key)")


def _closed(answer: _Answer | str, host: str) -> Finding:
    """Whether what only the server's own machine may ask is closed to others."""
    if isinstance(answer, str):
        return Finding("control API", False, f"not known whether it is closed: {answer}")
    if answer.status in (403, 404):
        return Finding("control API", True, f"closed from here (status {answer.status})")
    if is_loopback(host):
        detail = "open, but to this machine alone: whoever has an account on it can run programs at all sites"
        return Finding("control API", True, detail)
    detail = (
        f"open from here (status {answer.status}): whoever has ca.crt can start runs and let sites in; "
        "put the proxy of nginx.conf before the SuperLink and let the SuperLink listen on 127.0.0.1"
    )
    return Finding("control API", False, detail)


def _said(error: BaseException) -> str:
    """What an error says, without OpenSSL's file and line."""
    told = getattr(error, "verify_message", None) or getattr(error, "strerror", None) or str(error)
    return shortened(str(told) or type(error).__name__, 200)
