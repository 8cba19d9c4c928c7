"""After one platform of an index was pulled or loaded, the upstream sends the layers of no other one.

Clients that read the metadata of every platform still receive all of it when the upstream is gone. `ctr images pull`
of containerd 2.x is such a client; tests/real/every_platform.py describes its requests.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.images import Index
from tests.processes import Daemon, wait_until
from tests.real.caches import SOON, Cache, error_lines
from tests.real.every_platform import (
    AMD64,
    ARCHITECTURE,
    ARM,
    ARM64,
    REPOSITORY,
    S390X,
    TAG,
    assert_fetched_once,
    cache_with,
    ctr_pull,
    four_platforms,
    health,
    image_for,
    kubelet_pull,
    link_bytes,
    metadata_size,
    wait_stored_platforms,
    write_store_of_older_version,
)
from tests.real.shells import blobs_in, records_in
from tests.real.stores import command, image_list
from tests.upstream import ScriptedRegistry
from tests.upstream_rules import Hold, Reply


@pytest.fixture(scope="module")
def index() -> Index:
    """The index at the tag of the repository."""
    return four_platforms("every platform")


@pytest.fixture
def cache(tmp_path: Path, index: Index) -> Iterator[Cache]:
    """A daemon that completes images, and an upstream with the index."""
    with cache_with(index, tmp_path) as cache:
        yield cache


@pytest.fixture
def stopped(tmp_path: Path, upstream: ScriptedRegistry, index: Index) -> Iterator[Cache]:
    """The same, with the daemon not yet started."""
    upstream.add(REPOSITORY, index, TAG)
    daemon = Daemon(tmp_path, {upstream.host: "http"}, *ARCHITECTURE)
    try:
        yield Cache(daemon, upstream)
        assert error_lines(daemon, 0) == []
    finally:
        if daemon.running:
            daemon.kill()


def write_list(cache: Cache, folder: Path) -> str:
    """Write a list of the index for `load`; return its path."""
    return image_list(folder / "list", [f"{cache.upstream.host}/{REPOSITORY}:{TAG}"])


def assert_one_platform_was_fetched(cache: Cache, index: Index, platform: str) -> None:
    """Assert that the upstream sent the bytes of this platform and the metadata of all, and nothing twice."""
    one = sum(len(blob.data) for blob in image_for(index, platform).blobs)
    assert link_bytes(cache) <= 1.05 * one + metadata_size(index)
    assert_fetched_once(cache)


@pytest.mark.parametrize("platform", [AMD64, ARM64])
def test_client_that_reads_all_metadata_fetches_one_platform(cache: Cache, index: Index, platform: str) -> None:
    """The platform is the one whose layers are requested, whether or not it is this machine's."""
    ctr_pull(cache, index, platform)
    wait_stored_platforms(cache.daemon, index, platform)
    assert_one_platform_was_fetched(cache, index, platform)
    cache.upstream.close()
    ctr_pull(cache, index, platform)


def test_other_metadata_is_fetched_after_a_pull_of_one_platform(cache: Cache, index: Index) -> None:
    """The other platforms' metadata is fetched in the background at once, without waiting half a minute."""
    kubelet_pull(cache, index)
    wait_stored_platforms(cache.daemon, index, AMD64, timeout=SOON)
    assert_one_platform_was_fetched(cache, index, AMD64)
    cache.upstream.close()
    kubelet_pull(cache, index)
    ctr_pull(cache, index)


def test_load_stores_one_platform_and_all_metadata(stopped: Cache, index: Index, tmp_path: Path) -> None:
    arguments = ("load", "--arch=amd64", "--os=linux", write_list(stopped, tmp_path))
    assert "1 loaded, 0 already there, 0 failed" in command(stopped.daemon, *arguments).stdout
    assert_one_platform_was_fetched(stopped, index, AMD64)
    stopped.upstream.close()
    assert "0 loaded, 1 already there, 0 failed" in command(stopped.daemon, *arguments).stdout
    stopped.daemon.start()
    ctr_pull(stopped, index)
    wait_stored_platforms(stopped.daemon, index, AMD64)


def test_preload_stores_one_platform_and_all_metadata(
    tmp_path: Path, upstream: ScriptedRegistry, index: Index
) -> None:
    upstream.add(REPOSITORY, index, TAG)
    path = image_list(tmp_path / "list", [f"{upstream.host}/{REPOSITORY}:{TAG}"])
    with Daemon(tmp_path, {upstream.host: "http"}, *ARCHITECTURE, "--preload-images", path) as daemon:
        wait_stored_platforms(daemon, index, AMD64, timeout=SOON)
        cache = Cache(daemon, upstream)
        assert_one_platform_was_fetched(cache, index, AMD64)
        upstream.close()
        ctr_pull(cache, index)
        assert error_lines(daemon, 0) == []


