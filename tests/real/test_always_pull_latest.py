"""`--always-pull-latest`: the tag latest follows the upstream while the upstream answers."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.images import Image
from tests.processes import wait_until
from tests.real.caches import SOON, Cache, assert_error, cache_in, plain_image, scripted
from tests.real.completions import log_lines
from tests.upstream import ScriptedRegistry
from tests.upstream_rules import Header, Hold, Reply

LATEST = "team/app/manifests/latest"
STALE = '110 - "Response is Stale"'
OLD, NEW = plain_image("latest/old", 1000), plain_image("latest/new", 1000)
HTML = (("Content-Type", "text/html"),)
LOGIN = b"<html><body>Please log in.</body></html>"


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Cache]:
    """A cache for this test alone, with an earlier meaning of latest."""
    with cache_in(tmp_path, "--always-pull-latest") as cache:
        cache.upstream.add("team/app", OLD, "latest", "1")
        assert cache.ask(LATEST).body == OLD.manifest.data
        yield cache


def asked(cache: Cache, since: int = 0) -> list[str]:
    """Return the upstream's requests for manifests after the first `since`."""
    manifests = [request for request in cache.upstream.requests if "/manifests/" in request.path]
    return [f"{request.method} {request.path.rpartition('/')[2]}" for request in manifests[since:]]


def served(cache: Cache, image: Image, *, stale: bool, method: str = "GET") -> None:
    """Assert that latest means this image; with `stale` the client and the log are warned."""
    since = cache.log_size
    answer = cache.ask(LATEST, method)
    assert (answer.status, answer.headers["Docker-Content-Digest"]) == (200, image.manifest.digest)
    assert answer.headers["Content-Length"] == str(len(image.manifest.data))
    assert answer.headers["Content-Type"] == image.manifest.media_type
    assert answer.body == (image.manifest.data if method == "GET" else b"")
    assert answer.headers["Warning"] == (STALE if stale else None)
    warnings = log_lines(cache.daemon, "warn", f"{cache.upstream.host}/team/app:latest", "unchecked", since=since)
    assert len(warnings) == stale
    assert cache.errors(since) == []


def test_unchanged_latest_costs_one_head(cache: Cache) -> None:
    """One HEAD at every pull, and nothing more; other tags and digests are not checked."""
    assert asked(cache) == ["GET latest"]
    for method in ("GET", "HEAD", "GET"):
        served(cache, OLD, stale=False, method=method)
    assert asked(cache, 1) == ["HEAD latest"] * 3
    for _ in range(2):
        assert cache.ask("team/app/manifests/1").body == OLD.manifest.data
        assert cache.ask(f"team/app/manifests/{OLD.manifest.digest}").body == OLD.manifest.data
    assert asked(cache, 4) == ["GET 1"]


def test_moved_latest_is_fetched_by_digest(cache: Cache) -> None:
    """The new image is served and kept; the tag may move back to a cached image."""
    cache.upstream.add("team/app", NEW, "latest")
    served(cache, NEW, stale=False)
    assert asked(cache, 1) == ["HEAD latest", f"GET {NEW.manifest.digest}"]
    served(cache, NEW, stale=False)
    assert asked(cache, 3) == ["HEAD latest"]
    cache.daemon.kill()
    cache.daemon.start()
    cache.upstream.close()
    served(cache, NEW, stale=True)
    cache.upstream.open()
    cache.upstream.move("team/app", "latest", OLD.manifest)
    wait_until(lambda: cache.ask(LATEST).headers["Warning"] is None, SOON, "the upstream is asked again")
    served(cache, OLD, stale=False)


@pytest.mark.parametrize("status", [400, 404, 405, 501])
def test_refused_head_is_followed_by_a_get(cache: Cache, status: int) -> None:
    """A moved tag is seen all the same; Watchtower saw no update of such images (nicholas-fedor/watchtower#669)."""
    cache.upstream.script("*", Reply(status), method="HEAD")
    served(cache, OLD, stale=False)
    cache.upstream.add("team/app", NEW, "latest")
    served(cache, NEW, stale=False)
    assert asked(cache, 1) == ["HEAD latest", "GET latest", "GET latest", f"GET {NEW.manifest.digest}"]
    # The response for the first byte of a blob tells its size.
    blob = f"team/app/blobs/{NEW.layers[0].digest}"
    for _ in range(2):
        assert cache.ask(blob, "HEAD").headers["Content-Length"] == str(len(NEW.layers[0].data))
    assert (cache.sent(blob, "HEAD"), cache.sent(blob, "GET")) == (1, 2)


