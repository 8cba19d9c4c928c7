"""After one pull the cache holds the whole image, also layers that the client had already, and no more."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.images import MIB, OCI_LAYER, OCI_MANIFEST, Blob, Image, Index, digest_of, make_image
from tests.peers import Containerd, DockerRegistry, hosts_dir
from tests.processes import Daemon, wait_until
from tests.real.caches import (
    SOON,
    Cache,
    blob_paths,
    manifest_of,
    plain_image,
    wait_scanned_twice,
)
from tests.real.completions import completing_in, health, incomplete, log_lines, pending_file, wait_complete
from tests.upstream_http import Answer, Handler, Request, Rule
from tests.upstream_rules import Drip, Hold, Reply

DECIDED = 120.0
"""Seconds within which the platform of an index to complete is decided; it takes 30 after the last request."""
STANDS = 5.0
"""Seconds after which a paused download stands still: the bytes in the kernel have arrived."""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cache]:
    """A daemon and its scripted upstream for most tests; each uses a separate `repository`."""
    with completing_in(tmp_path_factory.mktemp("cache")) as cache:
        yield cache


@pytest.fixture
def own_cache(tmp_path: Path) -> Iterator[Cache]:
    """A cache for this test alone, whose every activity is checked."""
    with completing_in(tmp_path) as cache:
        yield cache


def requests_for(cache: Cache, repository: str, what: Image | Index) -> int:
    """Count the upstream's requests for its blobs."""
    return sum(cache.sent(path) for path in blob_paths(repository, what))


def completed_another(cache: Cache, repository: str, refused: tuple[int, int] = (0, 0)) -> None:
    """Complete another image: what was pending before has been started by then."""
    another = plain_image(f"{repository}, after it", 100)
    cache.upstream.add(f"{repository}/after", another, "1")
    assert cache.ask(f"{repository}/after/manifests/1").status == 200
    wait_complete(cache.daemon, another.blobs, refused=refused)


def test_layers_that_containerd_has_are_completed(
    registry: DockerRegistry, start_daemon: Callable[..., Daemon], containerd: Containerd, tmp_path: Path
) -> None:
    """containerd has two of five layers, and requests three; another one gets all five without the registry."""
    base = make_image("whole/base", layers=2)
    image = make_image("whole", layers=3, base=base)
    registry.push("team/base", base, "1")
    registry.push("team/whole", image, "1")
    assert containerd.pull(f"{registry.host}/team/base:1").returncode == 0
    daemon = start_daemon({registry.host: "http"})
    hosts = hosts_dir(tmp_path / "certs.d", daemon.url, "_default")
    ref = f"{registry.host}/team/whole:1"
    done = containerd.pull(ref, hosts)
    assert done.returncode == 0, f"{done.stderr}\n{daemon.log}"
    asked = [layer for layer in image.layers if f"GET /v2/team/whole/blobs/{layer.digest}" in daemon.log]
    assert asked == list(image.layers[2:]), "containerd had none of the image's layers"
    wait_complete(daemon, image.blobs)

    registry.kill()
    containerd.wipe()
    done = containerd.pull(ref, hosts)
    assert done.returncode == 0, f"{done.stderr}\n{daemon.log}"
    assert containerd.unpacked(ref)
    assert {blob.digest for blob in image.blobs} <= containerd.content


def test_request_for_a_layer_completes_its_platform(cache: Cache, repository: str, index: Index) -> None:
    """The blobs of that platform, the smallest first, each once; of the other its manifest and its config."""
    wanted, other = index.images
    assert cache.ask(f"{repository}/manifests/list").body == index.manifest.data
    path = f"{repository}/manifests/{wanted.manifest.digest}"
    assert cache.ask(path).body == wanted.manifest.data
    (asked, *_) = wanted.layers
    assert cache.ask(f"{repository}/blobs/{asked.digest}").body == asked.data
    wait_complete(cache.daemon, [*wanted.blobs, other.config])
    gets = [request.path for request in cache.upstream.requests if f"/v2/{repository}/blobs/" in request.path]
    got = [path.rpartition("/")[2] for path in gets]
    assert sorted(got) == sorted([*(blob.digest for blob in wanted.blobs), other.config.digest])
    by_size = sorted({*wanted.blobs} - {asked}, key=lambda blob: len(blob.data))
    assert [digest for digest in got if digest not in (asked.digest, other.config.digest)] == [
        blob.digest for blob in by_size
    ]
    assert cache.sent(f"{repository}/manifests/{other.manifest.digest}") == 1
    # The image is not requested again once it is complete.
    assert cache.ask(path).body == wanted.manifest.data
    completed_another(cache, repository)
    assert requests_for(cache, repository, index) == len(got)


