"""Upstreams behind a forward proxy: through a real one, whose names nobody else can resolve."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from tests.certificates import Authority
from tests.client import Response, fetch
from tests.images import MIB, Image
from tests.processes import Daemon, wait_until
from tests.real.caches import SOON, assert_error, open_answer, plain_image
from tests.real.completions import log_lines
from tests.tinyproxy import Tinyproxy
from tests.upstream import ScriptedRegistry
from tests.upstream_auth import Tokens
from tests.upstream_rules import Hold, Redirect

REGISTRY, STORAGE = "registry.example", "storage.example"
LOGIN = ("edgeuser", "s3cr3t")
"""Debian's tinyproxy knows no other characters."""
IN_URL = "edge%75ser:%733cr3t@"
LONGEST = 30.0
"""Seconds from one probe of a proxy to the next."""


@dataclass
class Scene:
    """A registry for http and one for https, both known as REGISTRY to the proxy alone."""

    folder: Path
    authority: Authority
    plain: ScriptedRegistry
    secure: ScriptedRegistry
    start: Callable[..., Daemon]

    def host(self, registry: ScriptedRegistry) -> str:
        """The name of a registry that clients use."""
        return f"{REGISTRY}:{registry.port}"

    def daemon(self, environment: Mapping[str, str] | None = None, **keys: Any) -> Daemon:
        """A daemon with an entry for each; `keys` are further ones in both entries."""
        registries = {
            self.host(self.plain): {"scheme": "http", **keys},
            self.host(self.secure): {"tls": {"ca": str(self.authority.ca)}, **keys},
        }
        return self.start(registries, "--no-complete-images", environment=environment)

    def add(self, name: str, size: int = 5000) -> Image:
        """An image that both have as `name`."""
        image = plain_image(name, size)
        for registry in (self.plain, self.secure):
            registry.add(name, image, "1")
        return image

    def get(self, daemon: Daemon, registry: ScriptedRegistry, path: str) -> Response:
        """What the daemon answers for `path` below /v2/ at a registry."""
        return fetch(self.url(daemon, registry, path))

    def url(self, daemon: Daemon, registry: ScriptedRegistry, path: str) -> str:
        """The URL at the daemon."""
        return f"{daemon.url}/v2/{path}?ns={quote(self.host(registry), safe='')}"

    def pull(self, daemon: Daemon, registry: ScriptedRegistry, name: str, image: Image) -> None:
        """Pull an image by its tag, with all its blobs."""
        assert self.get(daemon, registry, f"{name}/manifests/1").body == image.manifest.data
        for blob in image.blobs:
            assert self.get(daemon, registry, f"{name}/blobs/{blob.digest}").body == blob.data


@pytest.fixture
def scene(tmp_path: Path, start_daemon: Callable[..., Daemon]) -> Iterator[Scene]:
    """Registries without content."""
    authority = Authority(tmp_path / "tls")
    with (
        ScriptedRegistry() as plain,
        ScriptedRegistry(tls=authority.server_context(REGISTRY, STORAGE)) as secure,
    ):
        yield Scene(tmp_path, authority, plain, secure, start_daemon)


@pytest.fixture
def proxy(tmp_path: Path) -> Iterator[Tinyproxy]:
    """A proxy that asks for no password."""
    with Tinyproxy(tmp_path / "proxy", (REGISTRY, STORAGE)) as proxy:
        yield proxy


@pytest.fixture
def locked(tmp_path: Path) -> Iterator[Tinyproxy]:
    """A proxy that asks for LOGIN."""
    with Tinyproxy(tmp_path / "locked", (REGISTRY, STORAGE), LOGIN) as proxy:
        yield proxy


def environment(url: str, **more: str) -> dict[str, str]:
    """A machine whose programs are to use this proxy."""
    return {"HTTP_PROXY": url, "https_proxy": url, **more}


def test_proxy_of_the_environment(scene: Scene, proxy: Tinyproxy) -> None:
    """https in tunnels, http in absolute form; the names are resolved by the proxy alone."""
    image = scene.add("app")
    daemon = scene.daemon(environment(proxy.url))
    scene.pull(daemon, scene.plain, "app", image)
    assert proxy.requests[0] == f"GET http://{scene.host(scene.plain)}/v2/app/manifests/1"
    assert not any(request.startswith("CONNECT") for request in proxy.requests)
    other = scene.add("other")
    before = len(proxy.requests)
    scene.pull(daemon, scene.secure, "other", other)
    assert set(proxy.requests[before:]) == {f"CONNECT {scene.host(scene.secure)}"}
    assert "Proxy-" not in str([request.headers for request in scene.plain.requests])


