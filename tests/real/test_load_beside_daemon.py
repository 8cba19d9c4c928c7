"""`load` and `verify --repair` beside a running daemon: it downloads for both, and nothing is fetched twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.client import fetch
from tests.images import MIB, Blob, Image, Index, digest_of, make_image, make_index
from tests.peers import Containerd, hosts_dir
from tests.processes import wait_until
from tests.real.caches import SEEN, SOON, Cache, blob_file, cache_in, manifest_of, plain_image, record
from tests.real.stores import (
    assert_all_served,
    assert_blobs_match_their_digests,
    command,
    command_line,
    contents,
    has_all_of,
    image_list,
    running_command,
)
from tests.upstream_rules import Hold

REPOSITORY = "team/app"


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Cache]:
    """A cache for this test alone."""
    with cache_in(tmp_path) as cache:
        yield cache


def publish(cache: Cache, **what: Image | Index) -> list[str]:
    """Publish these at the upstream by their tags; return their image URLs."""
    for tag, one in what.items():
        cache.upstream.add(REPOSITORY, one, tag)
    return [f"{cache.upstream.host}/{REPOSITORY}:{tag}" for tag in what]


def objects(cache: Cache) -> Counter[str]:
    """Count the upstream's requests per object."""
    return Counter(one.path for one in cache.upstream.requests if one.path != "/v2/")


def of_this_machine(what: Index) -> Image:
    """Return the image that load takes from an index, as it prints it."""
    return next(image for image in what.images if image.platform == "linux/amd64")


def test_load_and_clients_request_each_object_once(cache: Cache, tmp_path: Path) -> None:
    """Clients pull the same images meanwhile, some of which share layers; one is an index with metadata."""
    base = make_image("base", layer_size=300_000)
    images = {f"v{number}": make_image(number, base=base, layer_size=100_000) for number in range(4)}
    index = make_index("list")
    urls = publish(cache, **images, list=index)
    wanted = [*images.values(), of_this_machine(index)]
    listed = image_list(tmp_path / "list", [*urls, urls[0].replace(":v0", f"@{wanted[0].manifest.digest}")])
    argv = command_line(cache.daemon, "load", "--concurrent=5", "--arch=amd64", "--os=linux", listed)
    held = Hold(50_000)

    def pull(tag: str) -> bool:
        """Pull as a client does, and check the bytes."""
        what = images.get(tag, index)
        paths = {f"manifests/{tag}": what.manifest.data}
        image = what if isinstance(what, Image) else of_this_machine(what)
        paths[f"manifests/{image.manifest.digest}"] = image.manifest.data
        paths |= {f"blobs/{blob.digest}": blob.data for blob in image.blobs}
        return all(cache.ask(f"{REPOSITORY}/{path}").body == data for path, data in paths.items())

    with ThreadPoolExecutor() as clients, running_command(argv, tmp_path) as load:
        with cache.scripted("*/blobs/*", held):
            assert held.reached.wait(SOON), (tmp_path / "stderr").read_text()
            pulls = [clients.submit(pull, tag) for tag in (*images, "list", *images)]
            # Each client requests a blob that the load has begun.
            wait_until(lambda: len(cache.upstream.requests) >= 10, SOON, "all have begun")
        assert all(one.result() for one in pulls)
        assert load.wait(SOON * 3) == 0, (tmp_path / "stderr").read_text()
    *told, total = (tmp_path / "stdout").read_text().splitlines()
    assert {line.split(": ")[1] for line in told if line.startswith("loaded: ")} >= {*urls}
    # The same image by its digest is loaded last, and may be stored by then.
    assert total in ("6 loaded, 0 already there, 0 failed", "5 loaded, 1 already there, 0 failed")
    assert all(count == 1 for count in objects(cache).values()), objects(cache)
    assert {path.rpartition("/")[2] for path in objects(cache)} == {
        *(blob.digest for image in wanted for blob in image.blobs),
        *images,
        "list",
        of_this_machine(index).manifest.digest,
        *(part.digest for one in index.without("linux/amd64") for part in (one.manifest, one.config)),
    }
    assert all(has_all_of(cache.daemon.image_path, image) for image in wanted)


def test_containerd_and_load_of_the_same_image_together(cache: Cache, containerd: Containerd, tmp_path: Path) -> None:
    image = make_image("containerd beside load", layers=4, layer_size=MIB)
    (url,) = publish(cache, v1=image)
    argv = command_line(cache.daemon, "load", image_list(tmp_path / "list", [url]))
    hosts = hosts_dir(tmp_path / "certs.d", cache.daemon.url, "_default")
    held = Hold(50_000)
    with ThreadPoolExecutor() as clients, running_command(argv, tmp_path) as load:
        with cache.scripted("*/blobs/*", held):
            assert held.reached.wait(SOON), (tmp_path / "stderr").read_text()
            pulled = clients.submit(containerd.pull, url, hosts)
            wait_until(lambda: f"HEAD /v2/{REPOSITORY}/manifests/v1" in cache.daemon.log, SOON, "containerd asks")
        assert pulled.result().returncode == 0, pulled.result().stderr
        assert load.wait(SOON * 3) == 0, (tmp_path / "stderr").read_text()
    assert containerd.unpacked(url)
    containerd.remove(url)
    assert all(count == 1 for count in objects(cache).values()), objects(cache)
    assert has_all_of(cache.daemon.image_path, image)


