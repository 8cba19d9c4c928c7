"""Pruning is killed, or the power is cut, at every single file operation.

Afterwards every record is complete and has its former blobs, an index has its images, a tag has its former meaning or
none, everything outside the selection is unchanged, and pruning again reaches the same end.
"""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import pytest

from ociregistry.manifests import Manifest
from ociregistry.names import Digest
from ociregistry.store.files import SharedFile
from ociregistry.store.orphans import remove_orphans
from ociregistry.store.prune import Criteria, PruneSet, choose_nothing, planned
from ociregistry.store.snapshot import Snapshot
from tests.lossy import Disk, LossyFiles, PowerCut
from tests.unit.support.stores import StoreDir, Unsynced, by_name, day, list_of, named

LAYER = b"a layer of several"


@dataclass
class PruneCase:
    """A store, the selection to prune, and what must stay unchanged."""

    store_dir: StoreDir
    choose: Criteria = field(default_factory=lambda: by_name("a"))
    stays: list[tuple[Manifest, set[str]]] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    """Tags whose meaning must not change."""


def an_image(case: PruneCase) -> None:
    """Prune an image that shares a blob with one that stays."""
    case.store_dir.image((b"config", LAYER), "a:1")
    case.stays.append((case.store_dir.image((b"other", LAYER), "b:1", "b@"), {"b:1", "b@"}))


def index_with_shared_images(case: PruneCase) -> None:
    """Prune an index; one of its images stays with another index, one with its own tag."""
    own, shared = case.store_dir.image((b"own", LAYER), "a@"), case.store_dir.image((b"shared", LAYER), "a@", "b@")
    tagged = case.store_dir.image((b"tagged",), "a@", "b:2")
    case.store_dir.put(list_of(own, shared, tagged), "a:1")
    other = case.store_dir.put(list_of(shared, seed="other"), "b:1")
    case.choose = by_name("a:1")
    case.stays.append((other, {"b:1"}))


def one_of_several_names(case: PruneCase) -> None:
    """Prune one of several names: the record is rewritten."""
    image = case.store_dir.image((b"config", LAYER), "a:1", "b:1", pulled=day(3))
    case.store_dir.put(list_of(image), "a:2", "b:2")
    case.tags += ["b:1", "b:2"]


def tag_moved_from_image_to_index(case: PruneCase) -> None:
    """Prune an index whose tag moved there from an image that has another name."""
    case.store_dir.image((b"old", LAYER), "a:1", "b:1", confirmed=day(1))
    new = case.store_dir.image((b"new", LAYER), "a@")
    case.store_dir.put(list_of(new), "a:1", confirmed=day(2))
    case.tags += ["a:1", "b:1"]


def moved_tags(case: PruneCase) -> None:
    """Prune tags that moved between images, and from an image to its index."""
    for number in range(4):
        case.store_dir.image((b"%d" % number, LAYER), "a:1", confirmed=day(number))
    image = case.store_dir.image((b"an image",), "a:2", confirmed=day(1))
    case.store_dir.put(list_of(image), "a:2", confirmed=day(2))
    case.tags += ["a:1", "a:2"]


def moved_tag(case: PruneCase) -> None:
    """Prune a tag that moved between images."""
    case.store_dir.image((b"old",), "a:1", confirmed=day(1))
    case.store_dir.image((b"new",), "a:1", confirmed=day(2))
    case.tags.append("a:1")


def nested_indexes(case: PruneCase) -> None:
    """Prune nested indexes, the inner one first by name."""
    image = case.store_dir.image((b"config", LAYER), "a@")
    inner = case.store_dir.put(list_of(image), "a:inner")
    case.store_dir.put(list_of(inner), "b:outer")
    case.choose = by_name("a", "b")


def index_of_shared_image(case: PruneCase) -> None:
    """Prune an index whose image has names by both indexes; pruning again must not remove the image."""
    image = case.store_dir.image((b"config", LAYER), "a@")
    case.store_dir.put(list_of(image), "a:1")
    case.stays.append((case.store_dir.put(list_of(image, seed="other"), "b:1"), {"b:1"}))


