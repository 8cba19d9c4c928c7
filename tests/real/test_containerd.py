"""containerd pulls through the daemon from a real registry, and again when the registry is gone."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.client import connect, fetch
from tests.images import Image, Index, make_image, make_index
from tests.peers import Containerd, DockerRegistry, hosts_dir
from tests.processes import Daemon, wait_until

Pull = Callable[[str], frozenset[str]]

_SOON = 10.0
_ACCESS = re.compile(
    r"(?P<method>HEAD|GET) (?P<path>/v2/\S+) ns=(?P<ns>\S+) (?P<status>\d+) (?P<bytes>\d+) bytes "
    r"(?P<milliseconds>\d+) ms (?P<client>127\.0\.0\.1:\d+) (?P<outcome>hit|miss)$",
    re.MULTILINE,
)


@pytest.fixture(
    params=["oci-index", "docker-list", "oci-manifest", "docker-manifest", "big"],
)
def pushed(request: pytest.FixtureRequest) -> Index | Image:
    """What a tag may refer to: an index or an image, in both media types; with a large layer."""
    kind: str = request.param
    if kind == "big":
        image: Image = request.getfixturevalue("big_image")
        assert max(len(layer.data) for layer in image.layers) >= 200_000_000
        return image
    docker = kind.startswith("docker")
    if kind.endswith("manifest"):
        return make_image(f"containerd/{kind}", docker=docker)
    return make_index(f"containerd/{kind}", docker=docker, platforms=("linux/amd64", "linux/arm64", "linux/arm/v7"))


@pytest.fixture
def daemon(registry: DockerRegistry, start_daemon: Callable[..., Daemon]) -> Daemon:
    """A daemon that may use the registry."""
    return start_daemon({registry.host: "http"}, "--no-complete-images")


@pytest.fixture
def pull(containerd: Containerd, daemon: Daemon, tmp_path: Path) -> Pull:
    """Pull an image with the daemon as the only mirror of all registries; return the digests then in containerd.

    The image is removed again, so that the next pull fetches all of it.
    """
    hosts = hosts_dir(tmp_path / "certs.d", daemon.url, "_default")

    def pull(ref: str) -> frozenset[str]:
        before = containerd.content
        done = containerd.pull(ref, hosts)
        assert done.returncode == 0, f"{done.stderr}\n{daemon.log}"
        assert containerd.unpacked(ref)
        fetched = containerd.content - before
        containerd.remove(ref)
        assert not containerd.content & fetched
        return fetched

    return pull


@contextmanager
def _listening(port: int) -> Iterator[Callable[[], int]]:
    """Listen on this port without answering; yield a function that counts connections."""
    with socket.create_server(("127.0.0.1", port)) as listener:
        listener.setblocking(False)
        accepted: list[socket.socket] = []

        def count() -> int:
            with suppress(BlockingIOError):
                while True:
                    accepted.append(listener.accept()[0])
            return len(accepted)

        try:
            yield count
        finally:
            for connection in accepted:
                connection.close()


def _restart(daemon: Daemon) -> int:
    """Kill with SIGKILL, and start again; return the log's size before."""
    daemon.kill()
    logged = len(daemon.log)
    daemon.start()
    return logged


def test_cached_image_is_pulled_without_the_registry(
    registry: DockerRegistry, daemon: Daemon, pull: Pull, pushed: Index | Image
) -> None:
    """Without the registry, after a kill and with the image removed, the pull works without a connection."""
    registry.push("team/app", pushed, "v1")
    ref = f"{registry.host}/team/app:v1"
    (image,) = (image for image in _images(pushed) if image.platform == "linux/amd64")
    wanted = {pushed.manifest.digest, image.manifest.digest, *(blob.digest for blob in image.blobs)}
    assert pull(ref) == wanted
    assert f"pulling manifest from upstream: {ref}" in daemon.log
    assert f"serving manifest from cache: {ref}" not in daemon.log
    _assert_access(daemon, registry, pushed, image, "miss")

    registry.kill()
    with _listening(registry.port) as connections:
        logged = _restart(daemon)
        assert pull(ref) == wanted
        again = daemon.log[logged:]
        assert f"serving manifest from cache: {ref}" in again
        assert "pulling" not in again
        assert connections() == 0
        _assert_access(daemon, registry, pushed, image, "hit", logged)
        # A connection would be counted: for uncached content the registry is asked.
        lacking = connect(daemon.url)
        lacking.request("GET", f"/v2/team/app/manifests/v2?ns={registry.host}")
        wait_until(connections, _SOON, "a connection to the registry's port")
        lacking.close()


