"""The files in an archive of images, and what can be wrong with them."""

from __future__ import annotations

import gzip
import json
import lzma
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Self

from ociregistry.manifests import LARGEST_MANIFEST

_LONGEST_LINE = 1000


def one_line(text: str) -> str:
    """`text` for a terminal: what archives call things may have any characters, and be long."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text[:_LONGEST_LINE])


class ArchiveFailure(Exception):
    """An archive cannot be loaded or written; the message is one line that begins with the name of its file."""


class ArchiveInvalid(ArchiveFailure):
    """An archive cannot be read, is damaged or lies: nothing of it is to be used."""

    def __init__(self, path: Path, why: str, member: str = "") -> None:
        super().__init__(one_line(f"{path}: {why}" + (f": {member}" if member else "")))


class LoadFailed(ArchiveFailure):
    """The store could not take what the archive holds."""


class ExportFailed(ArchiveFailure):
    """The archive could not be written."""


@contextmanager
def reading(path: Path, member: str = "") -> Iterator[None]:
    """Turns what reading the archive `path` raises into `ArchiveInvalid`."""
    try:
        yield
    except gzip.BadGzipFile as error:
        raise ArchiveInvalid(path, f"it is cut off or damaged: {error}", member) from error
    except OSError as error:
        raise ArchiveInvalid(path, error.strerror or str(error), member) from error
    except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise ArchiveInvalid(path, f"it is cut off or damaged: {error}", member) from error
    except (ValueError, LookupError, RecursionError) as error:
        # What the standard library's reader of tars makes of numbers and texts that are none.
        raise ArchiveInvalid(path, f"it is damaged: {error}", member) from error


MOST_MEMBERS = 200_000
"""More files are taken for a mistake, such as the root folder of the machine."""

PIECE = 1024 * 1024
"""Bytes that are read in one go."""

_MOST_METADATA = 512 * 1024 * 1024
"""Bytes of one archive that are read as JSON: so much memory it may take."""

Opener = Callable[[], AbstractContextManager[BinaryIO]]


@dataclass(frozen=True, slots=True)
class Member:
    """One file in the archive `archive`, of `size` bytes.

    `order` is where it comes in the archive: those of a compressed one are to be read in that order, as every
    way back begins at its start.
    """

    archive: Path
    name: str
    size: int
    order: int
    opener: Opener = field(repr=False, compare=False)
    offset: int = 0
    """Where it begins in the file that `opener` opens."""

    def pieces(self) -> Iterator[bytes]:
        """Its `size` bytes, in pieces of at most 1 MiB. Blocks; raises `ArchiveInvalid` when there are fewer."""
        with reading(self.archive, self.name), self.opener() as file:
            position, end = self.offset, self.offset + self.size
            while position < end:
                # Every time, as others read from the same file.
                file.seek(position)
                piece = file.read(min(end - position, PIECE))
                if not piece:
                    raise self.invalid("it ends too early")
                yield piece
                position += len(piece)

    def invalid(self, why: str) -> ArchiveInvalid:
        """What to raise when there is something wrong with it."""
        return ArchiveInvalid(self.archive, why, self.name)


class Archive:
    """The files in a tar or a folder, by their names; a context manager that closes it.

    Nothing is unpacked, and no name of a member ever becomes a path on our disk.
    """

    def __init__(self, path: Path, members: Mapping[str, Member], closing: ExitStack) -> None:
        self.path = path
        self.members = members
        self._closing = closing
        self._metadata = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Its members cannot be read any more."""
        self._closing.close()

    def read(self, member: Member) -> bytes:
        """All bytes of a member that is to be small: a manifest, a config, an index.

        Blocks; raises `ArchiveInvalid`.
        """
        if member.size > LARGEST_MANIFEST:
            raise member.invalid(f"it has {member.size} bytes, more than {LARGEST_MANIFEST}")
        self._metadata += member.size
        if self._metadata > _MOST_METADATA:
            raise self.invalid(f"it has more than {_MOST_METADATA} bytes of manifests")
        return b"".join(member.pieces())

    def json(self, member: Member) -> Any:
        """What a member says in JSON. Blocks; raises `ArchiveInvalid`."""
        return parse_json(self.read(member), member)

    def invalid(self, why: str) -> ArchiveInvalid:
        """What to raise when there is something wrong with it."""
        return ArchiveInvalid(self.path, why)


def parse_json(data: bytes, member: Member) -> Any:
    """What `data` of `member` says in JSON; raises `ArchiveInvalid`."""
    try:
        return json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise member.invalid(f"it is not JSON: {error}") from None
