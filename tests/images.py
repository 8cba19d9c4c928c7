"""Container images built in memory: one seed always gives the same bytes, two seeds share none."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import random
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

MIB = 1024 * 1024

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
OCI_LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"
OCI_EMPTY = "application/vnd.oci.empty.v1+json"
IN_TOTO = "application/vnd.in-toto+json"
UNKNOWN_PLATFORM = "unknown/unknown"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
DOCKER_LAYER = "application/vnd.docker.image.rootfs.diff.tar.gzip"


@dataclass(frozen=True)
class Blob:
    """A config or a layer."""

    digest: str
    data: bytes = field(repr=False)
    media_type: str


@dataclass(frozen=True)
class Manifest:
    """The exact bytes of a manifest or an index."""

    digest: str
    data: bytes = field(repr=False)
    media_type: str


@dataclass(frozen=True)
class Image:
    """The image of one platform: its first blob is the config, its layers follow."""

    manifest: Manifest
    blobs: tuple[Blob, ...]
    platform: str

    @property
    def manifests(self) -> tuple[Manifest, ...]:
        """Return what to push, in an order that a registry accepts."""
        return (self.manifest,)

    @property
    def config(self) -> Blob:
        """The config blob."""
        return self.blobs[0]

    @property
    def layers(self) -> tuple[Blob, ...]:
        """The layer blobs, bottom first."""
        return self.blobs[1:]


@dataclass(frozen=True)
class Index:
    """An OCI index or a Docker manifest list over images of several platforms."""

    manifest: Manifest
    images: tuple[Image, ...]

    @property
    def manifests(self) -> tuple[Manifest, ...]:
        """Return what to push, in an order that a registry accepts: the index last."""
        return (*(image.manifest for image in self.images), self.manifest)

    @property
    def blobs(self) -> tuple[Blob, ...]:
        """The distinct blobs of all images."""
        return tuple({blob.digest: blob for image in self.images for blob in image.blobs}.values())

    def without(self, *platforms: str) -> tuple[Image, ...]:
        """Return the images of the other platforms, of which a store keeps manifests and configs."""
        return tuple(image for image in self.images if image.platform not in platforms)


def make_image(
    seed: object,
    *,
    docker: bool = False,
    layers: int = 2,
    layer_size: int = 1000,
    platform: str = "linux/amd64",
    base: Image | None = None,
) -> Image:
    """Make an image that containerd can unpack; each layer holds one file of `layer_size` bytes.

    With `base` its layers come first, so that both images share them.
    """
    made = [_layer(f"{seed}/{number}", layer_size, docker) for number in range(layers)]
    diff_ids = [*_diff_ids(base), *(diff_id for _, diff_id in made)]
    blobs = (*(base.layers if base else ()), *(layer for layer, _ in made))
    config = {
        **_platform(platform),
        "created": "2026-01-01T00:00:00Z",
        "config": {"Cmd": ["/layer"], "Labels": {"seed": str(seed)}},
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
        "history": [{"created": "2026-01-01T00:00:00Z", "created_by": f"layer {blob.digest}"} for blob in blobs],
    }
    return _image(_blob(_json(config), DOCKER_CONFIG if docker else OCI_CONFIG), blobs, platform, docker)


def image_of_files(
    files: Mapping[str, bytes | str], command: Sequence[str], *, platform: str = "linux/amd64"
) -> Image:
    """Make an image of one layer that can run: programs by path, and symbolic links with their targets as text."""
    unpacked = io.BytesIO()
    with tarfile.open(fileobj=unpacked, mode="w") as archive:
        for path, content in files.items():
            entry = tarfile.TarInfo(path)
            entry.mode = 0o755
            if isinstance(content, str):
                entry.type, entry.linkname = tarfile.SYMTYPE, content
                archive.addfile(entry)
            else:
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
    layer = _blob(gzip.compress(unpacked.getbuffer(), mtime=0), OCI_LAYER)
    rootfs = {"type": "layers", "diff_ids": [digest_of(unpacked.getbuffer())]}
    config = {**_platform(platform), "config": {"Cmd": [*command], "Env": ["PATH=/bin"]}, "rootfs": rootfs}
    return _image(_blob(_json(config), OCI_CONFIG), (layer,), platform, docker=False)


def make_index(
    seed: object,
    *,
    platforms: Sequence[str] = ("linux/amd64", "linux/arm64"),
    docker: bool = False,
    layers: int = 2,
    layer_size: int = 1000,
) -> Index:
    """Make an OCI index, or a Docker manifest list, with a separate image for each platform."""
    images = [
        make_image(f"{seed}/{name}", docker=docker, layers=layers, layer_size=layer_size, platform=name)
        for name in platforms
    ]
    return index_of(images, docker=docker)


def index_of(
    images: Sequence[Image], attestations: Mapping[str, Image] | None = None, *, docker: bool = False
) -> Index:
    """Make an index of these images, followed by the attestations, keyed by the digest of the image described."""
    entries = [{**_descriptor(image.manifest), "platform": _platform(image.platform)} for image in images]
    for digest, attestation in (attestations or {}).items():
        annotations = {"vnd.docker.reference.digest": digest, "vnd.docker.reference.type": "attestation-manifest"}
        platform = _platform(attestation.platform)
        entries.append({**_descriptor(attestation.manifest), "platform": platform, "annotations": annotations})
    media_type = DOCKER_LIST if docker else OCI_INDEX
    return Index(_manifest({"manifests": entries}, media_type), (*images, *(attestations or {}).values()))


def make_attestation(seed: object, *, size: int = 3000) -> Image:
    """Make an attestation as BuildKit attaches it to an index: one layer of about `size` bytes of JSON."""
    statement = {"_type": "https://in-toto.io/Statement/v0.1", "predicate": {"seed": str(seed), "pad": "x" * size}}
    layer = _blob(_json(statement), IN_TOTO)
    config = {**_platform(UNKNOWN_PLATFORM), "config": {}, "rootfs": {"type": "layers", "diff_ids": [layer.digest]}}
    return _image(_blob(_json(config), OCI_CONFIG), (layer,), UNKNOWN_PLATFORM, docker=False)


def make_artifact(seed: object, subject: Manifest, *, artifact_type: str = "application/vnd.example.sbom") -> Image:
    """Make a small artifact, such as a signature, that refers to `subject`; the referrers API lists it."""
    blob = _blob(f"{seed}".encode(), artifact_type)
    extra = {"artifactType": artifact_type, "subject": _descriptor(subject)}
    return _image(_blob(b"{}", OCI_EMPTY), (blob,), "", docker=False, extra=extra)


def random_bytes(seed: object, size: int) -> Iterator[bytes]:
    """Yield `size` incompressible bytes, determined by the seed, in pieces of at most a MiB."""
    source = random.Random(str(seed))
    for start in range(0, size, MIB):
        yield source.randbytes(min(MIB, size - start))


def digest_of(data: bytes | memoryview) -> str:
    """Return the sha256 digest of `data` as registries write it."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def _image(
    config: Blob,
    layers: Sequence[Blob],
    platform: str,
    docker: bool,
    extra: Mapping[str, object] | None = None,
) -> Image:
    body = {
        "config": _descriptor(config),
        "layers": [_descriptor(layer) for layer in layers],
        **(extra or {}),
    }
    manifest = _manifest(body, DOCKER_MANIFEST if docker else OCI_MANIFEST)
    return Image(manifest, (config, *layers), platform)


