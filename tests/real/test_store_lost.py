"""A store that is emptied, replaced, unmounted or made read-only under the running daemon."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ociregistry.store.workdir import find_daemon
from tests.client import fetch
from tests.disk_faults import small_disk
from tests.images import MIB, Image, digest_of
from tests.processes import run, wait_until
from tests.real.caches import SEEN, Cache, cache_in, daemon_in, plain_image, short_body
from tests.upstream import ScriptedRegistry
from tests.upstream_rules import Hold, Reply

DISK = 100 * MIB


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Cache]:
    """A cache for this test alone."""
    with cache_in(tmp_path) as cache:
        yield cache


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Cache]:
    """A cache whose store is a volume that is mounted."""
    with (
        ScriptedRegistry() as upstream,
        small_disk(tmp_path / "images", DISK),
        daemon_in(tmp_path, upstream) as daemon,
    ):
        yield Cache(daemon, upstream)


def publish(cache: Cache, tag: str, size: int = MIB) -> Image:
    """Publish an image at the upstream."""
    image = plain_image(tag, size)
    cache.upstream.add("lost", image, tag)
    return image


def blob_of(image: Image) -> str:
    """Return the path of its layer."""
    return f"lost/blobs/{image.layers[0].digest}"


def pull(cache: Cache, tag: str, image: Image) -> None:
    """Pull the image, from the upstream or from the cache."""
    assert cache.ask(f"lost/manifests/{tag}").body == image.manifest.data
    assert digest_of(cache.ask(blob_of(image)).body) == image.layers[0].digest
    cache.wait_stored(image.layers[0].digest)


def health(cache: Cache) -> Any:
    """Return what /health says, which is always status 200."""
    answer = fetch(f"{cache.daemon.url}/health")
    assert answer.status == 200
    return json.loads(answer.body)


def emptied(root: Path) -> None:
    """Remove everything in the store."""
    for path in root.iterdir():
        shutil.rmtree(path)


def without_pulls(root: Path) -> None:
    """Remove pulls/, as rsync does with `--delete` from a store without it."""
    shutil.rmtree(root / "pulls")


def moved_away(root: Path) -> None:
    """Put an empty folder in the place of the store."""
    root.rename(root.with_name("old"))
    root.mkdir()


@pytest.mark.parametrize("lose", [emptied, without_pulls, moved_away])
def test_lost_store_is_used_again(cache: Cache, lose: Callable[[Path], None]) -> None:
    """Also by commands, which find the daemon through pulls/<n>/; it continues no download into a lost file."""
    root = cache.daemon.image_path
    first, second, large = publish(cache, "first"), publish(cache, "second"), publish(cache, "large", 8 * MIB)
    pull(cache, "first", first)
    assert cache.ask("lost/manifests/large").status == 200
    held = Hold(2 * MIB)
    with cache.scripted(f"/v2/{blob_of(large)}", held), cache.opened(blob_of(large)) as answer:
        begun = answer.read(MIB)
        lose(root)
        wait_until((root / "pulls" / "0" / "lock").exists, SEEN, "a new pulls/0/")
        held.release.set()
        assert large.layers[0].data.startswith(begun + short_body(answer))
        # The download begins anew by itself.
        cache.wait_stored(large.layers[0].digest)
    pull(cache, "second", second)
    pull(cache, "first", first)
    wait_until((root / "pulls" / "0" / "socket").exists, SEEN, "the control socket is back")
    found = find_daemon(root)
    assert found is not None
    found.close()
    assert (
        len([line for line in cache.daemon.log.splitlines() if "#warn]" in line and "removed or replaced" in line])
        == 1
    )
    # A stop ends it in order, and the next start finds everything.
    cache.daemon.terminate()
    assert "Traceback" not in cache.daemon.log
    cache.daemon.start()
    pull(cache, "second", second)


def test_unmounted_volume_and_its_return(mounted: Cache, tmp_path: Path) -> None:
    """The empty folder below is used meanwhile; then the volume again, with what it has."""
    root, kept = mounted.daemon.image_path, tmp_path / "kept"
    first, second = publish(mounted, "first"), publish(mounted, "second")
    pull(mounted, "first", first)
    kept.mkdir()
    run(["mount", "--bind", str(root), str(kept)])
    run(["umount", "--lazy", str(root)])
    wait_until((root / "pulls" / "0" / "lock").exists, SEEN, "the folder below is used")
    pull(mounted, "second", second)
    wait_until(lambda: health(mounted)["images"] == 1, SEEN, "only what is there counts")
    run(["mount", "--bind", str(kept), str(root)])
    run(["umount", str(kept)])
    wait_until(lambda: mounted.daemon.log.count("has removed or replaced") == 2, SEEN, "the volume is used again")
    with mounted.scripted("/v2/*", Reply(503)):
        wait_until(lambda: mounted.ask("lost/manifests/first").status == 200, SEEN, "what it has is served")
        assert digest_of(mounted.ask(blob_of(first)).body) == first.layers[0].digest
    pull(mounted, "second", second)


def test_read_only_store(mounted: Cache) -> None:
    """Hits go on, a miss is told why, and everything works again afterwards."""
    root = str(mounted.daemon.image_path)
    first, second = publish(mounted, "first"), publish(mounted, "second")
    pull(mounted, "first", first)
    # Over itself: a file system with files that are open for writing cannot be made read-only.
    run(["mount", "--bind", root, root])
    try:
        run(["mount", "-o", "remount,bind,ro", root])
        told = "the store cannot be written, nothing new is kept in it: "
        wait_until(lambda: told in mounted.daemon.log, SEEN, "it is logged")
        for _ in range(3):
            pull(mounted, "first", first)
            refused = mounted.ask("lost/manifests/second")
            assert refused.status == 503
            assert b"cannot be stored: Read-only file system" in refused.body
        reason = f"{told}{root}/blobs: its file system is read-only"
        told_by_health = health(mounted)
        assert (told_by_health["status"], told_by_health["reasons"]) == ("degraded", [reason])
        assert reason in mounted.daemon.log
    finally:
        # The daemon keeps files open.
        run(["umount", "--lazy", root])
    wait_until(lambda: "the store can be written again" in mounted.daemon.log, SEEN, "it is logged")
    pull(mounted, "second", second)
    assert (health(mounted)["status"], health(mounted)["reasons"]) == ("ok", [])
    assert mounted.daemon.log.count(told) == 1
