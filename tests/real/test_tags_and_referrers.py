"""Tags and referrers: the upstream's while it is reachable, else the cache's; never an empty list by mistake."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from urllib.parse import quote

import pytest

from tests.client import Response, fetch
from tests.images import OCI_INDEX, Image, make_artifact
from tests.real.caches import Cache, assert_error, plain_image
from tests.upstream_http import Answer, Handler, Request, Rule
from tests.upstream_rules import Cut, Reply

TAGS = ["1", "1.0", "1.0-rc.1", "V2", "_x", "latest"]
GONE = {"503": Reply(503), "cut": Cut(None), "captive_portal": Reply(200, b"<html>")}


@pytest.fixture
def image(cache: Cache, repository: str) -> Image:
    """An image at the upstream, in the test's repository with `TAGS`, not pulled yet."""
    image = plain_image(repository, 100)
    cache.upstream.add(repository, image, *TAGS)
    return image


def tags(answer: Response) -> list[str]:
    """Return the tags of an answer that must be a list of tags."""
    assert (answer.status, answer.headers["Content-Type"]) == (200, "application/json")
    document = json.loads(answer.body)
    assert document.keys() == {"name", "tags"}
    return list(document["tags"])


def pages(cache: Cache, url: str) -> Iterator[list[str]]:
    """Yield the pages of tags from this URL on, as a client follows them."""
    while True:
        answer = fetch(url)
        yield tags(answer)
        if answer.headers["Link"] is None:
            return
        link = re.fullmatch(r'<(/v2/[^>]*)>; rel="next"', answer.headers["Link"])
        assert link, answer.headers["Link"]
        url = f"{cache.daemon.url}{link[1]}"


def assert_lists(cache: Cache, repository: str, expected: list[str]) -> None:
    """Assert that these are the tags, complete and in pages, with any `last`, with both ways to name the upstream."""
    path = f"{repository}/tags/list"
    in_path = f"{cache.daemon.url}/v2/{cache.upstream.host}/{path}"
    whole = cache.ask(path)
    assert tags(whole) == expected
    assert json.loads(whole.body)["name"] == repository
    assert whole.headers["OCI-Namespace"] == cache.upstream.host
    assert tags(fetch(in_path)) == expected
    assert cache.ask(path, "HEAD").headers["Content-Length"] == str(len(whole.body))
    for size in (1, 2, len(expected), 1000, 10**8):
        in_pages = [expected[start : start + size] for start in range(0, len(expected), size)]
        assert list(pages(cache, cache.url(path, f"n={size}"))) == in_pages
        assert list(pages(cache, f"{in_path}?n={size}")) == in_pages
    for last in ("0", *expected, "1.00", "zzz"):
        after = [tag for tag in expected if tag > last]
        assert tags(fetch(cache.url(path, f"last={last}"))) == after
        first, *_ = pages(cache, cache.url(path, f"n=2&last={last}"))
        assert first == after[:2]
    none = fetch(cache.url(path, "n=0"))
    assert (tags(none), none.headers["Link"]) == ([], None)


def test_tags_of_the_upstream(cache: Cache, repository: str, image: Image) -> None:
    assert_lists(cache, repository, TAGS)


@pytest.mark.parametrize("rule", GONE.values(), ids=GONE.keys())
def test_tags_of_the_cache_when_the_upstream_is_unavailable(
    cache: Cache, repository: str, image: Image, rule: Rule
) -> None:
    known = [TAGS[0], *TAGS[2:5]]
    for tag in known:
        assert cache.ask(f"{repository}/manifests/{tag}").status == 200
    assert cache.ask(f"{repository}/manifests/{image.manifest.digest}").status == 200
    # Other repositories in the store are excluded.
    for name in (f"{repository}/below", f"{repository}-beside"):
        cache.upstream.add(name, image, "other")
        assert cache.ask(f"{name}/manifests/other").status == 200
    with cache.scripted(f"/v2/{repository}/tags/*", rule):
        assert_lists(cache, repository, known)
    assert_lists(cache, repository, TAGS)


@pytest.mark.parametrize("count", ["-1", "x", "1.5", "%31%00", "9" * 30, "+1"])
def test_invalid_page_size_is_rejected(cache: Cache, repository: str, image: Image, count: str) -> None:
    since = cache.log_size
    answer = fetch(cache.url(f"{repository}/tags/list", f"n={count}"))
    assert_error(answer, 400, "PAGINATION_NUMBER_INVALID")
    assert cache.one_error(since)