def test_only_requested_platform_is_completed_after_a_pause(cache: Cache, repository: str, index: Index) -> None:
    """After 30 s without a request for a layer; until then the image is pending, which is noted on disk."""
    _, wanted = index.images
    other = index.images[0]
    assert cache.ask(f"{repository}/manifests/list").body == index.manifest.data
    assert cache.ask(f"{repository}/manifests/{wanted.manifest.digest}").body == wanted.manifest.data
    wait_until(pending_file(cache.daemon, wanted.manifest).exists, SOON, "the pending image is noted")
    document = health(cache.daemon)
    assert (document["incomplete_images"], document["pending_images"]) == (1, 1)
    wait_complete(cache.daemon, [*wanted.blobs, other.config], DECIDED)
    assert health(cache.daemon)["pending_images"] == 0
    assert requests_for(cache, repository, other) == 1


def test_request_for_an_index_or_head_fetches_no_layer(
    cache: Cache, repository: str, image: Image, index: Index
) -> None:
    """Of an index the manifests and configs of all platforms are fetched."""
    assert cache.ask(f"{repository}/manifests/list").status == 200
    assert cache.ask(f"{repository}/manifests/1", "HEAD").status == 200
    assert cache.ask(f"{repository}/manifests/{index.images[0].manifest.digest}", "HEAD").status == 200
    completed_another(cache, repository)
    assert requests_for(cache, repository, image) == 0
    gets = [request.path for request in cache.upstream.requests if f"/v2/{repository}/blobs/" in request.path]
    assert sorted(gets) == sorted(f"/v2/{repository}/blobs/{one.config.digest}" for one in index.images)
    assert health(cache.daemon)["pending_images"] == 0


def test_hit_completes_an_incomplete_image(cache: Cache, repository: str, image: Image) -> None:
    """An image fetched only by HEAD, or one that lost a blob."""
    assert cache.ask(f"{repository}/manifests/1", "HEAD").status == 200
    assert cache.ask(f"{repository}/manifests/1").status == 200
    wait_complete(cache.daemon, image.blobs)
    assert cache.sent(f"{repository}/manifests/1") == 1


def test_layers_with_urls_are_fetched_from_the_registry(cache: Cache, repository: str) -> None:
    """Clients fetch them from these URLs, or from here if they cannot."""
    plain = plain_image(repository, 3000)
    data = b"a layer that must not be distributed"
    foreign = Blob(digest_of(data), data, OCI_LAYER)
    entries = [
        {"mediaType": blob.media_type, "digest": blob.digest, "size": len(blob.data)}
        for blob in (*plain.blobs, foreign)
    ]
    entries[-1]["urls"] = ["https://example.com/layer"]
    body = {"schemaVersion": 2, "mediaType": plain.manifest.media_type, "config": entries[0], "layers": entries[1:]}
    image = Image(manifest_of(body), (*plain.blobs, foreign), "")
    cache.upstream.add(repository, image, "1")
    assert cache.ask(f"{repository}/manifests/1").body == image.manifest.data
    wait_complete(cache.daemon, image.blobs)
    assert cache.sent(f"{repository}/blobs/{foreign.digest}") == 1


