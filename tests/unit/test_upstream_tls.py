"""TLS with upstreams: trust and client certificates, in handshakes without a network."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from OpenSSL import SSL, crypto

from ociregistry.config.tls import SYSTEM_TRUST, UpstreamTls
from ociregistry.openssl import Certificates, KeyPair
from ociregistry.upstream.failures import CertificateRefused
from ociregistry.upstream.tls import ContextCache, UpstreamPolicy
from tests.certificates import Authority
from tests.processes import without_free_descriptors

HOST = "reg.example"
Files = tuple[Path, Path]
"""A certificate, followed by its issuers, and its key."""


def certificates(path: Path) -> Certificates:
    """Return the certificates in a file."""
    end = b"-----END CERTIFICATE-----\n"
    return Certificates(path, tuple(part + end for part in path.read_bytes().split(end)[:-1]))


def trusting(path: Path) -> UpstreamTls:
    """Return settings that trust only the certificates in a file."""
    return UpstreamTls(certificates(path))


def key_pair(files: Files) -> KeyPair:
    """Return our certificate and key."""
    certificate, key = files
    return KeyPair(certificates(certificate), key.read_bytes())


def subject(certificate: crypto.X509) -> str:
    """Return the subject of a certificate."""
    (name,) = certificate.to_cryptography().subject
    return str(name.value)


@dataclass
class TlsServer:
    """A server with a certificate that records what clients send."""

    files: Files
    names: list[bytes | None] = field(default_factory=list)
    clients: list[list[str]] = field(default_factory=list)
    """Subjects of the certificates that each client sent, its own first."""

    def connection(self) -> SSL.Connection:
        """Return a new connection in memory that requests any client certificate."""
        context = SSL.Context(SSL.TLS_SERVER_METHOD)
        # The server offers all protocols; the client decides.
        context.set_cipher_list(b"DEFAULT:@SECLEVEL=0")
        context.use_certificate_chain_file(str(self.files[0]))
        context.use_privatekey_file(str(self.files[1]))
        context.set_verify(SSL.VERIFY_PEER, lambda *_: True)
        context.set_tlsext_servername_callback(lambda connection: self.names.append(connection.get_servername()))
        connection = SSL.Connection(context, None)
        connection.set_accept_state()
        return connection

    def learn(self, connection: SSL.Connection) -> None:
        """Record server name and client certificates of a connection."""
        peer = connection.get_peer_certificate()
        # OpenSSL versions differ in whether the chain includes the client's own certificate.
        chain = [peer, *(connection.get_peer_cert_chain() or ())] if peer else []
        self.clients.append(list(dict.fromkeys(map(subject, chain))))


def pump(source: SSL.Connection, sink: SSL.Connection) -> None:
    """Transfer pending data from one side to the other."""
    while True:
        try:
            sink.bio_write(source.bio_read(2**16))
        except SSL.WantReadError:
            return


def shake_hands(policy: UpstreamPolicy, server: TlsServer, host: str = HOST, port: int = 443) -> None:
    """Perform a handshake; raise the client's error."""
    creator: Any = policy.creatorForNetloc(host.encode(), port)
    client = creator.clientConnectionForTLS(None)
    client.set_connect_state()
    peer = server.connection()
    waiting = {client, peer}
    for _ in range(10):
        for one, other in ((client, peer), (peer, client)):
            try:
                one.do_handshake()
                waiting.discard(one)
            except SSL.WantReadError:
                pass
            finally:
                pump(one, other)
    assert not waiting, "the handshake does not end"
    server.learn(peer)


def policy(settings: UpstreamTls = SYSTEM_TRUST, own: tuple[str, int] = (HOST, 443)) -> UpstreamPolicy:
    """Return the policy of an upstream."""
    return UpstreamPolicy(settings, own, ContextCache())


@pytest.fixture
def good(authority: Authority) -> TlsServer:
    """Return a server for reg.example with a certificate of `authority`."""
    return TlsServer(authority.issue(HOST))


@pytest.fixture
def system_trust(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Replace the system's trust store by an empty file."""
    store = tmp_path / "system.pem"
    store.touch()
    monkeypatch.setenv("SSL_CERT_FILE", str(store))
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path / "none"))
    return store


