"""The composition root: the command line, and the daemon put together. The only file that knows everything."""

from __future__ import annotations

import resource
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

from twisted.application.service import IService, Service
from twisted.internet import defer
from twisted.internet.address import IPv4Address, IPv6Address
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import serverFromString
from twisted.internet.interfaces import IListeningPort
from twisted.logger import FilteringLogObserver, ILogObserver, LegacyLogObserverWrapper, Logger
from twisted.python import usage
from twisted.python.components import Componentized
from twisted.python.failure import Failure
from twisted.scripts._twistd_unix import UnixAppLogger
from twisted.web.client import Agent, HTTPConnectionPool

from ociregistry import __version__
from ociregistry.config import ConfigInvalid, RegistrySettings
from ociregistry.logs import ALWAYS, AtLeast
from ociregistry.names import Upstream
from ociregistry.pullthrough.cache import PullThrough
from ociregistry.pullthrough.listings import Listings
from ociregistry.settings import OPTIONS, Settings, load_settings
from ociregistry.store.store import Store
from ociregistry.upstream.client import Client
from ociregistry.upstream.exchange import Exchanges
from ociregistry.upstream.private import plain_allowed
from ociregistry.upstream.registries import Registries
from ociregistry.upstream.registry import Registry
from ociregistry.upstream.tls import UpstreamTLS
from ociregistry.web.site import RegistrySite
from ociregistry.web.v2 import V2

_DRAIN = 30.0
"""Seconds that requests in flight get when the daemon is told to stop."""

_DIAL = 10.0
"""Seconds for a connection to an upstream to come about."""

_NOT_YET_OPTIONS = frozenset(
    {
        *("concurrent", "max-bandwidth", "arch", "os", "preload-images", "always-pull-latest", "air-gapped"),
        *(
            "complete-images",
            "no-complete-images",
            "load-images",
            "list-cache",
            "prune",
            "prune-before",
            "dry-run",
        ),
    }
)
_NOT_YET_COMMANDS = ("load", "list", "prune", "verify", "export", "check", "containerd-config", "version")


class _CommonOptions(usage.Options):
    """Options that are taken before and after the word `serve`."""

    optParameters = [
        *([option.name, None, None, f"{option.help} [{option.default}]"] for option in OPTIONS),
        ["config-path", None, None, "YAML file with upstreams and options."],
    ]

    def __init__(self) -> None:
        super().__init__()
        self.listen: list[str] = []

    def opt_listen(self, endpoint: str) -> None:
        """Endpoint to listen on in place of --port, such as tcp:8080:interface=127.0.0.1. Repeatable."""
        self.listen.append(endpoint)

    def opt_version(self) -> NoReturn:
        """Print the version and exit."""
        print(f"ociregistry {__version__}")
        raise SystemExit(0)


class Serve(_CommonOptions):
    """The options of the daemon, with `serve` written out."""

    longdesc = "Runs the daemon."


class _NotYet(usage.Options):
    def parseOptions(self, options: Sequence[str] | None = None) -> NoReturn:
        command = self.parent.subCommand if self.parent else ""
        raise usage.UsageError(f"{command} is not available in this version")


class Options(_CommonOptions):
    """The command line behind `twistd ociregistry`."""

    synopsis = "[options] [serve [options]]"
    longdesc = "A pull-only, pull-through, caching OCI registry server."
    subCommands = [
        ["serve", None, Serve, "run the daemon, which is also the default"],
        *([name, None, _NotYet, "not in this version"] for name in _NOT_YET_COMMANDS),
    ]

    settings: Settings

    def parseOptions(self, options: Sequence[str] | None = None) -> None:
        """As twistd calls it; a mistake ends the process with one line and exit status 2."""
        try:
            for argument in options or ():
                if argument.startswith("--") and argument[2:].partition("=")[0] in _NOT_YET_OPTIONS:
                    raise usage.UsageError(f"{argument} is not available in this version")
            super().parseOptions(options)
        except usage.UsageError as error:
            _exit(f"{error} (--help lists the options)", 2)

    def postOptions(self) -> None:
        """Makes the settings, so that a mistake shows before anything starts."""
        given = [self, self.subOptions] if self.subCommand else [self]
        values = {
            option.key: options[option.name]
            for options in given
            for option in OPTIONS
            if options[option.name] is not None
        }
        listen = tuple(endpoint for options in given for endpoint in options.listen)
        config_paths = [options["config-path"] for options in given if options["config-path"] is not None]
        try:
            self.settings = load_settings(values, listen, config_paths[-1] if config_paths else None)
        except ConfigInvalid as error:
            _exit(str(error), 2)


def _exit(message: str, status: int) -> NoReturn:
    # twistd makes a log of sys.stderr.
    print(f"ociregistry: {message}", file=sys.__stderr__)
    raise SystemExit(status)


