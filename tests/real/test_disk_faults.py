"""A failing or hanging disk: the store's system calls fail while the daemon runs."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from http.client import HTTPResponse, IncompleteRead
from pathlib import Path

import pytest

from ociregistry.store.files import locked
from tests.client import fetch
from tests.disk_faults import Trace, faults
from tests.images import MIB, Image, digest_of
from tests.processes import wait_until
from tests.real.caches import SOON, Cache, blob_file, cache_in, plain_image, wait_scanned_twice
from tests.unit.support.irregular import IRREGULAR, put_irregular
from tests.upstream_resumed import WhenRanged
from tests.upstream_rules import Cut, Hold, Reply

SIZE = 3 * MIB
LARGE = 66 * MIB
"""More than the 64 MiB after which a download is synced while it continues, if it takes a second or longer."""
EIO = "Input/output error"
RENAMES = "/^rename"
"""All calls with this prefix, since machines differ."""
HELD = MIB
HANG = "delay_enter=60000000"
"""A minute, unless the trace ends before."""

Inject = Callable[..., AbstractContextManager[Trace]]


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Cache]:
    """A cache for this test alone, whose disk fails."""
    with cache_in(tmp_path) as cache:
        yield cache


@pytest.fixture
def inject(cache: Cache, tmp_path: Path) -> Inject:
    """A function that injects `faults` into the daemon."""

    def inject(calls: str, fault: str, *options: str, seen: str = "") -> AbstractContextManager[Trace]:
        return faults(cache.daemon.process.pid, calls, fault, tmp_path / "strace", *options, seen=seen)

    return inject


def publish(cache: Cache, tag: str, size: int = SIZE) -> Image:
    """Publish an image at the upstream; its layer has `size` bytes."""
    image = plain_image(tag, size)
    cache.upstream.add("faults", image, tag)
    return image


def blob_of(image: Image) -> str:
    """Return the path of its layer."""
    return f"faults/blobs/{image.layers[0].digest}"


def pull(cache: Cache, tag: str, image: Image) -> None:
    """Pull the image, from the upstream or from the cache."""
    assert cache.ask(f"faults/manifests/{tag}").body == image.manifest.data
    assert digest_of(cache.ask(blob_of(image)).body) == image.layers[0].digest
    cache.wait_stored(image.layers[0].digest)


def body_of(answer: HTTPResponse) -> bytes:
    """Return the body, complete or not."""
    try:
        return answer.read()
    except IncompleteRead as short:
        return short.partial


def assert_blobs_match_their_digests(cache: Cache) -> None:
    """Assert that every blob has the digest that its name says."""
    for path in (cache.daemon.image_path / "blobs").iterdir():
        assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name


def assert_next_pull_succeeds(cache: Cache, tag: str, image: Image) -> None:
    """Assert that nothing of the failure remains."""
    pull(cache, tag, image)
    assert_blobs_match_their_digests(cache)
    wait_until(lambda: cache.partials == set(), SOON, "no partial is left")


@pytest.mark.parametrize(
    ("calls", "size", "held", "whole"),
    [
        pytest.param("pwrite64", SIZE, HELD, False, id="write"),
        pytest.param("fdatasync", LARGE, LARGE - MIB // 2, False, id="sync_on_the_way"),
        # The digest is correct, so clients receive everything; the store keeps nothing.
        pytest.param("fsync", SIZE, HELD, True, id="sync_before_the_rename"),
        pytest.param(RENAMES, SIZE, HELD, True, id="rename"),
    ],
)
def test_write_sync_or_rename_failure_of_a_download(
    cache: Cache, inject: Inject, calls: str, size: int, held: int, whole: bool
) -> None:
    hit, image = publish(cache, "hit"), publish(cache, "miss", size)
    pull(cache, "hit", hit)
    layer = image.layers[0]
    first, hold, since = Hold(HELD), Hold(held), cache.log_size
    with cache.scripted(f"*{layer.digest}", first, hold), cache.opened(blob_of(image)) as answer:
        assert answer.status == 200
        begun = answer.read(1000)
        with inject(calls, "error=EIO", seen=RENAMES) as trace:
            second = time.monotonic() + 1
            wait_until(lambda: time.monotonic() > second, SOON, "the next sync may begin")
            first.release.set()
            if calls == "fdatasync":
                trace.wait_injected()
            hold.release.set()
            got = begun + body_of(answer)
            assert layer.data.startswith(got)
            assert (len(got) == size) == whole
            wait_until(lambda: EIO in cache.daemon.log[since:], SOON, "the log names the reason")
            assert EIO in cache.one_error(since)
            assert cache.upstream.host in cache.one_error(since)
            assert trace.injected
            assert not cache.stored(layer.digest)
            pull(cache, "hit", hit)
    # No attempt to rename it after its bytes, or their sync, have failed.
    renamed = [line for line in trace.text.splitlines() if "rename" in line and f"/blobs/{layer.digest[7:]}" in line]
    assert all("INJECTED" in line for line in renamed), renamed
    assert bool(renamed) == (calls == RENAMES)
    assert_blobs_match_their_digests(cache)
    assert_next_pull_succeeds(cache, "miss", image)


@pytest.mark.parametrize("error", ["EIO", "ENOSPC"])
def test_partial_with_a_failed_sync_is_not_resumed(cache: Cache, inject: Inject, error: str) -> None:
    """The kernel reports such a failure once, and takes the bytes for written: a later sync proves nothing."""
    image = publish(cache, "miss")
    path = blob_of(image)
    cut = cache.upstream.script(f"/v2/{path}", Cut(MIB), times=1)
    with cache.scripted(f"/v2/{path}", WhenRanged((Reply(404),))), inject("fdatasync", f"error={error}") as trace:
        # The download ends, and no partial is resumed: what came is synced and kept for the next pull.
        with cache.opened(path) as answer:
            body_of(answer)
        trace.wait_injected()
    cut()
    assert digest_of(cache.ask(path).body) == image.layers[0].digest
    ranges = [request.header("Range") for request in cache.upstream.requests if request.path == f"/v2/{path}"]
    assert ranges == [None, f"bytes={MIB}-", None]


@pytest.mark.parametrize("calls", ["pwrite64", "openat"])
def test_download_that_cannot_create_its_partial_is_answered_by_503(cache: Cache, inject: Inject, calls: str) -> None:
    """Answer 503 before the headers."""
    image = publish(cache, "miss")
    pulls = cache.daemon.image_path / "pulls" / "0" / image.layers[0].digest[7:]
    since = cache.log_size
    with inject(calls, "error=EIO", "-P", str(pulls), "-P", f"{pulls}.note") as trace:
        cache.refused(blob_of(image), 503, "UNAVAILABLE")
        assert EIO in cache.one_error(since)
        assert trace.injected
    assert_next_pull_succeeds(cache, "miss", image)


@pytest.mark.parametrize("calls", ["pwrite64", "fsync", RENAMES])
def test_write_failure_of_a_manifest(cache: Cache, inject: Inject, calls: str) -> None:
    hit, image = publish(cache, "hit"), publish(cache, "miss")
    pull(cache, "hit", hit)
    with inject(calls, "error=EIO") as trace:
        for reference in ("miss", image.manifest.digest):
            since = cache.log_size
            cache.refused(f"faults/manifests/{reference}", 503, "UNAVAILABLE")
            assert EIO in cache.one_error(since)
        assert trace.injected == 2
        pull(cache, "hit", hit)
    assert not (cache.daemon.image_path / "img" / image.manifest.digest[7:]).exists()
    assert_next_pull_succeeds(cache, "miss", image)


def test_sync_failure_of_the_blobs_folder(cache: Cache, inject: Inject) -> None:
    """The folder's sync fails when the blob is renamed already: it is correct, and may be served or fetched again."""
    image = publish(cache, "miss")
    since = cache.log_size
    with inject("fsync", "error=EIO", "-P", str(cache.daemon.image_path / "blobs")) as trace:
        assert digest_of(cache.ask(blob_of(image)).body) == image.layers[0].digest
        wait_until(lambda: EIO in cache.daemon.log[since:], SOON, "the log names the reason")
        assert trace.injected == 1
    assert EIO in cache.one_error(since)
    assert_blobs_match_their_digests(cache)
    assert_next_pull_succeeds(cache, "miss", image)


