"""Read what skopeo's `dir:` writes: one image or index, without a name.

There is no specification. `version` tells what it is, manifest.json is the manifest itself, `HEX.manifest.json` are
the manifests that an index names, and `HEX` are the blobs.
"""

from __future__ import annotations

from collections.abc import Mapping

from ociregistry.archives.contents import Contents, UnnamedImage, gather, parse_manifest
from ociregistry.archives.members import Archive, Member, parse_json
from ociregistry.manifests import MEDIA_TYPES, OCI_INDEX, OCI_MANIFEST, Manifest
from ociregistry.names import Digest

_VERSION = "version"
_MARK = b"Directory Transport Version:"
_ROOT = "manifest.json"
_WHY = "what skopeo's dir: writes does not say what image it is"


def is_skopeo_dir(archive: Archive) -> bool:
    """Tell whether skopeo's `dir:` wrote `archive`. Blocks.

    Raises:
        ArchiveInvalid: it cannot be read.
    """
    version = archive.members.get(_VERSION)
    return version is not None and _ROOT in archive.members and archive.read(version).startswith(_MARK)


def read_skopeo_dir(archive: Archive) -> Contents:
    """Read the contents of `archive`. Blocks.

    Raises:
        ArchiveInvalid: it cannot be read, or is damaged.
    """
    data = archive.read(archive.members[_ROOT])
    root = parse_manifest(data, _media_type(data, archive.members[_ROOT]), Digest.of(data), archive.members[_ROOT])
    manifests = {root.digest: root, **_children(archive, root)}
    blobs = {digest: member for name, member in archive.members.items() if (digest := Digest.from_hex(name))}
    return gather(archive, (), manifests, blobs, unnamed=[UnnamedImage(root.digest, _WHY)])


def _children(archive: Archive, root: Manifest) -> Mapping[Digest, Manifest]:
    """Return the manifests that the index `root` names and that are in the archive."""
    found = {}
    for child in root.children:
        member = archive.members.get(f"{child.digest.hex}.manifest.json")
        if member is not None and child.media_type in MEDIA_TYPES:
            found[child.digest] = parse_manifest(archive.read(member), child.media_type, child.digest, member)
    return found


def _media_type(data: bytes, member: Member) -> str:
    document = parse_json(data, member)
    if not isinstance(document, dict):
        raise member.invalid("it is not a manifest")
    # Manifests of OCI need not tell their type.
    return str(document.get("mediaType") or (OCI_INDEX if "manifests" in document else OCI_MANIFEST))
