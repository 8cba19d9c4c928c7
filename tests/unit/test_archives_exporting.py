"""Exports: OCI layouts that reproduce the images in another store."""

from __future__ import annotations

import gzip
import json
import tarfile
from pathlib import Path

import pytest
import zstandard

from ociregistry.archives.exporting import Exported, export_images
from ociregistry.archives.members import ArchiveInvalid
from ociregistry.manifests import OCI_MANIFEST, Manifest
from ociregistry.names import Digest
from ociregistry.pullthrough.loader import LoadStatus
from ociregistry.store.snapshot import Snapshot
from ociregistry.store.store import Store
from tests.unit.support.archives import (
    NAME,
    blob_name,
    docker_saved,
    hex_of,
    load,
    to_json,
    write_folder,
    write_tar,
)
from tests.unit.support.common import image, manifest, on_reactor
from tests.unit.support.exports import (
    APP,
    DATES,
    DOCKER,
    IMAGE,
    INDEX,
    LATER,
    UP,
    UPPER,
    export,
    make_source,
    members,
    rows,
    store_with,
)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Return the folder of the store that is exported."""
    return make_source(tmp_path / "source")


@pytest.mark.parametrize("packed", [False, True])
@on_reactor
async def test_export_import_round_trip(store: Store, root: Path, source: Path, tmp_path: Path, packed: bool) -> None:
    target = tmp_path / "out.tar"
    exported = export(source, target)
    assert exported.images == len(rows(source)) == 6
    assert exported.left_out == ()
    if packed:
        target = tmp_path / "packed"
        target.write_bytes(gzip.compress((tmp_path / "out.tar").read_bytes()))
    outcomes = await load(store, target)
    assert [outcome.ended for outcome in outcomes] == [LoadStatus.LOADED] * 6
    assert sum(outcome.blobs for outcome in outcomes) == exported.blobs
    assert sum(outcome.bytes for outcome in outcomes) == exported.bytes
    assert rows(root) == rows(source)
    assert {path.name for path in (root / "blobs").iterdir()} == {path.name for path in (source / "blobs").iterdir()}
    assert {path.name: path.read_bytes() for path in (root / "fat").iterdir()} == {
        path.name: path.read_bytes() for path in (source / "fat").iterdir()
    }
    export(root, tmp_path / "again.tar")
    assert (tmp_path / "again.tar").read_bytes() == (tmp_path / "out.tar").read_bytes()


@on_reactor
async def test_compressed_export_import_round_trip(store: Store, root: Path, source: Path, tmp_path: Path) -> None:
    export(source, tmp_path / "out.tar")
    for name in ("out.tar.zst", "again.tar.zst"):
        export(source, tmp_path / name, zstd=True)
    packed = (tmp_path / "out.tar.zst").read_bytes()
    assert zstandard.get_frame_parameters(packed).has_checksum
    assert packed == (tmp_path / "again.tar.zst").read_bytes()
    with zstandard.ZstdDecompressor().stream_reader(packed) as unpacked:
        assert unpacked.read() == (tmp_path / "out.tar").read_bytes()
    since = export(source, tmp_path / "since.tar", "nginx:", since=tmp_path / "out.tar.zst")
    assert (since.blobs, since.had) == (0, 3)
    assert [outcome.ended for outcome in await load(store, tmp_path / "out.tar.zst")] == [LoadStatus.LOADED] * 6
    assert rows(root) == rows(source)


def test_export_layout(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.tar"
    exported = export(source, target, "nginx:")
    child = INDEX.images[0]
    assert exported == Exported(images=1, blobs=3, bytes=sum(len(blob.data) for blob in child.blobs))
    manifests = sorted(blob_name(one.manifest.digest) for one in (INDEX, child))
    blobs = sorted(blob_name(blob.digest) for blob in child.blobs)
    assert members(target) == ["oci-layout", "index.json", *manifests, *blobs]
    with tarfile.open(target) as tar:
        assert {(entry.mtime, entry.uid, entry.gid, entry.uname, entry.mode) for entry in tar} == {
            (0, 0, 0, "", 0o644)
        }
        index = tar.extractfile("index.json")
        mark = tar.extractfile("oci-layout")
        assert index is not None
        assert mark is not None
        assert json.load(mark) == {"imageLayoutVersion": "1.0.0"}
        assert json.load(index) == {
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.index.v1+json",
            "manifests": [
                {
                    "mediaType": INDEX.manifest.media_type,
                    "digest": INDEX.manifest.digest,
                    "size": len(INDEX.manifest.data),
                    "annotations": {
                        "io.containerd.image.name": NAME,
                        "org.opencontainers.image.ref.name": NAME,
                        "ociregistry.created": "2026-01-01T12:30:00.123456+00:00",
                        "ociregistry.confirmed": "2026-01-02T12:30:00.123456+00:00",
                    },
                }
            ],
        }


def test_export_is_world_readable(source: Path, tmp_path: Path) -> None:
    export(source, tmp_path / "out.tar")
    assert (tmp_path / "out.tar").stat().st_mode & 0o777 == 0o644


def test_export_is_deterministic(source: Path, tmp_path: Path) -> None:
    snapshot = Snapshot.read(source)
    export_images(snapshot, snapshot.rows, tmp_path / "one.tar")
    export_images(snapshot, reversed(snapshot.rows), tmp_path / "other.tar")
    assert (tmp_path / "one.tar").read_bytes() == (tmp_path / "other.tar").read_bytes()
    _, _, *names = members(tmp_path / "one.tar")
    count = len(snapshot.records)
    assert names == sorted(names[:count]) + sorted(names[count:])


@on_reactor
async def test_sha512_digests(store: Store, root: Path, tmp_path: Path) -> None:
    data = b"a layer"
    layer = Digest.of(data, "sha512")
    config = Digest.of(b"{}")
    described = [{"mediaType": "x", "digest": config, "size": 2}, {"mediaType": "x", "digest": layer, "size": 7}]
    document = {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": described[0], "layers": [described[1]]}
    made = Manifest.parse(to_json(document), OCI_MANIFEST, Digest.of(to_json(document), "sha512"))
    await store.keep(made, image(NAME), DATES)
    write_folder(root, {f"blobs/{layer.hex}": data, f"blobs/{config.hex}": b"{}"})
    target = tmp_path / "out.tar"
    export(root, target)
    assert {f"blobs/sha512/{layer.hex}", f"blobs/sha512/{made.digest.hex}"} < set(members(target))
    (root / "blobs" / layer.hex).unlink()
    (outcome,) = await load(store, target)
    assert (outcome.ended, outcome.blobs) == (LoadStatus.LOADED, 1)


@on_reactor
async def test_superseded_tag_is_exported_by_digest(store: Store, root: Path, tmp_path: Path) -> None:
    source = store_with(tmp_path / "source", {NAME: DATES}, IMAGE)
    store_with(source, {NAME: LATER}, DOCKER)
    export(source, tmp_path / "out.tar")
    await load(store, tmp_path / "out.tar")
    assert await store.manifest(image(NAME)) == manifest(DOCKER)
    assert rows(root) == rows(source)
    assert f"docker.io/library/nginx@{IMAGE.manifest.digest}" in rows(root)


def test_export_progress(source: Path, tmp_path: Path) -> None:
    advance: list[int] = []
    exported = export(source, tmp_path / "out.tar", advance=advance.append)
    assert sum(advance) == exported.bytes
    assert max(advance) == 1024 * 1024


# Delta exports


@on_reactor
async def test_delta_export_and_delta_of_delta(store: Store, root: Path, source: Path, tmp_path: Path) -> None:
    first, second, third = (tmp_path / f"{number}.tar" for number in range(3))
    export(source, first, "team/app")
    delta = export(source, second, "/up:", since=first)
    own = len(UPPER.config.data) + len(UPPER.layers[-1].data)
    shared = sum(len(layer.data) for layer in IMAGE.layers)
    assert delta == Exported(images=1, blobs=2, bytes=own, had=2, had_bytes=shared)
    nothing = export(source, third, "/up:", since=second)
    assert nothing == Exported(images=1, had=4, had_bytes=own + shared)
    assert members(third) == ["oci-layout", "index.json", blob_name(UPPER.manifest.digest)]
    for path in (second, third):
        (failed,) = await load(store, path)
        assert (failed.name, failed.ended) == (UP, LoadStatus.FAILED)
    for path in (first, second, third):
        for outcome in await load(store, path):
            assert outcome.ended is (LoadStatus.PRESENT if path is third else LoadStatus.LOADED)
    assert rows(root) == {url: row for url, row in rows(source).items() if url in (APP, UP)}


def test_delta_needs_no_blobs_of_earlier_export(source: Path, tmp_path: Path) -> None:
    export(source, tmp_path / "first.tar", "team/app")
    (source / "blobs" / hex_of(IMAGE.layers[0].digest)).unlink()
    assert export(source, tmp_path / "delta.tar", "/up:", since=tmp_path / "first.tar").images == 1


def test_invalid_earlier_export_is_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text(f"{NAME}\n")
    for since in (tmp_path / "list.txt", tmp_path / "nothing"):
        with pytest.raises(ArchiveInvalid, match=f"^{since}: "):
            export(source, tmp_path / "out.tar", since=since)
    assert not (tmp_path / "out.tar").exists()


def test_docker_save_archive_as_earlier_export(source: Path, tmp_path: Path) -> None:
    saved = write_tar(tmp_path / "saved.tar", docker_saved(IMAGE, APP, packed=True))
    assert export(source, tmp_path / "out.tar", "team/app", since=saved).blobs == 0
