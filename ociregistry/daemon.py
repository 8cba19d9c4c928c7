"""The daemon: builds its parts from the settings, starts them, reloads their settings and stops them."""

from __future__ import annotations

import signal
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

from twisted.application.service import IService, Service
from twisted.internet import defer
from twisted.internet.address import IPv4Address, IPv6Address
from twisted.internet.defer import Deferred, DeferredLock
from twisted.internet.endpoints import serverFromString
from twisted.internet.error import CannotListenError
from twisted.internet.interfaces import IListeningPort, IProtocolFactory
from twisted.internet.threads import deferToThreadPool
from twisted.logger import FilteringLogObserver, ILogObserver, LegacyLogObserverWrapper, Logger
from twisted.protocols.tls import TLSMemoryBIOFactory
from twisted.python import usage
from twisted.python.components import Componentized
from twisted.python.failure import Failure
from twisted.scripts._twistd_unix import UnixAppLogger

from ociregistry import __version__
from ociregistry.config.nodes import ConfigInvalid
from ociregistry.context import new_instance
from ociregistry.log import ALWAYS, AtLeast
from ociregistry.platforms import Platform
from ociregistry.process import exit_with, take_all_file_descriptors
from ociregistry.pullthrough.cache import Policy, PullThrough
from ociregistry.pullthrough.completion import Completion, CompletionPolicy
from ociregistry.pullthrough.demand import Demand
from ociregistry.pullthrough.fetchers import BackgroundFetcher
from ociregistry.pullthrough.listings import Listings
from ociregistry.pullthrough.loader import Loader, NullProgress, Preloader, read_image_list
from ociregistry.pullthrough.maintenance import Maintenance, Repairer
from ociregistry.pullthrough.metadata import Metadata
from ociregistry.settings import Settings
from ociregistry.store.store import Store
from ociregistry.store.workdir import ControlSocket
from ociregistry.systemd import Systemd
from ociregistry.upstream.network import Network, Registries
from ociregistry.web.api import V2, health
from ociregistry.web.channel import ServerPolicy
from ociregistry.web.site import RegistrySite

_DRAIN = 30.0
"""Seconds that requests in flight get to end when the daemon stops."""

_AT_NEXT_START = (
    *("image_path", "port", "listen", "pull_timeout"),
    *("always_pull_latest", "air_gapped", "complete_images", "complete_metadata", "complete_platforms"),
    *("preload_images", "concurrent", "platform", "with_signatures"),
)
"""Settings that a reload does not change; they take effect at the next start."""


