"""Parsing of request paths and queries, including hostile ones."""

from __future__ import annotations

from contextlib import suppress
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ociregistry.errors import (
    DigestInvalid,
    ManifestUnknown,
    MethodUnsupported,
    NameInvalid,
    NotFound,
    PageInvalid,
    RegistryError,
    Unsupported,
)
from ociregistry.names import Digest, ImageReference, Repository, Tag, Upstream
from ociregistry.upstream.paging import PageRequest
from ociregistry.web.requests import (
    BlobRequest,
    ManifestRequest,
    ReferrersRequest,
    Request,
    TagsRequest,
    VersionCheck,
    namespace,
    origin_form,
    parse_request,
)

HUB = Upstream("docker.io")
SHA256 = Digest.of(b"")
SHA512 = Digest.of(b"", "sha512")


def parse(path: str, default: str = "docker.io", **query: str) -> Request:
    """Parse a path and a query."""
    return parse_request(
        path.encode(), {key.encode(): [value.encode()] for key, value in query.items()}, Upstream(default)
    )


def repository(name: str) -> Repository:
    """Return the repository of a full name."""
    return Repository.parse(name, HUB)


def tagged(name: str, tag: str) -> ManifestRequest:
    """Return a request for a tag."""
    return ManifestRequest(ImageReference(repository(name), Tag(tag)))


@pytest.mark.parametrize("path", ["/v2", "/v2/", "/%762/"])
def test_version_check(path: str) -> None:
    assert parse(path) == VersionCheck()
    assert parse(path, ns="quay.io") == VersionCheck()


@pytest.mark.parametrize(
    ("path", "ns", "expected"),
    [
        ("/v2/library/nginx/manifests/latest", "docker.io", tagged("docker.io/library/nginx", "latest")),
        ("/v2/nginx/manifests/latest", "docker.io", tagged("docker.io/library/nginx", "latest")),
        ("/v2/nginx/manifests/latest", "registry-1.docker.io", tagged("docker.io/library/nginx", "latest")),
        ("/v2/nginx/manifests/latest", "", tagged("docker.io/library/nginx", "latest")),
        ("/v2/a/b/c/d/e/f/manifests/1", "reg.example:5000", tagged("reg.example:5000/a/b/c/d/e/f", "1")),
        ("/v2/a/manifests/1", "[::1]:5000", tagged("[::1]:5000/a", "1")),
        ("/v2/quay.io/a/b/manifests/1", "", tagged("quay.io/a/b", "1")),
        ("/v2/localhost:5000/a/manifests/1", "", tagged("localhost:5000/a", "1")),
        # With `ns`, the path belongs to the upstream, even if it starts like a host.
        ("/v2/quay.io/a/b/manifests/1", "docker.io", tagged("docker.io/quay.io/a/b", "1")),
        ("/v2/a%2Db/manifests/v%31", "", tagged("docker.io/library/a-b", "v1")),
        # API words are valid repository names.
        ("/v2/manifests/tags/blobs/manifests/list", "", tagged("docker.io/manifests/tags/blobs", "list")),
    ],
)
def test_upstream_and_repository(path: str, ns: str, expected: Request) -> None:
    assert parse(path, **({"ns": ns} if ns else {})) == expected


def test_default_upstream() -> None:
    assert parse("/v2/a/manifests/1", "quay.io") == tagged("quay.io/a", "1")


@pytest.mark.parametrize("digest", [SHA256, SHA512])
def test_requests_by_digest(digest: Digest) -> None:
    app = repository("docker.io/team/app")
    assert parse(f"/v2/team/app/manifests/{digest}") == ManifestRequest(ImageReference(app, digest))
    assert parse(f"/v2/team/app/blobs/{digest}") == BlobRequest(app, digest)
    assert parse(f"/v2/team/app/blobs/{digest}".replace(":", "%3A")) == BlobRequest(app, digest)
    assert parse(f"/v2/team/app/referrers/{digest}") == ReferrersRequest(app, digest, "")
    assert parse(f"/v2/team/app/referrers/{digest}", artifactType="a/b+c") == ReferrersRequest(app, digest, "a/b+c")