def referrers(answer: Response) -> list[str]:
    """Return the digests in an answer that must be an index of referrers."""
    assert (answer.status, answer.headers["Content-Type"]) == (200, OCI_INDEX)
    assert answer.headers["Content-Length"] == str(len(answer.body))
    document = json.loads(answer.body)
    assert (document["schemaVersion"], document["mediaType"]) == (2, OCI_INDEX)
    return [entry["digest"] for entry in document["manifests"]]


class Unfiltered(Rule):
    """An upstream that does not support filters."""

    def __call__(self, request: Request, handler: Handler) -> Answer:
        """Return all referrers for any filter."""
        return handler(replace(request, query="")).with_header("OCI-Filters-Applied", None)


class Paged(Rule):
    """An upstream with one referrer per page."""

    def __call__(self, request: Request, handler: Handler) -> Answer:
        """Return the page in the query."""
        answer = handler(replace(request, query=""))
        document = json.loads(answer.body)
        page = int("".join(request.parameters("page")) or 0)
        more = page + 1 < len(document["manifests"])
        document["manifests"] = document["manifests"][page : page + 1]
        link = f'<{request.path}?page={page + 1}>; rel="next"' if more else None
        return replace(answer, body=json.dumps(document).encode()).with_header("Link", link)


SBOM, SIGNATURE, OTHER = (f"application/vnd.example.{name}" for name in ("sbom", "signature", "other"))


def assert_referrers(cache: Cache, path: str, expected: dict[str, str]) -> None:
    """Assert that these are the referrers' digests, by artifact type, complete and filtered."""
    answer = cache.ask(path)
    assert referrers(answer) == [*expected]
    assert answer.headers["OCI-Filters-Applied"] is None
    assert answer.headers["OCI-Namespace"] == cache.upstream.host
    assert cache.ask(path, "HEAD").headers["Content-Length"] == str(len(answer.body))
    assert referrers(fetch(f"{cache.daemon.url}/v2/{cache.upstream.host}/{path}")) == [*expected]
    for kind in (SBOM, SIGNATURE, OTHER):
        answer = fetch(cache.url(path, f"artifactType={quote(kind, safe='')}"))
        assert referrers(answer) == [digest for digest in expected if expected[digest] == kind]
        assert answer.headers["OCI-Filters-Applied"] == "artifactType"


@pytest.mark.parametrize("rule", [Rule(), Unfiltered(), Paged()], ids=["filtered", "unfiltered", "paged"])
def test_referrers_of_the_upstream_then_of_the_cache(cache: Cache, repository: str, image: Image, rule: Rule) -> None:
    path = f"{repository}/referrers/{image.manifest.digest}"
    added: dict[str, str] = {}
    for number, kind in enumerate((SBOM, SIGNATURE, SBOM)):
        artifact = make_artifact(f"{repository}/{number}", image.manifest, artifact_type=kind)
        cache.upstream.add(repository, artifact)
        added[artifact.manifest.digest] = kind
        with cache.scripted(f"/v2/{repository}/referrers/*", rule):
            assert_referrers(cache, path, added)
        for gone in GONE.values():
            with cache.scripted(f"/v2/{repository}/*", gone):
                assert_referrers(cache, path, added)


def test_cached_referrers_are_not_listed_as_a_tag(cache: Cache, repository: str, image: Image) -> None:
    cache.upstream.add(repository, make_artifact(repository, image.manifest))
    assert len(referrers(cache.ask(f"{repository}/referrers/{image.manifest.digest}"))) == 1
    assert cache.ask(f"{repository}/manifests/1").status == 200
    with cache.scripted(f"/v2/{repository}/*", GONE["503"]):
        assert tags(cache.ask(f"{repository}/tags/list")) == ["1"]
    # The fallback tag that the specification reserves is answered with the stored referrers.
    fallback = cache.ask(f"{repository}/manifests/{image.manifest.digest.replace(':', '-')}")
    assert len(referrers(fallback)) == 1


@pytest.mark.parametrize("rule", GONE.values(), ids=GONE.keys())
def test_empty_referrers_are_not_answered_from_the_cache(
    cache: Cache, repository: str, image: Image, rule: Rule
) -> None:
    path = f"{repository}/referrers/{image.manifest.digest}"
    for _ in ("never asked", "asked before"):
        with cache.scripted(f"/v2/{repository}/*", rule):
            cache.refused(path, 503, "UNAVAILABLE")
            cache.refused(path, 503, "UNAVAILABLE", query=f"artifactType={OTHER}")
        assert_referrers(cache, path, {})
