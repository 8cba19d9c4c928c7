"""TLS with one upstream: whom we trust on every hop of its requests, and who we are towards its own host."""

from __future__ import annotations

from collections import OrderedDict
from typing import cast

from OpenSSL import SSL, crypto
from service_identity import CertificateError, VerificationError
from service_identity.pyopenssl import verify_hostname, verify_ip_address
from twisted.internet.abstract import isIPAddress, isIPv6Address
from twisted.internet.interfaces import IOpenSSLClientConnectionCreator
from twisted.protocols.tls import TLSMemoryBIOProtocol
from twisted.web.iweb import IPolicyForHTTPS
from zope.interface import implementer

from ociregistry.config.tls import UpstreamTls, openssl_context
from ociregistry.upstream.failures import CertificateRefused

_MOST_KEPT = 100

_REASONS = {
    2: "its issuer is not trusted",
    9: "it is not valid yet",
    10: "it has expired",
    18: "it is self-signed, and not trusted",
    19: "it leads to a self-signed certificate that is not trusted",
    20: "its issuer is not trusted",
    21: "its issuer is not trusted, or sent no certificate of its own",
    26: "it is not meant for servers",
    66: "its key is too weak",
    67: "the key of a certificate that it leads to is too weak",
    68: "it is signed by a hash that is too weak",
}
"""OpenSSL's verification results (X509_STORE_CTX_get_error) in words."""

Origin = tuple[str, int]
"""Host and port."""


@implementer(IPolicyForHTTPS)
class UpstreamPolicy:
    """The policy of one upstream. All hosts that its requests lead to are verified alike."""

    def __init__(self, settings: UpstreamTls, own: Origin) -> None:
        """`own` is where the client certificate may be shown, and nowhere else."""
        self._settings = settings
        self._own = own
        self._kept: OrderedDict[Origin, _Creator] = OrderedDict()

    def creatorForNetloc(self, hostname: bytes, port: int) -> IOpenSSLClientConnectionCreator:
        """What makes the TLS connections to `hostname`; kept, because reading a trust store takes time."""
        origin = hostname.decode("ascii"), port
        creator = self._kept.pop(origin, None) or self._creator(origin)
        self._kept[origin] = creator
        if len(self._kept) > _MOST_KEPT:
            self._kept.popitem(last=False)
        return creator

    def _creator(self, origin: Origin) -> _Creator:
        settings = self._settings
        identity = settings.client if origin == self._own else None
        if not settings.verify:
            return _Creator(origin[0], openssl_context(identity))
        context = openssl_context(identity, settings.ca, system_trust=settings.ca is None)
        context.set_verify(SSL.VERIFY_PEER | SSL.VERIFY_FAIL_IF_NO_PEER_CERT, _Verifier(origin[0]).verify)
        return _Creator(origin[0], context)


@implementer(IOpenSSLClientConnectionCreator)
class _Creator:
    """Tells every host by which name it was asked for (SNI), also where its certificate is not verified."""

    def __init__(self, host: str, context: SSL.Context) -> None:
        self._name = None if _is_address(host) else host.encode("ascii")
        self._context = context

    def clientConnectionForTLS(self, tlsProtocol: TLSMemoryBIOProtocol) -> SSL.Connection:
        """A new connection for `tlsProtocol`."""
        connection = SSL.Connection(self._context, None)
        if self._name is not None:
            connection.set_tlsext_host_name(self._name)
        return connection


class _Verifier:
    """Says why a certificate is refused: OpenSSL's own error does not."""

    def __init__(self, host: str) -> None:
        self._host = host

    def verify(self, _: SSL.Connection, certificate: crypto.X509, error: int, depth: int, holds: int) -> bool:
        """Called for each certificate of a chain, the server's own (depth 0) last; raises `CertificateRefused`."""
        subject = "?"
        try:
            subject = certificate.to_cryptography().subject.rfc4514_string()
            why = self._refusal(certificate, depth) if holds else _REASONS.get(error, f"OpenSSL's error {error}")
        except Exception:
            # Whatever a library makes of a certificate that is nonsense.
            why = "it cannot be read"
        if why is not None:
            raise CertificateRefused(subject, why)
        return True

    def _refusal(self, certificate: crypto.X509, depth: int) -> str | None:
        if depth != 0:
            return None
        verify = verify_ip_address if _is_address(self._host) else verify_hostname
        try:
            verify(cast(SSL.Connection, _Peer(certificate)), self._host)
        except CertificateError:
            return "none of its names can be used (subjectAltName)"
        except VerificationError:
            return "it is for another host name"
        return None


class _Peer:
    """A peer whose certificate is known before the handshake has ended, as service_identity asks for it."""

    def __init__(self, certificate: crypto.X509) -> None:
        self._certificate = certificate

    def get_peer_certificate(self) -> crypto.X509:
        """The certificate."""
        return self._certificate


def _is_address(host: str) -> bool:
    return isIPAddress(host) or isIPv6Address(host)
