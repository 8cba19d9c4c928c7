"""Counts the bytes that came from each upstream, for a bounded number of names.

Clients may ask for any number of upstreams: the configured ones are counted by name, and of the others the first that
delivered a manifest.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

OTHER = "other"
"""Stands for all upstreams that are not counted by name."""
MOST_NAMES = 50
"""Upstreams, beside the configured ones, that are counted by name."""


class Traffic:
    """The bytes of all bodies that came, by the host that was asked for them."""

    def __init__(self, configured: Iterable[str]) -> None:
        """Count these names, of upstreams and mirrors, from the beginning."""
        self._received: dict[str, int] = {OTHER: 0}
        self._admitted = 0
        self.reconfigure(configured)

    def reconfigure(self, configured: Iterable[str]) -> None:
        """Count these names too, from now on."""
        for name in configured:
            self._received.setdefault(name, 0)

    def delivered(self, name: str) -> None:
        """Note that an upstream delivered a manifest: it exists, so its bytes count by its name if there is room."""
        if name not in self._received and self._admitted < MOST_NAMES:
            self._admitted += 1
            self._received[name] = 0

    def add(self, name: str, count: int) -> None:
        """Count bytes that came."""
        self._received[name if name in self._received else OTHER] += count

    @property
    def received(self) -> Mapping[str, int]:
        """The bytes by name."""
        return dict(self._received)
