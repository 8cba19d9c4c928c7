"""Who must not be cut off when the daemon stops."""

from __future__ import annotations

from twisted.internet.defer import Deferred, succeed

from ociregistry.flights import Bell


class Traffic:
    """The requests that are being answered, and the connections whose first one is awaited."""

    def __init__(self) -> None:
        self._requests = 0
        self._changed = Bell()

    def began(self) -> None:
        """One more."""
        self._requests += 1

    def ended(self) -> None:
        """One less."""
        self._requests -= 1
        self._changed.ring()

    def idle(self) -> Deferred[None]:
        """Fires when there is none."""
        return succeed(None) if self._requests == 0 else Deferred.fromCoroutine(self._idle())

    async def _idle(self) -> None:
        while self._requests:
            await self._changed.wait()
