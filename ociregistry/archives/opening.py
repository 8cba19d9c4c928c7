"""Opens an archive, whatever it is, by what it holds: its name says nothing."""

from __future__ import annotations

import posixpath
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from ociregistry.archives.failures import reading
from ociregistry.archives.folders import read_folder
from ociregistry.archives.members import Archive, Member
from ociregistry.archives.tars import read_tar

_PARTS = frozenset({"blobs", "fat", "img", "lts"})
"""Folders that are part of an archive, even if nothing is beside them."""


def open_archive(path: Path) -> Archive | None:
    """The archive `path`, a folder or a tar (plain, or compressed by gzip, bzip2 or xz); None when it is neither.

    Blocks, for a compressed tar until all of it is read once; raises `ArchiveInvalid`, also when there is nothing
    that can be read.
    """
    with reading(path), ExitStack() as opening:
        if path.exists() and not path.is_dir() and not path.is_file():
            # A pipe can be read but once, and not here.
            return None
        members = read_folder(path) if path.is_dir() else read_tar(path, opening)
        if members is None:
            return None
        return Archive(path, _without_top(members), opening.pop_all())


def _without_top(members: Mapping[str, Member]) -> Mapping[str, Member]:
    """The members by their names in the folder that holds them all: a tar of a folder begins with its name."""
    folders = {posixpath.dirname(name) for name in members}
    top = posixpath.commonpath(folders) if folders else ""
    while posixpath.basename(top) in _PARTS:
        top = posixpath.dirname(top)
    return {posixpath.relpath(name, top): member for name, member in members.items()} if top else members
