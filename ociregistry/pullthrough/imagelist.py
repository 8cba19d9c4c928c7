"""Lists of images to load: a file with one reference a line, as people write them elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ociregistry.errors import RegistryError
from ociregistry.names import DOCKER_HUB, ImageReference, Tag, Upstream

_USUAL_TAG = "latest"
_LARGEST = 16 * 1024 * 1024
"""Bytes of a list; what is larger is something else."""


@dataclass(frozen=True, slots=True)
class ImageList:
    """What a file names, each image once, and a line for each error in it."""

    images: tuple[ImageReference, ...]
    errors: tuple[str, ...]


def read_image_list(path: Path) -> ImageList:
    """The images in the file at `path`; `#` begins a comment. Blocks; raises `OSError`."""
    with path.open("rb") as file:
        data = file.read(_LARGEST + 1)
    try:
        if len(data) > _LARGEST:
            raise ValueError
        text = data.decode("utf-8-sig")
    except ValueError:
        return ImageList((), (f"{path}: is neither a text nor an archive of images",))
    images: dict[ImageReference, None] = {}
    errors: list[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        word = line.partition("#")[0].strip()
        if not word:
            continue
        try:
            images[parse_image(word)] = None
        except RegistryError as error:
            errors.append(f"{path}:{number}: {_shown(word)} is no image reference: {error.message}")
    if not images and not errors:
        errors.append(f"{path}: names no image")
    return ImageList(tuple(images), tuple(errors))


def parse_image(text: str) -> ImageReference:
    """The image that `text` names, as Docker has it: without a registry it is at docker.io, without a tag `latest`.

    Of a tag and a digest the digest counts. Raises a `RegistryError`.
    """
    name, at, digest = text.partition("@")
    last = name.rpartition("/")[2]
    if ":" in last:
        Tag.parse(last.partition(":")[2])
        if at:
            name = name.rpartition(":")[0]
    elif not at:
        name = f"{name}:{_USUAL_TAG}"
    return ImageReference.parse(name + at + digest, Upstream(DOCKER_HUB))


def _shown(text: str) -> str:
    return repr(text[:100])
