"""Blobs from mirrors that send wrong bytes, or none: this is reported, and the next source is asked."""

from __future__ import annotations

from pathlib import Path

import pytest
from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionLost
from twisted.internet.task import Clock

from ociregistry.pullthrough.cache import PullThrough
from ociregistry.store.store import Store
from tests.unit.support.common import manifest, on_reactor, until
from tests.unit.support.registries import MemoryRegistries, ReportedSource, downloads_ended
from tests.unit.test_pullthrough_download import APP, BUILT, DATA, DIGEST, SIZE, blobs, failure, get, read_all
from tests.unit.test_pullthrough_download_resume import ASKED, again, leave

WRONG = b"\0" + DATA[1:]


@pytest.fixture
def mirror() -> ReportedSource:
    """Return a source after which there are others."""
    return ReportedSource(others=True)


@pytest.fixture
def own() -> ReportedSource:
    """Return the registry itself as a source."""
    return ReportedSource()


@pytest.mark.parametrize("why", [ConnectionLost(), None])
@pytest.mark.parametrize("size", [SIZE, None])
@on_reactor
async def test_next_source_is_asked_at_once_after_empty_body(
    cache: PullThrough,
    upstreams: MemoryRegistries,
    store: Store,
    clock: Clock,
    mirror: ReportedSource,
    own: ReportedSource,
    size: int | None,
    why: Exception | None,
) -> None:
    """A pull-through cache sent such bodies (containerd/containerd#9552, distribution/distribution#4191)."""
    await store.keep(manifest(BUILT), APP)
    asked = get(cache)
    await until(lambda: upstreams.calls)
    upstreams[0].stream(size, source=mirror).end(why)
    content = (await asked).content
    await again(upstreams, clock, 2)
    upstreams[1].stream(SIZE, source=own).send(DATA).end()
    assert await read_all(content) == DATA
    content.close()
    assert (len(mirror.reports), own.reports) == (1, [])


@on_reactor
async def test_empty_body_on_resume_keeps_partial(
    cache: PullThrough, upstreams: MemoryRegistries, store: Store, clock: Clock, mirror: ReportedSource
) -> None:
    await leave(store, DATA[:5000])
    asked = get(cache)
    await again(upstreams, clock, 1)
    upstreams[0].stream(SIZE, 5000, mirror).end()
    content = (await asked).content
    await again(upstreams, clock, 2)
    assert upstreams.asked == [f"{ASKED} from 5000"] * 2
    upstreams[1].stream(SIZE, 5000).send(DATA[5000:]).end()
    assert await read_all(content) == DATA
    content.close()
    assert len(mirror.reports) == 1


@on_reactor
async def test_connection_lost_after_progress_is_not_reported(
    cache: PullThrough, upstreams: MemoryRegistries, clock: Clock, mirror: ReportedSource
) -> None:
    asked = get(cache)
    await again(upstreams, clock, 1)
    upstreams[0].stream(SIZE, source=mirror).send(DATA[:1000]).end(ConnectionLost())
    content = (await asked).content
    await again(upstreams, clock, 2)
    upstreams[1].stream(SIZE, 1000, mirror).send(DATA[1000:]).end()
    assert await read_all(content) == DATA
    content.close()
    assert mirror.reports == []


@pytest.mark.parametrize("told", [SIZE + 1, SIZE - 1, 0])
@on_reactor
async def test_next_source_is_asked_after_wrong_size(
    cache: PullThrough, upstreams: MemoryRegistries, store: Store, clock: Clock, mirror: ReportedSource, told: int
) -> None:
    """It is so for the first response and on a resume, which keeps the partial."""
    await store.keep(manifest(BUILT), APP)
    asked = get(cache)
    await again(upstreams, clock, 1)
    refused = upstreams[0].stream(told, source=mirror)
    await again(upstreams, clock, 2)
    assert refused.connection.closed
    upstreams[1].stream(SIZE, source=mirror).send(DATA[:1000]).end(ConnectionLost())
    content = (await asked).content
    await again(upstreams, clock, 3)
    upstreams[2].stream(told, 1000, mirror)
    await again(upstreams, clock, 4)
    assert upstreams.asked == [ASKED, ASKED, f"{ASKED} from 1000", f"{ASKED} from 1000"]
    upstreams[3].stream(SIZE, 1000).send(DATA[1000:]).end()
    assert await read_all(content) == DATA
    content.close()
    assert len(mirror.reports) == 2
    assert all(f"has {told} bytes, expected {SIZE}" in why for why in mirror.reports)


