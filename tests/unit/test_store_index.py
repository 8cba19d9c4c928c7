"""The index in memory: names, tags and blob sizes follow the latest records."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from ociregistry.names import Digest, ImageReference, Repository
from ociregistry.store.index import Catalogue
from ociregistry.store.records import Entry, Record
from tests.images import make_image, make_index
from tests.unit.support.doubles import HUB, image, manifest

START = datetime(2026, 1, 1, tzinfo=UTC)
A, B, C = (Digest.of(name.encode()) for name in "abc")
LAYER, OTHER = Digest.of(b"layer"), Digest.of(b"other")


def repository(name: str) -> Repository:
    """Return the repository of a name."""
    return Repository.parse(name, HUB)


def entry(images: Mapping[str, int], blobs: Mapping[Digest, int] | None = None, *, is_list: bool = False) -> Entry:
    """Return an entry whose image URLs were confirmed this many seconds after the start."""
    return Entry(is_list, {url: START + timedelta(seconds=at) for url, at in images.items()}, blobs or {})


def test_entry_of_a_record() -> None:
    built = make_image("catalogue")
    url = "quay.io/app:1"
    record = Record(manifest(built), {}).confirm(image(url), START)
    made = Entry.of(record)
    sizes = {Digest(blob.digest): len(blob.data) for blob in built.blobs}
    layers = frozenset(Digest(layer.digest) for layer in built.layers)
    assert made == Entry(False, {url: START}, sizes, manifest(built).config, layers)
    index = manifest(make_index("catalogue"))
    assert Entry.of(Record(index, {})) == Entry(True, {}, {}, children=index.children)


def test_entry_repositories() -> None:
    made = entry({"quay.io/team/app:1": 0, f"docker.io/library/nginx@{A}": 0})
    assert made.known_in(repository("quay.io/team/app"))
    assert made.known_in(repository("nginx"))
    for name in ("quay.io/team", "quay.io/team/apps", "quay.io/team/ap", "docker.io/team/app"):
        assert not made.known_in(repository(name))


def test_tag_resolves_to_latest_confirmation() -> None:
    catalogue = Catalogue()
    tag = image("quay.io/app:latest")
    assert catalogue.resolve(tag) is None
    catalogue.put(A, entry({str(tag): 1}))
    assert catalogue.resolve(tag) == A
    catalogue.put(B, entry({str(tag): 3}))
    catalogue.put(C, entry({str(tag): 2}))
    assert catalogue.resolve(tag) == B
    catalogue.drop(B)
    assert catalogue.resolve(tag) == C
    catalogue.put(A, entry({str(tag): 9}))
    assert catalogue.resolve(tag) == A


def test_tie_of_confirmations_is_independent_of_order() -> None:
    tag = image("quay.io/app:latest")
    meant = set()
    for order in ((A, B, C), (C, B, A), (B, C, A)):
        catalogue = Catalogue()
        for digest in order:
            catalogue.put(digest, entry({str(tag): 1}))
        meant.add(catalogue.resolve(tag))
    assert len(meant) == 1


def test_digest_resolves_in_any_repository() -> None:
    catalogue = Catalogue()
    catalogue.put(A, entry({"quay.io/app:1": 0}))
    assert catalogue.resolve(image(f"docker.io/team/other@{A}")) == A
    assert catalogue.resolve(image(f"quay.io/app@{B}")) is None


def test_replaced_record_leaves_no_trace() -> None:
    catalogue = Catalogue()
    catalogue.put(A, entry({"quay.io/app:1": 1, "quay.io/app:2": 1}, {LAYER: 5}))
    catalogue.put(A, entry({"quay.io/app:2": 2}, {OTHER: 7}))
    assert catalogue.resolve(image("quay.io/app:1")) is None
    assert catalogue.tags(repository("quay.io/app")) == ["2"]
    assert catalogue.sizes(LAYER) == set()
    assert catalogue.sizes(OTHER) == {7}
    assert len(catalogue) == 1
    assert catalogue.get(A) == entry({"quay.io/app:2": 2}, {OTHER: 7})


def test_dropped_record_is_gone() -> None:
    catalogue = Catalogue()
    catalogue.put(A, entry({"quay.io/app:1": 1}, {LAYER: 5}))
    catalogue.drop(A)
    catalogue.drop(A)
    catalogue.drop(B)
    assert (len(catalogue), catalogue.get(A), catalogue.counts()) == (0, None, (0, 0))
    assert catalogue.tags(repository("quay.io/app")) == []
    assert catalogue.sizes(LAYER) == set()


def test_blob_sizes_from_manifests() -> None:
    catalogue = Catalogue()
    app, other = repository("quay.io/app"), repository("quay.io/other")
    catalogue.put(A, entry({"quay.io/app:1": 1}, {LAYER: 5}))
    catalogue.put(B, entry({"quay.io/other:1": 1}, {LAYER: 6, OTHER: 0}))
    catalogue.put(C, entry({"quay.io/app:2": 1, "quay.io/other:2": 1}, {OTHER: 1}))
    assert catalogue.sizes(LAYER) == {5, 6}
    assert catalogue.sizes(LAYER, app) == {5}
    assert catalogue.sizes(OTHER, app) == {1}
    assert catalogue.sizes(OTHER, other) == {0, 1}
    assert catalogue.sizes(OTHER, repository("nginx")) == set()
    assert catalogue.sizes(A) == set()


def test_tags_of_a_repository_are_sorted() -> None:
    catalogue = Catalogue()
    catalogue.put(A, entry({"quay.io/app:b": 1, f"quay.io/app@{A}": 1, "quay.io/app/sub:x": 1}))
    catalogue.put(B, entry({"quay.io/app:a": 1, "quay.io/app:B": 1, "quay.io/apps:y": 1}))
    assert catalogue.tags(repository("quay.io/app")) == ["B", "a", "b"]
    assert catalogue.tags(repository("quay.io/app/sub")) == ["x"]
    assert catalogue.tags(repository("nginx")) == []


def test_counts_of_indexes_and_images() -> None:
    catalogue = Catalogue()
    catalogue.put(A, entry({}, is_list=True))
    catalogue.put(B, entry({}))
    catalogue.put(C, entry({}))
    assert catalogue.counts() == (1, 2)
    assert len(catalogue) == 3


URLS = ("quay.io/app:1", "quay.io/app:2", "quay.io/other:1")
ENTRIES = st.builds(
    entry,
    st.dictionaries(st.sampled_from(URLS), st.integers(0, 3)),
    st.dictionaries(st.sampled_from([LAYER, OTHER]), st.integers(0, 3)),
)


@given(st.lists(st.tuples(st.sampled_from([A, B, C]), st.none() | ENTRIES), max_size=12))
def test_changed_index_equals_a_fresh_one(changes: list[tuple[Digest, Entry | None]]) -> None:
    catalogue, left = Catalogue(), dict[Digest, Entry]()
    for digest, changed in changes:
        left.pop(digest, None)
        if changed is None:
            catalogue.drop(digest)
        else:
            catalogue.put(digest, changed)
            left[digest] = changed
    fresh = Catalogue()
    for digest, kept in left.items():
        fresh.put(digest, kept)
    for url in URLS:
        tag: ImageReference = image(url)
        assert catalogue.resolve(tag) == fresh.resolve(tag)
        assert catalogue.tags(tag.repository) == fresh.tags(tag.repository)
        for blob in (LAYER, OTHER):
            assert catalogue.sizes(blob, tag.repository) == fresh.sizes(blob, tag.repository)
    assert [catalogue.get(digest) for digest in (A, B, C)] == [left.get(digest) for digest in (A, B, C)]
