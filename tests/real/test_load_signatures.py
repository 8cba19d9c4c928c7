"""`load --with-signatures`: signatures and attestations of an image are available when the upstream is gone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.client import fetch
from tests.images import Image, Index, make_artifact, make_image, make_index
from tests.peers import DockerRegistry
from tests.processes import Daemon
from tests.real.caches import Cache, cache_in
from tests.real.stores import assert_all_served, command, has_all_of, image_list

REPOSITORY = "team/signed"
ENDINGS = ("sig", "att", "sbom")


def published(push: Callable[..., None], *, referring: bool) -> tuple[Index, dict[str, Image]]:
    """Publish an index with cosign's tags for it and for its images; return the tags too."""
    index = make_index("signed")
    push(REPOSITORY, index, "v1")
    tagged: dict[str, Image] = {}
    for subject in (index.manifest, index.images[0].manifest):
        for ending in ENDINGS:
            if (ending, subject) == ("att", index.manifest):
                continue  # Not every image has all of them.
            tag = f"sha256-{subject.digest[7:]}.{ending}"
            tagged[tag] = make_image(tag, layers=1, layer_size=500)
            push(REPOSITORY, tagged[tag], tag)
    if referring:
        for number, subject in enumerate((index.manifest, index.images[0].manifest)):
            push(REPOSITORY, make_artifact(f"artifact {number}", subject))
    return index, tagged


def load(daemon: Daemon, host: str, folder: Path, *options: str) -> str:
    """Return the output of a load of the image."""
    listed = image_list(folder / "list", [f"{host}/{REPOSITORY}:v1"])
    return command(daemon, "load", "--platform=linux/amd64", *options, listed).stdout


@pytest.mark.parametrize("running", [True, False], ids=["through_the_daemon", "alone"])
def test_signature_tags_of_a_real_registry(registry: DockerRegistry, tmp_path: Path, running: bool) -> None:
    """The registry offers no referrers, which is not a failure."""
    index, tagged = published(registry.push, referring=False)
    daemon = Daemon(tmp_path, {registry.host: "http"}, "--no-complete-images")
    if running:
        daemon.start()
    assert "1 loaded" in load(daemon, registry.host, tmp_path, "--with-signatures")
    if not running:
        daemon.start()
    with daemon:
        registry.kill()
        assert_all_served(daemon, registry.host, REPOSITORY, "v1", Index(index.manifest, index.images[:1]))
        for tag, image in tagged.items():
            assert_all_served(daemon, registry.host, REPOSITORY, tag, image)
        listed = json.loads(fetch(f"{daemon.url}/v2/{REPOSITORY}/tags/list?ns={registry.host}").body)
        assert set(listed["tags"]) == {"v1", *tagged}
        assert "1 already there" in load(daemon, registry.host, tmp_path)
        assert "Traceback" not in daemon.log


@pytest.mark.parametrize("running", [True, False], ids=["through_the_daemon", "alone"])
def test_signature_tags_and_referrers(tmp_path: Path, running: bool) -> None:
    """Each is fetched once; without the option none is."""
    with cache_in(tmp_path) as cache:
        index, tagged = published(cache.upstream.add, referring=True)
        artifacts = [
            make_artifact(f"artifact {number}", subject)
            for number, subject in enumerate((index.manifest, index.images[0].manifest))
        ]
        if not running:
            cache.daemon.kill()
        load(cache.daemon, cache.upstream.host, tmp_path)
        assert not any(one.path.endswith(ENDINGS) or "referrers" in one.path for one in cache.upstream.requests)
        assert "1 loaded" in load(cache.daemon, cache.upstream.host, tmp_path, "--with-signatures")
        paths = [one.path for one in cache.upstream.requests]
        assert len(paths) == len(set(paths)), sorted(paths)
        if not running:
            cache.daemon.start()
        for what in (*tagged.values(), *artifacts):
            assert has_all_of(cache.daemon.image_path, what)
        cache.upstream.close()
        assert_served(cache, index, tagged, artifacts)


def assert_served(cache: Cache, index: Index, tagged: dict[str, Image], artifacts: list[Image]) -> None:
    """Assert that everything is served by the requests of a verifier."""
    host = cache.upstream.host
    assert_all_served(cache.daemon, host, REPOSITORY, "v1", Index(index.manifest, index.images[:1]))
    for tag, image in tagged.items():
        assert_all_served(cache.daemon, host, REPOSITORY, tag, image)
    for subject, artifact in zip((index.manifest, index.images[0].manifest), artifacts, strict=True):
        answer = cache.ask(f"{REPOSITORY}/referrers/{subject.digest}")
        assert answer.status == 200
        assert [entry["digest"] for entry in json.loads(answer.body)["manifests"]] == [artifact.manifest.digest]
        assert_all_served(cache.daemon, host, REPOSITORY, artifact.manifest.digest, artifact)
