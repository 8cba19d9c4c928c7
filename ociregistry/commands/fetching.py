"""Opens the store for a command, and what fetches for it: the daemon on the same store, or this process."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from ociregistry.errors import Denied
from ociregistry.names import Upstream
from ociregistry.pullthrough.cache import Policy, PullThrough
from ociregistry.pullthrough.fetchers import CacheFetcher, DaemonFetcher, Fetcher
from ociregistry.pullthrough.listings import Listings
from ociregistry.settings import Settings
from ociregistry.store.store import Store
from ociregistry.store.workdir import find_daemon
from ociregistry.upstream.daemon_client import DaemonClient
from ociregistry.upstream.network import Network, Registries, check_allowed
from ociregistry.via import new_instance


@asynccontextmanager
async def opened_store(settings: Settings, reactor: Any, *, adopts: bool) -> AsyncIterator[Store]:
    """The store, while the block runs; who `adopts` goes on with downloads that broke off. Raises `OSError`."""
    store = Store(settings.image_path, reactor, reactor, reserve=settings.reserve)
    store.start(adopts=adopts)
    try:
        yield store
    finally:
        store.stop()


def daemon_runs(settings: Settings) -> bool:
    """Whether a daemon runs on the store. Raises `OSError`."""
    control_socket = find_daemon(settings.image_path)
    if control_socket is not None:
        control_socket.close()
    return control_socket is not None


def _check(settings: Settings, upstream: Upstream) -> None:
    """What this command was told holds for it, whatever the daemon may do."""
    if settings.air_gapped:
        raise Denied(f"{upstream}: it is not in the store, and this command is air-gapped")
    check_allowed(upstream, settings.allow_upstreams)


@asynccontextmanager
async def open_fetcher(store: Store, settings: Settings, reactor: Any) -> AsyncIterator[Fetcher]:
    """Who brings images into `store` while the block runs; raises `OSError`."""
    control_socket = find_daemon(settings.image_path)
    if control_socket is not None:
        daemon = DaemonClient(control_socket.path, new_instance(), reactor)
        try:
            yield DaemonFetcher(store, daemon, settings.pull_timeout, reactor, partial(_check, settings))
        finally:
            await daemon.stop()
            control_socket.close()
        return
    network = Network(settings, new_instance(), reactor)
    registries = Registries(settings.allow_upstreams, network.registry)
    cache = PullThrough(store, registries, reactor, Policy(air_gapped=settings.air_gapped))
    listings = Listings(store, registries, reactor, air_gapped=settings.air_gapped)
    network.start()
    try:
        yield CacheFetcher(cache, listings, settings.pull_timeout, reactor)
    finally:
        await cache.stop()
        network.stop()
