"""Invalid certificates are refused, with the certificate and the reason in the error."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, ExtensionOID, NameOID
from OpenSSL import crypto

from ociregistry.config.tls import UpstreamTls
from ociregistry.errors import Unavailable
from ociregistry.upstream.failures import CertificateRefused, explain, speaks_no_tls
from ociregistry.upstream.http import NoTls
from ociregistry.upstream.tls import _verify
from tests.certificates import Authority
from tests.unit.support.common import on_reactor
from tests.unit.support.wire import Network
from tests.unit.test_upstream_tls import HOST, Files, TlsServer, policy, shake_hands, trusting
from tests.upstream import ScriptedRegistry

NOW = datetime.now(UTC)
DAY = timedelta(days=1)
SERVERS = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
CLIENTS = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH])


def names(*hosts: str) -> x509.SubjectAlternativeName:
    """Return the subjectAltName of a certificate."""

    def name(host: str) -> x509.GeneralName:
        try:
            return x509.IPAddress(ip_address(host))
        except ValueError:
            return x509.DNSName(host)

    return x509.SubjectAlternativeName([name(host) for host in hosts])


def damaged(content: bytes) -> x509.UnrecognizedExtension:
    """Return a malformed subjectAltName."""
    return x509.UnrecognizedExtension(ExtensionOID.SUBJECT_ALTERNATIVE_NAME, content)


class LaxAuthority:
    """Creates certificates that `authority` would not issue."""

    def __init__(self, authority: Authority, folder: Path) -> None:
        self._authority = authority
        self._folder = folder

    def issue(
        self,
        *extensions: x509.ExtensionType,
        subject: str = HOST,
        begin: datetime = NOW - DAY,
        end: datetime = NOW + DAY,
        bits: int = 0,
    ) -> Files:
        """Return files of a certificate and its RSA key of `bits` bits."""
        key: Any = rsa.generate_private_key(65537, bits) if bits else ec.generate_private_key(ec.SECP256R1())
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)]))
            .issuer_name(self._authority._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(begin)
            .not_valid_after(end)
        )
        for extension in extensions:
            builder = builder.add_extension(extension, critical=False)
        certificate = builder.sign(self._authority._key, hashes.SHA256())
        paths = self._folder / "odd.crt", self._folder / "odd.key"
        paths[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        form, plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        paths[1].write_bytes(key.private_bytes(serialization.Encoding.PEM, form, plain))
        return paths


@pytest.fixture
def lax_authority(authority: Authority, tmp_path: Path) -> LaxAuthority:
    """Return a trusted authority without restrictions."""
    return LaxAuthority(authority, tmp_path)


def refused(files: Files, trust: UpstreamTls, host: str = HOST) -> CertificateRefused:
    """Return the error for a certificate."""
    with pytest.raises(CertificateRefused) as raised:
        shake_hands(policy(trust), TlsServer(files), host)
    assert explain(raised.value) == f"TLS failed: {raised.value.message}"
    assert not speaks_no_tls(raised.value)
    # Without verification it is accepted.
    shake_hands(policy(UpstreamTls(verify=False)), TlsServer(files), host)
    return raised.value


def because(why: str, subject: str = HOST) -> str:
    """Return the expected error text."""
    return f"the certificate of CN={subject} is refused: {why}"


def test_untrusted_issuer(authority: Authority, tmp_path: Path) -> None:
    other = Authority(tmp_path / "other", "other authority")
    why = refused(authority.issue(HOST), trusting(other.ca))
    assert why.message == because("its issuer is not trusted")


def test_issuer_with_a_trusted_name(authority: Authority, tmp_path: Path) -> None:
    impostor = Authority(tmp_path / "impostor")
    assert "is refused: " in refused(impostor.issue(HOST), trusting(authority.ca)).message


def test_self_signed(authority: Authority, tmp_path: Path) -> None:
    files = Authority.self_signed(tmp_path / "alone", HOST)
    assert refused(files, trusting(authority.ca)).message == because("it is self-signed, and not trusted")


def test_untrusted_root(authority: Authority, tmp_path: Path) -> None:
    root = Authority(tmp_path / "root", "their root")
    files = Authority(tmp_path / "below", "their authority", root).issue(HOST)
    why = refused(files, trusting(authority.ca))
    assert why.message == because("its issuer is not trusted", "their authority")
    # Some servers send the root as well.
    files[0].write_bytes(files[0].read_bytes() + root.ca.read_bytes())
    why = refused(files, trusting(authority.ca))
    assert why.message == because("it leads to a self-signed certificate that is not trusted", "their root")


def test_expired(authority: Authority, lax_authority: LaxAuthority) -> None:
    trust = trusting(authority.ca)
    assert refused(authority.issue(HOST, expired=True), trust).message == because("it has expired")
    files = lax_authority.issue(names(HOST), begin=NOW - 2 * DAY, end=NOW - timedelta(minutes=1))
    assert refused(files, trust).message == because("it has expired")


def test_not_yet_valid(authority: Authority, lax_authority: LaxAuthority) -> None:
    files = lax_authority.issue(names(HOST), begin=NOW + timedelta(minutes=10))
    assert refused(files, trusting(authority.ca)).message == because("it is not valid yet")


OTHER_NAME = "it is for another host name"


@pytest.mark.parametrize(
    ("host", "named"),
    [
        (HOST, ["elsewhere.example"]),
        (HOST, ["evil.reg.example", "reg.example.evil.example"]),
        ("a.b.wild.example", ["*.wild.example"]),
        ("wild.example", ["*.wild.example"]),
        (HOST, ["127.0.0.1"]),
        ("127.0.0.1", ["127.0.0.2"]),
        ("127.0.0.1", [HOST]),
        ("::1", ["::2"]),
        ("::1", ["127.0.0.1"]),
    ],
)
def test_other_host(authority: Authority, lax_authority: LaxAuthority, host: str, named: list[str]) -> None:
    files = lax_authority.issue(names(*named), subject=named[0])
    assert refused(files, trusting(authority.ca), host).message == because(OTHER_NAME, named[0])


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", HOST, "some.wild.example"])
def test_matching_host_is_accepted(authority: Authority, lax_authority: LaxAuthority, host: str) -> None:
    files = lax_authority.issue(names("127.0.0.1", "::1", HOST, "*.wild.example"), SERVERS, subject="anything")
    shake_hands(policy(trusting(authority.ca)), TlsServer(files), host)


def test_refused_wildcard_is_reported_as_name_mismatch(authority: Authority, lax_authority: LaxAuthority) -> None:
    """service_identity accepts no wildcard for a top-level domain, which many local networks use."""
    files = lax_authority.issue(names("reg.lan", "*.lan"))
    assert "it names no host" not in refused(files, trusting(authority.ca), "reg.lan").message


@pytest.mark.filterwarnings("ignore:Certificate with CN")
@pytest.mark.parametrize("host", [HOST, "elsewhere.example", "127.0.0.1"])
def test_subject_is_no_host_name(authority: Authority, lax_authority: LaxAuthority, host: str) -> None:
    why = refused(lax_authority.issue(), trusting(authority.ca), host)
    assert why.message == because("none of its names can be used (subjectAltName)")


@pytest.mark.filterwarnings("ignore:Certificate with CN")
@pytest.mark.parametrize(
    "content",
    [
        b"\x30\x00",
        b"\x30\x02\x82\x00",
        b"\x30\x02\x87\x00",
        b"\x30\x05\x87\x03\x7f\x00\x01",
        b"\x30\x0d\x82\x0breg\x00example",
        b"\x30\x04\x82\x02\xff\xfe",
        b"\x30\x04\x82\x02*.",
        b"\x30\x03\x86\x01:",
    ],
)
def test_malformed_names_match_no_host(authority: Authority, lax_authority: LaxAuthority, content: bytes) -> None:
    why = refused(lax_authority.issue(damaged(content), subject="odd"), trusting(authority.ca))
    assert why.message.startswith("the certificate of CN=odd is refused: ")


@pytest.mark.filterwarnings("ignore:Certificate with CN")
@pytest.mark.parametrize("content", [b"", b"\x30", b"\x30\x03\x82\x7fa", b"\xff" * 20, b"\x30\x80", b"\x05\x00"])
def test_undecodable_names_match_no_host(lax_authority: LaxAuthority, content: bytes) -> None:
    """OpenSSL servers cannot send such certificates, so the function is called directly."""
    certificate = crypto.load_certificate(crypto.FILETYPE_PEM, lax_authority.issue(damaged(content))[0].read_bytes())
    connection: Any = None
    for holds, error, why in ((1, 0, ""), (0, 9999, "OpenSSL's error 9999"), (0, 20, "its issuer is not trusted")):
        with pytest.raises(CertificateRefused) as raised:
            _verify(connection, certificate, error, 0, holds)
        assert raised.value.message.startswith("the certificate of ")
        assert raised.value.message.endswith((f" is refused: {why}", "it cannot be read"))


def test_weak_key(authority: Authority, lax_authority: LaxAuthority) -> None:
    files = lax_authority.issue(names(HOST), bits=1024)
    assert refused(files, trusting(authority.ca)).message == because("its key is too weak")


def test_not_for_servers(authority: Authority, lax_authority: LaxAuthority) -> None:
    files = lax_authority.issue(names(HOST), CLIENTS)
    assert refused(files, trusting(authority.ca)).message == because("it is not meant for servers")


@pytest.mark.parametrize(
    "subject", ["wrong version number", "http request", "packet length too long; unknown protocol"]
)
@on_reactor
async def test_subject_text_causes_no_http_fallback(
    network: Network, authority: Authority, lax_authority: LaxAuthority, subject: str
) -> None:
    """A host with a certificate has spoken TLS."""
    files = lax_authority.issue(names("elsewhere.example"), subject=subject)
    assert refused(files, trusting(authority.ca)).message == because(OTHER_NAME, subject.replace(";", "\\;"))
    context = authority.server_context("elsewhere.example")
    context.load_cert_chain(*files)
    with ScriptedRegistry(tls=context) as upstream:
        with pytest.raises(Unavailable, match=subject.partition(";")[0]) as raised:
            await network.http("reg.example", trust=authority.ca).send("GET", upstream.url, {})
        assert not isinstance(raised.value, NoTls)


@pytest.mark.parametrize("subject", ["a\nforged line", "\x1b[31mred", "ü" * 30])
def test_subject_is_printed_on_one_line(authority: Authority, lax_authority: LaxAuthority, subject: str) -> None:
    why = refused(lax_authority.issue(names("elsewhere.example"), subject=subject), trusting(authority.ca))
    assert len(why.message) < 500
