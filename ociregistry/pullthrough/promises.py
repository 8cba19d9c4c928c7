"""Promises that could not be kept: blobs of which a client was given the headers, and the upstream then had none."""

from __future__ import annotations

from twisted.internet.interfaces import IReactorTime

from ociregistry.errors import BlobUnknown
from ociregistry.names import Digest, Repository

_KEPT = 60.0
_MOST_KEPT = 1000


class BrokenPromises:
    """Remembers them for a minute, so that the client's next request is told at once what the first could not be."""

    def __init__(self, clock: IReactorTime) -> None:
        self._clock = clock
        self._kept: dict[tuple[Repository, Digest], tuple[BlobUnknown, float]] = {}

    def remember(self, repository: Repository, digest: Digest, error: BlobUnknown) -> None:
        """The upstream does not have the blob."""
        if len(self._kept) >= _MOST_KEPT:
            self._kept.clear()
        self._kept[repository, digest] = error, self._clock.seconds() + _KEPT

    def check(self, repository: Repository, digest: Digest) -> None:
        """Raises what the upstream said of the blob less than a minute ago."""
        error, until = self._kept.get((repository, digest), (None, 0.0))
        if error is None:
            return
        if self._clock.seconds() < until:
            raise BlobUnknown(error.message)
        del self._kept[repository, digest]
