"""The daemon: builds its parts from the settings, starts them, reloads their settings and stops them."""

from __future__ import annotations

import signal
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from twisted.application.service import IService, MultiService
from twisted.internet import defer
from twisted.internet.defer import Deferred, DeferredLock, gatherResults
from twisted.internet.threads import deferToThreadPool
from twisted.logger import FileLogObserver, ILogObserver, LegacyLogObserverWrapper, Logger, globalLogPublisher
from twisted.protocols.tls import TLSMemoryBIOFactory
from twisted.python import usage
from twisted.python.components import Componentized
from twisted.python.failure import Failure
from twisted.scripts._twistd_unix import UnixAppLogger

from ociregistry import __version__
from ociregistry.admin.errors import RecentErrors
from ociregistry.admin.rates import Rates
from ociregistry.admin.status import Server, StatusReader
from ociregistry.composition import make_store, put_together, stop_in_turn
from ociregistry.concurrency import DaemonThreadPool
from ociregistry.config.files import FileWatcher
from ociregistry.config.nodes import ConfigInvalid
from ociregistry.config.values import count_text
from ociregistry.imagelists.reading import read_image_list
from ociregistry.log import ALWAYS, LevelFilter, ShortNamespaces, writes
from ociregistry.process import (
    exit_with,
    keep_freed_memory,
    let_reactor_handle_interrupts,
    raise_file_descriptor_limit,
    unusable_store,
)
from ociregistry.pullthrough.completion import Completion, CompletionPolicy
from ociregistry.pullthrough.demand import Demand
from ociregistry.pullthrough.fetchers import BackgroundFetcher
from ociregistry.pullthrough.loader import Loader, NullProgress, Preloader
from ociregistry.pullthrough.maintenance import Maintenance, Repairer
from ociregistry.pullthrough.metadata import Metadata
from ociregistry.settings import Settings
from ociregistry.store.scan import collection_paused
from ociregistry.systemd import Systemd
from ociregistry.web.admin import AdminListener, AdminSite, ControlSite, ImageFacts
from ociregistry.web.api import V2, health, probe
from ociregistry.web.channel import ServerPolicy
from ociregistry.web.listeners import ControlListener, Listeners, ListenFailed
from ociregistry.web.site import RegistrySite

_log = Logger(namespace="ociregistry")

T = TypeVar("T")

_DRAIN = 30.0
"""Seconds that requests in flight get to end when the daemon stops."""
_FLUSH = 5.0
"""Seconds that connections then get to send the rest of their last responses."""

_THREADS = 3
"""Threads that read the settings, look at their files, and read a list to preload, until the process ends."""
_AT_NEXT_START = (
    *("image_path", "port", "listen", "admin_listen", "log_format", "pull_timeout"),
    *("always_pull_latest", "air_gapped", "complete_images", "complete_metadata", "complete_platforms"),
    *("preload_images", "concurrent", "platform", "with_signatures"),
)
"""Settings that a reload does not change; they take effect at the next start."""


