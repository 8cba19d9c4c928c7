"""Read image lists: one image per line, or Kubernetes objects; which of both is recognised by the content."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ociregistry.errors import RegistryError
from ociregistry.imagelists.documents import UNRENDERED, Failure, Place, Text, read_documents
from ociregistry.imagelists.podimages import ImageField, image_fields
from ociregistry.names import DOCKER_HUB, ImageReference, Tag, Upstream

USUAL_TAG = Tag("latest")
"""The tag of an image reference without one."""
_LARGEST = 256 * 1024 * 1024
"""Bytes of Kubernetes objects, at most: 10,000 pods and more."""
_LARGEST_PLAIN = 16 * 1024 * 1024
"""Bytes of a list with one image per line, at most; a larger file is none."""


@dataclass(frozen=True, slots=True)
class ImageList:
    """The images that a file names, each once, and one line for each error in the file."""

    images: tuple[ImageReference, ...]
    errors: tuple[str, ...]


def read_image_list(path: Path, *, any_image_field: bool = False) -> ImageList:
    """Read the image list at `path`: one image per line, where `#` begins a comment, or Kubernetes objects. Blocks.

    Objects are YAML or JSON; `any_image_field` is about fields outside of pods, see `image_fields`. An error hides no
    other one, and not the images beside it: what to do with these is for the caller to decide.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        data = file.read(_LARGEST + 1)
    is_objects = _OBJECTS.match(data[:_LONGEST_START].decode("utf-8-sig", "replace")) is not None
    if is_objects and len(data) > _LARGEST:
        return ImageList((), (f"{path}: is larger than {_LARGEST >> 20} MiB: give it in parts",))
    try:
        if not is_objects and len(data) > _LARGEST_PLAIN:
            raise ValueError
        text = data.decode("utf-8-sig")
    except ValueError as error:
        if is_objects and isinstance(error, UnicodeDecodeError):
            line = data.count(b"\n", 0, error.start) + 1
            return ImageList((), (f"{path}:{line}: is not UTF-8",))
        why = "is neither a text file nor an image archive"
        return ImageList(
            (), (f"{path}: {why}" if path.is_file() else f"{path}: {why}, which cannot be read from a pipe",)
        )
    del data
    if is_objects:
        return _from_objects(path, text, any_image_field)
    return _from_lines(path, text)


_LONGEST_START = 1024 * 1024
"""Bytes in which the first line that is no comment has to begin."""
_OBJECTS = re.compile(
    r"""(?:[ \t]*+(?:\#[^\r\n]*+)?[\r\n])*+  # blank lines and comments
    [ \t]*(?:
        \{ | \[(?:[\s{"\[\]]|$)      # JSON; not an IPv6 address
        | ---(?:\s|$) | %YAML\s      # the start of a YAML document
        | -(?:\s|$)                  # the first item of a YAML list
        | "[^"\n]*"[ \t]*:(?:\s|$) | [^\s\#:]+[ \t]*:(?:\s|$)  # the first key of a YAML mapping
    )""",
    re.VERBOSE,
)
"""The beginning of Kubernetes objects. No line that is an image reference begins like this."""


def _from_lines(path: Path, text: str) -> ImageList:
    images: dict[ImageReference, None] = {}
    errors: list[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        word = line.partition("#")[0].strip()
        if not word:
            continue
        try:
            images[parse_image(word)] = None
        except RegistryError as error:
            errors.append(f"{path}:{number}: {_not_an_image(word, error)}")
    if not images and not errors:
        errors.append(f"{path}: names no image")
    return ImageList(tuple(images), tuple(errors))


def _from_objects(path: Path, text: str, any_image_field: bool) -> ImageList:
    images: dict[ImageReference, None] = {}
    errors: list[str] = []
    for part in read_documents(text.replace("\r\n", "\n").replace("\r", "\n")):
        if isinstance(part, Failure):
            errors.append(f"{path}:{part.place}: {part.why}")
            continue
        found = _Found(part.place)
        found.take(part.value, any_image_field)
        if found.errors:
            # Rare enough to read it once more, so that the errors have their own lines.
            found = _Found(part.place)
            found.take(part.with_lines(), any_image_field)
        images |= found.images
        errors += [f"{path}:{error}" for error in found.errors]
    if not images and not errors:
        others = "" if any_image_field else "; load and images take other fields named image by --any-image-field"
        errors.append(f"{path}: is YAML or JSON that names no image of a container{others}")
    return ImageList(tuple(images), tuple(errors))


@dataclass(slots=True)
class _Found:
    """The images and errors in the object at `place`."""

    place: Place
    images: dict[ImageReference, None] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)

    def take(self, value: Any, any_image_field: bool) -> None:
        """Add the images that `value` names."""
        for item in value if isinstance(value, list) else [value]:
            if not isinstance(item, dict) and item not in ("", None):
                self._add_error(item, "", "is not a Kubernetes object, but a word or a number")
        for one in image_fields(value, any_image_field=any_image_field):
            why_not = self._take_field(one)
            if why_not:
                at = one.value if hasattr(one.value, "line") else one.near
                self._add_error(at, one.owner, why_not)

    def _take_field(self, one: ImageField) -> str:
        """Add the image that a field names, or return why it is none."""
        value = one.value
        if one.why_not or value == "" or value is None:
            return one.why_not or "the image is empty"
        if not isinstance(value, str) or (isinstance(value, Text) and not value.is_string):
            return "the image is not a string"
        if "{{" in value:
            return f"the image {_shown(value)} {UNRENDERED}"
        try:
            self.images[parse_image(value)] = None
        except RegistryError as error:
            return _not_an_image(value, error)
        return ""

    def _add_error(self, near: Any, owner: str, why: str) -> None:
        place = Place(getattr(near, "line", self.place.line), self.place.document, self.place.source)
        line = f"{place}: " + (f"{owner}: " if owner else "") + why
        self.errors.append("".join(one if one.isprintable() else ascii(one)[1:-1] for one in line))


def parse_image(text: str) -> ImageReference:
    """Parse an image reference as Docker does: the default registry is docker.io, the default tag `latest`.

    If there are both a tag and a digest, the digest counts.

    Raises:
        RegistryError: `text` is not an image reference.
    """
    name, at, digest = text.partition("@")
    last = name.rpartition("/")[2]
    if ":" in last:
        Tag.parse(last.partition(":")[2])
        if at:
            name = name.rpartition(":")[0]
    elif not at:
        name = f"{name}:{USUAL_TAG}"
    return ImageReference.parse(name + at + digest, Upstream(DOCKER_HUB))


def _not_an_image(text: str, error: RegistryError) -> str:
    return f"{_shown(text)} is not an image reference: {error.message}"


def _shown(text: str) -> str:
    return repr(text[:100])
