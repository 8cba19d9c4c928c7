"""Blobs in flight: which clients can read which bytes, and when."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from tests.images import MIB, Blob, Image
from tests.processes import wait_until
from tests.real.caches import SOON, Cache, blob_file, daemon_in, plain_image, short_body
from tests.upstream_http import Rule
from tests.upstream_rules import Cut, Declare, Flip, Hold, NoLength, Resize

SIZE = 3 * MIB + 12345
CHUNK = MIB // 4


@pytest.fixture
def image(cache: Cache, repository: str) -> Image:
    """An image with a layer of `SIZE` bytes, in the test's repository as `1`, not pulled yet."""
    image = plain_image(repository, SIZE)
    cache.upstream.add(repository, image, "1")
    return image


@pytest.fixture
def layer(image: Image) -> Blob:
    """The image's layer."""
    return image.blobs[1]


@pytest.fixture
def blob(repository: str, layer: Blob) -> str:
    """The path of the layer."""
    return f"{repository}/blobs/{layer.digest}"


def pull_manifest(cache: Cache, repository: str) -> None:
    """Fetch the manifest, so that the daemon knows the sizes of the blobs."""
    assert cache.ask(f"{repository}/manifests/1").status == 200


def assert_no_leftovers(cache: Cache, layer: Blob) -> None:
    """Assert that a failed download leaves nothing but what its one retry may have fetched."""
    wait_until(lambda: not cache.partials, SOON, "no partial is left")
    assert not cache.stored(layer.digest) or blob_file(cache.daemon, layer.digest).read_bytes() == layer.data


def test_clients_read_a_growing_blob(cache: Cache, blob: str, layer: Blob) -> None:
    here = 2 * MIB
    hold = Hold(here)
    ranged = {"Range": "bytes=1000-1999"}
    with cache.scripted(f"*{layer.digest}", hold), cache.opened(blob) as first:
        assert first.read(here) == layer.data[:here]
        with cache.opened(blob) as second:
            assert second.read(here) == layer.data[:here]
            part = cache.ask(blob, headers=ranged)
            assert (part.status, part.headers["Content-Range"]) == (206, f"bytes 1000-1999/{SIZE}")
            assert part.body == layer.data[1000:2000]
            assert (first.status, second.status) == (200, 200)
            assert not hold.release.is_set()
            assert cache.upstream.bytes_sent(layer.digest) == here
            hold.release.set()
            assert first.read() == layer.data[here:]
            assert second.read() == layer.data[here:]
    assert cache.ask(blob, headers=ranged).body == layer.data[1000:2000]
    assert cache.sent(blob) == 1


def test_early_disconnects_of_ranges_share_one_continuing_download(cache: Cache, blob: str, layer: Blob) -> None:
    """containerd 2.1 does this with `concurrent_layer_fetch_buffer`."""
    starts = [number * CHUNK for number in range(7)]
    # The upstream holds back the end, so that the download cannot end before its clients.
    hold = Hold(starts[-1] + CHUNK)

    def chunk(start: int) -> tuple[int, str | None, str | None, bytes]:
        with cache.opened(blob, {"Range": f"bytes={start}-"}) as answer:
            return (
                answer.status,
                answer.headers["Content-Range"],
                answer.headers["Content-Length"],
                answer.read(CHUNK),
            )

    with cache.scripted(f"*{layer.digest}", hold):
        with ThreadPoolExecutor(len(starts)) as clients:
            got = list(clients.map(chunk, starts))
        for start, answer in zip(starts, got, strict=True):
            told = f"bytes {start}-{SIZE - 1}/{SIZE}"
            assert answer == (206, told, str(SIZE - start), layer.data[start : start + CHUNK])
        # The last client has read all there was: until the next byte it could be one that has only closed its side.
        gone = len(starts) - 1
        wait_until(lambda: cache.daemon.log.count(f"GET /v2/{blob} ") == gone, SOON, "the others have left")
        assert not cache.stored(layer.digest)
    cache.wait_stored(layer.digest)
    wait_until(lambda: cache.daemon.log.count(f"GET /v2/{blob} ") == len(starts), SOON, "no client is left")
    assert cache.ask(blob).body == layer.data
    assert cache.sent(blob) == 1