class Daemon(MultiService):
    """The service that listens for clients and, when stopped, lets requests in flight end first."""

    def __init__(
        self, settings: Settings, load: Callable[[], Settings], reactor: Any, twistd_options: usage.Options
    ) -> None:
        """Build the parts; nothing is opened or started yet.

        `load` reads the settings again for a reload; it raises `ConfigInvalid`. `twistd_options` are the options
        of twistd itself, such as the log file and the pid file.
        """
        super().__init__()
        self._settings = settings
        self._load = load
        self._files = settings.files
        self._reactor = reactor
        self._threads = DaemonThreadPool(_THREADS, "settings")
        self._twistd_options = twistd_options
        self._started = datetime.now(UTC)
        self._reloading = DeferredLock()
        self._reload_failed = ""
        """Why the last reload failed; empty if it did not."""
        self._systemd = Systemd(reactor)
        self._level = LevelFilter(settings.log_level)
        self._tls = ServerPolicy(settings.tls) if settings.tls else None
        self._store = make_store(settings, reactor)
        parts = put_together(settings, self._store, reactor)
        self._network, self._registries = parts.network, parts.registries
        completes = settings.complete_images and not settings.air_gapped
        self._completion = Completion(
            self._store,
            parts.cache.fetch,
            reactor,
            Metadata(self._store, parts.cache, reactor) if completes else None,
            CompletionPolicy(
                images=completes,
                metadata=settings.complete_metadata,
                platforms=settings.complete_platforms,
            ),
        )
        demand = Demand(self._store, self._completion, settings.machine, reactor)
        self._v2 = V2(parts.cache, parts.listings, demand, settings.default_ns, parts.instance)
        background = BackgroundFetcher(parts.cache, parts.listings, settings.pull_timeout, reactor)
        self._maintenance = Maintenance(self._store, parts.cache, Repairer(self._store, background), reactor)
        self._preloader = self._preload(settings, background)
        answers = health(
            lambda: self._store.counts,
            lambda: self._completion.incomplete,
            lambda: self._preloader.progress if self._preloader else None,
            lambda: self._store.room,
            lambda: self._store.faults.sentences,
            self._started,
        )
        level = self._level
        probes = {"livez": probe(), "readyz": probe(lambda: "" if self.running else "stopping")}
        self._site = RegistrySite(
            self._v2,
            {"health": answers, **probes},
            settings.pull_timeout,
            reactor,
            logs_requests=lambda: level.logs_requests,
        )
        factory = TLSMemoryBIOFactory(self._tls, False, self._site) if self._tls is not None else self._site
        self._listeners = Listeners(settings.listen or (settings.port,), factory, reactor)
        self._errors = RecentErrors()
        rates = Rates(
            parts.cache.in_flight.values,
            lambda: sum(self._network.received.values()),
            reactor,
        )
        status = StatusReader(
            self._started,
            str(settings.image_path),
            settings.air_gapped,
            Server(
                lambda: self._listeners.addresses,
                lambda: self._site.in_flight.requests,
                lambda: not self.running,
                lambda: self._reload_failed,
                self._site.requests,
            ),
            self._store,
            self._network,
            parts.cache,
            self._completion,
            self._preloader,
            self._maintenance,
            rates,
            self._errors,
            reactor,
        )
        images = ImageFacts(self._store.listing.list, lambda: self._completion.missing)
        admin = AdminSite(status.read, images, probes, reactor)
        self._admin = AdminListener(settings.admin_listen, admin, reactor)
        self._control = ControlListener(self._store, ControlSite(self._site, admin), reactor)
        preloading = [self._preloader] if self._preloader is not None else []
        working = [self._network, parts.cache, self._completion, demand, *preloading, self._maintenance, rates]
        watcher = FileWatcher(lambda: self._files, self.reload, self._in_thread, reactor)
        for service in (self._listeners, self._admin, self._store, self._control, *working, watcher):
            service.setServiceParent(self)

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
        return Preloader(lambda: self._in_thread(partial(read_image_list, path)), loader, self._reactor)

    def setServiceParent(self, parent: IService) -> None:
        """Attach to the application, and put `--log-level` and `--log-format` before the log's file."""
        super().setServiceParent(parent)
        if isinstance(parent, Componentized):
            # Twisted has no public way to get the observer that twistd's own options ask for.
            observer = UnixAppLogger(self._twistd_options)._getLogObserver()
            if isinstance(observer, FileLogObserver):
                written = writes(observer, self._settings.log_format)
            else:
                # That of syslog.
                written = ShortNamespaces(LegacyLogObserverWrapper(observer))
            parent.setComponent(ILogObserver, self._level.before(written))

    def privilegedStartService(self) -> None:
        """Listen on all endpoints; if one fails, end the process with exit status 1."""
        try:
            super().privilegedStartService()
        except ListenFailed as error:
            self._give_up(str(error))

    def startService(self) -> None:
        """Read the store and start all parts; connections wait in the backlog until then."""
        globalLogPublisher.addObserver(self._errors)
        # Each client needs one or two.
        raise_file_descriptor_limit()
        keep_freed_memory()
        try:
            # The index and the program stay: a collection that goes through them finds nothing, and all wait.
            with collection_paused(for_good=True):
                self._threads.start()
                super().startService()
        except OSError as error:
            self._give_up(unusable_store(self._settings.image_path, error))
        self._maintenance.reconfigure(self._settings.prune, self._settings.verify)
        signal.signal(signal.SIGHUP, self._hung_up)
        # The reactor runs next.
        let_reactor_handle_interrupts()
        counts = self._store.counts
        _log.info(
            "ociregistry {version} started at {started}, listening on {addresses}, store {store} with {what}",
            version=__version__,
            started=self._started.isoformat(timespec="seconds"),
            addresses=", ".join(self._listeners.addresses),
            store=self._settings.image_path,
            what=f"{count_text(counts.lists, 'list')} and {count_text(counts.images, 'image')}",
            lists=counts.lists,
            images=counts.images,
            **ALWAYS,
        )
        for address in self._admin.addresses:
            _log.info("metrics and status at {address}", address=address)
        self._warn(self._settings)
        self._systemd.ready()

    def _warn(self, settings: Settings) -> None:
        for warning in settings.warnings:
            _log.warn("{why}", why=warning, **ALWAYS)

    def _hung_up(self, signal: object, frame: object) -> None:
        self._reactor.callFromThread(self.reload)

    def reload(self) -> Deferred[None]:
        """Read the settings again, in a thread, and apply them; keep the old ones if they are invalid."""
        reloaded = self._reloading.run(lambda: Deferred.fromCoroutine(self._reload()))
        reloaded.addErrback(self._note_defect)
        return reloaded.addCallback(lambda _: self._systemd.reloaded())

    def _note_defect(self, failure: Failure) -> None:
        self._reload_failed = f"a defect in reloading the settings: {type(failure.value).__name__}: {failure.value}"
        _log.failure("a defect in reloading the settings", failure)

    def _in_thread(self, function: Callable[[], T]) -> Deferred[T]:
        return deferToThreadPool(self._reactor, self._threads, function)

    async def _reload(self) -> None:
        self._systemd.reloading()
        try:
            settings = await self._in_thread(self._load)
        except ConfigInvalid as error:
            self._files, self._reload_failed = error.files, str(error)
            _log.error("reload failed, settings unchanged: {why}", why=error)
            return
        self._files, self._reload_failed = settings.files, ""
        self._reconfigure(settings)

    def _reconfigure(self, settings: Settings) -> None:
        if self._tls is not None and settings.tls is not None:
            self._tls.reconfigure(settings.tls)
        self._level.reconfigure(settings.log_level)
        self._network.reconfigure(settings)
        self._store.reconfigure(settings.reserve)
        self._registries.reconfigure(settings.allow_upstreams)
        self._v2.reconfigure(settings.default_ns)
        self._site.hits.forget()
        self._maintenance.reconfigure(settings.prune, settings.verify)
        _log.info(
            "settings reloaded: {what} configured",
            what=count_text(len(settings.registries), "upstream"),
            upstreams=len(settings.registries),
            **ALWAYS,
        )
        self._warn(settings)
        late = [key for key in _AT_NEXT_START if getattr(settings, key) != getattr(self._settings, key)]
        late += ["tls"] if (settings.tls is None) != (self._tls is None) else []
        if late:
            _log.warn("{keys}: changes take effect at the next start", keys=", ".join(late), **ALWAYS)

    def _give_up(self, message: str) -> NoReturn:
        _log.error("{why}", why=message)
        if self._twistd_options.get("statusPipe") is not None:
            # The parent process of the fork waits at this pipe; an exception makes twistd report there.
            raise RuntimeError(message)
        pid_file = self._twistd_options.get("pidfile")
        if pid_file:
            Path(pid_file).unlink(missing_ok=True)
        exit_with(message, 1)

    def stopService(self) -> Deferred[None]:
        """Stop listening, let requests in flight end for at most `_DRAIN` seconds, then stop the other parts."""
        # Not the superclass's: it would stop all parts at the same time.
        self.running = False
        self._systemd.stopping()
        return Deferred.fromCoroutine(self._stop())

    async def _stop(self) -> None:
        await gatherResults([self._listeners.stopService(), self._control.stopService()])
        try:
            await self._site.in_flight.idle().addTimeout(_DRAIN, self._reactor)
        except defer.TimeoutError:
            _log.warn("stopping with requests in flight after {seconds:.0f} s", seconds=_DRAIN)
        # The reactor drops what its transports have not sent when it stops.
        with suppress(defer.TimeoutError):
            await Deferred.fromCoroutine(self._site.in_flight.close()).addTimeout(_FLUSH, self._reactor)
        others = [service for service in reversed(list(self)) if service.running and service is not self._admin]
        # Last, so that the stop can be watched.
        await stop_in_turn([*others, self._admin])
        globalLogPublisher.removeObserver(self._errors)
        self._systemd.stopped()
