"""Fetching metadata of indexes: order, pauses and retries by upstream."""

from __future__ import annotations

from pathlib import Path

import pytest
from twisted.internet.task import Clock
from twisted.logger import LogEvent, LogLevel

from ociregistry.errors import BlobUnknown, Denied, ManifestUnknown, RegistryError, Unavailable
from ociregistry.manifests import Manifest
from ociregistry.names import Digest, ImageReference, Repository, Upstream
from ociregistry.pullthrough.metadata import Metadata
from ociregistry.store.store import Store
from ociregistry.upstream.breaker import LinkDown
from tests.unit.support.common import image, on_reactor, record, texts
from tests.unit.support.fetchers import CONFIGS, NAMES, A, B, C, D, Fetcher, platform
from tests.unit.support.loads import image_of, index_of, settle

HOST, OTHER = Upstream("reg.example"), Upstream("else.example")
APP, NEXT, ELSEWHERE = (
    image(f"{at}:1").repository for at in ("reg.example/app", "reg.example/next", "else.example/a")
)


@pytest.fixture
def fetcher(store: Store, root: Path) -> Fetcher:
    """Return upstreams that have all platforms."""
    fetcher = Fetcher(store, root)
    fetcher.add(A, B, C, D)
    return fetcher


@pytest.fixture
def metadata(store: Store, fetcher: Fetcher, clock: Clock) -> Metadata:
    """Return a metadata service without indexes."""
    return Metadata(store, fetcher, clock)


def of(*platforms: Manifest) -> Manifest:
    """Return an index of images."""
    return index_of(*((one, f"linux/{NAMES.get(one.digest, 'x').lower()}") for one in platforms))


async def queue_missing(metadata: Metadata, index: Manifest, repository: Repository = APP, **how: object) -> None:
    """Queue the missing metadata of an index."""
    await metadata.queue_missing(index.digest, repository, index.children, **how)  # type: ignore[arg-type]  # `first`


async def fetch_all(metadata: Metadata, upstream: Upstream = HOST) -> float | None:
    """Fetch until an error or the end; return the seconds to wait, or None at the end."""
    while (wait := await metadata.fetch_next(upstream)) == 0:
        pass
    return wait


@on_reactor
async def test_manifests_and_configs_are_fetched_one_at_a_time(
    metadata: Metadata, fetcher: Fetcher, store: Store
) -> None:
    index = of(A, B)
    await queue_missing(metadata, index)
    assert (metadata.incomplete, metadata.upstreams) == (1, [HOST])
    assert await metadata.fetch_next(HOST) == 0
    assert (fetcher.asked, metadata.incomplete) == (["A", "a"], 1)
    assert await fetch_all(metadata) is None
    assert (fetcher.asked, metadata.incomplete, metadata.upstreams) == (["A", "a", "B", "b"], 0, [])
    assert [store.entry(one.digest).wanted for one in (A, B)] == [False, False]  # type: ignore[union-attr]  # exists
    # Everything is present now, so registering it again adds nothing.
    await queue_missing(metadata, index)
    assert (metadata.incomplete, await metadata.fetch_next(HOST)) == (0, None)


@on_reactor
async def test_indexes_of_one_upstream_alternate(metadata: Metadata, fetcher: Fetcher) -> None:
    await queue_missing(metadata, of(A, B))
    await queue_missing(metadata, of(C, D), NEXT)
    assert metadata.incomplete == 2
    await fetch_all(metadata)
    assert fetcher.asked == ["A", "a", "C", "c", "B", "b", "D", "d"]


@on_reactor
async def test_preferred_manifests_come_first(metadata: Metadata, fetcher: Fetcher) -> None:
    await queue_missing(metadata, of(A, B, C), first={C.digest})
    await fetch_all(metadata)
    assert fetcher.asked == ["C", "c", "A", "a", "B", "b"]


