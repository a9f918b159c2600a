"""Who is who: a federation's own authority, its server's certificate, and a key pair for every site.

The server proves itself by a certificate of the federation's authority (``ca.crt``, which every site has), a site by
its private key, whose public half the server knows. Private keys are written so that only their owner can read them.
"""

from __future__ import annotations

import base64
import hashlib
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import TYPE_CHECKING

from fedmerge.core.errors import UsageError
from fedmerge.core.files import write_atomically
from fedmerge.core.strict_json import read_bounded
from fedmerge.core.text import brief, shortened
from fedmerge.deploy.address import is_host, is_ip

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey

CA, CA_KEY = "ca.crt", "ca.key"
SERVER, SERVER_KEY = "server.crt", "server.key"
NODE_KEY, NODE_LINE = "node.key", "node.pub"
KEY_KIND = "ecdsa-sha2-nistp384"
"""How a site's public key begins."""
ALWAYS = ("localhost", "127.0.0.1")
"""Hosts of every server certificate: the server talks to itself."""

_MOST_BYTES = 2**16
_SLACK = timedelta(hours=1)
"""A certificate is valid this long before it was made: clocks differ."""
_MOST_COMMON_NAME = 64
"""Characters; X.509's own bound."""


@dataclass(frozen=True)
class CertificateFacts:
    """What a certificate says.

    Attributes:
        subject: Whom it is for.
        issuer: Who signed it.
        hosts: DNS names and IP addresses it is valid for.
        until: When it ends, UTC.
        days_left: Until then; negative afterwards.
        fingerprint: SHA-256 of the whole, ``AA:BB:...``.
    """

    subject: str
    issuer: str
    hosts: tuple[str, ...]
    until: datetime
    days_left: float
    fingerprint: str


def make_authority(folder: Path, name: str, *, days: int, now: datetime | None = None) -> None:
    """Writes a new authority, ``ca.crt`` and ``ca.key``.

    Args:
        folder: Must be there.
        name: The federation's.
        days: How long it is valid.
        now: UTC.

    Raises:
        UsageError: if there is one already: all that it signed would be worthless.
    """
    _need_cryptography()
    _refuse_existing(folder / CA_KEY, "every certificate it signed would be worthless")
    from cryptography import x509  # noqa: PLC0415 - optional extra

    key, subject = _new_key(), _name(f"{name} authority")
    builder = _builder(subject, subject, key, days, now or _now())
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_usage("key_cert_sign", "crl_sign"), critical=True)
    write_atomically(folder / CA_KEY, _pem_of(key), private=True)
    write_atomically(folder / CA, _signed(builder, key, key))


def make_server_certificate(
    folder: Path, name: str, hosts: Sequence[str], *, days: int, now: datetime | None = None
) -> None:
    """Writes ``server.crt`` and ``server.key``, signed by the authority of the folder; replaces an older pair.

    Args:
        folder: Has an authority.
        name: The federation's.
        hosts: DNS names and IP addresses by which sites call the server; localhost and 127.0.0.1 are always added.
        days: How long it is valid; not longer than its authority.
        now: UTC.

    Raises:
        UsageError: if a host cannot be one, or the authority cannot sign.
    """
    _need_cryptography()
    from cryptography import x509  # noqa: PLC0415 - optional extra
    from cryptography.x509.oid import ExtendedKeyUsageOID  # noqa: PLC0415

    now = now or _now()
    authority, signer = _certificate(folder / CA), _pem_key(folder / CA_KEY)
    _refuse_foreign(authority, signer, folder / CA, folder / CA_KEY)
    left = (authority.not_valid_after_utc - now) / timedelta(days=1)
    if not days <= left:
        raise UsageError(
            f"got {days} days for the server's certificate; {folder / CA} ends in {left:.0f}; give fewer days"
        )
    key = _new_key()
    builder = _builder(_name(f"{name} server"), authority.subject, key, days, now)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_usage("digital_signature"), critical=True)
    builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    names = [_general_name(host) for host in dict.fromkeys([*hosts, *ALWAYS])]
    builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    write_atomically(folder / SERVER_KEY, _pem_of(key), private=True)
    write_atomically(folder / SERVER, _signed(builder, key, signer))


def make_key_pair(folder: Path) -> str:
    """Writes a site's key pair, ``node.key`` (OpenSSH, as Flower reads it) and ``node.pub``; gives the public line.

    Raises:
        UsageError: if there is one already: the server knows the site by it.
    """
    _need_cryptography()
    _refuse_existing(folder / NODE_KEY, "the server knows this site by it")
    from cryptography.hazmat.primitives import serialization as forms  # noqa: PLC0415 - optional extra

    key = _new_key()
    private = key.private_bytes(forms.Encoding.PEM, forms.PrivateFormat.OpenSSH, forms.NoEncryption())
    line = _line_of(key.public_key())
    write_atomically(folder / NODE_KEY, private, private=True)
    write_atomically(folder / NODE_LINE, line + "\n")
    return line


