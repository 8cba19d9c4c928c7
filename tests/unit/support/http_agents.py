"""Clients and registries assembled as in the daemon, over HTTP agents of the test."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from twisted.internet.defer import Deferred, succeed
from twisted.internet.task import Clock
from twisted.web.iweb import IAgent

from ociregistry.config.registries import Helper, IdentityToken, Login, Password
from ociregistry.names import Upstream
from ociregistry.upstream.bandwidth import Bandwidth
from ociregistry.upstream.breaker import CircuitBreakers
from ociregistry.upstream.client import BaseUrl, Client
from ociregistry.upstream.credentials import AskHelper, Credentials
from ociregistry.upstream.http import HttpClient
from ociregistry.upstream.mirrors import Sources
from ociregistry.upstream.network import api_host
from ociregistry.upstream.origin import Origin
from ociregistry.upstream.registry import ConnectionLimit, Registry

INSTANCE = "ociregistry-0123456789abcdef"
"""The User-Agent of this process."""


async def no_helper(helper: Helper) -> Password | IdentityToken:
    """Fail: no credential helper is expected."""
    raise AssertionError(helper)


def client_over(
    http: HttpClient,
    clock: Any = None,
    *,
    name: str = "reg.example",
    scheme: str | None = "https",
    base: BaseUrl | None = None,
    login: Login | None = None,
    ask: AskHelper = no_helper,
    trusts: str = "",
    http_allowed: Callable[[], Deferred[bool]] = lambda: succeed(False),
) -> Client:
    """Return a client of the upstream `name` or of a mirror's `base`.

    `trusts` is the host of a token service that is trusted with the credentials.
    """
    clock = clock or Clock()

    def trusted(realm: Origin) -> bool:
        return realm.host == trusts

    base = base or BaseUrl(scheme, api_host(Upstream.parse(name)))
    return Client(name, base, http, Credentials(login, ask, clock), trusted, http_allowed, clock)


def exchanges_over(agent: IAgent, clock: Any, upstream: str = "reg.example") -> HttpClient:
    """Return an HTTP client over `agent`, with closed circuit breakers and without bandwidth limit."""
    return HttpClient(upstream, agent, CircuitBreakers(clock), Bandwidth(None, (), clock), lambda: None, clock)


def registry_over(client: Client, most: int = 1, name: str = "reg.example") -> Registry:
    """Return a registry without mirrors, with `most` connections for blobs."""
    return Registry(Upstream.parse(name), Sources(name, [], client), ConnectionLimit(most), INSTANCE)
