"""What can be sent to a client: bytes that are there, and bytes that are still coming, by the same three calls."""

from __future__ import annotations

from typing import Protocol

from twisted.internet.defer import Deferred


class Content(Protocol):
    """A manifest or blob, open for reading by one client, who closes it. Printed, it says what it is, for the log."""

    @property
    def size(self) -> int:
        """Bytes, when all are there."""

    def more_than(self, offset: int) -> Deferred[int]:
        """Fires with how many bytes can be read, as soon as that is more than `offset`.

        Fails with a `RegistryError` when no more will come. The last byte comes only when the digest holds.
        """

    def read(self, offset: int, count: int) -> Deferred[bytes]:
        """Fires with at most `count` and at least one of the bytes at `offset`."""

    def close(self) -> None:
        """Gives back what is held for reading."""
