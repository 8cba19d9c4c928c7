"""Archives and folders of other programs are loaded, and containerd pulls them without any upstream."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import zstandard

from ociregistry.platforms import machine_architecture
from tests.client import fetch
from tests.images import (
    DOCKER_LIST,
    DOCKER_MANIFEST,
    OCI_INDEX,
    OCI_MANIFEST,
    Image,
    Index,
    Manifest,
    make_image,
    make_index,
)
from tests.peers import Containerd, DockerRegistry, hosts_dir
from tests.real.sites import Site, parts_of, pull_offline

Skopeo = Callable[..., None]

INDEX = make_index("imported/index")
DOCKER_INDEX = make_index("imported/docker index", docker=True)
IMAGE = make_image("imported/image")
DOCKER = make_image("imported/docker", docker=True, layers=3)
NEXT = make_image("imported/next", layers=1)

KINDS = {OCI_INDEX: "v1.oci.index", OCI_MANIFEST: "v1.oci.manifest", DOCKER_LIST: "v2.docker.manifestList"}
KINDS[DOCKER_MANIFEST] = "v2.docker.manifest"
TYPES = {DOCKER_LIST: 1, DOCKER_MANIFEST: 2, OCI_INDEX: 3, OCI_MANIFEST: 4}


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """A site with a new store, which knows no upstream."""
    return Site(tmp_path / "site")


def assert_pulled(site: Site, containerd: Containerd, expected: Mapping[str, set[str]]) -> None:
    """Assert that containerd pulls exactly these digests by these references from a daemon on the store."""
    with site.daemon("--air-gapped") as daemon:
        for ref, digests in expected.items():
            assert pull_offline(daemon, containerd, ref) == digests


def notes_of(printed: Sequence[str], ref: str) -> str:
    """Return what `load` says about a loaded image."""
    (line,) = (line for line in printed if line.startswith(f"loaded: {ref}"))
    return line.removeprefix(f"loaded: {ref}")


@pytest.mark.parametrize(
    "what", [INDEX, DOCKER_INDEX, IMAGE, DOCKER], ids=["index", "docker list", "image", "docker"]
)
def test_load_export_of_ctr(
    registry: DockerRegistry, containerd: Containerd, site: Site, tmp_path: Path, what: Index | Image
) -> None:
    """Digests are the registry's, also of an index, of which ctr exports one platform."""
    ref = f"{registry.host}/team/app:v1"
    registry.push("team/app", what, "v1")
    assert containerd.pull(ref).returncode == 0
    archive = tmp_path / "ctr.tar"
    exported = containerd.ctr("images", "export", str(archive), ref)
    assert exported.returncode == 0, exported.stderr
    containerd.remove(ref)
    registry.kill()
    assert site.succeed("load", str(archive))[-1] == "1 loaded, 0 already there, 0 failed"
    assert site.digests[ref] == what.manifest.digest
    assert_pulled(site, containerd, {ref: parts_of(what)})


def test_load_export_of_ctr_with_several_images_and_platforms(
    registry: DockerRegistry, containerd: Containerd, site: Site, tmp_path: Path
) -> None:
    """All of them are loaded, and of the index every platform."""
    pushed: dict[str, Index | Image] = {
        f"{registry.host}/team/{one}:v1": what for one, what in (("index", INDEX), ("image", IMAGE))
    }
    for ref, what in pushed.items():
        registry.push(ref.partition("/")[2].removesuffix(":v1"), what, "v1")
        fetched = containerd.ctr("content", "fetch", "--all-platforms", "--plain-http", ref)
        assert fetched.returncode == 0, fetched.stderr
    archive = tmp_path / "ctr.tar"
    exported = containerd.ctr("images", "export", "--all-platforms", str(archive), *pushed)
    assert exported.returncode == 0, exported.stderr
    for ref in pushed:
        containerd.remove(ref)
    registry.kill()
    assert site.succeed("load", str(archive))[-1] == "2 loaded, 0 already there, 0 failed"
    everything = {blob.digest for what in pushed.values() for blob in what.blobs}
    assert site.stored("blobs").keys() == {digest.partition(":")[2] for digest in everything}
    assert_pulled(site, containerd, {ref: parts_of(what) for ref, what in pushed.items()})