def test_no_complete_images_fetches_nothing_in_the_background(tmp_path: Path) -> None:
    """Missing blobs are still counted, also by the next process."""
    image = plain_image("incomplete", 5000)
    with completing_in(tmp_path, "--no-complete-images") as cache:
        cache.upstream.add("team/app", image, "1")
        assert cache.ask("team/app/manifests/1").status == 200
        assert cache.ask(f"team/app/blobs/{image.layers[0].digest}").body == image.layers[0].data
        cache.wait_stored(image.layers[0].digest)
        wait_scanned_twice(cache)
        assert cache.sent(f"team/app/blobs/{image.config.digest}") == 0
        assert not pending_file(cache.daemon, image.manifest).exists()
        assert incomplete(cache.daemon)[0] == 1
        cache.daemon.terminate()
        cache.daemon.start()
        wait_until(lambda: incomplete(cache.daemon) == (1, len(image.config.data)), SOON, "the state is reported")
        wait_scanned_twice(cache)
        assert cache.sent(f"team/app/blobs/{image.config.digest}") == 0
    assert log_lines(cache.daemon, "info", "completing") == []


def test_image_with_a_blob_missing_upstream_stays_incomplete(own_cache: Cache, repository: str) -> None:
    """The image stays incomplete, with one warning, and the upstream is not asked repeatedly."""
    cache, image = own_cache, plain_image("lacking", 5000)
    cache.upstream.add(repository, image, "1")
    cache.upstream.script(f"*/{image.config.digest}", Reply(404))
    assert cache.ask(f"{repository}/manifests/1").status == 200
    wait_until(lambda: log_lines(cache.daemon, "warn", "stays incomplete"), SOON, "a warning")
    refused = 1, len(image.config.data)
    wait_complete(cache.daemon, image.layers, refused=refused)
    completed_another(cache, repository, refused)
    (warning,) = log_lines(cache.daemon, "warn")
    assert f"{cache.upstream.host}/{repository}@{image.manifest.digest}" in warning
    assert image.config.digest in warning
    assert cache.sent(f"{repository}/blobs/{image.config.digest}") == 1


