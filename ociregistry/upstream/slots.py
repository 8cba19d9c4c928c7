"""How many requests one upstream gets at once."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from twisted.internet.defer import DeferredSemaphore

KEPT_FOR_SMALL = 2


class Slots:
    """So many for blobs, and two more that blobs do not get: nobody waits behind layers for a manifest."""

    def __init__(self, most: int) -> None:
        self._blobs = DeferredSemaphore(most)
        self._all = DeferredSemaphore(most + KEPT_FOR_SMALL)

    async def for_blob(self, *, small: bool) -> None:
        """Waits for one for a blob, which may be as `small` as a manifest; `blob_done` gives it back."""
        if not small:
            await self._blobs.acquire()
        try:
            await self._all.acquire()
        except BaseException:
            if not small:
                self._blobs.release()
            raise

    def blob_done(self, *, small: bool) -> None:
        """One that was for a blob is free."""
        self._all.release()
        if not small:
            self._blobs.release()

    @asynccontextmanager
    async def for_small(self) -> AsyncIterator[None]:
        """One for what is small, with its token, while the block runs."""
        await self._all.acquire()
        try:
            yield
        finally:
            self._all.release()
