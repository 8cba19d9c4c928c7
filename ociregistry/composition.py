"""Puts the parts of the cache together from the settings, for the daemon and for the commands."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from twisted.application.service import IService
from twisted.internet.defer import maybeDeferred

from ociregistry.context import new_instance
from ociregistry.pullthrough.cache import Policy, PullThrough
from ociregistry.pullthrough.listings import Listings
from ociregistry.settings import Settings
from ociregistry.store.store import Store
from ociregistry.upstream.network import Network, Registries


@dataclass(frozen=True, slots=True)
class Parts:
    """The cache, and the parts that it is made of. Start the store, the network and the cache in this order."""

    store: Store
    network: Network
    registries: Registries
    cache: PullThrough
    listings: Listings
    instance: str
    """The name of this process in Via headers."""


def make_store(settings: Settings, reactor: Any, *, adopts: bool = True) -> Store:
    """Make the store; with `adopts`, its start takes over the downloads that ended processes left behind."""
    return Store(settings.image_path, reactor, reactor, reserve=settings.reserve, adopts=adopts)


def put_together(settings: Settings, store: Store, reactor: Any) -> Parts:
    """Make the cache over `store`; nothing is opened or started yet."""
    instance = new_instance()
    network = Network(settings, instance, reactor)
    registries = Registries(settings.allow_upstreams, network.registry)
    policy = Policy(settings.always_pull_latest, settings.air_gapped)
    cache = PullThrough(store, registries, reactor, policy)
    return Parts(store, network, registries, cache, Listings(store, registries, reactor), instance)


async def stop_in_turn(services: Iterable[IService]) -> None:
    """Stop each service when the one before it has stopped."""
    for service in services:
        await maybeDeferred(service.stopService)
