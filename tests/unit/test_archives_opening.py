"""Archives are recognised by content; damaged ones are refused."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import pytest
import zstandard

from ociregistry.archives.members import ArchiveInvalid
from ociregistry.archives.opening import open_archive
from tests.images import random_bytes
from tests.unit.support.archives import everything, opened, refused, write_folder, write_tar

LARGE = b"".join(random_bytes("large", 2_500_000))
FILES = {"index.json": b"{}", "blobs/sha256/aa": LARGE, "blobs/sha256/bb": b"", "blobs/sha256/cc": b"small"}


@pytest.mark.parametrize("compression", ["", "gz", "bz2", "xz", "zst"])
def test_tar_is_recognised_by_content(tmp_path: Path, compression: str) -> None:
    with opened(write_tar(tmp_path / "images.txt", FILES, compression)) as archive:
        assert everything(archive) == FILES
        assert everything(archive) == FILES
        assert {name: member.size for name, member in archive.members.items()} == {
            name: len(data) for name, data in FILES.items()
        }


def test_large_member_is_read_in_pieces(tmp_path: Path) -> None:
    with opened(write_tar(tmp_path / "a.tar", FILES)) as archive:
        assert [len(piece) for piece in archive.members["blobs/sha256/aa"].pieces()] == [1048576, 1048576, 402848]


def test_folder(tmp_path: Path) -> None:
    with opened(write_folder(tmp_path / "a.tar", FILES)) as archive:
        assert everything(archive) == FILES


@pytest.mark.parametrize("top", ["./", "images/", "./var/lib/ociregistry/"])
@pytest.mark.parametrize("files", [FILES, {"img/aa": b"1", "img/bb": b"2"}, {"blobs/aa": b"1"}])
def test_leading_folders_are_stripped(tmp_path: Path, top: str, files: dict[str, bytes]) -> None:
    with opened(write_tar(tmp_path / "a.tar", {top + name: data for name, data in files.items()})) as archive:
        assert everything(archive) == files
    with opened(write_folder(tmp_path / "folder", {top + name: data for name, data in files.items()})) as archive:
        assert everything(archive) == files


@pytest.mark.parametrize(
    "data", [b"", b"docker.io/library/nginx:1.25\n", b"docker.io/library/nginx:1.25\n" * 100, b"\x1f", b"BZ"]
)
def test_other_file_is_no_archive(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "list.tar").write_bytes(data)
    assert open_archive(tmp_path / "list.tar") is None


def test_pipe_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert open_archive(tmp_path / "pipe") is None


def test_missing_file(tmp_path: Path) -> None:
    assert refused(tmp_path / "nothing.tar") == "No such file or directory"


@pytest.mark.parametrize("data", [bytes(1024), bytes(10240)])
def test_empty_tar(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.tar").write_bytes(data)
    with opened(tmp_path / "a.tar") as archive:
        assert archive.members == {}


# Damage


@pytest.mark.parametrize("compression", ["", "gz", "bz2", "xz", "zst"])
def test_truncated_tar_is_refused(tmp_path: Path, compression: str) -> None:
    path = write_tar(tmp_path / "a.tar", {**FILES, "blobs/sha256/aa": LARGE[:5000]}, compression)
    data = path.read_bytes()
    # What follows the first of the zero blocks that end a tar is padding.
    needed = len(data) if compression else data.rstrip(b"\0").__len__() // 512 * 512 + 512 + 512
    if compression == "zst":
        # The checksum at the end of a frame tells nothing that the digests do not.
        needed -= 4
    for length in {*range(512, needed, 97), needed - 1, needed - 512, needed - 513}:
        path.write_bytes(data[:length])
        assert "cut off" in refused(path) or "Compressed file ended" in refused(path), length


@pytest.mark.parametrize("compression", ["gz", "xz", "bz2", "zst"])
def test_damaged_compressed_tar_is_refused(tmp_path: Path, compression: str) -> None:
    path = write_tar(tmp_path / "a.tar", {**FILES, "blobs/sha256/aa": LARGE[:5000]}, compression)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert refused(path)


def test_invalid_compressed_data_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(gzip.compress(bytes(1024))[:10] + b"\xff" * 100)
    assert "cut off or damaged" in refused(tmp_path / "a.tar")


@pytest.mark.parametrize("where", [0, 512 + 512])
def test_damaged_header_is_refused(tmp_path: Path, where: int) -> None:
    path = write_tar(tmp_path / "a.tar", FILES)
    data = bytearray(path.read_bytes())
    data[where] ^= 1
    path.write_bytes(data)
    assert "damaged" in refused(path)


def test_compressed_file_that_is_no_tar(tmp_path: Path) -> None:
    for compress in (gzip.compress, zstandard.compress):
        (tmp_path / "a.tar").write_bytes(compress(b"docker.io/library/nginx:1.25\n"))
        assert refused(tmp_path / "a.tar") == "it is compressed, but it is cut off or not a tar"
        (tmp_path / "a.tar").write_bytes(compress(b"docker.io/library/nginx:1.25\n" * 100))
        assert refused(tmp_path / "a.tar") == "it is compressed, but it is not a tar"


@pytest.mark.parametrize("first", [b"", b"\x50\x2a\x4d\x18\x04\0\0\0skip"])
def test_zstd_of_many_frames(tmp_path: Path, first: bytes) -> None:
    """pzstd and `zstd -T0` write many, and frames that are to be skipped before or between them."""
    data = write_tar(tmp_path / "plain.tar", FILES).read_bytes()
    frames = [zstandard.compress(data[start : start + 70_001]) for start in range(0, len(data), 70_001)]
    (tmp_path / "a.tar").write_bytes(first + b"\x5f\x2a\x4d\x18\x01\0\0\0x".join(frames))
    with opened(tmp_path / "a.tar") as archive:
        assert everything(archive) == FILES
        assert everything(archive) == FILES


@pytest.mark.parametrize("rest", [b"", b"\xff" * 100])
def test_damaged_zstd_is_refused(tmp_path: Path, rest: bytes) -> None:
    (tmp_path / "a.tar").write_bytes(zstandard.compress(bytes(1024))[:6] + rest)
    assert "cut off or" in refused(tmp_path / "a.tar")


def test_bytes_after_the_last_zstd_frame_are_refused(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", FILES, "zst")
    path.write_bytes(path.read_bytes() + b"and more")
    assert "cut off or damaged" in refused(path)


def test_file_truncated_while_reading(tmp_path: Path) -> None:
    with opened(write_folder(tmp_path / "folder", FILES)) as archive:
        (tmp_path / "folder/blobs/sha256/cc").write_bytes(b"s")
        with pytest.raises(ArchiveInvalid, match="it ends too early: blobs/sha256/cc"):
            everything(archive)


def test_file_removed_while_reading(tmp_path: Path) -> None:
    with opened(write_folder(tmp_path / "folder", FILES)) as archive:
        (tmp_path / "folder/blobs/sha256/cc").unlink()
        with pytest.raises(ArchiveInvalid, match="No such file or directory: blobs/sha256/cc"):
            everything(archive)
