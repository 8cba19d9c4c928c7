"""TLS for clients: server certificates, and client certificates that are accepted."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from OpenSSL import SSL
from twisted.internet.interfaces import IOpenSSLServerConnectionCreator

from ociregistry.config.tls import ServerTls
from ociregistry.openssl import Certificates, KeyPair
from ociregistry.web.channel import ServerPolicy
from tests.certificates import Authority

NAME = "cache.example"
END = b"-----END CERTIFICATE-----\n"


def certificates(path: Path) -> Certificates:
    """Return the certificates in a file."""
    *pems, rest = path.read_bytes().split(END)
    assert not rest
    return Certificates(path, tuple(pem + END for pem in pems))


def server_tls(issuer: Authority, *clients: Authority) -> ServerTls:
    """Return settings with a new certificate of this issuer, for clients of those authorities or for all."""
    certificate, key = issuer.issue(NAME)
    identity = KeyPair(certificates(certificate), key.read_bytes())
    if not clients:
        return ServerTls(identity)
    return ServerTls(identity, Certificates(Path(), tuple(client.ca.read_bytes() for client in clients)))


def client(trust: Authority, identity: tuple[Path, Path] | None = None) -> ssl.SSLContext:
    """Return a client that trusts one authority, with an optional certificate."""
    context = trust.client_context()
    if identity is not None:
        context.load_cert_chain(*identity)
    return context


class Connection:
    """A connection between client and server in memory."""

    def __init__(self, policy: ServerPolicy, context: ssl.SSLContext) -> None:
        nobody: Any = None
        self.server = policy.serverConnectionForTLS(nobody)
        self.server.set_accept_state()
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.client = context.wrap_bio(self._incoming, self._outgoing, server_hostname=NAME)
        for _ in range(10):
            if all([self._step(self.client.do_handshake), self._step(self.server.do_handshake)]):
                break
        assert self.ask(b"hello") == b"hello"

    def _step(self, handshake: Any) -> bool:
        """Advance one side, transfer its output, and return whether it has finished."""
        try:
            handshake()
        except (ssl.SSLWantReadError, SSL.WantReadError):
            return False
        finally:
            self._carry()
        return True

    def _carry(self) -> None:
        if data := self._outgoing.read():
            self.server.bio_write(data)
        try:
            self._incoming.write(self.server.bio_read(65536))
        except SSL.WantReadError:
            return

    def ask(self, data: bytes) -> bytes:
        """Send text; return what the server echoes."""
        self.client.write(data)
        self._carry()
        self.server.send(self.server.recv(100))
        self._carry()
        return self.client.read(100)

    @property
    def serial_number(self) -> int:
        """Return the serial number of the certificate sent to the client."""
        shown = self.client.getpeercert(binary_form=True)
        assert shown is not None
        return x509.load_der_x509_certificate(shown).serial_number


def serial_number(settings: ServerTls) -> int:
    """Return the serial number of the certificate."""
    return x509.load_pem_x509_certificate(settings.identity.certificates.pems[0]).serial_number


@pytest.fixture
def other_authority(tmp_path: Path) -> Authority:
    """Return another authority."""
    return Authority(tmp_path / "stranger", "stranger")


def test_policy_implements_the_twisted_interface(authority: Authority) -> None:
    assert IOpenSSLServerConnectionCreator.providedBy(ServerPolicy(server_tls(authority)))


def test_without_client_ca_all_clients_are_served(authority: Authority, other_authority: Authority) -> None:
    settings = server_tls(authority)
    policy = ServerPolicy(settings)
    for identity in (None, authority.issue("client"), other_authority.issue("client")):
        connection = Connection(policy, client(authority, identity))
        assert connection.serial_number == serial_number(settings)
        # No certificate is requested.
        assert connection.server.get_peer_certificate() is None


def test_intermediate_certificates_are_sent(authority: Authority, tmp_path: Path) -> None:
    settings = server_tls(Authority(tmp_path / "between", "between", authority))
    assert len(settings.identity.certificates.pems) == 2
    Connection(ServerPolicy(settings), client(authority))


def test_client_that_distrusts_the_server_disconnects(authority: Authority, other_authority: Authority) -> None:
    policy = ServerPolicy(server_tls(authority))
    with pytest.raises(ssl.SSLCertVerificationError):
        Connection(policy, client(other_authority))


def test_client_ca_requires_its_certificates(authority: Authority, other_authority: Authority) -> None:
    policy = ServerPolicy(server_tls(authority, other_authority))
    served = Connection(policy, client(authority, other_authority.issue("client"))).server.get_peer_certificate()
    assert served is not None
    assert served.to_cryptography().subject.rfc4514_string() == "CN=client"
    for identity in (authority.issue("client"), Authority.self_signed(other_authority.ca.parent, "client")):
        with pytest.raises(SSL.Error, match="certificate verify failed"):
            Connection(policy, client(authority, identity))
    with pytest.raises(SSL.Error, match="peer did not return a certificate"):
        Connection(policy, client(authority))


def test_expired_client_certificate_is_refused(authority: Authority) -> None:
    policy = ServerPolicy(server_tls(authority, authority))
    with pytest.raises(SSL.Error, match="certificate verify failed"):
        Connection(policy, client(authority, authority.issue("client", expired=True)))


def test_client_ca_with_several_certificates(authority: Authority, other_authority: Authority) -> None:
    policy = ServerPolicy(server_tls(authority, other_authority, authority))
    for issuer in (authority, other_authority):
        Connection(policy, client(authority, issuer.issue("client")))


def test_client_certificate_with_intermediates(authority: Authority, tmp_path: Path) -> None:
    between = Authority(tmp_path / "between", "between", authority)
    policy = ServerPolicy(server_tls(authority, authority))
    Connection(policy, client(authority, between.issue("client")))


def test_new_settings_apply_to_new_connections(authority: Authority, other_authority: Authority) -> None:
    old, new = server_tls(authority), server_tls(authority, other_authority)
    assert serial_number(old) != serial_number(new)
    policy = ServerPolicy(old)
    before = Connection(policy, client(authority))
    policy.reconfigure(new)
    after = Connection(policy, client(authority, other_authority.issue("client")))
    assert [before.serial_number, after.serial_number] == [serial_number(old), serial_number(new)]
    with pytest.raises(SSL.Error, match="peer did not return a certificate"):
        Connection(policy, client(authority))
    # Existing connections continue.
    assert before.ask(b"still there") == b"still there"
    policy.reconfigure(old)
    assert Connection(policy, client(authority)).serial_number == serial_number(old)
