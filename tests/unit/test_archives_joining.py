"""Archives for one platform each, under one name: the name means an index of them, which is made here."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from itertools import permutations
from pathlib import Path

import pytest

from ociregistry.archives.joining import Entry, describe, is_for_one_platform, join, platform_of
from ociregistry.manifests import OCI_INDEX, Manifest
from ociregistry.names import Digest
from ociregistry.pullthrough.loader import LoadResult, LoadStatus
from ociregistry.store.records import Dates
from ociregistry.store.snapshot import Snapshot
from ociregistry.store.store import Store
from tests.images import Image, Index, index_of, make_artifact, make_attestation, make_image
from tests.unit.support.archives import NAME, docker_saved, layout, load, named, write_tar
from tests.unit.support.common import image, manifest, on_reactor
from tests.unit.support.exports import DATES, export

AMD64, ARM64, ARMV7 = (
    make_image(f"joined {name}", platform=f"linux/{name}") for name in ("amd64", "arm64", "arm/v7")
)
NEWER = make_image("newer", platform="linux/amd64")
KINDS = ("layout", "docker save")


def archive(folder: Path, one: Image | Index, kind: str = "layout", name: str = NAME) -> Path:
    """Write an archive of one image under this name."""
    path = folder / f"{one.manifest.digest.removeprefix('sha256:')[:20]}.tar"
    if isinstance(one, Image) and kind == "docker save":
        return write_tar(path, docker_saved(one, name))
    return write_tar(path, named(one, name))


async def loaded(store: Store, folder: Path, *images: Image | Index, kind: str = "layout") -> LoadResult:
    """Load these images one after the other; return the outcome of the last."""
    outcomes = [outcome for one in images for outcome in await load(store, archive(folder, one, kind))]
    return outcomes[-1]


async def meaning(store: Store) -> Manifest:
    """Return what the name means."""
    found = await store.manifest(image(NAME))
    assert found is not None
    return found


def platforms(index: Manifest) -> dict[str, Digest]:
    """Return the images of an index by their platforms."""
    return {child.platform: child.digest for child in index.children}


def digests(*images: Image) -> list[str]:
    """Return their digests."""
    return [one.manifest.digest for one in images]


@pytest.mark.parametrize("kind", KINDS)
@on_reactor
async def test_two_platforms_become_an_index(store: Store, root: Path, tmp_path: Path, kind: str) -> None:
    """As k3s and others ship them: one file for each platform, with the same names in all."""
    first = await loaded(store, tmp_path, AMD64, kind=kind)
    single = await meaning(store)
    second = await loaded(store, tmp_path, ARM64, kind=kind)
    assert (first.ended, second.ended) == (LoadStatus.LOADED, LoadStatus.LOADED)
    assert second.notes[-1] == (
        "the name means an index of linux/amd64, linux/arm64, made here: it is not the registry's"
    )
    index = await meaning(store)
    assert index.media_type == OCI_INDEX
    assert platforms(index).keys() == {"linux/amd64", "linux/arm64"}
    assert platforms(index)["linux/amd64"] == single.digest
    for child in index.children:
        assert await store.missing(child.digest) == {}
    for one in (AMD64, ARM64):
        (again,) = await load(store, archive(tmp_path, one, kind))
        assert again.ended is LoadStatus.PRESENT
        assert not any("index" in note or "replaces" in note for note in again.notes)
    assert await meaning(store) == index
    (row,) = (row for row in Snapshot.read(root).rows if row.has_tag)
    assert (row.url, row.stored.manifest.digest) == (NAME, index.digest)


@on_reactor
async def test_index_does_not_depend_on_the_order(store: Store, tmp_path: Path) -> None:
    made = set()
    for number, order in enumerate(permutations((AMD64, ARM64, ARMV7))):
        name = f"docker.io/library/app:{number}"
        for one in order:
            await load(store, archive(tmp_path, one, name=name))
        found = await store.manifest(image(name))
        assert found is not None
        made.add(found.data)
    assert [json.loads(data) for data in made] == [
        {
            "schemaVersion": 2,
            "mediaType": OCI_INDEX,
            "manifests": [
                {
                    "mediaType": one.manifest.media_type,
                    "digest": one.manifest.digest,
                    "size": len(one.manifest.data),
                    "platform": platform,
                }
                for one, platform in (
                    (AMD64, {"os": "linux", "architecture": "amd64"}),
                    (ARMV7, {"os": "linux", "architecture": "arm", "variant": "v7"}),
                    (ARM64, {"os": "linux", "architecture": "arm64"}),
                )
            ],
        }
    ]


@on_reactor
async def test_same_platform_is_replaced(store: Store, tmp_path: Path) -> None:
    note = f"it replaces {AMD64.manifest.digest} for linux/amd64"
    outcome = await loaded(store, tmp_path, AMD64, NEWER)
    assert outcome.notes == (note,)
    assert await meaning(store) == manifest(NEWER)
    outcome = await loaded(store, tmp_path, ARM64, AMD64, NEWER)
    assert outcome.notes == (
        note,
        "the name means an index of linux/amd64, linux/arm64, made here: it is not the registry's",
    )
    assert platforms(await meaning(store)) == {
        "linux/amd64": NEWER.manifest.digest,
        "linux/arm64": ARM64.manifest.digest,
    }


@on_reactor
async def test_registry_index_keeps_its_other_platforms(store: Store, tmp_path: Path) -> None:
    """What is said about the image that is replaced goes with it."""
    attested = {one.manifest.digest: make_attestation(one.platform) for one in (AMD64, ARM64)}
    index = index_of([AMD64, ARM64], attested)
    outcome = await loaded(store, tmp_path, index, AMD64)
    assert (outcome.ended, outcome.notes) == (LoadStatus.PRESENT, ())
    assert await meaning(store) == manifest(index)
    outcome = await loaded(store, tmp_path, NEWER)
    assert outcome.notes[0] == f"it replaces {AMD64.manifest.digest} for linux/amd64"
    made = await meaning(store)
    kept = digests(NEWER, ARM64, attested[ARM64.manifest.digest])
    assert [child.digest for child in made.children] == kept
    document = json.loads(made.data)
    assert document["manifests"][2]["annotations"]["vnd.docker.reference.digest"] == ARM64.manifest.digest


@on_reactor
async def test_index_of_that_platform_alone_is_replaced(store: Store, tmp_path: Path) -> None:
    attested = {AMD64.manifest.digest: make_attestation("amd64")}
    outcome = await loaded(store, tmp_path, index_of([AMD64], attested), NEWER)
    assert outcome.notes == (f"it replaces {AMD64.manifest.digest} for linux/amd64",)
    assert await meaning(store) == manifest(NEWER)


@on_reactor
async def test_index_in_the_archive_takes_the_name(store: Store, tmp_path: Path) -> None:
    index = index_of([NEWER, ARMV7])
    outcome = await loaded(store, tmp_path, AMD64, ARM64, index)
    assert outcome.notes == ()
    assert await meaning(store) == manifest(index)


@on_reactor
async def test_indexes_for_one_platform_each_are_joined(store: Store, root: Path, tmp_path: Path) -> None:
    """As `docker buildx build --output type=oci` writes them, with an attestation beside each image."""
    attested = {one.manifest.digest: make_attestation(one.platform) for one in (AMD64, ARM64)}
    parts = [index_of([one], {one.manifest.digest: attested[one.manifest.digest]}) for one in (AMD64, ARM64)]
    outcome = await loaded(store, tmp_path, *parts)
    assert outcome.notes == (
        "the name means an index of linux/amd64, linux/arm64, made here: it is not the registry's",
    )
    made = await meaning(store)
    named_there = {*digests(AMD64, ARM64), *digests(*attested.values())}
    assert {child.digest for child in made.children} == named_there
    for child in made.children:
        assert await store.missing(child.digest) == {}
    for part in parts:
        outcome = await loaded(store, tmp_path, part)
        assert (outcome.ended, outcome.notes) == (LoadStatus.PRESENT, ())
        assert await meaning(store) == made
    assert export(root, tmp_path / "out.tar", "nginx:").left_out == ()
    outcome = await loaded(store, tmp_path, NEWER, index_of([AMD64], {AMD64.manifest.digest: make_attestation("y")}))
    assert outcome.notes[0] == f"it replaces {NEWER.manifest.digest} for linux/amd64"


@on_reactor
async def test_image_without_platform_takes_the_name(store: Store, tmp_path: Path) -> None:
    """An artifact has no config that tells one."""
    chart = make_artifact("chart", AMD64.manifest)
    outcome = await loaded(store, tmp_path, AMD64, chart)
    assert outcome.notes == (f"it takes the name from {AMD64.manifest.digest}",)
    assert await meaning(store) == manifest(chart)
    outcome = await loaded(store, tmp_path, AMD64)
    assert outcome.notes == (f"it takes the name from {chart.manifest.digest}",)


@on_reactor
async def test_no_index_for_names_by_digest_or_with_dates(store: Store, tmp_path: Path) -> None:
    """With dates, the archive tells what the name meant in a registry."""
    await loaded(store, tmp_path, AMD64)
    by_digest = f"docker.io/library/nginx@{ARM64.manifest.digest}"
    (outcome,) = await load(store, archive(tmp_path, ARM64, name=by_digest))
    assert outcome.notes == ()
    dated = {
        "io.containerd.image.name": NAME,
        "ociregistry.created": "2026-01-01T00:00:00Z",
        "ociregistry.confirmed": (datetime.now(UTC) + timedelta(minutes=1)).isoformat(),
    }
    (outcome,) = await load(store, write_tar(tmp_path / "dated.tar", layout((ARM64, dated))))
    assert outcome.notes == ()
    assert await meaning(store) == manifest(ARM64)


@on_reactor
async def test_two_platforms_in_one_archive(store: Store, tmp_path: Path) -> None:
    annotations = {"io.containerd.image.name": NAME}
    files = layout((ARM64, annotations), (AMD64, annotations))
    outcomes = await load(store, write_tar(tmp_path / "a.tar", files))
    assert [outcome.ended for outcome in outcomes] == [LoadStatus.LOADED] * 2
    assert platforms(await meaning(store)).keys() == {"linux/amd64", "linux/arm64"}
    files = layout((NEWER, annotations), (AMD64, annotations))
    (failed,) = await load(store, write_tar(tmp_path / "b.tar", files))
    assert failed == LoadResult(NAME, LoadStatus.FAILED, "the archive has 2 images of this name")


@on_reactor
async def test_made_index_is_exported(store: Store, root: Path, tmp_path: Path) -> None:
    """An export has the index and both images."""
    await loaded(store, tmp_path, AMD64, ARM64)
    exported = export(root, tmp_path / "out.tar", "nginx:")
    assert (exported.images, exported.blobs, exported.left_out) == (1, 6, ())
    index = await meaning(store)
    await store.keep(manifest(NEWER), image(NAME), Dates(DATES.created, DATES.created))
    (outcome,) = await load(store, tmp_path / "out.tar")
    assert outcome.ended is LoadStatus.PRESENT
    assert await meaning(store) == index


# The parts


@pytest.mark.parametrize("config", [b"", b"{", b"[]", b"null", b"{}", b'{"os": "linux"}', b"[" * 100_000])
def test_config_without_platform(config: bytes) -> None:
    assert describe(manifest(AMD64), config) is None


def entry(number: int, **platform: object) -> Entry:
    """Return an entry of an index."""
    return {"mediaType": OCI_INDEX, "digest": Digest.of(str(number).encode()), "size": number, "platform": platform}


@pytest.mark.parametrize(
    ("before", "after", "same"),
    [
        ({"os": "linux", "architecture": "x86_64"}, {"os": "linux", "architecture": "amd64"}, True),
        ({"os": "linux", "architecture": "arm"}, {"os": "linux", "architecture": "arm", "variant": "v7"}, True),
        ({"os": "linux", "architecture": "arm"}, {"os": "linux", "architecture": "arm", "variant": "v6"}, False),
        (
            {"os": "windows", "architecture": "amd64", "os.version": "10.0.17763.1"},
            {"os": "windows", "architecture": "amd64", "os.version": "10.0.20348.1"},
            False,
        ),
    ],
)
def test_platforms_are_compared_normalized(before: dict[str, object], after: dict[str, object], same: bool) -> None:
    joined = join([entry(1, **before)], [entry(2, **after)])
    assert len(joined.entries) == (1 if same else 2)
    assert joined.replaced.keys() == ({Digest.of(b"1")} if same else set())


def test_null_annotations() -> None:
    plain = {**entry(1, os="linux", architecture="arm64"), "annotations": None}
    assert join([plain], [entry(2, os="linux", architecture="amd64")]).platforms == ["linux/amd64", "linux/arm64"]
    assert platform_of(plain) == "linux/arm64"


def test_version_of_windows_is_spelled_as_everywhere() -> None:
    described = entry(1, **{"os": "windows", "architecture": "amd64", "os.version": "10.0.17763.1"})
    assert platform_of(described) == "windows(10.0.17763.1)/amd64"


@pytest.mark.parametrize(
    ("images", "one"),
    [([AMD64], True), ([AMD64, NEWER], True), ([AMD64, ARM64], False), ([Image(AMD64.manifest, (), "")], False)],
)
def test_index_for_one_platform(images: list[Image], one: bool) -> None:
    attested = {images[0].manifest.digest: make_attestation("x")}
    assert is_for_one_platform(manifest(index_of(images, attested))) == one