@on_reactor
async def test_missing_config_alone_is_fetched(
    metadata: Metadata, fetcher: Fetcher, store: Store, root: Path
) -> None:
    await store.keep(A, ImageReference(APP, A.digest), wanted=False)
    await store.keep(B, ImageReference(APP, B.digest), wanted=False)
    (root / "blobs" / Digest.of(b"config of B").hex).write_bytes(b"config of B")
    await queue_missing(metadata, of(A, B))
    assert await fetch_all(metadata) is None
    assert fetcher.asked == ["a"]


@on_reactor
async def test_layers_and_oversized_configs_are_not_fetched(metadata: Metadata, fetcher: Fetcher) -> None:
    document = A.data.replace(b'"size": 11', b'"size": 9000000', 1)
    large = Manifest.parse(document, A.media_type)
    assert large.config is not None
    assert large.config.size == 9_000_000
    fetcher.add(large)
    await queue_missing(metadata, index_of((large, "linux/large")))
    assert await fetch_all(metadata) is None
    assert fetcher.asked == [large.digest]


@on_reactor
async def test_nested_index_is_fetched_without_its_children(
    metadata: Metadata, fetcher: Fetcher, store: Store
) -> None:
    inner = of(A)
    fetcher.add(inner)
    await queue_missing(metadata, index_of((inner, "")))
    assert await fetch_all(metadata) is None
    assert (fetcher.asked, store.counts.lists) == ([inner.digest], 1)


@on_reactor
async def test_unknown_media_types_are_skipped(metadata: Metadata, fetcher: Fetcher) -> None:
    data = of(A, B).data.replace(A.media_type.encode(), b"application/vnd.example.other", 2)
    index = Manifest.parse(data.replace(b"application/vnd.example.other", A.media_type.encode(), 1), of(A).media_type)
    assert len({child.media_type for child in index.children}) == 2
    await queue_missing(metadata, index)
    await fetch_all(metadata)
    assert len(fetcher.asked) == 2


@on_reactor
async def test_only_first_200_manifests_of_a_huge_index_are_fetched(metadata: Metadata, fetcher: Fetcher) -> None:
    many = [image_of(b"config %d" % number, b"layer %d" % number) for number in range(230)]
    fetcher.add(*many)
    await queue_missing(metadata, index_of(*((one, f"linux/p{number}") for number, one in enumerate(many))))
    assert await fetch_all(metadata) is None
    assert [digest for digest in fetcher.asked if digest not in CONFIGS][::2] == [one.digest for one in many[:200]]


# Unavailable metadata


@pytest.mark.parametrize("error", [ManifestUnknown("404"), Denied("not allowed")])
@on_reactor
async def test_unknown_manifest_is_no_failure(
    metadata: Metadata, fetcher: Fetcher, clock: Clock, events: list[LogEvent], error: RegistryError
) -> None:
    index = of(A, B, C)
    fetcher.errors[B.digest] = [error]
    await queue_missing(metadata, index)
    assert await fetch_all(metadata) is None
    assert fetcher.asked == ["A", "a", "B", "C", "c"]
    assert (metadata.incomplete, texts(events, LogLevel.warn), texts(events, LogLevel.error)) == (0, [], [])
    # It is requested again after an hour.
    fetcher.asked.clear()
    clock.advance(3599)
    await queue_missing(metadata, index)
    assert (await fetch_all(metadata), fetcher.asked) == (None, [])
    clock.advance(1)
    await queue_missing(metadata, index)
    assert (await fetch_all(metadata), fetcher.asked) == (None, ["B", "b"])


@on_reactor
async def test_unknown_config_is_no_failure(metadata: Metadata, fetcher: Fetcher) -> None:
    index = of(A, B)
    fetcher.errors[Digest.of(b"config of A")] = [BlobUnknown("404")]
    await queue_missing(metadata, index)
    assert await fetch_all(metadata) is None
    await queue_missing(metadata, index)
    assert (await fetch_all(metadata), fetcher.asked) == (None, ["A", "a", "B", "b"])