def _layer(seed: str, size: int, docker: bool) -> tuple[Blob, str]:
    """Return a layer, and the digest of its uncompressed content."""
    unpacked = io.BytesIO()
    with tarfile.open(fileobj=unpacked, mode="w") as archive:
        entry = tarfile.TarInfo(f"layer-{hashlib.sha256(seed.encode()).hexdigest()[:12]}")
        entry.size = size
        entry.mode = 0o644
        archive.addfile(entry, io.BytesIO(b"".join(random_bytes(seed, size))))
    # Level 0 only stores: random bytes would not shrink, and a layer of 200 MB takes a second.
    packed = gzip.compress(unpacked.getbuffer(), compresslevel=0, mtime=0)
    return _blob(packed, DOCKER_LAYER if docker else OCI_LAYER), digest_of(unpacked.getbuffer())


def _diff_ids(base: Image | None) -> list[str]:
    return list(json.loads(base.config.data)["rootfs"]["diff_ids"]) if base else []


def _platform(platform: str) -> dict[str, str]:
    """The keys of a platform such as `linux/arm/v7`, or `windows(10.0.17763.6893)/amd64` with `os.version`."""
    os, _, rest = platform.partition("/")
    os, _, version = os.rstrip(")").partition("(")
    keys = zip(("architecture", "variant"), filter(None, rest.split("/")), strict=False)
    return {"os": os, **({"os.version": version} if version else {}), **dict(keys)}


def _manifest(body: Mapping[str, object], media_type: str) -> Manifest:
    data = _json({"schemaVersion": 2, "mediaType": media_type, **body})
    return Manifest(digest_of(data), data, media_type)


def _blob(data: bytes, media_type: str) -> Blob:
    return Blob(digest_of(data), data, media_type)


def _descriptor(what: Blob | Manifest) -> dict[str, object]:
    return {"mediaType": what.media_type, "digest": what.digest, "size": len(what.data)}


def _json(value: object) -> bytes:
    return json.dumps(value, indent=2).encode()
