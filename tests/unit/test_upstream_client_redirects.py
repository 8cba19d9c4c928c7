"""Upstream access assembled from the settings, over real connections."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ociregistry.config.registries import Helper, Mirror, Password, RegistrySettings
from ociregistry.config.tls import UpstreamTls
from ociregistry.errors import Denied, ManifestUnknown, Unavailable
from ociregistry.manifests import Manifest
from ociregistry.names import Upstream
from ociregistry.upstream.network import Network
from tests.certificates import Authority
from tests.images import make_image
from tests.unit.support.common import REACTOR, image, manifest, on_reactor
from tests.unit.support.http_agents import INSTANCE
from tests.unit.test_upstream_network import configured, entry
from tests.unit.test_upstream_tls import certificates, key_pair
from tests.upstream import ScriptedRegistry
from tests.upstream_auth import Basic, Tokens
from tests.upstream_rules import Redirect, Reply

BUILT = make_image("way")
IMAGE = manifest(BUILT)

Make = Callable[..., Network]


@pytest.fixture
def make_network() -> Iterator[Make]:
    """Return a function that creates networks from configuration entries."""
    made: list[Network] = []

    def make(*entries: RegistrySettings) -> Network:
        made.append(Network(configured(*entries), INSTANCE, REACTOR))
        made[-1].startService()
        return made[-1]

    yield make
    for network in made:
        network.stopService()


async def get(network: Network, host: str) -> Manifest:
    """Request the manifest of an image."""
    return await network.registry(Upstream.parse(host)).manifest(image(f"{host}/team/app:1"))


def named(upstream: ScriptedRegistry, **how: Any) -> RegistrySettings:
    """Return a configuration entry for a registry."""
    return entry(upstream.host, **how)


@on_reactor
async def test_configured_upstream_may_be_local(make_network: Make, upstream: ScriptedRegistry) -> None:
    upstream.add("team/app", BUILT, "1")
    assert await get(make_network(named(upstream)), upstream.host) == IMAGE
    assert upstream.requests[0].header("Via") == f"1.1 {INSTANCE}"


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.1", "0x7f000001", "2130706433"])
@on_reactor
async def test_unconfigured_upstream_must_not_be_local(
    make_network: Make, upstream: ScriptedRegistry, host: str
) -> None:
    with pytest.raises(Denied, match=f"{host} has the loopback address .*1, and only what is named"):
        await get(make_network(), f"{host}:{upstream.port}")
    assert upstream.connections == 0


@on_reactor
async def test_redirect_to_unconfigured_local_address_is_refused(
    make_network: Make, upstream: ScriptedRegistry
) -> None:
    with ScriptedRegistry() as other:
        upstream.script("*", Redirect(other.url))
        with pytest.raises(Denied, match="loopback"):
            await get(make_network(named(upstream)), upstream.host)
        assert other.connections == 0
        other.add("team/app", BUILT, "1")
        assert await get(make_network(named(upstream), named(other)), upstream.host) == IMAGE


@on_reactor
async def test_unconfigured_local_token_service_is_refused(make_network: Make, upstream: ScriptedRegistry) -> None:
    with ScriptedRegistry() as service:
        tokens = Tokens(f"{service.url}/token")
        upstream.add("team/app", BUILT, "1")
        upstream.script("*", tokens)
        service.script("*", tokens)
        with pytest.raises(Denied, match="loopback"):
            await get(make_network(named(upstream)), upstream.host)
        assert service.connections == 0
        assert await get(make_network(named(upstream, realm=Upstream(service.host))), upstream.host) == IMAGE


@on_reactor
async def test_mirror_uses_its_own_entry(make_network: Make) -> None:
    with ScriptedRegistry() as mirror:
        mirror.add("team/app", BUILT, "1")
        mirror.script("*", Basic({"user": "s3cret"}))
        mirrored = RegistrySettings(
            Upstream("far.example"), mirrors=(Mirror("http", Upstream(mirror.host)),), login=Password("far", "wrong")
        )
        network = make_network(mirrored, named(mirror, login=Password("user", "s3cret")))
        assert await get(network, "far.example") == IMAGE
        assert [request.parameters("ns") for request in mirror.requests] == [("far.example",)] * 2


@on_reactor
async def test_error_body_of_mirror_frees_the_connection(make_network: Make, upstream: ScriptedRegistry) -> None:
    upstream.add("team/app", BUILT, "1")
    with ScriptedRegistry() as mirror:
        mirror.script("*", Reply(404, b"not here" * 1000))
        network = make_network(named(upstream, mirrors=(Mirror("http", Upstream(mirror.host)),)))
        registry = network.registry(Upstream(upstream.host))
        for _ in range(3):
            assert await registry.manifest(image(f"{upstream.host}/team/app:1")) == IMAGE
        assert (len(mirror.requests), mirror.connections) == (3, 1)


@on_reactor
async def test_mirror_without_an_entry(make_network: Make, upstream: ScriptedRegistry) -> None:
    upstream.add("team/app", BUILT, "1")
    mirrors = (Mirror("http", Upstream(upstream.host)),)
    assert await get(make_network(entry("far.example", mirrors=mirrors)), "far.example") == IMAGE


@on_reactor
async def test_password_and_helper(
    make_network: Make, upstream: ScriptedRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "docker-credential-way"
    program.write_text('#!/bin/sh\nprintf \'{"Username": "user", "Secret": "s3cret"}\'\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    upstream.add("team/app", BUILT, "1")
    upstream.script("*", Basic({"user": "s3cret"}))
    for login in (Password("user", "s3cret"), Helper("way")):
        assert await get(make_network(named(upstream, scheme="http", login=login)), upstream.host) == IMAGE
    with pytest.raises(ManifestUnknown):
        await get(make_network(named(upstream, scheme="http", login=Password("user", "wrong"))), upstream.host)


@on_reactor
async def test_credentials_are_not_sent_over_plain_http(make_network: Make, upstream: ScriptedRegistry) -> None:
    with pytest.raises(Unavailable, match="TLS failed"):
        await get(make_network(named(upstream, login=Password("user", "s3cret"))), upstream.host)
    assert upstream.requests == ()


@on_reactor
async def test_token_service_on_own_host_gets_credentials(make_network: Make, upstream: ScriptedRegistry) -> None:
    upstream.add("team/app", BUILT, "1")
    upstream.script("*", Tokens(f"{upstream.url}/token", users={"user": "s3cret"}))
    network = make_network(named(upstream, scheme="http", login=Password("user", "s3cret")))
    assert await get(network, upstream.host) == IMAGE


@on_reactor
async def test_client_certificate_is_sent_to_the_upstream(make_network: Make, authority: Authority) -> None:
    context = authority.server_context("127.0.0.1", demand_client=True)
    client = key_pair(authority.issue("client"))
    trust = UpstreamTls(certificates(authority.ca))
    with ScriptedRegistry(tls=context) as demanding:
        demanding.add("team/app", BUILT, "1")
        assert await get(make_network(named(demanding, tls=replace(trust, client=client))), demanding.host) == IMAGE
        with pytest.raises(Unavailable):
            await get(make_network(named(demanding, tls=trust)), demanding.host)


@on_reactor
async def test_new_settings_apply_to_new_registries(make_network: Make, upstream: ScriptedRegistry) -> None:
    network = make_network()
    old = network.registry(Upstream(upstream.host))
    network.reconfigure(configured(named(upstream)))
    upstream.script("*", Reply(404))
    with pytest.raises(ManifestUnknown):
        await get(network, upstream.host)
    with pytest.raises(Denied):
        await old.manifest(image(f"{upstream.host}/team/app:1"))
