"""Builds a Registry for each upstream from the settings, and caches it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

from cachetools import LRUCache
from twisted.application.service import Service
from twisted.internet.defer import Deferred, succeed
from twisted.web.client import HTTPConnectionPool

from ociregistry.config.proxy import ProxySettings
from ociregistry.config.registries import Helper, IdentityToken, Mirror, Password, RegistrySettings
from ociregistry.config.tls import SYSTEM_TRUST
from ociregistry.errors import Denied
from ociregistry.names import DOCKER_HUB, Upstream
from ociregistry.settings import Settings
from ociregistry.upstream.bandwidth import Bandwidth, BandwidthLimit
from ociregistry.upstream.breaker import CircuitBreakers, LinkState
from ociregistry.upstream.client import BaseUrl, Client
from ociregistry.upstream.connect import Dialer, Resolver, is_private
from ociregistry.upstream.credentials import Credentials, ask_helper
from ociregistry.upstream.http import HttpClient
from ociregistry.upstream.mirrors import MirrorClient, Sources
from ociregistry.upstream.origin import Origin
from ociregistry.upstream.probing import Prober
from ociregistry.upstream.proxy import Route, RoutedAgent
from ociregistry.upstream.registry import RESERVED_CONNECTIONS, ConnectionLimit, Registry
from ociregistry.upstream.tls import ContextCache, UpstreamPolicy
from ociregistry.upstream.traffic import Traffic

_MOST_REGISTRIES = 500


class Registries:
    """Makes a Registry for each requested upstream, and caches the 500 used last."""

    def __init__(self, allowed: tuple[str, ...], make: Callable[[Upstream], Registry]) -> None:
        """Allow the upstreams that the globs `allowed` match; with none, every upstream is allowed."""
        self._allowed = allowed
        self._make = make
        self._registries: LRUCache[Upstream, Registry] = LRUCache(_MOST_REGISTRIES)

    def check(self, upstream: Upstream) -> None:
        """Check that the operator allows `upstream`.

        Raises:
            Denied: the operator does not.
        """
        check_allowed(upstream, self._allowed)

    def reconfigure(self, allowed: tuple[str, ...]) -> None:
        """Replace the globs of allowed upstreams, and drop every cached Registry."""
        self._allowed = allowed
        self._registries.clear()

    def get(self, upstream: Upstream) -> Registry:
        """Return the Registry of `upstream`.

        Raises:
            Denied: the operator does not allow `upstream`.
        """
        self.check(upstream)
        registry = self._registries.get(upstream)
        if registry is None:
            registry = self._registries[upstream] = self._make(upstream)
        return registry


def check_allowed(upstream: Upstream, allowed: tuple[str, ...]) -> None:
    """Check that the globs `allowed` allow `upstream`.

    Raises:
        Denied: they do not.
    """
    if not is_allowed(upstream, allowed):
        raise Denied(f"{upstream}: the operator does not allow this upstream (--allow-upstreams)")


def is_allowed(upstream: Upstream, allowed: tuple[str, ...]) -> bool:
    """Return whether one of the globs `allowed` matches the name of `upstream`; with none, all are allowed."""
    return not allowed or upstream.name in allowed or any(fnmatchcase(upstream.name, glob) for glob in allowed)


_DOCKER_HUB_API = "registry-1.docker.io"
_DOCKER_HUB_REALM = "auth.docker.io"


class Network(Service):
    """Makes the Registry of each upstream; holds what they share: resolver, TLS contexts, breakers, bandwidth."""

    def __init__(self, settings: Settings, instance: str, reactor: Any) -> None:
        """Set up the network; `instance` names this process in Via headers."""
        self._settings = settings
        self._instance = instance
        self._reactor = reactor
        self._resolver = Resolver(reactor)
        self._contexts = ContextCache()
        self._breakers = CircuitBreakers(reactor)
        self._prober = Prober(reactor)
        self._bandwidth = Bandwidth(settings.max_bandwidth, settings.bandwidth, reactor)
        self._traffic = Traffic(_configured_names(settings))

    @property
    def links(self) -> tuple[LinkState, ...]:
        """The hosts that were contacted, or could not be, and whether they can be reached."""
        return self._breakers.links(configured_hosts(self._settings), self._prober.probes)

    @property
    def received(self) -> Mapping[str, int]:
        """The bytes that came, by the upstream or mirror that was asked for them."""
        return self._traffic.received

    @property
    def bandwidth(self) -> BandwidthLimit:
        """The limit of all upstreams together at this time."""
        return self._bandwidth.in_force

    def startService(self) -> None:
        """Start the prober and the resolver's threads; call it after the process has daemonized."""
        super().startService()
        self._resolver.start()
        self._prober.startService()

    def stopService(self) -> None:
        """Stop the prober and the resolver's threads."""
        super().stopService()
        self._prober.stopService()
        self._resolver.stop()

    def reconfigure(self, settings: Settings) -> None:
        """Use new settings for each Registry made from now on, and apply the bandwidth limits at once.

        The operating system's trust store is read again.
        """
        self._settings = settings
        self._contexts.clear()
        # Requests that are still in flight by the old settings have nothing probed any more.
        self._prober.stopService()
        self._prober = Prober(self._reactor)
        if self.running:
            self._prober.startService()
        self._bandwidth.reconfigure(settings.max_bandwidth, settings.bandwidth)
        self._traffic.reconfigure(_configured_names(settings))

    def registry(self, upstream: Upstream) -> Registry:
        """Make the Registry of `upstream`, with its mirrors; on an air-gapped server, one that sends no requests."""
        if self._settings.air_gapped:
            return Registry(upstream, None, ConnectionLimit(1), self._instance)
        entry = self._settings.entry(upstream)
        mirrors = [
            MirrorClient(str(mirror), self.mirror_client(mirror, upstream), self._reactor) for mirror in entry.mirrors
        ]
        own = None if entry.mirrors_only else self.own_client(upstream)
        limit = ConnectionLimit(self._settings.max_connections)
        delivered = partial(self._traffic.delivered, upstream.name)
        return Registry(upstream, Sources(str(upstream), mirrors, own), limit, self._instance, delivered)

    def own_client(self, upstream: Upstream) -> Client:
        """Make a client of the registry `upstream` itself."""
        entry = self._settings.entry(upstream)
        return self._client(entry, BaseUrl(entry.scheme, api_host(upstream)))

    def mirror_client(self, mirror: Mirror, upstream: Upstream) -> Client:
        """Make a client of a mirror of `upstream`."""
        ns = upstream.name if mirror.takes_ns else ""
        base = BaseUrl(mirror.scheme, api_host(mirror.host), mirror.api, ns)
        return self._client(self._settings.entry(mirror.host), base)

    def _client(self, entry: RegistrySettings, base: BaseUrl) -> Client:
        reactor = self._reactor
        name = str(entry.upstream)
        own = base.origin(base.scheme or "https")
        pool = HTTPConnectionPool(reactor)
        pool.maxPersistentPerHost = self._settings.max_connections + RESERVED_CONNECTIONS
        policy = UpstreamPolicy(entry.tls, (own.host, own.port), self._contexts)
        configured = configured_hosts(self._settings)
        dialer = Dialer(name, self._resolver, configured, policy, self._bandwidth, reactor, self._breakers)
        route = route_of(entry, base, self._settings.proxy)
        proxy_policy = UpstreamPolicy(SYSTEM_TRUST, ("", 0), self._contexts)
        agent = RoutedAgent(route, dialer, proxy_policy, pool, reactor)
        drop_idle = pool.closeCachedConnections
        want = self._prober.want
        received = partial(self._traffic.add, name)
        http = HttpClient(name, agent, self._breakers, self._bandwidth, drop_idle, reactor, route.to, want, received)

        async def ask(helper: Helper) -> Password | IdentityToken:
            return await ask_helper(helper, entry.upstream, reactor)

        credentials = Credentials(entry.login, ask, reactor)
        trusted = _trusted_with(entry, base, own)
        proxied = route.to(own) is not None
        return Client(name, base, http, credentials, trusted, self._http_allowed(entry, proxied), reactor)

    def _http_allowed(self, entry: RegistrySettings, proxied: bool) -> Callable[[], Deferred[bool]]:
        """Return a function that tells whether plain http may be tried where https does not work.

        Credentials and TLS settings rule it out. Otherwise the upstream's name must contain a port, or all its
        addresses must be private, which cannot be told of a host behind a proxy.
        """

        def allowed() -> Deferred[bool]:
            if entry.must_be_secure:
                return succeed(False)
            if entry.upstream.port is not None or proxied:
                return succeed(entry.upstream.port is not None)
            found = self._resolver.addresses(entry.upstream.host.strip("[]"))
            return found.addCallbacks(lambda addresses: all(map(is_private, addresses)), lambda _: False)

        return allowed


