"""Opens the store and a fetcher for a command: the daemon on the same store fetches if it runs, else this process."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from ociregistry.composition import make_store, put_together, stop_in_turn
from ociregistry.context import new_instance
from ociregistry.errors import AirGapped
from ociregistry.names import Upstream
from ociregistry.pullthrough.fetchers import CacheFetcher, DaemonFetcher, Fetcher
from ociregistry.settings import Settings
from ociregistry.store.store import Store
from ociregistry.store.workdir import find_daemon
from ociregistry.upstream.daemon_client import DaemonClient
from ociregistry.upstream.network import check_allowed


@asynccontextmanager
async def opened_store(settings: Settings, reactor: Any, *, adopts: bool) -> AsyncIterator[Store]:
    """Open the store while the block runs.

    With `adopts`, resume the downloads that ended processes left behind.

    Raises:
        OSError: the store cannot be read or written.
    """
    store = make_store(settings, reactor, adopts=adopts)
    store.startService()
    try:
        yield store
    finally:
        store.stopService()


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
    # What the store has is not loaded again, as beside a daemon.
    parts = put_together(replace(settings, always_pull_latest=False), store, reactor)
    parts.network.startService()
    try:
        yield CacheFetcher(parts.cache, parts.listings, settings.pull_timeout, reactor)
    finally:
        await stop_in_turn((parts.cache, parts.network))
