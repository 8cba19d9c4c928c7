"""A disk without free blocks or inodes: pruning needs neither, by a command or by the daemon."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType

import pytest

from tests.disk_faults import BLOCK, Ext4, ext4_disk
from tests.images import MIB, Image, Index, digest_of, make_index, random_bytes
from tests.processes import Daemon, wait_until
from tests.real.caches import SOON, Cache, blob_file, open_answer, plain_image, pull, record
from tests.real.stores import assert_all_served, command, contents, hex_of
from tests.upstream import ScriptedRegistry

LAYER = 200_000
OLD, MOVED, STAYS = "team/old", "team/moved", "team/stays"
AN_HOUR = 3600.0

pytestmark = pytest.mark.parametrize("lacking", ["blocks", "inodes"])


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Ext4]:
    """An empty disk."""
    with ext4_disk(tmp_path / "disk", 16 * MIB, 128) as disk:
        yield disk


@pytest.fixture(scope="module")
def pruned_image() -> Image:
    """An image to prune."""
    return plain_image("old", LAYER)


@pytest.fixture(scope="module")
def kept_image() -> Image:
    """An image to keep, with a second name to prune, so that its record is rewritten."""
    return plain_image("stays", LAYER)


def fill(disk: Ext4, lacking: str) -> None:
    """Use up all free blocks or inodes."""
    (disk.fill_blocks if lacking == "blocks" else disk.fill_inodes)()


def free(disk: Ext4, lacking: str) -> int:
    """Return how many are free."""
    return disk.free_blocks if lacking == "blocks" else disk.free_inodes


@contextmanager
def filled(
    tmp_path: Path,
    disk: Ext4,
    lacking: str,
    pruned_image: Image,
    kept_image: Image,
    *,
    running: bool,
    settings: Mapping[str, object] = MappingProxyType({}),
    before: Sequence[tuple[Image | Index, str]] = (),
) -> Iterator[Cache]:
    """Make a store with both images on the full disk; its daemon still runs and holds pulls/0, or has ended."""
    with ScriptedRegistry() as upstream:
        daemon = Daemon(
            tmp_path,
            {upstream.host: "http"},
            "--no-complete-images",
            image_path=disk.path / "images",
            settings=settings,
        )
        with daemon:
            cache = Cache(daemon, upstream)
            for what, repository in (*before, (pruned_image, OLD), (kept_image, STAYS), (kept_image, MOVED)):
                upstream.add(repository, what, "1" if isinstance(what, Image) else "list")
                pull(cache, repository, what)
            wait_until(
                lambda: len(contents(daemon.image_path)[hex_of(kept_image.manifest.digest)].images) > 1, SOON, "both"
            )
            if not running:
                daemon.terminate()
            fill(disk, lacking)
            yield cache
            if running:
                assert daemon.running, daemon.log
                assert_all_served(daemon, upstream.host, STAYS, "1", kept_image)
        assert "Traceback" not in daemon.log


@pytest.mark.parametrize("running", [False, True], ids=["alone", "beside a daemon"])
def test_prune_on_a_full_disk(
    tmp_path: Path, disk: Ext4, pruned_image: Image, kept_image: Image, lacking: str, running: bool
) -> None:
    """A record must be rewritten, too."""
    with filled(tmp_path, disk, lacking, pruned_image, kept_image, running=running) as cache:
        done = command(cache.daemon, "prune", "--pattern", "team/old,team/moved")
        assert f"pruned {cache.upstream.host}/{OLD}:1" in done.stdout
        assert contents(cache.daemon.image_path).keys() == {hex_of(kept_image.manifest.digest)}
        (kept,) = contents(cache.daemon.image_path).values()
        assert not any(MOVED in url for url in kept.images)
        # Files that the daemon has open do not become free.
        least = LAYER // BLOCK if lacking == "blocks" else 3
        assert free(disk, lacking) >= least
        if running:
            assert removed_but_open(cache.daemon) == []


@pytest.mark.parametrize("running", [False, True], ids=["alone", "beside a daemon"])
def test_prune_orphans_on_a_full_disk(
    tmp_path: Path, disk: Ext4, pruned_image: Image, kept_image: Image, lacking: str, running: bool
) -> None:
    orphan = b"".join(random_bytes("orphan", LAYER))
    path = disk.path / "images" / "blobs" / hex_of(digest_of(orphan))
    path.parent.mkdir(parents=True)
    path.write_bytes(orphan)
    with filled(tmp_path, disk, lacking, pruned_image, kept_image, running=running) as cache:
        wait_until(lambda: path.stat().st_ctime < time.time() - 2, SOON, "the files are old enough")
        if not running:
            # A replica has no pulls/, and so no lock file.
            without_pulls(disk, lacking)
        done = command(cache.daemon, "prune", "--orphans", "--older-than", "1s")
        assert f"reclaimed blobs/{path.name}" in done.stdout
        assert not path.exists()
        if lacking == "blocks":
            assert disk.free_blocks >= LAYER // BLOCK


def without_pulls(disk: Ext4, lacking: str) -> None:
    """Remove pulls/, as in a replica, and fill the disk again."""
    disk.make_room()
    shutil.rmtree(disk.path / "images" / "pulls")
    fill(disk, lacking)


@pytest.mark.parametrize("running", [False, True], ids=["alone", "beside a daemon"])
def test_verify_quarantine_on_a_full_disk(
    tmp_path: Path, disk: Ext4, pruned_image: Image, kept_image: Image, lacking: str, running: bool
) -> None:
    """Damaged blobs are removed where they cannot be quarantined: they are never served again."""
    with filled(tmp_path, disk, lacking, pruned_image, kept_image, running=running) as cache:
        done = command(cache.daemon, "verify")
        assert "0 damaged" in done.stdout
        damaged = blob_file(cache.daemon, pruned_image.layers[0].digest)
        with damaged.open("r+b") as file:
            file.write(b"damaged")
        spoiled = record(cache, pruned_image.manifest)
        with spoiled.open("r+b") as file:
            file.write(b'{"')
        done = command(cache.daemon, "verify", status=1)
        for path in (damaged, spoiled):
            assert f"damaged: {path}: " in done.stdout
            assert not path.exists()
        # The first removal makes room for a folder, in which the second blob can be quarantined.
        kept = {path.name for path in (disk.path / "images" / "pulls").glob("*/bad/*")}
        for path in (damaged, spoiled):
            removed = f"removed, no space to quarantine it: {path}" in done.stdout
            assert removed == (path.name not in kept)
        assert not running or len(kept) < 2
        assert "0 damaged" in command(cache.daemon, "verify").stdout


def test_scheduled_prune_on_a_full_disk(
    tmp_path: Path, disk: Ext4, pruned_image: Image, kept_image: Image, lacking: str
) -> None:
    """An image with a name of its own beside that of its index gets a new record when the index is pruned."""
    settings = {"prune": {"unused_for": "30m", "every": "1s"}}
    index = make_index("both", layer_size=LAYER)
    before = ((index, "team/both"), (index.images[0], "team/own"))
    with filled(
        tmp_path, disk, lacking, pruned_image, kept_image, running=True, settings=settings, before=before
    ) as cache:
        when = time.time() - AN_HOUR
        for manifest in (pruned_image.manifest, *index.manifests):
            os.utime(record(cache, manifest), (when, when))
        for image in (pruned_image, *index.images):
            wait_until(lambda image=image: not cache.stored(image.layers[0].digest), SOON, "it is pruned")  # type: ignore[misc]  # a default binds it
        wait_until(lambda: f"pruned {cache.upstream.host}/{OLD}:1" in cache.daemon.log, SOON, "the log reports")
        assert free(disk, lacking) >= (LAYER // BLOCK if lacking == "blocks" else 3)
        assert removed_but_open(cache.daemon) == []
        assert "cannot prune" not in cache.daemon.log


def removed_but_open(daemon: Daemon) -> list[str]:
    """Return the files that the daemon has open although they are deleted."""
    folder = Path(f"/proc/{daemon.process.pid}/fd")
    links = [os.readlink(path) for path in folder.iterdir() if path.is_symlink()]
    return [link for link in links if link.endswith(" (deleted)") and str(daemon.image_path) in link]


def test_reader_of_a_pruned_blob_gets_all_of_it(
    tmp_path: Path, disk: Ext4, pruned_image: Image, kept_image: Image, lacking: str
) -> None:
    """Afterwards the space is free."""
    large = plain_image("large", 6 * MIB)
    with filled(tmp_path, disk, lacking, large, kept_image, running=True) as cache:
        layer = large.layers[0]
        with open_answer(cache.url(f"{OLD}/blobs/{layer.digest}")) as answer:
            got = answer.read(1)
            command(cache.daemon, "prune", "--pattern", OLD)
            assert not cache.stored(layer.digest)
            got += answer.read()
        assert got == layer.data
        wait_until(lambda: removed_but_open(cache.daemon) == [], SOON, "the files are closed")
        assert free(disk, lacking) >= (len(layer.data) // BLOCK if lacking == "blocks" else 3)


@pytest.mark.parametrize("pulls", ["there", "missing"])
def test_daemon_starts_without_free_blocks_or_inodes(
    tmp_path: Path, disk: Ext4, pruned_image: Image, kept_image: Image, lacking: str, pulls: str
) -> None:
    """Also on a replica without pulls/; uncached content is fetched when there is space."""
    with filled(tmp_path, disk, lacking, pruned_image, kept_image, running=False) as cache:
        if pulls == "missing":
            without_pulls(disk, lacking)
        cache.daemon.start()
        assert_all_served(cache.daemon, cache.upstream.host, OLD, "1", pruned_image)
        command(cache.daemon, "prune", "--pattern", OLD)
        command(cache.daemon, "prune", "--orphans")
        if pulls == "missing":
            assert re.search("downloads disabled until there is space", cache.daemon.log)
        new = plain_image("new", LAYER)
        cache.upstream.add("team/new", new, "1")
        disk.make_room()
        pull(cache, "team/new", new)
        assert_all_served(cache.daemon, cache.upstream.host, STAYS, "1", kept_image)
        cache.daemon.terminate()