@pytest.mark.parametrize("platform", [AMD64, ARM64])
def test_daemon_adds_metadata_to_a_store_of_an_older_version(stopped: Cache, index: Index, platform: str) -> None:
    """It is fetched once the upstream is reachable, without a client; the stored platform is the wanted one."""
    write_store_of_older_version(stopped.daemon, stopped.upstream.host, index, platform)
    stopped.daemon.start()
    wait_stored_platforms(stopped.daemon, index, platform)
    image = image_for(index, platform)
    here_already = len(index.manifest.data) + len(image.manifest.data) + len(image.config.data)
    assert link_bytes(stopped) <= metadata_size(index) - here_already
    assert_fetched_once(stopped)
    stopped.upstream.close()
    ctr_pull(stopped, index, platform)


def test_load_adds_the_metadata_to_a_store_of_an_older_version(stopped: Cache, index: Index, tmp_path: Path) -> None:
    write_store_of_older_version(stopped.daemon, stopped.upstream.host, index, AMD64)
    command(stopped.daemon, "load", "--arch=amd64", "--os=linux", write_list(stopped, tmp_path))
    assert records_in(stopped.daemon.image_path) == {manifest.digest for manifest in index.manifests}
    stopped.upstream.close()
    stopped.daemon.start()
    ctr_pull(stopped, index)


def test_index_whose_registry_lacks_some_children(cache: Cache, index: Index) -> None:
    """As after a copy of one platform alone: the other metadata is fetched, and nothing remains pending."""
    lacking = {image_for(index, S390X), index.images[-1]}
    for image in lacking:
        cache.upstream.script(f"*/manifests/{image.manifest.digest}", Reply(404))
    kubelet_pull(cache, index)
    there = [image for image in index.images if image not in lacking]
    manifests = {index.manifest.digest, *(image.manifest.digest for image in there)}
    wait_until(lambda: manifests <= records_in(cache.daemon.image_path), SOON, "the other manifests")
    wait_until(lambda: not any(health(cache.daemon).values()), SOON, "nothing is incomplete")
    blobs = {blob.digest for blob in image_for(index, AMD64).blobs} | {image.config.digest for image in there}
    assert records_in(cache.daemon.image_path) == manifests
    assert blobs_in(cache.daemon.image_path) == blobs
    assert error_lines(cache.daemon, 0) == []
    cache.upstream.close()
    kubelet_pull(cache, index)


def test_rate_limited_metadata_is_fetched_later(cache: Cache, index: Index) -> None:
    """The client's pull is not affected, the missing part is fetched later, and nothing is fetched twice."""
    path = f"{REPOSITORY}/manifests/{image_for(index, ARM).manifest.digest}"
    with cache.scripted(f"/v2/{path}", Reply(429, headers=(("Retry-After", "1"),))):
        kubelet_pull(cache, index)
        wait_until(lambda: cache.sent(path), SOON, "the manifest is requested")
        assert health(cache.daemon)["incomplete_indexes"] == 1
    wait_stored_platforms(cache.daemon, index, AMD64)
    assert_fetched_once(cache)
    assert error_lines(cache.daemon, 0) == []


def test_metadata_is_fetched_after_an_outage_and_a_restart(cache: Cache, index: Index) -> None:
    """The image is served, and the metadata is fetched when the upstream is back, also after a restart."""
    hold = Hold()
    with cache.scripted(f"*/manifests/{image_for(index, S390X).manifest.digest}", hold):
        kubelet_pull(cache, index)
        assert hold.reached.wait(SOON), cache.daemon.log
        cache.upstream.close()
    assert health(cache.daemon)["incomplete_indexes"] == 1
    cache.daemon.kill()
    cache.daemon.start()
    wait_until(lambda: health(cache.daemon)["incomplete_indexes"] == 1, SOON, "the daemon has read the index again")
    kubelet_pull(cache, index)
    cache.upstream.open()
    wait_stored_platforms(cache.daemon, index, AMD64)


def test_list_and_prune_of_metadata(cache: Cache, index: Index) -> None:
    """`list` prints pulled images, and with --long the other metadata; `prune` removes it with the index."""
    kubelet_pull(cache, index)
    wait_stored_platforms(cache.daemon, index, AMD64, timeout=SOON)
    name = f"{cache.upstream.host}/{REPOSITORY}"
    pulled = {f"{name}:{TAG}", f"{name}@{image_for(index, AMD64).manifest.digest}"}
    everything = {f"{name}:{TAG}", *(f"{name}@{image.manifest.digest}" for image in index.images)}

    def urls(*arguments: str) -> list[str]:
        return [line.split(" ")[0] for line in command(cache.daemon, *arguments).stdout.splitlines()]

    assert sorted(urls("list")) == sorted(pulled)
    assert sorted(urls("list", "--long")) == sorted(everything)
    pattern = ("prune", "--pattern", f"{REPOSITORY}:{TAG}$")
    would = [line.split(" ")[2] for line in command(cache.daemon, *pattern, "--dry-run").stdout.splitlines()[:-1]]
    assert sorted(would) == sorted(pulled)
    assert records_in(cache.daemon.image_path) == {manifest.digest for manifest in index.manifests}
    command(cache.daemon, *pattern)
    assert records_in(cache.daemon.image_path) == set()
    assert blobs_in(cache.daemon.image_path) == set()
    assert urls("list", "--long") == []
