"""Lists of tags as Quay and ECR page them, and referrers of registries without the API, such as ghcr.io."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import pytest

from tests.client import fetch
from tests.images import OCI_INDEX, Image, Index, Manifest, digest_of, index_of, make_artifact
from tests.peers import DockerRegistry
from tests.processes import Daemon
from tests.real.caches import Cache, assert_error, cache_in, daemon_in, plain_image
from tests.real.stores import assert_all_served, command, image_list
from tests.real.test_tags_and_referrers import GONE, SBOM, SIGNATURE, assert_referrers, pages
from tests.upstream import ScriptedRegistry
from tests.upstream_http import Rule
from tests.upstream_listings import ECR, QUAY, NoReferrers, OpaquePages
from tests.upstream_rules import Cut, Reply

TAGS = [f"v{number}" for number in range(5)]
PRODUCTS = pytest.mark.parametrize("rule", [QUAY, ECR], ids=["quay", "ecr"])


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cache]:
    """A daemon that asks its upstream also for names that carry none, as skopeo sends them."""
    with ScriptedRegistry() as upstream:
        folder = tmp_path_factory.mktemp("products")
        with daemon_in(folder, upstream, "--default-ns", upstream.host) as daemon:
            yield Cache(daemon, upstream)


@pytest.fixture
def image(cache: Cache, repository: str) -> Image:
    """An image at the upstream with `TAGS`."""
    image = plain_image(repository, 100)
    cache.upstream.add(repository, image, *TAGS)
    return image


@PRODUCTS
def test_client_follows_pages_to_the_end(cache: Cache, repository: str, image: Image, rule: Rule) -> None:
    """As crane 0.20 does, which begins with `n=1000`, and oras 1.3 and skopeo, which begin without `n`.

    All of them then send the path and query of the link as they are. Sources: go-containerregistry issue 794,
    regclient issue 272, docker_registry2 issues 34, 56 and 106.
    """
    with cache.scripted(f"/v2/{repository}/tags/*", rule):
        path = f"{repository}/tags/list"
        for url in (
            cache.url(path),
            cache.url(path, "n=1000"),
            f"{cache.daemon.url}/v2/{cache.upstream.host}/{path}",
        ):
            assert [*islice(pages(cache, url), 9)] == [TAGS[:2], TAGS[2:4], TAGS[4:]]


@PRODUCTS
def test_skopeo_lists_all_tags(
    cache: Cache, repository: str, image: Image, rule: Rule, skopeo: Callable[..., None]
) -> None:
    """It repeated the first page until it was stopped, at 20 requests a second, or failed at the second."""
    ref = f"docker://{cache.daemon.host}/{repository}"
    with cache.scripted(f"/v2/{repository}/tags/*", rule):
        command = ["skopeo", "list-tags", "--tls-verify=false", ref]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["Tags"] == TAGS
    assert cache.sent(f"{repository}/tags/list") == 3


@PRODUCTS
def test_pages_through_a_chain_of_daemons(
    upstream: ScriptedRegistry, start_daemon: Callable[..., Daemon], rule: Rule
) -> None:
    """The link of the one carries that of the other, which carries that of the registry."""
    upstream.add("team/app", plain_image("chain", 100), *TAGS)
    upstream.script("/v2/team/app/tags/*", rule)
    chain = Cache(start_daemon({upstream.host: "http"}), upstream)
    for _ in range(2):
        chain = Cache(start_daemon({upstream.host: {"scheme": "http", "mirrors": [chain.daemon.url]}}), upstream)
    listed = pages(chain, chain.url("team/app/tags/list"))
    assert [*islice(listed, 9)] == [TAGS[:2], TAGS[2:4], TAGS[4:]]
    assert len(upstream.requests) == 3


def test_repeated_page_ends_the_list(cache: Cache, repository: str, image: Image) -> None:
    """Each time by another link."""
    with cache.scripted(f"/v2/{repository}/tags/*", OpaquePages("next_page", stuck=True)):
        assert [*islice(pages(cache, cache.url(f"{repository}/tags/list")), 9)] == [TAGS[:2], TAGS[:2]]


@PRODUCTS
@pytest.mark.parametrize("gone", GONE.values(), ids=GONE.keys())
def test_list_continues_from_the_cache(cache: Cache, repository: str, image: Image, rule: Rule, gone: Rule) -> None:
    for tag in TAGS[1:]:
        assert cache.ask(f"{repository}/manifests/{tag}").status == 200
    path = f"{repository}/tags/list"
    with cache.scripted(f"/v2/{repository}/tags/*", rule):
        following = pages(cache, cache.url(path, "n=2"))
        assert next(following) == TAGS[:2]
        with cache.scripted(f"/v2/{repository}/tags/*", gone):
            assert [*islice(following, 9)] == [TAGS[2:4], TAGS[4:]]


def test_malformed_next_page_of_client_is_refused(cache: Cache, repository: str, image: Image) -> None:
    before = cache.sent(repository)
    answer = fetch(cache.url(f"{repository}/tags/list", "next=a%0D%0Ab"))
    assert_error(answer, 400, "PAGINATION_NUMBER_INVALID")
    assert cache.sent(repository) == before


def referrers_of(cache: Cache, repository: str, image: Image, *kinds: str) -> Index:
    """Artifacts of these kinds at the upstream, with an index of them as clients push it where there is no API."""
    artifacts = [make_artifact(f"{repository} {kind}", image.manifest, artifact_type=kind) for kind in kinds]
    described = [
        {
            "mediaType": one.manifest.media_type,
            "digest": one.manifest.digest,
            "size": len(one.manifest.data),
            "artifactType": kind,
        }
        for one, kind in zip(artifacts, kinds, strict=True)
    ]
    body = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": described}
    data = json.dumps(body).encode()
    index = Index(Manifest(digest_of(data), data, OCI_INDEX), tuple(artifacts))
    cache.upstream.add(repository, index, image.manifest.digest.replace(":", "-"))
    return index


WITHOUT_API = pytest.mark.parametrize("rule", [NoReferrers(404), NoReferrers(303)], ids=["distribution", "ghcr"])
"""Sources: oras-go issue 633 (registry.k8s.io), oras-java issue 773 (ghcr.io), go-containerregistry issue 1647
(Docker's registry 2)."""


@WITHOUT_API
def test_referrers_of_a_registry_without_the_api(cache: Cache, repository: str, image: Image, rule: Rule) -> None:
    """As oras 1.3 (`discover`) and cosign ask: by GET, with `artifactType` if they look for one kind."""
    path = f"{repository}/referrers/{image.manifest.digest}"
    with cache.scripted("*", rule):
        assert_referrers(cache, path, {})
        index = referrers_of(cache, repository, image, SBOM, SIGNATURE)
        expected = dict(zip((one.manifest.digest for one in index.images), (SBOM, SIGNATURE), strict=True))
        assert_referrers(cache, path, expected)
        assert cache.ask(path).body == index.manifest.data
    for gone in GONE.values():
        with cache.scripted("*", gone):
            assert_referrers(cache, path, expected)


@WITHOUT_API
def test_empty_list_of_referrers_only_if_the_tag_can_be_requested(
    cache: Cache, repository: str, image: Image, rule: Rule
) -> None:
    path = f"{repository}/referrers/{image.manifest.digest}"
    for gone, status in ((Reply(503), 503), (Cut(None), 503), (Reply(200, b"<html>"), 503), (Reply(403), 404)):
        with cache.scripted("*", rule), cache.scripted(f"/v2/{repository}/manifests/*", gone):
            cache.refused(path, status, "UNAVAILABLE" if status == 503 else "MANIFEST_UNKNOWN")


@WITHOUT_API
@pytest.mark.parametrize("running", [True, False], ids=["through_the_daemon", "alone"])
def test_referrers_are_loaded_from_a_registry_without_the_api(tmp_path: Path, rule: Rule, running: bool) -> None:
    with cache_in(tmp_path) as cache:
        image = plain_image("loaded", 100)
        cache.upstream.add("team/app", image, "1")
        index = referrers_of(cache, "team/app", image, SBOM)
        if not running:
            cache.daemon.kill()
        with cache.scripted("*", rule):
            listed = image_list(tmp_path / "list", [f"{cache.upstream.host}/team/app:1"])
            assert "1 loaded" in command(cache.daemon, "load", "--with-signatures", listed).stdout
        if not running:
            cache.daemon.start()
        cache.upstream.close()
        assert cache.ask(f"team/app/referrers/{image.manifest.digest}").body == index.manifest.data
        (artifact,) = index.images
        assert_all_served(cache.daemon, cache.upstream.host, "team/app", artifact.manifest.digest, artifact)


def test_referrers_are_loaded_from_dockers_registry(registry: DockerRegistry, tmp_path: Path) -> None:
    """It has no referrers API."""
    image = plain_image("pushed", 100)
    registry.push("team/app", image, "1")
    artifact = make_artifact("pushed", image.manifest)
    registry.push("team/app", artifact)
    tag = image.manifest.digest.replace(":", "-")
    registry.push("team/app", index_of([artifact]), tag)
    with Daemon(tmp_path, {registry.host: "http"}, "--no-complete-images") as daemon:
        listed = image_list(tmp_path / "list", [f"{registry.host}/team/app:1"])
        assert "1 loaded" in command(daemon, "load", "--with-signatures", listed).stdout
        registry.kill()
        assert_all_served(daemon, registry.host, "team/app", artifact.manifest.digest, artifact)
