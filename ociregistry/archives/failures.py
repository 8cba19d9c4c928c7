"""What can go wrong with archives, in a line that the operator sees."""

from __future__ import annotations

import gzip
import lzma
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
