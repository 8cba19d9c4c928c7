"""Tags and referrers: from the upstream if it answers, else from the cache, and never a false empty list."""

from __future__ import annotations

import json

import pytest
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.logger import LogEvent, LogLevel

from ociregistry.context import FROM_CLIENT, Context, Via
from ociregistry.errors import Denied, LoopDetected, ManifestUnknown, NameUnknown, RegistryError, Unavailable
from ociregistry.manifests import OCI_INDEX, Manifest
from ociregistry.names import ImageReference, Tag
from ociregistry.pullthrough.listings import FoundReferrers, FoundTags, Listings
from ociregistry.pullthrough.waiting import CacheStatus
from ociregistry.store.store import Store
from ociregistry.upstream.paging import PageRequest, TagPage
from tests.images import make_artifact, make_image
from tests.unit.support.common import failed, fired, image, manifest, on_reactor, texts
from tests.unit.support.registries import MemoryRegistries

BUILT = make_image("listings")
IMAGE = manifest(BUILT)
APP = image("reg.example/team/app:1").repository
SUBJECT = IMAGE.digest


@pytest.fixture
def listings(store: Store, upstreams: MemoryRegistries, clock: Clock) -> Listings:
    """Return listings over the empty store."""
    return Listings(store, upstreams, clock)


def tags(listings: Listings, count: int | None = None, last: str = "", named: str = "") -> Deferred[FoundTags]:
    """Request tags."""
    return Deferred.fromCoroutine(listings.tags(APP, PageRequest(count, last, named)))


def referrers(listings: Listings, artifact_type: str = "") -> Deferred[FoundReferrers]:
    """Request the referrers of the image."""
    return Deferred.fromCoroutine(listings.referrers(APP, SUBJECT, artifact_type))


def page(*names: str, following: PageRequest | None = None) -> TagPage:
    """Return a page of tags."""
    return TagPage(tuple(map(Tag, names)), following)


def index(*kinds: str) -> Manifest:
    """Return an index of artifacts of these types."""
    entries = []
    for kind in kinds:
        made = make_artifact(kind, BUILT.manifest, artifact_type=kind).manifest
        entries.append(
            {"mediaType": made.media_type, "digest": made.digest, "size": len(made.data), "artifactType": kind}
        )
    document = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries}
    return Manifest.parse(json.dumps(document).encode(), OCI_INDEX)


def kinds(found: FoundReferrers) -> list[str]:
    """Return the artifact types that were found."""
    return [entry["artifactType"] for entry in json.loads(found.data)["manifests"]]


async def cached(store: Store, *names: str) -> None:
    """Store the image under these tags."""
    for name in names:
        await store.keep(IMAGE, ImageReference(APP, Tag(name)))


def test_tags_from_upstream(listings: Listings, upstreams: MemoryRegistries) -> None:
    asked = tags(listings, 2, "a")
    sent = page("b", "c", following=PageRequest(2, "c"))
    upstreams[0].answer(sent)
    assert fired(asked) == FoundTags(sent, CacheStatus.MISS)
    assert upstreams.asked == [f"tags {APP} last=a&n=2"]


@on_reactor
async def test_upstream_tags_replace_cached_ones(
    listings: Listings, upstreams: MemoryRegistries, store: Store
) -> None:
    await cached(store, "1", "2")
    asked = tags(listings)
    upstreams[0].answer(page("3"))
    assert await asked == FoundTags(page("3"), CacheStatus.MISS)


@pytest.mark.parametrize(
    ("count", "last", "expected"),
    [
        (None, "", page("1", "2", "3")),
        (2, "", page("1", "2", following=PageRequest(2, "2"))),
        (3, "", page("1", "2", "3")),
        (None, "1", page("2", "3")),
        (1, "1", page("2", following=PageRequest(1, "2"))),
        (5, "3", page()),
        (None, "15", page("2", "3")),
    ],
)
@on_reactor
async def test_cached_tags_when_upstream_is_unavailable(
    listings: Listings,
    upstreams: MemoryRegistries,
    store: Store,
    events: list[LogEvent],
    count: int | None,
    last: str,
    expected: TagPage,
) -> None:
    await cached(store, "2", "3", "1")
    asked = tags(listings, count, last)
    upstreams[0].refuse(Unavailable("down"))
    assert await asked == FoundTags(expected, CacheStatus.STALE)
    assert texts(events, LogLevel.warn) == ["listing the tags in the cache: down"]


def test_error_instead_of_empty_list_when_nothing_is_cached(listings: Listings, upstreams: MemoryRegistries) -> None:
    listed, referring = tags(listings), referrers(listings)
    for call in upstreams:
        call.refuse(Unavailable("down"))
    assert failed(listed, Unavailable).message == failed(referring, Unavailable).message == "down"


@pytest.mark.parametrize("error", [NameUnknown("not there"), ManifestUnknown("not there")])
@on_reactor
async def test_unknown_upstream_repository_is_unknown_even_if_cached(
    listings: Listings, upstreams: MemoryRegistries, store: Store, error: RegistryError
) -> None:
    await cached(store, "1")
    asked = tags(listings)
    upstreams[0].refuse(error)
    with pytest.raises(type(error)):
        await asked


