"""The files of the configuration: read with their versions, and watched for other ones.

No signal comes when Kubernetes exchanges the files of a ConfigMap or a Secret, or when a certificate is renewed.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from twisted.application.service import Service
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import LoopingCall
from twisted.logger import Logger

_log = Logger(namespace="ociregistry.config")

_LOOK_EVERY = 5.0
"""Seconds."""
_MOST_LOOKS = 12
"""Looks in a row at files that change each time, until they are read as they are."""


@dataclass(frozen=True, slots=True)
class Version:
    """What shows that a file, at the end of all symbolic links, was changed, exchanged, or made readable."""

    device: int
    inode: int
    size: int
    modified: int
    """Nanoseconds since 1970."""
    mode: int
    owner: int
    group: int

    @classmethod
    def of(cls, path: Path) -> Version | None:
        """Return the version of the file at `path`; None if there is none, or it cannot be looked at."""
        try:
            found = os.stat(path)
        except (OSError, ValueError):
            return None
        return cls(
            found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_mode, found.st_uid, found.st_gid
        )


Versions = Mapping[Path, Version | None]


class ConfigFiles:
    """Reads files, and notes the version of each."""

    def __init__(self) -> None:
        self._versions: dict[Path, Version | None] = {}

    @property
    def versions(self) -> Versions:
        """The files that were to be read, also those that could not be, with their versions."""
        return dict(self._versions)

    def read(self, path: Path) -> bytes:
        """Return the content of a file.

        Raises:
            OSError: it cannot be read, or is not a regular file.
            ValueError: this cannot be a path.
        """
        # Noted before it is read, and only once: a change meanwhile then shows at the next look.
        self._versions.setdefault(path, Version.of(path))
        if path.exists() and not path.is_file() and not path.is_dir():
            # Reading a pipe blocks until another process writes to it; at a reload that may be never.
            raise OSError(errno.EINVAL, "not a regular file")
        return path.read_bytes()


class FileWatcher(Service):
    """Tells when files have other versions than those that were read, and have kept them from one look to the next.

    A file that is written or touched all the time delays that by a minute, so that it does not hide other changes.
    A file that is missing is no news by itself: it may be about to be exchanged, and nothing can be read from it.
    """

    def __init__(
        self,
        read: Callable[[], Versions],
        changed: Callable[[], Deferred[None]],
        in_thread: Callable[[Callable[[], Versions]], Deferred[Versions]],
        clock: IReactorTime,
    ) -> None:
        """Call `changed` when files differ from what `read` returns, and look again when its Deferred has fired.

        A look that a network file system never answers keeps its thread; no other look begins meanwhile.
        """
        self._read = read
        self._changed = changed
        self._in_thread = in_thread
        self._last_look: Versions = {}
        self._unsettled = 0
        """Looks in a row that found other versions than the look before."""
        self._told: Versions = {}
        """The versions for which `changed` was last called: no second time, even if the files could not be read."""
        self._loop = LoopingCall(self._look)
        self._loop.clock = clock

    def startService(self) -> None:
        """Begin to look; call it after the process has daemonized."""
        super().startService()
        self._loop.start(_LOOK_EVERY, now=False)

    def stopService(self) -> None:
        """Stop looking."""
        super().stopService()
        self._loop.stop()

    def _look(self) -> Deferred[None] | None:
        paths = list(self._read())
        if not paths:
            return None
        return self._in_thread(lambda: {path: Version.of(path) for path in paths}).addCallback(self._compare)

    def _compare(self, found: Versions) -> Deferred[None] | None:
        last_look, self._last_look = self._last_look, found
        read = self._read()
        changed = [str(path) for path, version in found.items() if path in read and version not in (None, read[path])]
        self._unsettled = self._unsettled + 1 if changed and found != last_look else 0
        if not changed or 0 < self._unsettled < _MOST_LOOKS or found == self._told or not self.running:
            return None
        self._unsettled = 0
        self._told = found
        _log.info("changed: {file}", file=", ".join(changed))
        return self._changed()
