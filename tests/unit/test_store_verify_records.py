"""Verifying records: a damaged one is put aside with what still stands in it, a foreign one is left alone."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from twisted.internet.task import Clock

import ociregistry.store.store
import ociregistry.store.verify
from ociregistry.store.records import Record, read_record
from ociregistry.store.store import Store
from tests.unit.support.doubles import image
from tests.unit.support.power_cuts import result
from tests.unit.support.stores import Stock, day, url_of
from tests.unit.support.verifications import NAMES, bad, opened, stocked, the_image, verified


@pytest.fixture
def stock(root: Path) -> Stock:
    """A store with an image and a list."""
    return stocked(root)


@pytest.fixture
def store(stock: Stock, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """It is started, and no thread delays it."""
    with opened(stock, clock, monkeypatch) as store:
        yield store


def test_a_record_that_is_cut_off_anywhere_is_put_aside(stock: Stock, store: Store) -> None:
    """With the image URLs that still stand in it."""
    kept, path = the_image(stock)
    data = path.read_bytes()
    noted: list[int] = []
    for length in [*range(0, len(data) - 1, 13), len(data) - 2]:
        path.write_bytes(data[:length])
        (damaged,) = verified(store).damaged
        assert (damaged.path, damaged.digest, damaged.is_blob) == (path, kept.digest, False)
        assert bad(stock) == {kept.digest.hex}
        assert (stock.root / "pulls" / "0" / "bad" / kept.digest.hex).read_bytes() == data[:length]
        urls = [url_of(name, kept) for name in NAMES]
        assert [str(one) for one, _ in damaged.images] == urls[: len(damaged.images)]
        assert all((dates.created, dates.confirmed) == (day(1), day(2)) for _, dates in damaged.images)
        noted.append(len(damaged.images))
        assert stock.names(kept) is None
    assert noted == sorted(noted)
    assert (noted[0], noted[-1]) == (0, 3)
    path.write_bytes(data[:-1])  # the newline is no part of it
    assert verified(store).damaged == []


def test_a_record_with_a_flipped_bit_never_gives_a_wrong_manifest(stock: Stock, store: Store) -> None:
    """Where the bit is in a key, it is left alone as foreign; in an image URL or a date it is not seen."""
    kept, path = the_image(stock)
    data = path.read_bytes()
    put_aside = 0
    for at in range(0, len(data) - 1, 17):
        path.write_bytes(data[:at] + bytes([data[at] ^ 2]) + data[at + 1 :])
        findings = verified(store)
        assert path.exists() == (not findings.damaged)
        assert path.exists() or (stock.root / "pulls" / "0" / "bad" / path.name).read_bytes() != data
        if path.exists() and path not in findings.foreign:
            assert read_record(path).manifest == kept
        put_aside += len(findings.damaged)
    assert put_aside > len(data) // 17 / 2


def test_the_images_of_a_put_aside_record_are_missed_at_once(stock: Stock, store: Store) -> None:
    kept, path = the_image(stock)
    assert result(store.manifest(image(url_of("a:1")))) == kept
    path.write_bytes(path.read_bytes()[:-9])
    verified(store)
    assert result(store.manifest(image(url_of("a:1")))) is None


def test_what_stands_in_a_damaged_record_is_looked_at(stock: Stock, store: Store) -> None:
    _, path = the_image(stock)
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
def test_a_foreign_record_is_left_alone(stock: Stock, store: Store, what: str, folder: str) -> None:
    path = stock.root / folder / ("ab" * 32)
    path.write_text(FOREIGN[what])
    findings = verified(store)
    assert (findings.damaged, list(findings.foreign), findings.records) == ([], [path], 2)
    assert "not a record of this program" in findings.foreign[path]
    assert (path.read_text(), bad(stock)) == (FOREIGN[what], set())


def test_what_is_no_file_or_in_the_wrong_folder_is_left_alone(stock: Stock, store: Store) -> None:
    kept, path = the_image(stock)
    (stock.root / "fat" / path.name).write_bytes(path.read_bytes())
    (stock.root / "img" / ("ab" * 32)).mkdir()
    (stock.root / "img" / ("cd" * 32)).symlink_to("cd" * 32)
    findings = verified(store)
    assert (findings.damaged, len(findings.foreign), stock.names(kept)) == ([], 3, set(NAMES))


def fails_to_read(monkeypatch: pytest.MonkeyPatch, path: Path, error: OSError | None) -> None:
    """The record cannot be read; without an `error`, it is another process that writes it anew after a look."""
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


def test_a_record_on_a_broken_disk_is_put_aside(stock: Stock, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, path = the_image(stock)
    fails_to_read(monkeypatch, path, OSError(errno.EIO, "Input/output error"))
    (damaged,) = verified(store).damaged
    assert "Input/output error" in damaged.why
    assert [str(one) for one, _ in damaged.images] == [url_of(name, kept) for name in NAMES]
    assert bad(stock) == {kept.digest.hex}


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EACCES])
def test_a_record_that_this_process_cannot_read_is_an_error(
    stock: Stock, store: Store, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Of no descriptors, no memory or no right it is not the record's fault."""
    _, path = the_image(stock)
    fails_to_read(monkeypatch, path, OSError(number, "not now"))
    with pytest.raises(OSError, match="not now"):
        verified(store)
    assert path.exists()


def test_a_record_that_another_process_wrote_anew_meanwhile_stays(
    stock: Stock, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, path = the_image(stock)
    fails_to_read(monkeypatch, path, None)
    path.write_bytes(b"{")
    assert verified(store).damaged == []
    assert stock.names(kept) == set(NAMES)
