"""The facts about a store: those of the daemon that runs on it, else those that its files tell."""

from __future__ import annotations

import http.client
import os
import pwd
import shutil
import socket
import time
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ociregistry import __version__
from ociregistry.commands.options import ANOTHER, CommandFailed, check_store
from ociregistry.config.values import printable
from ociregistry.names import Digest
from ociregistry.store.snapshot import Snapshot
from ociregistry.store.usage import measured
from ociregistry.store.workdir import find_daemon, undecided_images
from ociregistry.strictjson import parse_json

Document = dict[str, Any]
"""The facts as JSON: what the daemon answers at `/status`, or the part of it that files tell."""

STOPPED = 2
"""The exit status where no daemon runs."""
_WITHIN = 5.0
"""Seconds within which a daemon answers that works."""
_LARGEST = 64 * 1024 * 1024
"""Bytes of an answer; a thousand links and downloads have less than one MiB."""


class Silent(CommandFailed):
    """The daemon does not answer."""


class Facts:
    """Finds out the facts about the store at `root`, again and again."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._snapshot: Snapshot | None = None
        self._found = False
        """Whether there was a daemon or a store: one that is lost later does not end `status --watch`."""

    def read(self) -> Document:
        """Return the facts of now; `status` is `ok`, `degraded`, or `stopped` where no daemon runs. Blocks.

        Raises:
            Silent: the daemon does not answer.
            CommandFailed: the daemon cannot be asked.
            OSError: the store cannot be read.
        """
        try:
            told = _told_by_daemon(self._root)
        except PermissionError:
            raise CommandFailed(_denied(self._root)) from None
        if told is not None:
            # A snapshot saves time at the next reading of the files, and takes memory: not while a daemon runs.
            self._snapshot = None
            self._found = True
            return told
        if self._snapshot is None:
            self._snapshot = Snapshot(self._root)
        try:
            if not self._found:
                check_store(self._root)
                self._found = True
            self._snapshot.refresh()
        except FileNotFoundError:
            why = f"no daemon runs, and there is no store at {self._root} {ANOTHER}"
            raise CommandFailed(why, STOPPED) from None
        return _told_by_files(self._snapshot)

    @property
    def unreadable(self) -> dict[Path, str]:
        """The files among the records that could not be read, with the reasons."""
        return dict(self._snapshot.unreadable) if self._snapshot is not None else {}


class _Connection(http.client.HTTPConnection):
    """A connection to a Unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=_WITHIN)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(_WITHIN)
        self.sock.connect(self._path)


def _told_by_daemon(root: Path) -> Document | None:
    """Return what the daemon on the store tells, or None if none runs.

    Raises:
        Silent: it does not answer.
        CommandFailed: it answers with something else than a status.
        OSError: its socket cannot be connected to.
    """
    control_socket = find_daemon(root)
    if control_socket is None:
        return None
    with closing(control_socket), closing(_Connection(control_socket.path)) as connection:
        try:
            connection.request("GET", "/status")
            answer = connection.getresponse()
            status, body = answer.status, answer.read(_LARGEST)
        except (TimeoutError, BlockingIOError):
            raise Silent(f"the daemon on {root} runs, but has not answered within {_WITHIN:.0f} s") from None
        except (FileNotFoundError, ConnectionError, http.client.HTTPException):
            # The daemon has ended meanwhile.
            return None
    try:
        document = parse_json(body) if status == 200 else None
    except ValueError:
        document = None
    if not isinstance(document, dict):
        raise CommandFailed(f"the daemon on {root} tells no status: is it of an earlier version? Restart it")
    return document


def _told_by_files(snapshot: Snapshot) -> Document:
    records = snapshot.records.values()
    images = [stored.manifest.digest for stored in records if not stored.manifest.is_list]
    missing = {
        image: lacking for image in images if snapshot.is_wanted(image) and (lacking := snapshot.missing(image))
    }
    disk = shutil.disk_usage(snapshot.root)
    undecided = undecided_images(snapshot.root) & snapshot.records.keys()
    return {
        "status": "stopped",
        "reasons": [],
        "version": __version__,
        "store": {
            "path": printable(str(snapshot.root)),
            "lists": len(records) - len(images),
            "images": len(images),
            **asdict(measured(snapshot.root, time.monotonic)),
        },
        "disk": {"size": disk.total, "free": disk.free},
        "incomplete": {
            "images": len(missing.keys() | undecided),
            "bytes": _bytes_of(missing.values()),
            "pending": len(undecided),
        },
    }


def _bytes_of(missing: Iterable[Mapping[Digest, int]]) -> int:
    """Return the size of all missing blobs."""
    return sum({blob: size for lacking in missing for blob, size in lacking.items()}.values())


def _denied(root: Path) -> str:
    try:
        owner = f"belongs to {_user(root.stat().st_uid)}"
    except OSError:
        owner = "cannot be entered"
    return (
        f"cannot ask the daemon as {_user(os.geteuid())}: the store {root} {owner}; run this as its user, or as root"
    )


def _user(number: int) -> str:
    try:
        return f"the user {pwd.getpwuid(number).pw_name}"
    except KeyError:
        return f"the user {number}"
