"""What is no regular file, in the place of a blob or record."""

from __future__ import annotations

import os
import socket
from pathlib import Path

IRREGULAR = {
    "folder": "it is not a regular file",
    "link": "it is a symbolic link",
    "link to itself": "it is a symbolic link",
    "fifo": "it is not a regular file",
    "socket": "No such device or address",
}
"""Kind -> why it cannot be read."""


def put_irregular(path: Path, kind: str) -> None:
    """Put something of this kind in the place of the file at `path`; a link leads to the file, outside its folder."""
    beside = path.parent.with_name(f"{path.name}.moved")
    if path.is_file():
        path.rename(beside)
    if kind == "folder":
        path.mkdir()
        (path / "file").touch()
    elif kind == "link":
        path.symlink_to(beside)
    elif kind == "link to itself":
        path.symlink_to(path)
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        folder = os.open(path.parent, os.O_PATH)
        try:
            # The kernel takes short paths only.
            with socket.socket(socket.AF_UNIX) as made:
                made.bind(f"/proc/self/fd/{folder}/{path.name}")
        finally:
            os.close(folder)
