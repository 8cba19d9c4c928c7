"""The blobs that one image lacks: requested a few at a time, and no more of them once some were refused.

A manifest may name blobs that its upstream does not have, by mistake or to keep a cache busy. So images take turns,
and after a few refusals the rest of an image is not requested.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from typing import Any

from twisted.internet.defer import Deferred

from ociregistry.errors import BlobUnknown, Denied, RegistryError
from ociregistry.names import Digest, Repository
from ociregistry.store.store import Store

MOST_BLOBS = 1000
"""Blobs of an image, at most, to request without a client. Docker stacks 127 layers, overlayfs in the kernel 500."""
MOST_REFUSED = 3
"""Refusals after which the rest of an image is not requested."""
_MOST_IN_TURN = 10
"""Requests for an image in one turn: enough for most images, so that one is whole before the next."""

Fetch = Callable[[Repository, Digest], Coroutine[Deferred[Any], Any, None]]
"""Fetches a blob into the store in the background; raises `RegistryError`."""


class Refusals:
    """The blobs of one image that were requested in vain."""

    def __init__(self) -> None:
        self._errors: dict[Digest, str] = {}

    def add(self, blob: Digest, error: RegistryError) -> None:
        """Note why a blob was refused."""
        self._errors[blob] = error.message

    @property
    def enough(self) -> bool:
        """Whether there were so many that nothing more is to be requested."""
        return len(self._errors) >= MOST_REFUSED

    def without(self, blobs: Mapping[Digest, int]) -> dict[Digest, int]:
        """Return those of `blobs`, given with their sizes, that were not refused, the smallest first."""
        return {blob: blobs[blob] for blob in sorted(blobs, key=blobs.__getitem__) if blob not in self._errors}

    def told(self, missing: int) -> str:
        """Return one line about why an image stays without `missing` blobs; empty if none was refused."""
        if not self._errors:
            return ""
        first = next(iter(self._errors.values()))
        others, unasked = len(self._errors) - 1, missing - len(self._errors)
        more = [f"{others} more refused"] * (others > 0) + [f"{unasked} not requested"] * (unasked > 0)
        return first + (f" ({', '.join(more)})" if more else "")


class ImageBlobs:
    """The missing blobs of the image `digest` of `repository`, fetched in turns with those of other images."""

    def __init__(self, digest: Digest, repository: Repository, store: Store, fetch: Fetch) -> None:
        """Look into `store` for what is missing, and fetch it by `fetch`."""
        self._digest = digest
        self._repository = repository
        self._store = store
        self._fetch = fetch
        self._required = Refusals()
        self._foreign = Refusals()
        self.missing: dict[Digest, int] = {}
        """The required blobs that are missing, with their sizes in bytes."""
        self.missing_foreign: dict[Digest, int] = {}
        """The foreign layers that are missing, with their sizes in bytes."""

    @property
    def refused(self) -> str:
        """Why required blobs stay missing, as one line; empty if none was refused."""
        return self._required.told(len(self.missing))

    @property
    def refused_foreign(self) -> str:
        """Why foreign layers stay missing, as one line; empty if none was refused."""
        return self._foreign.told(len(self.missing_foreign))

    async def look(self) -> None:
        """Look into the store for what is missing.

        Raises:
            OSError: the store cannot be read.
        """
        entry = self._store.entry(self._digest)
        self.missing = dict(await self._store.missing(self._digest) or {})
        self.missing_foreign = dict(await self._store.missing_foreign_layers(entry.foreign_layers)) if entry else {}

    async def take_turn(self, brought: Callable[[Digest], object]) -> bool:
        """Request some of what is missing: the smallest blobs first, foreign layers last.

        Calls `brought` with each blob that is in the store by then.

        Returns:
            Whether some is left for the next turn.

        Raises:
            RegistryError: the upstream cannot be asked.
        """
        left = _MOST_IN_TURN
        for refusals, blobs in ((self._required, self.missing), (self._foreign, self.missing_foreign)):
            for blob in refusals.without(blobs):
                if self._required.enough or refusals.enough:
                    break
                if not left:
                    return True
                left -= 1
                try:
                    await self._fetch_from_any(blob)
                except (BlobUnknown, Denied) as error:
                    refusals.add(blob, error)
                else:
                    del blobs[blob]
                    brought(blob)
        return False

    async def _fetch_from_any(self, blob: Digest) -> None:
        """Fetch a blob from the repository, else from another one of the upstream that has the image.

        Raises:
            RegistryError: no repository gave it; the error of the first one.
        """
        try:
            await self._fetch(self._repository, blob)
        except (BlobUnknown, Denied):
            known = self._store.repositories(self._digest)
            others = {one for one in known if one.upstream == self._repository.upstream} - {self._repository}
            for other in sorted(others):
                with suppress(BlobUnknown, Denied):
                    await self._fetch(other, blob)
                    return
            raise