class Daemon(Service):
    """The service that listens for clients and, when stopped, lets requests in flight end first."""

    log = Logger(namespace="ociregistry")

    def __init__(
        self, settings: Settings, load: Callable[[], Settings], reactor: Any, twistd_options: usage.Options
    ) -> None:
        """Build the parts; nothing is opened or started yet.

        `load` reads the settings again for a reload; it raises `ConfigInvalid`. `twistd_options` are the options
        of twistd itself, such as the log file and the pid file.
        """
        self._settings = settings
        self._load = load
        self._reactor = reactor
        self._twistd_options = twistd_options
        self._started = datetime.now(UTC)
        self._ports: list[IListeningPort] = []
        self._control: tuple[ControlSocket, IListeningPort] | None = None
        """The control socket, through which commands on the same store reach the daemon, and its port."""
        self._reloading = DeferredLock()
        self._systemd = Systemd(reactor)
        self._level = AtLeast(settings.log_level)
        self._tls = ServerPolicy(settings.tls) if settings.tls else None
        self._store = Store(settings.image_path, reactor, reactor, reserve=settings.reserve)
        instance = new_instance()
        self._network = Network(settings, instance, reactor)
        self._registries = Registries(settings.allow_upstreams, self._network.registry)
        policy = Policy(settings.always_pull_latest, settings.air_gapped)
        self._cache = PullThrough(self._store, self._registries, reactor, policy)
        completes = settings.complete_images and not settings.air_gapped
        self._completion = Completion(
            self._store,
            self._cache.fetch,
            reactor,
            Metadata(self._store, self._cache, reactor) if completes else None,
            CompletionPolicy(
                images=completes,
                metadata=settings.complete_metadata,
                platforms=settings.complete_platforms,
            ),
        )
        machine = Platform(settings.os, settings.arch)
        self._demand = Demand(self._store, self._completion, machine, reactor)
        listings = Listings(self._store, self._registries, reactor)
        self._v2 = V2(self._cache, listings, self._demand, settings.default_ns, instance)
        background = BackgroundFetcher(self._cache, listings, settings.pull_timeout, reactor)
        self._maintenance = Maintenance(self._store, self._cache, Repairer(self._store, background), reactor)
        self._preloader = self._preload(settings, background)
        answers = health(
            lambda: self._store.counts,
            lambda: self._completion.incomplete,
            lambda: self._preloader.progress if self._preloader else None,
            lambda: self._store.room,
            self._started,
        )
        self._site = RegistrySite(self._v2, answers, settings.pull_timeout, reactor)

    def _preload(self, settings: Settings, background: BackgroundFetcher) -> Preloader | None:
        path = settings.preload_images
        if path is None:
            return None
        loader = Loader(
            self._store,
            background,
            settings.platform,
            signatures=settings.with_signatures,
            concurrent=settings.concurrent,
            # As few connections as images, so that connections stay free for clients.
            connections=settings.concurrent,
            progress=NullProgress(),
            clock=self._reactor,
        )
        pool = self._reactor.getThreadPool()
        return Preloader(lambda: deferToThreadPool(self._reactor, pool, read_image_list, path), loader, self._reactor)

    def setServiceParent(self, parent: IService) -> None:
        """Attach to the application, and put the `--log-level` filter before the log observer of twistd."""
        super().setServiceParent(parent)
        if isinstance(parent, Componentized):
            observer = UnixAppLogger(self._twistd_options)._getLogObserver()
            if not ILogObserver.providedBy(observer):
                observer = LegacyLogObserverWrapper(observer)
            leveled = FilteringLogObserver(observer, [self._level])
            parent.setComponent(ILogObserver, leveled)

    def privilegedStartService(self) -> None:
        """Listen on all endpoints; if one fails, end the process with exit status 1."""
        # A starting node opens many connections at once. With Twisted's backlog of 50, some would be delayed 1 s.
        endpoints = self._settings.listen or (f"tcp:{self._settings.port}:backlog=1024",)
        factory: IProtocolFactory = self._site
        if self._tls is not None:
            factory = TLSMemoryBIOFactory(self._tls, False, self._site)
        for endpoint in endpoints:
            failures: list[Failure] = []
            try:
                listening = serverFromString(self._reactor, endpoint).listen(factory)
                listening.addCallbacks(self._ports.append, failures.append)
            except Exception:
                failures.append(Failure())
            for failure in failures:
                error = failure.value
                self._give_up(f"cannot listen on {endpoint}: {getattr(error, 'socketError', error)}")

    def startService(self) -> None:
        """Read the store and start all parts; connections wait in the backlog until then."""
        super().startService()
        # Each client needs one or two.
        take_all_file_descriptors()
        try:
            self._store.start()
            self._listen_on_control_socket()
        except OSError as error:
            self._give_up(f"cannot use the store {self._settings.image_path}: {error}")
        self._network.start()
        self._maintenance.reconfigure(self._settings.prune, self._settings.verify)
        if self._preloader is not None:
            self._preloader.start()
        self._completion.start()
        self._demand.start()
        signal.signal(signal.SIGHUP, self._hung_up)
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
        self._warn(self._settings)
        self._systemd.ready()

    def _listen_on_control_socket(self) -> None:
        """Let commands on the same store pull through this process, so that nothing is fetched twice."""
        try:
            control_socket = self._store.control_socket()
        except OSError as error:
            self._cannot_listen_on_control_socket(error)
            return
        try:
            self._control = control_socket, self._reactor.listenUNIX(control_socket.path, self._site, mode=0o600)
        except CannotListenError as error:
            control_socket.close()
            self._cannot_listen_on_control_socket(error.socketError)

    def _cannot_listen_on_control_socket(self, why: Exception) -> None:
        self.log.error("control socket unavailable, commands cannot download through this daemon: {why}", why=why)

    def _warn(self, settings: Settings) -> None:
        for warning in settings.warnings:
            self.log.warn("{warning}", warning=warning, **ALWAYS)

    def _hung_up(self, signal: object, frame: object) -> None:
        self._reactor.callFromThread(self.reload)

    def reload(self) -> Deferred[None]:
        """Read the settings again, in a thread, and apply them; keep the old ones if they are invalid."""
        reloaded = self._reloading.run(lambda: Deferred.fromCoroutine(self._reload()))
        reloaded.addErrback(lambda failure: self.log.failure("a defect in reloading the settings", failure))
        return reloaded.addCallback(lambda _: self._systemd.reloaded())

    async def _reload(self) -> None:
        self._systemd.reloading()
        try:
            settings = await deferToThreadPool(self._reactor, self._reactor.getThreadPool(), self._load)
        except ConfigInvalid as error:
            self.log.error("reload failed, settings unchanged: {why}", why=error)
            return
        self._reconfigure(settings)

    def _reconfigure(self, settings: Settings) -> None:
        if self._tls is not None and settings.tls is not None:
            self._tls.reconfigure(settings.tls)
        self._level.reconfigure(settings.log_level)
        self._network.reconfigure(settings)
        self._store.reconfigure(settings.reserve)
        self._registries.reconfigure(settings.allow_upstreams)
        self._v2.reconfigure(settings.default_ns)
        self._maintenance.reconfigure(settings.prune, settings.verify)
        self.log.info(
            "settings reloaded: {upstreams} upstreams configured",
            upstreams=len(settings.registries),
            **ALWAYS,
        )
        self._warn(settings)
        late = [key for key in _AT_NEXT_START if getattr(settings, key) != getattr(self._settings, key)]
        late += ["tls"] if (settings.tls is None) != (self._tls is None) else []
        if late:
            self.log.warn("{keys}: changes take effect at the next start", keys=", ".join(late), **ALWAYS)

    def _give_up(self, message: str) -> NoReturn:
        self.log.error("{why}", why=message)
        if self._twistd_options.get("statusPipe") is not None:
            # The parent process of the fork waits at this pipe; an exception makes twistd report there.
            raise RuntimeError(message)
        pid_file = self._twistd_options.get("pidfile")
        if pid_file:
            Path(pid_file).unlink(missing_ok=True)
        exit_with(message, 1)

    def stopService(self) -> Deferred[None]:
        """Stop listening, let requests in flight end for at most `_DRAIN` seconds, then stop the other parts."""
        super().stopService()
        self._systemd.stopping()
        return Deferred.fromCoroutine(self._stop())

    async def _stop(self) -> None:
        for port in self._ports:
            port.stopListening()
        if self._control is not None:
            control_socket, port = self._control
            await defer.maybeDeferred(port.stopListening)
            control_socket.close()
        try:
            await self._site.traffic.idle().addTimeout(_DRAIN, self._reactor)
        except defer.TimeoutError:
            self.log.warn("stopping with requests in flight after {seconds:.0f} s", seconds=_DRAIN)
        self._maintenance.stop()
        if self._preloader is not None:
            self._preloader.stop()
        self._demand.stop()
        self._completion.stop()
        await self._cache.stop()
        self._network.stop()
        self._store.stop()
        self._systemd.stopped()


def _address(port: IListeningPort) -> str:
    address = port.getHost()
    return f"{address.host}:{address.port}" if isinstance(address, IPv4Address | IPv6Address) else str(address)