def test_hit_is_answered_while_syncs_hang(cache: Cache, inject: Inject) -> None:
    """More syncs hang than there are threads for writing; a slow hit works too."""
    hit, long = publish(cache, "hit"), publish(cache, "long", LARGE)
    hanging = [publish(cache, f"hanging{number}", 1000) for number in range(20)]
    pull(cache, "hit", hit)
    pull(cache, "long", long)
    with ThreadPoolExecutor(len(hanging)) as clients:
        with inject("fsync,fdatasync", HANG) as trace:
            asked = [clients.submit(cache.ask, blob_of(image)) for image in hanging]
            wait_until(lambda: trace.begun >= 16, SOON, "all threads that write hang")
            with cache.opened(blob_of(long)) as answer:
                begun = answer.read(MIB)
                for path, data in (
                    ("faults/manifests/hit", hit.manifest.data),
                    (f"faults/manifests/{hit.manifest.digest}", hit.manifest.data),
                    (blob_of(hit), hit.layers[0].data),
                ):
                    assert cache.ask(path).body == data
                    assert cache.ask(path, "HEAD").status == 200
                assert digest_of(begun + answer.read()) == long.layers[0].digest
            # All this came before the first sync ended.
            assert trace.ended == 0
            assert not any(cache.stored(image.layers[0].digest) for image in hanging)
        for waiting, image in zip(asked, hanging, strict=True):
            assert digest_of(waiting.result().body) == image.layers[0].digest
    for image in hanging:
        cache.wait_stored(image.layers[0].digest)


