"""Hostile archives: path traversal, links, huge headers and sparse files are refused or harmless."""

from __future__ import annotations

import errno
import gzip
import io
import os
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from ociregistry.archives import opening as folders
from ociregistry.archives import tars
from tests.unit.support.archives import add_file, everything, opened, refused, write_folder, write_tar

FILES = {"index.json": b"{}", "blobs/sha256/bb": b"", "blobs/sha256/cc": b"small"}


@pytest.mark.parametrize("name", ["../x", "blobs/../../x", "/etc/passwd", "blobs/..", "./../x", "//x"])
def test_path_outside_archive_is_refused(tmp_path: Path, name: str) -> None:
    assert refused(write_tar(tmp_path / "a.tar", {**FILES, name: b"x"})).startswith(
        "the path of a member leads outside"
    )
    # Applies to ignored members as well.
    links = {name: (tarfile.DIRTYPE, "")}
    assert "leads outside" in refused(write_tar(tmp_path / "b.tar", FILES, links=links))


def test_links_to_members_are_followed(tmp_path: Path) -> None:
    links = {
        "a/symlink": (tarfile.SYMTYPE, "../index.json"),
        "a/to-symlink": (tarfile.SYMTYPE, "symlink"),
        "a/to-that": (tarfile.SYMTYPE, "to-symlink"),
        "a/hard": (tarfile.LNKTYPE, "./index.json"),
        "a/out": (tarfile.SYMTYPE, "../../index.json"),
        "a/absolute": (tarfile.SYMTYPE, "/etc/passwd"),
        "a/hard-out": (tarfile.LNKTYPE, "../etc/passwd"),
        "a/hard-absolute": (tarfile.LNKTYPE, "/etc/passwd"),
        "a/nowhere": (tarfile.SYMTYPE, "nothing"),
        "a/self": (tarfile.SYMTYPE, "self"),
        "a/round": (tarfile.SYMTYPE, "about"),
        "a/about": (tarfile.SYMTYPE, "round"),
        "a/device": (tarfile.CHRTYPE, ""),
        "a/pipe": (tarfile.FIFOTYPE, ""),
        "a/folder": (tarfile.DIRTYPE, ""),
    }
    with opened(write_tar(tmp_path / "a.tar", FILES, links=links)) as archive:
        linked = {name: data for name, data in everything(archive).items() if name not in FILES}
    assert linked == dict.fromkeys(["a/symlink", "a/to-symlink", "a/to-that", "a/hard"], b"{}")


def test_links_in_folder_never_lead_outside(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "folder", FILES)
    write_folder(tmp_path / "beside", {"secret": b"secret"})
    links = {
        "inside": "blobs/sha256/cc",
        "out": "../beside/secret",
        "absolute": str(tmp_path / "beside/secret"),
        "nowhere": "nothing",
        "self": "self",
        "folder-out": "../beside",
        "folder-inside": "blobs",
    }
    for name, target in links.items():
        (folder / name).symlink_to(target)
    os.mkfifo(folder / "pipe")
    with opened(folder) as archive:
        assert everything(archive) == {**FILES, "inside": b"small"}


def test_folder_given_as_symlink_is_read(tmp_path: Path) -> None:
    write_folder(tmp_path / "folder", FILES)
    (tmp_path / "folder/inside").symlink_to("index.json")
    (tmp_path / "link").symlink_to("folder")
    with opened(tmp_path / "link") as archive:
        assert everything(archive) == {**FILES, "inside": b"{}"}


def test_unreadable_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_folder(tmp_path / "folder", FILES)
    scan = os.scandir

    def refuse(path: str) -> object:
        if path.endswith("/sha256"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert refused(folder) == "Permission denied"


def test_lost_and_found_is_ignored(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "folder", {**FILES, "lost+found/x": b"x"})
    with opened(folder) as archive:
        assert everything(archive) == FILES


def test_duplicate_member_names_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        add_file(tar, "index.json", b"{}")
        add_file(tar, "./index.json", b"[]")
    assert refused(path) == "two members have the same name: index.json"
    links = {"index.json": (tarfile.SYMTYPE, "blobs/sha256/cc")}
    assert refused(write_tar(tmp_path / "b.tar", FILES, links=links)) == "two members have the same name: index.json"


def test_error_is_one_printable_line(tmp_path: Path) -> None:
    name = "../\x1b[31m\nx\udcff" + "x" * 5000
    error = refused(write_tar(tmp_path / "a.tar", {name: b""}))
    assert error.startswith(r"the path of a member leads outside: ../\x1b[31m\nx\udcffxxx")
    assert len(error) < 1100


@pytest.mark.parametrize(("path_of", "limited"), [(write_tar, tars), (write_folder, folders)])
def test_too_many_members_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path_of: Callable[..., Path], limited: object
) -> None:
    monkeypatch.setattr(limited, "MOST_MEMBERS", 2)
    assert refused(path_of(tmp_path / "archive", FILES)).startswith("it has more than 2 ")