def makeService(options: Options, reactor: Any = None) -> Service:
    """The daemon that `options` describe."""
    if reactor is None:
        from twisted.internet import reactor
    assert options.parent is not None
    return Daemon(options.settings, reactor, options.parent)


class Daemon(Service):
    """Listens, serves, and stops without cutting off who is being served."""

    log = Logger(namespace="ociregistry")

    def __init__(self, settings: Settings, reactor: Any, twistd_options: usage.Options) -> None:
        self._settings = settings
        self._reactor = reactor
        self._twistd_options = twistd_options
        self._started = datetime.now(UTC)
        self._ports: list[IListeningPort] = []
        self._store = Store(settings.image_path, reactor, reactor)
        registries = Registries(settings.allow_upstreams, self._registry)
        self._cache = PullThrough(self._store, registries, reactor)
        v2 = V2(self._cache, Listings(self._store, registries, reactor), settings.default_ns)
        self._site = RegistrySite(v2, self._cache, self._started, settings.pull_timeout, reactor)

    def _registry(self, upstream: Upstream) -> Registry:
        reactor = self._reactor
        settings = self._settings.registries.get(upstream, RegistrySettings(upstream))
        pool = HTTPConnectionPool(reactor)
        pool.maxPersistentPerHost = self._settings.max_connections
        agent = Agent(reactor, UpstreamTLS(), connectTimeout=_DIAL, pool=pool)
        exchanges = Exchanges(str(upstream), agent, pool.closeCachedConnections, reactor)
        client = Client(upstream, settings.scheme, exchanges, plain_allowed(reactor.nameResolver), reactor)
        return Registry(upstream, client, self._settings.max_connections, reactor)

    def setServiceParent(self, parent: IService) -> None:
        """Also sets the observer that twistd will log with: its own, behind `--log-level`."""
        super().setServiceParent(parent)
        if isinstance(parent, Componentized):
            observer = UnixAppLogger(self._twistd_options)._getLogObserver()
            if not ILogObserver.providedBy(observer):
                observer = LegacyLogObserverWrapper(observer)
            leveled = FilteringLogObserver(observer, [AtLeast(self._settings.log_level)])
            parent.setComponent(ILogObserver, leveled)

    def privilegedStartService(self) -> None:
        """Listens. A port that cannot be had ends the process with exit status 1."""
        # A node that starts opens many connections at once; with Twisted's 50 in waiting some would wait a second.
        endpoints = self._settings.listen or (f"tcp:{self._settings.port}:backlog=1024",)
        for endpoint in endpoints:
            failures: list[Failure] = []
            try:
                listening = serverFromString(self._reactor, endpoint).listen(self._site)
                listening.addCallbacks(self._ports.append, failures.append)
            except Exception:
                failures.append(Failure())
            for failure in failures:
                error = failure.value
                self._give_up(f"cannot listen on {endpoint}: {getattr(error, 'socketError', error)}")

    def startService(self) -> None:
        """Reads the store; then what has queued at the port is answered."""
        super().startService()
        _take_all_file_descriptors()
        try:
            self._store.start()
        except OSError as error:
            self._give_up(f"cannot use the store {self._settings.image_path}: {error}")
        counts = self._store.counts
        self.log.info(
            "ociregistry {version} started at {started}, listening on {addresses}, "
            "store {store} with {lists} lists and {images} images",
            version=__version__,
            started=self._started.isoformat(timespec="seconds"),
            addresses=", ".join(_address(port) for port in self._ports),
            store=self._settings.image_path,
            lists=counts.lists,
            images=counts.images,
            **ALWAYS,
        )

    def _give_up(self, message: str) -> NoReturn:
        self.log.error("{why}", why=message)
        if self._twistd_options.get("statusPipe") is not None:
            # The process that was started, and waits for word from the daemon that it became.
            raise RuntimeError(message)
        pid_file = self._twistd_options.get("pidfile")
        if pid_file:
            Path(pid_file).unlink(missing_ok=True)
        _exit(message, 1)

    def stopService(self) -> Deferred[None]:
        """Takes no new connection, lets requests in flight end, then stops the rest."""
        super().stopService()
        return Deferred.fromCoroutine(self._stop())

    async def _stop(self) -> None:
        for port in self._ports:
            port.stopListening()
        try:
            await self._site.traffic.idle().addTimeout(_DRAIN, self._reactor)
        except defer.TimeoutError:
            self.log.warn("stopping with requests in flight after {seconds:.0f} s", seconds=_DRAIN)
        await self._cache.stop()
        self._store.stop()


def _take_all_file_descriptors() -> None:
    # Each client takes one or two; the customary soft limit of 1024 is for programs that use select().
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _address(port: IListeningPort) -> str:
    address = port.getHost()
    return f"{address.host}:{address.port}" if isinstance(address, IPv4Address | IPv6Address) else str(address)
