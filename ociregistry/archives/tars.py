"""Read tars, plain or compressed, that may be damaged or malicious."""

from __future__ import annotations

import io
import posixpath
import tarfile
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import BinaryIO, cast

from ociregistry.archives.compression import compression_of
from ociregistry.archives.members import MOST_MEMBERS, ArchiveInvalid, Member, reading

_LARGEST_HEADER = 64 * 1024
"""Bytes of one read of a header, at most."""
_LONGEST_PADDING = 1024 * 1024
"""Bytes that are read after the end of the tar, at most."""
_LONGEST_CHAIN = 32
"""Links that are followed one after the other, at most."""

_KEPT_EACH = 256 * 1024
"""Bytes of one member of a compressed tar that is kept in memory, at most."""
_KEPT_IN_ALL = 64 * 1024 * 1024
"""Bytes of all members kept in memory, at most.

Most small members are manifests; reading one later would decompress the tar from its start.
"""


class _Headers:
    """The file that tarfile reads: only small reads, as of headers, are allowed.

    Without this bound, tarfile would read gigabytes into memory if a header said so, and the whole rest of the file
    for a negative size.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.tell = file.tell
        self.seek = file.seek

    def read(self, count: int) -> bytes:
        """Read at most `count` bytes.

        Raises:
            tarfile.ReadError: `count` is negative or too large.
        """
        if not 0 <= count <= _LARGEST_HEADER:
            raise tarfile.ReadError("a header is too large")
        return self._file.read(count)


def read_tar(path: Path, closing: ExitStack) -> dict[str, Member] | None:
    """Return the files in the tar `path`, which stays open until `closing` is closed; None if it is not a tar.

    Links to a file in the same tar count as files; other links, and members that are not files, are left out. Blocks.

    Raises:
        ArchiveInvalid: it cannot be read, is damaged, or its format is not supported.
    """
    with reading(path):
        file: BinaryIO = closing.enter_context(path.open("rb"))
        start = file.read(tarfile.BLOCKSIZE)
        file.seek(0)
        compression = compression_of(start)
        if compression is None:
            return _Scan(path, file, 0).members() if _is_header(start) else None
        file = closing.enter_context(compression.open(file))
        start = file.read(tarfile.BLOCKSIZE)
        if len(start) < tarfile.BLOCKSIZE:
            raise ArchiveInvalid(path, "it is compressed, but it is cut off or not a tar")
        if not _is_header(start):
            raise ArchiveInvalid(path, "it is compressed, but it is not a tar")
        return _Scan(path, file, _KEPT_IN_ALL).members()


def _is_header(block: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.TarError:
        # A tar whose first header is damaged, or an empty tar.
        return block[257:262] == b"ustar" or block == bytes(tarfile.BLOCKSIZE)
    return True


class _Scan:
    """One pass over all headers of a tar; up to `keep` bytes of small members are kept in memory."""

    def __init__(self, path: Path, file: BinaryIO, keep: int) -> None:
        self._path = path
        self._file = file
        self._keep = keep
        self._files: dict[str, Member] = {}
        self._links: dict[str, str] = {}

    def members(self) -> dict[str, Member]:
        """Return the files, and the links to files, by name.

        Raises:
            ArchiveInvalid: the tar is damaged, malicious, or has too many members.
        """
        self._file.seek(0)
        # For mypy: tarfile uses no more of a file than these methods.
        tar = tarfile.TarFile(fileobj=cast("BinaryIO", _Headers(self._file)), errors="surrogateescape")
        count = 0
        while (entry := tar.next()) is not None:
            count += 1
            if count > MOST_MEMBERS:
                raise ArchiveInvalid(self._path, f"it has more than {MOST_MEMBERS} members")
            self._take(entry)
        self._look_at_end(tar.offset)
        linked = {name: self._follow(target) for name, target in self._links.items()}
        return {**{name: member for name, member in linked.items() if member is not None}, **self._files}

    def _take(self, entry: tarfile.TarInfo) -> None:
        if entry.name.startswith("/") or ".." in entry.name.split("/"):
            raise ArchiveInvalid(self._path, "the path of a member leads outside", entry.name)
        name = posixpath.normpath(entry.name)
        # With a negative size, tarfile would read the same headers forever.
        if entry.size < 0:
            raise ArchiveInvalid(self._path, "it is damaged: a negative size", name)
        if name in self._files or name in self._links:
            raise ArchiveInvalid(self._path, "two members have the same name", name)
        if entry.islnk():
            self._links[name] = posixpath.normpath(entry.linkname)
        elif entry.issym():
            self._links[name] = posixpath.normpath(posixpath.join(posixpath.dirname(name), entry.linkname))
        elif entry.isreg():
            if entry.issparse():
                raise ArchiveInvalid(self._path, "it has holes (GNU sparse), which are not supported", name)
            self._files[name] = self._member(name, entry)

    def _member(self, name: str, entry: tarfile.TarInfo) -> Member:
        if entry.size > min(self._keep, _KEPT_EACH):
            shared = nullcontext(self._file)
            return Member(self._path, name, entry.size, entry.offset_data, lambda: shared, entry.offset_data)
        self._keep -= entry.size
        self._file.seek(entry.offset_data)
        data = self._file.read(entry.size)
        return Member(self._path, name, entry.size, entry.offset_data, partial(io.BytesIO, data))

    def _look_at_end(self, offset: int) -> None:
        # tarfile takes a truncated or damaged header for the end of the tar.
        self._file.seek(offset)
        if self._file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise ArchiveInvalid(self._path, "it is cut off or damaged: it does not end as a tar does")
        # Read on to the end of a compressed file, where its checksum is verified.
        self._file.read(_LONGEST_PADDING)

    def _follow(self, name: str) -> Member | None:
        """Return the file that a link leads to; None if there is none."""
        for _ in range(_LONGEST_CHAIN):
            if name not in self._links:
                break
            name = self._links[name]
        return self._files.get(name)
