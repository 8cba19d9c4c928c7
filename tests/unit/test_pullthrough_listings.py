"""Tags and referrers: the upstream's word while it can be had, else the cache's, and never a false empty one."""

from __future__ import annotations

import json

import pytest
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.logger import LogEvent, LogLevel

from ociregistry.errors import Denied, ManifestUnknown, NameUnknown, RegistryError, Unavailable
from ociregistry.manifests import OCI_INDEX, Manifest
from ociregistry.names import ImageReference, Tag
from ociregistry.pullthrough.listings import FoundReferrers, FoundTags, Listings
from ociregistry.store.store import Store
from ociregistry.upstream.registry import TagPage
from tests.images import make_artifact, make_image
from tests.unit.support.doubles import failed, fired, image, manifest, on_reactor, texts
from tests.unit.support.registries import MemoryRegistries

BUILT = make_image("listings")
IMAGE = manifest(BUILT)
APP = image("reg.example/team/app:1").repository
SUBJECT = IMAGE.digest


@pytest.fixture
def listings(store: Store, upstreams: MemoryRegistries, clock: Clock) -> Listings:
    """Listings over the empty store."""
    return Listings(store, upstreams, clock)


def tags(listings: Listings, count: int | None = None, last: str = "") -> Deferred[FoundTags]:
    """A client asks for tags."""
    return Deferred.fromCoroutine(listings.tags(APP, count, last))


def referrers(listings: Listings, artifact_type: str = "") -> Deferred[FoundReferrers]:
    """A client asks for what refers to the image."""
    return Deferred.fromCoroutine(listings.referrers(APP, SUBJECT, artifact_type))


def page(*names: str, more: bool = False) -> TagPage:
    """A page of tags."""
    return TagPage(tuple(map(Tag, names)), more)


def index(*kinds: str) -> Manifest:
    """An index of artifacts of these kinds."""
    entries = []
    for kind in kinds:
        made = make_artifact(kind, BUILT.manifest, artifact_type=kind).manifest
        entries.append(
            {"mediaType": made.media_type, "digest": made.digest, "size": len(made.data), "artifactType": kind}
        )
    document = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries}
    return Manifest.parse(json.dumps(document).encode(), OCI_INDEX)


def kinds(found: FoundReferrers) -> list[str]:
    """What kinds of artifacts were found."""
    return [entry["artifactType"] for entry in json.loads(found.data)["manifests"]]


async def cached(store: Store, *names: str) -> None:
    """The image has these tags in the cache."""
    for name in names:
        await store.keep(IMAGE, ImageReference(APP, Tag(name)))


def test_the_upstreams_tags(listings: Listings, upstreams: MemoryRegistries) -> None:
    asked = tags(listings, 2, "a")
    upstreams[0].answer(page("b", "c", more=True))
    assert fired(asked) == FoundTags(page("b", "c", more=True), hit=False)
    assert upstreams.asked == [f"tags {APP} 2 a"]


@on_reactor
async def test_the_upstreams_word_counts_even_if_it_has_less(
    listings: Listings, upstreams: MemoryRegistries, store: Store
) -> None:
    await cached(store, "1", "2")
    asked = tags(listings)
    upstreams[0].answer(page("3"))
    assert await asked == FoundTags(page("3"), hit=False)


@pytest.mark.parametrize(
    ("count", "last", "expected"),
    [
        (None, "", page("1", "2", "3")),
        (2, "", page("1", "2", more=True)),
        (3, "", page("1", "2", "3")),
        (None, "1", page("2", "3")),
        (1, "1", page("2", more=True)),
        (5, "3", page()),
        (None, "15", page("2", "3")),
    ],
)
@on_reactor
async def test_the_tags_in_the_cache_when_the_upstream_is_down(
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
    assert await asked == FoundTags(expected, hit=True)
    assert texts(events, LogLevel.warn) == ["listing the tags in the cache: down"]


def test_no_empty_list_for_want_of_an_answer(listings: Listings, upstreams: MemoryRegistries) -> None:
    listed, referring = tags(listings), referrers(listings)
    for call in upstreams:
        call.refuse(Unavailable("down"))
    assert failed(listed, Unavailable).message == failed(referring, Unavailable).message == "down"


@pytest.mark.parametrize("error", [NameUnknown("not there"), ManifestUnknown("not there")])
@on_reactor
async def test_what_the_upstream_does_not_have_is_unknown_whatever_is_cached(
    listings: Listings, upstreams: MemoryRegistries, store: Store, error: RegistryError
) -> None:
    await cached(store, "1")
    asked = tags(listings)
    upstreams[0].refuse(error)
    with pytest.raises(type(error)):
        await asked


def test_no_tags_are_no_question(listings: Listings, upstreams: MemoryRegistries) -> None:
    assert fired(tags(listings, 0)) == FoundTags(page(), hit=False)
    assert len(upstreams) == 0


@on_reactor
async def test_the_upstream_has_25_seconds(
    listings: Listings, upstreams: MemoryRegistries, store: Store, clock: Clock
) -> None:
    await cached(store, "1")
    asked = tags(listings)
    clock.advance(25)
    assert await asked == FoundTags(page("1"), hit=True)


@on_reactor
async def test_who_is_not_allowed_gets_no_list(store: Store, clock: Clock) -> None:
    await cached(store, "1")
    listings = Listings(store, MemoryRegistries("else.example"), clock)
    for count in (None, 0):
        with pytest.raises(Denied):
            await tags(listings, count)
    with pytest.raises(Denied):
        await referrers(listings)


@on_reactor
async def test_the_upstreams_referrers_are_sent_as_they_are_and_kept(
    listings: Listings, upstreams: MemoryRegistries
) -> None:
    sent = index("application/sbom", "application/signature")
    asked = referrers(listings)
    upstreams[0].answer(sent)
    assert await asked == FoundReferrers(sent.data, hit=False)
    for artifact_type, expected in (
        ("", ["application/sbom", "application/signature"]),
        ("application/sbom", ["application/sbom"]),
        ("application/other", []),
    ):
        asked = referrers(listings, artifact_type)
        upstreams[-1].refuse(Unavailable("down"))
        found = await asked
        assert (kinds(found), found.hit) == (expected, True)


@on_reactor
async def test_referrers_of_one_kind(listings: Listings, upstreams: MemoryRegistries) -> None:
    asked = referrers(listings, "application/signature")
    upstreams[0].answer(index("application/sbom", "application/signature"))
    found = await asked
    assert kinds(found) == ["application/signature"]
    # The whole is asked for and kept, whatever part of it is wanted.
    assert upstreams.asked == [f"referrers {APP} {SUBJECT}"]
    asked = referrers(listings)
    upstreams[1].refuse(Unavailable("down"))
    assert len(kinds(await asked)) == 2


@on_reactor
async def test_an_empty_list_is_the_upstreams_word_but_not_worth_keeping(
    listings: Listings, upstreams: MemoryRegistries, store: Store
) -> None:
    asked = referrers(listings)
    upstreams[0].answer(index())
    found = await asked
    assert (kinds(found), found.hit) == ([], False)
    assert store.counts.lists == 0


@on_reactor
async def test_what_is_kept_of_referrers_is_no_tag_of_the_upstreams(
    listings: Listings, upstreams: MemoryRegistries, store: Store
) -> None:
    """It is kept under a tag that the upstream does not have."""
    await cached(store, "1")
    asked = referrers(listings)
    upstreams[0].answer(index("application/sbom"))
    await asked
    listed = tags(listings)
    upstreams[1].refuse(Unavailable("down"))
    assert (await listed).page == page("1")
