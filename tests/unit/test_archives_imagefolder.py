"""Image folders: stores of this program and of the Go server, as folders and as tars."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from ociregistry.manifests import DOCKER_LIST, DOCKER_MANIFEST, OCI_INDEX, OCI_MANIFEST
from ociregistry.store.records import Dates
from tests.images import Manifest, digest_of, make_image, make_index
from tests.unit.support.archives import (
    NAME,
    Files,
    contents,
    go_record,
    hex_of,
    image_blobs,
    invalid,
    kept,
    to_json,
    write_folder,
    write_tar,
)

IMAGE, OTHER = make_image("folder"), make_image("other")
INDEX = make_index("folder")
DAY = datetime(2026, 1, 1, tzinfo=UTC)
DATES = Dates(DAY, DAY + timedelta(days=1))
LATER = Dates(DAY, DAY + timedelta(days=2))
TYPHA = "docker.io/calico/typha:v3.27.0"
RECORD = f"img/{hex_of(IMAGE.manifest.digest)}"


@pytest.fixture
def berlin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Set the time zone to Berlin, UTC+1 in winter."""
    monkeypatch.setenv("TZ", "CET-1")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def meanings(path: Path) -> dict[str, tuple[str, Dates | None]]:
    """Return the digest and the dates of each image name."""
    return {str(one.image): (one.manifest, one.dates) for one in contents(path).images}


def go_folder(of: Manifest, url: str = TYPHA, folder: str = "img", **changes: Any) -> dict[str, bytes]:
    """Return an image folder with one metadata file of the Go server."""
    return {f"{folder}/{hex_of(of.digest)}": go_record(of, url, **changes)}


def without_media_type(of: Manifest) -> Manifest:
    """Return the manifest without its mediaType field."""
    data = to_json({key: value for key, value in json.loads(of.data).items() if key != "mediaType"})
    return Manifest(digest_of(data), data, of.media_type)


# Our own format


@pytest.mark.parametrize("write", [write_tar, write_folder])
def test_own_store(tmp_path: Path, write: Callable[[Path, Files], Path]) -> None:
    child = INDEX.images[0]
    files = {
        f"fat/{hex_of(INDEX.manifest.digest)}": kept(INDEX, {NAME: DATES}),
        f"img/{hex_of(child.manifest.digest)}": kept(child, {f"localhost/x@{child.manifest.digest}": LATER}),
        RECORD: kept(IMAGE, {"registry/app:1": DATES, "quay.io/app:1": LATER}),
        **image_blobs(child, IMAGE),
        "pulls/0/lock": b"",
        f"pulls/0/{hex_of(IMAGE.config.digest)}": b"half",
        f".syncthing.{RECORD}.tmp": b"{",
        "img/.syncthing.x.tmp": b"{",
    }
    path = write(tmp_path / "archive", files)
    assert meanings(path) == {
        NAME: (INDEX.manifest.digest, DATES),
        f"localhost/x@{child.manifest.digest}": (child.manifest.digest, LATER),
        "registry/app:1": (IMAGE.manifest.digest, DATES),
        "quay.io/app:1": (IMAGE.manifest.digest, LATER),
    }
    found = contents(path)
    assert set(found.manifests) == {one.manifest.digest for one in (INDEX, child, IMAGE)}
    assert set(found.blobs) == {blob.digest for blob in (*child.blobs, *IMAGE.blobs)}


def test_newer_of_two_records_keeps_the_tag(tmp_path: Path) -> None:
    files = {
        RECORD: kept(IMAGE, {NAME: DATES}),
        f"img/{hex_of(OTHER.manifest.digest)}": kept(OTHER, {NAME: LATER}),
    }
    assert meanings(write_tar(tmp_path / "a.tar", files)) == {
        NAME: (OTHER.manifest.digest, LATER),
        f"docker.io/library/nginx@{IMAGE.manifest.digest}": (IMAGE.manifest.digest, DATES),
    }


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b"{}",
        to_json({"images": {}}),
        kept(IMAGE, {NAME: DATES})[:-300],
        kept(IMAGE, {NAME: DATES}).replace(b"layers", b"Layers"),
        kept(IMAGE, {NAME: DATES}).replace(b"2026-01-01T", b"2026-13-01T"),
        kept(IMAGE, {NAME: DATES}).replace(b"docker.io/library/nginx:1.25", b"../nginx:1.25"),
        kept(OTHER, {NAME: DATES}),
        b"[" * 100_000,
        b" " * (8 * 1024 * 1024 + 1),
    ],
)
def test_malformed_record_is_refused(tmp_path: Path, data: bytes) -> None:
    assert invalid(write_tar(tmp_path / "a.tar", {RECORD: data})).endswith(f": {RECORD}")


# The Go server's format


@pytest.mark.parametrize("write", [write_tar, write_folder])
@pytest.mark.parametrize(("lists", "images"), [("fat", "img"), ("img", "lts"), ("lts", "img")])
@pytest.mark.usefixtures("berlin")
def test_go_server_folder(tmp_path: Path, write: Callable[[Path, Files], Path], lists: str, images: str) -> None:
    child = INDEX.images[0]
    by_digest = f"docker.io/calico/typha@{child.manifest.digest}"
    files = {
        **go_folder(INDEX.manifest, folder=lists),
        **go_folder(child.manifest, by_digest, folder=images, digest=child.manifest.digest),
        **image_blobs(child),
    }
    path = write(tmp_path / "archive", files)
    created = datetime(2024, 3, 1, 21, 17, 30, tzinfo=UTC)
    dates = Dates(created, created)
    assert meanings(path) == {
        TYPHA: (INDEX.manifest.digest, dates),
        by_digest: (child.manifest.digest, dates),
    }
    assert set(contents(path).blobs) == {blob.digest for blob in child.blobs}


