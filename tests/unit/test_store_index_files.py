"""The inventory: every image URL of the store, the name to pull it by, and its blobs."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

import ociregistry.store.index
from ociregistry.names import Digest
from ociregistry.store.index import Inventory
from ociregistry.store.records import Record, read_record
from tests.images import make_image
from tests.unit.support.doubles import manifest
from tests.unit.support.stores import HOST, Stock, calls_of, day, image_of, in_memory, list_of, url_of

ONE, TWO = (b"config", b"layer"), (b"another config", b"layer")


@pytest.fixture
def stock(tmp_path: Path) -> Stock:
    """Return an empty store."""
    return Stock(tmp_path / "store")


def shown(inventory: Inventory) -> list[str]:
    """Return the image URLs, without the host."""
    return [row.url.removeprefix(f"{HOST}/") for row in inventory.rows]


def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Return the records read from now on."""
    paths: list[Path] = []

    def read(path: Path) -> Record:
        paths.append(path)
        return read_record(path)

    monkeypatch.setattr(ociregistry.store.index, "read_record", read)
    return paths


def test_rows_are_sorted_image_urls(stock: Stock) -> None:
    one = stock.image(ONE, "b:1", "a:2", "a@", created=day(3), confirmed=day(5), pulled=day(4))
    many = stock.put(list_of(one), "a:1", pulled=day(6))
    inventory = stock.inventory()
    assert shown(inventory) == ["a:1", "a:2", f"a@{one.digest}", "b:1"]
    top, row, *_ = inventory.rows
    assert (top.kept.manifest, top.kept.pulled, top.kept.path) == (many, day(6), stock.path(many))
    assert (row.kept.manifest, row.kept.pulled) == (one, day(4))
    assert (row.dates.created, row.dates.confirmed, row.notes) == (day(3), day(5), (row.url,))
    assert row.kept.size == stock.path(one).stat().st_size


def test_moved_tag_is_not_listed_for_the_old_image(stock: Stock) -> None:
    old = stock.image(ONE, "a:1", created=day(1), confirmed=day(2))
    new = stock.image(TWO, "a:1", created=day(1), confirmed=day(3))
    rows = {row.url: (row.kept.manifest, row.notes) for row in stock.inventory().rows}
    assert rows == {url_of("a:1"): (new, (url_of("a:1"),)), url_of("a@", old): (old, (url_of("a:1"),))}
    assert set(stock.inventory().claims(url_of("a:1"))) == {old.digest, new.digest}
    assert stock.inventory().claims(url_of("a:2")) == {}


@pytest.mark.parametrize("first", [ONE, TWO])
def test_tie_of_confirmations_is_resolved_as_in_the_daemon(stock: Stock, first: tuple[bytes, bytes]) -> None:
    """For equal times the greater digest wins, as in the daemon's index."""
    stock.image(first, "a:1")
    stock.image(ONE if first is TWO else TWO, "a:1")
    greater = max(image_of(*ONE).digest, image_of(*TWO).digest)
    assert [row.kept.manifest.digest for row in stock.inventory().rows if row.url == url_of("a:1")] == [greater]


def test_old_image_with_several_moved_tags_is_one_row(stock: Stock) -> None:
    old = stock.image(ONE, "a:1", "a:2", "a@", "b:1", confirmed=day(1))
    stock.image(TWO, "a:1", "a:2", confirmed=day(2))
    rows = [row for row in stock.inventory().rows if row.kept.manifest == old]
    assert [row.url for row in rows] == [url_of("a@", old), url_of("b:1")]
    assert set(rows[0].notes) == {url_of("a:1"), url_of("a:2"), url_of("a@", old)}


def test_pulled_date_includes_indexes_and_siblings(stock: Stock) -> None:
    left, right = stock.image(ONE, pulled=day(1)), stock.image(TWO, "a:1", pulled=day(2))
    both, one = stock.put(list_of(left, right), "a:2", pulled=day(1)), stock.put(list_of(left), "a:3", pulled=day(3))
    inventory = stock.inventory()
    assert inventory.pulled(left.digest) == day(3)
    assert inventory.pulled(right.digest) == day(2)
    assert inventory.pulled(both.digest) == day(2)
    assert inventory.pulled(one.digest) == day(3)
    assert inventory.lists_of == {left.digest: {both.digest, one.digest}, right.digest: {both.digest}}


def test_children_are_those_present(stock: Stock) -> None:
    here, gone = stock.image(ONE), image_of(*TWO)
    both = stock.put(list_of(here, gone), "a:1")
    inventory = stock.inventory()
    assert [kept.manifest for kept in inventory.children(both.digest)] == [here]
    assert list(inventory.children(here.digest)) == []


def test_missing_and_partly_copied_blobs(stock: Stock) -> None:
    image = stock.put(image_of(b"whole", b"half", b"nothing"), "a:1")
    stock.blobs(b"whole", b"half")
    assert stock.inventory().missing(image.digest) == {Digest.of(b"nothing"): 7}
    stock.blob(b"half").write_bytes(b"ha")
    assert stock.inventory().missing(image.digest) == {Digest.of(b"half"): 4, Digest.of(b"nothing"): 7}
    assert [stock.inventory().blob_size(Digest.of(data)) for data in (b"half", b"nothing")] == [2, None]


FOREIGN = b'{"type": 3, "digest": "%s", "v1.oci.manifest": {"layers": [{"digest": "sha256:%s"}]}}'


