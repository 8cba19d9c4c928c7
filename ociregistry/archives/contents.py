"""The contents of an archive, independent of its format: named images, manifests, and the members with blobs."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from ociregistry.archives.joining import Entry, describe, platform_of
from ociregistry.archives.members import Archive, GivenName, Member
from ociregistry.errors import RegistryError
from ociregistry.imagelists.reading import USUAL_TAG
from ociregistry.manifests import IMAGES, Descriptor, Manifest, ManifestInvalid
from ociregistry.names import DOCKER_HUB, Digest, ImageReference, Tag, Upstream
from ociregistry.platforms import NO_PLATFORM, Platform, chosen
from ociregistry.pullthrough.loader import LoadResult, LoadStatus
from ociregistry.store.records import Dates


@dataclass(frozen=True, slots=True)
class NamedImage:
    """An image name in an archive, and the manifest that it refers to there."""

    image: ImageReference
    manifest: Digest
    dates: Dates | None = None
    """The dates in the archive; None if it has none."""
    notes: tuple[str, ...] = ()
    """Remarks for the operator."""


@dataclass(frozen=True, slots=True)
class UnnamedImage:
    """An image in an archive that does not say what it is called; `why` says so to the operator."""

    manifest: Digest
    why: str
    tag: Tag | None = None
    """The tag that the archive tells without a repository, as oras does."""
    notes: tuple[str, ...] = ()
    """Remarks for the operator."""


@dataclass(frozen=True, slots=True)
class Contents:
    """Everything that can be loaded from an archive; `failed` has the images that cannot, with the reasons."""

    images: tuple[NamedImage, ...]
    manifests: Mapping[Digest, Manifest]
    blobs: Mapping[Digest, Member]
    """The member with each blob; the digests are not verified yet."""
    failed: tuple[LoadResult, ...] = ()
    metadata: frozenset[Digest] = frozenset()
    """Images of an index that come as metadata, without their layers."""

    def needed(self, manifest: Manifest) -> Sequence[Descriptor]:
        """Return the blobs that are needed for a manifest; of an image that comes as metadata, only its config.

        A foreign layer is needed only if it is in the archive.
        """
        if manifest.digest in self.metadata:
            return manifest.blobs[:1]
        foreign = manifest.foreign_layers
        return [blob for blob in manifest.blobs if blob.digest not in foreign or blob.digest in self.blobs]

    def tree(self, root: Digest) -> tuple[Manifest, ...]:
        """Return the manifest `root` and its descendants in the archive; children come before their index."""
        found: dict[Digest, Manifest] = {}
        path = [root]
        while path:
            manifest = self.manifests[path[-1]]
            names = (child.digest for child in manifest.children)
            ahead = [digest for digest in names if digest in self.manifests and digest not in found]
            if ahead:
                path += ahead
            else:
                found[path.pop()] = manifest
        return tuple(found.values())


def narrow(archive: Archive, contents: Contents, platforms: Sequence[Platform]) -> Contents:
    """Return the contents of `archive` for these platforms; of an index, the other images come as metadata. Blocks.

    An image that does not tell its platform is taken.

    Raises:
        ArchiveInvalid: a config cannot be read.
    """
    images: list[NamedImage] = []
    failed: list[LoadResult] = []
    taken: set[Digest] = set()
    left: set[Digest] = set()
    children = {child.digest for manifest in contents.manifests.values() for child in manifest.children}
    for named in contents.images:
        offered = [one for one in _offered(archive, contents, named.manifest) if one.media_type in IMAGES]
        selected, found = chosen(offered, platforms)
        lacking = ", ".join(str(one) for one in platforms if one not in found)
        if selected:
            is_index = contents.manifests[named.manifest].is_list
            in_part = is_index and lacking and all(one.platform for one in selected)
            notes = (f"the archive has no image for {lacking}",) if in_part else ()
            images.append(replace(named, notes=(*named.notes, *notes)))
            taken.update(one.digest for one in selected)
        # An image that has no name but its digest comes with its index.
        elif named.manifest not in children or not isinstance(named.image.reference, Digest):
            there = ", ".join(sorted({one.full_platform for one in offered} - {NO_PLATFORM})) or "none"
            why = f"no image for {lacking}; available: {there}"
            failed.append(LoadResult(str(named.image), LoadStatus.FAILED, why))
        left.update(one.digest for one in offered if one not in selected)
    return replace(
        contents,
        images=tuple(images),
        failed=(*contents.failed, *failed),
        metadata=contents.metadata | (left - taken),
    )


def _offered(archive: Archive, contents: Contents, root: Digest) -> Iterator[Descriptor]:
    """Yield the descriptors of the images below `root` that come with their layers, each with its platform."""
    tree = contents.tree(root)
    if tree[-1].is_list:
        named = (child for one in tree for child in one.children)
        yield from (one for one in named if one.digest in contents.manifests and one.digest not in contents.metadata)
        return
    told = _described(archive, tree[-1], contents.blobs)
    yield Descriptor.parse(told) if told is not None else Descriptor(root, tree[-1].size, tree[-1].media_type)


def _described(archive: Archive, image: Manifest, blobs: Mapping[Digest, Member]) -> Entry | None:
    """Return the descriptor of an image with its platform; None if its config is not in the archive or tells none."""
    if image.config is None or image.config.digest not in blobs:
        return None
    return describe(image, archive.read(blobs[image.config.digest]))


def parse_name(text: object) -> ImageReference | None:
    """Parse an image name as docker and containerd write it; None for a bare tag, an image ID or other text."""
    if not isinstance(text, str) or text.startswith(("sha256:", "sha512:")):
        return None
    name, at, digest = text.partition("@")
    if at:
        # If a name has both a tag and a digest, the digest counts.
        folder, slash, last = name.rpartition("/")
        name = f"{folder}{slash}{last.partition(':')[0]}"
    try:
        return ImageReference.parse(f"{name}{at}{digest}", Upstream(DOCKER_HUB))
    except RegistryError:
        return None


def parse_whole_name(text: object) -> ImageReference | None:
    """Parse an image URL as this program writes it, with the upstream first; None if it is not one."""
    try:
        return ImageReference.parse_whole(str(text))
    except RegistryError:
        return None


def parse_manifest(data: bytes, media_type: str, digest: Digest, member: Member) -> Manifest:
    """Parse the manifest in `data`, the content of `member`.

    Raises:
        ArchiveInvalid: it is not a valid manifest.
    """
    try:
        return Manifest.parse(data, media_type, digest)
    except ManifestInvalid as error:
        raise member.invalid(f"no manifest that can be served: {error}") from None


def gather(
    archive: Archive,
    named: Iterable[NamedImage],
    manifests: Mapping[Digest, Manifest],
    blobs: Mapping[Digest, Member],
    failed: Iterable[LoadResult] = (),
    metadata: Iterable[Digest] = (),
    unnamed: Sequence[UnnamedImage] = (),
) -> Contents:
    """Return the contents of `archive`, after naming images, and resolving names that refer to several manifests.

    The images that are `unnamed` get the name that is given to the archive; without one they fail.
    Of several manifests for one tag, the one that was confirmed last gets it and the others are known only by
    digest; without dates, the name fails, unless they are images for one platform each.

    Raises:
        ArchiveInvalid: there is no image in the archive, or none that the given name is for.
    """
    children = {child.digest for manifest in manifests.values() for child in manifest.children}
    # Programs that list every manifest of a layout, as oras does: the images of an index come with it.
    nameless = [one for one in unnamed if one.tag is not None or one.manifest not in children]
    given = archive.name
    if given is not None and not nameless:
        raise archive.invalid("its images have names of their own: --name is for those without")
    meanings: dict[str, dict[Digest, NamedImage]] = {}
    for one in (*named, *(_name(archive, nameless, given) if given is not None else ())):
        meanings.setdefault(str(one.image), {}).setdefault(one.manifest, one)
    images: dict[str, NamedImage] = {}
    of_platforms: list[NamedImage] = []
    failures = list(failed)
    if given is None:
        failures += [_nameless(archive, one) for one in nameless]
    for name, claims in meanings.items():
        wrong = _contradiction(claims)
        if len(claims) > 1 and wrong and _are_for_platforms(archive, claims.values(), manifests, blobs):
            of_platforms += claims.values()
            continue
        if wrong:
            failures.append(LoadResult(name, LoadStatus.FAILED, wrong))
            continue
        first, *others = sorted(claims.values(), key=_last_confirmed, reverse=True)
        images[name] = first
        for other in others:
            by_digest = replace(other, image=ImageReference(other.image.repository, other.manifest))
            images.setdefault(str(by_digest.image), by_digest)
    all_images = (*images.values(), *of_platforms)
    if not all_images and not failures:
        raise archive.invalid("there is no image in it")
    # An image with a name of its own is loaded with its layers.
    roots = {one.manifest for one in all_images}
    return Contents(all_images, manifests, blobs, tuple(failures), frozenset(metadata) & manifests.keys() - roots)


def _name(archive: Archive, nameless: Sequence[UnnamedImage], given: GivenName) -> Iterator[NamedImage]:
    """Name these images: the one that is tagged, or the only one; others are known by their tags, else by digest.

    Raises:
        ArchiveInvalid: the given name has a tag, or a digest, that several images could have.
    """
    tagged = [one for one in nameless if one.tag is not None] or nameless
    if given.reference is not None and len(tagged) > 1:
        raise archive.invalid(f"{len(tagged)} images in it have no name: give --name without a tag, for all of them")
    for one in nameless:
        alone = tagged == [one]
        reference = (given.reference if alone else None) or one.tag or (USUAL_TAG if alone else one.manifest)
        yield NamedImage(ImageReference(given.repository, reference), one.manifest, notes=one.notes)


def _nameless(archive: Archive, image: UnnamedImage) -> LoadResult:
    told = f"{image.why}: give it its name, such as --name docker.io/library/nginx:1.25"
    return LoadResult(f"{archive.path}: {image.manifest}", LoadStatus.FAILED, told)


def _contradiction(claims: Mapping[Digest, NamedImage]) -> str:
    """Return why the name of these images cannot be used; the empty string if it can."""
    for digest, named in claims.items():
        reference = named.image.reference
        if isinstance(reference, Digest) and reference != digest:
            return f"the archive has {digest} under this name: copy all platforms, or give a tag"
    if len(claims) > 1 and not all(named.dates for named in claims.values()):
        return f"the archive has {len(claims)} images of this name"
    return ""


def _are_for_platforms(
    archive: Archive,
    named: Collection[NamedImage],
    manifests: Mapping[Digest, Manifest],
    blobs: Mapping[Digest, Member],
) -> bool:
    """Tell whether these are images with one tag for one platform each, and no two for the same."""
    if any(isinstance(one.image.reference, Digest) for one in named):
        return False
    entries = [_described(archive, manifests[one.manifest], blobs) for one in named]
    return len({platform_of(entry) for entry in entries if entry is not None}) == len(named)


def _last_confirmed(named: NamedImage) -> tuple[float, Digest]:
    """Return a sort key: the time of confirmation, and the digest to make the order definite."""
    return (named.dates.confirmed.timestamp() if named.dates else 0.0, named.manifest)
