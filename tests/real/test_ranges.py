"""Byte ranges as clients send them, on blobs and manifests: on a hit, on a miss, and in flight."""

from __future__ import annotations

from email.message import Message

import pytest

from tests.client import Response
from tests.images import Image
from tests.real.caches import SOON, Cache, assert_error, plain_image
from tests.upstream_rules import Hold

SIZE = 2048
RECEIVED = 1600
"""How many bytes of a blob in flight the upstream has sent."""

SATISFIABLE = {
    "bytes=500-1499": (500, 1500),
    "bytes=500-": (500, SIZE),
    "bytes=-500": (SIZE - 500, SIZE),
    "bytes=2000-5000": (2000, SIZE),
    "bytes=0-": (0, SIZE),
    "bytes=0-0": (0, 1),
    "bytes=0-2047": (0, SIZE),
    "bytes=1-1598": (1, RECEIVED - 1),
    "bytes=2047-": (SIZE - 1, SIZE),
    "bytes=-1": (SIZE - 1, SIZE),
    "bytes=-5000": (0, SIZE),
    "Bytes=10-19": (10, 20),
}
UNSATISFIABLE = ["bytes=500-0", "bytes=5000-10000", "bytes=2048-", "bytes=2048-2048", "bytes=-0"]
IGNORED = [
    *("bytes=0-0,2-3", "bytes=0-99, 200-", "bytes=-1,0-0"),  # several: a 206 with only the first would be wrong
    *("bytes=", "bytes=-", "bytes=a-b", "bytes=1.5-3", "bytes=0x0-0x9", "bytes=1-2-3", "bytes=--1", "bytes=+1-2"),
    *("0-99", "bits=0-99", "bytes 0-99", "bytes"),
]
CASES = [*SATISFIABLE, *UNSATISFIABLE, *IGNORED]


@pytest.fixture
def image(cache: Cache, repository: str) -> Image:
    """An image, not pulled yet, `1` in its repository; both its layer and its manifest have `SIZE` bytes."""
    bare = len(plain_image(repository, SIZE, annotations={"pad": ""}).manifest.data)
    image = plain_image(repository, SIZE, annotations={"pad": "x" * (SIZE - bare)})
    assert len(image.manifest.data) == len(image.blobs[1].data) == SIZE
    cache.upstream.add(repository, image, "1")
    return image


@pytest.fixture(params=["blob", "manifest"])
def target(request: pytest.FixtureRequest, repository: str, image: Image) -> tuple[str, str, bytes]:
    """What to request: path, digest and bytes."""
    if request.param == "manifest":
        return f"{repository}/manifests/1", image.manifest.digest, image.manifest.data
    layer = image.blobs[1]
    return f"{repository}/blobs/{layer.digest}", layer.digest, layer.data


def assert_head(headers: Message, status: int, wanted: str, digest: str) -> None:
    """Assert status and headers for the range `wanted` of `SIZE` bytes."""
    start, stop = SATISFIABLE.get(wanted, (0, SIZE))
    assert status == (206 if wanted in SATISFIABLE else 200)
    assert headers["Content-Range"] == (f"bytes {start}-{stop - 1}/{SIZE}" if wanted in SATISFIABLE else None)
    assert headers["Content-Length"] == str(stop - start)
    assert headers["Accept-Ranges"] == "bytes"
    assert headers["Docker-Content-Digest"] == digest
    assert headers["ETag"] == f'"{digest}"'
    assert headers["Content-Encoding"] is None


def assert_part(answer: Response, wanted: str, digest: str, data: bytes) -> None:
    """Assert the answer to the range `wanted` of `data`."""
    if wanted in UNSATISFIABLE:
        assert_error(answer, 416, "SIZE_INVALID")
        assert answer.headers["Content-Range"] == f"bytes */{SIZE}"
    else:
        assert_head(answer.headers, answer.status, wanted, digest)
        start, stop = SATISFIABLE.get(wanted, (0, SIZE))
        assert answer.body == data[start:stop]