def test_names_cannot_be_resolved_without_proxy(scene: Scene, proxy: Tinyproxy) -> None:
    """Or the other tests would show nothing."""
    scene.add("app")
    daemon = scene.daemon(environment(proxy.url, no_proxy=".example"))
    for registry in (scene.plain, scene.secure):
        answer = scene.get(daemon, registry, "app/manifests/1")
        assert_error(answer, 503, "UNAVAILABLE")
        assert b"host name cannot be resolved" in answer.body
    assert proxy.requests == []


def test_proxy_with_password(scene: Scene, locked: Tinyproxy) -> None:
    image = scene.add("app")
    daemon = scene.daemon(proxy=f"http://{IN_URL}{locked.host}")
    for registry in (scene.plain, scene.secure):
        scene.pull(daemon, registry, "app", image)
    assert "s3cr3t" not in daemon.log
    assert "edge" not in daemon.log


def test_proxy_without_required_password(scene: Scene, locked: Tinyproxy) -> None:
    scene.add("app")
    daemon = scene.daemon(environment(locked.url))
    for registry in (scene.plain, scene.secure):
        answer = scene.get(daemon, registry, "app/manifests/1")
        assert_error(answer, 503, "UNAVAILABLE")
        why = f"{scene.host(registry)}: proxy {locked.url}: it wants a user and a password (407)"
        assert why in answer.body.decode()
    # It can be reached, and so can they.
    assert log_lines(daemon, "warn", " reached") == []


def test_proxy_with_wrong_password(scene: Scene, locked: Tinyproxy) -> None:
    """tinyproxy answers 401, as the registry itself may when it is asked by http."""
    scene.add("app")
    daemon = scene.daemon(environment(f"http://edge:wr0ng@{locked.host}"))
    answer = scene.get(daemon, scene.secure, "app/manifests/1")
    assert_error(answer, 503, "UNAVAILABLE")
    assert f"proxy {locked.url}: it refuses the user or the password (401)" in answer.body.decode()
    answer = scene.get(daemon, scene.plain, "app/manifests/1")
    assert_error(answer, 404, "MANIFEST_UNKNOWN")
    assert f"the upstream answered 401, through the proxy {locked.url}" in answer.body.decode()
    assert "wr0ng" not in daemon.log


def test_redirects_and_token_requests_use_the_proxy(scene: Scene, proxy: Tinyproxy) -> None:
    image = scene.add("app")
    (layer,) = image.layers
    for registry in (scene.plain, scene.secure):
        storage = f"{registry.url.partition(':')[0]}://{STORAGE}:{registry.port}"
        registry.script(f"*/{layer.digest}", Redirect(storage), times=1)
        registry.script("*", Tokens(f"{storage}/token"))
    daemon = scene.daemon(proxy=proxy.url)
    for registry in (scene.plain, scene.secure):
        scene.pull(daemon, registry, "app", image)
    assert f"CONNECT {STORAGE}:{scene.secure.port}" in proxy.requests
    storage = f"GET http://{STORAGE}:{scene.plain.port}"
    assert f"{storage}/v2/app/blobs/{layer.digest}" in proxy.requests
    assert any(request.startswith(f"{storage}/token?") for request in proxy.requests)


def test_restarted_proxy_is_used_again(scene: Scene, proxy: Tinyproxy) -> None:
    """Its own link is down, told once for all upstreams, and the upstreams' are not."""
    image = scene.add("app")
    daemon = scene.daemon(proxy=proxy.url)
    proxy.kill()
    for registry in (scene.plain, scene.secure):
        answer = scene.get(daemon, registry, "app/manifests/1")
        assert_error(answer, 503, "UNAVAILABLE")
        assert f"{scene.host(registry)}: proxy {proxy.url}" in answer.body.decode()
        assert b"the connection was refused" in answer.body
    (down,) = log_lines(daemon, "warn", " reached")
    assert f"proxy {proxy.url} cannot be reached: the connection was refused" in down
    proxy.start()
    wait_until(lambda: scene.get(daemon, scene.plain, "app/manifests/1").status == 200, LONGEST, "it is back")
    for registry in (scene.plain, scene.secure):
        scene.pull(daemon, registry, "app", image)
    _, up = log_lines(daemon, "warn", " reached")
    assert f"proxy {proxy.url} can be reached again" in up