@on_reactor
async def test_no_more_of_an_index_is_requested_after_three_unknown_manifests(
    metadata: Metadata, fetcher: Fetcher, clock: Clock
) -> None:
    absent = [platform(f"absent {number}") for number in range(100)]
    index, other = of(*absent, A), of(B)
    await queue_missing(metadata, index)
    await queue_missing(metadata, other)
    assert await fetch_all(metadata) is None
    assert fetcher.asked == [absent[0].digest, "B", "b", absent[1].digest, absent[2].digest]
    assert metadata.incomplete == 0
    fetcher.asked.clear()
    clock.advance(3599)
    await queue_missing(metadata, index)
    assert (await fetch_all(metadata), fetcher.asked) == (None, [])
    clock.advance(1)
    await queue_missing(metadata, index)
    assert (await fetch_all(metadata), len(fetcher.asked)) == (None, 3)


@on_reactor
async def test_manifest_unknown_in_one_repository_is_requested_from_another(
    metadata: Metadata, fetcher: Fetcher
) -> None:
    fetcher.errors[A.digest] = [ManifestUnknown("404")]
    await queue_missing(metadata, of(A, B))
    await queue_missing(metadata, of(A, C), NEXT)
    assert await fetch_all(metadata) is None
    assert sorted(fetcher.asked) == ["A", "A", "B", "C", "a", "b", "c"]


# Failures


@on_reactor
async def test_rate_limit_pauses_only_this_upstream(metadata: Metadata, fetcher: Fetcher, clock: Clock) -> None:
    fetcher.errors[B.digest] = [Unavailable("reg.example answered 429", retry_after=600)]
    await queue_missing(metadata, of(A, B, C))
    await queue_missing(metadata, of(D), ELSEWHERE)
    assert await fetch_all(metadata) == 600
    assert (fetcher.asked, metadata.error(HOST), metadata.error(OTHER)) == (
        ["A", "a", "B"],
        "reg.example answered 429",
        "",
    )
    assert await fetch_all(metadata, OTHER) is None
    assert fetcher.asked[3:] == ["D", "d"]
    clock.advance(599)
    assert await fetch_all(metadata) == 1
    assert len(fetcher.asked) == 5
    clock.advance(1)
    assert await fetch_all(metadata) is None
    # The failed one comes last.
    assert fetcher.asked[5:] == ["C", "c", "B", "b"]
    assert metadata.error(HOST) == ""


@on_reactor
async def test_waits_double_up_to_five_minutes_and_reset_on_success(
    metadata: Metadata, fetcher: Fetcher, clock: Clock
) -> None:
    fetcher.errors[A.digest] = [Unavailable("reg.example answered 500")] * 6
    await queue_missing(metadata, of(A))
    waits = []
    while (wait := await fetch_all(metadata)) is not None:
        waits.append(wait)
        clock.advance(wait)
    assert waits == [30, 60, 120, 240, 300, 300]
    fetcher.errors[B.digest] = [Unavailable("reg.example answered 500")]
    await queue_missing(metadata, of(B))
    assert await fetch_all(metadata) == 30


@on_reactor
async def test_manifest_failing_ten_times_is_skipped_for_an_hour(
    metadata: Metadata, fetcher: Fetcher, clock: Clock
) -> None:
    index = of(A, B)
    fetcher.errors[A.digest] = [Unavailable("reg.example answered 500")] * 100
    await queue_missing(metadata, index)
    while (wait := await fetch_all(metadata)) is not None:
        clock.advance(wait)
    assert (fetcher.asked.count("A"), fetcher.asked.count("b"), metadata.incomplete) == (10, 1, 0)
    await queue_missing(metadata, index)
    assert (await fetch_all(metadata), fetcher.asked.count("A")) == (None, 10)
    clock.advance(3600)
    await queue_missing(metadata, index)
    assert (await fetch_all(metadata), fetcher.asked.count("A")) == (300, 11)


@on_reactor
async def test_nothing_is_given_up_while_the_circuit_breaker_is_open(
    metadata: Metadata, fetcher: Fetcher, clock: Clock
) -> None:
    fetcher.errors[A.digest] = [LinkDown("no route to reg.example", 5)] * 30
    await queue_missing(metadata, of(A, B))
    waits = []
    while (wait := await fetch_all(metadata)) is not None:
        assert metadata.incomplete == 1
        waits.append(wait)
        clock.advance(wait)
    assert len(waits) == 30
    assert fetcher.asked[-2:] == ["A", "a"]


