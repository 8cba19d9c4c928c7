"""An upstream that sends wrong bytes: no client receives them as correct, and the store keeps none of them."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.images import MIB, Blob, Image, digest_of
from tests.processes import wait_until
from tests.real.caches import SOON, Cache, cache_in, plain_image, short_body
from tests.upstream_http import Rule
from tests.upstream_resumed import Other, WhenRanged
from tests.upstream_rules import ContentRange, Cut, Declare, Flip, Hold, IgnoreRange, NoLength, Reply, Resize

SIZE = 3 * MIB
START = MIB + 12345
"""Where the second connection resumes the first: in the middle of a piece that is sent at once."""
LAST = SIZE - 1


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cache]:
    """One cache for all tests of this file, some of which kill and restart it."""
    with cache_in(tmp_path_factory.mktemp("wrong")) as cache:
        yield cache


_numbers = itertools.count()


def publish(cache: Cache, *, known: bool = True) -> tuple[str, Blob]:
    """Publish a new blob, of a size `known` from a manifest or not; return its path and the blob."""
    repository = f"wrong/{next(_numbers)}"
    image: Image = plain_image(repository, SIZE)
    cache.upstream.add(repository, image, "1")
    if known:
        assert cache.ask(f"{repository}/manifests/1").status == 200
    layer = image.layers[0]
    return f"{repository}/blobs/{layer.digest}", layer


def asked(cache: Cache, path: str) -> list[str | None]:
    """Return the Range of each request for the blob that the upstream received."""
    requests = [request for request in cache.upstream.requests if request.path == f"/v2/{path}"]
    return [request.header("Range") for request in requests]


def assert_nothing_wrong_is_stored(cache: Cache, layer: Blob) -> None:
    """Assert that every blob has the digest that its name says, and that no partial remains."""
    wait_until(lambda: not cache.partials, SOON, "no partial is left")
    for path in (cache.daemon.image_path / "blobs").iterdir():
        assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name


WRONG_CONTENT: dict[str, tuple[Rule, ...]] = {
    "first_byte": (Flip(0),),
    "early": (Flip(1000),),
    "late": (Flip(SIZE - 1000),),
    "last_byte": (Flip(LAST),),
    "early_in_chunks": (Flip(1000), NoLength()),
    "last_byte_to_the_end_of_the_connection": (Flip(LAST), NoLength("close")),
    "another_file": (Other(),),
    "too_little": (Resize(-1000),),
    "too_little_in_chunks": (Resize(-1000), NoLength()),
    "too_much": (Resize(1000),),
    "too_much_in_chunks": (Resize(1000), NoLength()),
    "more_than_announced": (Declare(-1000),),
}


@pytest.mark.parametrize("known", [True, False], ids=["manifest", "no_manifest"])
@pytest.mark.parametrize("name", WRONG_CONTENT)
def test_wrong_content_of_a_first_download(cache: Cache, name: str, known: bool) -> None:
    path, layer = publish(cache, known=known)
    with cache.scripted(f"*{layer.digest}", *WRONG_CONTENT[name]), cache.opened(path) as answer:
        assert answer.status in (200, 503)
        if answer.status == 200:
            short_body(answer)
        assert_nothing_wrong_is_stored(cache, layer)
        assert not cache.stored(layer.digest)
    assert asked(cache, path)[0] is None
    assert digest_of(cache.ask(path).body) == layer.digest
    cache.wait_stored(layer.digest)
    assert_nothing_wrong_is_stored(cache, layer)


RESUMED = f"bytes={START}-"
HARMLESS: dict[str, tuple[tuple[Rule, ...], list[str | None]]] = {
    "everything": ((IgnoreRange(),), [RESUMED]),
    # Received bytes are not written again: the wrong byte is skipped.
    "everything_with_another_beginning": ((Flip(1000), IgnoreRange()), [RESUMED]),
    "everything_in_chunks": ((NoLength(), Flip(START - 1), IgnoreRange()), [RESUMED]),
    "no_total": ((ContentRange(f"bytes {START}-{LAST}/*"),), [RESUMED]),
    # Requested again from the beginning.
    "an_earlier_part": ((ContentRange(f"bytes 0-{LAST}/{SIZE}"),), [RESUMED, None]),
    "a_later_part": ((ContentRange(f"bytes {START + 1}-{LAST}/{SIZE}"),), [RESUMED, None]),
    "a_part_without_a_place": ((ContentRange(None),), [RESUMED, None]),
    "a_part_of_something": ((ContentRange("items 1-2/3"),), [RESUMED, None]),
}
"""Harmless answers to a Range, and the Range of each request that follows."""

MISMATCHED: dict[str, tuple[tuple[Rule, ...], list[str | None]]] = {
    "first_byte": ((Flip(START),), [RESUMED]),
    "late": ((Flip(SIZE - 1000),), [RESUMED]),
    "last_byte": ((Flip(LAST),), [RESUMED]),
    "another_file": ((Other(),), [RESUMED]),
    "another_file_whole": ((Other(), IgnoreRange()), [RESUMED]),
    "another_total": ((ContentRange(f"bytes {START}-{SIZE}/{SIZE + 1}"),), [RESUMED]),
    "another_size_whole": ((Resize(1), IgnoreRange()), [RESUMED]),
    "too_little": ((Resize(-1000),), [RESUMED, f"bytes={SIZE - 1000}-"]),
    "too_much": ((Resize(1000),), [RESUMED]),
    "too_much_in_chunks": ((NoLength(), Resize(1000)), [RESUMED]),
    "no_such_range": ((Reply(416),), [RESUMED]),
}
"""Answers that show, at once or at the end, that the bytes belong to another blob than the earlier ones."""


@pytest.mark.parametrize("name", HARMLESS)
def test_broken_download_is_resumed(cache: Cache, name: str) -> None:
    """One client connection, one 200, the correct bytes, in the file that the client is reading."""
    rules, requests = HARMLESS[name]
    path, layer = publish(cache)
    cut = cache.upstream.script(f"*{layer.digest}", Cut(START), times=1)
    with cache.scripted(f"*{layer.digest}", WhenRanged(rules)), cache.opened(path) as answer:
        assert (answer.status, answer.length) == (200, SIZE)
        assert digest_of(answer.read()) == layer.digest
    cut()
    assert asked(cache, path) == [None, *requests]
    cache.wait_stored(layer.digest)
    assert_nothing_wrong_is_stored(cache, layer)
    assert digest_of(cache.ask(path).body) == layer.digest
    assert len(asked(cache, path)) == 1 + len(requests)


@pytest.mark.parametrize("name", MISMATCHED)
def test_mismatched_resume_is_downloaded_again(cache: Cache, name: str) -> None:
    """The client gets a short answer; one new download, into a new file, serves the next client."""
    rules, requests = MISMATCHED[name]
    path, layer = publish(cache)
    cut = cache.upstream.script(f"*{layer.digest}", Cut(START), times=1)
    with cache.scripted(f"*{layer.digest}", WhenRanged(rules)):
        with cache.opened(path) as answer:
            assert (answer.status, answer.length) == (200, SIZE)
            got = short_body(answer)
        assert layer.data[:START].startswith(got[:START])
        cache.wait_stored(layer.digest)
    cut()
    assert_nothing_wrong_is_stored(cache, layer)
    assert digest_of(cache.ask(path).body) == layer.digest
    assert asked(cache, path) == [None, *requests, None]


def leave_a_partial(cache: Cache, path: str, layer: Blob) -> None:
    """Kill the daemon when it has `START` bytes, and restart it."""
    hold = Hold(START)
    with cache.scripted(f"*{layer.digest}", hold), cache.opened(path) as answer:
        assert len(answer.read(START)) == START
        cache.daemon.kill()
    cache.daemon.start()


@pytest.mark.parametrize("name", HARMLESS)
def test_partial_of_a_killed_daemon_is_resumed(cache: Cache, name: str) -> None:
    rules, requests = HARMLESS[name]
    path, layer = publish(cache)
    leave_a_partial(cache, path, layer)
    with cache.scripted(f"*{layer.digest}", WhenRanged(rules)):
        assert digest_of(cache.ask(path).body) == layer.digest
    assert asked(cache, path) == [None, *requests]
    cache.wait_stored(layer.digest)
    assert_nothing_wrong_is_stored(cache, layer)


@pytest.mark.parametrize("name", MISMATCHED)
def test_mismatched_resume_after_a_kill_is_downloaded_again(cache: Cache, name: str) -> None:
    """Where the first answer shows it, the client gets all bytes from the new download."""
    rules, requests = MISMATCHED[name]
    told = name in ("another_total", "another_size_whole", "no_such_range")
    path, layer = publish(cache)
    leave_a_partial(cache, path, layer)
    with cache.scripted(f"*{layer.digest}", WhenRanged(rules)):
        with cache.opened(path) as answer:
            assert (answer.status, answer.length) == (200, SIZE)
            if told:
                assert digest_of(answer.read()) == layer.digest
            else:
                assert layer.data[:START].startswith(short_body(answer)[:START])
        cache.wait_stored(layer.digest)
    assert_nothing_wrong_is_stored(cache, layer)
    assert digest_of(cache.ask(path).body) == layer.digest
    assert asked(cache, path) == [None, *requests, None]


@pytest.mark.parametrize("killed", [False, True])
def test_wrong_partial_is_downloaded_again(cache: Cache, killed: bool) -> None:
    """The rest is correct; only the digest of the whole shows it."""
    path, layer = publish(cache)
    flip = cache.upstream.script(f"*{layer.digest}", Flip(1000), times=1)
    if killed:
        leave_a_partial(cache, path, layer)
    else:
        cache.upstream.script(f"*{layer.digest}", Cut(START), times=1)
    with cache.opened(path) as answer:
        short_body(answer)
    flip()
    cache.wait_stored(layer.digest)
    assert digest_of(cache.ask(path).body) == layer.digest
    assert asked(cache, path) == [None, RESUMED, None]
    assert_nothing_wrong_is_stored(cache, layer)


def test_wrong_blob_is_downloaded_again_only_once(cache: Cache) -> None:
    """An upstream with a wrong blob is not asked for it repeatedly."""
    path, layer = publish(cache)
    since = cache.log_size
    with cache.scripted(f"*{layer.digest}", Cut(START), Flip(LAST)):
        with cache.opened(path) as answer:
            short_body(answer)
        wait_until(lambda: len(asked(cache, path)) >= 6, SOON, "the new download ends")
        wait_until(lambda: len(cache.errors(since)) >= 2, SOON, "the new download fails too")
        assert_nothing_wrong_is_stored(cache, layer)
    assert digest_of(cache.ask(path).body) == layer.digest
    once = [None, RESUMED, f"bytes={2 * START}-"]
    assert asked(cache, path) == [*once, *once, None]


def test_repeated_break_at_the_same_offset_is_retried_with_delays(tmp_path: Path) -> None:
    """It restarts each time and breaks at the same offset: retries are delayed."""
    with cache_in(tmp_path, "--pull-timeout", "3000") as cache:
        path, layer = publish(cache)
        with cache.scripted(f"*{layer.digest}", IgnoreRange(), Cut(START)):
            with cache.opened(path) as answer:
                assert digest_of(short_body(answer)) == digest_of(layer.data[:START])
            # At once, then after half a second, one, two; minus some jitter.
            assert len(asked(cache, path)) <= 10
        assert digest_of(cache.ask(path).body) == layer.digest
