"""Mirrors below a path, as the daemon asks them over real connections."""

from __future__ import annotations

import pytest

from ociregistry.config.registries import Mirror
from ociregistry.names import Digest, Repository, Upstream
from ociregistry.upstream.network import Network
from tests.images import make_image
from tests.unit.support.common import REACTOR, image, manifest, on_reactor
from tests.unit.support.http_agents import INSTANCE
from tests.unit.test_upstream_network import configured, entry
from tests.upstream import ScriptedRegistry
from tests.upstream_auth import Tokens
from tests.upstream_rules import Below

BUILT = make_image("below a path")
IMAGE = manifest(BUILT)


@pytest.mark.parametrize(
    ("path", "asked", "ns"),
    [
        ("", "/v2", "docker.io"),
        ("/v2", "/v2", "docker.io"),
        # Harbor, a proxy cache project; GitLab, a group's dependency proxy; ECR, the prefix of a pull-through cache.
        ("/v2/dockerhub", "/v2/dockerhub", ""),
        ("/dockerhub", "/v2/dockerhub", ""),
        ("/v2/Group/sub/dependency_proxy/containers", "/v2/Group/sub/dependency_proxy/containers", ""),
        ("/docker-hub", "/v2/docker-hub", ""),
        # Artifactory, a remote repository by its own API, and a registry below the path of a reverse proxy.
        ("/artifactory/api/docker/docker-remote/v2", "/artifactory/api/docker/docker-remote/v2", "docker.io"),
        ("/prefix/v2/dockerhub", "/prefix/v2/dockerhub", ""),
        ("/v2x/v21", "/v2/v2x/v21", ""),
    ],
)
@on_reactor
async def test_mirror_with_path_is_asked_for_the_name_at_the_mirror(
    upstream: ScriptedRegistry, path: str, asked: str, ns: str
) -> None:
    """The paths are those that containerd takes with override_path.

    Sources: containerd issue 7436 and pull request 10765 of eks-anywhere (`/v2/v2/` without override_path), Harbor
    issue 18530 (proxy cache project as a mirror of containerd), bottlerocket issue 1888 (Artifactory).
    """
    prefix, _, project = asked.partition("/v2")
    name = f"{project}/library/app".removeprefix("/")
    upstream.add(name, BUILT, "1")
    upstream.script("*", Tokens(f"{upstream.url}/token", scope="missing"))
    upstream.script("*", Below(prefix))
    settings = configured(entry("docker.io", mirrors=(Mirror("http", Upstream(upstream.host), path),)))
    network = Network(settings, INSTANCE, REACTOR)
    network.startService()
    try:
        registry = network.registry(Upstream("docker.io"))
        assert await registry.manifest(image("docker.io/library/app:1")) == IMAGE
        layer = BUILT.layers[0]
        stream = await registry.blob(Repository(Upstream("docker.io"), "library/app"), Digest(layer.digest))
        received = bytearray()
        while piece := await stream.body.read():
            received += piece
        assert received == layer.data
    finally:
        network.stopService()
    content = [request for request in upstream.requests if request.path != "/token"]
    assert {request.path.rpartition("/")[0] for request in content} == {
        f"{asked}/library/app/manifests",
        f"{asked}/library/app/blobs",
    }
    assert {request.parameters("ns") for request in content} == {(ns,) if ns else ()}
    (token_request,) = (request for request in upstream.requests if request.path == "/token")
    assert token_request.parameters("scope") == (f"repository:{name}:pull",)
