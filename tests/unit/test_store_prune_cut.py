"""Pruning is killed, or the power is cut, at every single file operation.

Afterwards every record is complete and has its former blobs, an index has its images, a tag has its former meaning or
none, everything outside the selection is unchanged, and pruning again reaches the same end.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import pytest

from ociregistry.manifests import Manifest
from ociregistry.names import Digest
from ociregistry.store.files import SharedFile
from ociregistry.store.index import Inventory
from ociregistry.store.orphans import remove_orphans
from ociregistry.store.prune import PruneSet, Selection
from tests.lossy import Disk, LossyFiles, PowerCut
from tests.unit.support.stores import Stock, Unsynced, by_name, day, list_of, named

LAYER = b"a layer of several"


@dataclass
class Scene:
    """A store, the selection to prune, and what must stay unchanged."""

    stock: Stock
    choose: Selection = field(default_factory=lambda: by_name("a"))
    stays: list[tuple[Manifest, set[str]]] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    """Tags whose meaning must not change."""


def an_image(scene: Scene) -> None:
    """Prune an image that shares a blob with one that stays."""
    scene.stock.image((b"config", LAYER), "a:1")
    scene.stays.append((scene.stock.image((b"other", LAYER), "b:1", "b@"), {"b:1", "b@"}))


def a_list(scene: Scene) -> None:
    """Prune an index; one of its images stays with another index, one with its own tag."""
    own, shared = scene.stock.image((b"own", LAYER), "a@"), scene.stock.image((b"shared", LAYER), "a@", "b@")
    tagged = scene.stock.image((b"tagged",), "a@", "b:2")
    scene.stock.put(list_of(own, shared, tagged), "a:1")
    other = scene.stock.put(list_of(shared, seed="other"), "b:1")
    scene.choose = by_name("a:1")
    scene.stays.append((other, {"b:1"}))


def a_name_of_several(scene: Scene) -> None:
    """Prune one of several names: the record is rewritten."""
    image = scene.stock.image((b"config", LAYER), "a:1", "b:1", pulled=day(3))
    scene.stock.put(list_of(image), "a:2", "b:2")
    scene.tags += ["b:1", "b:2"]


def a_list_that_moved_away(scene: Scene) -> None:
    """Prune an index whose tag moved there from an image that has another name."""
    scene.stock.image((b"old", LAYER), "a:1", "b:1", confirmed=day(1))
    new = scene.stock.image((b"new", LAYER), "a@")
    scene.stock.put(list_of(new), "a:1", confirmed=day(2))
    scene.tags += ["a:1", "b:1"]


def tags_that_moved(scene: Scene) -> None:
    """Prune tags that moved between images, and from an image to its index."""
    for number in range(4):
        scene.stock.image((b"%d" % number, LAYER), "a:1", confirmed=day(number))
    image = scene.stock.image((b"an image",), "a:2", confirmed=day(1))
    scene.stock.put(list_of(image), "a:2", confirmed=day(2))
    scene.tags += ["a:1", "a:2"]


def a_tag_that_moved(scene: Scene) -> None:
    """Prune a tag that moved between images."""
    scene.stock.image((b"old",), "a:1", confirmed=day(1))
    scene.stock.image((b"new",), "a:1", confirmed=day(2))
    scene.tags.append("a:1")


def lists_of_lists(scene: Scene) -> None:
    """Prune nested indexes, the inner one first by name."""
    image = scene.stock.image((b"config", LAYER), "a@")
    inner = scene.stock.put(list_of(image), "a:inner")
    scene.stock.put(list_of(inner), "b:outer")
    scene.choose = by_name("a", "b")


def a_list_of_what_another_has(scene: Scene) -> None:
    """Prune an index whose image has names by both indexes; pruning again must not remove the image."""
    image = scene.stock.image((b"config", LAYER), "a@")
    scene.stock.put(list_of(image), "a:1")
    scene.stays.append((scene.stock.put(list_of(image, seed="other"), "b:1"), {"b:1"}))


SCENES = {scene.__name__: scene for scene in (an_image, a_list, a_name_of_several, a_list_that_moved_away)}


def begin(root: Path, scenery: Callable[[Scene], None]) -> Scene:
    """Build the case in an empty folder."""
    shutil.rmtree(root, ignore_errors=True)
    scene = Scene(Stock(root))
    scenery(scene)
    (root / "pulls" / "0").mkdir()
    return scene


def check(left: Stock, before: Stock, scene: Scene, *, lists: bool = True) -> None:
    """Check what must hold of `left`; with `lists`, also that indexes have their images."""
    records, had = left.inventory(), before.inventory()
    assert not records.unreadable
    assert records.records.keys() <= had.records.keys()
    for digest, kept in records.records.items():
        assert records.missing(digest).keys() <= had.missing(digest).keys()
        new = kept.record.images.items() - had.records[digest].record.images.items()
        assert all(url.endswith(f"@{digest}") for url, _ in new), "it has got a tag"
        assert kept.record.images, "a record without a name could never be pruned"
        children = [child.manifest.digest for child in had.children(digest)]
        assert not lists or records.records.keys() >= set(children), "a list lost an image"
    for manifest, names in scene.stays:
        assert left.names(manifest) == names
    for tag in scene.tags:
        assert left.meaning(tag) in (before.meaning(tag), None), f"{tag} means something else"


def all_of(stock: Stock) -> tuple[dict[Digest, set[str]], list[str]]:
    """Return records with names, and blobs."""
    records = {digest: set(kept.record.images) for digest, kept in stock.inventory().records.items()}
    return records, sorted(path.name for path in (stock.root / "blobs").iterdir())


def cut_everywhere(
    root: Path,
    scenery: Callable[[Scene], None],
    look: Callable[[LossyFiles, Scene], None],
    disk: type[LossyFiles] = LossyFiles,
) -> None:
    """Cut at the first operation, at the second, and so on; `look` checks each result."""
    for number in count():
        scene = begin(root, scenery)
        files = disk(scene.stock.root, "now", number)
        with suppress(PowerCut):
            scene.stock.prune_only(scene.choose, files)
        try:
            look(files, scene)
        except AssertionError as error:
            raise AssertionError(f"after {files.operations}: {error}") from error
        if not files.off:
            assert len(files.operations) > 3
            return


def written(disk: Disk, root: Path) -> Stock:
    """Return the store on that disk."""
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    disk.write(root)
    return Stock(root)


@pytest.mark.parametrize("scenery", [*SCENES.values(), tags_that_moved, lists_of_lists])
def test_kill_leaves_no_incomplete_image(tmp_path: Path, scenery: Callable[[Scene], None]) -> None:
    before = begin(tmp_path / "before", scenery)

    def look(files: LossyFiles, scene: Scene) -> None:
        check(scene.stock, before.stock, scene)

    cut_everywhere(tmp_path / "store", scenery, look)


@pytest.mark.parametrize("scenery", [*SCENES.values(), a_tag_that_moved])
def test_power_cut_leaves_no_incomplete_image(tmp_path: Path, scenery: Callable[[Scene], None]) -> None:
    """Removal of a record is durable before its blobs are removed."""
    before = begin(tmp_path / "before", scenery)

    def look(files: LossyFiles, scene: Scene) -> None:
        for disk in files.left_by_power_cut():
            check(written(disk, tmp_path / "left"), before.stock, scene, lists=False)

    cut_everywhere(tmp_path / "store", scenery, look)


@pytest.mark.parametrize("scenery", [an_image, a_name_of_several, a_list_that_moved_away, tags_that_moved])
def test_pruning_again_after_a_kill_completes_it(tmp_path: Path, scenery: Callable[[Scene], None]) -> None:
    """Except for blobs, which are orphans then."""
    before, whole = begin(tmp_path / "before", scenery), begin(tmp_path / "whole", scenery)
    whole.stock.prune(whole.choose)
    assert all_of(whole.stock) != all_of(before.stock)

    def look(files: LossyFiles, scene: Scene) -> None:
        scene.stock.prune_only(scene.choose)
        remove_orphans(scene.stock.root, day(10**5), Unsynced())
        assert all_of(scene.stock) == all_of(whole.stock)

    cut_everywhere(tmp_path / "store", scenery, look)


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
@pytest.mark.parametrize("scenery", [*SCENES.values(), tags_that_moved, lists_of_lists])
def test_disk_error_leaves_no_incomplete_image(tmp_path: Path, scenery: Callable[[Scene], None], error: int) -> None:
    """The error is raised and the lock released."""
    before = begin(tmp_path / "before", scenery)
    for number in count():
        scene = begin(tmp_path / "store", scenery)
        failing = Failing(number, error)
        with suppress(OSError):
            scene.stock.prune_only(scene.choose, failing)
            assert failing.left >= 0
        check(scene.stock, before.stock, scene)
        scene.stock.prune_only(scene.choose)
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


def with_another(scenery: Callable[[Scene], None]) -> Callable[[Scene], None]:
    """Return the case with an additional unrelated image that is pruned."""

    def daemon_client(scene: Scene) -> None:
        scenery(scene)
        chosen, another = scene.choose.matches, named("another")
        assert chosen is not None
        scene.stock.image((b"another",), "another:1")
        scene.choose = Selection(matches=lambda url: chosen(url) or another(url))

    return daemon_client


ALL_SCENES = [*SCENES.values(), a_list_of_what_another_has, tags_that_moved, a_tag_that_moved, lists_of_lists]


@pytest.mark.parametrize("scenery", ALL_SCENES)
def test_pruning_without_a_free_inode_succeeds(tmp_path: Path, scenery: Callable[[Scene], None]) -> None:
    scenery = with_another(scenery)
    whole, scene = begin(tmp_path / "whole", scenery), begin(tmp_path / "store", scenery)
    scene.stock.prune(scene.choose, FullFiles(scene.stock.root, "now"))
    whole.stock.prune(whole.choose)
    assert all_of(scene.stock) == all_of(whole.stock)


@pytest.mark.parametrize("scenery", ALL_SCENES)
def test_kill_without_a_free_inode(tmp_path: Path, scenery: Callable[[Scene], None]) -> None:
    scenery = with_another(scenery)
    before = begin(tmp_path / "before", scenery)

    def look(files: LossyFiles, scene: Scene) -> None:
        check(scene.stock, before.stock, scene)
        scene.stock.prune_only(scene.choose)
        check(scene.stock, before.stock, scene)

    cut_everywhere(tmp_path / "store", scenery, look, FullFiles)


@pytest.mark.parametrize("scenery", [*SCENES.values(), a_tag_that_moved])
def test_power_cut_without_a_free_inode(tmp_path: Path, scenery: Callable[[Scene], None]) -> None:
    scenery = with_another(scenery)
    before = begin(tmp_path / "before", scenery)

    def look(files: LossyFiles, scene: Scene) -> None:
        for disk in files.left_by_power_cut():
            check(written(disk, tmp_path / "left"), before.stock, scene, lists=False)

    cut_everywhere(tmp_path / "store", scenery, look, FullFiles)


def test_record_to_rewrite_first_stays_if_no_inode_can_be_freed(tmp_path: Path) -> None:
    """Otherwise the tag would get its former meaning again. If another record goes, this one goes too."""
    stock = Stock(tmp_path / "store")
    old = stock.image((b"old",), "a:1", confirmed=day(1))
    new = stock.image((b"new",), "a:1", confirmed=day(2))

    def choose(inventory: Inventory) -> PruneSet:
        prune_set = PruneSet(inventory)
        for digest in inventory.records.keys() - {old.digest}:
            prune_set.take_record(digest)
        return prune_set

    with pytest.raises(OSError, match="No space left"):
        stock.prune_only(choose, FullFiles(stock.root, "now"))
    assert (stock.meaning("a:1"), stock.names(old)) == (new.digest, {"a:1"})
    another = stock.image((b"another",), "b:1")
    stock.prune_only(choose, FullFiles(stock.root, "now"))
    assert (stock.names(new), stock.names(another), stock.names(old)) == (None, None, {"a@"})
