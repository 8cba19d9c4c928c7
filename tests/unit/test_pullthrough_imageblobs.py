"""Completion in turns: an image with many blobs, or with absent ones, does not keep the others waiting."""

from __future__ import annotations

from pathlib import Path

import pytest
from twisted.internet.task import Clock
from twisted.logger import LogEvent, LogLevel

from ociregistry.errors import BlobUnknown, Denied, ManifestUnknown, RegistryError, Unavailable
from ociregistry.manifests import Manifest
from ociregistry.names import Digest, ImageReference
from ociregistry.pullthrough.completion import Completion, CompletionPolicy
from ociregistry.pullthrough.metadata import Metadata
from ociregistry.store.store import Store
from tests.unit.support.common import image, on_reactor, texts, turn, until
from tests.unit.support.completions import APP, IMAGE, OTHER, SIZES, FakeBlobFetcher, pending, pulled
from tests.unit.support.fetchers import A, B, C, Fetcher
from tests.unit.support.loads import image_of, index_of, settle

NEXT = f"{APP.repository.upstream}/next:1"
"""Of the same upstream."""


class Upstream(FakeBlobFetcher):
    """Fetch blobs at once, or refuse them."""

    def __init__(self, root: Path, error: RegistryError | None = None) -> None:
        super().__init__(root)
        self._root = root
        self._error = error
        self.sizes: dict[Digest, int] = {}

    async def __call__(self, repository: object, digest: Digest) -> None:
        """Write the blob, or raise the error."""
        self.asked.append((repository, digest))  # type: ignore[arg-type]  # a Repository
        await turn()
        if self._error is not None and digest not in SIZES:
            raise self._error
        (self._root / "blobs" / digest.hex).write_bytes(bytes(self.sizes.get(digest, SIZES.get(digest, 0))))


def with_blobs(count: int) -> Manifest:
    """Return an image that names this many blobs."""
    return image_of(*(b"blob %05d" % number for number in range(count)))


@pytest.mark.parametrize("error", [BlobUnknown("reg.example: it answered 404"), Denied("not allowed")])
@on_reactor
async def test_rest_of_an_image_is_not_requested_after_three_refusals(
    store: Store, root: Path, clock: Clock, events: list[LogEvent], error: RegistryError
) -> None:
    upstream = Upstream(root, error)
    completion = Completion(store, upstream, clock)
    completion.startService()
    hostile = with_blobs(500)
    await pulled(completion, store, hostile)
    await until(lambda: not pending(root))
    await settle(store)
    assert len(upstream.asked) == 3
    assert texts(events, LogLevel.warn) == [
        f"{APP.repository}@{hostile.digest} stays incomplete: {error.message} (2 more refused, 497 not requested)"
    ]
    # What is missing is still told.
    assert completion.incomplete.bytes == sum(blob.size for blob in hostile.blobs)
    for _ in range(10):
        clock.advance(30)
        await settle(store)
    assert len(upstream.asked) == 3
    completion.stopService()


@on_reactor
async def test_images_take_turns(store: Store, root: Path, clock: Clock) -> None:
    upstream = Upstream(root)
    completion = Completion(store, upstream, clock)
    large = with_blobs(25)
    upstream.sizes = dict(large.required)
    for what, where in ((large, str(APP)), (OTHER, NEXT)):
        await store.keep(what, image(where))
        await store.add_pending(what.digest, image(where).repository)
    completion.startService()
    await until(lambda: not pending(root))
    own = [digest in large.required for digest in upstream.digests]
    others = len(OTHER.required)
    assert own == [*[True] * 10, *[False] * others, *[True] * 15]
    assert len(set(upstream.digests)) == 25 + others
    completion.stopService()


@on_reactor
async def test_foreign_layers_are_not_requested_any_more_after_three_refusals(
    store: Store, root: Path, clock: Clock, events: list[LogEvent]
) -> None:
    upstream = Upstream(root, BlobUnknown("404"))
    plain = with_blobs(50)
    data = plain.data.replace(b'"size"', b'"urls": ["https://foreign.example/"], "size"')
    foreign = Manifest.parse(data, plain.media_type)
    (root / "blobs" / plain.blobs[0].digest.hex).write_bytes(bytes(plain.blobs[0].size))
    completion = Completion(store, upstream, clock)
    completion.startService()
    await pulled(completion, store, foreign)
    await until(lambda: not pending(root))
    assert len(upstream.asked) == 3
    (told,) = (text for text in texts(events, LogLevel.info) if "foreign" in text)
    assert told.endswith("stays without foreign layers: 404 (2 more refused, 46 not requested)")
    assert texts(events, LogLevel.warn) == []
    completion.stopService()


@on_reactor
async def test_image_with_too_many_blobs_is_not_completed(
    completion: Completion,
    store: Store,
    blob_fetcher: FakeBlobFetcher,
    root: Path,
    clock: Clock,
    events: list[LogEvent],
) -> None:
    most, more = with_blobs(1000), with_blobs(1001)
    for _ in range(3):
        await pulled(completion, store, more)
        clock.advance(30)
        await settle(store)
    assert (blob_fetcher.asked, pending(root)) == ([], [])
    assert texts(events, LogLevel.warn) == [
        f"{APP.repository}@{more.digest} is not completed: its manifest names 1001 blobs, more than 1000"
    ]
    assert completion.incomplete.images == 1
    await pulled(completion, store, most)
    await until(lambda: blob_fetcher.asked)


