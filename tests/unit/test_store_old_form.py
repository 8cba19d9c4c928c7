"""A store written by version 0.1.0 is served, and new files in it are readable by that version.

The files are spelled out here byte for byte, independent of the code.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from ociregistry.manifests import OCI_INDEX, OCI_MANIFEST, Manifest
from ociregistry.names import Digest
from ociregistry.store.store import Store
from tests.unit.support.common import image, on_reactor

CONFIG, LAYER, COMING = b'{"os": "linux"}', b"a layer", b"a layer that is half here"
DATES = {"created": "2026-03-01T22:17:30.000000Z", "confirmed": "2026-03-02T08:00:00.123456Z"}
APP, BY_TAG = "reg.example:5000/team/app", "reg.example:5000/team/app:1"
REPOSITORY = image(BY_TAG).repository


def described(data: bytes, media_type: str) -> dict[str, object]:
    """Return a descriptor."""
    return {"mediaType": media_type, "digest": Digest.of(data), "size": len(data)}


def parsed(document: dict[str, object], media_type: str) -> Manifest:
    """Return a manifest with these contents."""
    return Manifest.parse(json.dumps({"schemaVersion": 2, **document}).encode(), media_type)


IMAGE = parsed({"config": described(CONFIG, "x"), "layers": [described(LAYER, "x")]}, OCI_MANIFEST)
UNPULLED = parsed({"config": described(CONFIG, "x"), "layers": [described(b"elsewhere", "x")]}, OCI_MANIFEST)
PENDING = parsed({"config": described(CONFIG, "x"), "layers": [described(COMING, "x")]}, OCI_MANIFEST)
CHILDREN = [described(one.data, OCI_MANIFEST) for one in (IMAGE, UNPULLED, PENDING)]
INDEX = parsed({"manifests": CHILDREN}, OCI_INDEX)


def record(manifest: Manifest, url: str) -> str:
    """Return the text of a record."""
    return (
        "{\n"
        f'  "digest": "{manifest.digest}",\n'
        f'  "mediaType": "{manifest.media_type}",\n'
        '  "images": {\n'
        f'    "{url}": {{\n'
        f'      "created": "{DATES["created"]}",\n'
        f'      "confirmed": "{DATES["confirmed"]}"\n'
        "    }\n"
        "  },\n"
        f'  "manifest": {json.dumps(manifest.data.decode())}\n'
        "}\n"
    )


@pytest.fixture
def old(root: Path) -> Path:
    """Return a store with an index of three images: one pulled, one not, and one with some of its layers."""
    half = Digest.of(COMING).hex
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    note = {"durable": 0, "boot": boot, "size": len(COMING), "source": APP}
    files = {
        f"fat/{INDEX.digest.hex}": record(INDEX, BY_TAG).encode(),
        **{
            f"img/{one.digest.hex}": record(one, f"{APP}@{one.digest}").encode() for one in (IMAGE, UNPULLED, PENDING)
        },
        **{f"blobs/{Digest.of(blob).hex}": blob for blob in (CONFIG, LAYER)},
        "pulls/lock": b"",
        "pulls/0/lock": b"",
        f"pulls/0/{half}": COMING[:9],
        f"pulls/0/{half}.note": json.dumps(note).encode() + b"\n",
        f"pulls/0/{PENDING.digest.hex}.wish": b'{"upstream": "reg.example:5000", "repository": "team/app"}\n',
    }
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


@on_reactor
async def test_old_store_is_served(old: Path, open_store: Callable[..., Store]) -> None:
    store = open_store()
    assert await store.manifest(image(BY_TAG)) == INDEX
    assert store.tags(REPOSITORY) == ["1"]
    for one in (IMAGE, UNPULLED, PENDING):
        assert await store.manifest(image(f"{APP}@{one.digest}")) == one
    blob = await store.blob(Digest.of(LAYER))
    assert blob is not None
    assert await blob.read(0, 100) == LAYER
    blob.close()
    # Its records lack `wanted`; a present layer implies it.
    wanted = {one: entry.wanted for one in (IMAGE, UNPULLED) if (entry := store.entry(one.digest)) is not None}
    assert wanted == {IMAGE: True, UNPULLED: False}
    assert store.pending == {PENDING.digest: REPOSITORY}
    partial = await store.old_partial(Digest.of(COMING))
    assert partial is not None
    assert (partial.length, partial.size) == (9, len(COMING))
    await partial.append(COMING[9:])
    await partial.verify()
    await store.commit(partial)
    partial.close()
    assert (old / "blobs" / Digest.of(COMING).hex).read_bytes() == COMING


@on_reactor
async def test_new_files_have_the_old_form(old: Path, open_store: Callable[..., Store]) -> None:
    """Records and notes have one additional key each, which older versions ignore like any unknown key."""
    store = open_store()
    path = old / "img" / UNPULLED.digest.hex
    await store.want(UNPULLED.digest)
    written = path.read_text()
    assert written.replace('  "wanted": true,\n', "") == record(UNPULLED, f"{APP}@{UNPULLED.digest}")
    await store.add_pending(UNPULLED.digest, REPOSITORY)
    pending = old / "pulls" / "0" / f"{UNPULLED.digest.hex}.wish"
    assert pending.read_bytes() == b'{"upstream": "reg.example:5000", "repository": "team/app"}\n'
    partial = await store.new_partial(Digest.of(b"new"), 3, REPOSITORY)
    note = json.loads((old / "pulls" / "0" / f"{Digest.of(b'new').hex}.note").read_bytes())
    assert note.keys() == {"durable", "boot", "size", "source", "mirrored_from"}
    partial.close()
    assert {path.name for path in old.iterdir()} == {"blobs", "fat", "img", "pulls"}
