"""Certificates and keys: who can read them, what they say, and that none is overwritten."""

import ipaddress
import os
import socket
import ssl
import stat
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key

from fedkd_flwr.experiment import ConfigError
from fedkd_flwr.flower.certificates import make_certificates, make_node_key
from tests.flower.test_archive import full_disk

PRIVATE = ("ca.key", "server.key", "superexec.secret")
PUBLIC = ("ca.crt", "server.crt")


@pytest.fixture(autouse=True)
def permissive_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def server_certificate(directory: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate((directory / "server.crt").read_bytes())


def greet(directory: Path, trusted: Path, host: str) -> None:
    """A TLS handshake with a server that has the directory's certificate; raises where a client would."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(directory / "server.crt", directory / "server.key")
    client = ssl.create_default_context(cafile=str(trusted))
    near, far = socket.socketpair()
    answers = threading.Thread(target=lambda: _answer(server, far))
    answers.start()
    try:
        client.wrap_socket(near, server_hostname=host).close()
    finally:
        near.close()
        answers.join()


def _answer(server: ssl.SSLContext, end: socket.socket) -> None:
    try:
        server.wrap_socket(end, server_side=True).close()
    except OSError:
        end.close()


def test_private_files_are_their_owners_alone_whatever_the_umask(tmp_path: Path) -> None:
    directory = tmp_path / "keys"
    make_certificates(directory, ["localhost"], 30)
    make_node_key(directory / "node1")
    assert mode(directory) == 0o700
    assert {mode(directory / name) for name in (*PRIVATE, "node1")} == {0o600}
    assert {mode(directory / name) for name in (*PUBLIC, "node1.pub")} == {0o644}


def test_the_certificate_names_the_hosts_and_ends_when_asked(tmp_path: Path) -> None:
    make_certificates(tmp_path, ["fl.example.org", "10.0.0.7", "::1"], 30)
    certificate = server_certificate(tmp_path)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["fl.example.org"]
    assert names.get_values_for_type(x509.IPAddress) == [
        ipaddress.ip_address("10.0.0.7"),
        ipaddress.ip_address("::1"),
    ]
    left = certificate.not_valid_after_utc - datetime.now(UTC)
    assert timedelta(days=29, hours=23) < left <= timedelta(days=30)


def test_a_client_that_trusts_the_authority_accepts_the_named_hosts_only(tmp_path: Path) -> None:
    make_certificates(tmp_path, ["localhost", "127.0.0.1"], 30)
    greet(tmp_path, tmp_path / "ca.crt", "localhost")
    greet(tmp_path, tmp_path / "ca.crt", "127.0.0.1")
    with pytest.raises(ssl.SSLCertVerificationError):
        greet(tmp_path, tmp_path / "ca.crt", "elsewhere.example.org")


def test_another_authority_is_not_trusted(tmp_path: Path) -> None:
    make_certificates(tmp_path / "a", ["localhost"], 30)
    make_certificates(tmp_path / "b", ["localhost"], 30)
    with pytest.raises(ssl.SSLCertVerificationError):
        greet(tmp_path / "a", tmp_path / "b" / "ca.crt", "localhost")


def test_renewal_keeps_authority_and_secret(tmp_path: Path) -> None:
    make_certificates(tmp_path, ["localhost"], 30)
    kept = {name: (tmp_path / name).read_bytes() for name in ("ca.crt", "ca.key", "superexec.secret")}
    first = server_certificate(tmp_path)
    for name in ("server.crt", "server.key"):
        (tmp_path / name).unlink()
    make_certificates(tmp_path, ["localhost"], 60)
    assert kept == {name: (tmp_path / name).read_bytes() for name in kept}
    assert server_certificate(tmp_path).serial_number != first.serial_number
    greet(tmp_path, tmp_path / "ca.crt", "localhost")


@pytest.mark.parametrize("name", ["server.crt", "server.key", "ca.key"])
def test_nothing_is_overwritten(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(ConfigError, match="there already; move it away first"):
        make_certificates(tmp_path, ["localhost"], 30)
    assert (tmp_path / name).read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["node1", "node1.pub"])
def test_a_node_key_is_not_overwritten(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(ConfigError, match="there already"):
        make_node_key(tmp_path / "node1")
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("path", [".", "/"])
def test_a_node_key_needs_a_name(path: str) -> None:
    with pytest.raises(ConfigError, match="is a folder; give the name of a file for the private key"):
        make_node_key(Path(path))


def test_a_disk_that_is_full_leaves_no_half_of_a_secret(tmp_path: Path) -> None:
    with full_disk(10), pytest.raises(ConfigError, match="can't be written: File too large"):
        make_node_key(tmp_path / "node1")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("host", ["", "a:8000", "-a", "a_b", "999.1.1.1", "a..b", "http://a"])
def test_a_host_that_is_none_is_refused_by_name(tmp_path: Path, host: str) -> None:
    with pytest.raises(ConfigError, match="hosts: must be host names or IP addresses, without a port, got"):
        make_certificates(tmp_path / "keys", [host], 30)
    assert not (tmp_path / "keys").exists()


def test_an_authority_whose_key_is_another_is_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        make_certificates(tmp_path / name, ["localhost"], 30)
        for file in ("server.crt", "server.key"):
            (tmp_path / name / file).unlink()
    (tmp_path / "b" / "ca.key").replace(tmp_path / "a" / "ca.key")
    with pytest.raises(ConfigError, match="is not the key of"):
        make_certificates(tmp_path / "a", ["localhost"], 30)


def test_a_node_key_is_a_pair_on_the_curve_that_flower_takes(tmp_path: Path) -> None:
    public = load_ssh_public_key(make_node_key(tmp_path / "site.1").read_bytes())
    private = load_ssh_private_key((tmp_path / "site.1").read_bytes(), None)
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    assert private.curve.name == "secp384r1"
    assert private.public_key() == public