@on_reactor
async def test_index_registered_again_is_kept_once(metadata: Metadata, fetcher: Fetcher, clock: Clock) -> None:
    index = of(A, B)
    for _ in range(3):
        await queue_missing(metadata, index)
    assert metadata.incomplete == 1
    fetcher.errors[A.digest] = [Unavailable("down")]
    assert await metadata.fetch_next(HOST) == 30
    await queue_missing(metadata, index)
    assert metadata.incomplete == 1
    clock.advance(30)
    assert await fetch_all(metadata) is None
    assert fetcher.asked == ["A", "A", "a", "B", "b"]


@on_reactor
async def test_index_completed_meanwhile_is_dropped(
    metadata: Metadata, fetcher: Fetcher, store: Store, root: Path
) -> None:
    await queue_missing(metadata, of(A))
    await store.keep(A, ImageReference(APP, A.digest))
    (root / "blobs" / Digest.of(b"config of A").hex).write_bytes(b"config of A")
    await queue_missing(metadata, of(A))
    assert (metadata.incomplete, await fetch_all(metadata), fetcher.asked) == (0, None, [])


@on_reactor
async def test_failure_during_registration_is_not_retried_twice(
    metadata: Metadata, fetcher: Fetcher, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    absent = platform("absent")
    index = index_of((A, "linux/a"), (absent, "linux/absent"))

    async def look_and_fail(image: ImageReference) -> None:
        await queue_missing(metadata, index)
        raise Unavailable("down")

    await queue_missing(metadata, index, first={absent.digest})
    with monkeypatch.context() as patch:
        patch.setattr(fetcher, "fetch_manifest", look_and_fail)
        assert await metadata.fetch_next(HOST) == 30
    clock.advance(30)
    assert await fetch_all(metadata) is None
    assert fetcher.asked.count(absent.digest) == 1


@on_reactor
async def test_success_resets_the_failure_count(
    metadata: Metadata, fetcher: Fetcher, store: Store, root: Path, clock: Clock
) -> None:
    for _ in range(2):
        fetcher.errors[A.digest] = [Unavailable("down")] * 9
        await queue_missing(metadata, of(A))
        while (wait := await fetch_all(metadata)) is not None:
            clock.advance(wait)
        assert store.entry(A.digest) is not None
        record(root, A.digest).unlink()
        clock.advance(1)
        await settle(store)
        assert store.entry(A.digest) is None


# Bounds


@on_reactor
async def test_oldest_of_too_many_unavailable_manifests_is_requested_again(
    store: Store, fetcher: Fetcher, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ociregistry.pullthrough.metadata._MOST_UNKNOWN", 1)
    metadata = Metadata(store, fetcher, clock)
    index = of(A, B)
    for child in (A, B):
        fetcher.errors[child.digest] = [ManifestUnknown("404")]
    await queue_missing(metadata, index)
    assert (await fetch_all(metadata), fetcher.asked) == (None, ["A", "B"])
    fetcher.asked.clear()
    await queue_missing(metadata, index)
    assert (await fetch_all(metadata), fetcher.asked) == (None, ["A", "a"])


@on_reactor
async def test_failures_of_the_oldest_of_too_many_manifests_are_forgotten(
    store: Store, fetcher: Fetcher, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ociregistry.pullthrough.metadata._MOST_UNKNOWN", 2)
    monkeypatch.setattr("ociregistry.pullthrough.metadata._MOST_FAILURES", 3)
    metadata = Metadata(store, fetcher, clock)
    third = image("third.example/app:1").repository
    for child, repository in ((A, APP), (B, ELSEWHERE), (C, third)):
        fetcher.errors[child.digest] = [Unavailable("500")] * 10
        await queue_missing(metadata, of(child), repository)
    for upstream in (HOST, OTHER, HOST, third.upstream, HOST):
        await metadata.fetch_next(upstream)
        clock.advance(300)
    # A has failed three times and is skipped.
    assert set(metadata.upstreams) == {OTHER, third.upstream}
