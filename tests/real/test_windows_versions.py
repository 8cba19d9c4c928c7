"""An index with images for several versions of Windows: all of them are loaded, those of one version, and listed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.images import Image, Index, make_index
from tests.real.caches import Cache, cache_in
from tests.real.stores import command, has_all_of, image_list

LINUX = "linux/amd64"
SERVER_2019 = "windows(10.0.17763.6893)/amd64"
SERVER_2022 = "windows(10.0.20348.2849)/amd64"
SERVER_2025 = "windows(10.0.26100.2605)/amd64"


@pytest.fixture(scope="module")
def index() -> Index:
    """An index as that of registry.k8s.io/pause."""
    return make_index("pause", platforms=(LINUX, SERVER_2019, SERVER_2022, SERVER_2025), docker=True)


def image_for(index: Index, platform: str) -> Image:
    """The image for a platform."""
    return next(image for image in index.images if image.platform == platform)


@pytest.mark.parametrize("running", [True, False], ids=["through_the_daemon", "alone"])
@pytest.mark.parametrize(
    ("options", "loaded"),
    [
        (["--platform", "windows/amd64"], {SERVER_2019, SERVER_2022, SERVER_2025}),
        (["--os", "windows", "--arch", "amd64", "--os-version", "10.0.20348"], {SERVER_2022}),
        (["--platform", "linux/amd64,windows/amd64", "--os-version=10.0.17763.6893"], {LINUX, SERVER_2019}),
    ],
)
def test_all_matching_os_versions_are_loaded(
    tmp_path: Path, index: Index, options: list[str], loaded: set[str], running: bool
) -> None:
    """Of the manifests for one platform only the first came, and `list --long` called that complete.

    The nodes of one cluster may run several versions, and containerd and dockerd take the manifest for their own.
    Sources: Windows-Containers issues 317 and 334.
    """
    with cache_in(tmp_path) as cache:
        cache.upstream.add("pause", index, "3")
        listed = image_list(tmp_path / "list", [f"{cache.upstream.host}/pause:3"])
        if not running:
            cache.daemon.kill()
        assert "1 loaded" in command(cache.daemon, "load", *options, listed).stdout
        for image in index.images:
            assert has_all_of(cache.daemon.image_path, image) == (image.platform in loaded)
        assert platforms(cache) == (",".join(sorted(loaded)), "complete")
        assert "1 already there" in command(cache.daemon, "load", *options, listed).stdout
        if not running:
            cache.daemon.start()


def platforms(cache: Cache) -> tuple[str, str]:
    """The platforms of the index, and whether they are complete, as `list --long` prints it."""
    (line,) = command(cache.daemon, "list", "--long", "--pattern", ":3$").stdout.splitlines()
    *_, told, completeness = line.split()
    return told, completeness


def test_missing_os_version_is_an_error(tmp_path: Path, index: Index) -> None:
    with cache_in(tmp_path) as cache:
        cache.upstream.add("pause", index, "3")
        listed = image_list(tmp_path / "list", [f"{cache.upstream.host}/pause:3"])
        options = ["--platform=windows/amd64", "--os-version=10.0.1"]
        done = command(cache.daemon, "load", *options, listed, status=1)
        there = ", ".join([LINUX, SERVER_2019, SERVER_2022, SERVER_2025])
        assert f"no image for windows(10.0.1)/amd64; available: {there}" in done.stdout


def test_two_pulled_os_versions_are_completed_and_listed(tmp_path: Path, index: Index) -> None:
    with cache_in(tmp_path) as cache:
        cache.upstream.add("pause", index, "3")
        assert cache.ask("pause/manifests/3").status == 200
        for platform in (SERVER_2019, SERVER_2025):
            image = image_for(index, platform)
            assert cache.ask(f"pause/manifests/{image.manifest.digest}").status == 200
            for blob in image.blobs:
                assert cache.ask(f"pause/blobs/{blob.digest}").status == 200
                cache.wait_stored(blob.digest)
        assert platforms(cache) == (f"{SERVER_2019},{SERVER_2025}", "complete")
