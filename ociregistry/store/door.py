"""The socket in pulls/<n>/ by which other processes on the same store reach the daemon."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from ociregistry.store.pulls import pulls_folders

_NAME = "socket"


class Door:
    """The socket in a folder, by a path that is short enough for the kernel, wherever the store is."""

    def __init__(self, folder: Path) -> None:
        """Raises `OSError`."""
        self._folder = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self.path = f"/proc/self/fd/{self._folder}/{_NAME}"

    def clear(self) -> None:
        """Removes what a process left that was killed."""
        Path(self.path).unlink(missing_ok=True)

    def is_open(self) -> bool:
        """Whether a process listens behind it."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking:
            try:
                asking.connect(self.path)
            except (FileNotFoundError, ConnectionRefusedError):
                return False
            return True

    def close(self) -> None:
        """The path leads nowhere any more."""
        os.close(self._folder)


def find_daemon(root: Path) -> Door | None:
    """The door of the daemon that runs on the store at `root`, or None if none does. Raises `OSError`."""
    for folder in pulls_folders(root):
        door = Door(folder)
        try:
            found = door.is_open()
        except OSError:
            door.close()
            raise
        if found:
            return door
        door.close()
    return None
