"""Puts the way to each upstream together as the settings say, and keeps a Registry for each."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any

from twisted.internet.defer import Deferred, succeed
from twisted.web.client import Agent, HTTPConnectionPool

from ociregistry.config.registries import Helper, IdentityToken, Password, RegistrySettings
from ociregistry.errors import Denied
from ociregistry.names import DOCKER_HUB, Upstream
from ociregistry.settings import Settings
from ociregistry.upstream.bandwidth import Bandwidth
from ociregistry.upstream.breaker import CircuitBreakers
from ociregistry.upstream.client import Base, Client
from ociregistry.upstream.connect import Dialer, Resolver, is_private
from ociregistry.upstream.credentials import Credentials, ask_helper
from ociregistry.upstream.http import HttpClient
from ociregistry.upstream.origin import Origin
from ociregistry.upstream.registry import (
    RESERVED_CONNECTIONS,
    AirGap,
    ConnectionLimit,
    MirrorClient,
    Registry,
    Sources,
)
from ociregistry.upstream.tls import Contexts, UpstreamPolicy
from ociregistry.via import NO_VIA, Via

_MOST_KEPT = 500


class Registries:
    """Makes a Registry for each upstream that is asked for, and keeps those used last."""

    def __init__(self, allowed: tuple[str, ...], make: Callable[[Upstream], Registry]) -> None:
        """`allowed` are globs; with none, every upstream is allowed."""
        self._allowed = allowed
        self._make = make
        self._kept: OrderedDict[Upstream, Registry] = OrderedDict()

    def check(self, upstream: Upstream) -> None:
        """Raises `Denied` when the operator does not allow `upstream`."""
        check_allowed(upstream, self._allowed)

    def reconfigure(self, allowed: tuple[str, ...]) -> None:
        """From now on these are allowed, and all registries are made anew."""
        self._allowed = allowed
        self._kept.clear()

    def get(self, upstream: Upstream, via: Via = NO_VIA) -> Registry:
        """The Registry for `upstream`, to be asked for who stands in `chain`; raises `Denied`."""
        self.check(upstream)
        registry = self._kept.pop(upstream, None) or self._make(upstream)
        self._kept[upstream] = registry
        if len(self._kept) > _MOST_KEPT:
            self._kept.popitem(last=False)
        return registry.with_via(via) if via != NO_VIA else registry


def check_allowed(upstream: Upstream, allowed: tuple[str, ...]) -> None:
    """Raises `Denied` when `is_allowed` does not hold."""
    if not is_allowed(upstream, allowed):
        raise Denied(f"{upstream}: the operator does not allow this upstream (--allow-upstreams)")


def is_allowed(upstream: Upstream, allowed: tuple[str, ...]) -> bool:
    """Whether one of the globs is for `upstream`; without any, all are allowed."""
    return not allowed or upstream.name in allowed or any(fnmatchcase(upstream.name, glob) for glob in allowed)


_DOCKER_HUB_API = "registry-1.docker.io"
_DOCKER_HUB_REALM = "auth.docker.io"


class Network:
    """Makes the Registry of each upstream."""

    def __init__(self, settings: Settings, instance: str, reactor: Any) -> None:
        """`instance` is what this process calls itself towards other caches."""
        self._settings = settings
        self._instance = instance
        self._reactor = reactor
        self._resolver = Resolver(reactor)
        self._contexts = Contexts()
        self._breakers = CircuitBreakers(reactor)
        self._bandwidth = Bandwidth(settings.max_bandwidth, settings.bandwidth, reactor)

    def start(self) -> None:
        """Must be called after the process has daemonized."""
        self._resolver.start()

    def stop(self) -> None:
        """No name is looked up any more."""
        self._resolver.stop()

    def reconfigure(self, settings: Settings) -> None:
        """What is made from now on is made by these settings."""
        self._settings = settings
        self._contexts.clear()
        self._bandwidth.reconfigure(settings.max_bandwidth, settings.bandwidth)

    def registry(self, upstream: Upstream) -> Registry:
        """The Registry of `upstream`, with its mirrors before it."""
        if self._settings.air_gapped:
            return Registry(upstream, AirGap(), ConnectionLimit(1), self._instance)
        entry = self._settings.entry(upstream)
        mirrors = [
            MirrorClient(
                str(mirror),
                self._client(
                    self._settings.entry(mirror.host),
                    Base(mirror.scheme, api_host(mirror.host), mirror.path, upstream.name),
                ),
            )
            for mirror in entry.mirrors
        ]
        own = self._client(entry, Base(entry.scheme, api_host(upstream)))
        limit = ConnectionLimit(self._settings.max_connections)
        return Registry(upstream, Sources(mirrors, own), limit, self._instance)

    def _client(self, entry: RegistrySettings, base: Base) -> Client:
        reactor = self._reactor
        name = str(entry.upstream)
        own = base.origin(base.scheme or "https")
        pool = HTTPConnectionPool(reactor)
        pool.maxPersistentPerHost = self._settings.max_connections + RESERVED_CONNECTIONS
        policy = UpstreamPolicy(entry.tls, (own.host, own.port), self._contexts)
        dialer = Dialer(name, self._resolver, named_by(self._settings), policy, self._bandwidth, reactor)
        agent = Agent.usingEndpointFactory(reactor, dialer, pool)
        drop_idle = pool.closeCachedConnections
        http = HttpClient(name, agent, self._breakers, self._bandwidth, drop_idle, reactor)

        async def ask(helper: Helper) -> Password | IdentityToken:
            return await ask_helper(helper, entry.upstream, reactor)

        credentials = Credentials(entry.login, ask, reactor)
        trusted = _trusted_with(entry, base, own)
        return Client(name, base, http, credentials, trusted, self._plain_allowed(entry), reactor)

    def _plain_allowed(self, entry: RegistrySettings) -> Callable[[], Deferred[bool]]:
        """Whether http may be tried: without anything to be seen or pretended, by port or by private addresses."""

        def allowed() -> Deferred[bool]:
            if entry.must_be_secure:
                return succeed(False)
            if entry.upstream.port is not None:
                return succeed(True)
            found = self._resolver.addresses(entry.upstream.host.strip("[]"))
            return found.addCallbacks(lambda addresses: all(map(is_private, addresses)), lambda _: False)

        return allowed


def api_host(upstream: Upstream) -> str:
    """The host, and the port if its name has one, where an upstream has its API."""
    return _DOCKER_HUB_API if upstream.name == DOCKER_HUB else upstream.name


def _trusted_with(entry: RegistrySettings, base: Base, own: Origin) -> Callable[[Origin], bool]:
    """Which token services get the credentials of this entry."""

    def trusted(realm: Origin) -> bool:
        if realm.scheme != "https" and base.scheme != "http":
            return False
        if entry.realm is not None and _is(entry.realm, realm.host, realm.port):
            return True
        return realm.host == own.host or (entry.upstream.name, realm.host) == (DOCKER_HUB, _DOCKER_HUB_REALM)

    return trusted


def named_by(settings: Settings) -> Callable[[str, int], bool]:
    """Whether the operator named a host and port: as an upstream, as a mirror, or as a token service."""
    entries = settings.registries.values()
    registries = {*settings.registries, settings.default_ns, *(mirror.host for e in entries for mirror in e.mirrors)}
    exact = {Upstream(api_host(upstream)) for upstream in registries}
    realms = {entry.realm for entry in entries if entry.realm is not None}

    def named(host: str, port: int) -> bool:
        bracketed = f"[{host}]" if ":" in host else host
        spelled = {Upstream(f"{bracketed}:{port}")} | ({Upstream(bracketed)} if port in (80, 443) else set())
        return bool(spelled & (exact | realms))

    return named


def _is(realm: Upstream, host: str, port: int) -> bool:
    """Whether a realm that the operator named, perhaps without a port, is this one."""
    return realm.host.strip("[]") == host and realm.port in (None, port)
