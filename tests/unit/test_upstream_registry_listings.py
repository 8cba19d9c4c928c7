"""A registry's lists, page by page."""

from __future__ import annotations

import json
from typing import Any

import pytest
from twisted.internet.defer import Deferred

from ociregistry.errors import ManifestUnknown, Unavailable
from ociregistry.manifests import IMAGES, LARGEST_MANIFEST, OCI_INDEX, Manifest
from ociregistry.names import Tag
from ociregistry.upstream.paging import PageRequest, TagPage
from ociregistry.upstream.registry import Registry
from tests.images import make_artifact, make_image
from tests.unit.support.common import failed, fired
from tests.unit.test_upstream_registry import APP, IMAGE, registry

SUBJECT = IMAGE.digest


def tags(source: Registry, count: int | None = None, last: str = "", named: str = "") -> Deferred[TagPage]:
    """Request tags."""
    return Deferred.fromCoroutine(source.tags(APP, PageRequest(count, last, named)))


def page(*names: object) -> dict[str, Any]:
    """Return a page of tags."""
    return {"data": json.dumps({"name": "team/app", "tags": names}).encode()}


@pytest.mark.parametrize(
    ("count", "last", "query"),
    [(None, "", ""), (5, "", "?n=5"), (None, "v1", "?last=v1"), (5, "a&b", "?last=a%26b&n=5")],
)
def test_page_of_tags_request(count: int | None, last: str, query: str) -> None:
    source, http = registry(page("a", "b"))
    assert fired(tags(source, count, last)) == TagPage((Tag("a"), Tag("b")))
    assert http.urls == [f"https://reg.example/v2/team/app/tags/list{query}"]


@pytest.mark.parametrize(
    ("link", "following"),
    [
        ('</v2/team/app/tags/list?n=2&last=b>; rel="next"', PageRequest(2, "b")),
        ("<https://reg.example/v2/team/app/tags/list?last=b&n=2>;rel=next", PageRequest(2, "b")),
        ("<https://reg.example/v2/team/app/tags/list?last=b>;rel=next", PageRequest(2, "b", "last=b")),
        ("</x?next_page=gAA%3D&n=50>; rel=next", PageRequest(2, "b", "next_page=gAA%3D&n=50")),
        ("</x?n=2&last=b&ns=a.example&n%73=b.example>; rel=next", PageRequest(2, "b")),
        ('</x?a=1>; rel="prev", </x?next_page=2>; title=x; REL = "Next"', PageRequest(2, "b", "next_page=2")),
        ("</x?a=1>; rel=prev; b=c", None),
        ("</x?a=1>; rel=next-archive", None),
        ("</x>" + "; a" * 50_000, None),
        ('</v2/team/app/tags/list>; rel="prev"', None),
        ('</v2/team/app/tags/list>; rel="next"', None),
        ("", None),
    ],
)
def test_link_header_names_the_next_page(link: str, following: PageRequest | None) -> None:
    source, _ = registry({**page("a", "b"), "headers": {"Link": link}})
    assert fired(tags(source, 2)).following == following


def test_next_page_request_has_query_of_upstream() -> None:
    source, http = registry(page("c"))
    fired(tags(source, 2, "b", "next_page=gAA%3D%2B&n=50"))
    assert http.urls == ["https://reg.example/v2/team/app/tags/list?next_page=gAA%3D%2B&n=50"]


@pytest.mark.parametrize(
    ("names", "link", "asked"),
    [
        # The upstream ignores its own token, and sends the first page with the same token, or with a new one.
        (("a", "b"), "next_page=1", PageRequest(None, "a", "next_page=1")),
        (("a", "b"), "next_page=3", PageRequest(None, "b", "next_page=1")),
        ((), "next_page=1", PageRequest(None, "b", "next_page=1")),
        (("a", "b"), "last=b&n=2", PageRequest(2, "b")),
    ],
)
def test_repeated_page_is_the_last(names: tuple[str, ...], link: str, asked: PageRequest) -> None:
    source, _ = registry({**page(*names), "headers": {"Link": f"</x?{link}>; rel=next"}})
    assert fired(tags(source, asked.count, asked.last, asked.named)).following is None


def test_empty_page_has_a_next_page() -> None:
    source, _ = registry({**page(), "headers": {"Link": "</x?next_page=2>; rel=next"}})
    assert fired(tags(source, None, "b", "next_page=1")).following == PageRequest(None, "b", "next_page=2")