def test_download_continues_when_its_client_disconnects(cache: Cache, blob: str, layer: Blob) -> None:
    with cache.scripted(f"*{layer.digest}", Hold(MIB)):
        with cache.opened(blob) as answer:
            assert answer.read(1000) == layer.data[:1000]
        wait_until(lambda: f"GET /v2/{blob} " in cache.daemon.log, SOON, "the daemon notices the disconnect")
    cache.wait_stored(layer.digest)
    assert cache.ask(blob).body == layer.data
    assert cache.sent(blob) == 1
    assert not cache.partials


@pytest.mark.parametrize("known", [True, False], ids=["manifest", "no_manifest"])
@pytest.mark.parametrize("damaged", [1000, SIZE - 1], ids=["early", "last_byte"])
def test_wrong_blob_ends_before_its_last_byte(
    cache: Cache, repository: str, blob: str, layer: Blob, damaged: int, known: bool
) -> None:
    if known:
        pull_manifest(cache, repository)
    hold, since = Hold(MIB), cache.log_size
    with (
        cache.scripted(f"*{layer.digest}", Flip(damaged), hold),
        cache.opened(blob) as whole,
        cache.opened(blob, {"Range": "bytes=2000-"}) as rest,
        cache.opened(blob, {"Range": "bytes=-1"}) as last,
    ):
        assert (whole.status, rest.status, last.status) == (200, 206, 206)
        assert (whole.length, rest.length, last.length) == (SIZE, SIZE - 2000, 1)
        hold.release.set()
        assert len(short_body(whole)) < SIZE
        assert layer.data[2000:].startswith(short_body(rest))
        assert short_body(last) == b""
    errors = cache.errors(since)
    assert len(errors) == 3, errors  # one for each answer that ended short
    assert all(f"{cache.upstream.host}/{repository}@{layer.digest}: " in line for line in errors)
    assert_no_leftovers(cache, layer)
    assert cache.ask(blob).body == layer.data
    cache.wait_stored(layer.digest)


CHUNKED = NoLength("chunked")
CLOSED = NoLength("close")


@pytest.mark.parametrize(
    ("rules", "known"),
    [
        pytest.param([Cut(MIB)], False, id="fin"),
        pytest.param([Cut(MIB, reset=True)], False, id="rst"),
        pytest.param([Cut(SIZE - 1)], False, id="fin_before_the_last_byte"),
        pytest.param([Cut(MIB)], True, id="fin_manifest"),
        pytest.param([Cut(MIB), CHUNKED], True, id="fin_chunked"),
        pytest.param([Cut(MIB, reset=True), CHUNKED], True, id="rst_chunked"),
        pytest.param([Cut(MIB), CLOSED], True, id="fin_close_delimited"),
        pytest.param([Cut(MIB), CHUNKED], False, id="fin_chunked_no_manifest"),
        pytest.param([Cut(MIB, reset=True), CHUNKED], False, id="rst_chunked_no_manifest"),
    ],
)
def test_broken_connection_is_resumed(
    cache: Cache, repository: str, blob: str, layer: Blob, rules: list[Rule], known: bool
) -> None:
    """One client, one answer, and no error."""
    if known:
        pull_manifest(cache, repository)
    since = cache.log_size
    with cache.scripted(f"*{layer.digest}", *rules):
        assert cache.ask(blob).body == layer.data
    assert cache.errors(since) == []
    first, *others = (request for request in cache.upstream.requests if request.path == f"/v2/{blob}")
    assert first.header("Range") is None
    assert others
    assert all(request.header("Range") for request in others)
    cache.wait_stored(layer.digest)
    assert cache.ask(blob).body == layer.data
    assert cache.sent(blob) == 1 + len(others)


