"""Who goes first on a thin link: what clients wait for, before what nobody has asked for."""

from __future__ import annotations

from collections.abc import Hashable

from twisted.internet.defer import Deferred

from ociregistry.flights import Bell


class Precedence:
    """Knows which downloads that clients wait for are flowing; the others stand still meanwhile."""

    def __init__(self) -> None:
        self._flowing: set[Hashable] = set()
        self._changed = Bell()

    @property
    def yields(self) -> bool:
        """Whether what nobody waits for must stand still."""
        return bool(self._flowing)

    def flows(self, download: Hashable, *, waited_for: bool) -> None:
        """Bytes come for `download`, and a client waits for them, or not."""
        if waited_for:
            self._flowing.add(download)
        else:
            self._flowing.discard(download)
        self._changed.ring()

    def ended(self, download: Hashable) -> None:
        """No more bytes come for it."""
        self.flows(download, waited_for=False)

    def change(self) -> Deferred[None]:
        """Fires when something has changed."""
        return self._changed.wait()