def naming(blobs: int) -> Image:
    """Return an image that names this many blobs of one byte, which no registry has."""
    entries = [
        {"mediaType": OCI_LAYER, "digest": digest_of(f"{blobs}, {number}".encode()), "size": 1}
        for number in range(blobs)
    ]
    body = {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": entries[0], "layers": entries[1:]}
    return Image(manifest_of(body), (), "")


@pytest.mark.parametrize(("blobs", "asked", "told"), [(900, 3, "897 not requested"), (20_000, 0, "20000 blobs")])
def test_image_of_absent_blobs_delays_no_other(own_cache: Cache, blobs: int, asked: int, told: str) -> None:
    """What an image may ask of its upstream, which answers slowly, is bounded, and told in one line."""
    cache, hostile, good = own_cache, naming(blobs), plain_image("good", 5000)
    cache.upstream.add("team/hostile", hostile, "1")
    cache.upstream.add("team/good", good, "1")
    with cache.scripted("/v2/team/hostile/blobs/*", Late(0.2)):
        assert cache.ask("team/hostile/manifests/1").status == 200
        assert cache.ask("team/good/manifests/1").status == 200
        wait_complete(cache.daemon, good.blobs, refused=(1, blobs))
    gets = [request for request in cache.upstream.requests if "/team/hostile/blobs/" in request.path]
    assert len(gets) == asked
    wait_until(lambda: log_lines(cache.daemon, "warn"), 10, "the image is told")
    (warning,) = log_lines(cache.daemon, "warn")
    assert f"{cache.upstream.host}/team/hostile@{hostile.manifest.digest}" in warning
    assert told in warning


@dataclass(frozen=True)
class Late(Rule):
    """Answer after some seconds."""

    seconds: float

    def __call__(self, request: Request, handler: Handler) -> Answer:
        """Return the handler's answer."""
        time.sleep(self.seconds)
        return handler(request)


def test_client_pauses_background_downloads(own_cache: Cache) -> None:
    """While a client's blob is downloaded, the background download stands still."""
    cache = own_cache
    image, wanted = plain_image("behind", 64 * MIB), plain_image("before", 4 * MIB)
    layer, blob = image.layers[0], wanted.layers[0]
    cache.upstream.add("team/behind", image, "1")
    cache.upstream.add("team/before", wanted, "1")
    partial = cache.daemon.image_path / "pulls" / "0" / layer.digest.partition(":")[2]

    def here() -> int:
        return partial.stat().st_size if partial.exists() else 0

    hold = Hold(3 * MIB)
    slowly = cache.scripted(f"*/{layer.digest}", Drip(16 * MIB))
    with slowly, cache.scripted(f"*/{blob.digest}", hold):
        assert cache.ask("team/behind/manifests/1").status == 200
        wait_until(lambda: here() > MIB, SOON, "bytes arrive")
        with cache.opened(f"team/before/blobs/{blob.digest}") as answer:
            assert answer.read(MIB) == blob.data[:MIB]
            sent = constant(lambda: cache.upstream.bytes_sent(layer.digest))
            assert here() < sent < len(layer.data) * 3 // 4
            assert constant(here) < len(layer.data) // 2
            hold.release.set()
            assert answer.read() == blob.data[MIB:]
        wait_until(lambda: cache.upstream.bytes_sent(layer.digest) > sent, SOON, "the download continues")
        wait_complete(cache.daemon, image.blobs)
    assert cache.upstream.bytes_sent(layer.digest) == len(layer.data)


def constant(count: Callable[[], int]) -> int:
    """Return the value of `count` once it has been constant for a second."""
    counts: list[int] = []

    def stands() -> bool:
        counts.append(count())
        return len(counts) > 50 and len(set(counts[-50:])) == 1

    wait_until(stands, STANDS, "no byte more")
    return counts[-1]


def test_client_raises_the_priority_of_a_background_download(own_cache: Cache) -> None:
    """The client does not wait behind another one because the blob's download began in the background."""
    cache = own_cache
    image, wanted = plain_image("joined", 32 * MIB), plain_image("beside", 4 * MIB)
    layer, blob = image.layers[0], wanted.layers[0]
    cache.upstream.add("team/joined", image, "1")
    cache.upstream.add("team/beside", wanted, "1")
    hold = Hold(3 * MIB)
    with cache.scripted(f"*/{layer.digest}", Drip(16 * MIB)), cache.scripted(f"*/{blob.digest}", hold):
        assert cache.ask("team/joined/manifests/1").status == 200
        wait_until(lambda: cache.upstream.bytes_sent(layer.digest) > MIB, SOON, "bytes arrive")
        with cache.opened(f"team/beside/blobs/{blob.digest}") as answer:
            assert answer.read(MIB) == blob.data[:MIB]
            assert cache.ask(f"team/joined/blobs/{layer.digest}").body == layer.data
            hold.release.set()
            assert answer.read() == blob.data[MIB:]
    wait_complete(cache.daemon, image.blobs)


def test_pending_images_are_completed_in_sequence(own_cache: Cache) -> None:
    """An image that becomes pending during another one's completion is completed right after it."""
    cache = own_cache
    first, second = plain_image("first", 5000), plain_image("second", 5000)
    cache.upstream.add("team/first", first, "1")
    cache.upstream.add("team/second", second, "1")
    hold = Hold(100)
    with cache.scripted(f"*/{first.layers[0].digest}", hold):
        assert cache.ask("team/first/manifests/1").status == 200
        assert hold.reached.wait(SOON)
        assert cache.ask("team/second/manifests/1").status == 200
        # A thread looks for the blobs when the client has its answer.
        wait_until(lambda: incomplete(cache.daemon)[0] == 2, SOON, "both are incomplete")
    wait_complete(cache.daemon, (*first.blobs, *second.blobs))


def test_client_takes_precedence_on_a_single_connection(tmp_path: Path) -> None:
    """Background work uses the same connection, and clients take precedence."""
    image, wanted = plain_image("slow", 10 * MIB), plain_image("wanted", 500_000)
    with completing_in(tmp_path, "--max-connections", "1") as cache:
        cache.upstream.add("team/slow", image, "1")
        cache.upstream.add("team/wanted", wanted, "1")
        layer, blob = image.layers[0], wanted.layers[0]
        with cache.scripted(f"*/{layer.digest}", Drip(MIB)):
            assert cache.ask("team/slow/manifests/1").status == 200
            wait_until(lambda: cache.upstream.bytes_sent(layer.digest), SOON, "bytes arrive")
            with cache.opened(f"team/wanted/blobs/{blob.digest}") as answer:
                assert answer.read() == blob.data
            assert cache.upstream.bytes_sent(layer.digest) < len(layer.data) // 2
