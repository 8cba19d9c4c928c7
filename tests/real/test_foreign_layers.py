"""Layers with `urls` (foreign ones): brought from a registry that has them, and else said to be absent."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.images import Image, Manifest, digest_of, make_image
from tests.real.caches import Cache, blob_file
from tests.real.completions import completing_in, wait_complete
from tests.real.stores import command, image_list
from tests.upstream_rules import Reply

WITHOUT = "without foreign layers: 1 blob, {size} bytes"


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Cache]:
    """A daemon that completes images, and its upstream."""
    with completing_in(tmp_path) as cache:
        yield cache


@pytest.fixture
def image(cache: Cache) -> Image:
    """An image at the upstream of which the first layer has `urls`, as those of Windows had until 2023."""
    image = with_urls(make_image("windows", docker=True, platform="windows/amd64"))
    cache.upstream.add("team/app", image, "1")
    return image


def with_urls(image: Image) -> Image:
    """The same image with a foreign layer."""
    document = json.loads(image.manifest.data)
    document["layers"][0]["urls"] = ["https://go.microsoft.example/fwlink/?linkid=837858"]
    document["layers"][0]["mediaType"] = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"
    data = json.dumps(document).encode()
    return Image(Manifest(digest_of(data), data, image.manifest.media_type), image.blobs, image.platform)


def load(cache: Cache, folder: Path) -> str:
    """What a load of the image prints."""
    listed = image_list(folder / "list", [f"{cache.upstream.host}/team/app:1"])
    return command(cache.daemon, "load", listed).stdout


def completeness(cache: Cache) -> str:
    """What `list --long` says."""
    (line,) = command(cache.daemon, "list", "--long").stdout.splitlines()
    return line.split()[-1]


@pytest.mark.parametrize("running", [True, False], ids=["through_the_daemon", "alone"])
def test_foreign_layer_of_registry_is_loaded_and_exported(
    cache: Cache, image: Image, tmp_path: Path, running: bool
) -> None:
    """It was left out, and the image called complete; nodes without a way to Microsoft could not pull it.

    Sources: moby issue 34216 (`allow-nondistributable-artifacts`), containerd issues 5887 and 7676, skopeo issue 545,
    imgpkg issue 8.
    """
    if not running:
        cache.daemon.kill()
    foreign = image.layers[0]
    printed = load(cache, tmp_path)
    assert "3 blobs" in printed
    assert "foreign" not in printed
    assert blob_file(cache.daemon, foreign.digest).read_bytes() == foreign.data
    assert completeness(cache) == "complete"
    done = command(cache.daemon, "export", "--pattern", "app", "-o", str(tmp_path / "app.tar"))
    assert "3 blobs" in done.stdout
    assert done.stderr == ""
    options = ["--image-path", str(tmp_path / "other")]
    imported = command(cache.daemon, *options, "load", str(tmp_path / "app.tar")).stdout
    assert "3 blobs" in imported
    assert "foreign" not in imported
    assert (tmp_path / "other" / "blobs" / foreign.digest[7:]).read_bytes() == foreign.data
    if not running:
        cache.daemon.start()


@pytest.mark.parametrize("running", [True, False], ids=["through_the_daemon", "alone"])
def test_missing_foreign_layer_is_reported(cache: Cache, image: Image, tmp_path: Path, running: bool) -> None:
    if not running:
        cache.daemon.kill()
    foreign = image.layers[0]
    said = WITHOUT.format(size=len(foreign.data))
    with cache.scripted(f"/v2/team/app/blobs/{foreign.digest}", Reply(404)):
        printed = load(cache, tmp_path)
        assert "loaded: " in printed
        assert said in printed
        assert completeness(cache) == "without-foreign-layers"
        (row,) = json.loads(command(cache.daemon, "list", "--json").stdout)
        there = sum(len(blob.data) for blob in image.blobs) - len(foreign.data)
        assert (row["size"], row["missingForeign"]) == (there, len(foreign.data))
        assert "already there: " in (again := load(cache, tmp_path))
        assert said in again
    done = command(cache.daemon, "export", "--pattern", "app", "-o", str(tmp_path / "app.tar"))
    assert "2 blobs" in done.stdout
    assert said in done.stderr
    options = ["--image-path", str(tmp_path / "other")]
    assert said in command(cache.daemon, *options, "load", str(tmp_path / "app.tar")).stdout
    command(cache.daemon, "verify")
    # The registry has it by now.
    assert "1 blob" in load(cache, tmp_path)
    assert completeness(cache) == "complete"
    if not running:
        cache.daemon.start()


def test_image_without_foreign_layers_is_present_while_link_is_down(
    cache: Cache, image: Image, tmp_path: Path
) -> None:
    with cache.scripted(f"/v2/team/app/blobs/{image.layers[0].digest}", Reply(404)):
        load(cache, tmp_path)
    cache.upstream.close()
    printed = load(cache, tmp_path)
    assert "already there: " in printed
    assert "without foreign layers" in printed


def test_foreign_layer_is_fetched_after_a_pull(cache: Cache, image: Image) -> None:
    """A client fetches it from its URL, or asks for it when that cannot be reached."""
    assert cache.ask("team/app/manifests/1").status == 200
    foreign, layer = image.layers
    assert cache.ask(f"team/app/blobs/{layer.digest}").body == layer.data
    cache.wait_stored(foreign.digest)
    wait_complete(cache.daemon, image.blobs)
    cache.upstream.close()
    assert cache.ask(f"team/app/blobs/{foreign.digest}").body == foreign.data
    # As old as an orphan must be to be removed.
    os.utime(blob_file(cache.daemon, foreign.digest), (0, 0))
    command(cache.daemon, "prune", "--orphans")
    assert cache.stored(foreign.digest)