def public_line(text: str) -> str:
    """A public key's line without its comment: the form in which lines are compared.

    Raises:
        UsageError: if it is not a public key of this kind.
    """
    return _line_of(_public_key(text))


def public_key_bytes(line: str) -> bytes:
    """What Flower's SuperLink keeps of a node (``NodeInfo.public_key``): SubjectPublicKeyInfo as PEM, with line ends.

    Raises:
        UsageError: if the line is not a public key of this kind.
    """
    key = _public_key(line)
    from cryptography.hazmat.primitives import serialization as forms  # noqa: PLC0415 - optional extra

    return key.public_bytes(forms.Encoding.PEM, forms.PublicFormat.SubjectPublicKeyInfo)


def fingerprint(line: str) -> str:
    """What people compare by eye or telephone: as ``ssh-keygen -l`` writes it, ``SHA256:...``.

    Raises:
        UsageError: if the line is not a public key of this kind.
    """
    blob = base64.b64decode(public_line(line).split()[1])
    return "SHA256:" + base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip("=")


def line_of_key_file(path: Path) -> str:
    """The public line of a private key file.

    Raises:
        UsageError: if it cannot be read or is not such a key.
    """
    _need_cryptography()
    from cryptography.exceptions import UnsupportedAlgorithm  # noqa: PLC0415 - optional extra
    from cryptography.hazmat.primitives import serialization as forms  # noqa: PLC0415

    try:
        key = forms.load_ssh_private_key(_read(path), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:  # TypeError: it has a password
        raise UsageError(
            f"{path} is no private key of a site ({shortened(str(error), 100)}); expected OpenSSH's form without a "
            "password; make one with `fedmerge deploy key`"
        ) from error
    return public_line(key.public_key().public_bytes(forms.Encoding.OpenSSH, forms.PublicFormat.OpenSSH).decode())


def describe(path: Path, *, now: datetime | None = None) -> CertificateFacts:
    """What a certificate file says.

    Raises:
        UsageError: if it cannot be read or is not a certificate.
    """
    _need_cryptography()
    from cryptography import x509  # noqa: PLC0415 - optional extra
    from cryptography.hazmat.primitives.hashes import SHA256  # noqa: PLC0415

    certificate, names = _certificate(path), list[str]()
    try:
        general = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        names = [str(name.value) for name in general]
    except x509.ExtensionNotFound:
        pass
    except ValueError as error:
        raise UsageError(f"{path} is a damaged certificate: {shortened(str(error), 100)}") from error
    return CertificateFacts(
        certificate.subject.rfc4514_string(),
        certificate.issuer.rfc4514_string(),
        tuple(names),
        certificate.not_valid_after_utc,
        (certificate.not_valid_after_utc - (now or _now())) / timedelta(days=1),
        certificate.fingerprint(SHA256()).hex(":").upper(),
    )


def check_server_files(folder: Path) -> None:
    """Whether ``ca.crt``, ``server.crt`` and ``server.key`` belong together.

    Raises:
        UsageError: naming the file that does not.
    """
    _need_cryptography()
    from cryptography.exceptions import InvalidSignature  # noqa: PLC0415 - optional extra

    authority, server = _certificate(folder / CA), _certificate(folder / SERVER)
    _refuse_foreign(server, _pem_key(folder / SERVER_KEY), folder / SERVER, folder / SERVER_KEY)
    try:
        server.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature) as error:
        raise UsageError(
            f"{folder / SERVER} was not signed by {folder / CA}: sites that have this ca.crt refuse it"
        ) from error


def _need_cryptography() -> None:
    try:
        import cryptography  # noqa: F401, PLC0415 - optional extra
    except ImportError as error:
        raise UsageError(
            'keys and certificates need the package cryptography: pip install "fedmerge[flower]"'
        ) from error


def _now() -> datetime:
    return datetime.now(timezone.utc)


def _refuse_existing(path: Path, because: str) -> None:
    if path.exists():
        raise UsageError(f"{path} is there already: {because}; move it away first to make another")


def _read(path: Path) -> bytes:
    try:
        return read_bounded(path, _MOST_BYTES)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"{path} is no key and no certificate: {error}") from error


def _new_key() -> EllipticCurvePrivateKey:
    from cryptography.hazmat.primitives.asymmetric import ec  # noqa: PLC0415 - optional extra

    return ec.generate_private_key(ec.SECP384R1())


