"""A cluster behind an air gap: its first start with the chart, its life with a link, a lost volume, the uninstall.

The tests are an administrator's steps, each of which needs those before it.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from ociregistry import __version__
from tests.kubernetes.cluster import Cluster
from tests.kubernetes.installation import CHART, HOSTS, RELEASE, VOLUME, Installation, Workload, image_rows
from tests.kubernetes.layout import ADDRESS, CONTAINERD, PAUSE, UPSTREAM
from tests.kubernetes.upstream import PASSWORD, USER, PrivateUpstream
from tests.processes import ROOT, run, twistd

IMAGE = f"localhost/ociregistry:{__version__}"
SYSTEM, CARRIED, PULLED = (f"{UPSTREAM}/team/{name}:1" for name in ("system", "carried", "pulled"))
SCRIPT = "import-images.sh"
THEIR_HOSTS = 'server = "https://mirror.example"\n\n[host."https://mirror.example"]\n'
STORE = "/srv/ociregistry"


@pytest.fixture(scope="module")
def carried(cluster: Cluster, upstream: PrivateUpstream, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that is carried to the node: archives that were made where there is a link."""
    folder = tmp_path_factory.mktemp("connected")
    config = folder / "ociregistry.yaml"
    config.write_text(json.dumps([{"name": UPSTREAM, **_entry(upstream)}]))
    common = twistd("--image-path", str(folder / "edge"), "--config-path", str(config))
    for archive, images in (("cluster-images", (PAUSE, SYSTEM)), ("app-images", (CARRIED,))):
        (folder / archive).write_text("".join(f"{image}\n" for image in images))
        run(cluster.outside([*common, "load", "--platform", "linux/amd64", str(folder / archive)]))
        run([*common, "export", "--pattern", ",".join(images), "-o", str(folder / f"{archive}.tar")])
    shutil.copy(ROOT / "build" / f"ociregistry-{__version__}-amd64.oci.tar", folder / "ociregistry.tar")
    run(["tar", "-xzf", str(CHART), "-C", str(folder), "--strip-components=1", f"ociregistry/{SCRIPT}"])
    # On the node only what was carried is there.
    target = cluster.path("/srv/carried")
    target.mkdir(parents=True)
    for name in ("cluster-images.tar", "app-images.tar", "ociregistry.tar", SCRIPT):
        shutil.copy(folder / name, target)
    return Path("/srv/carried")


@pytest.fixture(scope="module")
def installation(cluster: Cluster) -> Installation:
    """The chart, not installed yet."""
    return Installation(cluster)


@pytest.fixture(scope="module")
def system(cluster: Cluster) -> Workload:
    """A part of the cluster itself, as DNS is."""
    return Workload(cluster, "system", SYSTEM)


@pytest.fixture(scope="module")
def pulled(cluster: Cluster) -> Workload:
    """An application whose image only the upstream has."""
    return Workload(cluster, "pulled", PULLED)


def _entry(upstream: PrivateUpstream, password: str = PASSWORD) -> dict[str, object]:
    return {"auth": {"user": USER, "password": password}, "tls": {"ca": str(upstream.authority)}}


@pytest.mark.usefixtures("carried")
def test_no_pod_starts_before_the_sandbox_image_is_there(cluster: Cluster, system: Workload) -> None:
    """The deadlock of the first start. What is to be carried was made while there was a link."""
    cluster.cut_link()
    system.create()
    system.wait_for_event(f"Failed to create pod sandbox.*{PAUSE}")


def test_import_says_which_image_is_missing(cluster: Cluster, carried: Path) -> None:
    with pytest.raises(RuntimeError, match=f"no pod can start yet: import {PAUSE} too"):
        cluster.run("sh", str(carried / SCRIPT), str(carried / "ociregistry.tar"))


def test_import_of_the_carried_images_starts_the_pod(cluster: Cluster, carried: Path, system: Workload) -> None:
    said = cluster.run("sh", str(carried / SCRIPT), f"{carried}/cluster-images.tar", f"{carried}/ociregistry.tar")
    assert [line.partition(": ")[2] for line in said.splitlines()] == [PAUSE, SYSTEM, IMAGE]
    for name in (PAUSE, SYSTEM, IMAGE):
        assert "io.cri-containerd.pinned=pinned" in cluster.ctr("images", "ls", f"name=={name}")
    system.wait_until_running()


def test_import_for_k3s_and_into_its_containerd(cluster: Cluster, carried: Path) -> None:
    """Before k3s runs for the first time, and while it runs: its containerd is another one."""
    agent = cluster.path("/var/lib/rancher/k3s/agent")
    agent.mkdir(parents=True)
    command = ("sh", str(carried / SCRIPT), str(carried / "ociregistry.tar"))
    assert "imports them when it starts" in cluster.run(*command)
    assert (agent / "images" / "ociregistry.tar").read_bytes() == cluster.path(command[-1]).read_bytes()
    socket, config = cluster.path("/run/k3s/containerd/containerd.sock"), agent / "etc" / "containerd" / "config.toml"
    for link, target in ((socket, CONTAINERD), (config, "/etc/containerd/config.toml")):
        link.parent.mkdir(parents=True)
        link.symlink_to(target)
    cluster.ctr("images", "rm", "--sync", IMAGE)
    assert f"imported: {IMAGE}" in cluster.run(*command)
    assert [path.name for path in (agent / "images").iterdir()] == ["ociregistry.tar"]
    shutil.rmtree(cluster.path("/var/lib/rancher"))


