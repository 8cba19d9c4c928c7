"""Which images of an index are completed after clients that requested several platforms, or no layers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.images import Blob, Index
from tests.processes import wait_until
from tests.real.caches import SOON, Cache, wait_scanned_twice
from tests.real.every_platform import (
    AMD64,
    ARM,
    ARM64,
    REPOSITORY,
    S390X,
    assert_fetched_once,
    cache_with,
    configs,
    ctr_pull,
    four_platforms,
    get,
    health,
    image_for,
    kubelet_pull,
    own_layer,
    shared_layer,
    wait_stored_platforms,
    wanted_in,
)
from tests.real.shells import blobs_in, records_in


@pytest.fixture(scope="module")
def index() -> Index:
    """The index at the tag of the repository."""
    return four_platforms("platforms asked for")


@pytest.fixture
def settings() -> dict[str, object]:
    """Further keys of the daemon's configuration; tests override them by a parameter of this name."""
    return {}


@pytest.fixture
def cache(tmp_path: Path, index: Index, settings: dict[str, object]) -> Iterator[Cache]:
    """A daemon that completes images, and an upstream with the index."""
    with cache_with(index, tmp_path, settings) as cache:
        yield cache


def requests_for(cache: Cache, *blobs: Blob) -> int:
    """Count the upstream's requests for these blobs."""
    return sum(cache.sent(f"{REPOSITORY}/blobs/{blob.digest}") for blob in blobs)


def layers_of(index: Index, *platforms: str) -> list[Blob]:
    """Return the layers of these platforms."""
    return [layer for platform in platforms for layer in image_for(index, platform).layers]


def assert_undecided(cache: Cache, *never_asked_for: Blob) -> None:
    """Assert that the wanted platforms are undecided, and that these layers were not requested."""
    asked = requests_for(cache, *never_asked_for)
    wait_until(lambda: health(cache.daemon)["pending_images"], SOON, "images are undecided")
    told = health(cache.daemon)
    assert told["pending_images"] > 0
    assert told["incomplete_images"] >= told["pending_images"]
    assert asked == 0


@pytest.mark.parametrize("ranged", [False, True], ids=["whole", "ranged"])
def test_layer_of_one_platform_alone_selects_it(cache: Cache, index: Index, ranged: bool) -> None:
    """A layer shared by two platforms completes neither; one of arm/v7 alone completes arm/v7 at once."""
    ctr_pull(cache, index, layers=False, ranged=ranged)
    assert_undecided(cache, *layers_of(index, AMD64, ARM64, ARM, S390X))
    get(cache, shared_layer(index), ranged=ranged)
    wait_scanned_twice(cache)
    others = own_layer(index, AMD64), own_layer(index, ARM64), *layers_of(index, S390X)
    assert_undecided(cache, *others, *layers_of(index, ARM))
    lower, upper = image_for(index, ARM).layers
    get(cache, upper, ranged=ranged)
    cache.wait_stored(lower.digest)
    wait_until(lambda: wanted_in(cache.daemon) == {image_for(index, ARM).manifest.digest}, SOON, "arm/v7 is wanted")
    wait_scanned_twice(cache)
    assert requests_for(cache, *others) == 0
    # A second client, of another platform.
    get(cache, own_layer(index, ARM64), *layers_of(index, S390X)[:1], ranged=ranged)
    cache.wait_stored(layers_of(index, S390X)[1].digest)
    assert requests_for(cache, own_layer(index, AMD64)) == 0
    assert_fetched_once(cache)


def test_platform_requested_later_is_completed(cache: Cache, index: Index) -> None:
    """Its manifest and config are hits then: they were fetched as metadata for another platform's pull."""
    kubelet_pull(cache, index, AMD64)
    wait_stored_platforms(cache.daemon, index, AMD64, timeout=SOON)
    kubelet_pull(cache, index, ARM, layers=False)
    get(cache, own_layer(index, ARM))
    wait_stored_platforms(cache.daemon, index, AMD64, ARM, timeout=SOON)
    assert_fetched_once(cache)
    cache.upstream.close()
    kubelet_pull(cache, index, ARM)
    ctr_pull(cache, index)


def test_only_requested_platform_is_completed_after_a_pause(cache: Cache, index: Index) -> None:
    """A client that has the layers requests none: they are fetched after a while without requests."""
    kubelet_pull(cache, index, ARM64, layers=False)
    assert_undecided(cache, *layers_of(index, AMD64, ARM64, ARM, S390X))
    wait_stored_platforms(cache.daemon, index, ARM64)
    cache.upstream.close()
    ctr_pull(cache, index, ARM64)


def test_requests_for_several_platforms_without_layers_select_the_machine_s(cache: Cache, index: Index) -> None:
    """Also after a kill before the decision: no client repeats its requests."""
    ctr_pull(cache, index, layers=False)
    assert_undecided(cache, *layers_of(index, AMD64, ARM64, ARM, S390X))
    # A client has all of a small blob before it is on disk.
    for config in configs(index):
        cache.wait_stored(config.digest)
    cache.daemon.kill()
    cache.upstream.disconnect()
    cache.daemon.start()
    assert_undecided(cache, *layers_of(index, AMD64, ARM64, ARM, S390X))
    wait_stored_platforms(cache.daemon, index, AMD64)
    assert_fetched_once(cache)
    cache.upstream.close()
    ctr_pull(cache, index)


@pytest.mark.parametrize("settings", [{"complete_platforms": [ARM64]}], ids=["arm64"])
def test_configured_platforms_are_always_and_alone_completed(cache: Cache, index: Index) -> None:
    """Requests decide nothing; blobs that are missing from another platform are counted, and not fetched."""
    ctr_pull(cache, index, layers=False)
    wait_stored_platforms(cache.daemon, index, ARM64, timeout=SOON)
    lower, upper = image_for(index, ARM).layers
    get(cache, upper)
    wait_scanned_twice(cache)
    told = health(cache.daemon)
    assert (told["incomplete_images"], told["missing_bytes"]) == (1, len(lower.data))
    assert requests_for(cache, lower) == 0


@pytest.mark.parametrize("settings", [{"complete_metadata": False}], ids=["without"])
def test_complete_metadata_off_fetches_no_other_manifests(cache: Cache, index: Index) -> None:
    """The pulled image is complete, and no other manifest was requested."""
    kubelet_pull(cache, index)
    image = image_for(index, AMD64)
    wait_until(lambda: not any(health(cache.daemon).values()), SOON, "nothing is incomplete")
    wait_scanned_twice(cache)
    assert records_in(cache.daemon.image_path) == {index.manifest.digest, image.manifest.digest}
    assert blobs_in(cache.daemon.image_path) == {blob.digest for blob in image.blobs}
    assert cache.sent(f"{REPOSITORY}/manifests/") == 2
