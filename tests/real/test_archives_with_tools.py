"""Archives written by skopeo and containerd are loaded, and both read ours."""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from twisted.internet.task import Clock

from ociregistry.archives.exporting import export_images
from ociregistry.names import Digest
from ociregistry.pullthrough.loader import LoadStatus
from ociregistry.store.records import Dates
from ociregistry.store.snapshot import Snapshot
from ociregistry.store.store import Store
from tests.images import Image, Index, make_image, make_index
from tests.peers import Containerd, DockerRegistry
from tests.processes import run
from tests.unit.support.archives import NAME, image_blobs, load, write_folder
from tests.unit.support.common import REACTOR, image, manifest, on_reactor

DAY = datetime(2026, 1, 1, tzinfo=UTC)
Copy = Callable[..., None]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The store's folder."""
    return tmp_path / "store"


@pytest.fixture
def store(root: Path) -> Iterator[Store]:
    """An empty store."""
    store = Store(root, Clock(), REACTOR)
    store.startService()
    yield store
    store.stopService()


@pytest.fixture(params=[False, True], ids=["oci", "docker"])
def index(request: pytest.FixtureRequest) -> Index:
    """An OCI index or a Docker list."""
    return make_index(f"tools {request.param}", docker=request.param)


@pytest.fixture
def pushed(registry: DockerRegistry, index: Index) -> str:
    """The index's name in a registry."""
    registry.push("team/app", index, "1")
    return f"{registry.host}/team/app:1"


async def is_whole(store: Store, one: Image) -> bool:
    """Whether the store has the image, with correct bytes."""
    found = await store.manifest(image(f"any.example/x@{one.manifest.digest}"))
    return found == manifest(one) and await store.missing(Digest(one.manifest.digest)) == {}


def all_digests_match(root: Path) -> bool:
    """Whether all blobs of the store have their digests."""
    blobs = list((root / "blobs").iterdir())
    return blobs != [] and all(hashlib.sha256(path.read_bytes()).hexdigest() == path.name for path in blobs)


@pytest.mark.parametrize("kind", ["oci-archive", "oci"])
@on_reactor
async def test_load_oci_layouts_of_skopeo(
    store: Store, root: Path, tmp_path: Path, skopeo: Copy, pushed: str, index: Index, kind: str
) -> None:
    skopeo(pushed, f"{kind}:{tmp_path}/archive:nginx:1.25", "--all")
    (outcome,) = await load(store, tmp_path / "archive")
    assert (outcome.name, outcome.ended, outcome.blobs) == (NAME, LoadStatus.LOADED, 6)
    found = await store.manifest(image(NAME))
    assert found is not None
    assert len(found.children) == 2
    for child in found.children:
        assert await store.missing(child.digest) == {}
    assert all_digests_match(root)
    if kind == "oci":
        packed = tmp_path / "packed"
        run(["tar", "-C", str(tmp_path), "-cJf", str(packed), "archive"])
        assert [str(outcome) for outcome in await load(store, packed)] == [f"already there: {NAME}"]


@on_reactor
async def test_skopeo_keeps_digests_of_oci_images(
    store: Store, registry: DockerRegistry, tmp_path: Path, skopeo: Copy
) -> None:
    index = make_index("digests")
    registry.push("team/app", index, "1")
    skopeo(f"{registry.host}/team/app:1", f"oci-archive:{tmp_path}/a.tar:{NAME}", "--all")
    await load(store, tmp_path / "a.tar")
    assert await store.manifest(image(NAME)) == manifest(index)
    for one in index.images:
        assert await is_whole(store, one)


@on_reactor
async def test_load_docker_archives_of_skopeo(
    store: Store, root: Path, tmp_path: Path, skopeo: Copy, pushed: str, index: Index
) -> None:
    skopeo(pushed, f"docker-archive:{tmp_path}/a.tar:nginx:1.25")
    (outcome,) = await load(store, tmp_path / "a.tar")
    assert (outcome.name, outcome.ended, outcome.blobs) == (NAME, LoadStatus.LOADED, 3)
    assert "not the registry's" in outcome.notes[0]
    found = await store.manifest(image(NAME))
    assert found is not None
    assert found.blobs[0].digest == index.images[0].config.digest
    assert all_digests_match(root)
    skopeo(pushed, f"docker-archive:{tmp_path}/nameless.tar")
    (outcome,) = await load(store, tmp_path / "nameless.tar")
    assert outcome.ended is LoadStatus.FAILED