@pytest.mark.parametrize("transport", ["oci", "oci-archive"])
def test_load_oci_layout_of_skopeo(
    registry: DockerRegistry, containerd: Containerd, skopeo: Skopeo, site: Site, tmp_path: Path, transport: str
) -> None:
    """A folder with two images, or an archive; digests are the registry's."""
    ref, single = f"{registry.host}/team/index:v1", f"{registry.host}/team/image:v1"
    registry.push("team/index", INDEX, "v1")
    registry.push("team/image", IMAGE, "v1")
    target = tmp_path / "layout"
    skopeo(ref, f"{transport}:{target}:{ref}", "--all", "--preserve-digests")
    expected: dict[str, Index | Image] = {ref: INDEX}
    if transport == "oci":
        skopeo(single, f"oci:{target}:{single}", "--preserve-digests")
        expected[single] = IMAGE
    registry.kill()
    assert site.succeed("load", str(target))[-1] == f"{len(expected)} loaded, 0 already there, 0 failed"
    assert expected.keys() <= site.digests.keys()
    assert all(site.digests[name] == what.manifest.digest for name, what in expected.items())
    assert_pulled(site, containerd, {name: parts_of(what) for name, what in expected.items()})


@pytest.mark.parametrize("name", ["", ":v1"], ids=["no name", "a tag alone"])
def test_oci_layout_without_an_image_name(
    registry: DockerRegistry, skopeo: Skopeo, site: Site, tmp_path: Path, name: str
) -> None:
    """The message says how to name it, and nothing is left in the store; with the name it is loaded."""
    registry.push("team/image", IMAGE, "v1")
    target = tmp_path / "layout"
    skopeo(f"{registry.host}/team/image:v1", f"oci:{target}{name}")
    printed, complaints = site.fail("load", str(target))
    assert len(printed) == 2
    assert printed[0].startswith("failed: ")
    assert printed[0].endswith(": give it its name, such as --name docker.io/library/nginx:1.25")
    assert complaints == ["ociregistry: 1 of 1 image could not be loaded"]
    assert site.leftovers == set()
    ref = f"{registry.host}/team/image"
    site.succeed("load", str(target), "--name", ref if name else f"{ref}:v1")
    assert site.digests == {f"{ref}:v1": IMAGE.manifest.digest}


@pytest.mark.parametrize("what", [IMAGE, INDEX], ids=["image", "index"])
def test_load_dir_of_skopeo_with_a_name(
    registry: DockerRegistry, skopeo: Skopeo, site: Site, tmp_path: Path, what: Image | Index
) -> None:
    registry.push("team/image", what, "v1")
    target, ref = tmp_path / "dir", f"{registry.host}/team/image:v1"
    skopeo(ref, f"dir:{target}", "--all")
    printed, _ = site.fail("load", str(target))
    assert "what skopeo's dir: writes does not say what image it is" in printed[0]
    site.succeed("load", str(target), "--name", ref)
    assert site.digests[ref] == what.manifest.digest
    (columns,) = (columns for columns in site.long_list if columns[0] == ref)
    assert columns[-1] == "complete"


def test_load_docker_save(
    registry: DockerRegistry, containerd: Containerd, skopeo: Skopeo, site: Site, tmp_path: Path
) -> None:
    """The config is the same, the layers are uncompressed; the output says that the digest is not the registry's."""
    ref, short = f"{registry.host}/team/app:v1", "docker.io/library/nginx:1.25"
    registry.push("team/app", DOCKER, "v1")
    archive = tmp_path / "saved.tar"
    skopeo(ref, f"docker-archive:{archive}:{ref}", "--additional-tag", "nginx:1.25")
    registry.kill()
    printed = site.succeed("load", str(archive))
    assert printed[-1] == "2 loaded, 0 already there, 0 failed"
    for name in (ref, short):
        assert "its digest is not the registry's" in notes_of(printed, name)
        assert site.digests[name] != DOCKER.manifest.digest
    assert site.digests[ref] == site.digests[short]
    diff_ids = json.loads(DOCKER.config.data)["rootfs"]["diff_ids"]
    digests = {site.digests[ref], DOCKER.config.digest, *diff_ids}
    assert_pulled(site, containerd, {ref: digests, short: digests})
    assert [line.partition(":")[0] for line in site.succeed("load", str(archive))[:-1]] == ["already there"] * 2