@pytest.mark.parametrize(
    ("query", "page"),
    [
        ({}, PageRequest()),
        ({"n": "0"}, PageRequest(0)),
        ({"n": "5", "last": "v1"}, PageRequest(5, "v1")),
        ({"n": ""}, PageRequest()),
        ({"n": "999999999"}, PageRequest(10_000)),
        ({"last": "x" * 500}, PageRequest(None, "x" * 128)),
        ({"last": "v1", "next": "next_page=a%2F%3D&n=2"}, PageRequest(None, "v1", "next_page=a%2F%3D&n=2")),
        ({"next": "x" * 4096}, PageRequest(named="x" * 4096)),
        # A client chooses no registry behind a mirror: that is what `ns` tells the mirror.
        ({"next": "a=1&ns=evil.example&n%73=evil.example&n=2"}, PageRequest(named="a=1&n=2")),
        ({"next": "ns=evil.example"}, PageRequest()),
    ],
)
def test_tag_list_request(query: dict[str, str], page: PageRequest) -> None:
    assert parse("/v2/team/app/tags/list", **query) == TagsRequest(repository("docker.io/team/app"), page)


@pytest.mark.parametrize("named", ["x" * 4097, "a=b;ns=c", "a b", "a\r\nb", "#x", "a=ü", "a\0", "<a>"])
def test_invalid_query_of_next_page(named: str) -> None:
    with pytest.raises(PageInvalid, match=r"^next: "):
        parse("/v2/team/app/tags/list", next=named)


@pytest.mark.parametrize("count", ["-1", "many", "1.5", "+1", " 1", "٣", "1" * 5000, "0x10"])
def test_invalid_page_size(count: str) -> None:
    with pytest.raises(PageInvalid):
        parse("/v2/team/app/tags/list", n=count)


def test_first_of_repeated_parameters_counts() -> None:
    query = {b"ns": [b"quay.io", b"evil.example"], b"n": [b"5", b"many"]}
    assert parse_request(b"/v2/a/tags/list", query, HUB) == TagsRequest(repository("quay.io/a"), PageRequest(5))
    assert namespace(query) == "quay.io"
    assert namespace({}) == namespace({b"ns": []}) == ""


@pytest.mark.parametrize(
    ("path", "error"),
    [
        ("/v2/_catalog", Unsupported),
        ("/v2/a/blobs/uploads", MethodUnsupported),
        ("/v2/a/blobs/uploads/", MethodUnsupported),
        ("/v2/a/blobs/uploads/some-uuid", MethodUnsupported),
        ("/v2/a", NotFound),
        ("/v2/a/", NotFound),
        ("/v2//", NotFound),
        ("/v2/manifests/1", NotFound),
        ("/v2//manifests/1", NotFound),
        ("/v2/a/manifests/", NotFound),
        ("/v2/a/manifests/1/", NotFound),
        ("/v2/a/manifests/1/2", NotFound),
        ("/v2/a/tags/", NotFound),
        ("/v2/a/tags/lists", NotFound),
        ("/v2/a/Manifests/1", NotFound),
        ("/v2/a/manifests/.INVALID_MANIFEST_NAME", ManifestUnknown),
        ("/v2/a/manifests/-", ManifestUnknown),
        ("/v2/a/manifests/a%00b", ManifestUnknown),
        ("/v2/a/manifests/a%0Ab", ManifestUnknown),
        ("/v2/a/manifests/%2e%2e", ManifestUnknown),
        ("/v2/a/manifests/sha256:totallywrong", DigestInvalid),
        ("/v2/a/blobs/latest", DigestInvalid),
        ("/v2/a/blobs/sha256:..%5C..", DigestInvalid),
        (f"/v2/a/blobs/{SHA256.upper()}", DigestInvalid),
        ("/v2/a/referrers/latest", DigestInvalid),
        ("/v2/UPPER/manifests/1", NameInvalid),
        ("/v2/a%20b/manifests/1", NameInvalid),
        ("/v2/a%00b/manifests/1", NameInvalid),
        ("/v2/a//b/manifests/1", NameInvalid),
        ("/v2//a/manifests/1", NameInvalid),
        ("/v2/../a/manifests/1", NameInvalid),
        ("/v2/a/../b/manifests/1", NameInvalid),
        ("/v2/a/%2e%2e/b/manifests/1", NameInvalid),
        ("/v2/%2e/a/manifests/1", NameInvalid),
        ("/v2/a%2Fb/manifests/1", NameInvalid),
        ("/v2/a%2fb/manifests/1", NameInvalid),
        ("/v2/a%252Fb/manifests/1", NameInvalid),
        ("/v2/a/blobs/sha256%2f..", NameInvalid),
        ("/v2/a%5Cb/manifests/1", NameInvalid),
        ("/v2/%FF/manifests/1", NameInvalid),
        ("/v2/%ED%A0%80/manifests/1", NameInvalid),
        ("/v2/ü/manifests/1", NameInvalid),
        ("/v2/user:password@host/a/manifests/1", NameInvalid),
        ("/v2/host:0/a/manifests/1", NameInvalid),
        ("/v2/" + "a" * 256 + "/manifests/1", NameInvalid),
        ("/v2/" + "a/" * 5000 + "manifests/1", NameInvalid),
    ],
)
def test_unknown_or_malformed_path(path: str, error: type[RegistryError]) -> None:
    with pytest.raises(RegistryError) as refused:
        parse(path)
    assert type(refused.value) is error
    assert len(refused.value.message) < 1000
    assert refused.value.message.isprintable()


