"""Folders, which are read as they are: no link that leads out of one is followed."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from ociregistry.archives.failures import ArchiveInvalid, reading
from ociregistry.archives.members import MOST_MEMBERS, Member

_NOT_OURS = frozenset({"lost+found"})
"""Where an image path is a disk of its own, nobody but root may look into it."""


def read_folder(path: Path) -> dict[str, Member]:
    """The files in the folder `path` and below it. Blocks; raises `ArchiveInvalid`."""
    members: dict[str, Member] = {}
    with reading(path):
        root = path.resolve()
        for name in _names(root):
            if len(members) == MOST_MEMBERS:
                raise ArchiveInvalid(path, f"it has more than {MOST_MEMBERS} files")
            found = _find(root, name)
            if found is not None:
                file, size = found
                members[name] = Member(path, name, size, len(members), _opener(file))
    return members


def _opener(file: Path) -> Callable[[], BinaryIO]:
    return lambda: file.open("rb")


def _names(root: Path) -> Iterator[str]:
    for folder, folders, files in os.walk(root, onerror=_complain):
        folders[:] = sorted(set(folders) - _NOT_OURS)
        for file in sorted(files):
            yield os.path.relpath(os.path.join(folder, file), root)


def _complain(error: OSError) -> None:
    # What others remove meanwhile was not there.
    if not isinstance(error, FileNotFoundError):
        raise error


def _find(root: Path, name: str) -> tuple[Path, int] | None:
    """The file of that name, to which a link may lead, and its size in bytes; None when there is none in `root`."""
    path = root / name
    try:
        if path.is_symlink():
            path = path.resolve(strict=True)
        status = path.stat()
    except (FileNotFoundError, RuntimeError):
        # Gone meanwhile, or a link to nowhere or to itself.
        return None
    return (path, status.st_size) if stat.S_ISREG(status.st_mode) and path.is_relative_to(root) else None
