"""Real connections to scripted registries, as the daemon makes them but for what they trust."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from twisted.internet.defer import Deferred, succeed
from twisted.internet.interfaces import IOpenSSLClientConnectionCreator
from twisted.internet.ssl import Certificate, optionsForClientTLS, trustRootFromCertificates
from twisted.web.client import Agent, HTTPConnectionPool
from twisted.web.iweb import IPolicyForHTTPS
from zope.interface import implementer

from ociregistry.names import Upstream
from ociregistry.upstream.client import Client
from ociregistry.upstream.exchange import Exchanges
from ociregistry.upstream.registry import Registry
from ociregistry.upstream.tls import UpstreamTLS
from tests.unit.doubles import REACTOR


@implementer(IPolicyForHTTPS)
class Trust:
    """Trusts one authority alone."""

    def __init__(self, authority: Path) -> None:
        self._root = trustRootFromCertificates([Certificate.loadPEM(authority.read_bytes())])

    def creatorForNetloc(self, hostname: bytes, port: int) -> IOpenSSLClientConnectionCreator:
        """What makes the TLS connections to `hostname`."""
        return optionsForClientTLS(hostname.decode("ascii"), trustRoot=self._root)


class Network:
    """Makes what talks to upstreams; `close` ends its connections."""

    def __init__(self) -> None:
        self._pools: list[HTTPConnectionPool] = []

    def exchanges(self, upstream: str, *, trust: Path | None = None, clock: Any = REACTOR) -> Exchanges:
        """Sends requests; with `trust` to registries of that authority, else to those of the system's."""
        pool = HTTPConnectionPool(REACTOR)
        self._pools.append(pool)
        agent = Agent(REACTOR, Trust(trust) if trust else UpstreamTLS(), connectTimeout=10, pool=pool)
        return Exchanges(upstream, agent, pool.closeCachedConnections, clock)

    def client(self, upstream: str, *, scheme: str | None = None, trust: Path | None = None) -> Client:
        """Asks an upstream, which may be asked by http too."""

        def allowed(upstream: Upstream) -> Deferred[bool]:
            return succeed(True)

        exchanges = self.exchanges(upstream, trust=trust)
        return Client(Upstream.parse(upstream), scheme, exchanges, allowed, REACTOR)

    def registry(
        self, upstream: str, *, scheme: str | None = None, trust: Path | None = None, connections: int = 2
    ) -> Registry:
        """An upstream with a few connections."""
        client = self.client(upstream, scheme=scheme, trust=trust)
        return Registry(Upstream.parse(upstream), client, connections, REACTOR)

    async def close(self) -> None:
        """Closes idle connections."""
        for pool in self._pools:
            await pool.closeCachedConnections()
