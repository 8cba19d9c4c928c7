"""Pruning removes what matches with everything that only it needs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import ociregistry.store.prune
from ociregistry.names import Digest
from ociregistry.store.files import lock
from ociregistry.store.prune import Criteria, PruneSet, planned
from ociregistry.store.snapshot import Snapshot
from ociregistry.store.workdir import store_locked
from tests.unit.support.stores import StoreDir, by_name, calls_of, day, image_of, in_memory, list_of, url_of

ONE, TWO = (b"config", b"layer"), (b"another config", b"layer")
SHARED, OWN = b"layer", b"config"


@pytest.fixture
def store_dir(tmp_path: Path) -> StoreDir:
    """Return an empty store."""
    return StoreDir(tmp_path / "store")


def tree(root: Path) -> dict[str, tuple[bytes, int]]:
    """Return content and mtime of all files except locks."""
    paths = (path for path in root.rglob("*") if path.is_file() and path.name != "lock")
    return {str(path.relative_to(root)): (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}


# Records


def test_matching_url_is_removed_and_record_goes_with_its_last_url(store_dir: StoreDir) -> None:
    image = store_dir.image(ONE, "a:1", "a:2", "b:1")
    plan = store_dir.prune(by_name("a:1"))
    assert ([row.url for row in plan.rows], plan.records, dict(plan.blobs)) == ([url_of("a:1")], (), {})
    assert store_dir.names(image) == {"a:2", "b:1"}
    store_dir.prune(by_name("b"))
    assert (store_dir.names(image), store_dir.has(*ONE)) == ({"a:2"}, [True, True])
    plan = store_dir.prune(by_name("a:2"))
    assert [kept.manifest for kept in plan.records] == [image]
    assert plan.blobs == {Digest.of(blob): len(blob) for blob in ONE}
    assert (store_dir.names(image), store_dir.has(*ONE)) == (None, [False, False])


def test_other_images_stay_unchanged(store_dir: StoreDir) -> None:
    store_dir.image(ONE, "a:1", "b:1")
    store_dir.put(list_of(image_of(*ONE)), "b:2")
    before = tree(store_dir.root)
    plan = store_dir.prune(by_name("c"))
    assert (plan.rows, plan.records, plan.blobs, plan.bytes, plan.bytes_of) == ((), (), {}, 0, {})
    assert tree(store_dir.root) == before


def test_dry_run_changes_nothing(store_dir: StoreDir) -> None:
    store_dir.put(list_of(store_dir.image(ONE, "a@")), "a:1", "b:1")
    store_dir.image(TWO, "c:1", "a:2")
    before = tree(store_dir.root)
    dry_run = planned(store_dir.root, by_name("a"))
    assert (tree(store_dir.root), len(dry_run.rows)) == (before, 3)


def test_dates_and_last_pull_survive_a_rewrite(store_dir: StoreDir) -> None:
    image = store_dir.image(ONE, "a:1", "b:1", created=day(1), confirmed=day(2), pulled=day(3))
    path = store_dir.path(image)
    os.utime(path, ns=(0, 1_767_225_600_123_456_789))
    store_dir.prune(by_name("a"))
    assert abs(path.stat().st_mtime_ns - 1_767_225_600_123_456_789) < 10_000
    (row,) = store_dir.snapshot().rows
    assert (row.dates.created, row.dates.confirmed) == (day(1), day(2))


def test_rewrite_leaves_no_temporary_files(store_dir: StoreDir) -> None:
    store_dir.image(ONE, "a:1", "b:1")
    store_dir.prune(by_name("a"))
    assert [path.name for path in (store_dir.root / "pulls").rglob("*") if path.is_file()] == ["lock"]


# Blobs


def test_shared_blob_stays(store_dir: StoreDir) -> None:
    store_dir.image(ONE, "a:1")
    store_dir.image(TWO, "b:1")
    plan = store_dir.prune(by_name("a"))
    assert (dict(plan.blobs), store_dir.has(OWN, SHARED)) == ({Digest.of(OWN): len(OWN)}, [False, True])
    store_dir.prune(by_name("b"))
    assert store_dir.has(*ONE, *TWO) == [False] * 4


def test_blobs_of_several_images_are_counted_once(store_dir: StoreDir) -> None:
    first, second = store_dir.image(ONE, "a:1"), store_dir.image(TWO, "a:2")
    plan = store_dir.prune(by_name("a"))
    assert plan.blobs.keys() == {Digest.of(blob) for blob in (*ONE, *TWO)}
    assert plan.bytes_of == {first.digest: len(OWN) + len(SHARED), second.digest: len(TWO[0])}
    assert plan.bytes == sum(plan.bytes_of.values()) + sum(kept.size for kept in plan.records)


def test_partly_copied_blob_is_counted_by_its_size_on_disk(store_dir: StoreDir) -> None:
    store_dir.put(image_of(b"nothing", b"half"), "a:1")
    store_dir.blob(b"half").write_bytes(b"ha")
    plan = store_dir.prune(by_name("a"))
    assert dict(plan.blobs) == {Digest.of(b"half"): 2}
    assert store_dir.has(b"half") == [False]


@pytest.mark.parametrize("folder", ["fat", "img"])
@pytest.mark.parametrize(
    "text", ['{"type": 3, "layers": "sha256:%s"}', "not JSON at all %s\0", '{"digest": "sha256:%s"']
)
def test_blob_mentioned_by_unreadable_record_stays(store_dir: StoreDir, folder: str, text: str) -> None:
    store_dir.image(ONE, "a:1")
    theirs = store_dir.root / folder / Digest.of(b"theirs").hex
    theirs.write_text(text % Digest.of(SHARED).hex)
    plan = store_dir.prune(by_name("a"))
    assert (store_dir.has(*ONE), set(plan.blobs)) == ([False, True], {Digest.of(OWN)})
    assert theirs.read_text() == text % Digest.of(SHARED).hex


def test_image_of_a_partly_copied_index_stays(store_dir: StoreDir) -> None:
    """rsync --inplace or a disk error: the index may be complete soon."""
    image = store_dir.image(ONE, "a@")
    store_dir.put(list_of(image), "a:1")
    other = store_dir.put(list_of(image, seed="other"), "a:2")
    store_dir.path(other).write_bytes(store_dir.path(other).read_bytes()[:-20])
    store_dir.prune(by_name("a:1"))
    assert (store_dir.names(image), store_dir.has(*ONE)) == ({"a@"}, [True, True])


# Indexes


def test_index_is_pruned_with_its_images(store_dir: StoreDir) -> None:
    left, right = store_dir.image(ONE, "a@"), store_dir.image(TWO, "a@")
    many = store_dir.put(list_of(left, right), "a:1")
    plan = store_dir.prune(by_name("a:1"))
    assert [row.url for row in plan.rows] == [url_of("a:1"), *sorted(url_of("a@", one) for one in (left, right))]
    assert [store_dir.names(one) for one in (many, left, right)] == [None] * 3
    assert store_dir.has(*ONE, *TWO) == [False] * 4


def test_index_with_another_name_keeps_its_images(store_dir: StoreDir) -> None:
    image = store_dir.image(ONE, "a@")
    many = store_dir.put(list_of(image), "a:1", "b:1")
    store_dir.prune(by_name("a:1"))
    assert (store_dir.names(many), store_dir.names(image)) == ({"b:1"}, {"b@"})


def test_image_with_its_own_tag_stays(store_dir: StoreDir) -> None:
    tagged, elsewhere = store_dir.image(ONE, "a@", "a:amd64"), store_dir.image(TWO, "a@", "b@")
    store_dir.put(list_of(tagged, elsewhere), "a:1")
    plan = store_dir.prune(by_name("a:1"))
    assert (store_dir.names(tagged), store_dir.names(elsewhere)) == ({"a:amd64"}, {"b@"})
    assert store_dir.has(*ONE, *TWO) == [True] * 4
    assert (len(plan.rows), len(plan.records)) == (3, 1)


def test_image_of_two_indexes_goes_with_the_last(store_dir: StoreDir) -> None:
    image = store_dir.image(ONE, "a@")
    store_dir.put(list_of(image), "a:1")
    store_dir.put(list_of(image, seed="other"), "a:2")
    store_dir.prune(by_name("a:1"))
    assert (store_dir.names(image), store_dir.has(*ONE)) == ({"a@"}, [True, True])
    store_dir.prune(by_name("a:2"))
    assert (store_dir.names(image), store_dir.has(*ONE)) == (None, [False, False])


def test_image_of_indexes_in_two_repositories_goes_with_both(store_dir: StoreDir) -> None:
    image = store_dir.image(ONE, "a@", "b@")
    store_dir.put(list_of(image), "a:1")
    store_dir.put(list_of(image, seed="other"), "b:1")
    store_dir.prune(by_name("a:1", "b:1"))
    assert (store_dir.names(image), store_dir.has(*ONE)) == (None, [False, False])


@pytest.mark.parametrize("shorts", [("a:1", "b:1"), ("b:1", "a:1")])
@pytest.mark.parametrize("same", [True, False], ids=["one list", "two lists"])
def test_image_of_indexes_in_two_repositories_goes_with_the_last(
    store_dir: StoreDir, shorts: tuple[str, str], same: bool
) -> None:
    image = store_dir.image(ONE, "a@", "b@")
    store_dir.put(list_of(image), "a:1")
    store_dir.put(list_of(image, seed="" if same else "other"), "b:1")
    store_dir.prune(by_name(shorts[0]))
    assert store_dir.has(*ONE) == [True, True]
    store_dir.prune(by_name(shorts[1]))
    assert (store_dir.names(image), store_dir.has(*ONE)) == (None, [False, False])


def test_nested_indexes_are_pruned_together(store_dir: StoreDir) -> None:
    image, other = store_dir.image(ONE, "a@"), store_dir.image(TWO, "a@")
    inner, daemon_client = store_dir.put(list_of(image), "a@"), store_dir.put(list_of(other), "a@", "c:1")
    outer = store_dir.put(list_of(inner, daemon_client, other), "a:1")
    store_dir.prune(by_name("a:1"))
    assert [store_dir.names(one) for one in (outer, inner, image)] == [None] * 3
    assert (store_dir.names(daemon_client), store_dir.names(other)) == ({"c:1"}, {"c@"})
    assert store_dir.has(*ONE, *TWO) == [False, True, True, True]
    store_dir.prune(by_name("c:1"))


def test_image_by_digest_is_pruned_although_its_index_stays(store_dir: StoreDir) -> None:
    image = store_dir.image(ONE, "a@")
    many = store_dir.put(list_of(image), "a:1")
    store_dir.prune(Criteria(matches=lambda url: url == url_of("a@", image)))
    assert (store_dir.names(image), store_dir.names(many), store_dir.has(*ONE)) == (None, {"a:1"}, [False, False])


def test_index_without_present_images_is_pruned(store_dir: StoreDir) -> None:
    many = store_dir.put(list_of(image_of(*ONE)), "a:1")
    assert store_dir.prune(by_name("a")).bytes_of == {many.digest: 0}
    assert store_dir.names(many) is None


# Concurrency


def test_changes_before_the_lock_are_seen(store_dir: StoreDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """Records are read before taking the lock; changed ones are read again under it."""
    store_dir.image(ONE, "a:1")
    records: list[int] = []

    def choose(snapshot: Snapshot) -> PruneSet:
        records.append(len(snapshot.records))
        assert lock(store_dir.root / "pulls" / "lock", wait=False) is None
        return by_name("a")(snapshot)

    @contextmanager
    def locked_late(root: Path) -> Iterator[None]:
        store_dir.image(TWO, "b:1")
        with store_locked(root):
            yield

    monkeypatch.setattr(ociregistry.store.prune, "store_locked", locked_late)
    store_dir.prune_only(choose)
    assert records == [2]
    assert store_dir.has(OWN, SHARED) == [False, True]


def test_pruning_is_linear_in_records(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()

    def look(count: int) -> int:
        images = [(image_of(b"%d" % number, SHARED), [f"a{number}@"], day(1)) for number in range(count)]
        lists = [(list_of(one[0]), [f"a{number}:1", "b:1"], day(1)) for number, one in enumerate(images)]
        snapshot = in_memory(tmp_path, *images, *lists)
        return calls_of(lambda: Criteria(matches=lambda url: url.endswith(":1"))(snapshot).plan)

    assert look(2000) < 12 * look(200)
