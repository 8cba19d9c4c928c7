"""Two daemons with replicated stores, and containerd, which fails over from one to the other."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.client import fetch
from tests.images import make_index
from tests.peers import Containerd, DockerRegistry
from tests.processes import Daemon, run, twistd, wait_until

V1, V2, OTHER = make_index("replica v1"), make_index("replica v2"), make_index("replica other")


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[DockerRegistry]:
    """An upstream with two images."""
    with DockerRegistry(tmp_path / "registry") as server:
        server.push("team/app", V1, "stable")
        server.push("team/other", OTHER, "stable")
        yield server


@pytest.fixture
def daemons(tmp_path: Path, registry: DockerRegistry) -> Iterator[tuple[Daemon, Daemon]]:
    """Two serving daemons with separate stores."""
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        folder.mkdir()
    one, two = (Daemon(folder, {registry.host: "http"}) for folder in folders)
    with one, two:
        yield one, two


def tag_means(daemon: Daemon, registry: DockerRegistry, name: str) -> str | None:
    """Return the digest of a tag at the daemon, or None."""
    answer = fetch(f"{daemon.url}/v2/{name}/manifests/stable?ns={registry.host}")
    return answer.headers["Docker-Content-Digest"] if answer.status == 200 else None


def replicate(one: Daemon, two: Daemon) -> None:
    """Replicate as in docs/several-machines.md: both ways, without work in progress."""
    for source, target in ((one, two), (two, one)):
        run(["rsync", "--archive", "--exclude", "pulls/", f"{source.image_path}/", f"{target.image_path}/"])


def test_newer_tag_wins_on_both_replicas_and_containerd_fails_over(
    tmp_path: Path, registry: DockerRegistry, daemons: tuple[Daemon, Daemon]
) -> None:
    one, two = daemons
    containerd = Containerd(tmp_path)
    hosts = tmp_path / "certs.d"
    urls = [word for daemon in daemons for word in ("--url", daemon.url)]
    run(twistd("containerd-config", *urls, "--dir", str(hosts), "--write"))
    app, other = (f"{registry.host}/team/{name}:stable" for name in ("app", "other"))
    with containerd:
        assert containerd.pull(app, hosts).returncode == 0
        assert tag_means(two, registry, "team/app") == V1.manifest.digest
        # The tag moves, and only the second daemon, where it is pruned, notices.
        registry.push("team/app", V2, "stable")
        run(twistd("prune", "--pattern", "team/app", "--image-path", str(two.image_path)))
        wait_until(lambda: tag_means(two, registry, "team/app") == V2.manifest.digest, 30, "the second one asks anew")
        assert containerd.pull(other, hosts).returncode == 0
        for image in V2.images:
            for path in (f"manifests/{image.manifest.digest}", f"blobs/{image.layers[0].digest}"):
                fetch(f"{two.url}/v2/team/app/{path}?ns={registry.host}")
        wait_until(lambda: '"incomplete_images": 0' in fetch(f"{two.url}/health").body.decode(), 30, "whole images")
        assert tag_means(one, registry, "team/app") == V1.manifest.digest

        replicate(one, two)
        wait_until(
            lambda: tag_means(one, registry, "team/app") == V2.manifest.digest, 30, "the tag moved on the first"
        )
        assert tag_means(two, registry, "team/app") == V2.manifest.digest

        registry.kill()
        wait_until(lambda: tag_means(two, registry, "team/other") is not None, 30, "the other image is on the second")
        one.terminate()
        containerd.wipe()
        for ref in (app, other):
            pulled = containerd.pull(ref, hosts)
            assert pulled.returncode == 0, pulled.stderr
            assert containerd.unpacked(ref)
        assert V2.manifest.digest in containerd.content
        # And back: the stopped one has everything too.
        one.start()
        two.terminate()
        containerd.wipe()
        assert containerd.pull(app, hosts).returncode == 0
        assert V2.manifest.digest in containerd.content