def test_lock_of_the_store_held_by_another_process(cache: Cache) -> None:
    """Records cannot be written during that time; everything else works."""
    hit, image = publish(cache, "hit"), publish(cache, "miss")
    waiting = {f"waiting{number}": publish(cache, f"waiting{number}", 1000) for number in range(20)}
    pull(cache, "hit", hit)
    with ThreadPoolExecutor(len(waiting)) as clients:
        with locked(cache.daemon.image_path / "pulls" / "lock"):
            asked = [clients.submit(cache.ask, f"faults/manifests/{tag}") for tag in waiting]
            wait_until(lambda: cache.upstream.count("GET", "/v2/faults/manifests/waiting") == 20, SOON, "all wait")
            pull(cache, "hit", hit)
            answer = fetch(cache.url(blob_of(image)), timeout=SOON)
            assert digest_of(answer.body) == image.layers[0].digest
            assert not any(waiter.done() for waiter in asked)
        for waiter, other in zip(asked, waiting.values(), strict=True):
            assert waiter.result().body == other.manifest.data


def test_miss_is_streamed_while_syncs_hang(cache: Cache, inject: Inject) -> None:
    hanging, image = publish(cache, "hanging"), publish(cache, "miss")
    with inject("fsync,fdatasync", HANG) as trace:
        assert digest_of(cache.ask(blob_of(hanging)).body) == hanging.layers[0].digest
        wait_until(lambda: trace.begun == 1, SOON, "the sync hangs")
        assert digest_of(cache.ask(blob_of(image)).body) == image.layers[0].digest
        # Later clients read from the partial.
        assert digest_of(cache.ask(blob_of(hanging)).body) == hanging.layers[0].digest
        assert trace.ended == 0
        assert not cache.stored(hanging.layers[0].digest)
    cache.wait_stored(hanging.layers[0].digest)
    cache.wait_stored(image.layers[0].digest)
    assert cache.upstream.count("GET", f"/v2/{blob_of(hanging)}") == 1


@pytest.mark.parametrize("calls", ["fsync", RENAMES])
def test_slow_sync_delays_only_what_needs_it(cache: Cache, inject: Inject, calls: str) -> None:
    """Only operations that need the sync wait, and then succeed."""
    hit, image = publish(cache, "hit"), publish(cache, "miss")
    pull(cache, "hit", hit)
    with inject(calls, "delay_enter=5000000") as trace, ThreadPoolExecutor() as clients:
        asked = clients.submit(cache.ask, "faults/manifests/miss")
        wait_until(lambda: trace.begun, SOON, "the call hangs")
        pull(cache, "hit", hit)
        assert trace.ended == 0
        assert not asked.done()
        assert asked.result().body == image.manifest.data
        assert trace.ended