def test_last_loaded_archive_without_dates_has_the_tag(
    registry: DockerRegistry, containerd: Containerd, skopeo: Skopeo, site: Site, tmp_path: Path
) -> None:
    """Updates work with tools that store no dates; the older image is available by its digest."""
    ref = f"{registry.host}/team/app:stable"
    archives: list[Path] = []
    for image in (DOCKER, NEXT):
        registry.push("team/app", image, "stable")
        archives.append(tmp_path / f"{len(archives)}.tar")
        skopeo(ref, f"oci-archive:{archives[-1]}:{ref}", "--preserve-digests")
    registry.kill()
    site.succeed("load", *map(str, archives))
    assert site.digests.keys() == {ref, f"{registry.host}/team/app@{DOCKER.manifest.digest}"}
    assert_pulled(site, containerd, {ref: parts_of(NEXT)})


def test_load_one_platform_of_an_archive(
    registry: DockerRegistry, skopeo: Skopeo, site: Site, tmp_path: Path
) -> None:
    """The option may precede or follow the command; without it all platforms are loaded, on any machine."""
    ref, archive = f"{registry.host}/team/index:v1", tmp_path / "index.tar"
    registry.push("team/index", INDEX, "v1")
    skopeo(ref, f"oci-archive:{archive}:{ref}", "--all", "--preserve-digests")
    registry.kill()

    def platforms() -> str:
        (columns,) = (columns for columns in site.long_list if columns[0] == ref)
        return columns[-2]

    site.succeed("load", "--platform", "linux/aarch64", str(archive))
    assert platforms() == "linux/arm64"
    site.succeed("--arch", "amd64", "--os", "linux", "load", str(archive))
    assert platforms() == "linux/amd64,linux/arm64"
    other = Site(tmp_path / "other")
    other.succeed("load", str(archive))
    assert [columns[-2] for columns in other.long_list if columns[0] == ref] == ["linux/amd64,linux/arm64"]
    versioned = Site(tmp_path / "versioned")
    versioned.succeed("load", str(archive), "--os-version", "10.0")
    (platform,) = (columns[-2] for columns in versioned.long_list if columns[0] == ref)
    assert platform == f"linux/{machine_architecture()}"
    printed, _ = other.fail("load", str(archive), "--platform", "linux/s390x")
    assert printed[0] == f"failed: {ref}: no image for linux/s390x; available: linux/amd64, linux/arm64"


@pytest.mark.parametrize("kind", ["docker-archive", "oci-archive"])
@pytest.mark.parametrize("compressed", [False, True], ids=["plain", "zstd"])
def test_archives_for_two_platforms_serve_both(
    registry: DockerRegistry,
    containerd: Containerd,
    skopeo: Skopeo,
    site: Site,
    tmp_path: Path,
    kind: str,
    compressed: bool,
) -> None:
    """Like the air-gap files of k3s, one per platform: containerd finds the image of each platform in the index."""
    ref = f"{registry.host}/team/app:v1"
    archives: list[Path] = []
    for image in INDEX.images:
        registry.push("team/app", image, "v1")
        archives.append(tmp_path / f"{len(archives)}.tar")
        skopeo(ref, f"{kind}:{archives[-1]}:{ref}")
        if compressed:
            packed = archives[-1].with_suffix(".tar.zst")
            packed.write_bytes(zstandard.compress(archives[-1].read_bytes()))
            archives[-1] = packed
    registry.kill()
    printed = site.succeed("load", *map(str, archives))
    assert "the name means an index of linux/amd64, linux/arm64, made here" in notes_of(printed[1:], ref)
    assert printed[-1] == "2 loaded, 0 already there, 0 failed"
    layers = {
        image.platform: set(json.loads(image.config.data)["rootfs"]["diff_ids"])
        if kind == "docker-archive"
        else {layer.digest for layer in image.layers}
        for image in INDEX.images
    }
    with site.daemon("--air-gapped") as daemon:
        pull_offline(daemon, containerd, ref)
        hosts = hosts_dir(tmp_path / "certs.d", daemon.url, "_default")
        for image in INDEX.images:
            containerd.wipe()
            done = containerd.pull(ref, hosts, "--platform", image.platform)
            assert done.returncode == 0, done.stderr
            held = [layers[one.platform] <= containerd.content for one in INDEX.images]
            assert held == [one is image for one in INDEX.images]
    containerd.wipe()
    assert [line.partition(":")[0] for line in site.succeed("load", *map(str, archives))[:-1]] == [
        "already there"
    ] * 2