def test_load_of_cached_images_sends_no_request(cache: Cache, tmp_path: Path) -> None:
    image, index = make_image("cached"), make_index("cached list")
    listed = image_list(tmp_path / "list", publish(cache, v1=image, list=index))
    load = ["load", "--platform=linux/amd64,linux/arm64", listed]
    assert "2 loaded, 0 already there, 0 failed" in command(cache.daemon, *load).stdout
    asked, since = len(cache.upstream.requests), cache.log_size
    assert "0 loaded, 2 already there, 0 failed" in command(cache.daemon, *load).stdout
    assert len(cache.upstream.requests) == asked
    assert "/v2/" not in cache.daemon.log[since:]
    assert "pulling" not in cache.daemon.log[since:]


@pytest.mark.parametrize("running", [True, False], ids=["through_the_daemon", "alone"])
def test_empty_blob_is_loaded(cache: Cache, tmp_path: Path, running: bool) -> None:
    """Artifacts have such layers."""
    empty = Blob(digest_of(b""), b"", "application/vnd.example.empty")
    config = Blob(digest_of(b"{}"), b"{}", "application/vnd.oci.empty.v1+json")
    blobs = (config, empty)
    named = [{"mediaType": blob.media_type, "digest": blob.digest, "size": len(blob.data)} for blob in blobs]
    image = Image(manifest_of({"schemaVersion": 2, "config": named[0], "layers": named[1:]}), blobs, "")
    if not running:
        cache.daemon.kill()
    listed = image_list(tmp_path / "list", publish(cache, v1=image))
    command(cache.daemon, "load", "--pull-timeout=5000", listed)
    assert has_all_of(cache.daemon.image_path, image)
    if not running:
        cache.daemon.start()


def test_load_fails_when_the_daemon_is_killed_and_can_be_repeated(cache: Cache, tmp_path: Path) -> None:
    """Each image fails at once with a line that says why; the next load fetches only what is missing."""
    done = make_image("done")
    images = {f"v{number}": plain_image(number, 2 * MIB) for number in range(3)}
    urls = publish(cache, done=done, **images)
    listed = image_list(tmp_path / "list", urls)
    held = [Hold(MIB) for _ in images]
    with running_command(command_line(cache.daemon, "load", "--concurrent=4", listed), tmp_path) as load:
        undo = [
            cache.upstream.script(f"*{image.layers[0].digest}", hold)
            for image, hold in zip(images.values(), held, strict=True)
        ]
        assert all(hold.reached.wait(SOON) for hold in held)
        wait_until(lambda: f"loaded: {urls[0]}" in (tmp_path / "stdout").read_text(), SOON, "one is loaded")
        partials = [cache.daemon.image_path / "pulls/0" / one.layers[0].digest[7:] for one in images.values()]
        wait_until(
            lambda: all(one.exists() and one.stat().st_size == MIB for one in partials),
            SOON,
            "half of each is written",
        )
        cache.daemon.kill()
        assert load.wait(SOON) == 1
    for hold, end in zip(held, undo, strict=True):
        hold.release.set()
        end()
    told, why = (tmp_path / "stdout").read_text(), (tmp_path / "stderr").read_text()
    assert "Traceback" not in why
    assert "3 of 4 images could not be loaded" in why
    for url in urls[1:]:
        (line,) = [line for line in told.splitlines() if line.startswith(f"failed: {url}: ")]
        assert "the daemon" in line, line
    cache.daemon.start()
    again = command(cache.daemon, "load", listed)
    assert "3 loaded, 1 already there, 0 failed" in again.stdout
    for image in (done, *images.values()):
        assert has_all_of(cache.daemon.image_path, image)
        for blob in image.blobs:
            assert cache.upstream.bytes_sent(blob.digest) <= 1.1 * len(blob.data)


