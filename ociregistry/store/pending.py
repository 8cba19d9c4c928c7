"""The pending images of one process, in memory and in its pulls/<n>/."""

from __future__ import annotations

from collections.abc import Iterable

from twisted.internet.defer import Deferred
from twisted.logger import Logger

from ociregistry.names import Digest, Repository
from ociregistry.store.files import Files
from ociregistry.store.threads import Threads
from ociregistry.store.workdir import PendingFiles, PendingImage, PullsFolder

_log = Logger(namespace="ociregistry.store")


class PendingImages:
    """Which images are to be completed, or may turn out to be; the notes outlive the process."""

    def __init__(self, pulls: PullsFolder, files: Files, threads: Threads) -> None:
        self._pulls = pulls
        self._files = files
        self._threads = threads
        self.wanted: dict[Digest, Repository] = {}
        """Image that is to be completed -> the repository to fetch it from."""
        self.undecided: dict[Digest, Repository] = {}
        """Image of a requested index that may turn out not to be wanted -> the repository to fetch it from."""

    def _notes(self) -> PendingFiles:
        """Return the notes. Blocks, as it may have to take the pulls/<n>/ folder.

        Raises:
            OSError: the folder cannot be taken.
        """
        return PendingFiles(self._pulls.path, self._files)

    def read(self) -> None:
        """Take over the images that ended processes left pending. Blocks.

        Raises:
            OSError: the notes cannot be read.
        """
        self._take_over(self._notes().read())

    def _take_over(self, found: Iterable[PendingImage]) -> None:
        for pending in found:
            (self.undecided if pending.undecided else self.wanted)[pending.image] = pending.repository

    async def add(self, pending: PendingImage) -> None:
        """Note a pending image; a wanted one never becomes undecided again.

        Raises:
            OSError: the note cannot be written.
        """
        known = self.undecided if pending.undecided else self.wanted
        if pending.image in known or (pending.undecided and pending.image in self.wanted):
            return
        self.undecided.pop(pending.image, None)
        known[pending.image] = pending.repository
        await self._threads.write_in_turn(lambda: self._notes().write(pending))

    async def remove(self, manifest: Digest) -> None:
        """Remove an image, because its blobs are there or not wanted.

        Raises:
            OSError: the note cannot be removed.
        """
        for pending in (self.undecided, self.wanted):
            pending.pop(manifest, None)
        await self._threads.write_in_turn(lambda: self._notes().remove(manifest))

    def write_again(self) -> Deferred[None]:
        """Write all notes into another pulls/<n>/, and take over those that are in it. Never fails."""
        noted = [PendingImage(image, repository) for image, repository in self.wanted.items()]
        noted += [PendingImage(image, repository, undecided=True) for image, repository in self.undecided.items()]

        def write() -> list[PendingImage]:
            notes = self._notes()
            found = list(notes.read())
            for pending in noted:
                notes.write(pending)
            return found

        return self._threads.write_in_turn(write).addCallbacks(
            self._take_over,
            lambda failure: _log.error("cannot note the pending images: {why}", why=failure.value),
        )