def test_head_without_a_digest_is_followed_by_a_get(cache: Cache) -> None:
    """Without a digest a GET is needed."""
    with cache.scripted("*/manifests/*", Header("Docker-Content-Digest", None)):
        served(cache, OLD, stale=False)
        cache.upstream.add("team/app", NEW, "latest")
        served(cache, NEW, stale=False)
    assert "GET latest" in asked(cache, 1)


def test_unreachable_upstream_serves_the_cached_latest(cache: Cache) -> None:
    cache.upstream.close()
    served(cache, OLD, stale=True)
    served(cache, OLD, stale=True, method="HEAD")
    assert cache.ask("team/app/manifests/other").status == 503
    assert_error(cache.ask("team/other/manifests/latest"), 503, "UNAVAILABLE")


def test_silent_upstream_delays_latest_by_five_seconds(cache: Cache) -> None:
    hold = Hold(None)
    with cache.scripted("*", hold):
        began = time.monotonic()
        served(cache, OLD, stale=True)
        assert 4 < time.monotonic() - began < 12
        assert hold.reached.is_set()
        assert_other_tag_is_a_hit(cache)


def assert_other_tag_is_a_hit(cache: Cache) -> None:
    """Assert that the image is a hit by its digest, without delay."""
    began = time.monotonic()
    assert cache.ask(f"team/app/manifests/{OLD.manifest.digest}").body == OLD.manifest.data
    assert time.monotonic() - began < 2


def test_refusing_upstream_serves_the_cached_latest(cache: Cache) -> None:
    """Any refusal counts, not only a particular status."""
    for status in (400, 401, 403, 404, 500, 502, 503, 504, 429):
        with cache.scripted("*", Reply(status, b"", (("Retry-After", "1"),))):
            served(cache, OLD, stale=True)
    # It is rate limited for a second; then it is asked again.
    time.sleep(1)
    cache.upstream.add("team/app", NEW, "latest")
    served(cache, NEW, stale=False)


@pytest.mark.parametrize("named", [True, False], ids=["reachable", "forbidden"])
def test_captive_portal_does_not_change_latest(tmp_path: Path, named: bool) -> None:
    """It answers everything with a page, or redirects to one: latest keeps its meaning."""
    with (
        ScriptedRegistry() as portal,
        cache_in(tmp_path, "--always-pull-latest", *([portal] if named else [])) as cache,
    ):
        cache.upstream.add("team/app", OLD, "latest")
        assert cache.ask(LATEST).body == OLD.manifest.data
        page = Reply(200, LOGIN, HTML)
        with cache.scripted("*", page):
            served(cache, OLD, stale=True)
        login = (("Location", f"{portal.url}/login"), *HTML)
        with scripted(portal, "*", page), cache.scripted("*", Reply(302, LOGIN, login)):
            served(cache, OLD, stale=True)
        assert bool(portal.requests) == named
        cache.upstream.add("team/app", NEW, "latest")
        served(cache, NEW, stale=False)


def test_uncached_latest_has_no_fallback(tmp_path: Path) -> None:
    """There is no cached image to fall back to."""
    with cache_in(tmp_path, "--always-pull-latest") as cache:
        assert_error(cache.ask(LATEST), 404, "MANIFEST_UNKNOWN")
        cache.upstream.close()
        assert_error(cache.ask(LATEST), 503, "UNAVAILABLE")


def test_without_the_option_latest_keeps_its_meaning(tmp_path: Path) -> None:
    with cache_in(tmp_path) as cache:
        cache.upstream.add("team/app", OLD, "latest")
        assert cache.ask(LATEST).body == OLD.manifest.data
        cache.upstream.add("team/app", NEW, "latest")
        served(cache, OLD, stale=False)
        assert asked(cache) == ["GET latest"]
