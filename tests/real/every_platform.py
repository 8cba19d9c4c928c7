"""Clients that read the metadata of every platform of an index: their requests, and the resulting store.

Recorded on loopback from containerd 2.4.2, for an index with four platforms and two BuildKit attestations:

- `ctr images pull`, with and without `--platform`: HEAD of the tag, GET of the index by digest, then the manifests of
  all its children, attestations included, then the configs of all of them, then the layers of one platform. The order
  of the requests within each of these steps differs between runs; at most three run at once, and each step ends
  before the next begins.
- CRI's PullImage, which kubelets use (and `ctr images pull --skip-metadata`): HEAD of the tag, GET of the index, then
  manifest, config and layers of one platform alone.

Neither requests `/v2/`, nor a layer that it has already. A Range is sent only where containerd is configured with
`concurrent_layer_fetch_buffer`: then every GET, of manifests and configs too, has `bytes=0-` and is answered by 206.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from tests.client import fetch
from tests.images import (
    DOCKER_LIST,
    DOCKER_MANIFEST,
    OCI_INDEX,
    OCI_MANIFEST,
    Blob,
    Image,
    Index,
    Manifest,
    index_of,
    make_attestation,
    make_image,
)
from tests.processes import Daemon, wait_until
from tests.real.caches import Cache
from tests.real.completions import completing_in
from tests.real.shells import blobs_in, records_in

REPOSITORY = "team/app"
TAG = "v1"
AMD64, ARM64, ARM, S390X = "linux/amd64", "linux/arm64", "linux/arm/v7", "linux/s390x"
ARCHITECTURE = ("--arch", "amd64", "--os", "linux")
"""The machine's platform for the daemon, independent of where the test runs."""
LAYER = 200_000
"""Bytes of each layer."""
DECIDED = 90.0
"""Seconds until the wanted platforms are decided: the daemon waits for 30 s without requests."""

_AT_ONCE = 3
_RESOLVING = {
    "User-Agent": "containerd/2.4.2",
    "Accept": ", ".join((DOCKER_MANIFEST, DOCKER_LIST, OCI_MANIFEST, OCI_INDEX, "*/*")),
}
_UNDECIDED = ("incomplete_images", "missing_bytes", "pending_images", "incomplete_indexes")


def four_platforms(seed: str) -> Index:
    """Make an index with images for four platforms, two layers each, and attestations of two of them.

    amd64 and arm64 share their first layer; every other layer belongs to one image alone.
    """
    base = make_image(f"{seed}/base", layers=1, layer_size=LAYER)
    images = [
        make_image(f"{seed}/{platform}", layers=1, layer_size=LAYER, platform=platform, base=base)
        for platform in (AMD64, ARM64)
    ]
    images += [
        make_image(f"{seed}/{platform}", layers=2, layer_size=LAYER, platform=platform) for platform in (ARM, S390X)
    ]
    attested = {image.manifest.digest: make_attestation(f"{seed}/{image.platform}") for image in images[:2]}
    return index_of(images, attested)


@contextmanager
def cache_with(index: Index, folder: Path, settings: Mapping[str, object] | None = None) -> Iterator[Cache]:
    """Run a daemon that completes images, and its upstream with the index at `TAG`, until the block ends.

    `settings` are further keys of the daemon's configuration file.
    """
    with completing_in(folder, *ARCHITECTURE, settings=settings) as cache:
        cache.upstream.add(REPOSITORY, index, TAG)
        yield cache


def image_for(index: Index, platform: str) -> Image:
    """Return the image of this platform."""
    (image,) = (image for image in index.images if image.platform == platform)
    return image


def own_layer(index: Index, platform: str) -> Blob:
    """Return the upper layer of this platform, which no other platform has."""
    return image_for(index, platform).layers[-1]


def shared_layer(index: Index) -> Blob:
    """Return the layer that amd64 and arm64 share."""
    lower, _ = image_for(index, AMD64).layers
    assert lower in image_for(index, ARM64).layers
    return lower


def configs(index: Index) -> tuple[Blob, ...]:
    """Return the configs of all children."""
    return tuple(image.config for image in index.images)


def metadata_size(index: Index) -> int:
    """Return the bytes of the index, and of the manifests and configs of all its children."""
    manifests = sum(len(manifest.data) for manifest in index.manifests)
    return manifests + sum(len(config.data) for config in configs(index))


def ctr_pull(cache: Cache, index: Index, platform: str = AMD64, *, layers: bool = True, ranged: bool = False) -> None:
    """Pull as `ctr images pull` 2.x does; without `layers` as when containerd has the layers already.

    With `ranged`, pull as with `concurrent_layer_fetch_buffer`. Every answer must be correct.
    """
    _resolve(cache, index, ranged=ranged)
    _get_all(cache, "manifests", [image.manifest for image in index.images], ranged=ranged)
    _get_all(cache, "blobs", configs(index), ranged=ranged)
    if layers:
        _get_all(cache, "blobs", image_for(index, platform).layers, ranged=ranged)