def test_repair_goes_through_the_daemon(cache: Cache, tmp_path: Path) -> None:
    """Damaged content is never served, and is fetched again, once."""
    image, index, lost = make_image("sound"), make_index("damaged", platforms=["linux/amd64"]), make_image("record")
    urls = publish(cache, v1=image, list=index, lost=lost)
    command(cache.daemon, "load", "--arch=amd64", "--os=linux", image_list(tmp_path / "list", urls))
    layer = index.images[0].layers[1]
    damaged = bytearray(layer.data)
    damaged[100] ^= 1
    blob_file(cache.daemon, layer.digest).write_bytes(damaged)
    spoiled = record(cache, lost.manifest)
    spoiled.write_text(spoiled.read_text().replace(lost.layers[0].digest, f"sha256:{'0' * 64}"))
    asked, since = objects(cache), cache.log_size
    done = command(cache.daemon, "verify", "--repair")
    assert "2 damaged" in done.stdout
    assert done.stdout.count("\nrepaired: ") == 2, done.stdout
    assert objects(cache) - asked == {
        f"/v2/{REPOSITORY}/blobs/{layer.digest}": 1,
        f"/v2/{REPOSITORY}/manifests/{lost.manifest.digest}": 1,
    }
    # The daemon sent the request.
    assert cache.daemon.log[since:].count("pulling") == 2
    assert_blobs_match_their_digests(cache.daemon.image_path)
    command(cache.daemon, "verify")
    cache.upstream.close()
    url = f"{cache.daemon.url}/v2/{REPOSITORY}/manifests/lost?ns={cache.upstream.host}"
    wait_until(lambda: fetch(url).status == 200, 30, "the daemon sees what the command wrote")
    for tag, what in (("v1", image), ("list", index), ("lost", lost)):
        assert_all_served(cache.daemon, cache.upstream.host, REPOSITORY, tag, what)


def test_prune_during_a_repair_does_not_fail_it(cache: Cache, tmp_path: Path) -> None:
    """The rest of its blobs is not fetched, since no image needs it."""
    image = plain_image("pruned", 1000)
    command(cache.daemon, "load", image_list(tmp_path / "list", publish(cache, v1=image)))
    for blob in image.blobs:
        blob_file(cache.daemon, blob.digest).unlink()
    held = Hold()
    strange = cache.daemon.image_path / "img" / ("0" * 64)
    with running_command(command_line(cache.daemon, "--log-level=warn", "verify", "--repair"), tmp_path) as repair:
        with cache.scripted(f"*/{image.config.digest}", held):
            assert held.reached.wait(SOON), (tmp_path / "stderr").read_text()
            record(cache, image.manifest).unlink()
            # The command has scanned the store when it prints this.
            strange.touch()
            wait_until(lambda: str(strange) in (tmp_path / "stderr").read_text(), SOON, "the command looks")
        assert repair.wait(SOON * 3) == 0, (tmp_path / "stdout").read_text()
    assert (tmp_path / "stdout").read_text().endswith(": no image needs it\n")
    assert not cache.stored(image.layers[0].digest)


@pytest.mark.parametrize("running", [True, False], ids=["through_the_daemon", "alone"])
def test_repaired_record_keeps_its_names(cache: Cache, tmp_path: Path, running: bool) -> None:
    """Pruning its tag therefore removes it, as before the repair."""
    lost = make_image("record")
    command(cache.daemon, "load", image_list(tmp_path / "list", publish(cache, lost=lost)))
    listed = command(cache.daemon, "list").stdout
    spoiled = record(cache, lost.manifest)
    spoiled.write_text(spoiled.read_text().replace(lost.layers[0].digest, f"sha256:{'0' * 64}"))
    if not running:
        cache.daemon.kill()
    command(cache.daemon, "verify", "--repair")
    now = command(cache.daemon, "list").stdout
    if not running:
        cache.daemon.start()
    assert now == listed


def test_daemon_notices_changes_of_commands(cache: Cache, tmp_path: Path) -> None:
    """With the upstream gone, images loaded from an archive are hits, pruned ones are misses."""
    image, other = make_image("follows"), make_image("stays")
    urls = publish(cache, v1=image, stays=other)
    command(cache.daemon, "load", image_list(tmp_path / "list", urls))
    archive = str(tmp_path / "carried.tar")
    command(cache.daemon, "export", "--pattern=:v1$", "-o", archive)
    cache.upstream.close()
    tag = f"{REPOSITORY}/manifests/v1"
    layer = f"{REPOSITORY}/blobs/{image.layers[0].digest}"

    def statuses() -> list[int]:
        return [cache.ask(path).status for path in (tag, f"{REPOSITORY}/manifests/{image.manifest.digest}", layer)]

    for _ in range(2):
        assert statuses() == [200, 200, 200]
        command(cache.daemon, "prune", "--pattern=:v1$")
        wait_until(lambda: statuses() == [503, 503, 503], SEEN, "everything is a miss")
        assert b'["stays"]' in cache.ask(f"{REPOSITORY}/tags/list").body.replace(b" ", b"")
        assert contents(cache.daemon.image_path).keys() == {other.manifest.digest[7:]}
        command(cache.daemon, "load", archive)
        wait_until(lambda: statuses() == [200, 200, 200], SEEN, "everything is a hit")
        assert_all_served(cache.daemon, cache.upstream.host, REPOSITORY, "v1", image)
        assert b'["stays","v1"]' in cache.ask(f"{REPOSITORY}/tags/list").body.replace(b" ", b"")
    assert_all_served(cache.daemon, cache.upstream.host, REPOSITORY, "stays", other)
