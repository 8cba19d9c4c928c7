"""The files that name or hold images: image lists and archives, for the commands that take them."""

from __future__ import annotations

from pathlib import Path

from ociregistry.archives.members import Archive, GivenName
from ociregistry.archives.opening import open_archive
from ociregistry.commands.options import CommandFailed
from ociregistry.imagelists.reading import ImageList, read_image_list

ANY_IMAGE_FIELD = [
    "any-image-field",
    None,
    "Of YAML and JSON, take all fields named image, such as those of custom resources, not only those of containers.",
]
"""The option of the commands that take image lists."""


def path_of(word: str) -> Path:
    """Return the absolute path of the file that `word` names; `-` is the standard input."""
    return Path("/dev/stdin" if word == "-" else word).absolute()


def open_images(path: Path, name: GivenName | None = None, *, any_image_field: bool) -> Archive | ImageList:
    """Open an archive, whose nameless image is called `name`, or read an image list. Blocks.

    Raises:
        ArchiveFailure: it is an archive, and cannot be used.
        CommandFailed: it cannot be read.
    """
    try:
        archive = open_archive(path, name)
        return read_image_list(path, any_image_field=any_image_field) if archive is None else archive
    except OSError as error:
        raise CommandFailed(f"{path}: cannot be read: {error.strerror}") from None