@pytest.mark.parametrize("folder", ["fat", "img"])
@pytest.mark.parametrize("blob", [Digest.of(b"layer"), Digest.of(b"layer", "sha512")])
def test_unreadable_record_is_reported_with_mentioned_digests(stock: Stock, folder: str, blob: Digest) -> None:
    image = stock.image(ONE, "a:1")
    name = Digest.of(b"theirs").hex
    path = stock.root / folder / name
    path.write_bytes(FOREIGN % (name.encode(), blob.hex.encode()))
    inventory = stock.inventory()
    assert inventory.records.keys() == {image.digest}
    assert "not a record of this program" in inventory.unreadable[path]
    assert inventory.mentioned == {name, blob.hex}


def test_hex_strings_of_other_lengths_are_no_digests(stock: Stock) -> None:
    half, other = "ab" * 16, "cd" * 40
    (stock.root / "img" / Digest.of(b"theirs").hex).write_text(f'{{"{half}": "{other}", "{"ef" * 32}0"')
    assert stock.inventory().mentioned == frozenset()


def test_truncated_record_mentions_its_legible_digests(stock: Stock) -> None:
    image = stock.image(ONE, "a:1")
    path = stock.path(image)
    data = path.read_bytes()
    path.write_bytes(data[: data.index(Digest.of(b"layer").hex.encode())])
    inventory = stock.inventory()
    assert (inventory.records, list(inventory.unreadable)) == ({}, [path])
    assert inventory.mentioned == {image.digest.hex, Digest.of(b"config").hex}


def test_other_file_types_are_ignored(stock: Stock) -> None:
    (stock.root / "img" / Digest.of(b"folder").hex).mkdir()
    (stock.root / "img" / Digest.of(b"link").hex).symlink_to("nowhere")
    (stock.root / "img" / ".syncthing.x.tmp").write_bytes(b"{")
    inventory = stock.inventory()
    assert (inventory.records, inventory.mentioned, len(inventory.unreadable)) == ({}, frozenset(), 1)


def test_only_changed_records_are_read_again(stock: Stock, monkeypatch: pytest.MonkeyPatch) -> None:
    same, changed = stock.image(ONE, "a:1", pulled=day(1)), stock.image(TWO, "b:1", pulled=day(1))
    bad = stock.root / "img" / Digest.of(b"bad").hex
    bad.write_bytes(b"{" + Digest.of(b"layer").hex.encode())
    before = stock.inventory()
    read = reads(monkeypatch)
    stock.put(changed, "b:2", pulled=day(2))
    os.utime(stock.path(same), (day(3).timestamp(), day(3).timestamp()))
    again = Inventory.read(stock.root, before)
    assert stock.path(same) in read  # Changes are detected by mtime, among others.
    read.clear()
    third = Inventory.read(stock.root, again)
    assert set(read) == {bad}
    assert (third.records, third.unreadable, third.mentioned) == (again.records, again.unreadable, again.mentioned)
    assert third.records[same.digest].pulled == day(3)
    assert shown(third) == ["a:1", "b:1", "b:2"]
    stock.path(same).unlink()
    assert shown(Inventory.read(stock.root, third)) == ["b:1", "b:2"]


def test_record_in_wrong_folder_does_not_hide_the_right_one(stock: Stock) -> None:
    many = stock.put(list_of(), "a:1")
    wrong = stock.root / "img" / many.digest.hex
    shutil.copy(stock.path(many), wrong)
    before = stock.inventory()
    again = Inventory.read(stock.root, before)
    for inventory in (before, again):
        assert inventory.records[many.digest].path == stock.path(many)
        assert list(inventory.unreadable) == [wrong]


def test_missing_folder_has_no_records(tmp_path: Path) -> None:
    stock = Stock(tmp_path / "store")
    stock.image(ONE, "a:1")
    (stock.root / "fat").rmdir()
    assert shown(stock.inventory()) == ["a:1"]
    shutil.rmtree(stock.root / "img")
    assert stock.inventory().rows == ()


def test_missing_store_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Inventory.read(tmp_path / "store")


def test_record_removed_while_reading_is_skipped(stock: Stock, monkeypatch: pytest.MonkeyPatch) -> None:
    stock.image(ONE, "a:1")

    def gone(path: Path) -> Record:
        path.unlink()
        return read_record(path)

    monkeypatch.setattr(ociregistry.store.index, "read_record", gone)
    assert stock.inventory().records == {}


def test_unreadable_file_is_an_error(stock: Stock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Deciding what may be pruned requires all records."""
    stock.image(ONE, "a:1")

    def fails(path: Path) -> Record:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(ociregistry.store.index, "read_record", fails)
    with pytest.raises(OSError, match="Input/output"):
        stock.inventory()


def test_inventory_is_linear_in_records(tmp_path: Path) -> None:
    image = manifest(make_image("many"))

    def look(count: int) -> int:
        images = [(image_of(image.data, b"%d" % number), [f"a{number}:1"], day(1)) for number in range(count)]
        lists = [(list_of(one[0]), [f"a{number}:2"], day(1)) for number, one in enumerate(images)]
        inventory = in_memory(tmp_path, *images, *lists)

        def all_of_it() -> None:
            assert len(inventory.rows) == 2 * count
            assert len(inventory.lists_of) == count
            assert all(inventory.pulled(digest) == day(1) for digest in inventory.records)
            assert all(len(inventory.claims(row.notes[0])) == 1 for row in inventory.rows)

        return calls_of(all_of_it)

    assert look(2000) < 12 * look(200)
