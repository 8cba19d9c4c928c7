"""Blobs fetched by loads and completions are shared with concurrent downloads."""

from __future__ import annotations

import pytest
from twisted.internet.defer import Deferred

from ociregistry.names import Digest
from ociregistry.pullthrough.cache import PullThrough
from ociregistry.store.blobs import StoredBlob
from ociregistry.store.store import Store
from tests.images import make_image
from tests.unit.support.common import image, on_reactor, until
from tests.unit.support.registries import MemoryRegistries, downloads_ended

BUILT = make_image("fetch")
DATA = BUILT.layers[0].data
DIGEST = Digest(BUILT.layers[0].digest)
REPOSITORY = image("reg.example/team/app:1").repository


@on_reactor
async def test_download_finished_during_lookup_is_not_repeated(
    cache: PullThrough, upstreams: MemoryRegistries, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A load follows a blob to its last byte, then waits for the commit, which may happen during its lookup."""
    first = Deferred.fromCoroutine(cache.blob(REPOSITORY, DIGEST))
    await until(lambda: len(upstreams) == 1)
    looked: Deferred[None] = Deferred()
    really_look = store.blob

    async def look_slowly(digest: Digest) -> StoredBlob | None:
        found = await really_look(digest)
        monkeypatch.undo()
        await looked
        return found

    monkeypatch.setattr(store, "blob", look_slowly)
    fetching = Deferred.fromCoroutine(cache.fetch(REPOSITORY, DIGEST))
    upstreams[0].stream(len(DATA)).send(DATA).end()
    (await first).content.close()
    await downloads_ended(cache)
    looked.callback(None)
    await until(lambda: fetching.called or len(upstreams) > 1)
    assert len(upstreams) == 1
    await fetching
