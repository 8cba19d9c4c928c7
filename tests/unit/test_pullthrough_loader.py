"""The loader: indexes, manifests of the selected platforms and their blobs; images fail independently."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from ociregistry.errors import BlobUnknown, Denied, ManifestUnknown, RegistryError, Unavailable
from ociregistry.manifests import DOCKER_LIST, Manifest
from ociregistry.names import Digest
from ociregistry.platforms import ALL, Platform
from ociregistry.pullthrough.loader import LoadResult, LoadStatus, NullProgress, summary
from ociregistry.store.lookups import Counts
from ociregistry.store.store import Store
from tests.images import make_image, make_index
from tests.unit.support.common import manifest, on_reactor
from tests.unit.support.loads import ARM64, Loads, MemoryFetcher, image_of, index_of

SINGLE = make_image("single")
MULTI = make_index("multi", platforms=("linux/amd64", "linux/arm64", "linux/arm/v6", "linux/arm/v7"))
APP, NEXT, LAST = "reg.example/app:1", "reg.example/next:1", "reg.example/last:1"
DIGESTS = [blob.digest for blob in SINGLE.blobs]


@pytest.fixture
def fetcher(store: Store, root: Path) -> MemoryFetcher:
    """Return a fetcher without content."""
    return MemoryFetcher(store, root)


@pytest.fixture
def loads(store: Store, fetcher: MemoryFetcher) -> Loads:
    """Return a loader over it."""
    return Loads(store, fetcher)


def size(*images: object) -> int:
    """Return the number of bytes in the blobs of images."""
    blobs = {blob.digest: len(blob.data) for one in images for blob in one.blobs}  # type: ignore[attr-defined]  # an Image or Index
    return sum(blobs.values())


def blobs_of(root: Path) -> set[str]:
    """Return the digests of the blobs in the store."""
    return {f"sha256:{path.name}" for path in (root / "blobs").iterdir()}


def outcome_texts(outcomes: Sequence[LoadResult]) -> list[str]:
    """Return the texts of the outcomes."""
    return [str(outcome) for outcome in outcomes]


@on_reactor
async def test_image_of_the_platform_is_loaded_from_an_index(
    loads: Loads, fetcher: MemoryFetcher, store: Store, root: Path
) -> None:
    fetcher.add(APP, MULTI)
    (outcome,) = await loads.load(APP)
    amd64 = MULTI.images[0]
    assert outcome == LoadResult(APP, LoadStatus.LOADED, "", (), 3, size(amd64))
    assert fetcher.asked[:2] == [f"manifest {APP}", f"manifest reg.example/app@{amd64.manifest.digest}"]
    assert sorted(fetcher.asked[2:]) == sorted(f"blob reg.example/app@{blob.digest}" for blob in amd64.blobs)
    assert blobs_of(root) == {blob.digest for blob in amd64.blobs}
    assert store.counts == Counts(lists=1, images=1)


@on_reactor
async def test_present_content_is_not_requested(loads: Loads, fetcher: MemoryFetcher, root: Path) -> None:
    fetcher.add(APP, MULTI)
    fetcher.add(NEXT, SINGLE)
    await loads.load(APP, NEXT)
    asked = len(fetcher.asked)
    outcomes = await loads.load(APP, NEXT, f"reg.example/next@{SINGLE.manifest.digest}")
    assert [outcome.ended for outcome in outcomes] == [LoadStatus.PRESENT] * 3
    assert [(outcome.blobs, outcome.bytes) for outcome in outcomes] == [(0, 0)] * 3
    assert len(fetcher.asked) == asked
    # Only missing blobs are fetched.
    (root / "blobs" / Digest(DIGESTS[1]).hex).unlink()
    (root / "blobs" / Digest(DIGESTS[2]).hex).write_bytes(b"half")
    (outcome,) = await loads.load(NEXT)
    lacked = SINGLE.blobs[1:]
    assert (outcome.ended, outcome.blobs, outcome.bytes) == (
        LoadStatus.LOADED,
        2,
        sum(len(one.data) for one in lacked),
    )
    assert fetcher.asked[asked:] == [f"blob reg.example/next@{one.digest}" for one in lacked]


@on_reactor
async def test_shared_blob_is_fetched_once(loads: Loads, fetcher: MemoryFetcher) -> None:
    fetcher.add(APP, SINGLE)
    fetcher.add(NEXT, make_image("on top", base=SINGLE, layers=1))
    first, second = await loads.load(APP, NEXT)
    assert (first.blobs, second.blobs) == (3, 2)
    assert len(fetcher.asked) == len(set(fetcher.asked)) == 2 + 5


@on_reactor
async def test_single_image_is_loaded_regardless_of_platform(loads: Loads, fetcher: MemoryFetcher) -> None:
    fetcher.add(APP, make_image("arm", platform="linux/arm64"))
    (outcome,) = await loads.load(APP)
    assert (outcome.ended, outcome.blobs) == (LoadStatus.LOADED, 3)


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ("linux/arm", ["linux/arm/v7"]),
        ("linux/arm/v7", ["linux/arm/v7"]),
        ("linux/arm/v6", ["linux/arm/v6"]),
        ("linux/arm64", ["linux/arm64"]),
        ("linux/arm64/v8", ["linux/arm64"]),
        ("linux/amd64,linux/arm64", ["linux/amd64", "linux/arm64"]),
        ("linux/arm64/v8,linux/arm64", ["linux/arm64"]),
        ("", ["linux/amd64", "linux/arm64", "linux/arm/v6", "linux/arm/v7"]),
    ],
)
@pytest.mark.parametrize("docker", [False, True])
@on_reactor
async def test_selected_platforms(
    loads: Loads, fetcher: MemoryFetcher, root: Path, wanted: str, found: list[str], docker: bool
) -> None:
    multi = make_index("platforms", platforms=[one.platform for one in MULTI.images], docker=docker)
    fetcher.add(APP, multi)
    platforms = tuple(map(Platform.parse, wanted.split(","))) if wanted else ALL
    (outcome,) = await loads.load(APP, wanted=platforms)
    assert outcome.ended is LoadStatus.LOADED
    chosen = [one for one in multi.images if one.platform in found]
    assert blobs_of(root) == {blob.digest for one in chosen for blob in one.blobs}


@on_reactor
async def test_arm64_matches_arm64_v8(loads: Loads, fetcher: MemoryFetcher) -> None:
    fetcher.add(APP, make_index("v8", platforms=("linux/arm64/v8",)))
    fetcher.add(NEXT, make_index("none", platforms=("linux/arm64",)))
    for platform in (ARM64, Platform.parse("linux/aarch64/v8")):
        outcomes = await loads.load(APP, NEXT, wanted=[platform])
        assert [outcome.why for outcome in outcomes] == ["", ""]


@on_reactor
async def test_missing_platform_error_lists_available_ones(loads: Loads, fetcher: MemoryFetcher, root: Path) -> None:
    fetcher.add(APP, MULTI)
    wanted = [Platform("linux", "s390x"), ARM64, Platform("linux", "riscv64")]
    (outcome,) = await loads.load(APP, wanted=wanted)
    why = "no image for linux/s390x, linux/riscv64; available: linux/amd64, linux/arm/v6, linux/arm/v7, linux/arm64"
    arm64 = MULTI.images[1]
    assert outcome == LoadResult(APP, LoadStatus.FAILED, why, (), 3, size(arm64))
    assert blobs_of(root) == {blob.digest for blob in arm64.blobs}
    # The error is permanent.
    assert not outcome.again


@on_reactor
async def test_empty_index_is_loaded(loads: Loads, fetcher: MemoryFetcher) -> None:
    fetcher.put(APP, index_of())
    (outcome,) = await loads.load(APP)
    assert (outcome.ended, outcome.blobs) == (LoadStatus.LOADED, 0)


def attested(where: str = "linux/amd64") -> tuple[Manifest, Manifest, Manifest, list[bytes]]:
    """Return an index as BuildKit makes it: an image and its provenance attestation."""
    blobs = [b"{}", b"layer", b"attestation"]
    app, attestation = image_of(*blobs[:2]), image_of(b"{}", blobs[2])
    return index_of((app, where), (attestation, "unknown/unknown")), app, attestation, blobs


@on_reactor
async def test_attestations_match_no_platform(loads: Loads, fetcher: MemoryFetcher, root: Path) -> None:
    index, app, attestation, blobs = attested()
    fetcher.put(APP, index, app, attestation, blobs=blobs)
    (outcome,) = await loads.load(APP)
    assert (outcome.ended, blobs_of(root)) == (LoadStatus.LOADED, {blob.digest for blob in app.blobs})
    # With all platforms they are loaded as well.
    (outcome,) = await loads.load(APP, wanted=ALL)
    assert (outcome.ended, outcome.blobs) == (LoadStatus.LOADED, 1)
    assert len(blobs_of(root)) == 3


@on_reactor
async def test_attestations_are_not_listed_as_available(loads: Loads, fetcher: MemoryFetcher) -> None:
    index, app, attestation, blobs = attested()
    fetcher.put(APP, index, app, attestation, blobs=blobs)
    (outcome,) = await loads.load(APP, wanted=[ARM64])
    assert outcome.why == "no image for linux/arm64; available: linux/amd64"


@on_reactor
async def test_nested_indexes(loads: Loads, fetcher: MemoryFetcher, root: Path) -> None:
    blobs = [b"config", b"layer"]
    app, other = image_of(*blobs), image_of(b"other")
    inner = index_of((app, "linux/amd64"), (other, "linux/arm64"), media_type=DOCKER_LIST)
    outer = index_of((inner, ""))
    fetcher.put(APP, outer, inner, app, other, blobs=blobs)
    (outcome,) = await loads.load(APP)
    assert (outcome.ended, blobs_of(root)) == (LoadStatus.LOADED, {blob.digest for blob in app.blobs})
    (outcome,) = await loads.load(APP, wanted=[Platform("linux", "s390x")])
    assert outcome.why == "no image for linux/s390x; available: linux/amd64, linux/arm64"


@on_reactor
async def test_index_nesting_is_limited(loads: Loads, fetcher: MemoryFetcher) -> None:
    nested = [image_of(b"config")]
    for _ in range(8):
        nested.append(index_of((nested[-1], "")))
    fetcher.put(APP, nested[-1], *nested, blobs=[b"config"])
    (outcome,) = await loads.load(APP)
    assert outcome.ended is LoadStatus.LOADED
    assert len(fetcher.asked) == 5


@on_reactor
async def test_unknown_media_types_in_an_index_are_skipped(loads: Loads, fetcher: MemoryFetcher) -> None:
    child = manifest(SINGLE)
    other = Manifest(Digest.of(b"wasm"), "application/wasm", b"wasm", (), ())
    fetcher.add(APP, SINGLE)
    fetcher.put(APP, index_of((child, ""), (other, "")), child)
    (outcome,) = await loads.load(APP, wanted=ALL)
    assert (outcome.ended, outcome.blobs) == (LoadStatus.LOADED, 3)


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (ManifestUnknown(f"{APP}: the upstream answered 404"), False),
        (Denied("reg.example: not allowed"), False),
        (Unavailable("reg.example: down"), True),
        (OSError(28, "No space left on device"), True),
    ],
)
@pytest.mark.parametrize("concurrent", [1, 3])
@on_reactor
async def test_failed_image_does_not_stop_others(
    loads: Loads, fetcher: MemoryFetcher, error: Exception, again: bool, concurrent: int
) -> None:
    for url in (APP, NEXT, LAST):
        fetcher.add(url, make_image(url))
    fetcher.errors[f"manifest {APP}"] = error
    outcomes = await loads.load(APP, NEXT, LAST, concurrent=concurrent)
    why = error.message if isinstance(error, RegistryError) else "cannot be stored: No space left on device"
    assert outcomes[0] == LoadResult(APP, LoadStatus.FAILED, why, again=again)
    assert [outcome.ended for outcome in outcomes[1:]] == [LoadStatus.LOADED] * 2
    assert summary(outcomes) == "2 loaded, 0 already there, 1 failed"


@pytest.mark.parametrize("error", [BlobUnknown("not there"), Unavailable("down"), OSError(28, "No space left")])
@on_reactor
async def test_failed_blob_does_not_stop_others_of_its_image(
    loads: Loads, fetcher: MemoryFetcher, root: Path, error: Exception
) -> None:
    fetcher.add(APP, SINGLE)
    fetcher.errors[f"blob reg.example/app@{DIGESTS[0]}"] = error
    (outcome,) = await loads.load(APP, connections=1)
    assert (outcome.ended, outcome.blobs, outcome.again) == (LoadStatus.FAILED, 2, not isinstance(error, BlobUnknown))
    assert outcome.bytes == sum(len(blob.data) for blob in SINGLE.blobs[1:])
    assert blobs_of(root) == set(DIGESTS[1:])
    # Loading resumes where it failed.
    fetcher.errors.clear()
    (outcome,) = await loads.load(APP)
    assert (outcome.ended, outcome.blobs) == (LoadStatus.LOADED, 1)


@on_reactor
async def test_unreadable_store_fails_the_image(
    loads: Loads, fetcher: MemoryFetcher, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def missing_blobs(what: Manifest) -> dict[Digest, int]:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(store, "missing_blobs", missing_blobs)
    fetcher.add(APP, SINGLE)
    assert outcome_texts(await loads.load(APP)) == [f"failed: {APP}: cannot be stored: Input/output error"]


@on_reactor
async def test_image_by_digest_has_a_note(loads: Loads, fetcher: MemoryFetcher) -> None:
    fetcher.add(APP, SINGLE)
    url = f"reg.example/app@{SINGLE.manifest.digest}"
    note = "known by its digest alone: a client that asks for its tag needs the upstream"
    assert outcome_texts(await loads.load(url)) == [f"loaded: {url}: 3 blobs, {size(SINGLE)} bytes; {note}"]
    assert outcome_texts(await loads.load(url)) == [f"already there: {url}: {note}"]
    (outcome,) = await loads.load(APP)
    assert outcome.notes == ()


@on_reactor
async def test_digest_that_another_repository_brought_is_noted_for_the_one_named(
    loads: Loads, fetcher: MemoryFetcher, store: Store
) -> None:
    built = make_image("shared")
    url, other = f"reg.example/a@{built.manifest.digest}", f"other.example/b@{built.manifest.digest}"
    fetcher.add("reg.example/a:1", built)
    await loads.load("reg.example/a:1")
    asked = len(fetcher.asked)
    (outcome,) = await loads.load(other)
    assert outcome.ended is LoadStatus.PRESENT
    await loads.load(url)
    assert not [one for one in fetcher.asked[asked:] if one.startswith("blob")]
    entry = store.entry(manifest(built).digest)
    assert entry is not None
    assert entry.images.keys() == {"reg.example/a:1", other}


def test_outcome_text() -> None:
    assert str(LoadResult(APP, LoadStatus.PRESENT)) == f"already there: {APP}"
    assert str(LoadResult(APP, LoadStatus.LOADED, blobs=2, bytes=7)) == f"loaded: {APP}: 2 blobs, 7 bytes"
    # The reason often starts with the image name.
    assert str(LoadResult(APP, LoadStatus.FAILED, f"{APP}: it answered 404")) == f"failed: {APP}: it answered 404"
    failed = LoadResult(APP, LoadStatus.FAILED, "down", blobs=1, bytes=5)
    assert str(failed) == f"failed: {APP}: 1 blob, 5 bytes loaded; down"
    assert summary([]) == "0 loaded, 0 already there, 0 failed"


def test_null_progress() -> None:
    unspecified = NullProgress()
    unspecified.expect(APP, 1)
    unspecified.advance(APP, 1)
    unspecified.ended(LoadResult(APP, LoadStatus.LOADED))
