"""The sections `prune` and `verify` of the configuration file, in a running daemon."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tests.images import MIB, Image, make_image, make_index
from tests.processes import wait_until
from tests.real.caches import SOON, Cache, blob_file, daemon_in, plain_image, pull, record
from tests.real.stores import assert_all_served, assert_blobs_match_their_digests, contents, has_all_of
from tests.upstream import ScriptedRegistry

AN_HOUR = 3600.0
REPOSITORY = "team/app"


@contextmanager
def cache_with(folder: Path, settings: Mapping[str, object]) -> Iterator[Cache]:
    """Run a daemon with these sections."""
    with ScriptedRegistry() as upstream, daemon_in(folder, upstream, settings=settings) as daemon:
        yield Cache(daemon, upstream)


def pulled(cache: Cache, repository: str, image: Image, ago: float = 0.0) -> None:
    """Cache the image, last pulled this many seconds ago."""
    cache.upstream.add(repository, image, "1")
    pull(cache, repository, image)
    if ago:
        when = time.time() - ago
        os.utime(record(cache, image.manifest), (when, when))


def records(cache: Cache) -> set[str]:
    """Return the digests of the records."""
    return {f"sha256:{digest}" for digest in contents(cache.daemon.image_path)}


def test_unused_images_are_pruned_on_schedule(tmp_path: Path) -> None:
    """Kept and recently pulled images stay, with the blobs that they share."""
    base = make_image("upkeep/base", layer_size=100_000)
    old, kept, young = (make_image(name, base=base) for name in ("old", "kept", "young"))
    settings = {"prune": {"unused_for": "30m", "keep": ["team/kept:"], "every": "1s"}}
    with cache_with(tmp_path, settings) as cache:
        pulled(cache, "team/kept", kept, AN_HOUR)
        pulled(cache, "team/young", young)
        pulled(cache, "team/old", old, AN_HOUR)
        wait_until(
            lambda: records(cache) == {kept.manifest.digest, young.manifest.digest}, SOON, "the old image is pruned"
        )
        wait_until(lambda: not cache.stored(old.layers[-1].digest), SOON, "the image's own layer is pruned")
        wait_until(lambda: f"pruned {cache.upstream.host}/team/old:1" in cache.daemon.log, SOON, "the log reports")
        cache.upstream.close()
        for repository, image in (("team/kept", kept), ("team/young", young)):
            assert_all_served(cache.daemon, cache.upstream.host, repository, "1", image)
        assert cache.ask("team/old/manifests/1").status == 503


def test_store_is_kept_below_its_maximum_size(tmp_path: Path) -> None:
    """The least recently pulled go first, down to 90 %, and no more."""
    images = [plain_image(f"largest/{number}", MIB) for number in range(7)]
    settings = {"prune": {"max_size": "5MiB", "keep": ["team/0:"], "every": "1s"}}
    with ScriptedRegistry() as upstream:
        with daemon_in(tmp_path, upstream) as daemon:
            cache = Cache(daemon, upstream)
            for number, image in enumerate(images[:-1]):
                pulled(cache, f"team/{number}", image, AN_HOUR * (10 - number))
        with daemon_in(tmp_path, upstream, settings=settings) as daemon:
            cache = Cache(daemon, upstream)
            wait_left(cache, [images[number] for number in (0, 3, 4, 5)])
            pulled(cache, "team/6", images[6])
            wait_left(cache, [images[number] for number in (0, 4, 5, 6)])
            for number in (0, 4, 5, 6):
                assert_all_served(daemon, upstream.host, f"team/{number}", "1", images[number])


def wait_left(cache: Cache, images: list[Image]) -> None:
    """Return when exactly these images remain, blobs included."""
    left = {image.manifest.digest for image in images}
    wait_until(lambda: records(cache) == left, SOON, f"{left} are left")
    blobs = {blob.digest[7:] for image in images for blob in image.blobs}
    folder = cache.daemon.image_path / "blobs"
    wait_until(lambda: {path.name for path in folder.iterdir()} == blobs, SOON, "their blobs remain")


def test_damaged_blobs_are_found_and_repaired(tmp_path: Path) -> None:
    """During continuous verification clients receive correct content."""
    index, image = make_index("damaged", layer_size=50_000), make_image("record")
    with cache_with(tmp_path, {"verify": {"every": "1s", "max_rate": "20MB"}}) as cache:
        cache.upstream.add(REPOSITORY, index, "list")
        pull(cache, REPOSITORY, index)
        pulled(cache, "team/record", image)
        layer = index.images[0].layers[0]
        blob_file(cache.daemon, layer.digest).write_bytes(layer.data[:-1] + bytes([layer.data[-1] ^ 1]))
        spoiled = record(cache, image.manifest)
        spoiled.write_text(spoiled.read_text().replace(image.layers[0].digest, f"sha256:{'0' * 64}"))
        for path in (blob_file(cache.daemon, layer.digest), spoiled):
            line = f"quarantined: {path}: "
            wait_until(lambda line=line: line in cache.daemon.log, SOON, line)  # type: ignore[misc]  # a default binds it
        root = cache.daemon.image_path
        wait_until(lambda: has_all_of(root, index) and has_all_of(root, image), SOON, "everything is stored again")
        wait_until(lambda: blob_file(cache.daemon, layer.digest).read_bytes() == layer.data, SOON, "the right bytes")
        quarantined = {path.name for path in (root / "pulls" / "0" / "bad").iterdir()}
        assert quarantined == {layer.digest[7:], image.manifest.digest[7:]}
        assert cache.sent(f"{REPOSITORY}/blobs/{layer.digest}") == 2
        assert_blobs_match_their_digests(root)
        cache.upstream.close()
        assert_all_served(cache.daemon, cache.upstream.host, REPOSITORY, "list", index)
        assert_all_served(cache.daemon, cache.upstream.host, "team/record", "1", image)
        # The last run finds nothing.
        since = cache.log_size
        wait_until(lambda: ", damaged: 0" in cache.daemon.log[since:], SOON, "nothing is damaged")
