"""Folders, which are read as they are: no link that leads out of one is followed."""

from __future__ import annotations

import os
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
            file = _file(root, name)
            if file is None:
                continue
            if len(members) == MOST_MEMBERS:
                raise ArchiveInvalid(path, f"it has more than {MOST_MEMBERS} files")
            members[name] = Member(path, name, file.stat().st_size, len(members), _opener(file))
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


def _file(root: Path, name: str) -> Path | None:
    """The file of that name, to which a link may lead; None when there is none within `root`."""
    path = root / name
    if path.is_symlink():
        try:
            path = path.resolve(strict=True)
        except (OSError, RuntimeError):
            return None
    return path if path.is_file() and path.is_relative_to(root) else None