BUILDERS = {
    case.__name__: case
    for case in (an_image, index_with_shared_images, one_of_several_names, tag_moved_from_image_to_index)
}


def begin(root: Path, build: Callable[[PruneCase], None]) -> PruneCase:
    """Build the case in an empty folder."""
    shutil.rmtree(root, ignore_errors=True)
    case = PruneCase(StoreDir(root))
    build(case)
    (root / "pulls" / "0").mkdir()
    return case


def check(left: StoreDir, before: StoreDir, case: PruneCase, *, lists: bool = True) -> None:
    """Check what must hold of `left`; with `lists`, also that indexes have their images."""
    records, had = left.snapshot(), before.snapshot()
    assert not records.unreadable
    assert records.records.keys() <= had.records.keys()
    for digest, kept in records.records.items():
        assert records.missing(digest).keys() <= had.missing(digest).keys()
        new = kept.record.images.items() - had.records[digest].record.images.items()
        assert all(url.endswith(f"@{digest}") for url, _ in new), "it has got a tag"
        assert kept.record.images, "a record without a name could never be pruned"
        children = had.index.children(digest)
        assert not lists or records.records.keys() >= set(children), "a list lost an image"
    for manifest, names in case.stays:
        assert left.names(manifest) == names
    for tag in case.tags:
        assert left.meaning(tag) in (before.meaning(tag), None), f"{tag} means something else"


def contents_of(store_dir: StoreDir) -> tuple[dict[Digest, set[str]], list[str]]:
    """Return records with names, and blobs."""
    records = {digest: set(kept.record.images) for digest, kept in store_dir.snapshot().records.items()}
    return records, sorted(path.name for path in (store_dir.root / "blobs").iterdir())


def cut_everywhere(
    root: Path,
    build: Callable[[PruneCase], None],
    look: Callable[[LossyFiles, PruneCase], None],
    disk: type[LossyFiles] = LossyFiles,
) -> None:
    """Cut at the first operation, at the second, and so on; `look` checks each result."""
    for number in count():
        case = begin(root, build)
        files = disk(case.store_dir.root, "now", number)
        with suppress(PowerCut):
            case.store_dir.prune_only(case.choose, files)
        try:
            look(files, case)
        except AssertionError as error:
            raise AssertionError(f"after {files.operations}: {error}") from error
        if not files.off:
            assert len(files.operations) > 3
            return


def written(disk: Disk, root: Path) -> StoreDir:
    """Return the store on that disk."""
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    disk.write(root)
    return StoreDir(root)


@pytest.mark.parametrize("build", [*BUILDERS.values(), moved_tags, nested_indexes])
def test_kill_leaves_no_incomplete_image(tmp_path: Path, build: Callable[[PruneCase], None]) -> None:
    before = begin(tmp_path / "before", build)

    def look(files: LossyFiles, case: PruneCase) -> None:
        check(case.store_dir, before.store_dir, case)

    cut_everywhere(tmp_path / "store", build, look)


@pytest.mark.parametrize("build", [*BUILDERS.values(), moved_tag])
def test_power_cut_leaves_no_incomplete_image(tmp_path: Path, build: Callable[[PruneCase], None]) -> None:
    """Removal of a record is durable before its blobs are removed."""
    before = begin(tmp_path / "before", build)

    def look(files: LossyFiles, case: PruneCase) -> None:
        for disk in files.left_by_power_cut():
            check(written(disk, tmp_path / "left"), before.store_dir, case, lists=False)

    cut_everywhere(tmp_path / "store", build, look)


@pytest.mark.parametrize("build", [*BUILDERS.values(), moved_tags, nested_indexes])
def test_pruning_again_after_a_kill_completes_it(tmp_path: Path, build: Callable[[PruneCase], None]) -> None:
    """Except for blobs, which are orphans then."""
    before, whole = begin(tmp_path / "before", build), begin(tmp_path / "whole", build)
    whole.store_dir.prune(whole.choose)
    assert contents_of(whole.store_dir) != contents_of(before.store_dir)

    def look(files: LossyFiles, case: PruneCase) -> None:
        case.store_dir.prune_only(case.choose)
        remove_orphans(case.store_dir.root, day(10**5), Unsynced())
        assert contents_of(case.store_dir) == contents_of(whole.store_dir)

    cut_everywhere(tmp_path / "store", build, look)


