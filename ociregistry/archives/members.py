"""The files in an archive of images, and the errors of archives."""

from __future__ import annotations

import gzip
import lzma
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Self

import zstandard

from ociregistry import strictjson
from ociregistry.archives.compression import damage
from ociregistry.errors import RegistryError
from ociregistry.imagelists.reading import parse_image
from ociregistry.manifests import LARGEST_MANIFEST
from ociregistry.names import Reference, Repository

_LONGEST_LINE = 1000
"""Characters of a name or an error message, at most."""


def one_line(text: str) -> str:
    """Return `text` escaped and shortened for a terminal; names in archives may be long and have any characters."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text[:_LONGEST_LINE])


class ArchiveFailure(Exception):
    """An archive cannot be loaded or written; the message is one line that begins with the path of the archive."""


class ArchiveInvalid(ArchiveFailure):
    """An archive cannot be read, is damaged or contradicts itself; none of it may be used."""

    def __init__(self, path: Path, why: str, member: str = "") -> None:
        super().__init__(one_line(f"{path}: {why}" + (f": {member}" if member else "")))


class LoadFailed(ArchiveFailure):
    """The store could not take the content of the archive."""


class ExportFailed(ArchiveFailure):
    """The archive could not be written."""


@contextmanager
def reading(path: Path, member: str = "") -> Iterator[None]:
    """Convert errors of reading the archive `path` to `ArchiveInvalid`.

    Raises:
        ArchiveInvalid: the block raised an error of reading or of decompression.
    """
    try:
        yield
    except gzip.BadGzipFile as error:
        raise ArchiveInvalid(path, f"it is cut off or damaged: {error}", member) from error
    except OSError as error:
        raise ArchiveInvalid(path, error.strerror or str(error), member) from error
    except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise ArchiveInvalid(path, f"it is cut off or damaged: {error}", member) from error
    except zstandard.ZstdError as error:
        raise ArchiveInvalid(path, damage(error), member) from error
    except (ValueError, LookupError, RecursionError) as error:
        # tarfile raises these for invalid numbers and texts.
        raise ArchiveInvalid(path, f"it is damaged: {error}", member) from error


MOST_MEMBERS = 200_000
"""Files in one archive, at most; more are taken for a mistake, such as the root folder of the machine."""

PIECE = 1024 * 1024
"""Bytes that are read at once."""

_MOST_METADATA = 512 * 1024 * 1024
"""Bytes of manifests and other JSON in one archive, at most, to bound the memory that they take."""

Opener = Callable[[], AbstractContextManager[BinaryIO]]


@dataclass(frozen=True, slots=True)
class Member:
    """One file in the archive `archive`, of `size` bytes.

    `order` is its position in the archive. The members of a compressed archive should be read in that order, since
    seeking back starts decompression from the beginning.
    """

    archive: Path
    name: str
    size: int
    order: int
    opener: Opener = field(repr=False, compare=False)
    offset: int = 0
    """The offset in bytes of the member in the file that `opener` opens."""

    def pieces(self) -> Iterator[bytes]:
        """Yield its `size` bytes in pieces of at most 1 MiB. Blocks.

        Raises:
            ArchiveInvalid: the archive cannot be read, or has fewer bytes.
        """
        with reading(self.archive, self.name), self.opener() as file:
            position, end = self.offset, self.offset + self.size
            while position < end:
                # Seek for each piece, since other members are read from the same file.
                file.seek(position)
                piece = file.read(min(end - position, PIECE))
                if not piece:
                    raise self.invalid("it ends too early")
                yield piece
                position += len(piece)

    def invalid(self, why: str) -> ArchiveInvalid:
        """Return the error to raise for this member."""
        return ArchiveInvalid(self.archive, why, self.name)


@dataclass(frozen=True, slots=True)
class GivenName:
    """The name that the operator gives to the images of an archive that have none."""

    repository: Repository
    reference: Reference | None
    """None for the tag that the archive tells, else `latest`."""

    @classmethod
    def parse(cls, text: str) -> GivenName:
        """Parse a name such as `nginx:1.25`, as Docker does.

        Raises:
            ValueError: it is malformed.
        """
        try:
            image = parse_image(text)
        except RegistryError as error:
            raise ValueError(error.message) from None
        is_whole = "@" in text or ":" in text.rpartition("/")[2]
        return cls(image.repository, image.reference if is_whole else None)


class Archive:
    """The files in a tar or a folder, by name; a context manager that closes it.

    Nothing is unpacked: the name of a member never becomes a path on disk.
    """

    def __init__(
        self, path: Path, members: Mapping[str, Member], closing: ExitStack, name: GivenName | None = None
    ) -> None:
        self.path = path
        self.members = members
        self.name = name
        self._closing = closing
        self._metadata = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the archive; its members cannot be read any more."""
        self._closing.close()

    def read(self, member: Member) -> bytes:
        """Read all bytes of a small member: a manifest, a config, an index. Blocks.

        Raises:
            ArchiveInvalid: it cannot be read, is too large, or the archive has too many such bytes.
        """
        if member.size > LARGEST_MANIFEST:
            raise member.invalid(f"it has {member.size} bytes, more than {LARGEST_MANIFEST}")
        self._metadata += member.size
        if self._metadata > _MOST_METADATA:
            raise self.invalid(f"it has more than {_MOST_METADATA} bytes of manifests")
        return b"".join(member.pieces())

    def json(self, member: Member) -> Any:
        """Read a small member as JSON. Blocks.

        Raises:
            ArchiveInvalid: it cannot be read, or is not JSON.
        """
        return parse_json(self.read(member), member)

    def invalid(self, why: str) -> ArchiveInvalid:
        """Return the error to raise for this archive."""
        return ArchiveInvalid(self.path, why)


def parse_json(data: bytes, member: Member) -> Any:
    """Parse `data`, the content of `member`, as JSON.

    Raises:
        ArchiveInvalid: it is not JSON.
    """
    try:
        return strictjson.parse_json(data)
    except ValueError as error:
        raise member.invalid(f"it is not JSON: {error}") from None