def test_system_trust(good: TlsServer, authority: Authority, system_trust: Path) -> None:
    with pytest.raises(CertificateRefused):
        shake_hands(policy(), good)
    system_trust.write_bytes(authority.ca.read_bytes())
    shake_hands(policy(), good)
    assert good.names == [b"reg.example"] * 2


def test_system_trust_is_not_taken_for_empty_without_a_descriptor(
    good: TlsServer, authority: Authority, system_trust: Path
) -> None:
    system_trust.write_bytes(authority.ca.read_bytes())
    upstream = policy()
    with without_free_descriptors(os.getpid()), pytest.raises(OSError, match="Too many open files"):
        upstream.creatorForNetloc(b"reg.example", 443)
    shake_hands(upstream, good)


def test_configured_authority_replaces_system_trust(
    good: TlsServer, authority: Authority, system_trust: Path, tmp_path: Path
) -> None:
    shake_hands(policy(trusting(authority.ca)), good)
    other = Authority(tmp_path / "other", "other authority")
    system_trust.write_bytes(authority.ca.read_bytes())
    with pytest.raises(CertificateRefused):
        shake_hands(policy(trusting(other.ca)), good)


def test_configured_authority_adds_to_trust_store_for_other_hosts(
    good: TlsServer, authority: Authority, system_trust: Path, tmp_path: Path
) -> None:
    """A registry with a private authority may redirect to public storage, whose certificate the system trusts.

    Docker, too, once trusted the authority of a registry alone on all of its hops (moby/moby#22409), and users had to
    add that of the storage to it (distribution/distribution#1397); skopeo adds it to the system's.
    """
    private = Authority(tmp_path / "private", "private authority")
    system_trust.write_bytes(authority.ca.read_bytes())
    settings = trusting(private.ca)
    shake_hands(policy(settings), TlsServer(authority.issue("storage.example")), "storage.example")
    shake_hands(policy(settings), TlsServer(private.issue("token.example")), "token.example", 5001)
    # The registry itself is trusted by its own authority alone, on every port.
    for port in (443, 5001):
        with pytest.raises(CertificateRefused):
            shake_hands(policy(settings), good, HOST, port)
    unknown = TlsServer(Authority(tmp_path / "unknown", "unknown authority").issue("storage.example"))
    with pytest.raises(CertificateRefused):
        shake_hands(policy(settings), unknown, "storage.example")
    with pytest.raises(CertificateRefused, match="it is for another host name"):
        shake_hands(policy(settings), good, "storage.example")


def test_intermediate_authority_for_other_hosts(system_trust: Path, tmp_path: Path) -> None:
    root = Authority(tmp_path / "root", "private root")
    below = Authority(tmp_path / "below", "intermediate authority", root)
    shake_hands(policy(trusting(below.ca)), TlsServer(below.issue("storage.example")), "storage.example")


def test_several_authorities(good: TlsServer, authority: Authority, tmp_path: Path) -> None:
    other = Authority(tmp_path / "other", "other authority")
    both = tmp_path / "both.crt"
    both.write_bytes(other.ca.read_bytes() + authority.ca.read_bytes())
    shake_hands(policy(trusting(both)), good)
    shake_hands(policy(trusting(both)), TlsServer(other.issue(HOST)))


def test_intermediate_authority_as_trust_anchor(authority: Authority, tmp_path: Path) -> None:
    below = Authority(tmp_path / "below", "intermediate authority", authority)
    server = TlsServer(below.issue(HOST))
    shake_hands(policy(trusting(below.ca)), server)
    shake_hands(policy(trusting(authority.ca)), server)


def test_server_certificate_as_trust_anchor(good: TlsServer, tmp_path: Path) -> None:
    shake_hands(policy(trusting(good.files[0])), good)
    alone = TlsServer(Authority.self_signed(tmp_path / "alone", HOST))
    shake_hands(policy(trusting(alone.files[0])), alone)
    with pytest.raises(CertificateRefused):
        shake_hands(policy(trusting(alone.files[0])), good)


