"""Everything that takes image archives takes this one, under its name and with its digest."""

from __future__ import annotations

import json
from pathlib import Path

from ociregistry import __version__
from tests.client import fetch
from tests.image.layout import Layout
from tests.image.podman import Podman
from tests.peers import Containerd, hosts_dir
from tests.processes import Daemon, run, twistd

_NAME = f"localhost/ociregistry:{__version__}"


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


def test_containerd(containerd: Containerd, layout: Layout) -> None:
    """Imported as for a kubelet, and run by runc."""
    done = containerd.ctr("--namespace", "k8s.io", "images", "import", str(layout.path))
    assert done.returncode == 0, done.stderr
    listed = containerd.ctr("--namespace", "k8s.io", "images", "ls", f"name=={_NAME}").stdout.splitlines()
    assert len(listed) == 2
    assert listed[1].split()[:3] == [_NAME, "application/vnd.oci.image.manifest.v1+json", layout.digest]
    chosen = ("--snapshotter", containerd.snapshotter)
    done = containerd.ctr(
        "--namespace",
        "k8s.io",
        "run",
        "--rm",
        "--read-only",
        *chosen,
        _NAME,
        "version",
        "/usr/bin/ociregistry",
        "version",
    )
    assert (done.returncode, done.stdout) == (0, f"ociregistry {__version__}\n"), done.stderr


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