@pytest.mark.parametrize(
    ("rules", "known"),
    [
        pytest.param([Declare(1000)], False, id="less_than_announced"),
        pytest.param([Declare(-1000)], False, id="more_than_announced"),
        pytest.param([Resize(-1000)], False, id="too_little"),
        pytest.param([Resize(1000)], False, id="too_much"),
        pytest.param([Resize(-1000), CHUNKED], True, id="too_little_chunked"),
        pytest.param([Resize(1000), CHUNKED], True, id="too_much_chunked"),
        pytest.param([Resize(-1), CLOSED], True, id="too_little_close_delimited"),
        pytest.param([Resize(1), CLOSED], True, id="too_much_close_delimited"),
    ],
)
def test_wrong_content_ends_short(
    cache: Cache, repository: str, blob: str, layer: Blob, rules: list[Rule], known: bool
) -> None:
    if known:
        pull_manifest(cache, repository)
    # The headers are sent before it fails: afterwards only the end of the connection can signal it.
    hold, since = Hold(MIB // 2), cache.log_size
    with cache.scripted(f"*{layer.digest}", *rules, hold), cache.opened(blob) as answer:
        assert answer.status == 200
        hold.release.set()
        got = short_body(answer)
    assert got[:SIZE] == layer.data[: len(got)]
    # The retry of a resumed download may have failed too by now, which is another line.
    (line,) = [line for line in cache.errors(since) if "response truncated: " in line]
    assert cache.upstream.host in line.partition("response truncated: ")[2]
    assert_no_leftovers(cache, layer)
    assert cache.ask(blob).body == layer.data


@pytest.mark.parametrize(
    ("rules", "known"),
    [
        pytest.param([Resize(-1)], True, id="too_little_by_its_own_words"),
        pytest.param([Resize(1)], True, id="too_much_by_its_own_words"),
        pytest.param([Resize(-SIZE)], False, id="nothing"),
        pytest.param([Resize(-1000), CHUNKED], False, id="too_little_chunked"),
        pytest.param([Resize(1000), CLOSED], False, id="too_much_close_delimited"),
        pytest.param([Cut(MIB), CLOSED], False, id="fin_close_delimited"),
        pytest.param([Cut(None)], False, id="fin_before_the_headers"),
        pytest.param([Cut(None, reset=True)], True, id="rst_before_the_headers"),
    ],
)
def test_upstream_failure_before_the_headers(
    cache: Cache, repository: str, blob: str, layer: Blob, rules: list[Rule], known: bool
) -> None:
    if known:
        pull_manifest(cache, repository)
    with cache.scripted(f"*{layer.digest}", *rules):
        cache.refused(blob, 503, "UNAVAILABLE")
    assert_no_leftovers(cache, layer)
    assert cache.ask(blob).body == layer.data


@pytest.mark.parametrize("framing", [CHUNKED, CLOSED], ids=["chunked", "close_delimited"])
def test_size_from_the_manifest_without_content_length(
    cache: Cache, repository: str, blob: str, layer: Blob, framing: Rule
) -> None:
    pull_manifest(cache, repository)
    hold = Hold(MIB)
    with cache.scripted(f"*{layer.digest}", framing, hold), cache.opened(blob) as answer:
        assert answer.headers["Content-Length"] == str(SIZE)
        assert answer.read(MIB) == layer.data[:MIB]
        hold.release.set()
        assert answer.read() == layer.data[MIB:]
    assert cache.ask(blob).body == layer.data
    assert cache.sent(blob) == 1


@pytest.mark.parametrize("framing", [CHUNKED, CLOSED], ids=["chunked", "close_delimited"])
def test_blob_of_unknown_size_is_downloaded_before_the_headers(
    cache: Cache, blob: str, layer: Blob, framing: Rule
) -> None:
    hold = Hold(MIB)
    with cache.scripted(f"*{layer.digest}", framing, hold), ThreadPoolExecutor(3) as clients:
        asked = [
            clients.submit(partial(cache.ask, blob, headers={"Range": wanted} if wanted else None))
            for wanted in ("", "bytes=1000-1999", "bytes=-1")
        ]
        assert hold.reached.wait(SOON)
        hold.release.set()
        whole, part, last = (answer.result(SOON) for answer in asked)
    assert (whole.status, whole.headers["Content-Length"], whole.body) == (200, str(SIZE), layer.data)
    assert (part.status, part.headers["Content-Range"]) == (206, f"bytes 1000-1999/{SIZE}")
    assert part.body == layer.data[1000:2000]
    assert (last.headers["Content-Range"], last.body) == (f"bytes {SIZE - 1}-{SIZE - 1}/{SIZE}", layer.data[-1:])
    assert cache.sent(blob) == 1


def test_pull_timeout_ends_the_answer_not_the_download(cache: Cache, blob: str, layer: Blob, tmp_path: Path) -> None:
    """The time-out ends the answer, never the download."""
    with daemon_in(tmp_path, cache.upstream, "--pull-timeout", "200") as daemon:
        impatient = Cache(daemon, cache.upstream)
        with cache.scripted(f"*{layer.digest}", Hold(MIB)), impatient.opened(blob) as answer:
            assert short_body(answer) == layer.data[:MIB]
            assert cache.upstream.host in impatient.one_error(0).partition("response truncated: ")[2]
        impatient.wait_stored(layer.digest)
        assert impatient.ask(blob).body == layer.data
    assert cache.sent(blob) == 1
