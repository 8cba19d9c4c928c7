"""Verifying records: damaged ones are quarantined and their image URLs recovered, foreign ones are ignored."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from twisted.internet.task import Clock

import ociregistry.store.store
import ociregistry.store.verify
from ociregistry.store.records import Record, read_record
from ociregistry.store.store import Store
from tests.unit.support.common import image
from tests.unit.support.irregular import IRREGULAR, put_irregular
from tests.unit.support.power_cuts import result
from tests.unit.support.stores import StoreDir, day, url_of
from tests.unit.support.verifications import NAMES, filled_store, opened, quarantined, the_image, verified


@pytest.fixture
def store_dir(root: Path) -> StoreDir:
    """Return a store with an image and an index."""
    return filled_store(root)


@pytest.fixture
def store(store_dir: StoreDir, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """Return the store started, with thread functions run inline."""
    with opened(store_dir, clock, monkeypatch) as store:
        yield store


def test_record_truncated_anywhere_is_quarantined(store_dir: StoreDir, store: Store) -> None:
    """With the image URLs that are still legible."""
    kept, path = the_image(store_dir)
    data = path.read_bytes()
    counts: list[int] = []
    for length in [*range(0, len(data) - 1, 13), len(data) - 2]:
        path.write_bytes(data[:length])
        (damaged,) = verified(store).damaged
        assert (damaged.path, damaged.digest, damaged.is_blob) == (path, kept.digest, False)
        assert quarantined(store_dir) == {kept.digest.hex}
        assert (store_dir.root / "pulls" / "0" / "bad" / kept.digest.hex).read_bytes() == data[:length]
        urls = [url_of(name, kept) for name in NAMES]
        assert [str(one) for one, _ in damaged.images] == urls[: len(damaged.images)]
        assert all((dates.created, dates.confirmed) == (day(1), day(2)) for _, dates in damaged.images)
        counts.append(len(damaged.images))
        assert store_dir.names(kept) is None
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (0, 3)
    path.write_bytes(data[:-1])  # the newline is optional
    assert verified(store).damaged == []


def test_flipped_bit_never_yields_a_wrong_manifest(store_dir: StoreDir, store: Store) -> None:
    """A flip in a key makes the record foreign; one in an image URL or a date goes unnoticed."""
    kept, path = the_image(store_dir)
    data = path.read_bytes()
    quarantined_count = 0
    for at in range(0, len(data) - 1, 17):
        path.write_bytes(data[:at] + bytes([data[at] ^ 2]) + data[at + 1 :])
        findings = verified(store)
        assert path.exists() == (not findings.damaged)
        assert path.exists() or (store_dir.root / "pulls" / "0" / "bad" / path.name).read_bytes() != data
        if path.exists() and path not in findings.foreign:
            assert read_record(path).manifest == kept
        quarantined_count += len(findings.damaged)
    assert quarantined_count > len(data) // 17 / 2


def test_images_of_a_quarantined_record_are_misses_immediately(store_dir: StoreDir, store: Store) -> None:
    kept, path = the_image(store_dir)
    assert result(store.manifest(image(url_of("a:1")))) == kept
    path.write_bytes(path.read_bytes()[:-9])
    verified(store)
    assert result(store.manifest(image(url_of("a:1")))) is None


def test_recovered_image_urls_are_validated(store_dir: StoreDir, store: Store) -> None:
    _, path = the_image(store_dir)
    good = '"{}": {{"created": "{}", "confirmed": "{}"}}'
    when = "2026-01-01T00:00:00Z"
    path.write_text(
        "\n".join(
            good.format(*values)
            for values in [
                ("../../etc/passwd:1", when, when),
                ("reg.example/a:1", "yesterday", when),
                ("reg.example/a:2", when, "2026-01-01T00:00:00"),
                ("nginx", when, when),
                ("reg.example/a:3", when, when),
            ]
        )
    )
    (damaged,) = verified(store).damaged
    assert [str(one) for one, _ in damaged.images] == ["reg.example/a:3"]


FOREIGN = {
    "of the Go server": json.dumps({"type": 3, "digest": "ab" * 32, "imageUrl": "a:1", "v1.oci.manifest": {}}),
    "a list": "[]",
    "a number": "5",
    "without our keys": '{"digest": "x", "mediaType": "y"}',
}


@pytest.mark.parametrize("what", FOREIGN)
@pytest.mark.parametrize("folder", ["fat", "img"])
def test_foreign_record_is_ignored(store_dir: StoreDir, store: Store, what: str, folder: str) -> None:
    path = store_dir.root / folder / ("ab" * 32)
    path.write_text(FOREIGN[what])
    findings = verified(store)
    assert (findings.damaged, list(findings.foreign), findings.records) == ([], [path], 2)
    assert "not a record of this program" in findings.foreign[path]
    assert (path.read_text(), quarantined(store_dir)) == (FOREIGN[what], set())


def test_record_in_the_wrong_folder_is_ignored(store_dir: StoreDir, store: Store) -> None:
    kept, path = the_image(store_dir)
    (store_dir.root / "fat" / path.name).write_bytes(path.read_bytes())
    findings = verified(store)
    assert (findings.damaged, len(findings.foreign), store_dir.names(kept)) == ([], 1, set(NAMES))


@pytest.mark.parametrize("kind", IRREGULAR)
def test_record_that_is_no_regular_file_is_quarantined(store_dir: StoreDir, store: Store, kind: str) -> None:
    _, path = the_image(store_dir)
    for times in (1, 2):
        put_irregular(path, kind)
        findings = verified(store)
        assert [(one.path, one.why, one.images) for one in findings.damaged] == [(path, IRREGULAR[kind], ())]
        assert (findings.records, findings.foreign) == (1, {})
        assert not os.path.lexists(path)
        assert len(quarantined(store_dir)) == (times if kind == "folder" else 1)


def fails_to_read(monkeypatch: pytest.MonkeyPatch, path: Path, error: OSError | None) -> None:
    """Make reading the record fail; without `error`, another process rewrites it after the read."""
    data = path.read_bytes()

    def read(one: Path) -> Record:
        if one != path:
            return read_record(one)
        if error is not None:
            raise error
        try:
            return read_record(one)
        finally:
            path.write_bytes(data)

    monkeypatch.setattr(ociregistry.store.verify, "read_record", read)


@pytest.mark.parametrize("number", [errno.EIO, errno.EUCLEAN, errno.EACCES])
def test_unreadable_record_is_quarantined(
    store_dir: StoreDir, store: Store, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    kept, path = the_image(store_dir)
    fails_to_read(monkeypatch, path, OSError(number, os.strerror(number)))
    (damaged,) = verified(store).damaged
    assert damaged.why == os.strerror(number)
    assert [str(one) for one, _ in damaged.images] == [url_of(name, kept) for name in NAMES]
    assert quarantined(store_dir) == {kept.digest.hex}


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_unreadable_record_for_other_reasons_is_an_error(
    store_dir: StoreDir, store: Store, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Too many open files, no memory or no permission are no fault of the record."""
    _, path = the_image(store_dir)
    fails_to_read(monkeypatch, path, OSError(number, "not now"))
    with pytest.raises(OSError, match="not now"):
        verified(store)
    assert path.exists()


def test_record_rewritten_meanwhile_stays(store_dir: StoreDir, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, path = the_image(store_dir)
    fails_to_read(monkeypatch, path, None)
    path.write_bytes(b"{")
    assert verified(store).damaged == []
    assert store_dir.names(kept) == set(NAMES)
