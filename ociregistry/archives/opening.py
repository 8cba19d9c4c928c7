"""Open an archive or a folder of images; the format is recognized by the content, not by the name."""

from __future__ import annotations

import os
import posixpath
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

from ociregistry.archives.contents import Contents
from ociregistry.archives.dockersave import DOCKER_INDEX, read_docker_archive
from ociregistry.archives.imagefolder import MANIFEST_FOLDERS, is_image_folder, read_image_folder
from ociregistry.archives.layout import INDEX, MARK, read_layout
from ociregistry.archives.members import MOST_MEMBERS, Archive, ArchiveInvalid, GivenName, Member, reading
from ociregistry.archives.skopeodir import is_skopeo_dir, read_skopeo_dir
from ociregistry.archives.tars import read_tar
from ociregistry.store.paths import BLOBS_FOLDER

_NOT_OURS = frozenset({"lost+found"})
"""Folders to skip: the root of a file system has one that only the user root can read."""


def read_folder(path: Path) -> dict[str, Member]:
    """Return the files in the folder `path` and below it, by relative path. Blocks.

    Raises:
        ArchiveInvalid: the folder cannot be read, or has too many files.
    """
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
    for folder, folders, files in os.walk(root, onerror=_raise_unless_missing):
        folders[:] = sorted(set(folders) - _NOT_OURS)
        for file in sorted(files):
            yield os.path.relpath(os.path.join(folder, file), root)


def _raise_unless_missing(error: OSError) -> None:
    # A folder that was removed meanwhile is skipped.
    if not isinstance(error, FileNotFoundError):
        raise error


def _find(root: Path, name: str) -> tuple[Path, int] | None:
    """Return the file `name` and its size in bytes, following a link; None if there is no such file in `root`."""
    path = root / name
    try:
        if path.is_symlink():
            path = path.resolve(strict=True)
        status = path.stat()
    except (FileNotFoundError, RuntimeError):
        # Removed meanwhile, or a dangling or circular link.
        return None
    return (path, status.st_size) if stat.S_ISREG(status.st_mode) and path.is_relative_to(root) else None


def read_contents(archive: Archive) -> Contents:
    """Read the contents of `archive` in any of the supported formats. Blocks.

    Raises:
        ArchiveInvalid: it cannot be read, is damaged, or is not an archive of images.
    """
    if archive.members.keys() >= {MARK, INDEX}:
        return read_layout(archive)
    if is_skopeo_dir(archive):
        return read_skopeo_dir(archive)
    if DOCKER_INDEX in archive.members:
        return read_docker_archive(archive)
    if is_image_folder(archive):
        return read_image_folder(archive)
    raise archive.invalid(
        "not an image archive: neither an OCI layout (oci-layout and index.json), nor what docker save writes "
        "(manifest.json), nor skopeo's dir: (version and manifest.json), nor an image folder (fat/ and img/)"
    )


_PARTS = MANIFEST_FOLDERS | {BLOBS_FOLDER}
"""Folders that belong to an archive, and are not its enclosing folder even if nothing else is in it."""


def open_archive(path: Path, name: GivenName | None = None) -> Archive | None:
    """Open the archive `path`: a folder, or a tar; None if it is neither.

    `name` is for the images in it that have none. A tar is plain, or compressed by gzip, bzip2, xz or zstd. Blocks; a
    compressed tar is read completely once.

    Raises:
        ArchiveInvalid: it does not exist, cannot be read, or is damaged.
    """
    with reading(path), ExitStack() as opening:
        if path.exists() and not path.is_dir() and not path.is_file():
            # A pipe can be read only once, so it is left to the caller.
            return None
        members = read_folder(path) if path.is_dir() else read_tar(path, opening)
        if members is None:
            return None
        return Archive(path, _without_top(members), opening.pop_all(), name)


def _without_top(members: Mapping[str, Member]) -> Mapping[str, Member]:
    """Return the members by their names relative to their common folder: a tar of a folder has its name first."""
    folders = {posixpath.dirname(name) for name in members}
    top = posixpath.commonpath(folders) if folders else ""
    while posixpath.basename(top) in _PARTS:
        top = posixpath.dirname(top)
    return {posixpath.relpath(name, top): member for name, member in members.items()} if top else members
