"""TLS with one upstream: trust for every host that its requests lead to, the client certificate for its own host."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from OpenSSL import SSL, crypto
from service_identity import CertificateError, VerificationError
from service_identity.pyopenssl import verify_hostname, verify_ip_address
from twisted.internet.abstract import isIPAddress, isIPv6Address
from twisted.internet.interfaces import IOpenSSLClientConnectionCreator
from twisted.protocols.tls import TLSMemoryBIOProtocol
from twisted.web.iweb import IPolicyForHTTPS
from zope.interface import implementer

from ociregistry.config.tls import UpstreamTls
from ociregistry.openssl import Certificates, KeyPair, openssl_context
from ociregistry.process import lowest_free_descriptor
from ociregistry.upstream.failures import CertificateRefused

_SUBJECT_ALT_NAME = "2.5.29.17"
"""The object identifier of the extension subjectAltName."""
_NO_NAME = "none of its names can be used (subjectAltName)"

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
"""Reasons for OpenSSL's verification results (X509_STORE_CTX_get_error)."""


@dataclass(frozen=True, slots=True)
class Trust:
    """The certificate authorities with which a host's certificate is verified."""

    ca: Certificates | None
    """Those that the operator configured."""
    system: bool
    """Whether those of the operating system's trust store count too."""


class ContextCache:
    """Caches OpenSSL contexts, one for all hosts with equal settings: each takes time to make, and a megabyte."""

    def __init__(self) -> None:
        self._contexts: dict[tuple[KeyPair | None, Trust | None], SSL.Context] = {}

    def get(self, identity: KeyPair | None, trust: Trust | None) -> SSL.Context:
        """Return the context that presents the certificate `identity`; with None as `trust`, no host is verified.

        Raises:
            OSError: no file descriptor is left to read the operating system's trust store.
        """
        key = identity, trust
        if key not in self._contexts:
            ca, system = (trust.ca, trust.system) if trust is not None else (None, False)
            if system:
                # OpenSSL ignores a file that it cannot open: no certificate would be trusted.
                lowest_free_descriptor()
            context = openssl_context(identity, ca, system_trust=system)
            if trust is not None:
                context.set_verify(SSL.VERIFY_PEER | SSL.VERIFY_FAIL_IF_NO_PEER_CERT, _verify)
            self._contexts[key] = context
        return self._contexts[key]

    def clear(self) -> None:
        """Drop the contexts, so that the operating system's trust store is read again."""
        self._contexts.clear()


@implementer(IPolicyForHTTPS)
class UpstreamPolicy:
    """The TLS policy of one upstream for all hosts that its requests lead to.

    Its own host is trusted by the configured authorities alone, if there are any. Other hosts, such as the storage
    that it redirects to, are also trusted by the operating system's. The client certificate is for its own host and
    port.
    """

    def __init__(self, settings: UpstreamTls, own: tuple[str, int], contexts: ContextCache) -> None:
        """Set up the policy; `own` is the host and port of the upstream."""
        self._settings = settings
        self._own = own
        self._contexts = contexts

    def creatorForNetloc(self, hostname: bytes, port: int) -> IOpenSSLClientConnectionCreator:
        """Return the creator of TLS connections to `hostname`."""
        host = hostname.decode("ascii")
        settings = self._settings
        identity = settings.client if (host, port) == self._own else None
        system = settings.ca is None or host != self._own[0]
        trust = Trust(settings.ca, system) if settings.verify else None
        return _ConnectionCreator(host, self._contexts.get(identity, trust))


@implementer(IOpenSSLClientConnectionCreator)
class _ConnectionCreator:
    """Creates TLS connections to one host, with its name in SNI also where its certificate is not verified."""

    def __init__(self, host: str, context: SSL.Context) -> None:
        self._host = host
        self._context = context

    def clientConnectionForTLS(self, tlsProtocol: TLSMemoryBIOProtocol) -> SSL.Connection:
        """Return a new connection for `tlsProtocol`."""
        connection = _Connection(self._context, self._host)
        if not _is_address(self._host):
            connection.set_tlsext_host_name(self._host.encode("ascii"))
        return connection


class _Connection(SSL.Connection):
    """A connection with the name of its host, for `_verify`: the context's callback gets only the connection."""

    def __init__(self, context: SSL.Context, host: str) -> None:
        super().__init__(context, None)
        self.host = host


def _verify(connection: SSL.Connection, certificate: crypto.X509, error: int, depth: int, holds: int) -> bool:
    """Verify one certificate of a chain; OpenSSL calls this for each of them, the server's own (depth 0) last.

    `error` and `holds` are OpenSSL's own verdict. Its exception would not tell why a certificate is refused.

    Raises:
        CertificateRefused: the certificate is not trusted, cannot be read, or is for another host.
    """
    subject = "?"
    try:
        parsed = certificate.to_cryptography()
        told = parsed.subject.rfc4514_string()[:200]
        subject = "".join(one if one.isprintable() else "?" for one in told)
        why = None if holds else _REASONS.get(error, f"OpenSSL's error {error}")
        if holds and depth == 0:
            has_names = any(extension.oid.dotted_string == _SUBJECT_ALT_NAME for extension in parsed.extensions)
            # Without names, some versions of service_identity fall back to the subject, which RFC 6125 deprecates.
            why = _refusal(certificate, cast(_Connection, connection).host) if has_names else _NO_NAME
    except Exception:
        # The libraries raise many kinds of exceptions for a malformed certificate.
        why = "it cannot be read"
    if why is not None:
        raise CertificateRefused(subject, why)
    return True


def _refusal(certificate: crypto.X509, host: str) -> str | None:
    verify = verify_ip_address if _is_address(host) else verify_hostname
    try:
        verify(cast(SSL.Connection, _PeerCertificate(certificate)), host)
    except CertificateError:
        return _NO_NAME
    except VerificationError:
        return "it is for another host name"
    return None


class _PeerCertificate:
    """Stands in for a connection in service_identity's checks, which ask it for the peer's certificate.

    During the handshake the real connection does not have the certificate yet.
    """

    def __init__(self, certificate: crypto.X509) -> None:
        self._certificate = certificate

    def get_peer_certificate(self) -> crypto.X509:
        """Return the certificate."""
        return self._certificate


def _is_address(host: str) -> bool:
    return isIPAddress(host) or isIPv6Address(host)