def kubelet_pull(cache: Cache, index: Index, platform: str = AMD64, *, layers: bool = True) -> None:
    """Pull as a kubelet does by CRI; without `layers` as when containerd has the layers already.

    Every answer must be correct.
    """
    image = image_for(index, platform)
    _resolve(cache, index)
    _get_all(cache, "manifests", [image.manifest])
    _get_all(cache, "blobs", [image.config])
    if layers:
        _get_all(cache, "blobs", image.layers)


def get(cache: Cache, *blobs: Blob, ranged: bool = False) -> None:
    """GET these blobs, as part of a pull; every answer must be correct."""
    _get_all(cache, "blobs", blobs, ranged=ranged)


def _resolve(cache: Cache, index: Index, *, ranged: bool = False) -> None:
    answer = cache.ask(f"{REPOSITORY}/manifests/{TAG}", "HEAD", _RESOLVING)
    assert answer.status == 200, cache.daemon.log
    assert answer.headers["Docker-Content-Digest"] == index.manifest.digest
    assert answer.headers["Content-Length"] == str(len(index.manifest.data))
    _get_all(cache, "manifests", [index.manifest], ranged=ranged)


def _get_all(cache: Cache, kind: str, wanted: Sequence[Blob | Manifest], *, ranged: bool = False) -> None:
    def ask(one: Blob | Manifest) -> tuple[int, bool]:
        headers = {
            "User-Agent": _RESOLVING["User-Agent"],
            "Accept": f"{one.media_type}, */*",
            "Accept-Encoding": "zstd;q=1.0, gzip;q=0.8, deflate;q=0.5",
            **({"Range": "bytes=0-"} if ranged else {}),
        }
        answer = cache.ask(f"{REPOSITORY}/{kind}/{one.digest}", headers=headers)
        return answer.status, answer.body == one.data

    with ThreadPoolExecutor(_AT_ONCE) as requests:
        for one, answer in zip(wanted, requests.map(ask, wanted), strict=True):
            assert answer == (206 if ranged else 200, True), f"{kind}/{one.digest}: {answer}\n{cache.daemon.log}"


def health(daemon: Daemon) -> dict[str, int]:
    """Return the counts of incomplete images and indexes in GET /health."""
    told = json.loads(fetch(f"{daemon.url}/health").body)
    return {key: told[key] for key in _UNDECIDED}


def wait_stored_platforms(daemon: Daemon, index: Index, *platforms: str, timeout: float = DECIDED) -> None:
    """Return when the metadata of all children and the layers of these platforms are stored, with none to fetch.

    No layer of another platform may be stored, and the records must state which images were wanted.
    """
    wanted = {image_for(index, platform).manifest.digest for platform in platforms}
    manifests = {manifest.digest for manifest in index.manifests}
    layers = {layer.digest for platform in platforms for layer in image_for(index, platform).layers}
    blobs = layers | {config.digest for config in configs(index)}
    root = daemon.image_path
    wait_until(lambda: manifests <= records_in(root), timeout, "all manifests in the store")
    wait_until(lambda: blobs <= blobs_in(root), timeout, f"all configs, and the layers of {platforms}")
    wait_until(lambda: not any(health(daemon).values()), timeout, "nothing is incomplete or undecided")
    assert records_in(root) == manifests, records_in(root) ^ manifests
    assert blobs_in(root) == blobs, blobs_in(root) ^ blobs
    assert wanted_in(daemon) == wanted, wanted_in(daemon)


def wanted_in(daemon: Daemon) -> set[str]:
    """Return the digests of the stored images that are wanted; records of older versions do not state it."""
    records = [json.loads(path.read_text()) for path in (daemon.image_path / "img").iterdir()]
    return {record["digest"] for record in records if record.get("wanted", True)}


def link_bytes(cache: Cache) -> int:
    """Return how many bytes of bodies the upstream has sent."""
    return sum(request.sent for request in cache.upstream.requests)


def assert_fetched_once(cache: Cache) -> None:
    """Assert that no manifest and no blob came from the upstream twice; errors do not count."""
    sent = Counter(one.path for one in cache.upstream.requests if one.sent)
    twice = [path for path, count in sent.items() if count > 1]
    assert twice == [], f"{twice}\n{cache.daemon.log}"


def write_store_of_older_version(daemon: Daemon, host: str, index: Index, platform: str) -> None:
    """Write the store of an older version: one platform of the index alone, and records without that information.

    `host` is the upstream's name. The daemon must not run.
    """
    root = daemon.image_path
    image = image_for(index, platform)
    for folder in ("fat", "img", "blobs"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    name = f"{host}/{REPOSITORY}"
    records = {
        "fat": (index.manifest, f"{name}:{TAG}"),
        "img": (image.manifest, f"{name}@{image.manifest.digest}"),
    }
    now = datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
    for folder, (manifest, url) in records.items():
        document = {
            "digest": manifest.digest,
            "mediaType": manifest.media_type,
            "images": {url: {"created": now, "confirmed": now}},
            "manifest": manifest.data.decode(),
        }
        path = root / folder / manifest.digest.partition(":")[2]
        path.write_bytes(json.dumps(document, indent=2).encode() + b"\n")
    for blob in image.blobs:
        (root / "blobs" / blob.digest.partition(":")[2]).write_bytes(blob.data)
