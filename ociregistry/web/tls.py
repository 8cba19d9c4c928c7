"""TLS towards clients: who we are, and, if the operator says so, who they must be."""

from __future__ import annotations

from OpenSSL import SSL
from twisted.internet.interfaces import IOpenSSLServerConnectionCreator
from twisted.protocols.tls import TLSMemoryBIOProtocol
from zope.interface import implementer

from ociregistry.config.tls import ServerTls, openssl_context


@implementer(IOpenSSLServerConnectionCreator)
class ServerPolicy:
    """Makes the TLS side of each connection that a client opens."""

    def __init__(self, settings: ServerTls) -> None:
        self.use(settings)

    def use(self, settings: ServerTls) -> None:
        """Connections that are opened from now on are made by these: certificates are renewed under a daemon."""
        self._context = openssl_context(settings.identity, settings.client_ca)

    def serverConnectionForTLS(self, tlsProtocol: TLSMemoryBIOProtocol) -> SSL.Connection:
        """A new connection."""
        return SSL.Connection(self._context, None)