@on_reactor
async def test_pending_image_of_an_earlier_version_with_too_many_blobs_is_dropped(
    store: Store, blob_fetcher: FakeBlobFetcher, root: Path, clock: Clock
) -> None:
    more = with_blobs(1001)
    await store.keep(more, APP, wanted=True)
    await store.add_pending(more.digest, APP.repository)
    completion = Completion(store, blob_fetcher, clock)
    completion.startService()
    await until(lambda: not pending(root))
    assert blob_fetcher.asked == []
    completion.stopService()


@on_reactor
async def test_image_that_is_due_again_does_not_wait_for_all_metadata(
    store: Store, blob_fetcher: FakeBlobFetcher, root: Path, clock: Clock
) -> None:
    fetcher = Fetcher(store, root)
    fetcher.add(A, B, C)
    plain = fetcher.fetch_manifest

    async def slow(image: object) -> None:
        clock.advance(20)
        await plain(image)  # type: ignore[arg-type]  # an ImageReference

    fetcher.fetch_manifest = slow  # type: ignore[method-assign]  # a slow upstream
    completion = Completion(store, blob_fetcher, clock, Metadata(store, fetcher, clock), CompletionPolicy())
    completion.startService()
    await pulled(completion, store)
    await until(lambda: blob_fetcher.asked)
    await store.keep(index_of((A, "linux/a"), (B, "linux/b"), (C, "linux/c")), image("reg.example/index:1"))
    await settle(store)
    await blob_fetcher.refuse(Unavailable("down"), 1)
    await until(lambda: len(blob_fetcher.asked) == 2)
    assert [name for name in fetcher.asked if name.isupper()] == ["A", "B"]
    assert pending(root) == [IMAGE.digest.hex]
    completion.stopService()


@on_reactor
async def test_indexes_within_indexes_are_followed_one_level(store: Store, root: Path, clock: Clock) -> None:
    fetcher = Fetcher(store, root)
    innermost = index_of((A, "linux/a"))
    inner = index_of((innermost, ""), (B, "linux/b"))
    fetcher.add(A, B, inner, innermost)
    completion = Completion(store, Upstream(root), clock, Metadata(store, fetcher, clock), CompletionPolicy())
    completion.startService()
    await store.keep(index_of((inner, "")), image("reg.example/index:1"))
    await until(lambda: "b" in fetcher.asked)
    await settle(store)
    assert fetcher.asked == [inner.digest, innermost.digest, "B", "b"]
    completion.stopService()


@on_reactor
async def test_image_that_one_upstream_refused_is_fetched_from_another(
    completion: Completion, store: Store, blob_fetcher: FakeBlobFetcher, clock: Clock, root: Path
) -> None:
    first, second = image("a.example/hostile:1"), image("b.example/good:1")
    await pulled(completion, store, where=str(first))
    await store.keep(IMAGE, second)
    for count in (1, 2, 3):
        await blob_fetcher.refuse(BlobUnknown("404"), count)
    await until(lambda: not pending(root))
    await settle(store)
    clock.advance(30)
    await until(lambda: len(blob_fetcher.asked) == 4)
    assert blob_fetcher.asked[-1][0] == second.repository


@on_reactor
async def test_image_that_waits_for_one_upstream_is_fetched_from_the_one_that_a_client_asks(
    completion: Completion, store: Store, blob_fetcher: FakeBlobFetcher
) -> None:
    first, second = image("a.example/down:1"), image("b.example/good:1")
    await pulled(completion, store, where=str(first))
    await blob_fetcher.refuse(Unavailable("down"), 1)
    await turn()
    await pulled(completion, store, where=str(second))
    await until(lambda: len(blob_fetcher.asked) == 2)
    assert blob_fetcher.asked[-1][0] == second.repository


@on_reactor
async def test_index_that_one_repository_lacks_is_completed_from_another(
    store: Store, root: Path, clock: Clock
) -> None:
    fetcher = Fetcher(store, root)
    plain = fetcher.fetch_manifest
    asked: list[str] = []

    async def fetch(image: ImageReference) -> None:
        asked.append(str(image.repository))
        if image.repository == first.repository:
            raise ManifestUnknown("404")
        await plain(image)

    fetcher.fetch_manifest = fetch  # type: ignore[method-assign]  # upstreams that differ
    fetcher.add(A, B, C)
    first, second = image("reg.example/a-hostile:1"), image("reg.example/good:1")
    completion = Completion(store, Upstream(root), clock, Metadata(store, fetcher, clock), CompletionPolicy())
    completion.startService()
    index = index_of((A, "linux/a"), (B, "linux/b"), (C, "linux/c"))
    await store.keep(index, first)
    await until(lambda: len(asked) == 3)
    await settle(store)
    # A client pulls the platform A from the other repository.
    await store.keep(index, second)
    await store.keep(A, ImageReference(second.repository, A.digest))
    await until(lambda: "c" in fetcher.asked)
    assert asked == [str(first.repository)] * 3 + [str(second.repository)] * 2
    completion.stopService()
