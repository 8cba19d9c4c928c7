"""The User-Agent header: every request carries it, as some registries demand."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack

import pytest
import pytest_twisted

from ociregistry import __version__
from ociregistry.config.registries import IdentityToken, Login, Mirror, Password
from ociregistry.names import Digest, Upstream
from ociregistry.upstream.network import Network
from ociregistry.upstream.registry import Registry
from tests.images import make_image
from tests.unit.support.common import REACTOR, image, manifest, on_reactor
from tests.unit.support.http_agents import INSTANCE
from tests.unit.test_upstream_network import configured, entry
from tests.upstream import ScriptedRegistry
from tests.upstream_auth import Tokens
from tests.upstream_rules import NeedUserAgent, Redirect, Reply

BUILT = make_image("user agent", layers=1)
IMAGE = manifest(BUILT)
LAYER = BUILT.layers[0]
USER = Password("user", "s3cret")


class CheckedRegistries:
    """A registry with mirror, storage and token service, all refusing requests without User-Agent."""

    def __init__(self, stack: ExitStack) -> None:
        self.own, self.mirror, self.storage, self.service = (
            stack.enter_context(ScriptedRegistry()) for _ in range(4)
        )

    def guard(self) -> None:
        """Add the check to each; call last, so that it precedes all other rules."""
        for registry in self.all:
            registry.script("*", NeedUserAgent())

    @property
    def all(self) -> tuple[ScriptedRegistry, ...]:
        """Return all four registries."""
        return self.own, self.mirror, self.storage, self.service

    @property
    def sent(self) -> set[tuple[str, ...]]:
        """Return the User-Agent values of all requests."""
        return {request.values("User-Agent") for registry in self.all for request in registry.requests}


@pytest.fixture
def checked_registries() -> Iterator[CheckedRegistries]:
    """Return the running registries."""
    with ExitStack() as stack:
        yield CheckedRegistries(stack)


@pytest_twisted.async_yield_fixture
async def started() -> AsyncIterator[list[Network]]:
    """Return the list of networks to stop at the end."""
    networks: list[Network] = []
    yield networks
    for network in networks:
        network.stopService()


async def pull(registry: Registry, name: str) -> None:
    """Request the image by tag and digest, by GET and HEAD, and one of its layers."""
    tagged = image(f"{name}/team/app:1")
    assert await registry.manifest(tagged) == IMAGE
    assert await registry.manifest(image(f"{name}/team/app@{IMAGE.digest}")) == IMAGE
    assert await registry.manifest_digest(tagged) == IMAGE.digest
    digest = Digest(LAYER.digest)
    assert await registry.blob_size(tagged.repository, digest) == len(LAYER.data)
    stream = await registry.blob(tagged.repository, digest)
    data = bytearray()
    while piece := await stream.body.read():
        data += piece
    assert bytes(data) == LAYER.data


@pytest.mark.parametrize("login", [None, USER, IdentityToken("s3cret")], ids=["anonymous", "password", "token"])
@on_reactor
async def test_user_agent_on_every_request(
    checked_registries: CheckedRegistries, started: list[Network], login: Login | None
) -> None:
    tokens = Tokens(f"{checked_registries.service.url}/token", users={} if login is None else {"user": "s3cret"})
    checked_registries.own.add("team/app", BUILT, "1")
    checked_registries.storage.add("team/app", BUILT)
    checked_registries.own.script("*/blobs/*", Redirect(checked_registries.storage.url))
    checked_registries.own.script("*", tokens)
    checked_registries.mirror.script("*", Reply(404))
    checked_registries.service.script("*", tokens)
    checked_registries.guard()
    mirrors = (Mirror("http", Upstream(checked_registries.mirror.host)),)
    service = Upstream(checked_registries.service.host)
    own = entry(checked_registries.own.host, scheme="http", mirrors=mirrors, realm=service, login=login)
    network = Network(configured(own, entry(checked_registries.storage.host)), INSTANCE, REACTOR)
    network.startService()
    started.append(network)
    await pull(network.registry(Upstream(checked_registries.own.host)), checked_registries.own.host)
    asked = {(request.method, request.path.split("/")[-2]) for request in checked_registries.own.requests}
    assert asked == {(method, kind) for method in ("GET", "HEAD") for kind in ("manifests", "blobs")}
    assert [request.method for request in checked_registries.storage.requests] == ["HEAD", "GET"]
    assert {request.method for request in checked_registries.service.requests} == {
        "POST" if isinstance(login, IdentityToken) else "GET"
    }
    assert checked_registries.mirror.requests
    assert checked_registries.sent == {(f"ociregistry/{__version__}",)}


@on_reactor
async def test_user_agent_on_requests_to_mirrors(
    checked_registries: CheckedRegistries, started: list[Network]
) -> None:
    checked_registries.mirror.add("team/app", BUILT, "1")
    checked_registries.guard()
    own = entry("far.example", mirrors=(Mirror("http", Upstream(checked_registries.mirror.host)),))
    network = Network(configured(own), INSTANCE, REACTOR)
    network.startService()
    started.append(network)
    await pull(network.registry(Upstream("far.example")), "far.example")
    assert checked_registries.sent == {(f"ociregistry/{__version__}",)}
