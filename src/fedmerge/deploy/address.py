"""Addresses as ``host:port``: which host, which port, and whether they can be reached from this machine alone."""

from __future__ import annotations

import ipaddress
import re
import socket

from fedmerge.core.errors import UsageError
from fedmerge.core.text import brief

_DNS_NAME = re.compile(r"(?=.{1,253}$)(?!-)[A-Za-z0-9-]{1,63}(\.(?!-)[A-Za-z0-9-]{1,63})*")
_ADDRESS = re.compile(r"(?:\[(?P<six>[^\]]+)\]|(?P<host>[^:\[\]]+)):(?P<port>[0-9]{1,5})")


def host_and_port(address: str) -> tuple[str, int]:
    """The parts of an address; an IPv6 one has its host in brackets.

    Raises:
        UsageError: if it is not one.

    >>> host_and_port("fed.example.org:9092"), host_and_port("[::1]:9092")
    (('fed.example.org', 9092), ('::1', 9092))
    """
    found = _ADDRESS.fullmatch(address)
    host = (found["six"] or found["host"]) if found else ""
    port = int(found["port"]) if found else 0
    if not 0 < port < 2**16 or not (is_ip(host) if found and found["six"] else is_host(host)):
        raise UsageError(
            f"got the address {brief(address)}; expected host:port, for example fed.example.org:9092 or [::1]:9092; "
            "names that are not ASCII in their xn-- form"
        )
    return host, port


def join(host: str, port: int) -> str:
    """The inverse of `host_and_port`.

    >>> join("::1", 9092)
    '[::1]:9092'
    """
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_ip(host: str) -> bool:
    """Whether a host is given as a number.

    >>> is_ip("10.0.0.1"), is_ip("localhost")
    (True, False)
    """
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def is_host(host: str) -> bool:
    """Whether a text can be a host: an IP address or a DNS name.

    >>> is_host("fed.example.org"), is_host("fed_example"), is_host("a b"), is_host("300.1.1.1")
    (True, False, False, False)
    """
    if is_ip(host):
        return True
    return _DNS_NAME.fullmatch(host) is not None and not host.rpartition(".")[2].isdigit()


def is_loopback(host: str) -> bool:
    """Whether a host means this machine alone.

    >>> [is_loopback(host) for host in ("localhost", "127.0.0.1", "::1", "0.0.0.0", "fed.example.org")]
    [True, True, True, False, False]
    """
    return host.lower() == "localhost" or (is_ip(host) and ipaddress.ip_address(host).is_loopback)


def local_address(listen: str) -> str:
    """How this machine reaches what listens at an address: everywhere includes loopback.

    >>> local_address("0.0.0.0:9092"), local_address("[::]:9092"), local_address("10.0.0.1:9092")
    ('127.0.0.1:9092', '[::1]:9092', '10.0.0.1:9092')
    """
    host, port = host_and_port(listen)
    if is_ip(host) and ipaddress.ip_address(host).is_unspecified:
        host = "::1" if ":" in host else "127.0.0.1"
    return join(host, port)


def free_port() -> int:
    """A TCP port of the loopback address that nobody uses now; somebody may take it before it is used."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