@pytest.mark.parametrize("query", ["a=" + "x" * 4095, "a=b;c=d", "a=b c", "a=\xfc", 'a="b"', "a=b\\c"])
def test_invalid_query_in_link(query: str) -> None:
    source, _ = registry({**page("a"), "headers": {"Link": f"</x?{query}>; rel=next"}})
    assert "the upstream's link to the next page cannot be followed" in failed(tags(source), Unavailable).message


@pytest.mark.parametrize("data", [b'{"tags": null}', b'{"tags": []}'])
def test_repository_without_tags(data: bytes) -> None:
    assert fired(tags(registry({"data": data})[0])) == TagPage(())


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b"<html>",
        b'{"tags": 5}',
        b'{"tags": [5]}',
        b'{"tags": ["a b"]}',
        b"[" * 100_000,
        b"\xff",
    ],
)
def test_malformed_tag_list_is_an_error(data: bytes) -> None:
    failed(tags(registry({"data": data})[0]), Unavailable)


def test_oversized_tag_list_is_not_read() -> None:
    assert "longer than" in failed(tags(registry({"data": b" " * 9_000_000})[0]), Unavailable).message


def referrers(source: Registry) -> Deferred[Manifest]:
    """Request the referrers of the image."""
    return Deferred.fromCoroutine(source.referrers(APP, SUBJECT))


def index(*entries: dict[str, Any], link: str = "", **keys: object) -> dict[str, Any]:
    """Return a page of referrers."""
    document = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries, **keys}
    headers = {"Content-Type": OCI_INDEX} | ({"Link": link} if link else {})
    return {"data": json.dumps(document).encode(), "headers": headers}


def entry(number: int) -> dict[str, Any]:
    """Return the descriptor of a signature."""
    made = make_artifact(number, make_image("registry").manifest).manifest
    return {
        "mediaType": made.media_type,
        "digest": made.digest,
        "size": len(made.data),
        "artifactType": "application/x",
    }


def test_single_page_of_referrers_is_unchanged() -> None:
    sent = index(entry(1), entry(2))
    source, http = registry(sent)
    found = fired(referrers(source))
    assert found.data == sent["data"]
    assert http.urls == [f"https://reg.example/v2/team/app/referrers/{SUBJECT}"]
    assert http.sent[0].headers["Accept"] == OCI_INDEX


def test_pages_of_referrers_are_merged() -> None:
    source, http = registry(
        index(entry(1), link=f'</v2/team/app/referrers/{SUBJECT}?page=2>; rel="next"', annotations={"a": "b"}),
        index(entry(2), link='<https://elsewhere.example/x?page=3&y=1>; rel="next"'),
        index(entry(3)),
    )
    found = fired(referrers(source))
    document = json.loads(found.data)
    assert document["manifests"] == [entry(1), entry(2), entry(3)]
    assert (document["annotations"], document["mediaType"]) == ({"a": "b"}, OCI_INDEX)
    assert [child.digest for child in found.children] == [entry(number)["digest"] for number in (1, 2, 3)]
    # All pages are requested from the same host, regardless of the link.
    base = f"https://reg.example/v2/team/app/referrers/{SUBJECT}"
    assert http.urls == [base, f"{base}?page=2", f"{base}?page=3&y=1"]


def test_number_of_pages_is_limited() -> None:
    source, http = registry(index(entry(1), link='</x?page=1>; rel="next"'))
    assert "pages" in failed(referrers(source), Unavailable).message
    assert len(http.sent) == 100


