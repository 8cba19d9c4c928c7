"""Completion of images: missing blobs are fetched, in order and across failures."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
from twisted.internet.task import Clock
from twisted.logger import LogEvent, LogLevel

from ociregistry.errors import BlobUnknown, Denied, RegistryError, Unavailable
from ociregistry.manifests import Manifest
from ociregistry.names import Digest
from ociregistry.pullthrough.completion import Completion, Incomplete
from ociregistry.store.store import Store
from tests.images import make_image, make_index
from tests.unit.support.common import image, manifest, on_reactor, texts, turn, until
from tests.unit.support.completions import (
    APP,
    BASE,
    CONFIG,
    DATA,
    ELSEWHERE,
    IMAGE,
    LARGE,
    NAME,
    OTHER,
    SIZES,
    SMALL,
    FakeBlobFetcher,
    pending,
    pulled,
)


@on_reactor
async def test_missing_blobs_are_fetched_smallest_first(
    completion: Completion, store: Store, blob_fetcher: FakeBlobFetcher, root: Path, events: list[LogEvent]
) -> None:
    assert completion.incomplete == Incomplete(0, 0)
    await pulled(completion, store)
    assert pending(root) == [IMAGE.digest.hex]
    total = sum(SIZES[blob] for blob in (CONFIG, LARGE, SMALL))
    await until(lambda: blob_fetcher.asked)
    for blob in (CONFIG, SMALL, LARGE):
        assert completion.incomplete == Incomplete(1, total)
        # One at a time.
        await turn()
        assert blob_fetcher.digests[-1] == blob
        await blob_fetcher.bring(blob)
        total -= SIZES[blob]
    await until(lambda: not pending(root))
    assert blob_fetcher.asked == [(APP.repository, blob) for blob in (CONFIG, SMALL, LARGE)]
    assert (completion.incomplete, store.pending) == (Incomplete(0, 0), {})
    assert completion._missing == {}
    await until(lambda: len(texts(events, LogLevel.info)) == 2)
    assert texts(events, LogLevel.info) == [
        f"completing {NAME}, missing: 3 blobs with {sum(SIZES[blob] for blob in (CONFIG, SMALL, LARGE))} bytes",
        f"completion finished: {NAME}",
    ]


@on_reactor
async def test_present_blobs_are_not_fetched(
    completion: Completion, store: Store, blob_fetcher: FakeBlobFetcher
) -> None:
    blob_fetcher.put(CONFIG)
    blob_fetcher.put(LARGE)
    await pulled(completion, store)
    await until(lambda: blob_fetcher.asked)
    assert completion.incomplete == Incomplete(1, SIZES[SMALL])
    await blob_fetcher.bring(SMALL)
    await until(lambda: not store.pending)
    assert blob_fetcher.digests == [SMALL]


@on_reactor
async def test_partly_copied_blob_is_fetched(
    completion: Completion, store: Store, blob_fetcher: FakeBlobFetcher, root: Path
) -> None:
    for blob in (CONFIG, SMALL, LARGE):
        blob_fetcher.put(blob)
    (root / "blobs" / LARGE.hex).write_bytes(b"half")
    await pulled(completion, store)
    await until(lambda: blob_fetcher.digests == [LARGE])


@on_reactor
async def test_image_is_fetched_from_a_repository_that_has_shown_it(
    completion: Completion, store: Store, blob_fetcher: FakeBlobFetcher
) -> None:
    """A client that asks for a cached digest may invent the repository, and its host."""
    await store.keep(IMAGE, APP)
    await completion.complete(IMAGE.digest, image("host.invalid/app:1").repository)
    await until(lambda: blob_fetcher.asked)
    assert blob_fetcher.asked == [(APP.repository, CONFIG)]
    assert store.pending == {IMAGE.digest: APP.repository}


@pytest.mark.parametrize("why", ["index", "complete", "no record"])
@on_reactor
async def test_complete_images_cause_no_fetch(
    completion: Completion, store: Store, blob_fetcher: FakeBlobFetcher, root: Path, clock: Clock, why: str
) -> None:
    if why == "index":
        await pulled(completion, store, manifest(make_index("some")))
    elif why == "complete":
        for blob in (CONFIG, SMALL, LARGE):
            blob_fetcher.put(blob)
        await pulled(completion, store)
    else:
        await completion.complete(IMAGE.digest, APP.repository)
    clock.advance(30)
    await turn()
    assert (pending(root), store.pending, blob_fetcher.asked) == ([], {}, [])
    assert completion.incomplete == Incomplete(0, 0)


def with_foreign_layer() -> Manifest:
    """Return the image with its large layer as one that clients may fetch from elsewhere."""
    document = json.loads(IMAGE.data)
    document["layers"][0]["urls"] = ["https://foreign.example/layer"]
    return Manifest.parse(json.dumps(document).encode(), IMAGE.media_type)


@on_reactor
async def test_foreign_layers_are_fetched_last(
    completion: Completion, store: Store, blob_fetcher: FakeBlobFetcher
) -> None:
    await pulled(completion, store, with_foreign_layer())
    for blob in (CONFIG, SMALL, LARGE):
        await blob_fetcher.bring(blob)
    await until(lambda: not store.pending)
    assert completion.incomplete == Incomplete(0, 0)


@on_reactor
async def test_foreign_layer_that_upstream_lacks(
    completion: Completion, store: Store, blob_fetcher: FakeBlobFetcher, clock: Clock
) -> None:
    for _ in range(2):
        await pulled(completion, store, with_foreign_layer())
        if not blob_fetcher.asked:
            for blob in (CONFIG, SMALL):
                await blob_fetcher.bring(blob)
            await blob_fetcher.refuse(BlobUnknown("404"), 3)
        await until(lambda: not store.pending)
        assert completion.incomplete == Incomplete(0, 0)
    assert blob_fetcher.digests == [CONFIG, SMALL, LARGE]
    clock.advance(3600)
    await pulled(completion, store, with_foreign_layer())
    await blob_fetcher.bring(LARGE)
    await until(lambda: not store.pending)


@on_reactor
async def test_repeated_pull_adds_the_image_once(
    completion: Completion, store: Store, blob_fetcher: FakeBlobFetcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    lookups: list[Digest] = []
    missing = store.missing

    async def record_lookup(digest: Digest) -> Mapping[Digest, int] | None:
        lookups.append(digest)
        return await missing(digest)

    monkeypatch.setattr(store, "missing", record_lookup)
    for _ in range(3):
        await pulled(completion, store)
    await until(lambda: blob_fetcher.asked)
    # Once when it is added, once when it is worked on.
    assert lookups == [IMAGE.digest] * 2
    for blob in (CONFIG, SMALL, LARGE):
        await blob_fetcher.bring(blob)
    await until(lambda: not store.pending)
    lookups.clear()
    for _ in range(3):
        await pulled(completion, store)
    assert lookups == [IMAGE.digest]


@on_reactor
async def test_oldest_of_too_many_complete_images_is_checked_again(
    store: Store, blob_fetcher: FakeBlobFetcher, clock: Clock, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ociregistry.pullthrough.completion._MOST_COMPLETE", 2)
    completion = Completion(store, blob_fetcher, clock)
    images = [make_image(name) for name in ("one", "two", "three")]
    for built in images:
        for blob in built.blobs:
            (root / "blobs" / Digest(blob.digest).hex).write_bytes(blob.data)
        await pulled(completion, store, manifest(built))
    checked: list[Digest] = []
    missing = store.missing

    async def check(digest: Digest) -> Mapping[Digest, int] | None:
        checked.append(digest)
        return await missing(digest)

    monkeypatch.setattr(store, "missing", check)
    for built in reversed(images):
        await pulled(completion, store, manifest(built))
    assert checked == [manifest(images[0]).digest]


@on_reactor
async def test_removed_blob_is_fetched_at_next_pull(
    completion: Completion, store: Store, blob_fetcher: FakeBlobFetcher, root: Path, clock: Clock
) -> None:
    for blob in (CONFIG, SMALL, LARGE):
        blob_fetcher.put(blob)
    await pulled(completion, store)
    (root / "blobs" / SMALL.hex).unlink()
    clock.advance(30)
    await pulled(completion, store)
    await until(lambda: blob_fetcher.digests == [SMALL])


@pytest.mark.parametrize("error", [BlobUnknown("reg.example: it answered 404"), Denied("not allowed")])
@on_reactor
async def test_unknown_blob_is_given_up_with_a_log_line(
    completion: Completion,
    store: Store,
    blob_fetcher: FakeBlobFetcher,
    root: Path,
    events: list[LogEvent],
    error: RegistryError,
) -> None:
    await pulled(completion, store)
    await blob_fetcher.refuse(error, 1)
    for blob in (SMALL, LARGE):
        await blob_fetcher.bring(blob)
    await until(lambda: not pending(root))
    assert texts(events, LogLevel.warn) == [f"{NAME} stays incomplete: {error.message}"]
    # It stays missing and is counted.
    assert (blob_fetcher.digests, completion.incomplete) == ([CONFIG, SMALL, LARGE], Incomplete(1, SIZES[CONFIG]))


@on_reactor
async def test_unavailable_upstream_is_retried_after_30_seconds(
    completion: Completion,
    store: Store,
    blob_fetcher: FakeBlobFetcher,
    root: Path,
    clock: Clock,
    events: list[LogEvent],
) -> None:
    await pulled(completion, store)
    await blob_fetcher.bring(CONFIG)
    await blob_fetcher.refuse(Unavailable("down"), 2)
    missing = Incomplete(1, SIZES[SMALL] + SIZES[LARGE])
    for count in (3, 4):
        await turn()
        clock.advance(29.875)
        await turn()
        assert (len(blob_fetcher.asked), completion.incomplete) == (count - 1, missing)
        clock.advance(0.125)
        await blob_fetcher.refuse(Unavailable("down still"), count)
    assert blob_fetcher.digests == [CONFIG, SMALL, SMALL, SMALL]
    assert pending(root) == [IMAGE.digest.hex]
    assert texts(events, LogLevel.warn) == texts(events, LogLevel.error) == []


@on_reactor
async def test_unavailable_upstream_does_not_block_others(
    completion: Completion, store: Store, blob_fetcher: FakeBlobFetcher
) -> None:
    await pulled(completion, store)
    await blob_fetcher.refuse(Unavailable("down"), 1)
    await turn()
    await pulled(completion, store, OTHER, str(ELSEWHERE))
    await until(lambda: len(blob_fetcher.asked) == 2)
    assert blob_fetcher.asked[1:] == [(ELSEWHERE.repository, OTHER.blobs[0].digest)]
    assert completion.incomplete.images == 2


@on_reactor
async def test_image_added_during_work_is_counted(
    completion: Completion, store: Store, blob_fetcher: FakeBlobFetcher
) -> None:
    await pulled(completion, store)
    await until(lambda: blob_fetcher.asked)
    await pulled(completion, store, OTHER, str(ELSEWHERE))
    assert completion.incomplete == Incomplete(2, sum(SIZES.values()))


@on_reactor
async def test_missing_blob_of_two_images_is_counted_once(
    completion: Completion, store: Store, blob_fetcher: FakeBlobFetcher
) -> None:
    other = manifest(make_image("sibling", base=BASE))
    await pulled(completion, store)
    await until(lambda: blob_fetcher.asked)
    await pulled(completion, store, other, str(ELSEWHERE))
    first, second = ({blob.digest: blob.size for blob in one.blobs} for one in (IMAGE, other))
    assert LARGE in first.keys() & second.keys()
    assert completion.incomplete == Incomplete(2, sum({**first, **second}.values()))
    assert completion.missing == {IMAGE.digest: sum(first.values()), other.digest: sum(second.values())}


@on_reactor
async def test_blob_that_one_image_brought_is_missing_in_none(
    completion: Completion, store: Store, blob_fetcher: FakeBlobFetcher
) -> None:
    """Also in those whose turn has begun, or comes later: on a slow link that may take hours."""
    other = manifest(make_image("sibling", base=BASE))
    await pulled(completion, store)
    await until(lambda: len(blob_fetcher.asked) == 1)
    await pulled(completion, store, other, str(ELSEWHERE))
    await until(lambda: len(blob_fetcher.asked) == 2)
    for number, blob in ((0, CONFIG), (2, SMALL), (3, LARGE)):
        await until(lambda: len(blob_fetcher.asked) > number)  # noqa: B023  # it is called in this turn
        assert blob_fetcher.digests[number] == blob
        blob_fetcher.put(blob)
        blob_fetcher.results[number].callback(None)
    await until(lambda: IMAGE.digest not in store.pending)
    left = {blob.digest: blob.size for blob in other.blobs if blob.digest != LARGE}
    assert len(left) == len(other.blobs) - 1
    assert completion.incomplete == Incomplete(1, sum(left.values()))


@on_reactor
async def test_blob_that_a_client_brought_is_not_missing_in_an_image_that_is_worked_on(
    completion: Completion, store: Store, blob_fetcher: FakeBlobFetcher, clock: Clock
) -> None:
    await pulled(completion, store)
    await until(lambda: len(blob_fetcher.asked) == 1)
    partial = await store.new_partial(LARGE, SIZES[LARGE], APP.repository)
    await partial.append(DATA[LARGE])
    await partial.verify()
    await store.commit(partial)
    partial.close()
    clock.advance(1)
    await until(lambda: completion.incomplete == Incomplete(1, SIZES[CONFIG] + SIZES[SMALL]))
    await blob_fetcher.bring(CONFIG)
    await until(lambda: completion.incomplete == Incomplete(1, SIZES[SMALL]))


@on_reactor
async def test_image_added_during_work_is_tried_before_retry(
    completion: Completion, store: Store, blob_fetcher: FakeBlobFetcher
) -> None:
    await pulled(completion, store)
    await until(lambda: blob_fetcher.asked)
    await pulled(completion, store, OTHER, "reg.example/next:1")
    for count in (1, 2):
        await blob_fetcher.refuse(Unavailable("down"), count)
    await until(lambda: OTHER.blobs[0].digest in blob_fetcher.digests)


@on_reactor
async def test_new_image_after_idle(completion: Completion, store: Store, blob_fetcher: FakeBlobFetcher) -> None:
    blob_fetcher.put(CONFIG)
    blob_fetcher.put(LARGE)
    await pulled(completion, store)
    await blob_fetcher.bring(SMALL)
    await until(lambda: not completion._work)
    await pulled(completion, store, OTHER, "reg.example/next:1")
    await until(lambda: len(blob_fetcher.asked) == 2)
