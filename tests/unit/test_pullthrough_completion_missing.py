"""Completion finds what stored images lack, at startup and when the store changes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.logger import LogEvent, LogLevel

from ociregistry.errors import BlobUnknown, Denied, RegistryError, Unavailable
from ociregistry.manifests import Manifest
from ociregistry.names import Digest, ImageReference, Repository
from ociregistry.platforms import Platform
from ociregistry.pullthrough.completion import Completion, CompletionPolicy, Incomplete
from ociregistry.pullthrough.metadata import Metadata
from ociregistry.store.paths import blob_path, record_path
from ociregistry.store.store import Store
from tests.unit.support.common import REACTOR, image, on_reactor, record, texts, until
from tests.unit.support.completions import APP, CONFIG, DATA, IMAGE, LARGE, SIZES, SMALL, FakeBlobFetcher, pending
from tests.unit.support.demands import AMD64, ARM64, INDEX, S390X
from tests.unit.support.fetchers import A, B, C, Fetcher
from tests.unit.support.loads import index_of, settle

BLOBS = (CONFIG, SMALL, LARGE)
SIZE = sum(SIZES[blob] for blob in BLOBS)
AGAIN = image("reg.example/team/copy:1")
LINUX_AMD64 = Platform("linux", "amd64")

Complete = Callable[..., Completion]


@pytest.fixture
def complete(store: Store, blob_fetcher: FakeBlobFetcher, fetcher: Fetcher, clock: Clock) -> Iterator[Complete]:
    """Return a function that starts a completion with a policy."""
    started: list[Completion] = []

    def start(**policy: object) -> Completion:
        metadata = Metadata(store, fetcher, clock)
        started.append(Completion(store, blob_fetcher, clock, metadata, CompletionPolicy(**policy)))  # type: ignore[arg-type]  # fields of CompletionPolicy
        started[-1].startService()
        return started[-1]

    yield start
    for completion in started:
        completion.stopService()


@pytest.fixture
def fetcher(store: Store, root: Path) -> Fetcher:
    """Return upstreams that have the metadata."""
    fetcher = Fetcher(store, root)
    fetcher.add(A, B, C, AMD64, ARM64, S390X)
    return fetcher


def by_digest(of: Manifest) -> ImageReference:
    """Return the reference of a manifest by digest."""
    return ImageReference(APP.repository, of.digest)


async def refresh(store: Store, clock: Clock, seconds: float = 1) -> None:
    """Advance the clock so that the store scans its files."""
    clock.advance(seconds)
    await settle(store)


# Detection


@on_reactor
async def test_missing_blobs_of_wanted_images_are_found_at_start(
    complete: Complete, store: Store, blob_fetcher: FakeBlobFetcher, root: Path
) -> None:
    await store.keep(IMAGE, APP, wanted=True)
    blob_fetcher.put(LARGE)
    completion = complete()
    for blob in (CONFIG, SMALL):
        await blob_fetcher.bring(blob)
    await until(lambda: not pending(root))
    await settle(store)
    assert (blob_fetcher.digests, completion.incomplete) == ([CONFIG, SMALL], Incomplete(0, 0))


@on_reactor
async def test_unwanted_image_is_not_completed(
    complete: Complete, store: Store, blob_fetcher: FakeBlobFetcher
) -> None:
    await store.keep(IMAGE, by_digest(IMAGE), wanted=False)
    completion = complete()
    await settle(store)
    assert (blob_fetcher.asked, completion.incomplete) == ([], Incomplete(0, 0))


@pytest.mark.parametrize("layers", [[], [SMALL], [LARGE, SMALL]])
@on_reactor
async def test_record_without_wanted_is_completed_once_a_layer_is_present(
    complete: Complete, store: Store, blob_fetcher: FakeBlobFetcher, root: Path, clock: Clock, layers: list[Digest]
) -> None:
    await store.keep(IMAGE, by_digest(IMAGE))
    assert b"wanted" not in record(root, IMAGE.digest).read_bytes()
    for layer in layers:
        blob_fetcher.put(layer)
    await refresh(store, clock)
    complete()
    await settle(store)
    assert blob_fetcher.digests == ([CONFIG] if layers else [])


@on_reactor
async def test_record_written_by_another_process_is_completed(
    complete: Complete, store: Store, blob_fetcher: FakeBlobFetcher, open_store: Callable[[], Store], clock: Clock
) -> None:
    completion = complete()
    await open_store().keep(IMAGE, APP, wanted=True)
    await settle(store)
    assert blob_fetcher.asked == []
    await refresh(store, clock)
    assert (blob_fetcher.digests, completion.incomplete) == ([CONFIG], Incomplete(1, SIZE))


@on_reactor
async def test_image_that_becomes_wanted_is_completed(
    complete: Complete, store: Store, blob_fetcher: FakeBlobFetcher, open_store: Callable[[], Store], clock: Clock
) -> None:
    await store.keep(IMAGE, by_digest(IMAGE), wanted=False)
    complete()
    await settle(store)
    # As another process such as `load` records it.
    await open_store().want(IMAGE.digest)
    await refresh(store, clock)
    assert blob_fetcher.digests == [CONFIG]


@on_reactor
async def test_deleted_blob_is_fetched_again(
    complete: Complete, store: Store, blob_fetcher: FakeBlobFetcher, root: Path, clock: Clock
) -> None:
    await store.keep(IMAGE, APP, wanted=True)
    for blob in BLOBS:
        blob_fetcher.put(blob)
    completion = complete()
    await refresh(store, clock, 10)
    assert (blob_fetcher.asked, completion.incomplete) == ([], Incomplete(0, 0))
    (root / "blobs" / SMALL.hex).unlink()
    await refresh(store, clock, 10)
    assert (blob_fetcher.digests, completion.incomplete) == ([SMALL], Incomplete(1, SIZES[SMALL]))
    await blob_fetcher.bring(SMALL)
    await until(lambda: not pending(root))
    await refresh(store, clock, 10)
    # Also the second time.
    (root / "blobs" / SMALL.hex).unlink()
    await refresh(store, clock, 10)
    assert blob_fetcher.digests == [SMALL, SMALL]


@on_reactor
async def test_pruned_image_is_not_missing(
    complete: Complete, store: Store, blob_fetcher: FakeBlobFetcher, root: Path, clock: Clock
) -> None:
    await store.keep(IMAGE, APP, wanted=True)
    completion = complete(images=False)
    await settle(store)
    assert completion.incomplete == Incomplete(1, SIZE)
    record(root, IMAGE.digest).unlink()
    await refresh(store, clock)
    assert completion.incomplete == Incomplete(0, 0)


# Unavailable blobs


@pytest.mark.parametrize("error", [BlobUnknown("404"), Denied("not allowed")])
@on_reactor
async def test_given_up_image_is_logged_and_retried_after_an_hour(
    complete: Complete, store: Store, blob_fetcher: FakeBlobFetcher, root: Path, clock: Clock, error: RegistryError
) -> None:
    await store.keep(IMAGE, APP, wanted=True)
    blob_fetcher.put(CONFIG)
    blob_fetcher.put(LARGE)
    completion = complete()
    await blob_fetcher.refuse(error, 1)
    await until(lambda: not pending(root))
    await settle(store)
    for _ in range(119):
        await refresh(store, clock, 30)
        assert (len(blob_fetcher.asked), completion.incomplete) == (1, Incomplete(1, SIZES[SMALL]))
    await refresh(store, clock, 30)
    assert blob_fetcher.digests == [SMALL, SMALL]
    await blob_fetcher.bring(SMALL)
    await until(lambda: not pending(root))
    assert completion.incomplete == Incomplete(0, 0)


@on_reactor
async def test_client_pull_retries_a_given_up_image_immediately(
    complete: Complete, store: Store, blob_fetcher: FakeBlobFetcher, root: Path
) -> None:
    await store.keep(IMAGE, APP, wanted=True)
    blob_fetcher.put(CONFIG)
    blob_fetcher.put(LARGE)
    completion = complete()
    await blob_fetcher.refuse(BlobUnknown("404"), 1)
    await until(lambda: not pending(root))
    await completion.complete(IMAGE.digest, APP.repository)
    await until(lambda: len(blob_fetcher.asked) == 2)


@on_reactor
async def test_blob_missing_in_one_repository_comes_from_another(
    complete: Complete, store: Store, blob_fetcher: FakeBlobFetcher, root: Path, events: list[LogEvent]
) -> None:
    for where in (APP, AGAIN, image("else.example/other:1")):
        await store.keep(IMAGE, where, wanted=True)
    blob_fetcher.put(CONFIG)
    blob_fetcher.put(LARGE)
    await store.add_pending(IMAGE.digest, APP.repository)
    complete()
    await blob_fetcher.refuse(BlobUnknown("404"), 1)
    await blob_fetcher.bring(SMALL)
    await until(lambda: not pending(root))
    assert blob_fetcher.asked == [(APP.repository, SMALL), (AGAIN.repository, SMALL)]
    assert texts(events, LogLevel.warn) == []


# Files of version 0.1.0


@on_reactor
async def test_pending_file_of_old_version_is_completed(
    root: Path, open_store: Callable[[], Store], clock: Clock
) -> None:
    first = Store(root, clock, REACTOR)
    first.startService()
    await first.keep(IMAGE, APP)
    first.stopService()
    noted = {"upstream": "reg.example", "repository": "team/app"}
    (root / "pulls" / "0" / f"{IMAGE.digest.hex}.wish").write_text(json.dumps(noted))
    blob_fetcher = FakeBlobFetcher(root)
    completion = Completion(open_store(), blob_fetcher, clock)
    completion.startService()
    for blob in BLOBS:
        await blob_fetcher.bring(blob)
    await until(lambda: not pending(root))
    assert {path.name for path in (root / "blobs").iterdir()} == {blob.hex for blob in BLOBS}
    completion.stopService()


# Metadata


@on_reactor
async def test_metadata_is_fetched_after_layers(
    complete: Complete, store: Store, blob_fetcher: FakeBlobFetcher, fetcher: Fetcher
) -> None:
    await store.keep(index_of((A, "linux/a"), (B, "linux/b")), image("reg.example/index:1"))
    await store.keep(IMAGE, APP, wanted=True)
    completion = complete()
    await settle(store)
    # The first round may have started with the index.
    begun = list(fetcher.asked)
    for blob in BLOBS:
        assert fetcher.asked == begun
        await blob_fetcher.bring(blob)
    await until(lambda: len(fetcher.asked) == 4)
    await settle(store)
    assert (fetcher.asked, completion.incomplete) == (["A", "a", "B", "b"], Incomplete(0, 0))


@on_reactor
async def test_layers_are_fetched_before_next_metadata_manifest(
    complete: Complete, store: Store, blob_fetcher: FakeBlobFetcher, fetcher: Fetcher, clock: Clock
) -> None:
    fetcher.errors[B.digest] = [Unavailable("reg.example answered 429", retry_after=60)]
    await store.keep(index_of((A, "linux/a"), (B, "linux/b"), (C, "linux/c")), image("reg.example/index:1"))
    completion = complete()
    await until(lambda: fetcher.asked == ["A", "a", "B"])
    await settle(store)
    assert completion.incomplete == Incomplete(0, 0, indexes=1)
    # Only metadata is paused.
    await store.keep(IMAGE, APP, wanted=True)
    await blob_fetcher.bring(CONFIG)
    clock.advance(60)
    await blob_fetcher.bring(SMALL)
    await settle(store)
    assert fetcher.asked == ["A", "a", "B"]
    await blob_fetcher.bring(LARGE)
    await until(lambda: len(fetcher.asked) == 7)
    assert sorted(fetcher.asked[3:]) == ["B", "C", "b", "c"]


@on_reactor
async def test_newly_missing_layers_precede_next_metadata_manifest(
    complete: Complete, store: Store, blob_fetcher: FakeBlobFetcher, fetcher: Fetcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch, held = fetcher.fetch_manifest, Deferred[None]()

    async def fetch_when_told(image: ImageReference) -> None:
        await held
        await fetch(image)

    monkeypatch.setattr(fetcher, "fetch_manifest", fetch_when_told)
    await store.keep(index_of((A, "linux/a"), (B, "linux/b")), image("reg.example/index:1"))
    complete()
    await settle(store)
    await store.keep(IMAGE, APP, wanted=True)
    await settle(store)
    assert (blob_fetcher.asked, fetcher.asked) == ([], [])
    held.callback(None)
    for blob in BLOBS:
        await blob_fetcher.bring(blob)
        assert fetcher.asked == ["A", "a"]
    await until(lambda: fetcher.asked == ["A", "a", "B", "b"])


@on_reactor
async def test_configured_platforms_come_first(complete: Complete, store: Store, fetcher: Fetcher) -> None:
    complete(platforms=(Platform("linux", "s390x"),))
    await store.keep(INDEX, image("reg.example/team/app:1"))
    await until(lambda: fetcher.asked)
    assert fetcher.asked[0] == S390X.digest


@on_reactor
async def test_metadata_resumes_after_a_pause(
    complete: Complete, store: Store, fetcher: Fetcher, clock: Clock
) -> None:
    fetcher.errors[A.digest] = [Unavailable("reg.example answered 429", retry_after=600)]
    await store.keep(index_of((A, "linux/a")), image("reg.example/index:1"))
    completion = complete()
    await settle(store)
    await refresh(store, clock, 599)
    assert (fetcher.asked, completion.incomplete) == (["A"], Incomplete(0, 0, indexes=1))
    await refresh(store, clock)
    assert (fetcher.asked, completion.incomplete) == (["A", "A", "a"], Incomplete(0, 0))


@on_reactor
async def test_later_index_and_removed_metadata_are_noticed(
    complete: Complete, store: Store, fetcher: Fetcher, root: Path, clock: Clock
) -> None:
    complete()
    await store.keep(index_of((A, "linux/a")), image("reg.example/index:1"))
    await until(lambda: fetcher.asked == ["A", "a"])
    await refresh(store, clock, 10)
    config = next(iter(A.blob_sizes))
    (root / "blobs" / config.hex).unlink()
    await refresh(store, clock, 10)
    await until(lambda: fetcher.asked == ["A", "a", "a"])
    await settle(store)
    record(root, A.digest).unlink()
    await refresh(store, clock)
    await until(lambda: fetcher.asked == ["A", "a", "a", "A"])


@on_reactor
async def test_referrers_list_has_no_metadata(
    complete: Complete, store: Store, fetcher: Fetcher, clock: Clock
) -> None:
    complete()
    await store.keep(index_of((A, "")), image(f"reg.example/index:sha256-{B.digest.hex}"))
    await refresh(store, clock)
    assert fetcher.asked == []


@on_reactor
async def test_no_metadata_when_turned_off(complete: Complete, store: Store, fetcher: Fetcher, clock: Clock) -> None:
    completion = complete(metadata=False)
    await store.keep(index_of((A, "linux/a")), image("reg.example/index:1"))
    await refresh(store, clock)
    assert (fetcher.asked, completion.incomplete) == ([], Incomplete(0, 0))


# Policies


@on_reactor
async def test_without_completion_missing_bytes_are_still_counted(
    complete: Complete, store: Store, blob_fetcher: FakeBlobFetcher, root: Path, clock: Clock
) -> None:
    await store.keep(IMAGE, APP, wanted=True)
    completion = complete(images=False)
    await completion.complete(IMAGE.digest, APP.repository)
    await refresh(store, clock, 30)
    assert (blob_fetcher.asked, pending(root), completion.incomplete) == ([], [], Incomplete(1, SIZE))
    for blob in BLOBS:
        (root / "blobs" / blob.hex).write_bytes(DATA[blob])
    await refresh(store, clock, 30)
    assert completion.incomplete == Incomplete(0, 0)


@pytest.mark.parametrize("metadata", [True, False])
@on_reactor
async def test_only_configured_platforms_are_completed(
    complete: Complete, store: Store, blob_fetcher: FakeBlobFetcher, fetcher: Fetcher, clock: Clock, metadata: bool
) -> None:
    fetcher.add(INDEX)
    complete(platforms=(LINUX_AMD64,), metadata=metadata)
    await store.keep(INDEX, image("reg.example/team/app:1"))
    await until(lambda: blob_fetcher.asked)
    await settle(store)
    assert set(store.pending) == {AMD64.digest}
    # Its manifest comes first, the others only as metadata.
    assert fetcher.asked[0] == AMD64.digest
    # Images that are wanted for another reason are not completed.
    await store.keep(ARM64, by_digest(ARM64), wanted=True)
    await refresh(store, clock, 30)
    assert set(store.pending) == {AMD64.digest}
    for _ in range(2):
        await until(lambda: not blob_fetcher.results[-1].called)
        repository, digest = blob_fetcher.asked[-1]
        assert repository == Repository.at(APP.repository.upstream, "team/app")
        blob_path(store._root, digest).write_bytes(b"x" * AMD64.blob_sizes[digest])
        blob_fetcher.results[-1].callback(None)
        await settle(store)
    await until(lambda: not store.pending)
    await settle(store)
    assert (S390X.digest in fetcher.asked) == metadata


@on_reactor
async def test_pruned_index_stops_its_metadata(
    complete: Complete, fetcher: Fetcher, store: Store, root: Path, clock: Clock
) -> None:
    """Without this, metadata of an index pruned during the wait would be stored again."""
    index = index_of((A, "linux/a"), (B, "linux/b"))
    fetcher.errors[A.digest] = [Unavailable("down")]
    completion = complete()
    await store.keep(index, image("reg.example/index:1"))
    await settle(store)
    assert (fetcher.asked, completion.incomplete) == (["A"], Incomplete(0, 0, indexes=1))
    record_path(root, index.digest, is_list=True).unlink()
    await refresh(store, clock)
    assert completion.incomplete == Incomplete(0, 0)
    for _ in range(10):
        await refresh(store, clock, 60)
    assert fetcher.asked == ["A"]