def _pem_of(key: EllipticCurvePrivateKey) -> bytes:
    from cryptography.hazmat.primitives import serialization as forms  # noqa: PLC0415 - optional extra

    return key.private_bytes(forms.Encoding.PEM, forms.PrivateFormat.PKCS8, forms.NoEncryption())


def _line_of(key: EllipticCurvePublicKey) -> str:
    from cryptography.hazmat.primitives import serialization as forms  # noqa: PLC0415 - optional extra

    return key.public_bytes(forms.Encoding.OpenSSH, forms.PublicFormat.OpenSSH).decode("ascii")


def _public_key(line: str) -> EllipticCurvePublicKey:
    _need_cryptography()
    from cryptography.exceptions import UnsupportedAlgorithm  # noqa: PLC0415 - optional extra
    from cryptography.hazmat.primitives import serialization as forms  # noqa: PLC0415
    from cryptography.hazmat.primitives.asymmetric import ec  # noqa: PLC0415

    text = line.strip()
    try:
        key = forms.load_ssh_public_key(text.encode()) if len(text.splitlines()) == 1 else None
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise UsageError(
            f"got the public key {brief(line, 60)}; expected one line that begins with {KEY_KIND}, "
            "as in the file node.pub that `fedmerge deploy key` writes"
        )
    return key


def _pem_key(path: Path) -> EllipticCurvePrivateKey:
    from cryptography.exceptions import UnsupportedAlgorithm  # noqa: PLC0415 - optional extra
    from cryptography.hazmat.primitives import serialization as forms  # noqa: PLC0415
    from cryptography.hazmat.primitives.asymmetric import ec  # noqa: PLC0415

    try:
        key = forms.load_pem_private_key(_read(path), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:  # TypeError: it has a password
        raise UsageError(f"{path} is no private key (PEM, without a password): {shortened(str(error), 100)}") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise UsageError(f"{path} is a private key of another kind; expected an elliptic curve")
    return key


def _certificate(path: Path) -> x509.Certificate:
    from cryptography import x509  # noqa: PLC0415 - optional extra

    try:
        return x509.load_pem_x509_certificate(_read(path))
    except ValueError as error:
        raise UsageError(f"{path} is no certificate (PEM) or a damaged one: {shortened(str(error), 100)}") from error


def _refuse_foreign(certificate: x509.Certificate, key: EllipticCurvePrivateKey, path: Path, key_path: Path) -> None:
    if certificate.public_key() != key.public_key():
        raise UsageError(f"{key_path} is not the key of {path}: one of the two comes from elsewhere")


def _name(text: str) -> x509.Name:
    from cryptography import x509  # noqa: PLC0415 - optional extra

    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text[-_MOST_COMMON_NAME:])])


def _general_name(host: str) -> x509.GeneralName:
    from cryptography import x509  # noqa: PLC0415 - optional extra

    if not is_host(host):
        raise UsageError(
            f"got the host {brief(host)}; expected a DNS name (its xn-- form if not ASCII) or an IP address"
        )
    return x509.IPAddress(ipaddress.ip_address(host)) if is_ip(host) else x509.DNSName(host)


def _usage(*allowed: str) -> x509.KeyUsage:
    from cryptography import x509  # noqa: PLC0415 - optional extra

    known = (
        "digital_signature",
        "content_commitment",
        "key_encipherment",
        "data_encipherment",
        "key_agreement",
        "key_cert_sign",
        "crl_sign",
        "encipher_only",
        "decipher_only",
    )
    return x509.KeyUsage(**{name: name in allowed for name in known})


def _builder(
    subject: x509.Name, issuer: x509.Name, key: EllipticCurvePrivateKey, days: int, now: datetime
) -> x509.CertificateBuilder:
    from cryptography import x509  # noqa: PLC0415 - optional extra

    if not 0 < days <= 36500:
        raise UsageError(f"got {days} days of validity; expected 1 to 36500")
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SLACK)
        .not_valid_after(now + timedelta(days=days))
    )


def _signed(builder: x509.CertificateBuilder, key: EllipticCurvePrivateKey, signer: EllipticCurvePrivateKey) -> bytes:
    """As PEM; with the identifiers of both keys, which strict verifiers ask for."""
    from cryptography import x509  # noqa: PLC0415 - optional extra
    from cryptography.hazmat.primitives import hashes, serialization  # noqa: PLC0415

    own = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    signers = x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key())
    builder = builder.add_extension(own, critical=False).add_extension(signers, critical=False)
    return builder.sign(signer, hashes.SHA384()).public_bytes(serialization.Encoding.PEM)
