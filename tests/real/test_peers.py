"""The real peers work together without our daemon."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.client import fetch
from tests.images import Image, Index, make_index
from tests.peers import Containerd, DockerRegistry, hosts_dir


@pytest.fixture(params=[False, True], ids=["oci", "docker"])
def index(request: pytest.FixtureRequest) -> Index:
    """An OCI index or a Docker list."""
    return make_index("peers", docker=request.param)


def test_containerd_pulls_unpacks_and_forgets(registry: DockerRegistry, containerd: Containerd, index: Index) -> None:
    registry.push("team/app", index, "1")
    ref = f"{registry.host}/team/app:1"
    for times in (1, 2):
        pulled = containerd.pull(ref)
        assert pulled.returncode == 0, pulled.stderr
        assert containerd.unpacked(ref)
        fetched = containerd.content
        assert index.manifest.digest in fetched
        (image,) = (image for image in index.images if image.manifest.digest in fetched)
        for blob in image.blobs:
            assert blob.digest in fetched
            assert registry.count("GET", f"/v2/team/app/blobs/{blob.digest}") == times
        containerd.remove(ref)
        assert not containerd.content.intersection({image.manifest.digest, *(b.digest for b in image.blobs)})


def test_containerd_uses_the_mirror_of_its_hosts_dir(
    registry: DockerRegistry, containerd: Containerd, index: Index, tmp_path: Path
) -> None:
    registry.push("team/app", index, "1")
    hosts = hosts_dir(tmp_path / "certs.d", registry.url, "example.test")
    pulled = containerd.pull("example.test/team/app:1", hosts)
    assert pulled.returncode == 0, pulled.stderr
    assert registry.count("HEAD", "/v2/team/app/manifests/1?ns=example.test") == 1
    failed = containerd.pull("example.test/team/app:2", hosts)
    assert failed.returncode != 0
    assert "StatusNotFound" in failed.stderr
    containerd.wipe()
    assert containerd.content == frozenset()


def test_skopeo_copies(registry: DockerRegistry, skopeo: Callable[..., None], index: Index, tmp_path: Path) -> None:
    registry.push("team/app", index, "1")
    skopeo(f"{registry.host}/team/app:1", f"dir:{tmp_path}/copy", "--all")
    copied = {hashlib.sha256(file.read_bytes()).hexdigest() for file in (tmp_path / "copy").iterdir()}
    digests = [manifest.digest for manifest in index.manifests] + [blob.digest for blob in index.blobs]
    assert copied.issuperset(digest.removeprefix("sha256:") for digest in digests)
    skopeo(f"{registry.host}/team/app:1", f"oci:{tmp_path}/layout:1")
    assert json.loads((tmp_path / "layout/index.json").read_text())["schemaVersion"] == 2


def test_docker_registry_restarts_on_its_port(registry: DockerRegistry, index: Index) -> None:
    registry.push("team/app", index)
    manifest = f"{registry.url}/v2/team/app/manifests/{index.manifest.digest}"
    registry.terminate()
    with pytest.raises(ConnectionRefusedError):
        fetch(manifest)
    registry.start()
    assert fetch(manifest, headers={"Accept": index.manifest.media_type}).body == index.manifest.data


def test_containerd_pulls_a_big_image(registry: DockerRegistry, containerd: Containerd, big_image: Image) -> None:
    registry.push("big", big_image, "1")
    ref = f"{registry.host}/big:1"
    pulled = containerd.pull(ref)
    assert pulled.returncode == 0, pulled.stderr
    assert containerd.unpacked(ref)
    containerd.remove(ref)
    (layer,) = big_image.layers
    assert len(layer.data) > 200_000_000
    assert registry.peak_memory() < len(layer.data)
