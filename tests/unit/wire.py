"""Real connections to scripted registries, as the daemon makes them but for where they may lead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from twisted.internet.defer import succeed
from twisted.web.client import Agent, HTTPConnectionPool

from ociregistry.config.tls import SYSTEM_TRUST, Certificates, UpstreamTls
from ociregistry.upstream.bandwidth import Bandwidth
from ociregistry.upstream.breaker import Links
from ociregistry.upstream.client import Client
from ociregistry.upstream.http import Exchanges
from ociregistry.upstream.registry import Registry
from ociregistry.upstream.tls import Contexts, UpstreamPolicy
from tests.unit.asking import client_over, registry_over
from tests.unit.doubles import REACTOR


def trusting(authority: Path | None) -> UpstreamTls:
    """Trust in one authority alone, or in those of the system."""
    return UpstreamTls(Certificates(authority, (authority.read_bytes(),))) if authority else SYSTEM_TRUST


class Network:
    """Makes what talks to upstreams; `close` ends its connections."""

    def __init__(self) -> None:
        self._pools: list[HTTPConnectionPool] = []

    def exchanges(
        self, upstream: str, *, trust: Path | None = None, clock: Any = REACTOR, policy: UpstreamPolicy | None = None
    ) -> Exchanges:
        """Sends requests; with `trust` to registries of that authority, else to those of the system's."""
        pool = HTTPConnectionPool(REACTOR)
        self._pools.append(pool)
        policy = policy or UpstreamPolicy(trusting(trust), ("", 0), Contexts())
        agent = Agent(REACTOR, policy, connectTimeout=10, pool=pool)
        return Exchanges(
            upstream, agent, Links(clock), Bandwidth(None, (), clock), pool.closeCachedConnections, clock
        )

    def client(self, upstream: str, *, scheme: str | None = None, trust: Path | None = None) -> Client:
        """Asks an upstream, which may be asked by http too."""

        exchanges = self.exchanges(upstream, trust=trust)
        return client_over(exchanges, REACTOR, name=upstream, scheme=scheme, plain_allowed=lambda: succeed(True))

    def registry(
        self, upstream: str, *, scheme: str | None = None, trust: Path | None = None, connections: int = 2
    ) -> Registry:
        """An upstream with a few connections."""
        return registry_over(self.client(upstream, scheme=scheme, trust=trust), connections, upstream)

    async def close(self) -> None:
        """Closes idle connections."""
        for pool in self._pools:
            await pool.closeCachedConnections()
