"""`list` and `prune` with indexes whose images are metadata, pending or incomplete."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

from ociregistry.manifests import Manifest
from ociregistry.names import Repository
from ociregistry.platforms import NO_PLATFORM
from ociregistry.store.files import Files
from ociregistry.store.prune import EvictionPolicy
from ociregistry.store.workdir import PendingFiles, PendingImage
from tests.unit.support.command_lines import file_contents, run
from tests.unit.support.loads import index_of
from tests.unit.support.stores import HOST, StoreDir, by_name, day, image_of, url_of

AMD64, ARM64 = (b"config amd64", b"layer amd64"), (b"config arm64", b"layer arm64")
ATTESTATION = (b"config attestation", b"in-toto")
PULLED, METADATA, STATEMENT = image_of(*AMD64), image_of(*ARM64), image_of(*ATTESTATION)
INDEX = index_of((PULLED, "linux/amd64"), (METADATA, "linux/arm64"), (STATEMENT, NO_PLATFORM))


@pytest.fixture
def store_dir(root: Path) -> StoreDir:
    """Return a store with an index: one platform pulled, manifests and configs of the others."""
    store_dir = StoreDir(root)
    store_dir.put(INDEX, "app:1", created=day(1))
    store_dir.put(PULLED, "app@", created=day(1), wanted=True)
    store_dir.blobs(*AMD64)
    for one, blobs in ((METADATA, ARM64), (STATEMENT, ATTESTATION)):
        store_dir.put(one, "app@", created=day(1), wanted=False)
        store_dir.blobs(blobs[0])
    return store_dir


class Commands:
    """Run commands that must succeed."""

    def __init__(self, store_dir: StoreDir, capfd: pytest.CaptureFixture[str]) -> None:
        self._store_dir = store_dir
        self._capfd = capfd

    def __call__(self, *argv: str) -> list[str]:
        """Return the output of a command, without the host of image URLs."""
        result = run(self._capfd, "--image-path", self._store_dir.root, *argv)
        assert (result.status, result.err) == (0, "")
        return [line.replace(f"{HOST}/", "") for line in result.lines]

    def states(self, *argv: str) -> dict[str, list[str]]:
        """Return size, platforms and state of each image URL in the long list."""
        return {line.split()[0]: line.split()[4:] for line in self("list", "--long", *argv)}


@pytest.fixture
def commands(store_dir: StoreDir, capfd: pytest.CaptureFixture[str]) -> Commands:
    """Return a runner of commands on the store."""
    return Commands(store_dir, capfd)


def name(of: Manifest) -> str:
    """Return the image URL by digest, without the host."""
    return url_of("app@", of).removeprefix(f"{HOST}/")


def pend(store_dir: StoreDir, image: Manifest) -> None:
    """Mark the image as undecided: a daemon has yet to decide whether it is wanted."""
    (store_dir.root / "pulls" / "0").mkdir(exist_ok=True)
    pending = PendingImage(image.digest, Repository(HOST, "app"), undecided=True)
    PendingFiles(store_dir.root / "pulls" / "0", Files()).write(pending)


# list


def test_metadata_is_listed_only_in_long_form(commands: Commands) -> None:
    assert [line.split()[0] for line in commands("list")] == ["app:1", name(PULLED)]
    assert all(len(line.split()) == 3 for line in commands("list"))
    size = str(sum(map(len, AMD64)))
    assert commands.states() == {
        "app:1": [size, "linux/amd64", "complete"],
        name(PULLED): [size, "linux/amd64", "complete"],
        name(METADATA): ["0", "linux/arm64", "metadata"],
        name(STATEMENT): ["0", NO_PLATFORM, "metadata"],
    }


def test_metadata_is_not_in_json(commands: Commands) -> None:
    documents = {one["url"]: one for one in json.loads("\n".join(commands("list", "--json")))}
    facts = {url: (one["images"], one["missing"], one["size"], one["platforms"]) for url, one in documents.items()}
    size = sum(map(len, AMD64))
    assert facts == {
        "app:1": (1, 0, size, ["linux/amd64"]),
        name(PULLED): (1, 0, size, ["linux/amd64"]),
    }


def test_missing_counts_pulled_images_not_metadata(store_dir: StoreDir, commands: Commands) -> None:
    store_dir.blob(ARM64[0]).unlink()
    store_dir.blob(AMD64[1]).unlink()
    lack = f"{len(AMD64[1])}-missing"
    assert {url: state for url, (*_, state) in commands.states().items()} == {
        "app:1": lack,
        name(PULLED): lack,
        name(METADATA): "metadata",
        name(STATEMENT): "metadata",
    }


def test_pending_image_and_its_index_are_pending(store_dir: StoreDir, commands: Commands) -> None:
    pend(store_dir, METADATA)
    assert {url: state for url, (*_, state) in commands.states().items()} == {
        "app:1": "pending",
        name(PULLED): "complete",
        name(METADATA): "pending",
        name(STATEMENT): "metadata",
    }
    assert [line.split()[0] for line in commands("list")] == ["app:1", name(PULLED)]


def test_index_with_metadata_only_has_no_images(store_dir: StoreDir, commands: Commands) -> None:
    store_dir.path(PULLED).unlink()
    assert commands.states()["app:1"] == ["0", "-", "no-image"]


def test_record_without_wanted_is_an_image_once_a_layer_is_present(store_dir: StoreDir, commands: Commands) -> None:
    for one in (PULLED, METADATA):
        store_dir.path(one).unlink()
        store_dir.put(one, "app@", created=day(1))
    assert [line.split()[0] for line in commands("list")] == ["app:1", name(PULLED)]
    store_dir.blobs(ARM64[1])
    assert [line.split()[0] for line in commands("list")] == sorted(["app:1", name(PULLED), name(METADATA)])


def test_image_without_index_is_listed(store_dir: StoreDir, commands: Commands) -> None:
    store_dir.path(INDEX).unlink()
    assert [line.split()[0] for line in commands("list")] == sorted(map(name, (PULLED, METADATA, STATEMENT)))


def test_image_requested_by_head_is_listed_as_complete(store_dir: StoreDir, commands: Commands) -> None:
    store_dir.put(image_of(b"config of head", b"layer of head"), "head:1", created=day(1), wanted=False)
    assert [line.split()[0] for line in commands("list")] == ["app:1", name(PULLED), "head:1"]
    assert commands.states()["head:1"][1:] == ["-", "metadata"]


def test_tagged_metadata_is_listed_and_pruned(store_dir: StoreDir, commands: Commands) -> None:
    """Applies to an image that another cache pulled by tag, where it is wanted."""
    store_dir.put(METADATA, "app:1-arm64", created=day(1))
    assert [line.split()[0] for line in commands("list")] == ["app:1", "app:1-arm64", name(PULLED)]
    lines = commands("prune", "--pattern", "arm64")
    assert lines[0] == "pruned app:1-arm64 image 0 bytes of blobs"
    assert store_dir.names(METADATA) == {"app@"}


# prune


@pytest.mark.parametrize("by", ["--pattern", "--before", "--unused-for"])
def test_metadata_is_pruned_silently_with_its_index(store_dir: StoreDir, commands: Commands, by: str) -> None:
    value = {"--pattern": "app:1", "--before": "2026-02-01T00:00:00", "--unused-for": "1h"}[by]
    listed_bytes = [
        "app:1 list 0 bytes of blobs",
        f"{name(PULLED)} image {sum(map(len, AMD64))} bytes of blobs",
    ]
    size = sum(store_dir.sizes().values())
    before = file_contents(store_dir.root)
    would = commands("prune", by, value, "--dry-run")
    assert file_contents(store_dir.root) == before
    did = commands("prune", by, value)
    assert would[:-1] == [f"would prune {line}" for line in listed_bytes]
    assert did[:-1] == [f"pruned {line}" for line in listed_bytes]
    assert would[-1].startswith("2 image URLs, 2 records and 2 blobs would be removed, ")
    assert did[-1].startswith(f"2 image URLs, 2 records and 2 blobs removed, {size} bytes ")
    assert store_dir.sizes() == {}


@pytest.mark.parametrize("options", [[], ["--dry-run"]])
def test_pattern_does_not_match_metadata(store_dir: StoreDir, commands: Commands, options: list[str]) -> None:
    lines = commands("prune", "--pattern", METADATA.digest.hex, *options)
    assert len(lines) == 1
    assert lines[0].startswith("0 image URLs, 0 records and 0 blobs ")
    assert store_dir.path(METADATA).exists()


def test_metadata_is_pruned_with_index_while_pulled_image_stays(store_dir: StoreDir, commands: Commands) -> None:
    store_dir.put(PULLED, "app:amd64", created=day(1))
    commands("prune", "--pattern", "app:1$")
    assert [line.split()[0] for line in commands("list", "--long")] == ["app:amd64"]
    assert store_dir.has(*AMD64, ARM64[0], ATTESTATION[0]) == [True, True, False, False]


def test_metadata_of_a_remaining_index_stays(store_dir: StoreDir, commands: Commands) -> None:
    store_dir.put(index_of((METADATA, "linux/arm64"), (PULLED, "linux/amd64")), "app:2", created=day(2))
    commands("prune", "--pattern", "app:1$")
    assert {url: state for url, (*_, state) in commands.states().items()} == {
        "app:2": "complete",
        name(PULLED): "complete",
        name(METADATA): "metadata",
    }


def test_rewritten_record_keeps_wanted(store_dir: StoreDir) -> None:
    store_dir.put(METADATA, "other@", created=day(1))
    store_dir.put(INDEX, "other:1", created=day(1))
    store_dir.prune(by_name("other"))
    records = store_dir.snapshot().records
    assert [records[one.digest].record.wanted for one in (PULLED, METADATA)] == [True, False]
    assert store_dir.names(METADATA) == {"app@"}


def test_eviction_removes_metadata_with_its_index(store_dir: StoreDir) -> None:
    now = datetime.now(UTC)
    plan = store_dir.prune(EvictionPolicy(None, 1, lambda url: False, frozenset(), now, now, 100))
    assert {row.stored.manifest for row in plan.rows} == {kept.manifest for kept in plan.records} == {INDEX, PULLED}
    assert {kept.manifest for kept in plan.metadata} == {METADATA, STATEMENT}
    assert store_dir.sizes() == {}


# Snapshot


def test_snapshot_rows_exclude_metadata(store_dir: StoreDir) -> None:
    snapshot = store_dir.snapshot()
    urls = {row.url for row in snapshot.rows}
    assert urls == {url_of("app:1"), url_of("app@", PULLED)}
    assert {row.url for row in snapshot.all_rows} == urls | {url_of("app@", METADATA), url_of("app@", STATEMENT)}
    assert [row.url for row in snapshot.all_rows] == sorted(row.url for row in snapshot.all_rows)
    assert [snapshot.is_metadata(one.digest) for one in (INDEX, PULLED, METADATA)] == [False, False, True]
    assert [snapshot.is_wanted(one.digest) for one in (PULLED, METADATA)] == [True, False]
