"""Incomplete images are left out of an export; the export itself is written whole or not at all."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

import ociregistry.archives.exporting
from ociregistry.archives.exporting import _MEND, Exported
from ociregistry.archives.members import PIECE, ArchiveFailure, ExportFailed
from ociregistry.store.files import Files, SharedFile
from tests.unit.support.archives import (
    NAME,
    blob_name,
    hex_of,
)
from tests.unit.support.exports import (
    BLOBS,
    IMAGE,
    INDEX,
    UP,
    UPPER,
    export,
    make_source,
    members,
)
from tests.unit.support.irregular import IRREGULAR, put_irregular

LARGE = min(IMAGE.layers, key=lambda layer: layer.digest)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Return the folder of the store that is exported."""
    return make_source(tmp_path / "source")


def test_incomplete_image_is_left_out(source: Path, tmp_path: Path) -> None:
    (source / "blobs" / hex_of(UPPER.layers[-1].digest)).write_bytes(b"half")
    (source / "blobs" / hex_of(UPPER.config.digest)).unlink()
    exported = export(source, tmp_path / "out.tar")
    (left_out,) = exported.left_out
    missing = len(UPPER.config.data) + len(UPPER.layers[-1].data)
    assert (left_out.name, left_out.missing) == (UP, missing)
    assert str(left_out) == f"left out: {UP}: the store lacks 2 of its blobs, {missing} bytes"
    assert exported.images == 5
    assert blob_name(UPPER.manifest.digest) not in members(tmp_path / "out.tar")


@pytest.mark.parametrize("kind", IRREGULAR)
def test_image_with_a_blob_that_is_no_regular_file_is_left_out(source: Path, tmp_path: Path, kind: str) -> None:
    put_irregular(source / "blobs" / hex_of(UPPER.config.digest), kind)
    exported = export(source, tmp_path / "out.tar")
    assert [(one.name, one.missing) for one in exported.left_out] == [(UP, len(UPPER.config.data))]
    assert exported.images == 5


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES])
def test_image_with_a_blob_that_cannot_be_opened_is_left_out(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    path, opened = source / "blobs" / hex_of(UPPER.config.digest), os.open

    def fail(file: str | Path, *args: int) -> int:
        if file == path:
            raise OSError(number, os.strerror(number), str(file))
        return opened(file, *args)

    monkeypatch.setattr(os, "open", fail)
    exported = export(source, tmp_path / "out.tar")
    assert [(one.name, one.missing) for one in exported.left_out] == [(UP, len(UPPER.config.data))]
    assert exported.images == 5


def test_read_error_names_the_blob(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def open_failing(path: Path) -> SharedFile:
        # Reading it at byte 0 gives EIO.
        return SharedFile(os.open("/proc/self/mem", os.O_RDONLY))

    monkeypatch.setattr(ociregistry.archives.exporting, "open_regular", open_failing)
    with pytest.raises(ExportFailed, match=rf" blob {BLOBS[0]} cannot be read: Input/output error: run verify"):
        export(source, tmp_path / "out.tar")
    assert not (tmp_path / "out.tar").exists()


def test_index_of_incomplete_image_is_left_out(source: Path, tmp_path: Path) -> None:
    child = INDEX.images[0]
    (source / "blobs" / hex_of(child.layers[0].digest)).unlink()
    exported = export(source, tmp_path / "out.tar")
    by_digest = f"docker.io/library/nginx@{child.manifest.digest}"
    size = len(child.layers[0].data)
    assert {one.name: one.missing for one in exported.left_out} == {NAME: size, by_digest: size}


def test_index_without_images_is_left_out(source: Path, tmp_path: Path) -> None:
    (source / "img" / hex_of(INDEX.images[0].manifest.digest)).unlink()
    exported = export(source, tmp_path / "out.tar", "nginx")
    assert [str(one) for one in exported.left_out] == [
        f"left out: {NAME}: the store has none of the images that it lists"
    ]


def test_nothing_to_export_writes_no_file(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out.tar").write_bytes(b"an earlier one")
    (source / "blobs" / hex_of(UPPER.config.digest)).unlink()
    assert export(source, tmp_path / "out.tar", "/up:").images == 0
    assert export(source, tmp_path / "out.tar", "none of them") == Exported()
    assert (tmp_path / "out.tar").read_bytes() == b"an earlier one"


# Failures while writing


class Failing(Files):
    """Fail at the given file operation."""

    def __init__(self, what: str) -> None:
        self._what = what

    def create(self, path: Path) -> SharedFile:
        self._fail("create")
        return super().create(path)

    def sync(self, file: SharedFile) -> None:
        self._fail("sync")
        super().sync(file)

    def rename(self, path: Path, target: Path) -> None:
        self._fail("rename")
        super().rename(path, target)

    def _fail(self, what: str) -> None:
        if what == self._what:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def damaged(source: Path) -> None:
    """Flip one byte of a blob."""
    path = source / "blobs" / hex_of(UPPER.layers[-1].digest)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def pruned(source: Path) -> Mapping[str, Callable[[int], None]]:
    """Remove blobs while the export is written."""

    def advance(count: int) -> None:
        for blob in (source / "blobs").iterdir():
            blob.unlink()

    return {"advance": advance}


def truncated(source: Path) -> Mapping[str, Callable[[int], None]]:
    """Cut off the blobs while the first of two pieces of one is written, within the second."""

    def advance(count: int) -> None:
        for blob in (source / "blobs").iterdir():
            os.truncate(blob, min(blob.stat().st_size, PIECE + 5))

    return {"advance": advance}


def full(source: Path) -> Mapping[str, Callable[[int], None]]:
    """Fill the disk while the export is written."""

    def advance(count: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return {"advance": advance}


@pytest.mark.parametrize(
    ("prepare", "why"),
    [
        (damaged, f"the store's blob {UPPER.layers[-1].digest} is damaged: {_MEND}"),
        (pruned, f"the store's blob {BLOBS[1]} cannot be read: No such file or directory: {_MEND}"),
        (truncated, f"the store's blob {LARGE.digest} ends {len(LARGE.data) - PIECE - 5} bytes too early: {_MEND}"),
        (full, "No space left on device"),
        (lambda source: {"files": Failing("create")}, "No space left on device"),
        (lambda source: {"files": Failing("sync")}, "No space left on device"),
        (lambda source: {"files": Failing("rename")}, "No space left on device"),
    ],
)
@pytest.mark.parametrize("earlier", [None, b"an earlier one"])
def test_failed_export_leaves_no_partial_file(
    source: Path, tmp_path: Path, prepare: Callable[[Path], Any], why: str, earlier: bytes | None
) -> None:
    target = tmp_path / "target" / "out.tar"
    target.parent.mkdir()
    if earlier is not None:
        target.write_bytes(earlier)
    how = prepare(source) or {}
    with pytest.raises(ExportFailed) as caught:
        export(source, target, **how)
    assert str(caught.value) == f"{target}: {why}"
    assert isinstance(caught.value, ArchiveFailure)
    left = {path.name: path.read_bytes() for path in target.parent.iterdir()}
    assert left == ({} if earlier is None else {"out.tar": earlier})


def test_missing_target_folder_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportFailed, match=r"out\.tar: No such file or directory$"):
        export(source, tmp_path / "nowhere" / "out.tar")
