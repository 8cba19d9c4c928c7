"""The index in memory: names, tags and blob sizes follow the latest records."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from ociregistry.names import Digest, ImageReference, Repository
from ociregistry.store.index import Entry, Index
from ociregistry.store.records import Dates, Record
from tests.images import make_image, make_index
from tests.unit.support.common import HUB, image, manifest
from tests.unit.support.stores import calls_of

START = datetime(2026, 1, 1, tzinfo=UTC)
A, B, C = (Digest.of(name.encode()) for name in "abc")
LAYER, OTHER = Digest.of(b"layer"), Digest.of(b"other")


def repository(name: str) -> Repository:
    """Return the repository of a name."""
    return Repository.parse(name, HUB)


def entry(images: Mapping[str, int], blobs: Mapping[Digest, int] | None = None, *, is_list: bool = False) -> Entry:
    """Return an entry whose image URLs were confirmed this many seconds after the start."""
    times = {url: START + timedelta(seconds=at) for url, at in images.items()}
    return Entry(is_list, {url: Dates(at, at) for url, at in times.items()}, blobs or {})


def test_entry_of_a_record() -> None:
    built = make_image("indexed")
    url = "quay.io/app:1"
    record = Record(manifest(built), {}).confirm(image(url), START)
    made = Entry.of(record)
    sizes = {Digest(blob.digest): len(blob.data) for blob in built.blobs}
    dates = {url: Dates(START, START)}
    assert made == Entry(False, dates, sizes, manifest(built).config, media_type=manifest(built).media_type)
    assert made.layers == {Digest(layer.digest) for layer in built.layers}
    listed = manifest(make_index("indexed"))
    assert Entry.of(Record(listed, {})) == Entry(True, {}, {}, children=listed.children, media_type=listed.media_type)
    assert not Entry.of(Record(listed, {})).layers


def test_entry_repositories() -> None:
    made = entry({"quay.io/team/app:1": 0, f"docker.io/library/nginx@{A}": 0})
    assert made.known_in(repository("quay.io/team/app"))
    assert made.known_in(repository("nginx"))
    for name in ("quay.io/team", "quay.io/team/apps", "quay.io/team/ap", "docker.io/team/app"):
        assert not made.known_in(repository(name))


def test_tag_resolves_to_latest_confirmation() -> None:
    index = Index()
    tag = image("quay.io/app:latest")
    assert index.resolve(tag) is None
    index.put(A, entry({str(tag): 1}))
    assert index.resolve(tag) == A
    index.put(B, entry({str(tag): 3}))
    index.put(C, entry({str(tag): 2}))
    assert index.resolve(tag) == B
    index.drop(B)
    assert index.resolve(tag) == C
    index.put(A, entry({str(tag): 9}))
    assert index.resolve(tag) == A


def test_tie_of_confirmations_is_independent_of_order() -> None:
    tag = image("quay.io/app:latest")
    meant = set()
    for order in ((A, B, C), (C, B, A), (B, C, A)):
        index = Index()
        for digest in order:
            index.put(digest, entry({str(tag): 1}))
        meant.add(index.resolve(tag))
    assert len(meant) == 1


def test_digest_resolves_in_any_repository() -> None:
    index = Index()
    index.put(A, entry({"quay.io/app:1": 0}))
    assert index.resolve(image(f"docker.io/team/other@{A}")) == A
    assert index.resolve(image(f"quay.io/app@{B}")) is None


def test_replaced_record_leaves_no_trace() -> None:
    index = Index()
    index.put(A, entry({"quay.io/app:1": 1, "quay.io/app:2": 1}, {LAYER: 5}))
    index.put(A, entry({"quay.io/app:2": 2}, {OTHER: 7}))
    assert index.resolve(image("quay.io/app:1")) is None
    assert index.tags(repository("quay.io/app")) == ["2"]
    assert index.sizes(LAYER) == set()
    assert index.sizes(OTHER) == {7}
    assert len(index) == 1
    assert index.get(A) == entry({"quay.io/app:2": 2}, {OTHER: 7})


def test_dropped_record_is_gone() -> None:
    index = Index()
    index.put(A, entry({"quay.io/app:1": 1}, {LAYER: 5}))
    index.drop(A)
    index.drop(A)
    index.drop(B)
    assert (len(index), index.get(A), index.counts()) == (0, None, (0, 0))
    assert index.tags(repository("quay.io/app")) == []
    assert index.sizes(LAYER) == set()


def test_blob_sizes_from_manifests() -> None:
    index = Index()
    app, other = repository("quay.io/app"), repository("quay.io/other")
    index.put(A, entry({"quay.io/app:1": 1}, {LAYER: 5}))
    index.put(B, entry({"quay.io/other:1": 1}, {LAYER: 6, OTHER: 0}))
    index.put(C, entry({"quay.io/app:2": 1, "quay.io/other:2": 1}, {OTHER: 1}))
    assert index.sizes(LAYER) == {5, 6}
    assert index.sizes(LAYER, app) == {5}
    assert index.sizes(OTHER, app) == {1}
    assert index.sizes(OTHER, other) == {0, 1}
    assert index.sizes(OTHER, repository("nginx")) == set()
    assert index.sizes(A) == set()
    # Neither does a size count that is given to another blob.
    assert [size for size in range(9) if index.gives(LAYER, size)] == [5, 6]
    assert not any(index.gives(A, size) for size in range(9))


def test_tags_of_a_repository_are_sorted() -> None:
    index = Index()
    index.put(A, entry({"quay.io/app:b": 1, f"quay.io/app@{A}": 1, "quay.io/app/sub:x": 1}))
    index.put(B, entry({"quay.io/app:a": 1, "quay.io/app:B": 1, "quay.io/apps:y": 1}))
    assert index.tags(repository("quay.io/app")) == ["B", "a", "b"]
    assert index.tags(repository("quay.io/app/sub")) == ["x"]
    assert index.tags(repository("nginx")) == []


def test_counts_of_indexes_and_images() -> None:
    index = Index()
    index.put(A, entry({}, is_list=True))
    index.put(B, entry({}))
    index.put(C, entry({}))
    assert index.counts() == (1, 2)
    assert len(index) == 3


def test_lookup_of_a_tag_is_independent_of_its_claims() -> None:
    def resolving(count: int) -> int:
        index, tag = Index(), image("quay.io/app:1")
        for number in range(count):
            index.put(Digest.of(b"%d" % number), entry({str(tag): number % 7}))
        return calls_of(lambda: index.resolve(tag))

    assert resolving(1000) == resolving(2)


def test_claims_of_a_tag_are_added_in_linear_time() -> None:
    def reading(count: int) -> int:
        entries = [(Digest.of(b"%d" % number), entry({"quay.io/app:1": number})) for number in range(count)]

        def put_all() -> None:
            index = Index()
            for digest, one in entries:
                index.put(digest, one)

        return calls_of(put_all)

    assert reading(2000) < 12 * reading(200)


URLS = ("quay.io/app:1", "quay.io/app:2", "quay.io/other:1")
ENTRIES = st.builds(
    entry,
    st.dictionaries(st.sampled_from(URLS), st.integers(0, 3)),
    st.dictionaries(st.sampled_from([LAYER, OTHER]), st.integers(0, 3)),
)


@given(st.lists(st.tuples(st.sampled_from([A, B, C]), st.none() | ENTRIES), max_size=12))
def test_changed_index_equals_a_fresh_one(changes: list[tuple[Digest, Entry | None]]) -> None:
    index, left = Index(), dict[Digest, Entry]()
    for digest, changed in changes:
        left.pop(digest, None)
        if changed is None:
            index.drop(digest)
        else:
            index.put(digest, changed)
            left[digest] = changed
    fresh = Index()
    for digest, kept in left.items():
        fresh.put(digest, kept)
    for url in URLS:
        tag: ImageReference = image(url)
        assert index.resolve(tag) == fresh.resolve(tag)
        assert index.tags(tag.repository) == fresh.tags(tag.repository)
        for blob in (LAYER, OTHER):
            assert index.sizes(blob, tag.repository) == fresh.sizes(blob, tag.repository)
    assert [index.get(digest) for digest in (A, B, C)] == [left.get(digest) for digest in (A, B, C)]
