"""Everything that takes image archives takes this one, under its name and with its digest."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from ociregistry import __version__
from tests.client import fetch
from tests.image.cri import NodeContainerd, Pod
from tests.image.layout import Layout
from tests.image.podman import Podman
from tests.peers import Containerd, hosts_dir
from tests.processes import Daemon, answers, free_port, run, twistd, wait_until
from tools.image import archive
from tools.image.files import File

_NAME = f"localhost/ociregistry:{__version__}"
_SOON = 60


@pytest.fixture(scope="module")
def node(layout: Layout, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeContainerd]:
    """containerd as on a node, with the image, and one for sandboxes that sleeps."""
    folder = tmp_path_factory.mktemp("node")
    busybox = Path("/bin/busybox").read_bytes()
    files = archive.layer([File("busybox", tarfile.REGTYPE, 0o755, 0, 0, content=busybox)], "busybox")
    entry = {"Entrypoint": ["/busybox", "sleep", "100000"]}
    pause = archive.image(
        "localhost/pause:1", layout.config["architecture"], "2026-01-01T00:00:00Z", entry, [files], {}
    )
    archive.write(pause, folder / "pause.tar", 0)
    with NodeContainerd(folder, pause.name) as node:
        for path in (folder / "pause.tar", layout.path):
            node.ctr("images", "import", str(path))
        yield node


def test_podman(podman: Podman, loaded: str, layout: Layout) -> None:
    assert loaded == _NAME
    (image,) = json.loads(podman("image", "inspect", loaded))
    assert image["Digest"] == layout.digest
    assert image["Config"]["User"] == "65532:65532"


def test_skopeo(layout: Layout, tmp_path: Path) -> None:
    source = f"oci-archive:{layout.path}"
    assert json.loads(run(["skopeo", "inspect", source]).stdout)["Digest"] == layout.digest
    run(["skopeo", "--insecure-policy", "copy", source, f"dir:{tmp_path / 'copy'}"])
    assert json.loads((tmp_path / "copy/manifest.json").read_text()) == layout.manifest


def test_containerd(node: NodeContainerd, layout: Layout) -> None:
    """Imported as for a kubelet, and run by runc."""
    listed = node.ctr("images", "ls", f"name=={_NAME}").splitlines()
    assert len(listed) == 2
    assert listed[1].split()[:3] == [_NAME, "application/vnd.oci.image.manifest.v1+json", layout.digest]
    said = node.ctr("run", "--rm", "--read-only", _NAME, "version", "/usr/bin/ociregistry", "version")
    assert said == f"ociregistry {__version__}\n"


def test_cri(node: NodeContainerd, store: Path) -> None:
    """A kubelet asks containerd to run it as a container of a pod, without privileges."""
    port = free_port()
    listening = ["--port", str(port), "--admin-listen", ""]
    pod = Pod(node, _NAME, listening, store)
    pod.start()
    wait_until(lambda: answers(f"http://127.0.0.1:{port}/readyz"), _SOON, "the pod is ready")
    assert pod.stop(30) == 0
    pod.remove()


def test_our_own_load_and_the_daemon(containerd: Containerd, layout: Layout, tmp_path: Path) -> None:
    """A node gets the cache's image from another cache that has loaded it."""
    store = tmp_path / "store"
    run(twistd("--image-path", str(store), "load", str(layout.path)))
    assert _NAME in run(twistd("--image-path", str(store), "list")).stdout
    with Daemon(tmp_path, None, "--air-gapped", image_path=store) as daemon:
        manifest = fetch(f"{daemon.url}/v2/ociregistry/manifests/{__version__}?ns=localhost")
        assert manifest.headers["Docker-Content-Digest"] == layout.digest
        done = containerd.pull(_NAME, hosts_dir(tmp_path / "certs.d", daemon.url, "_default"))
        assert done.returncode == 0, f"{done.stderr}\n{daemon.log}"
        assert containerd.unpacked(_NAME)
