"""Which format an archive has, by the files in it."""

from __future__ import annotations

from ociregistry.archives.contents import Contents
from ociregistry.archives.dockersave import DOCKER_INDEX, read_docker_archive
from ociregistry.archives.imagefolder import is_image_folder, read_image_folder
from ociregistry.archives.layout import INDEX, MARK, read_layout
from ociregistry.archives.members import Archive


def read_contents(archive: Archive) -> Contents:
    """What `archive` holds. Blocks; raises `ArchiveInvalid`, also when it is no archive of images."""
    if archive.members.keys() >= {MARK, INDEX}:
        return read_layout(archive)
    if DOCKER_INDEX in archive.members:
        return read_docker_archive(archive)
    if is_image_folder(archive):
        return read_image_folder(archive)
    raise archive.invalid(
        "it is no archive of images: neither an OCI layout (oci-layout and index.json), nor what docker save writes "
        "(manifest.json), nor an image folder (fat/ and img/)"
    )
