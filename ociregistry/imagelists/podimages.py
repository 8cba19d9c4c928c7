"""Find the images in Kubernetes objects by the shape of pods, whatever the kind of object.

Sources: the Kubernetes API reference, PodSpec v1 core, Container v1 core, ImageVolumeSource v1 core.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import Any, NamedTuple

_CONTAINERS = frozenset({"containers", "initContainers", "ephemeralContainers"})
_NO_IMAGES = frozenset({"rbd"})
"""Keys of mappings whose `image` is something else: one of a Ceph block device, as volumes have."""
_DESCRIPTIVE = frozenset({"metadata", "status"})
"""Keys of an object that say nothing about what it is to be."""

_LONGEST_NAME = 253
"""Characters of a name in Kubernetes, at most."""


@dataclass(frozen=True, slots=True)
class ImageField:
    """A field that names an image."""

    owner: str
    """Kind and name of the object, such as `Pod/web`; what is unknown is missing."""
    value: Any
    """What the field holds: a string, if the object is sound."""
    near: Any
    """The value whose line is that of the field, where the value has none."""
    why_not: str = ""
    """Why no image can be made of the value."""


class _Role(Enum):
    """What a value is by its place in the value around it."""

    CONTAINER = auto()
    VOLUME = auto()
    IMAGE = auto()
    """The value of a key `image`."""
    OTHER = auto()


# A tuple: there is one for each mapping and list of ten thousand pods.
class _Visit(NamedTuple):
    """A mapping or a list to look at."""

    value: Mapping[str, Any] | list[Any]
    owner: str
    role: _Role = _Role.OTHER
    replaced: str = ""
    """The key that occurs twice, if this is in its earlier value, which does not count."""


def image_fields(document: Any, *, any_image_field: bool) -> Iterator[ImageField]:
    """Yield the fields of containers and volumes that name images, in their order.

    A container is an item of `containers`, `initContainers` or `ephemeralContainers`, at any depth of any object; one
    without `image` is left out, as what patches another one has none. With `any_image_field`, yield also each string
    under a key `image`, and each mapping there with a `repository`, in all objects but definitions of custom
    resources. What an object tells in `status` is not looked at.
    """
    # By aliases, YAML has a value in several places, or in itself. The values stay, so that no other has their id.
    seen: dict[int, Any] = {}
    waiting = [_Visit(document, "")] if isinstance(document, dict | list) else []
    while waiting:
        visit = waiting.pop()
        value, owner, role, replaced = visit
        if id(value) in seen:
            continue
        seen[id(value)] = value
        if isinstance(value, list):
            waiting += [
                _Visit(item, owner, role, replaced) for item in reversed(value) if isinstance(item, dict | list)
            ]
            continue
        is_object = isinstance(value.get("metadata"), dict)
        if is_object:
            visit = visit._replace(owner=_name(value))
        for one in _fields_of(value, visit, any_image_field):
            yield replace(one, why_not=_twice(replaced, one.value)) if replaced else one
        if any_image_field and is_object and value.get("kind") == "CustomResourceDefinition":
            continue
        waiting += reversed(list(_children(value, visit, is_object)))


def _fields_of(mapping: Mapping[str, Any], visit: _Visit, any_image_field: bool) -> Iterator[ImageField]:
    """Yield the fields of a mapping itself that name images."""
    image = mapping.get("image")
    is_parted = isinstance(image, dict) and "repository" in image
    if visit.role is _Role.CONTAINER and "image" in mapping and not is_parted:
        yield ImageField(visit.owner, image, mapping)
    elif visit.role is _Role.VOLUME and isinstance(image, dict) and "reference" in image:
        yield ImageField(visit.owner, image["reference"], image)
    elif any_image_field:
        yield from _other_fields(mapping, visit)


def _twice(key: str, value: Any) -> str:
    return f"the image {str(value)[:100]!r} is lost, as the key {key!r} occurs twice: is a line --- missing?"


def _children(mapping: Mapping[str, Any], visit: _Visit, is_object: bool) -> Iterator[_Visit]:
    """Yield what is in a mapping, as far as it may name images."""
    for key, value in mapping.items():
        if not isinstance(value, dict | list) or (is_object and key in _DESCRIPTIVE) or key in _NO_IMAGES:
            continue
        role = _Role.OTHER
        if isinstance(value, list):
            role = _Role.CONTAINER if key in _CONTAINERS else _Role.VOLUME if key == "volumes" else role
        elif key == "image":
            role = _Role.IMAGE
        yield _Visit(value, visit.owner, role, visit.replaced)
    for key, value in getattr(mapping, "replaced", ()):
        # Of strings only: comparing mappings with aliases in them may take forever.
        if not isinstance(value, str) or value != mapping[key]:
            yield _Visit({key: value}, visit.owner, visit.role, visit.replaced or key)


def _name(mapping: Mapping[str, Any]) -> str:
    metadata = mapping["metadata"]
    words = (mapping.get("kind"), metadata.get("name") or metadata.get("generateName"))
    return "/".join(word[:_LONGEST_NAME] for word in words if isinstance(word, str) and word)


def _other_fields(mapping: Mapping[str, Any], visit: _Visit) -> Iterator[ImageField]:
    """Yield the image that a mapping names in one of the ways of custom resources and of values of charts.

    These are a string `image`; `image` with `registry`, `repository`, `tag` and `digest` in it; and NVIDIA's
    `repository`, `image` and `version` beside each other. An empty string is left out: what it means is the
    operator's.
    """
    image, repository = mapping.get("image"), _word(mapping, "repository")
    if isinstance(image, str):
        if image and repository:
            yield _composed(mapping, visit.owner, f"{repository}/{image}", _word(mapping, "version"))
        elif image:
            yield ImageField(visit.owner, image, mapping)
    elif visit.role is _Role.IMAGE and repository:
        registry = _word(mapping, "registry")
        name = f"{registry}/{repository}" if registry else repository
        yield _composed(mapping, visit.owner, name, _word(mapping, "tag"))


def _composed(mapping: Mapping[str, Any], owner: str, name: str, tag: str) -> ImageField:
    digest = _word(mapping, "digest")
    if tag.startswith("sha256:"):
        tag, digest = "", tag
    why_not = "" if tag or digest else f"the image {name!r} has neither a tag nor a digest beside its repository"
    whole = name + (f":{tag}" if tag else "") + (f"@{digest}" if digest else "")
    return ImageField(owner, whole, mapping, why_not)


def _word(mapping: Mapping[str, Any], key: str) -> str:
    """Return a string or a number, such as the tag 1.25, as text; empty if it is something else."""
    value = mapping.get(key)
    return str(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else ""