@pytest.mark.parametrize("error", ["EIO", "EACCES", "EUCLEAN"])
def test_blob_that_cannot_be_opened_is_fetched_anew(cache: Cache, inject: Inject, error: str) -> None:
    image = publish(cache, "hit")
    pull(cache, "hit", image)
    path = blob_file(cache.daemon, image.layers[0].digest)
    since, before = cache.log_size, path.stat().st_ino
    with inject("openat", f"error={error}", "-P", str(path)) as trace:
        assert digest_of(cache.ask(blob_of(image)).body) == image.layers[0].digest
        wait_until(lambda: path.exists() and path.stat().st_ino != before, SOON, "a new file has the name")
        assert trace.injected
        assert f"cannot read the blob {path}: " in cache.one_error(since)
    assert (cache.daemon.image_path / "pulls" / "0" / "bad" / path.name).stat().st_ino == before
    assert cache.sent(blob_of(image), "GET") == 2
    pull(cache, "hit", image)
    assert_blobs_match_their_digests(cache)
    assert cache.sent(blob_of(image), "GET") == 2


def test_unreadable_blob_while_the_upstream_has_none_is_404(cache: Cache, inject: Inject) -> None:
    image = publish(cache, "hit")
    pull(cache, "hit", image)
    path = blob_file(cache.daemon, image.layers[0].digest)
    with inject("openat", "error=EIO", "-P", str(path)), cache.scripted(f"/v2/{blob_of(image)}", Reply(404)):
        for _ in range(2):
            assert cache.ask(blob_of(image)).status == 404
    # The file was not moved: it can be read again.
    pull(cache, "hit", image)
    assert cache.daemon.log.count(f"cannot read the blob {path}: ") == 1


def test_read_error_while_serving_ends_short_and_is_mended(cache: Cache, inject: Inject) -> None:
    image = publish(cache, "hit", LARGE)
    pull(cache, "hit", image)
    layer = image.layers[0]
    path = blob_file(cache.daemon, layer.digest)
    since, before, hold = cache.log_size, path.stat().st_ino, Hold()
    with cache.scripted(f"/v2/{blob_of(image)}", hold), ThreadPoolExecutor() as clients:
        with cache.opened(blob_of(image)) as answer:
            begun = answer.read(1000)
            with inject("preadv2,pread64", "error=EIO", "-P", str(path)) as trace:
                got = begun + body_of(answer)
                assert layer.data.startswith(got)
                assert len(got) < LARGE
                wait_until(lambda: EIO in cache.daemon.log[since:], SOON, "the log names the reason")
                assert str(path) in cache.one_error(since)
                assert "response truncated" in cache.one_error(since)
                asked = clients.submit(cache.ask, blob_of(image))
                # The fault goes by the name, and would hit the new file as well.
                wait_until(hold.reached.is_set, SOON, "the blob is fetched anew")
                assert trace.injected
        hold.release.set()
        assert asked.result().body == layer.data
    wait_until(lambda: path.exists() and path.stat().st_ino != before, SOON, "a new file has the name")
    assert len(cache.errors(since)) == 1
    pull(cache, "hit", image)
    assert_blobs_match_their_digests(cache)


@pytest.mark.parametrize("kind", IRREGULAR)
def test_no_regular_file_in_place_of_a_blob_and_a_record(cache: Cache, kind: str) -> None:
    """More requests than there are threads for reading: opening a FIFO would block each."""
    hit, image = publish(cache, "hit"), publish(cache, "bad")
    pull(cache, "hit", hit)
    pull(cache, "bad", image)
    root, layer = cache.daemon.image_path, image.layers[0]
    put_irregular(root / "img" / image.manifest.digest[7:], kind)
    put_irregular(blob_file(cache.daemon, layer.digest), kind)
    with cache.scripted("/v2/*", Reply(404)), ThreadPoolExecutor(20) as clients:
        paths = [f"faults/manifests/{image.manifest.digest}", blob_of(image)] * 10
        assert {answer.status for answer in clients.map(cache.ask, paths)} == {404}
        assert digest_of(cache.ask(blob_of(hit)).body) == hit.layers[0].digest
    wait_scanned_twice(cache)
    pull(cache, "bad", image)
    stored = blob_file(cache.daemon, layer.digest)
    wait_until(lambda: stored.is_file() and not stored.is_symlink(), SOON, "the blob is stored")
    assert_blobs_match_their_digests(cache)
    assert {path.name for path in (root / "pulls" / "0" / "bad").iterdir()} == {
        layer.digest[7:],
        image.manifest.digest[7:],
    }