@pytest.mark.parametrize("created", [None, "", "long ago", "0001-01-01T00:00:00", "0001-01-01T00:00:00+14:00", 5])
@pytest.mark.usefixtures("berlin")
def test_missing_or_invalid_date(tmp_path: Path, created: object) -> None:
    path = write_tar(tmp_path / "a.tar", go_folder(IMAGE.manifest, created=created))
    (dates,) = (dates for _, dates in meanings(path).values())
    assert dates is None


FILLED = {"schemaVersion": 2, "mediaType": ""}


@pytest.mark.parametrize(
    ("of", "changes", "media_type"),
    [
        (make_image(1).manifest, {"type": 0}, OCI_MANIFEST),
        (make_image(1, docker=True).manifest, {"type": 99}, DOCKER_MANIFEST),
        (make_index(1).manifest, {"type": None}, OCI_INDEX),
        (make_index(1, docker=True).manifest, {"type": "x"}, DOCKER_LIST),
        (without_media_type(make_image(1).manifest), {}, OCI_MANIFEST),
        (without_media_type(make_index(1).manifest), {}, OCI_INDEX),
        (without_media_type(make_image(1).manifest), {"mediaType": DOCKER_MANIFEST}, DOCKER_MANIFEST),
        (without_media_type(make_image(1).manifest), {"v2.docker.manifest": FILLED}, DOCKER_MANIFEST),
        (without_media_type(make_image(1).manifest), {"v2.docker.Manifest": FILLED}, DOCKER_MANIFEST),
        (without_media_type(make_index(1).manifest), {"v2.docker.manifestList": FILLED}, DOCKER_LIST),
        (without_media_type(make_image(1).manifest), {"v1.oci.manifest": FILLED}, OCI_MANIFEST),
    ],
)
def test_media_type_is_taken_from_the_manifest(
    tmp_path: Path, of: Manifest, changes: dict[str, Any], media_type: str
) -> None:
    (manifest,) = contents(write_tar(tmp_path / "a.tar", go_folder(of, **changes))).manifests.values()
    assert (manifest.media_type, manifest.data) == (media_type, of.data)


@pytest.mark.parametrize("without", [None, "", 5])
def test_old_go_version_without_bytes_is_a_failure(tmp_path: Path, without: object) -> None:
    files = {**go_folder(OTHER.manifest, NAME), **go_folder(IMAGE.manifest, bytes=without)}
    path = write_tar(tmp_path / "a.tar", files)
    assert set(meanings(path)) == {NAME}
    (failure,) = contents(path).failed
    assert failure.name == TYPHA
    assert "old version" in failure.why


def test_invalid_name_is_printed_on_one_line(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", go_folder(IMAGE.manifest, "docker.io/x\n\x1b:1"))
    assert [failure.name for failure in contents(path).failed] == [r"docker.io/x\n\x1b:1"]


@pytest.mark.parametrize("url", ["docker.io/calico/typha", "", "docker.io/../x:1"])
def test_invalid_image_url_is_a_failure(tmp_path: Path, url: str) -> None:
    path = write_tar(tmp_path / "a.tar", {**go_folder(OTHER.manifest, NAME), **go_folder(IMAGE.manifest, url)})
    assert set(meanings(path)) == {NAME}
    assert [failure.name for failure in contents(path).failed] == [url]


def test_tag_of_two_undated_images_is_a_failure(tmp_path: Path) -> None:
    files = {**go_folder(OTHER.manifest, created=""), **go_folder(IMAGE.manifest)}
    assert [failure.name for failure in contents(write_tar(tmp_path / "a.tar", files)).failed] == [TYPHA]


@pytest.mark.parametrize(
    "changes",
    [
        {"bytes": "not base64!"},
        {"bytes": "AAAA"},
        {"bytes": "W10="},
        {"bytes": "e30="},
        {"digest": hex_of(OTHER.manifest.digest)},
        {"digest": OTHER.manifest.digest},
        {"digest": 5},
    ],
)
def test_inconsistent_file_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    assert invalid(write_tar(tmp_path / "a.tar", go_folder(IMAGE.manifest, **changes))).endswith(f": {RECORD}")


def test_bytes_of_another_manifest_are_refused(tmp_path: Path) -> None:
    error = invalid(write_tar(tmp_path / "a.tar", {RECORD: go_record(OTHER.manifest, TYPHA, digest="")}))
    assert (
        error == f"no manifest that can be served: the bytes do not have the digest {IMAGE.manifest.digest}: {RECORD}"
    )


def test_both_formats_in_one_folder(tmp_path: Path) -> None:
    files = {RECORD: kept(IMAGE, {NAME: DATES}), **go_folder(OTHER.manifest)}
    assert set(meanings(write_tar(tmp_path / "a.tar", files))) == {NAME, TYPHA}
