"""The folders of a store in use: made anew where other programs remove, empty or replace the store."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import LoopingCall
from twisted.logger import Logger
from twisted.python.failure import Failure

from ociregistry.store.files import Files, reason
from ociregistry.store.paths import store_folders
from ociregistry.store.threads import Threads
from ociregistry.store.workdir import PullsFolder

_log = Logger(namespace="ociregistry.store")

_LOOK_EVERY = 1.0
"""Seconds."""


@dataclass(frozen=True, slots=True)
class _Look:
    made: tuple[Path, ...]
    """The folders that were missing."""
    times_taken: int
    """How often this process has taken a pulls/<n>/."""
    why: str = ""
    """Why the store cannot be written, naming the folder; empty if it can be."""


class Folders:
    """Looks every second whether the folders are there and can be written, and makes those that are missing."""

    def __init__(
        self,
        root: Path,
        pulls: PullsFolder,
        files: Files,
        threads: Threads,
        clock: IReactorTime,
        renewed: Callable[[], object],
    ) -> None:
        """Look after the store at `root`; `renewed` is called when `pulls` is another folder than before."""
        self.why = ""
        """Why the store cannot be written; empty if it can be."""
        self._root = root
        self._pulls = pulls
        self._files = files
        self._threads = threads
        self._renewed = renewed
        self._times_taken = 0
        self._loop = LoopingCall(self._look_again)
        self._loop.clock = clock

    def make(self) -> tuple[Path, ...]:
        """Make the folders of records and blobs, and return those that were missing. Blocks.

        Raises:
            OSError: one cannot be made.
        """
        made = tuple(folder for folder in store_folders(self._root) if not folder.is_dir())
        for folder in made:
            folder.mkdir(parents=True, exist_ok=True)
        if made:
            self._files.sync_folder(self._root)
        return made

    def start(self) -> None:
        """Start to look; the folders are there."""
        self._times_taken = self._pulls.times_taken
        self._loop.start(_LOOK_EVERY, now=False)

    def stop(self) -> None:
        """Stop looking."""
        self._loop.stop()

    def _look_again(self) -> Deferred[None]:
        looked = self._threads.read(self._look).addCallback(self._apply)
        return looked.addErrback(self._failed)

    def _look(self) -> _Look:
        made: tuple[Path, ...] = ()
        try:
            made = self.make()
            self._pulls.renew()
        except OSError as error:
            return _Look(made, self._pulls.times_taken, f"{error.filename or self._root}: {reason(error)}")
        for folder in store_folders(self._root):
            if not os.access(folder, os.W_OK | os.X_OK):
                read_only = os.statvfs(folder).f_flag & os.ST_RDONLY
                why = "its file system is read-only" if read_only else "permission denied"
                return _Look(made, self._pulls.times_taken, f"{folder}: {why}")
        return _Look(made, self._pulls.times_taken)

    def _apply(self, look: _Look) -> None:
        before, self._times_taken = self._times_taken, look.times_taken
        if look.made or (before and look.times_taken != before):
            _log.warn(
                "another program has removed or replaced {store}, or folders in it: what is gone is a miss, and its "
                "downloads begin anew",
                store=self._root,
            )
        if look.times_taken != before:
            self._renewed()
        self._tell(look.why)

    def _failed(self, failure: Failure) -> None:
        self._tell(f"{self._root}: {failure.value}")

    def _tell(self, why: str) -> None:
        if why and why != self.why:
            _log.error("the store cannot be written, nothing new is kept in it: {why}", why=why)
        elif self.why and not why:
            _log.warn("the store can be written again: {store}", store=self._root)
        self.why = why
