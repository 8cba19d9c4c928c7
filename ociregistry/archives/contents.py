"""What an archive holds, whatever its format: images by their names, manifests, and where the blobs are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from ociregistry.archives.members import Archive, Member
from ociregistry.errors import RegistryError
from ociregistry.manifests import Descriptor, Manifest, ManifestInvalid
from ociregistry.names import DOCKER_HUB, Digest, ImageReference, Upstream
from ociregistry.pullthrough.loader import LoadStatus, Outcome
from ociregistry.store.records import Dates


@dataclass(frozen=True, slots=True)
class NamedImage:
    """An image name of an archive, and the manifest that it means there."""

    image: ImageReference
    manifest: Digest
    dates: Dates | None = None
    """As the archive tells them; None: nothing is known."""
    notes: tuple[str, ...] = ()
    """What the operator should know of it."""


@dataclass(frozen=True, slots=True)
class Contents:
    """All that can be loaded from an archive, and in `failed` what cannot be, with the reasons."""

    images: tuple[NamedImage, ...]
    manifests: Mapping[Digest, Manifest]
    blobs: Mapping[Digest, Member]
    """Where each blob is; nobody has looked yet whether its bytes have that digest."""
    failed: tuple[Outcome, ...] = ()
    metadata: frozenset[Digest] = frozenset()
    """The images of an index that come without their layers."""

    def needed(self, manifest: Manifest) -> Sequence[Descriptor]:
        """Return the blobs that belong to a manifest here: of an image that comes as metadata, its config."""
        return manifest.blobs[:1] if manifest.digest in self.metadata else manifest.blobs

    def tree(self, root: Digest) -> tuple[Manifest, ...]:
        """The manifest `root` and those that it leads to, as far as they are here; each comes after what it names."""
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


def parse_name(text: object) -> ImageReference | None:
    """The image that docker and containerd call so; None when it is no whole name, but a tag or an image's id."""
    if not isinstance(text, str) or text.startswith(("sha256:", "sha512:")):
        return None
    name, at, digest = text.partition("@")
    if at:
        # Where a name has both a tag and a digest, the digest says what it means.
        folder, slash, last = name.rpartition("/")
        name = f"{folder}{slash}{last.partition(':')[0]}"
    try:
        return ImageReference.parse(f"{name}{at}{digest}", Upstream(DOCKER_HUB))
    except RegistryError:
        return None


def parse_whole_name(text: object) -> ImageReference | None:
    """The image that we call so ourselves; None when it is no image URL."""
    try:
        return ImageReference.parse_whole(str(text))
    except RegistryError:
        return None


def parse_manifest(data: bytes, media_type: str, digest: Digest, member: Member) -> Manifest:
    """The manifest in `data`, which is from `member`; raises `ArchiveInvalid`."""
    try:
        return Manifest.parse(data, media_type, digest)
    except ManifestInvalid as error:
        raise member.invalid(f"no manifest that can be served: {error}") from None


def gather(
    archive: Archive,
    named: Iterable[NamedImage],
    manifests: Mapping[Digest, Manifest],
    blobs: Mapping[Digest, Member],
    failed: Iterable[Outcome] = (),
    metadata: Iterable[Digest] = (),
) -> Contents:
    """The contents of `archive`, after a look at what each name means there.

    Where a tag means two manifests, the one that was confirmed last has it and the other keeps its digest alone;
    where no dates tell, the name has failed. Raises `ArchiveInvalid` when there is nothing at all.
    """
    meanings: dict[str, dict[Digest, NamedImage]] = {}
    for one in named:
        meanings.setdefault(str(one.image), {}).setdefault(one.manifest, one)
    images: dict[str, NamedImage] = {}
    failures = list(failed)
    for name, claims in meanings.items():
        wrong = _contradiction(claims)
        if wrong:
            failures.append(Outcome(name, LoadStatus.FAILED, wrong))
            continue
        first, *others = sorted(claims.values(), key=_last_confirmed, reverse=True)
        images[name] = first
        for other in others:
            by_digest = replace(other, image=ImageReference(other.image.repository, other.manifest))
            images.setdefault(str(by_digest.image), by_digest)
    if not images and not failures:
        raise archive.invalid("there is no image in it")
    # What has a name of its own is more than a part of an index.
    roots = {one.manifest for one in images.values()}
    return Contents(
        tuple(images.values()), manifests, blobs, tuple(failures), frozenset(metadata) & manifests.keys() - roots
    )


def _contradiction(claims: Mapping[Digest, NamedImage]) -> str:
    """Why the name of these images cannot be used, if so."""
    for digest, named in claims.items():
        reference = named.image.reference
        if isinstance(reference, Digest) and reference != digest:
            return (
                f"what has this name in the archive is {digest}: all platforms are to be copied, or a tag to be given"
            )
    if len(claims) > 1 and not all(named.dates for named in claims.values()):
        return f"the archive has {len(claims)} images of this name"
    return ""


def _last_confirmed(named: NamedImage) -> tuple[float, Digest]:
    return (named.dates.confirmed.timestamp() if named.dates else 0.0, named.manifest)
