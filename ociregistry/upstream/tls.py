"""What a TLS connection to an upstream must prove."""

from __future__ import annotations

from twisted.internet.interfaces import IOpenSSLClientConnectionCreator
from twisted.internet.ssl import optionsForClientTLS, platformTrust
from twisted.web.iweb import IPolicyForHTTPS
from zope.interface import implementer


@implementer(IPolicyForHTTPS)
class UpstreamTLS:
    """The policy of one upstream: every host that its requests lead to is verified by the system's trust store."""

    def creatorForNetloc(self, hostname: bytes, port: int) -> IOpenSSLClientConnectionCreator:
        """What makes the TLS connections to `hostname`."""
        return optionsForClientTLS(hostname.decode("ascii"), trustRoot=platformTrust())