def test_upstream_unreachable_for_its_proxy(scene: Scene, proxy: Tinyproxy) -> None:
    """That is the upstream's failure, and the proxy is asked for others."""
    image = scene.add("app")
    daemon = scene.daemon(proxy=proxy.url)
    scene.secure.close()
    answer = scene.get(daemon, scene.secure, "app/manifests/1")
    assert_error(answer, 503, "UNAVAILABLE")
    assert f"proxy {proxy.url}: it cannot reach {scene.host(scene.secure)} (5" in answer.body.decode()
    assert b"a moment ago" in scene.get(daemon, scene.secure, "app/manifests/1").body
    scene.pull(daemon, scene.plain, "app", image)
    (down,) = log_lines(daemon, "warn", " reached")
    assert f"{scene.host(scene.secure)} cannot be reached: proxy {proxy.url}: it cannot reach" in down


@pytest.mark.parametrize("kind", ["plain", "secure"])
def test_download_through_proxy_resumes(scene: Scene, proxy: Tinyproxy, kind: str) -> None:
    """The proxy goes down with half of a blob, and comes back: the rest is fetched, and no byte twice."""
    registry: ScriptedRegistry = getattr(scene, kind)
    image = scene.add("app", 2 * MIB)
    (layer,) = image.layers
    daemon = scene.daemon(proxy=proxy.url)
    assert scene.get(daemon, registry, "app/manifests/1").status == 200
    hold = Hold(MIB)
    remove = registry.script(f"*/{layer.digest}", hold)
    with open_answer(scene.url(daemon, registry, f"app/blobs/{layer.digest}")) as answer:
        assert answer.read(MIB) == layer.data[:MIB]
        remove()
        proxy.kill()
        wait_until(lambda: log_lines(daemon, "warn", f"proxy {proxy.url} cannot be reached"), SOON, "it is known")
        proxy.start()
        assert answer.read() == layer.data[MIB:]
    # Only now: what it would have sent to the proxy that was gone counts as sent.
    sent = registry.bytes_sent(layer.digest)
    hold.release.set()
    assert sent == len(layer.data)


def test_precedence_of_entry_configuration_and_environment(scene: Scene, proxy: Tinyproxy, locked: Tinyproxy) -> None:
    image = scene.add("app")
    registries = {
        scene.host(scene.plain): {"scheme": "http"},
        scene.host(scene.secure): {
            "tls": {"ca": str(scene.authority.ca)},
            "proxy": f"http://{IN_URL}{locked.host}",
        },
    }
    nowhere = environment("http://127.0.0.1:1", NO_PROXY=REGISTRY)
    daemon = scene.start(registries, settings={"proxy": proxy.url}, environment=nowhere)
    scene.pull(daemon, scene.secure, "app", image)
    assert set(locked.requests) == {f"CONNECT {scene.host(scene.secure)}"}
    # The entry's own proxy holds for its own host; any other host in NO_PROXY is asked directly.
    assert b"host name cannot be resolved" in scene.get(daemon, scene.plain, "app/manifests/1").body
    assert proxy.requests == []
    daemon = scene.start(registries, settings={"proxy": proxy.url}, environment=environment("http://127.0.0.1:1"))
    scene.pull(daemon, scene.plain, "app", image)
    assert proxy.requests


def test_entry_with_proxy_none(scene: Scene, proxy: Tinyproxy) -> None:
    """`none` in an entry stands against the proxy of all others."""
    image = scene.add("app")
    registries = {
        scene.plain.host: {"scheme": "http", "proxy": "none"},
        scene.host(scene.plain): {"scheme": "http"},
    }
    daemon = scene.start(registries, environment=environment(proxy.url))
    answer = fetch(f"{daemon.url}/v2/app/manifests/1?ns={scene.plain.host}")
    assert answer.body == image.manifest.data
    assert proxy.requests == []
    scene.pull(daemon, scene.plain, "app", image)
    assert proxy.requests


def test_sighup_reloads_proxy(scene: Scene, proxy: Tinyproxy) -> None:
    image = scene.add("app")
    daemon = scene.daemon()
    assert b"host name cannot be resolved" in scene.get(daemon, scene.plain, "app/manifests/1").body
    daemon.config_path.write_text(f"proxy: {proxy.url}\n{daemon.config_path.read_text()}")
    daemon.process.send_signal(signal.SIGHUP)
    wait_until(lambda: "settings reloaded" in daemon.log, SOON, "it is read")
    scene.pull(daemon, scene.plain, "app", image)
    assert proxy.requests