@pytest.mark.parametrize("sent", [WRONG, WRONG + b"more"], ids=["wrong", "too_much"])
@on_reactor
async def test_blob_is_downloaded_again_after_wrong_bytes_of_mirror(
    cache: PullThrough,
    upstreams: MemoryRegistries,
    store: Store,
    clock: Clock,
    mirror: ReportedSource,
    root: Path,
    sent: bytes,
) -> None:
    """The client that got them gets no last byte; a later one gets the right bytes."""
    await store.keep(manifest(BUILT), APP)
    asked = get(cache)
    await again(upstreams, clock, 1)
    upstreams[0].stream(None, source=mirror).send(sent).end()
    content = (await asked).content
    await failure(content, SIZE - 1)
    content.close()
    assert len(mirror.reports) == 1
    await again(upstreams, clock, 2)
    assert upstreams.asked == [ASKED] * 2
    upstreams[1].stream(SIZE).send(DATA).end()
    await downloads_ended(cache)
    assert blobs(root) == [DATA]


@pytest.mark.parametrize("size", [0, None])
@on_reactor
async def test_empty_body_for_blob_of_unknown_size_is_reported(
    cache: PullThrough, upstreams: MemoryRegistries, clock: Clock, mirror: ReportedSource, size: int | None
) -> None:
    """The client has no headers yet, and gets the blob from the next source."""
    asked = get(cache)
    await again(upstreams, clock, 1)
    upstreams[0].stream(size, source=mirror).end()
    await again(upstreams, clock, 2)
    upstreams[1].stream(SIZE).send(DATA).end()
    content = (await asked).content
    assert await read_all(content) == DATA
    content.close()
    assert len(mirror.reports) == 1


@on_reactor
async def test_mismatch_is_reported_to_every_source_of_bytes(
    cache: PullThrough, upstreams: MemoryRegistries, clock: Clock, own: ReportedSource
) -> None:
    mirrors = [ReportedSource(others=True) for _ in range(3)]
    asked = get(cache)
    await again(upstreams, clock, 1)
    upstreams[0].stream(SIZE, source=mirrors[0]).send(WRONG[:1000]).end(ConnectionLost())
    content = (await asked).content
    await again(upstreams, clock, 2)
    upstreams[1].stream(SIZE, 1000, mirrors[1]).send(WRONG[1000:2000]).end(ConnectionLost())
    await again(upstreams, clock, 3)
    upstreams[2].stream(SIZE, 2000, own).send(WRONG[2000:]).end()
    await failure(content, SIZE - 1)
    content.close()
    assert [len(source.reports) for source in (*mirrors, own)] == [1, 1, 0, 1]
    await again(upstreams, clock, 4)
    upstreams[3].stream(SIZE).send(DATA).end()
    await downloads_ended(cache)


@on_reactor
async def test_blob_is_not_downloaded_again_after_wrong_bytes_of_registry(
    cache: PullThrough, upstreams: MemoryRegistries, clock: Clock, own: ReportedSource
) -> None:
    asked = get(cache)
    await again(upstreams, clock, 1)
    upstreams[0].stream(SIZE, source=own).send(WRONG).end()
    content = (await asked).content
    await failure(content, SIZE - 1)
    content.close()
    await downloads_ended(cache)
    assert (len(upstreams), len(own.reports)) == (1, 1)


@on_reactor
async def test_fetch_asks_source_after_source(
    cache: PullThrough, upstreams: MemoryRegistries, clock: Clock, root: Path
) -> None:
    fetching = Deferred.fromCoroutine(cache.fetch(APP.repository, DIGEST))
    for count in (1, 2, 3):
        await again(upstreams, clock, count)
        upstreams[-1].stream(SIZE, source=ReportedSource(others=True)).send(WRONG).end()
    await again(upstreams, clock, 4)
    upstreams[-1].stream(SIZE).send(DATA).end()
    await fetching
    assert blobs(root) == [DATA]


