"""Compressed archives and layers: recognized by their first bytes, and decompressed in bounded memory."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

import zstandard

LARGEST_WINDOW = 128 * 1024 * 1024
"""Bytes of the window of a zstd frame, at most: what the command zstd accepts by default. Decompressing needs as much
memory as the window has; a frame can ask for more than a machine has."""

LONGEST_MAGIC = 6
"""Bytes at the start of a file that tell how it is compressed."""


class _ZstdContent(io.RawIOBase):
    """The content of a file that is compressed by zstd, in any number of frames; seeking back starts over.

    The end of the file within a frame reads like the end of the content: what is read must tell its own end.
    """

    def __init__(self, file: BinaryIO) -> None:
        """Decompress what `file` has from here on."""
        self._file = file
        self._reader = self._open()

    def _open(self) -> zstandard.ZstdDecompressionReader:
        decompressor = zstandard.ZstdDecompressor(max_window_size=LARGEST_WINDOW)
        return decompressor.stream_reader(self._file, read_across_frames=True, closefd=False)

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer`, or read up to the end; return the number of bytes."""
        # The library fails where it has no room to make progress.
        return self._reader.readinto(buffer) if len(buffer) else 0

    def tell(self) -> int:
        """Return the offset in the decompressed content."""
        return self._reader.tell()

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to an offset from the start of the content, which must be that of the file.

        Raises:
            io.UnsupportedOperation: `whence` is another one.
        """
        if whence != io.SEEK_SET:
            raise io.UnsupportedOperation("only offsets from the start are supported")
        if offset < self.tell():
            self._file.seek(0)
            self._reader = self._open()
        return self._reader.seek(offset)


@dataclass(frozen=True, slots=True)
class Compression:
    """A format of compressed files; `open` decompresses a file while it is read."""

    name: str
    magics: tuple[bytes, ...]
    open: Callable[[BinaryIO], AbstractContextManager[Any]]


GZIP = Compression("gzip", (b"\x1f\x8b\x08",), lambda file: gzip.GzipFile(fileobj=file, mode="rb"))
ZSTD = Compression(
    "zstd",
    # A frame, or one that is to be skipped (RFC 8878, section 3.1).
    (b"\x28\xb5\x2f\xfd", *(bytes([first]) + b"\x2a\x4d\x18" for first in range(0x50, 0x60))),
    # The buffer serves small steps back, as tarfile takes them.
    lambda file: io.BufferedReader(_ZstdContent(file), 128 * 1024),
)
_ALL = (
    GZIP,
    Compression("bzip2", (b"BZh",), bz2.BZ2File),
    Compression("xz", (b"\xfd7zXZ\x00",), lzma.LZMAFile),
    ZSTD,
)


def compression_of(start: bytes) -> Compression | None:
    """Return how a file that begins with `start` is compressed; None if it is not."""
    return next((one for one in _ALL if start.startswith(one.magics)), None)


def write_zstd(file: BinaryIO) -> AbstractContextManager[BinaryIO]:
    """Return a file that compresses into `file`, which stays open; the same content gives the same bytes."""
    compressor = zstandard.ZstdCompressor(write_checksum=True)
    return cast("AbstractContextManager[BinaryIO]", compressor.stream_writer(file, closefd=False))


def damage(error: zstandard.ZstdError) -> str:
    """Return what is wrong with a file that cannot be decompressed."""
    if "too much memory" in str(error):
        return (
            f"its zstd window is larger than {LARGEST_WINDOW >> 20} MiB, which takes too much memory: compress it "
            "with --long=27 or without --long"
        )
    return f"it is cut off or damaged: {error}"
