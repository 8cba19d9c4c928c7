"""Lists of tags as Quay and ECR page them, for a client that follows the links, and for skopeo."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from itertools import islice

import pytest

from tests.client import fetch
from tests.images import Image
from tests.real.scripted import Cache, assert_error, daemon_in, plain_image
from tests.real.test_lists import GONE, pages
from tests.upstream import ScriptedRegistry
from tests.upstream_http import Rule
from tests.upstream_listings import ECR, QUAY, OpaquePages

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
def test_the_pages_of_the_upstream_are_followed_to_the_end(
    cache: Cache, repository: str, image: Image, rule: Rule
) -> None:
    """As crane 0.20 does, which begins with `n=1000`, and oras 1.3 and skopeo, which begin without `n`.

    All of them then send the path and query of the link as they are. Sources: go-containerregistry issue 794, regclient
    issue 272, docker_registry2 issues 34, 56 and 106.
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


def test_a_page_that_repeats_ends_the_list(cache: Cache, repository: str, image: Image) -> None:
    """Each time by another link."""
    with cache.scripted(f"/v2/{repository}/tags/*", OpaquePages("next_page", stuck=True)):
        assert [*islice(pages(cache, cache.url(f"{repository}/tags/list")), 9)] == [TAGS[:2], TAGS[:2]]


@PRODUCTS
@pytest.mark.parametrize("gone", GONE.values(), ids=GONE.keys())
def test_the_list_continues_from_the_cache(
    cache: Cache, repository: str, image: Image, rule: Rule, gone: Rule
) -> None:
    for tag in TAGS[1:]:
        assert cache.ask(f"{repository}/manifests/{tag}").status == 200
    path = f"{repository}/tags/list"
    with cache.scripted(f"/v2/{repository}/tags/*", rule):
        following = pages(cache, cache.url(path, "n=2"))
        assert next(following) == TAGS[:2]
        with cache.scripted(f"/v2/{repository}/tags/*", gone):
            assert [*islice(following, 9)] == [TAGS[2:4], TAGS[4:]]


def test_a_link_of_a_client_that_no_upstream_gave_is_refused(cache: Cache, repository: str, image: Image) -> None:
    before = cache.sent(repository)
    answer = fetch(cache.url(f"{repository}/tags/list", "next=a%0D%0Ab"))
    assert_error(answer, 400, "PAGINATION_NUMBER_INVALID")
    assert cache.sent(repository) == before