@on_reactor
async def test_load_exports_of_containerd(
    store: Store, root: Path, tmp_path: Path, containerd: Containerd, pushed: str, index: Index
) -> None:
    assert containerd.pull(pushed).returncode == 0
    for options in ([], ["--skip-manifest-json"]):
        target = tmp_path / f"{len(options)}.tar"
        exported = containerd.ctr("images", "export", *options, str(target), pushed)
        assert exported.returncode == 0, exported.stderr
    containerd.remove(pushed)
    (loaded,) = await load(store, tmp_path / "0.tar")
    assert (loaded.name, loaded.ended, loaded.blobs) == (pushed, LoadStatus.LOADED, 3)
    assert await store.manifest(image(pushed)) == manifest(index)
    assert sum([await is_whole(store, one) for one in index.images]) == 1
    (there,) = await load(store, tmp_path / "1.tar")
    assert there.ended is LoadStatus.PRESENT
    assert all_digests_match(root)


# Exports


async def exported(store: Store, root: Path, target: Path, what: Image | Index, *images: Image) -> Path:
    """Export `what`; of an index the store has these `images`."""
    dates = Dates(DAY, DAY)
    for one in images:
        await store.keep(manifest(one), image(f"docker.io/library/nginx@{one.manifest.digest}"), dates)
        write_folder(root, image_blobs(one))
    await store.keep(manifest(what), image(NAME), dates)
    snapshot = Snapshot.read(root)
    assert export_images(snapshot, snapshot.rows, target).left_out == ()
    return target


@pytest.mark.parametrize("name", ["tag", "digest"])
@on_reactor
async def test_skopeo_reads_an_export(
    store: Store, root: Path, tmp_path: Path, registry: DockerRegistry, skopeo: Copy, name: str
) -> None:
    built = make_image("ours")
    target = await exported(store, root, tmp_path / "out.tar", built, built)
    url = NAME if name == "tag" else f"docker.io/library/nginx@{built.manifest.digest}"
    push = ["skopeo", "--insecure-policy", "copy", "--dest-tls-verify=false", "--preserve-digests"]
    run([*push, f"oci-archive:{target}:{url}", f"docker://{registry.host}/team/app:1"])
    skopeo(f"{registry.host}/team/app:1", f"dir:{tmp_path}/copy")
    assert (tmp_path / "copy/manifest.json").read_bytes() == built.manifest.data


@on_reactor
async def test_skopeo_reads_an_export_of_a_complete_index(
    store: Store, root: Path, tmp_path: Path, registry: DockerRegistry, skopeo: Copy
) -> None:
    built = make_index("ours")
    target = await exported(store, root, tmp_path / "out.tar", built, *built.images)
    push = ["skopeo", "--insecure-policy", "copy", "--all", "--dest-tls-verify=false", "--preserve-digests"]
    run([*push, f"oci-archive:{target}:{NAME}", f"docker://{registry.host}/team/app:1"])
    skopeo(f"{registry.host}/team/app:1", f"dir:{tmp_path}/copy", "--all")
    assert (tmp_path / "copy/manifest.json").read_bytes() == built.manifest.data


@pytest.mark.parametrize("docker", [False, True])
@pytest.mark.parametrize("sparse", [False, True])
@on_reactor
async def test_containerd_reads_an_export(
    store: Store, root: Path, tmp_path: Path, containerd: Containerd, docker: bool, sparse: bool
) -> None:
    built = make_index("ours", docker=docker)
    images = built.images[:1] if sparse else built.images
    target = await exported(store, root, tmp_path / "out.tar", built, *images)
    containerd.wipe()
    imported = containerd.ctr("images", "import", "--no-unpack", str(target))
    assert imported.returncode == 0, imported.stderr
    assert containerd.content >= {built.manifest.digest, *(blob.digest for one in images for blob in one.blobs)}
    checked = containerd.ctr("images", "check", f"name=={NAME}")
    assert " complete (" in checked.stdout, checked.stdout
    containerd.wipe()


@on_reactor
async def test_tar_reads_an_export(store: Store, root: Path, tmp_path: Path) -> None:
    built = make_image("ours")
    target = await exported(store, root, tmp_path / "out.tar", built, built)
    with tarfile.open(target) as tar:
        assert run(["tar", "-tf", str(target)]).stdout.split() == tar.getnames()