@on_reactor
async def test_bytes_of_registry_before_wrong_bytes_of_mirror_are_kept(
    cache: PullThrough,
    upstreams: MemoryRegistries,
    clock: Clock,
    mirror: ReportedSource,
    own: ReportedSource,
    root: Path,
) -> None:
    fetching = Deferred.fromCoroutine(cache.fetch(APP.repository, DIGEST))
    await again(upstreams, clock, 1)
    upstreams[0].stream(SIZE, source=own).send(DATA[:1000]).end(ConnectionLost())
    await again(upstreams, clock, 2)
    upstreams[1].stream(SIZE, 1000, mirror).send(WRONG[:1000]).end(ConnectionLost())
    await again(upstreams, clock, 3)
    upstreams[2].stream(SIZE, 2000, mirror).send(DATA[2000:]).end()
    await again(upstreams, clock, 4)
    assert upstreams.asked[-1] == f"{ASKED} from 1000"
    upstreams[3].stream(SIZE, 1000, own).send(DATA[1000:]).end()
    await fetching
    assert blobs(root) == [DATA]


@pytest.mark.parametrize(("mirrored", "kept"), [(False, " from 5000"), (True, "")], ids=["registry", "mirror"])
@on_reactor
async def test_bytes_of_registry_in_earlier_process_are_kept(
    cache: PullThrough,
    upstreams: MemoryRegistries,
    store: Store,
    clock: Clock,
    mirror: ReportedSource,
    root: Path,
    mirrored: bool,
    kept: str,
) -> None:
    await leave(store, DATA[:5000], mirrored=mirrored)
    fetching = Deferred.fromCoroutine(cache.fetch(APP.repository, DIGEST))
    await again(upstreams, clock, 1)
    upstreams[0].stream(SIZE, 5000, mirror).send(bytes(SIZE - 5000)).end()
    await again(upstreams, clock, 2)
    assert upstreams.asked == [f"{ASKED} from 5000", f"{ASKED}{kept}"]
    start = 5000 if kept else 0
    upstreams[1].stream(SIZE, start).send(DATA[start:]).end()
    await fetching
    assert blobs(root) == [DATA]


@on_reactor
async def test_wrong_bytes_before_those_of_mirror_are_discarded_at_last(
    cache: PullThrough, upstreams: MemoryRegistries, store: Store, clock: Clock, mirror: ReportedSource, root: Path
) -> None:
    """The mirror is blamed first, then the bytes before."""
    await leave(store, WRONG[:5000])
    fetching = Deferred.fromCoroutine(cache.fetch(APP.repository, DIGEST))
    for count, source in ((1, mirror), (2, ReportedSource())):
        await again(upstreams, clock, count)
        assert upstreams.asked[-1] == f"{ASKED} from 5000"
        upstreams[-1].stream(SIZE, 5000, source).send(DATA[5000:]).end()
    await again(upstreams, clock, 3)
    assert upstreams.asked[-1] == ASKED
    upstreams[-1].stream(SIZE).send(DATA).end()
    await fetching
    assert blobs(root) == [DATA]


@on_reactor
async def test_registry_does_not_continue_bytes_of_bad_mirror(
    cache: PullThrough, upstreams: MemoryRegistries, store: Store, clock: Clock, own: ReportedSource, root: Path
) -> None:
    """What it sends after them would be lost."""
    await leave(store, WRONG[:5000], mirrored=True)
    own.distrusts_mirrors = True
    fetching = Deferred.fromCoroutine(cache.fetch(APP.repository, DIGEST))
    await again(upstreams, clock, 1)
    refused = upstreams[0].stream(SIZE, 5000, own)
    await again(upstreams, clock, 2)
    assert refused.connection.closed
    assert upstreams.asked == [f"{ASKED} from 5000", ASKED]
    upstreams[1].stream(SIZE, source=own).send(DATA).end()
    await fetching
    assert blobs(root) == [DATA]