class Failing(Unsynced):
    """A disk on which operations from number `fails_at` on fail with this errno."""

    def __init__(self, fails_at: int, error: int) -> None:
        self.left = fails_at
        self._error = error

    def _do(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise OSError(self._error, os.strerror(self._error))

    def create(self, path: Path) -> SharedFile:
        self._do()
        return super().create(path)

    def write(self, file: SharedFile, data: bytes, offset: int) -> None:
        self._do()
        super().write(file, data, offset)

    def sync(self, file: SharedFile) -> None:
        self._do()
        super().sync(file)

    def rename(self, path: Path, target: Path) -> None:
        self._do()
        super().rename(path, target)

    def sync_folder(self, folder: Path) -> None:
        self._do()
        super().sync_folder(folder)

    def unlink(self, path: Path) -> None:
        self._do()
        super().unlink(path)


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("build", [*BUILDERS.values(), moved_tags, nested_indexes])
def test_disk_error_leaves_no_incomplete_image(
    tmp_path: Path, build: Callable[[PruneCase], None], error: int
) -> None:
    """The error is raised and the lock released."""
    before = begin(tmp_path / "before", build)
    for number in count():
        case = begin(tmp_path / "store", build)
        failing = Failing(number, error)
        with suppress(OSError):
            case.store_dir.prune_only(case.choose, failing)
            assert failing.left >= 0
        check(case.store_dir, before.store_dir, case)
        case.store_dir.prune_only(case.choose)
        if failing.left >= 0:
            assert number > 3
            return


# Without a free inode


class FullFiles(LossyFiles):
    """A disk that can create a file only after removing another; the process ends as in `LossyFiles`."""

    free = 0

    def create(self, path: Path) -> SharedFile:
        """Create the file.

        Raises:
            OSError: no inode is free.
        """
        self.unlink(path)
        if not self.free:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.free -= 1
        return super().create(path)

    def rename(self, path: Path, target: Path) -> None:
        """Free the inode of a replaced file."""
        self.free += target.exists()
        super().rename(path, target)

    def unlink(self, path: Path) -> None:
        """Free the inode of the file."""
        there = path.exists()
        super().unlink(path)
        self.free += there


def whole_indexes(case: PruneCase) -> None:
    """Prune an index of an index and two images."""
    images = [case.store_dir.image((b"%d" % number, LAYER), "a@") for number in range(2)]
    case.store_dir.put(list_of(case.store_dir.put(list_of(images[0]), "a@"), images[1]), "a:1")
    case.choose = by_name("a:1")


@pytest.mark.parametrize("disk", [LossyFiles, FullFiles])
def test_any_prune_finishes_what_a_killed_one_left_of_an_index(tmp_path: Path, disk: type[LossyFiles]) -> None:
    """Whatever the next prune selects: either the whole index is still there, or nothing of it."""

    def look(files: LossyFiles, case: PruneCase) -> None:
        dry_run = planned(case.store_dir.root, choose_nothing)
        assert case.store_dir.prune_only(choose_nothing) == dry_run
        assert len(case.store_dir.snapshot().records) in (0, 4)
        assert not list((case.store_dir.root / "pulls").glob("*.pruned"))

    cut_everywhere(tmp_path / "store", whole_indexes, look, disk)


def killed_after_the_index(root: Path) -> tuple[StoreDir, Manifest, Manifest]:
    """Return a store in which a prune was killed when the index had gone, the index, and its image."""
    store_dir = StoreDir(root)
    image = store_dir.image((b"config", LAYER), "a@")
    index = store_dir.put(list_of(image), "a:1")
    with suppress(PowerCut):
        store_dir.prune_only(by_name("a:1"), LossyFiles(root, "now", 1))
    assert (store_dir.names(index), store_dir.names(image)) == (None, {"a@"})
    return store_dir, index, image


def test_index_stored_again_after_a_kill_keeps_its_images(tmp_path: Path) -> None:
    store_dir, index, image = killed_after_the_index(tmp_path / "store")
    store_dir.put(index, "a:2")
    store_dir.prune(choose_nothing)
    assert (store_dir.names(index), store_dir.names(image)) == ({"a:2"}, {"a@"})
    store_dir.prune(by_name("a:2"))
    assert store_dir.names(image) is None


def test_image_that_was_pulled_after_a_kill_stays(tmp_path: Path) -> None:
    store_dir, _, image = killed_after_the_index(tmp_path / "store")
    os.utime(store_dir.path(image), (time.time() + 60, time.time() + 60))
    store_dir.prune(choose_nothing)
    assert store_dir.names(image) == {"a@"}
    assert not list((store_dir.root / "pulls").glob("*.pruned"))


def with_unrelated_image(build: Callable[[PruneCase], None]) -> Callable[[PruneCase], None]:
    """Return the case with an additional unrelated image that is pruned."""

    def build_both(case: PruneCase) -> None:
        build(case)
        chosen, another = case.choose.matches, named("another")
        assert chosen is not None
        case.store_dir.image((b"another",), "another:1")
        case.choose = Criteria(matches=lambda url: chosen(url) or another(url))

    return build_both


ALL_BUILDERS = [*BUILDERS.values(), index_of_shared_image, moved_tags, moved_tag, nested_indexes]


@pytest.mark.parametrize("build", ALL_BUILDERS)
def test_pruning_without_a_free_inode_succeeds(tmp_path: Path, build: Callable[[PruneCase], None]) -> None:
    build = with_unrelated_image(build)
    whole, case = begin(tmp_path / "whole", build), begin(tmp_path / "store", build)
    case.store_dir.prune(case.choose, FullFiles(case.store_dir.root, "now"))
    whole.store_dir.prune(whole.choose)
    assert contents_of(case.store_dir) == contents_of(whole.store_dir)


@pytest.mark.parametrize("build", ALL_BUILDERS)
def test_kill_without_a_free_inode(tmp_path: Path, build: Callable[[PruneCase], None]) -> None:
    build = with_unrelated_image(build)
    before = begin(tmp_path / "before", build)

    def look(files: LossyFiles, case: PruneCase) -> None:
        check(case.store_dir, before.store_dir, case)
        case.store_dir.prune_only(case.choose)
        check(case.store_dir, before.store_dir, case)

    cut_everywhere(tmp_path / "store", build, look, FullFiles)


@pytest.mark.parametrize("build", [*BUILDERS.values(), moved_tag])
def test_power_cut_without_a_free_inode(tmp_path: Path, build: Callable[[PruneCase], None]) -> None:
    build = with_unrelated_image(build)
    before = begin(tmp_path / "before", build)

    def look(files: LossyFiles, case: PruneCase) -> None:
        for disk in files.left_by_power_cut():
            check(written(disk, tmp_path / "left"), before.store_dir, case, lists=False)

    cut_everywhere(tmp_path / "store", build, look, FullFiles)


def test_record_to_rewrite_first_stays_if_no_inode_can_be_freed(tmp_path: Path) -> None:
    """Otherwise the tag would get its former meaning again. If another record goes, this one goes too."""
    store_dir = StoreDir(tmp_path / "store")
    old = store_dir.image((b"old",), "a:1", confirmed=day(1))
    new = store_dir.image((b"new",), "a:1", confirmed=day(2))

    def choose(snapshot: Snapshot) -> PruneSet:
        prune_set = PruneSet(snapshot)
        for digest in snapshot.records.keys() - {old.digest}:
            prune_set.take_record(digest)
        return prune_set

    with pytest.raises(OSError, match="No space left"):
        store_dir.prune_only(choose, FullFiles(store_dir.root, "now"))
    assert (store_dir.meaning("a:1"), store_dir.names(old)) == (new.digest, {"a:1"})
    another = store_dir.image((b"another",), "b:1")
    store_dir.prune_only(choose, FullFiles(store_dir.root, "now"))
    assert (store_dir.names(new), store_dir.names(another), store_dir.names(old)) == (None, None, {"a@"})