def _assert_access(
    daemon: Daemon, registry: DockerRegistry, pushed: Index | Image, image: Image, outcome: str, since: int = 0
) -> None:
    """Assert the access lines of a pull: request, client, size and outcome."""
    app = "/v2/team/app"
    expected = {
        ("HEAD", f"{app}/manifests/v1"): (0, outcome),
        # The HEAD has fetched it.
        ("GET", f"{app}/manifests/{pushed.manifest.digest}"): (len(pushed.manifest.data), "hit"),
        **{("GET", f"{app}/blobs/{blob.digest}"): (len(blob.data), outcome) for blob in image.blobs},
    }
    if image is not pushed:
        expected["GET", f"{app}/manifests/{image.manifest.digest}"] = (len(image.manifest.data), outcome)

    def lines() -> list[dict[str, str]]:
        return [line.groupdict() for line in _ACCESS.finditer(daemon.log, since)]

    # A line is written when the client has everything, possibly after the client's next action.
    wait_until(lambda: len(lines()) >= len(expected), _SOON, f"{len(expected)} access lines")
    found = {(line["method"], line["path"]): (int(line["bytes"]), line["outcome"]) for line in lines()}
    assert found == expected
    assert {(line["ns"], line["status"]) for line in lines()} == {(registry.host, "200")}


@pytest.mark.parametrize("kind", ["index", "image"])
def test_tags_and_repositories_share_records_and_blobs(
    registry: DockerRegistry, daemon: Daemon, pull: Pull, kind: str
) -> None:
    """One digest with several names has one record with all names, and each of its blobs is fetched once."""
    pushed = make_index("shared") if kind == "index" else make_image("shared")
    registry.push("team/app", pushed, "v1", "stable")
    registry.push("other/app", pushed, "v1")
    refs = {f"{registry.host}/{name}" for name in ("team/app:v1", "team/app:stable", "other/app:v1")}
    for ref in sorted(refs):
        pull(ref)
    image = _images(pushed)[0]
    for blob in image.blobs:
        gets = [line for line in registry.requests if line.method == "GET" and line.path.endswith(blob.digest)]
        assert len(gets) == 1, gets

    if kind == "image":
        assert _names(daemon, "img", image) == refs
    else:
        assert _names(daemon, "fat", pushed) == refs
        # containerd requested the image of its platform by digest. In the repository where it was a hit, the name is
        # recorded while the answer is already being sent.
        both = {f"{registry.host}/{name}@{image.manifest.digest}" for name in ("team/app", "other/app")}
        wait_until(lambda: _names(daemon, "img", image) == both, _SOON, f"the record has {both}")


def _names(daemon: Daemon, folder: str, of: Index | Image) -> set[str]:
    path = daemon.image_path / folder / of.manifest.digest.removeprefix("sha256:")
    return set(json.loads(path.read_text())["images"])


def test_cached_tag_is_kept_when_it_moves_upstream(registry: DockerRegistry, daemon: Daemon, pull: Pull) -> None:
    """The first pull fixes the meaning of a tag, also after a restart and while the registry is up."""
    old, new = make_image("moving/old"), make_image("moving/new")
    ref = f"{registry.host}/team/app:v1"
    registry.push("team/app", old, "v1")
    first = pull(ref)
    assert old.manifest.digest in first
    registry.push("team/app", new, "v1")
    manifest = f"{registry.url}/v2/team/app/manifests/v1"
    accept = {"Accept": new.manifest.media_type}
    assert fetch(manifest, headers=accept).headers["Docker-Content-Digest"] == new.manifest.digest
    assert pull(ref) == first
    _restart(daemon)
    assert pull(ref) == first


def _images(pushed: Index | Image) -> tuple[Image, ...]:
    return pushed.images if isinstance(pushed, Index) else (pushed,)