def header(size: bytes, kind: bytes = tarfile.REGTYPE) -> bytes:
    """Return a tar header that claims the size given in 12 bytes."""
    entry = tarfile.TarInfo("index.json")
    entry.type = kind
    block = bytearray(entry.tobuf(tarfile.USTAR_FORMAT))
    block[124:136] = size
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, b"Z"])
@pytest.mark.parametrize(
    "size", [b"\xff" * 12, b"\xff" * 10 + b"\xfe\x00", b"77777777777\0", b"\x80" + b"\x7f" * 11, b"not a size.."]
)
def test_false_size_in_header_is_refused(tmp_path: Path, size: bytes, kind: bytes) -> None:
    (tmp_path / "a.tar").write_bytes(header(size, kind) + bytes(1024))
    assert refused(tmp_path / "a.tar")
    (tmp_path / "b.tar").write_bytes(gzip.compress(header(size, kind) + bytes(1024)))
    assert refused(tmp_path / "b.tar")


def test_endless_long_name_headers_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(header(b"00000000000\0", tarfile.GNUTYPE_LONGNAME) * 5000 + bytes(1024))
    assert "damaged" in refused(tmp_path / "a.tar")


def test_oversized_pax_header_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        entry = tarfile.TarInfo("index.json")
        entry.pax_headers = {"comment": "x" * 100_000}
        tar.addfile(entry, io.BytesIO(b""))
    assert "a header is too large" in refused(path)


def test_negative_header_size_is_refused() -> None:
    # -1 would mean the rest of the file.
    with pytest.raises(tarfile.ReadError):
        tars._Headers(io.BytesIO(b"x")).read(-1)


@pytest.mark.parametrize(("each", "in_all", "kept"), [(3, 100, "c"), (100, 8, "ac"), (100, 100, "abc"), (0, 0, "")])
def test_memory_for_small_members_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, each: int, in_all: int, kept: str
) -> None:
    monkeypatch.setattr(tars, "_KEPT_EACH", each)
    monkeypatch.setattr(tars, "_KEPT_IN_ALL", in_all)
    files = {"a": b"aaaaa", "b": b"bbbb", "c": b"ccc"}
    with opened(write_tar(tmp_path / "a.tar", files, "gz")) as archive:
        assert "".join(name for name, member in archive.members.items() if member.offset == 0) == kept
        assert everything(archive) == files


def test_sparse_members_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(header(b"00000000000\0", tarfile.GNUTYPE_SPARSE) + bytes(1024))
    assert "holes" in refused(tmp_path / "a.tar")
    more = bytearray(header(b"00000000000\0", tarfile.GNUTYPE_SPARSE))
    more[482] = 1
    more[148:156] = b" " * 8
    more[148:156] = b"%06o\0 " % sum(more)
    (tmp_path / "b.tar").write_bytes(more)
    assert "damaged" in refused(tmp_path / "b.tar")


def test_large_zstd_window_is_refused(tmp_path: Path) -> None:
    """`zstd --long=31` asks whoever reads it for 2 GiB."""
    header = io.BytesIO()
    parameters = zstandard.ZstdCompressionParameters(window_log=28)
    with zstandard.ZstdCompressor(compression_params=parameters).stream_writer(header, closefd=False) as writer:
        writer.write(bytes(1024))
    (tmp_path / "a.tar").write_bytes(header.getvalue())
    assert refused(tmp_path / "a.tar") == (
        "its zstd window is larger than 128 MiB, which takes too much memory: compress it with --long=27 or without "
        "--long"
    )


@pytest.mark.parametrize("compression", ["gz", "zst"])
def test_decompression_bomb_takes_no_memory(tmp_path: Path, compression: str) -> None:
    """One member of 300 MB of zeros; the file has a few hundred kB, or less."""
    path = write_tar(tmp_path / "a.tar", {"bomb": bytes(300_000_000)}, compression)
    assert path.stat().st_size < 500_000
    tracemalloc.start()
    try:
        with opened(path) as archive:
            assert sum(map(len, archive.members["bomb"].pieces())) == 300_000_000
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
    finally:
        tracemalloc.stop()