@pytest.mark.parametrize(
    "ns",
    [
        "http://quay.io",
        "quay.io/team",
        "user:password@quay.io",
        "quay.io\r\nX: y",
        "..",
        "a b",
        "\ufffd",
        "[::1",
        "x" * 5000,
    ],
)
def test_malformed_ns(ns: str) -> None:
    with pytest.raises(NameInvalid) as refused:
        parse("/v2/a/manifests/1", ns=ns)
    assert len(refused.value.message) < 1000
    assert refused.value.message.isprintable()


def test_undecodable_ns() -> None:
    with pytest.raises(NameInvalid):
        parse_request(b"/v2/a/manifests/1", {b"ns": [b"\xff\xfe"]}, HUB)


@given(
    st.lists(st.text("abc019", min_size=1, max_size=5), min_size=2, max_size=5).map("/".join),
    st.from_regex(r"[a-zA-Z0-9_][a-zA-Z0-9._-]{0,20}", fullmatch=True),
    st.sampled_from(["docker.io", "reg.example:5000", "[::1]"]),
)
def test_percent_encoding_round_trip(name: str, tag: str, ns: str) -> None:
    def everything(text: str) -> str:
        return "".join(f"%{ord(letter):02x}" if letter != "/" else letter for letter in text)

    expected = ManifestRequest(ImageReference(Repository.at(Upstream(ns), name), Tag(tag)))
    assert parse(f"/v2/{name}/manifests/{tag}", ns=ns) == expected
    assert parse(f"/v2/{everything(name)}/{everything('manifests')}/{everything(tag)}", ns=ns) == expected


TEXTS = st.text(max_size=30) | st.text("ab./:@%2fFe\\\0\n", max_size=30)


@given(TEXTS, st.sampled_from(["", "/manifests/1", "/tags/list", f"/blobs/{SHA256}", "/blobs/"]), TEXTS, TEXTS)
def test_any_request_is_parsed_or_a_registry_error(name: str, verb: str, rest: str, ns: str) -> None:
    for path in (f"/v2/{name}{verb}{rest}", quote(f"/v2/{name}{verb}{rest}")):
        with suppress(RegistryError):
            request = parse_request(path.encode(errors="replace"), {b"ns": [ns.encode(errors="replace")]}, HUB)
            parts = str(request).split("/")
            assert ".." not in parts
            assert "\n" not in str(request)


@pytest.mark.parametrize(
    ("target", "path"),
    [
        (b"/v2/", b"/v2/"),
        (b"*", b"*"),
        (b"http://cache:8080/v2/a?ns=b", b"/v2/a?ns=b"),
        (b"HTTPS://user:password@cache/v2/", b"/v2/"),
        (b"http://cache", b"/"),
        (b"http://cache?ns=b", b"/?ns=b"),
        (b"http:///v2/", b"/v2/"),
        (b"/http://cache/v2/", b"/http://cache/v2/"),
    ],
)
def test_origin_form(target: bytes, path: bytes) -> None:
    assert origin_form(target) == path