def test_server_certificate_is_not_trusted_for_another_host(
    good: TlsServer, authority: Authority, tmp_path: Path
) -> None:
    """The name is checked regardless of the trust anchor."""
    below = Authority(tmp_path / "below", "intermediate authority", authority)
    alone = TlsServer(Authority.self_signed(tmp_path / "alone", HOST))
    intermediate = TlsServer(below.issue(HOST))
    for server, trust in ((good, good.files[0]), (alone, alone.files[0]), (intermediate, below.ca)):
        with pytest.raises(CertificateRefused, match="it is for another host name"):
            shake_hands(policy(trusting(trust)), server, "cdn.example")


@pytest.mark.parametrize("name", [HOST, "elsewhere.example", "127.0.0.1"])
def test_unverified_server_may_have_any_name(tmp_path: Path, name: str) -> None:
    server = TlsServer(Authority.self_signed(tmp_path, name))
    shake_hands(policy(UpstreamTls(verify=False)), server)
    # SNI is still sent for servers with several hosts.
    assert server.names == [b"reg.example"]


@pytest.mark.parametrize("settings", [UpstreamTls(verify=False), None])
@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "fd00::1"])
def test_address_is_not_sent_as_server_name(authority: Authority, settings: UpstreamTls | None, host: str) -> None:
    """RFC 6066, section 3; servers refuse it."""
    server = TlsServer(authority.issue(host))
    shake_hands(policy(settings or trusting(authority.ca)), server, host)
    assert server.names == [None]


@pytest.fixture
def client(tmp_path: Path) -> KeyPair:
    """Return our certificate with its intermediate authority."""
    root = Authority(tmp_path / "root", "our root")
    return key_pair(Authority(tmp_path / "below", "our authority", root).issue("our daemon"))


def test_client_certificate_is_sent_with_intermediates(
    good: TlsServer, authority: Authority, client: KeyPair
) -> None:
    shake_hands(policy(UpstreamTls(certificates(authority.ca), client)), good)
    assert good.clients == [["our daemon", "our authority"]]


@pytest.mark.parametrize("verify", [True, False])
def test_client_certificate_is_sent_to_the_upstream_only(authority: Authority, client: KeyPair, verify: bool) -> None:
    server = TlsServer(authority.issue(HOST, "cdn.example", "127.0.0.1"))
    shown = policy(UpstreamTls(certificates(authority.ca), client, verify), (HOST, 5000))
    for host, port in ((HOST, 5000), (HOST, 443), (HOST, 5001), ("cdn.example", 5000), ("127.0.0.1", 5000)):
        shake_hands(shown, server, host, port)
    assert [bool(chain) for chain in server.clients] == [True, False, False, False, False]


def test_no_client_certificate(good: TlsServer, authority: Authority) -> None:
    shake_hands(policy(trusting(authority.ca)), good)
    assert good.clients == [[]]


def test_each_host_is_verified_by_its_own_name(authority: Authority) -> None:
    """Also redirect targets, which use the same policy."""
    server = TlsServer(authority.issue(HOST))
    shared = policy(trusting(authority.ca))
    shake_hands(shared, server)
    for _ in range(2):
        with pytest.raises(CertificateRefused, match="it is for another host name"):
            shake_hands(shared, server, "cdn.example")
    shake_hands(shared, server)


def test_equal_policies_share_a_context(authority: Authority) -> None:
    """The trust store is read once, regardless of how many names clients use."""
    contexts = ContextCache()
    skipping = UpstreamTls(verify=False)
    made: list[Any] = [
        UpstreamPolicy(settings, (f"r{number}.example", 443), contexts).creatorForNetloc(
            b"host%d.example" % number, 443
        )
        for settings in (SYSTEM_TRUST, skipping, trusting(authority.ca))
        for number in range(100)
    ]
    assert len({id(creator._context) for creator in made}) == 3
    own: Any = UpstreamPolicy(trusting(authority.ca), (HOST, 443), contexts).creatorForNetloc(HOST.encode(), 443)
    assert own._context not in [creator._context for creator in made]
    contexts.clear()
    again: Any = UpstreamPolicy(SYSTEM_TRUST, ("", 0), contexts).creatorForNetloc(b"host0.example", 443)
    assert again._context is not made[0]._context