def test_total_size_of_pages_is_limited() -> None:
    half = "x" * (LARGEST_MANIFEST // 2)
    pages = [
        index({**entry(number), "annotations": {"a": half}}, link='</x?page=2>; rel="next"') for number in (1, 2)
    ]
    failed(referrers(registry(*pages, index())[0]), Unavailable)


def test_malformed_link_is_an_upstream_error() -> None:
    source, _ = registry(index(entry(1), link='<https://[bad?page=2>; rel="next"'), index())
    failed(referrers(source), Unavailable)


@pytest.mark.parametrize("headers", [{"Content-Type": "application/json"}, {"Content-Type": "text/plain"}, {}])
def test_index_of_referrers_has_any_content_type(headers: dict[str, str]) -> None:
    """Source: go-containerregistry issue 1760 (`text/plain`)."""
    source, http = registry({**index(entry(1)), "headers": headers})
    assert [child.digest for child in fired(referrers(source)).children] == [entry(1)["digest"]]
    assert len(http.sent) == 1


HTML: dict[str, Any] = {"data": b"<!DOCTYPE html><html>", "headers": {"Content-Type": "text/html; charset=utf-8"}}
NO_API: list[dict[str, Any]] = [
    *({"status": status, "data": b"404 page not found"} for status in (400, 404, 405, 501)),
    HTML,
    {**HTML, "data": b"Please log in."},
    {"status": 404, "headers": {"Content-Type": OCI_INDEX}},
]
MALFORMED = [{"data": b""}, {"data": b'{"manif'}, {"data": b"{}"}, {"data": b"OK"}]


def unknown(code: str) -> dict[str, Any]:
    """Return a 404 with the code of an error."""
    return {"status": 404, "data": json.dumps({"errors": [{"code": code, "message": ""}]}).encode()}


@pytest.mark.parametrize("answer", [*NO_API, *MALFORMED])
def test_referrers_of_tag_without_the_api(answer: dict[str, Any]) -> None:
    source, http = registry(answer, index(entry(1), entry(2)))
    assert [child.digest for child in fired(referrers(source)).children] == [entry(1)["digest"], entry(2)["digest"]]
    tag = SUBJECT.replace(":", "-")
    assert [url.partition("/v2/team/app/")[2] for url in http.urls] == [f"referrers/{SUBJECT}", f"manifests/{tag}"]
    assert http.sent[1].headers["Accept"] == OCI_INDEX


@pytest.mark.parametrize("answer", NO_API)
@pytest.mark.parametrize("code", ["MANIFEST_UNKNOWN", "NOT_FOUND", "TAG_EXPIRED"])
def test_no_referrers_without_api_and_tag(answer: dict[str, Any], code: str) -> None:
    found = fired(referrers(registry(answer, unknown(code))[0]))
    assert (found.children, found.media_type) == ((), OCI_INDEX)


@pytest.mark.parametrize(
    "tagged", [unknown("NAME_UNKNOWN"), {"status": 404, "data": b"<html>"}, {"status": 401}, {"status": 403}]
)
@pytest.mark.parametrize("answer", NO_API)
def test_no_empty_list_unless_the_tag_is_said_to_be_absent(answer: dict[str, Any], tagged: dict[str, Any]) -> None:
    failed(referrers(registry(answer, tagged)[0]), ManifestUnknown)


@pytest.mark.parametrize("tagged", [HTML, {"status": 500}, {"status": 429}, Unavailable("down"), {"data": b"{"}])
@pytest.mark.parametrize("answer", NO_API)
def test_no_empty_list_unless_the_tag_can_be_requested(answer: dict[str, Any], tagged: Any) -> None:
    failed(referrers(registry(answer, tagged)[0]), Unavailable)


@pytest.mark.parametrize("media_type", sorted(IMAGES))
def test_image_with_the_tag_for_referrers_is_no_list(media_type: str) -> None:
    """It stays one: a client that tries again gets no other answer."""
    tagged = {"data": make_image("registry").manifest.data, "headers": {"Content-Type": media_type}}
    assert "is an image" in failed(referrers(registry(NO_API[1], tagged)[0]), ManifestUnknown).message


@pytest.mark.parametrize("answer", MALFORMED)
def test_no_empty_list_after_a_malformed_answer(answer: dict[str, Any]) -> None:
    failed(referrers(registry(answer, unknown("MANIFEST_UNKNOWN"))[0]), ManifestUnknown)


@pytest.mark.parametrize("answer", MALFORMED)
def test_damaged_index_of_referrers(answer: dict[str, Any]) -> None:
    source, http = registry({**answer, "headers": {"Content-Type": OCI_INDEX}}, index(entry(1)))
    failed(referrers(source), Unavailable)
    assert len(http.sent) == 1


@pytest.mark.parametrize("code", ["MANIFEST_UNKNOWN", "NAME_UNKNOWN"])
def test_no_empty_list_for_an_unknown_manifest(code: str) -> None:
    """Such as another cache that is air-gapped."""
    failed(referrers(registry(unknown(code), unknown("MANIFEST_UNKNOWN"))[0]), ManifestUnknown)


@pytest.mark.parametrize("status", [401, 403])
def test_forbidden_referrers(status: int) -> None:
    source, http = registry({"status": status})
    failed(referrers(source), ManifestUnknown)
    assert all("/referrers/" in url for url in http.urls)


def test_null_is_an_empty_page_of_referrers() -> None:
    """Programs in Go write an empty list as null."""
    null = {**index(), "data": json.dumps({"schemaVersion": 2, "manifests": None}).encode()}
    alone = fired(referrers(registry(null)[0]))
    assert (alone.data, alone.children) == (null["data"], ())
    linked = {**null, "headers": index(link='</x?page=2>; rel="next"')["headers"]}
    joined = fired(referrers(registry(linked, index(entry(1)))[0]))
    assert [child.digest for child in joined.children] == [entry(1)["digest"]]
