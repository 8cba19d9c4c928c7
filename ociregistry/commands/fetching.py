"""Opens the store and a fetcher for a command: the daemon on the same store fetches if it runs, else this process."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from ociregistry.context import new_instance
from ociregistry.errors import AirGapped
from ociregistry.names import Upstream
from ociregistry.pullthrough.cache import Policy, PullThrough
from ociregistry.pullthrough.fetchers import CacheFetcher, DaemonFetcher, Fetcher
from ociregistry.pullthrough.listings import Listings
from ociregistry.settings import Settings
from ociregistry.store.store import Store
from ociregistry.store.workdir import find_daemon
from ociregistry.upstream.daemon_client import DaemonClient
from ociregistry.upstream.network import Network, Registries, check_allowed


@asynccontextmanager
async def opened_store(settings: Settings, reactor: Any, *, adopts: bool) -> AsyncIterator[Store]:
    """Open the store while the block runs.

    With `adopts`, resume the downloads that ended processes left behind.

    Raises:
        OSError: the store cannot be read or written.
    """
    store = Store(settings.image_path, reactor, reactor, reserve=settings.reserve)
    store.start(adopts=adopts)
    try:
        yield store
    finally:
        store.stop()


def daemon_runs(settings: Settings) -> bool:
    """Tell whether a daemon runs on the store.

    Raises:
        OSError: the control sockets of the store cannot be examined.
    """
    control_socket = find_daemon(settings.image_path)
    if control_socket is not None:
        control_socket.close()
    return control_socket is not None


def _check(settings: Settings, upstream: Upstream) -> None:
    """Apply this command's own settings to a fetch by the daemon, whose settings may allow more.

    Raises:
        AirGapped: this command asks no upstream.
        Denied: its settings do not allow the upstream.
    """
    if settings.air_gapped:
        raise AirGapped(f"{upstream}: it is not in the store, and this command is air-gapped")
    check_allowed(upstream, settings.allow_upstreams)


@asynccontextmanager
async def open_fetcher(store: Store, settings: Settings, reactor: Any) -> AsyncIterator[Fetcher]:
    """Open a fetcher that brings images into `store` while the block runs.

    It uses the daemon on the same store if one runs, else connections of this process.

    Raises:
        OSError: the control sockets of the store cannot be examined.
    """
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
    listings = Listings(store, registries, reactor)
    network.start()
    try:
        yield CacheFetcher(cache, listings, settings.pull_timeout, reactor)
    finally:
        await cache.stop()
        network.stop()