@pytest.mark.parametrize("wanted", CASES)
def test_range_on_a_miss_and_on_a_hit(cache: Cache, target: tuple[str, str, bytes], wanted: str) -> None:
    path, digest, data = target
    for _ in ("miss", "hit"):
        assert_part(cache.ask(path, headers={"Range": wanted}), wanted, digest, data)
        if "/blobs/" in path:
            cache.wait_stored(digest)
    assert cache.ask(path).body == data
    # The upstream was asked once, for all of it.
    (asked,) = (request for request in cache.upstream.requests if request.path == f"/v2/{path}")
    assert (asked.method, asked.header("Range"), asked.sent) == ("GET", None, SIZE)


@pytest.mark.parametrize("wanted", CASES)
def test_range_of_a_blob_in_flight(cache: Cache, repository: str, image: Image, wanted: str) -> None:
    layer = image.blobs[1]
    path = f"{repository}/blobs/{layer.digest}"
    start, stop = SATISFIABLE.get(wanted, (0, SIZE))
    hold = Hold(RECEIVED)
    with cache.scripted(f"*{layer.digest}", hold), cache.opened(path) as first:
        assert hold.reached.wait(SOON)
        if wanted in UNSATISFIABLE:
            assert_part(cache.ask(path, headers={"Range": wanted}), wanted, layer.digest, layer.data)
        else:
            with cache.opened(path, {"Range": wanted}) as answer:
                assert_head(answer.headers, answer.status, wanted, layer.digest)
                # The received part is sent at once.
                there = max(0, min(stop, RECEIVED) - start)
                assert answer.read(there) == layer.data[start : start + there]
                assert not hold.release.is_set()
                hold.release.set()
                assert answer.read() == layer.data[start + there : stop]
        hold.release.set()
        assert first.read() == layer.data
    assert cache.sent(path) == 1


@pytest.mark.parametrize("wanted", ["bytes=500-1499", "bytes=5000-10000", "bytes=0-0,2-3"])
def test_head_ignores_ranges(cache: Cache, target: tuple[str, str, bytes], wanted: str) -> None:
    path, digest, data = target
    for _ in ("miss", "hit"):
        answer = cache.ask(path, "HEAD", {"Range": wanted})
        assert_head(answer.headers, answer.status, "", digest)
        assert cache.ask(path).body == data


def test_head_ignores_ranges_in_flight(cache: Cache, repository: str, image: Image) -> None:
    layer = image.blobs[1]
    path = f"{repository}/blobs/{layer.digest}"
    with cache.scripted(f"*{layer.digest}", Hold(RECEIVED)), cache.opened(path) as first:
        assert first.read(RECEIVED) == layer.data[:RECEIVED]
        answer = cache.ask(path, "HEAD", {"Range": "bytes=500-1499"})
        assert_head(answer.headers, answer.status, "", layer.digest)


SAME = '"{}"'
OTHER_ETAGS = ['"other"', 'W/"{}"', "{}", "Wed, 21 Oct 2026 07:28:00 GMT", ""]
"""Not the ETag that we sent; only a strong one confirms equal bytes."""


@pytest.mark.parametrize("condition", [SAME, *OTHER_ETAGS])
@pytest.mark.parametrize("wanted", ["bytes=500-1499", "bytes=-500", "bytes=5000-10000"])
def test_if_range_on_a_miss_and_on_a_hit(
    cache: Cache, target: tuple[str, str, bytes], wanted: str, condition: str
) -> None:
    """A client resumes only the same content."""
    path, digest, data = target
    for _ in ("miss", "hit"):
        answer = cache.ask(path, headers={"Range": wanted, "If-Range": condition.format(digest)})
        assert_part(answer, wanted if condition == SAME else "", digest, data)


@pytest.mark.parametrize("condition", [SAME, *OTHER_ETAGS])
def test_if_range_in_flight(cache: Cache, repository: str, image: Image, condition: str) -> None:
    layer = image.blobs[1]
    path = f"{repository}/blobs/{layer.digest}"
    headers = {"Range": "bytes=500-1499", "If-Range": condition.format(layer.digest)}
    hold = Hold(RECEIVED)
    with cache.scripted(f"*{layer.digest}", hold), cache.opened(path, headers) as answer:
        counts = condition == SAME
        assert_head(answer.headers, answer.status, headers["Range"] if counts else "", layer.digest)
        assert answer.read(1000) == (layer.data[500:1500] if counts else layer.data[:1000])
        assert not hold.release.is_set()
