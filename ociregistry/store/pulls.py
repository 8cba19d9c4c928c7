"""pulls/<n>/: the folder in which one process keeps what is not complete, and takes over what others left."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

from ociregistry.names import Digest
from ociregistry.store.files import Files, lock

NOTE_SUFFIX = ".note"
STAGED_SUFFIX = ".staged"
WISH_SUFFIX = ".wish"

_NUMBER = re.compile("0|[1-9][0-9]{0,5}")
_BAD = "bad"


def pulls_folders(root: Path) -> list[Path]:
    """All pulls/<n>/ of the store at `root`. Blocks; raises `OSError`."""
    try:
        folders = [path for path in (root / "pulls").iterdir() if _NUMBER.fullmatch(path.name) and path.is_dir()]
    except FileNotFoundError:
        return []
    return sorted(folders, key=lambda path: int(path.name))


class PullsFolder:
    """The pulls/<n>/ of this process, held by a flock on its `lock` for as long as the process lives.

    Partials and wishes of processes that have ended, in this and other folders, become ours.
    """

    def __init__(self, root: Path, files: Files, *, adopts: bool = True) -> None:
        """Takes the first folder of the store at `root` that no process holds. Blocks; raises `OSError`.

        Who `adopts` nothing takes none in which something was left.
        """
        pulls = root / "pulls"
        self._files = files
        number = 0
        while True:
            self.path = pulls / str(number)
            self.path.mkdir(parents=True, exist_ok=True)
            held = lock(self.path / "lock", wait=False)
            if held is not None and (adopts or not any(_is_kept(path, self.path) for path in self.path.iterdir())):
                break
            if held is not None:
                os.close(held)
            number += 1
        self._held = held
        for folder in pulls_folders(root):
            if adopts and folder != self.path:
                self._adopt(folder)
        self._tidy()
        files.sync_folder(self.path)
        files.sync_folder(pulls)

    def _tidy(self) -> None:
        for path in self.path.iterdir():
            if path.is_file() and path.name != "lock" and not _is_kept(path, self.path):
                self._files.unlink(path)

    def _adopt(self, folder: Path) -> None:
        held = lock(folder / "lock", wait=False)
        if held is None:
            return
        try:
            # Whoever adopted before us may have been killed between a partial and its note.
            left = [path for path in folder.iterdir() if _is_kept(path, folder, self.path)]
            # A note without its partial is nothing; a partial without its note would be taken for a leftover.
            for path in sorted(left, reverse=True):
                if not (self.path / path.name).exists():
                    # Another process may have removed it as an orphan meanwhile.
                    with suppress(FileNotFoundError):
                        self._files.rename(path, self.path / path.name)
            for path in folder.iterdir():
                if path.is_file() and path.name != "lock":
                    self._files.unlink(path)
        finally:
            os.close(held)

    @property
    def bad(self) -> Path:
        """The folder for files that are not what they should be; it is made when it is asked for."""
        path = self.path / _BAD
        path.mkdir(exist_ok=True)
        return path

    def close(self) -> None:
        """Lets another process take the folder."""
        os.close(self._held)


def _is_kept(path: Path, *folders: Path) -> bool:
    """Whether `path` is a wish, or belongs to a partial in one of the `folders`."""
    return path.suffix == WISH_SUFFIX or _belongs_to_partial(path, *folders)


def _belongs_to_partial(path: Path, *folders: Path) -> bool:
    """Whether `path` is a partial or its note, and the other of the two is in one of the `folders`."""
    name = path.name.removesuffix(NOTE_SUFFIX)
    if Digest.from_hex(name) is None:
        return False
    return all(any((folder / half).is_file() for folder in folders) for half in (name, name + NOTE_SUFFIX))