def test_page_of_zero_tags_needs_no_request(listings: Listings, upstreams: MemoryRegistries) -> None:
    assert fired(tags(listings, 0)) == FoundTags(page(), CacheStatus.MISS)
    assert len(upstreams) == 0


@on_reactor
async def test_cache_continues_after_last_tag_of_upstream(
    listings: Listings, upstreams: MemoryRegistries, store: Store
) -> None:
    """The query by which the upstream names the page means nothing to the cache."""
    await cached(store, "1", "2", "3")
    asked = tags(listings, None, "2", "next_page=gAA")
    upstreams[0].refuse(Unavailable("down"))
    assert (await asked).page == page("3")
    assert upstreams.asked == [f"tags {APP} next_page=gAA"]


@on_reactor
async def test_listing_times_out_after_25_seconds(
    listings: Listings, upstreams: MemoryRegistries, store: Store, clock: Clock
) -> None:
    await cached(store, "1")
    asked = tags(listings)
    clock.advance(25)
    assert await asked == FoundTags(page("1"), CacheStatus.STALE)


@on_reactor
async def test_disallowed_upstream_is_denied(store: Store, clock: Clock) -> None:
    await cached(store, "1")
    listings = Listings(store, MemoryRegistries("else.example"), clock)
    for count in (None, 0):
        with pytest.raises(Denied):
            await tags(listings, count)
    with pytest.raises(Denied):
        await referrers(listings)


@on_reactor
async def test_upstream_referrers_are_passed_on_and_stored(listings: Listings, upstreams: MemoryRegistries) -> None:
    sent = index("application/sbom", "application/signature")
    asked = referrers(listings)
    upstreams[0].answer(sent)
    assert await asked == FoundReferrers(sent.data, CacheStatus.MISS)
    for artifact_type, expected in (
        ("", ["application/sbom", "application/signature"]),
        ("application/sbom", ["application/sbom"]),
        ("Application/SBOM", ["application/sbom"]),
        ("application/other", []),
    ):
        asked = referrers(listings, artifact_type)
        upstreams[-1].refuse(Unavailable("down"))
        found = await asked
        assert (kinds(found), found.cache_status) == (expected, CacheStatus.STALE)


@on_reactor
async def test_referrers_filtered_by_artifact_type(listings: Listings, upstreams: MemoryRegistries) -> None:
    asked = referrers(listings, "application/signature")
    upstreams[0].answer(index("application/sbom", "application/signature"))
    found = await asked
    assert kinds(found) == ["application/signature"]
    # The unfiltered list is requested and stored.
    assert upstreams.asked == [f"referrers {APP} {SUBJECT}"]
    asked = referrers(listings)
    upstreams[1].refuse(Unavailable("down"))
    assert len(kinds(await asked)) == 2


@on_reactor
async def test_empty_referrers_list_is_returned_but_not_stored(
    listings: Listings, upstreams: MemoryRegistries, store: Store
) -> None:
    asked = referrers(listings)
    upstreams[0].answer(index())
    found = await asked
    assert (kinds(found), found.cache_status) == ([], CacheStatus.MISS)
    assert store.counts.lists == 0


@on_reactor
async def test_stored_referrers_are_not_listed_as_a_tag(
    listings: Listings, upstreams: MemoryRegistries, store: Store
) -> None:
    """They are stored under a tag that the upstream does not have."""
    await cached(store, "1")
    asked = referrers(listings)
    upstreams[0].answer(index("application/sbom"))
    await asked
    listed = tags(listings)
    upstreams[1].refuse(Unavailable("down"))
    assert (await listed).page == page("1")


@on_reactor
async def test_null_is_an_empty_list_of_referrers(listings: Listings, upstreams: MemoryRegistries) -> None:
    """Programs in Go write an empty list as null."""
    sent = Manifest.parse(json.dumps({"schemaVersion": 2, "manifests": None}).encode(), OCI_INDEX)
    for artifact_type, expected in (("", None), ("application/sbom", [])):
        asked = referrers(listings, artifact_type)
        upstreams[-1].answer(sent)
        assert json.loads((await asked).data)["manifests"] == expected


@pytest.mark.parametrize("what", ["tags", "referrers"])
def test_cache_that_would_wait_for_itself_is_told(listings: Listings, upstreams: MemoryRegistries, what: str) -> None:
    """It joins a request that waits for it; that request goes on."""
    peer = Context(Via(("ociregistry-fedcba9876543210",)))
    pages = PageRequest(2, "a")

    def ask(context: Context) -> Deferred[object]:
        if what == "tags":
            return Deferred.fromCoroutine(listings.tags(APP, pages, context))
        return Deferred.fromCoroutine(listings.referrers(APP, SUBJECT, "", context))

    client, joined = ask(FROM_CLIENT), ask(peer)
    assert [call.kind for call in upstreams] == [what, "loops"]
    upstreams[1].answer(LoopDetected("reg.example: a loop", "1.1 ociregistry-fedcba9876543210"))
    failed(joined, LoopDetected)
    assert not client.called
    upstreams[0].answer(page("b") if what == "tags" else index())
    fired(client)
