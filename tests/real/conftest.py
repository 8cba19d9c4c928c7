"""Real peers for the tests in this folder."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.browser import Browser
from tests.images import MIB, Image, Index, make_image, make_index
from tests.peers import Containerd, DockerRegistry, missing_package, skopeo_copy
from tests.processes import Daemon
from tests.real.caches import Cache, cache_in, plain_image, repository_for


def _need(*programs: str) -> None:
    """Fail where a peer is missing: a skipped test would prove nothing."""
    packages = sorted({package for package in map(missing_package, programs) if package})
    if packages:
        pytest.fail(f"a peer is missing: apt-get install {' '.join(packages)}", pytrace=False)


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> None:
    """Let the programs under test be interrupted.

    A shell starts background processes with SIGINT ignored, nohup with SIGHUP, and their children inherit that.
    """
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[DockerRegistry]:
    """An empty docker-registry."""
    _need("docker-registry")
    with DockerRegistry(tmp_path / "registry") as registry:
        yield registry


@pytest.fixture
def portless_registry(tmp_path: Path) -> Iterator[DockerRegistry]:
    """An empty docker-registry whose name has no port: port 80 of a loopback address unique to this process."""
    _need("docker-registry")
    pid = os.getpid()
    address = f"127.{64 + (pid >> 16) % 64}.{pid >> 8 & 255}.{pid & 255}"
    with DockerRegistry(tmp_path / "portless-registry", address, 80) as registry:
        yield registry


@pytest.fixture
def start_daemon(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Callable[..., Daemon]]:
    """Start a `Daemon` with these arguments after its folder; none may log an unhandled failure."""
    daemons: list[Daemon] = []
    with ExitStack() as stack:

        def start(*arguments: Any, **keywords: Any) -> Daemon:
            daemon = Daemon(tmp_path, *arguments, **keywords)
            daemons.append(daemon)
            return stack.enter_context(daemon)

        yield start
    if request.node.get_closest_marker("expect_logged_failures") is None:
        for daemon in daemons:
            assert "Traceback (most recent call last)" not in daemon.log
            assert "unhandled error" not in daemon.log.lower()


@pytest.fixture(scope="session")
def containerd() -> Iterator[Containerd]:
    """One containerd for all tests: use distinct references, or `wipe` it."""
    _need("containerd", "ctr")
    if os.geteuid() != 0:
        pytest.fail("containerd needs root to unpack images", pytrace=False)
    # Not tmp_path: the path of a socket must be short, and pytest would keep the unpacked files.
    with tempfile.TemporaryDirectory(prefix="containerd-") as folder, Containerd(Path(folder)) as containerd:
        yield containerd


@pytest.fixture
def skopeo() -> Callable[..., None]:
    """`skopeo_copy`."""
    _need("skopeo")
    return skopeo_copy


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A browser for all tests of a file."""
    _need("chromium", "chromedriver", "pngquant")
    with Browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def scriptless() -> Iterator[Browser]:
    """A browser whose settings forbid scripts, for all tests of a file."""
    _need("chromium", "chromedriver")
    with Browser(scripts=False) as browser:
        yield browser


@pytest.fixture(scope="session")
def big_image() -> Image:
    """An image with one layer of 200 MiB."""
    return make_image("big", layers=1, layer_size=200 * MIB)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cache]:
    """A daemon and its scripted upstream for all tests of a file; each uses a separate `repository`."""
    with cache_in(tmp_path_factory.mktemp("cache")) as cache:
        yield cache


@pytest.fixture
def repository(request: pytest.FixtureRequest) -> str:
    """A repository for this test alone."""
    return repository_for(request.node.name)


@pytest.fixture
def image(cache: Cache, repository: str) -> Image:
    """An image at the upstream, in the test's repository as `1`, not pulled yet."""
    image = plain_image(repository, 5000)
    cache.upstream.add(repository, image, "1")
    return image


@pytest.fixture
def index(cache: Cache, repository: str) -> Index:
    """An index at the upstream, in the test's repository as `list`, not pulled yet."""
    index = make_index(repository)
    cache.upstream.add(repository, index, "list")
    return index
