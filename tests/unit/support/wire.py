"""Real connections to scripted registries, as in the daemon but without address checks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from twisted.internet.defer import succeed
from twisted.web.client import Agent, HTTPConnectionPool

from ociregistry.config.tls import SYSTEM_TRUST, UpstreamTls
from ociregistry.openssl import Certificates
from ociregistry.upstream.bandwidth import Bandwidth
from ociregistry.upstream.breaker import CircuitBreakers
from ociregistry.upstream.client import Client
from ociregistry.upstream.http import HttpClient
from ociregistry.upstream.registry import Registry
from ociregistry.upstream.tls import ContextCache, UpstreamPolicy
from tests.unit.support.common import REACTOR
from tests.unit.support.http_agents import client_over, registry_over


def trusting(authority: Path | None) -> UpstreamTls:
    """Return TLS settings that trust one authority, or the system's."""
    return UpstreamTls(Certificates(authority, (authority.read_bytes(),))) if authority else SYSTEM_TRUST


class Network:
    """Creates HTTP clients; `close` ends their connections."""

    def __init__(self) -> None:
        self._pools: list[HTTPConnectionPool] = []

    def http(
        self, upstream: str, *, trust: Path | None = None, clock: Any = REACTOR, policy: UpstreamPolicy | None = None
    ) -> HttpClient:
        """Return an HTTP client that trusts `trust`, or the system's authorities."""
        pool = HTTPConnectionPool(REACTOR)
        self._pools.append(pool)
        policy = policy or UpstreamPolicy(trusting(trust), ("", 0), ContextCache())
        agent = Agent(REACTOR, policy, connectTimeout=10, pool=pool)
        return HttpClient(
            upstream, agent, CircuitBreakers(clock), Bandwidth(None, (), clock), pool.closeCachedConnections, clock
        )

    def client(self, upstream: str, *, scheme: str | None = None, trust: Path | None = None) -> Client:
        """Return a client of an upstream that may also be asked by http."""

        http = self.http(upstream, trust=trust)
        return client_over(http, REACTOR, name=upstream, scheme=scheme, http_allowed=lambda: succeed(True))

    def registry(
        self, upstream: str, *, scheme: str | None = None, trust: Path | None = None, connections: int = 2
    ) -> Registry:
        """Return an upstream with a few connections."""
        return registry_over(self.client(upstream, scheme=scheme, trust=trust), connections, upstream)

    async def close(self) -> None:
        """Close idle connections."""
        for pool in self._pools:
            await pool.closeCachedConnections()
