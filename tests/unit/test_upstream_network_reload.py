"""A reload while a request is in flight: what it asked before counts no more."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import pytest
from twisted.internet.defer import Deferred, maybeDeferred
from twisted.internet.interfaces import ITCPTransport
from twisted.internet.protocol import Factory, Protocol

from ociregistry.errors import Unavailable
from ociregistry.names import Upstream
from ociregistry.upstream.network import Network
from tests.unit.support.common import REACTOR, image, on_reactor, until
from tests.unit.support.http_agents import INSTANCE
from tests.unit.test_upstream_network import configured, entry


def probes() -> list[object]:
    """Return the probes that are due some time."""
    return [call for call in REACTOR.getDelayedCalls() if "_Probing" in getattr(call.func, "__qualname__", "")]


@pytest.mark.parametrize("reload", [False, True])
@on_reactor
async def test_request_of_before_a_reload_has_its_host_not_probed(reload: bool) -> None:
    """The host may not be allowed any more, or the server be air-gapped."""
    connected: list[Protocol] = []

    class Silent(Protocol):
        def connectionMade(self) -> None:
            connected.append(self)

    port = REACTOR.listenTCP(0, Factory.forProtocol(Silent), interface="127.0.0.1")
    upstream = Upstream(f"127.0.0.1:{port.getHost().port}")
    settings = configured(entry(str(upstream), scheme="https"))
    network = Network(settings, INSTANCE, REACTOR)
    network.startService()
    try:
        asked = Deferred.fromCoroutine(network.registry(upstream).manifest(image(f"{upstream}/team/app:1")))
        await until(lambda: connected)
        if reload:
            network.reconfigure(replace(settings, air_gapped=True))
        await maybeDeferred(port.stopListening)
        for connection in connected:
            # During the handshake: the host counts as down.
            cast(ITCPTransport, connection.transport).abortConnection()
        with pytest.raises(Unavailable):
            await asked
        assert len(probes()) == (not reload)
    finally:
        network.stopService()
    assert probes() == []
