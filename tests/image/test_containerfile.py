"""The Containerfile: Debian's own image, pulled by buildah through the daemon, with our package in it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from ociregistry import __version__
from tests.image.layout import Layout
from tests.image.podman import Container, Podman
from tests.peers import DockerRegistry
from tests.processes import ROOT, Daemon, run

pytestmark = pytest.mark.long

_BASE = "library/debian"
_SUITE = "bookworm"
_LIMITS = ("--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1024:1024")


class Buildah:
    """Runs buildah on the storage of a podman."""

    def __init__(self, podman: Podman, registries: Path) -> None:
        self._options = podman.storage
        self._environment = {"CONTAINERS_REGISTRIES_CONF": str(registries), "BUILDAH_ISOLATION": "chroot"}

    def __call__(self, *arguments: str) -> str:
        """Run a command; return its output without the newline at its end."""
        done = run(["buildah", *self._options, *arguments], timeout=900, environment=self._environment)
        return done.stdout.rstrip("\n")


@pytest.fixture
def daemon(registry: DockerRegistry, tmp_path: Path) -> Iterator[Daemon]:
    """A daemon for which the registry is docker.io."""
    upstream = {"mirrors": [registry.url], "mirrors_only": True}
    with Daemon(tmp_path, {"docker.io": upstream}) as daemon:
        yield daemon


@pytest.fixture
def buildah(podman: Podman, daemon: Daemon, tmp_path: Path) -> Buildah:
    """buildah, whose mirror for docker.io is the daemon."""
    registries = tmp_path / "registries.conf"
    registries.write_text(
        f'[[registry]]\nlocation = "docker.io"\n[[registry.mirror]]\nlocation = "{daemon.host}"\ninsecure = true\n'
    )
    return Buildah(podman, registries)


@pytest.fixture
def base(buildah: Buildah, registry: DockerRegistry, tmp_path: Path) -> None:
    """A minimal Debian in the registry, under the name of Debian's image."""
    files = tmp_path / "base.tar"
    sources = ROOT / "build/image.list"
    run(
        ["mmdebstrap", "--quiet", "--variant=minbase", "--dpkgopt=force-unsafe-io", _SUITE, str(files), str(sources)],
        timeout=900,
    )
    container = buildah("from", "scratch")
    buildah("add", container, str(files))
    files.unlink()
    buildah("commit", "--rm", container, "localhost/base")
    buildah("push", "--tls-verify=false", "localhost/base", f"docker://{registry.host}/{_BASE}:12-slim")
    buildah("rmi", "localhost/base")


@pytest.mark.usefixtures("base")
def test_gives_the_same(podman: Podman, buildah: Buildah, daemon: Daemon, layout: Layout) -> None:
    """User, entrypoint, volume, ports and labels are those of `make image`, and the daemon runs from it."""
    name = f"localhost/containerfile:{__version__}"
    buildah("build", *_LIMITS, "--network", "host", "--tag", name, str(ROOT))
    assert f"docker.io/{_BASE}:12-slim" in daemon.log
    (image,) = json.loads(podman("image", "inspect", name))
    ours, theirs = layout.config["config"], image["Config"]
    for key in ("User", "Entrypoint", "Volumes", "ExposedPorts", "StopSignal", "WorkingDir"):
        assert theirs[key] == ours[key], key
    assert "Cmd" not in theirs
    # Those that tell when and of which commit are given on the command line.
    told = {f"org.opencontainers.image.{name}" for name in ("created", "revision")}
    assert ours["Labels"].items() - theirs["Labels"].items() <= {(key, ours["Labels"].get(key)) for key in told}
    with Container(podman, name) as container:
        assert container.stop() == 0
    setuid = ("find", "/", "-xdev", "-type", "f", "-perm", "/6000")
    assert (
        podman("run", "--rm", "--network=none", *_LIMITS, "--user=0", f"--entrypoint={setuid[0]}", name, *setuid[1:])
        == ""
    )