def test_chart_is_installed_without_a_link(cluster: Cluster, installation: Installation) -> None:
    theirs = cluster.path(HOSTS)
    theirs.parent.mkdir(parents=True)
    theirs.write_text(THEIR_HOSTS)
    installation.make_namespaces()
    installation.make_volume(STORE)
    installation.install()
    assert f'[host."http://{ADDRESS}:31080"]' in theirs.read_text()


def test_carried_application_starts_without_a_link(
    cluster: Cluster, carried: Path, installation: Installation
) -> None:
    """An archive in the folder of the volume is loaded, and pods find its images in the cache."""
    shutil.copy(cluster.path(f"{carried}/app-images.tar"), cluster.path(STORE))
    installation.run("load", "/var/lib/ociregistry/app-images.tar")
    cluster.path(f"{STORE}/app-images.tar").unlink()
    workload = Workload(cluster, "carried", CARRIED)
    workload.create()
    workload.wait_until_running()


def test_upgrade_with_another_entry_reloads_the_same_pod(
    cluster: Cluster, upstream: PrivateUpstream, installation: Installation, pulled: Workload
) -> None:
    """Without authority and password the upstream's image cannot be pulled; the upgrade names both."""
    cluster.restore_link()
    pulled.create()
    pulled.wait_for_event("Failed to pull image")
    before = installation.pod()
    authority = upstream.authority.read_text()
    installation.upgrade(registries=[{"name": UPSTREAM, **_entry(upstream), "tls": {"ca": authority}}])
    pulled.wait_until_running()
    after = installation.pod()
    assert after["metadata"]["uid"] == before["metadata"]["uid"]
    assert after["status"]["containerStatuses"][0]["restartCount"] == 0
    assert PASSWORD not in json.dumps(cluster.get("configmaps", "--all-namespaces"))


def test_upgrade_that_a_claim_cannot_follow_is_refused(cluster: Cluster, installation: Installation) -> None:
    """Else all but the claim would change: two pods at a volume that only one may write."""
    before = cluster.get("deployment", RELEASE, "--namespace", RELEASE)["spec"]
    chart = (RELEASE, str(CHART), "--namespace", RELEASE, "--reuse-values")
    with pytest.raises(RuntimeError, match=f"the claim {RELEASE} exists with ReadWriteOnce, which"):
        cluster.run("helm", "upgrade", *chart, "--set", "replicas=2,persistence.accessModes={ReadWriteMany}")
    assert cluster.get("deployment", RELEASE, "--namespace", RELEASE)["spec"] == before
    installation.wait_until_ready()


def test_pod_is_recreated_without_upstream_and_image(
    cluster: Cluster, upstream: PrivateUpstream, installation: Installation, pulled: Workload
) -> None:
    upstream.terminate()
    pulled.recreate_without_image()
    pulled.wait_until_running()
    assert PULLED in image_rows(cluster)


def test_claim_brings_the_cache_back(installation: Installation, pulled: Workload) -> None:
    before = installation.pod()["metadata"]["uid"]
    installation.delete_pod()
    installation.wait_until_ready()
    assert installation.pod()["metadata"]["uid"] != before
    pulled.recreate_without_image()
    pulled.wait_until_running()


def test_uninstall_leaves_the_hosts_as_they_were(cluster: Cluster, installation: Installation) -> None:
    installation.uninstall()
    assert cluster.path(HOSTS).read_text() == THEIR_HOSTS
    assert [path.name for path in cluster.path(HOSTS).parent.iterdir()] == ["hosts.toml"]


def test_cache_of_a_lost_node_waits_and_is_filled_again(
    cluster: Cluster, carried: Path, installation: Installation
) -> None:
    """A volume on a node that is gone leaves the cache pending; running pods stay; a new volume begins empty."""
    cluster.path(HOSTS).unlink()
    installation.delete_volume()
    installation.make_volume("/srv/lost", node="lost")
    installation.install(wait=False)
    installation.wait_for_event("node affinity")
    assert installation.pod()["status"]["phase"] == "Pending"
    workload = Workload(cluster, "carried", CARRIED)
    workload.wait_until_running()

    cluster.kubectl("delete", "persistentvolumeclaim", RELEASE, "--namespace", RELEASE, "--wait=false")
    installation.delete_pod()
    cluster.kubectl("delete", "persistentvolume", VOLUME)
    shutil.copy(cluster.path(f"{carried}/app-images.tar"), installation.make_volume("/srv/new"))
    installation.upgrade()
    installation.run("load", "/var/lib/ociregistry/app-images.tar")
    workload.recreate_without_image()
    workload.wait_until_running()


def test_uninstall_leaves_no_hosts_where_there_were_none(cluster: Cluster, installation: Installation) -> None:
    assert cluster.path(HOSTS).exists()
    installation.uninstall()
    assert [path for path in cluster.path(HOSTS).parent.parent.rglob("*") if not path.is_dir()] == []
    Workload(cluster, "carried", CARRIED).wait_until_running()
