"""`verify`: reports and with --repair fetches what images lack; the exit status says whether the store is sound."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from twisted.internet.defer import Deferred

import ociregistry.commands.verify
from ociregistry.commands.verify import Verify
from ociregistry.errors import Unavailable
from ociregistry.names import Digest
from ociregistry.settings import Settings, load_settings
from ociregistry.store.store import Store
from tests.images import Blob, make_image, make_index
from tests.unit.support.common import REACTOR, manifest, on_reactor
from tests.unit.support.irregular import IRREGULAR, put_irregular
from tests.unit.support.loads import MemoryFetcher
from tests.unit.support.stores import HOST, StoreDir

INDEX = make_index("verified", platforms=("linux/amd64", "linux/arm64"))
AMD64, ARM64 = INDEX.images
OVER = make_image("over", base=AMD64, layers=1)
APP = f"{HOST}/app:1"
LAYER, CONFIG = AMD64.layers[0], ARM64.config
REPOSITORY = f"{HOST}/app"


@pytest.fixture
def store_dir(root: Path) -> StoreDir:
    """Return a store with an index: one platform pulled, the other as metadata."""
    store_dir = StoreDir(root)
    store_dir.put(manifest(INDEX), "app:1")
    store_dir.put(manifest(AMD64), "app@", wanted=True)
    store_dir.blobs(*(blob.data for blob in AMD64.blobs), CONFIG.data)
    store_dir.put(manifest(ARM64), "app@", wanted=False)
    return store_dir


class VerifyCommand:
    """Run `verify` with an upstream that has everything, except for configured errors."""

    def __init__(
        self, store_dir: StoreDir, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> None:
        self._root = store_dir.root
        self._capfd = capfd
        self.asked: list[str] = []
        self.errors: dict[str, Exception] = {}
        monkeypatch.setattr(ociregistry.commands.verify, "open_fetcher", self._fetcher_for)

    @asynccontextmanager
    async def _fetcher_for(self, store: Store, settings: Settings, reactor: Any) -> AsyncIterator[MemoryFetcher]:
        fetcher = MemoryFetcher(store, self._root)
        fetcher.add(APP, INDEX)
        fetcher.errors = self.errors
        fetcher.asked = self.asked
        yield fetcher

    async def __call__(self, *, repair: bool = False, **changed: Any) -> tuple[bool, list[str]]:
        """Run `verify`; return whether the store is sound, and the output."""
        self.asked.clear()
        command = Verify()
        command["repair"] = repair
        settings = replace(load_settings({"image_path": str(self._root)}, (), None), **changed)
        verified: Coroutine[Deferred[Any], Any, bool] = command._verify(settings, REACTOR)
        whole = await Deferred.fromCoroutine(verified)
        output = self._capfd.readouterr()
        assert output.err == ""
        return whole, output.out.splitlines()


@pytest.fixture
def verify(store_dir: StoreDir, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> VerifyCommand:
    """Return a runner of `verify`."""
    return VerifyCommand(store_dir, monkeypatch, capfd)


def spoil(store_dir: StoreDir, data: bytes) -> None:
    """Overwrite a blob with other bytes of the same size."""
    store_dir.blob(data).write_bytes(bytes(len(data)))


def delete(store_dir: StoreDir, data: bytes) -> None:
    """Remove a blob."""
    store_dir.blob(data).unlink()


def asked(*blobs: Blob) -> list[str]:
    """Return the expected requests for blobs."""
    return [f"blob {REPOSITORY}@{blob.digest}" for blob in blobs]


@on_reactor
async def test_sound_store(verify: VerifyCommand) -> None:
    for repair in (False, True):
        whole, lines = await verify(repair=repair)
        assert (whole, len(lines), verify.asked) == (True, 1, [])
        assert lines[0].endswith(" 0 damaged")


@pytest.mark.parametrize("lose", [spoil, delete])
@pytest.mark.parametrize("blob", [LAYER, AMD64.config, CONFIG])
@on_reactor
async def test_missing_blob_fails_until_repaired(
    store_dir: StoreDir, verify: VerifyCommand, lose: Callable[[StoreDir, bytes], None], blob: Blob
) -> None:
    lose(store_dir, blob.data)
    lacked = f"not complete: 1 image, missing: {len(blob.data)} bytes"
    # The first run quarantines a damaged blob.
    for damaged in ("1 damaged" if lose is spoil else "0 damaged", "0 damaged"):
        whole, lines = await verify()
        assert not whole
        assert lines[-2] == f"{lacked}; verify --repair fetches them"
        if lose is spoil and damaged == "1 damaged":
            (kept,) = store_dir.root.glob("pulls/*/bad")
            assert lines[0].startswith(f"damaged: {store_dir.blob(blob.data)}: its {len(blob.data)} bytes do not ")
            assert lines[0].endswith(f"; moved to {kept}")
            assert (kept / store_dir.blob(blob.data).name).exists()
        assert lines[-1].endswith(damaged)
        assert verify.asked == []
    image = ARM64 if blob is CONFIG else AMD64
    whole, lines = await verify(repair=True)
    assert (whole, verify.asked) == (True, asked(blob))
    assert lacked in lines
    assert lines[-1] == f"completed: the image {image.manifest.digest} lacked 1 blob, {len(blob.data)} bytes"
    assert store_dir.blob(blob.data).read_bytes() == blob.data
    whole, lines = await verify(repair=True)
    assert (whole, verify.asked, len(lines)) == (True, [], 1)


@on_reactor
async def test_damaged_blob_is_repaired_in_one_run(store_dir: StoreDir, verify: VerifyCommand) -> None:
    spoil(store_dir, LAYER.data)
    whole, lines = await verify(repair=True)
    assert (whole, verify.asked) == (True, asked(LAYER))
    assert lines[1] == f"repaired: {store_dir.blob(LAYER.data)}"
    assert lines[-1].endswith("1 damaged")


@pytest.mark.parametrize("kind", IRREGULAR)
@on_reactor
async def test_what_is_no_regular_file_is_repaired(store_dir: StoreDir, verify: VerifyCommand, kind: str) -> None:
    """The index names the image whose record cannot be read."""
    put_irregular(store_dir.blob(LAYER.data), kind)
    put_irregular(store_dir.path(manifest(AMD64)), kind)
    whole, lines = await verify(repair=True)
    assert (whole, verify.asked) == (True, [f"manifest {REPOSITORY}@{AMD64.manifest.digest}", *asked(LAYER)])
    assert lines[-1].endswith("2 damaged")
    assert store_dir.blob(LAYER.data).read_bytes() == LAYER.data
    whole, lines = await verify()
    assert (whole, len(lines)) == (True, 1)


@on_reactor
async def test_unavailable_blob_fails_the_repair(store_dir: StoreDir, verify: VerifyCommand) -> None:
    delete(store_dir, LAYER.data)
    delete(store_dir, CONFIG.data)
    verify.errors[asked(LAYER)[0]] = Unavailable("down")
    whole, lines = await verify(repair=True)
    assert not whole
    assert sorted(line.split(":")[0] for line in lines) == sorted(
        ["not complete", lines[1].split(":")[0], "completed", "not completed"]
    )
    lack = f"the image {AMD64.manifest.digest} lacked 1 blob, {len(LAYER.data)} bytes"
    assert f"not completed: {lack}: down" in lines
    assert store_dir.blob(CONFIG.data).exists()
    # Repaired blobs are not requested again; the second run completes the store.
    verify.errors.clear()
    whole, _ = await verify(repair=True)
    assert (whole, verify.asked) == (True, asked(LAYER))


@on_reactor
async def test_shared_missing_blob_is_requested_once(store_dir: StoreDir, verify: VerifyCommand) -> None:
    delete(store_dir, LAYER.data)
    store_dir.put(manifest(OVER), "other:1", wanted=True)
    shared = {Digest(blob.digest) for blob in AMD64.blobs}
    store_dir.blobs(*(blob.data for blob in OVER.blobs if blob.digest not in shared))
    whole, lines = await verify(repair=True)
    assert whole
    assert len(verify.asked) == len(set(verify.asked)) == 1
    assert sum(line.startswith("completed: ") for line in lines) == 2


@on_reactor
async def test_quarantined_orphan_blob_is_no_failure(store_dir: StoreDir, verify: VerifyCommand) -> None:
    unused = b"no image has it"
    store_dir.blobs(unused)
    spoil(store_dir, unused)
    whole, lines = await verify(repair=True)
    assert (whole, verify.asked) == (True, [])
    assert lines[1] == f"not repaired: {store_dir.blob(unused)}: no image needs it"


@on_reactor
async def test_damaged_record_is_restored(store_dir: StoreDir, verify: VerifyCommand) -> None:
    for image, wanted in ((AMD64, True), (ARM64, False)):
        path = store_dir.path(manifest(image))
        spoiled = path.read_bytes().replace(image.layers[0].digest.encode(), b"sha256:" + b"0" * 64)
        path.write_bytes(spoiled)
        whole, _ = await verify(repair=True)
        assert whole
        assert store_dir.snapshot().records[manifest(image).digest].record.wanted is wanted
    assert [row.url for row in store_dir.snapshot().rows] == [APP, f"{REPOSITORY}@{AMD64.manifest.digest}"]


@pytest.mark.parametrize("repair", [False, True])
@on_reactor
async def test_metadata_is_not_missing_when_turned_off(
    store_dir: StoreDir, verify: VerifyCommand, repair: bool
) -> None:
    delete(store_dir, CONFIG.data)
    whole, lines = await verify(repair=repair, complete_metadata=False)
    assert (whole, len(lines), verify.asked) == (True, 1, [])


@on_reactor
async def test_layers_of_metadata_are_not_missing_those_of_old_records_are(
    store_dir: StoreDir, verify: VerifyCommand
) -> None:
    assert (await verify())[0]
    # A record of version 0.1.0, without `wanted`, of which a layer is present.
    path = store_dir.path(manifest(ARM64))
    path.unlink()
    store_dir.put(manifest(ARM64), "app@")
    assert (await verify())[0]
    store_dir.blobs(ARM64.layers[0].data)
    whole, _ = await verify()
    assert not whole
    whole, _ = await verify(repair=True)
    assert (whole, verify.asked) == (True, asked(ARM64.layers[1]))


@pytest.mark.parametrize("repair", [False, True])
@on_reactor
async def test_image_requested_by_head_is_complete(store_dir: StoreDir, verify: VerifyCommand, repair: bool) -> None:
    """Its layers are not wanted and no index names it, so neither daemon nor repair fetches anything."""
    store_dir.put(manifest(OVER), "other:1", wanted=False)
    whole, lines = await verify(repair=repair)
    assert (whole, len(lines), verify.asked) == (True, 1, [])