def api_host(upstream: Upstream) -> str:
    """Return the host of an upstream's API, with the port if its name contains one."""
    return _DOCKER_HUB_API if upstream.name == DOCKER_HUB else upstream.name


def route_of(entry: RegistrySettings, base: BaseUrl, settings: ProxySettings) -> Route:
    """Return which requests of the upstream of an entry, whose API is at `base`, go through which proxy."""
    if entry.proxy is None:
        return Route(settings.proxies, settings.no_proxy)
    return Route(entry.proxy, settings.no_proxy, frozenset({base.origin("http"), base.origin("https")}))


def _trusted_with(entry: RegistrySettings, base: BaseUrl, own: Origin) -> Callable[[Origin], bool]:
    """Return a function that tells whether a token service gets the credentials of this entry.

    It must be reached by https, unless the registry's scheme is set to http, and its host must be the registry's own,
    the configured realm, or Docker Hub's token service for Docker Hub.
    """

    def trusted(realm: Origin) -> bool:
        if realm.scheme != "https" and base.scheme != "http":
            return False
        if entry.realm is not None and _matches(entry.realm, realm.host, realm.port):
            return True
        return realm.host == own.host or (entry.upstream.name, realm.host) == (DOCKER_HUB, _DOCKER_HUB_REALM)

    return trusted


def _configured(settings: Settings) -> set[Upstream]:
    """Return the upstreams and mirrors that the settings name."""
    mirrors = (mirror.host for entry in settings.registries.values() for mirror in entry.mirrors)
    return {*settings.registries, settings.default_ns, *mirrors}


def _configured_names(settings: Settings) -> list[str]:
    return [upstream.name for upstream in _configured(settings)]


def configured_hosts(settings: Settings) -> Callable[[str, int], bool]:
    """Return a function that tells whether the settings name a host and port.

    They may name it as an upstream, as the default upstream, as a mirror or as a token service.
    """
    exact = {Upstream(api_host(upstream)) for upstream in _configured(settings)}
    realms = {entry.realm for entry in settings.registries.values() if entry.realm is not None}

    def named(host: str, port: int) -> bool:
        bracketed = f"[{host}]" if ":" in host else host
        spelled = {Upstream(f"{bracketed}:{port}")} | ({Upstream(bracketed)} if port in (80, 443) else set())
        return bool(spelled & (exact | realms))

    return named


def _matches(realm: Upstream, host: str, port: int) -> bool:
    """Return whether the configured `realm` is this host; a realm without a port matches every port."""
    return realm.host.strip("[]") == host and realm.port in (None, port)
