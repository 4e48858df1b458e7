"""Certificates of a SuperLink, keys of SuperNodes, and the secret between SuperLink and SuperExec.

Private files can be read by their owner alone, and nothing is ever overwritten.
"""

import ipaddress
import os
import re
import secrets
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedkd_flwr.experiment import ConfigError

CA_CERTIFICATE, CA_KEY = "ca.crt", "ca.key"
SERVER_CERTIFICATE, SERVER_KEY = "server.crt", "server.key"
SECRET = "superexec.secret"
PUBLIC_SUFFIX = ".pub"
CA_DAYS = 3650
_SECRET_BYTES = 32
_CLOCK_SKEW = timedelta(hours=1)
_HOST_NAME = re.compile(r"(?=.{1,253}$)(?!-)[A-Za-z0-9-]{1,63}(?<!-)(\.(?!-)[A-Za-z0-9-]{1,63}(?<!-))*")


def make_certificates(directory: Path, hosts: Sequence[str], days: int) -> None:
    """Make an authority's certificate and a server's, signed by it, and the secret of SuperLink and SuperExec.

    An authority and a secret that are there already are used again, so a new server certificate, made after the old one
    was moved away, is accepted by nodes that know the authority.

    Args:
        directory: where `ca.crt`, `ca.key`, `server.crt`, `server.key` and `superexec.secret` go; made if need be.
        hosts: names and addresses by which nodes will call the server.
        days: for which the server's certificate is valid; the authority's is for ten years.

    Raises:
        ConfigError: if a host is neither, the server has a certificate there already, or a file can't be written.
    """
    names = [_alternative_name(host) for host in hosts]
    if not names:
        raise ConfigError("hosts: must be names or addresses by which nodes call the server, got none")
    for file in (SERVER_CERTIFICATE, SERVER_KEY):
        _refuse_to_overwrite(directory / file)
    _make_directory(directory)
    authority, authority_key = _authority(directory)
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = (
        _builder(_name("fedkd server"), authority.subject, key.public_key(), timedelta(days=days), authority)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()),
            critical=False,
        )
        .sign(authority_key, hashes.SHA256())
    )
    _write_private(directory / SERVER_KEY, _pem(key))
    _write(directory / SERVER_CERTIFICATE, certificate.public_bytes(serialization.Encoding.PEM), 0o644)
    if not (directory / SECRET).exists():
        _write_private(directory / SECRET, secrets.token_hex(_SECRET_BYTES).encode())


def make_node_key(path: Path) -> Path:
    """Make a SuperNode's key pair, P-384 in OpenSSH's form: the private key at `path`, the public one beside it.

    Returns:
        The file of the public key: the same name and `.pub`.

    Raises:
        ConfigError: if either is there already, or can't be written.
    """
    if not path.name:
        raise ConfigError(f"{str(path)!r} is a folder; give the name of a file for the private key")
    public = path.with_name(path.name + PUBLIC_SUFFIX)
    for file in (path, public):
        _refuse_to_overwrite(file)
    _make_directory(path.parent)
    key = ec.generate_private_key(ec.SECP384R1())
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption())
    _write_private(path, key.private_bytes(*form))
    line = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    _write(public, line + b"\n", 0o644)
    return public


def _authority(directory: Path) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    """The authority of a directory, made if it has none."""
    certificate_file, key_file = directory / CA_CERTIFICATE, directory / CA_KEY
    if certificate_file.exists() and key_file.exists():
        return _read_authority(certificate_file, key_file)
    for file in (certificate_file, key_file):
        _refuse_to_overwrite(file)
    key = ec.generate_private_key(ec.SECP256R1())
    name = _name("fedkd authority")
    certificate = (
        _builder(name, name, key.public_key(), timedelta(days=CA_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(key_cert_sign=True, crl_sign=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    _write_private(key_file, _pem(key))
    _write(certificate_file, certificate.public_bytes(serialization.Encoding.PEM), 0o644)
    return certificate, key


def _read_authority(certificate_file: Path, key_file: Path) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    try:
        certificate = x509.load_pem_x509_certificate(certificate_file.read_bytes())
        key = serialization.load_pem_private_key(key_file.read_bytes(), None)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{str(key_file)!r} or its certificate can't be read: {error}") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
        raise ConfigError(f"{str(key_file)!r} is not the key of {str(certificate_file)!r}")
    if certificate.not_valid_after_utc <= datetime.now(UTC):
        raise ConfigError(f"{str(certificate_file)!r} has expired; make a new authority in another directory")
    return certificate, key


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    public_key: ec.EllipticCurvePublicKey,
    validity: timedelta,
    authority: x509.Certificate | None = None,
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    until = now + validity
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCK_SKEW)
        .not_valid_after(min(until, authority.not_valid_after_utc) if authority else until)
    )


def _alternative_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    # What only looks like an address would be a name that no client ever asks for.
    if not _HOST_NAME.fullmatch(host) or host.replace(".", "").isdigit():
        raise ConfigError(f"hosts: must be host names or IP addresses, without a port, got {host!r}")
    return x509.DNSName(host)


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _usage(*, digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _refuse_to_overwrite(file: Path) -> None:
    try:
        there = file.exists()
    except OSError as error:
        raise ConfigError(f"{str(file)!r} can't be looked at: {error.strerror}") from error
    if there:
        raise ConfigError(f"{str(file)!r} is there already; move it away first")


def _make_directory(directory: Path) -> None:
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{str(directory)!r} can't be made: {error.strerror}") from error


def _write_private(file: Path, content: bytes) -> None:
    _write(file, content, 0o600)


def _write(file: Path, content: bytes, mode: int) -> None:
    """Write a file that is new and has its mode from the first moment."""
    try:
        with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as opened:
            try:
                opened.write(content)
                opened.flush()
            except OSError:
                file.unlink()  # half a key would be taken for one
                raise
    except OSError as error:
        raise ConfigError(f"{str(file)!r} can't be written: {error.strerror}") from error