def holder(of: Manifest, url: str) -> bytes:
    """Return the Go server's record of a manifest, in its current version."""
    empty: dict[str, object] = {"schemaVersion": 0}
    document: dict[str, Any] = {
        "type": TYPES[of.media_type],
        "digest": of.digest.partition(":")[2],
        "imageUrl": url,
        "bytes": base64.b64encode(of.data).decode(),
        "v1.oci.index": {**empty, "manifests": None},
        "v1.oci.manifest": {**empty, "config": {"mediaType": "", "digest": "", "size": 0}, "layers": None},
        "v2.docker.manifestList": {**empty, "mediaType": "", "manifests": None},
        "v2.docker.manifest": {
            **empty,
            "mediaType": "",
            "config": {"mediaType": "", "size": 0, "digest": ""},
            "layers": None,
        },
        "created": "2024-03-01T22:17:30",
        "pulled": "2024-03-02T08:00:00",
    }
    return json.dumps({**document, KINDS[of.media_type]: json.loads(of.data)}).encode()


def go_folder(folder: Path, images: Mapping[str, Index | Image]) -> Path:
    """Make the image folder of a Go server that has pulled this machine's platform of these images."""
    for name in ("blobs", "fat", "img", "lts", "pulls"):
        (folder / name).mkdir(parents=True)
    for url, what in images.items():
        single = what if isinstance(what, Image) else what.images[0]
        by_digest = f"{url.rpartition(':')[0]}@{single.manifest.digest}"
        holders = {"img": (single.manifest, url if what is single else by_digest)}
        if what is not single:
            holders["lts" if url.endswith(":latest") else "fat"] = (what.manifest, url)
        for kind, (manifest, known_by) in holders.items():
            (folder / kind / manifest.digest.partition(":")[2]).write_bytes(holder(manifest, known_by))
        for blob in single.blobs:
            (folder / "blobs" / blob.digest.partition(":")[2]).write_bytes(blob.data)
    return folder


def test_load_image_folder_of_the_go_server(site: Site, containerd: Containerd, tmp_path: Path) -> None:
    """Indexes and images of all media types; they keep their creation time, which was local there."""
    images: dict[str, Index | Image] = {
        "docker.io/library/nginx:1.25": INDEX,
        "docker.io/library/busybox:latest": DOCKER_INDEX,
        "registry.example/team/image:v1": IMAGE,
        "registry.example:5000/a/b/c/docker:v1": DOCKER,
    }
    folder = go_folder(tmp_path / "go", images)
    printed = site.succeed("load", str(folder))
    assert printed[-1] == "6 loaded, 0 already there, 0 failed"
    assert {url: site.digests[url] for url in images} == {url: what.manifest.digest for url, what in images.items()}
    listed = [line.split(" ") for line in site.succeed("list")]
    assert {created for _, _, created in listed} == {"2024-03-01T22:17:30"}
    assert_pulled(site, containerd, {url: parts_of(what) for url, what in images.items()})


def test_store_on_the_image_folder_of_the_go_server(containerd: Containerd, tmp_path: Path) -> None:
    """The folder is both the archive and the store that it is loaded into, blobs included."""
    images: dict[str, Index | Image] = {"docker.io/library/nginx:1.25": INDEX}
    place = Site(tmp_path / "both")
    place.folder.mkdir()
    go_folder(place.images, images)
    place.succeed("load", str(place.images))
    assert place.digests.items() >= {"docker.io/library/nginx:1.25": INDEX.manifest.digest}.items()
    assert_pulled(place, containerd, {"docker.io/library/nginx:1.25": parts_of(INDEX)})


def test_load_image_folder_of_another_store(
    registry: DockerRegistry, site: Site, containerd: Containerd, tmp_path: Path
) -> None:
    """A store on a USB stick is loaded like the Go server's, also while a daemon runs on it."""
    registry.push("team/index", INDEX, "v1")
    ref = f"{registry.host}/team/index:v1"
    here = Site(tmp_path / "here", (registry.host,))
    here.load(ref)
    registry.kill()
    with here.daemon() as daemon:
        site.succeed("load", str(here.images))
        assert fetch(f"{daemon.url}/health").status == 200
    assert (site.digests, site.succeed("list")) == (here.digests, here.succeed("list"))
    assert_pulled(site, containerd, {ref: parts_of(INDEX)})
