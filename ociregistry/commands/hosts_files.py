"""The hosts.toml files in a folder such as /etc/containerd/certs.d: writes those of one owner, and removes them.

Files that others wrote are kept. Each step is one rename of what is on disk, so that containerd, and the next process
after a kill or a power cut, find either what was before or what comes after.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from ociregistry.commands.options import CommandFailed
from ociregistry.store.files import Files

_NAME = "hosts.toml"
_FOLDER_TOO = "# The folder was made for it."
_PAUSE = 2.0
"""Seconds from one look at the files to the next."""
_ENDS = frozenset({signal.SIGTERM, signal.SIGINT})


class HostsFiles:
    """The files `NAME/hosts.toml` in a folder that one owner wrote: their first line says so."""

    def __init__(self, folder: Path, owner: str = "", files: Files | None = None) -> None:
        """Find the files of `owner`, a word, or of none if it is empty, in `folder`."""
        self._folder = folder
        self._files = files or Files()
        self.mark = f"# Written by ociregistry containerd-config{owner and f' for {owner}'}, which may write it anew."
        """The first line of each file of the owner's."""
        suffix = f"-{owner.replace('/', '_')}" if owner else ""
        self._saved = f"{_NAME}.saved{suffix}"
        self._new = f".{_NAME}.new{suffix}"
        self._staging = f".ociregistry{suffix}"

    def write(self, texts: Mapping[str, str], *, replace: bool) -> list[Path]:
        """Write the files whose text differs; `texts` has them by the names of their folders.

        A file of others is saved beside and then replaced if `replace` is set.

        Returns:
            The files that were written.

        Raises:
            CommandFailed: a file cannot be written, or belongs to others, which is kept.
        """
        return [path for path in map(self._path, texts) if self._written(path, texts[path.parent.name], replace)]

    def remove(self) -> list[Path]:
        """Remove the owner's files, with folders that were made for them, and restore what was saved.

        Returns:
            The files that were removed or restored.

        Raises:
            CommandFailed: a file cannot be removed.
        """
        try:
            shutil.rmtree(self._folder / self._staging, ignore_errors=True)
            folders = (
                sorted(path for path in self._folder.iterdir() if path.is_dir()) if self._folder.is_dir() else []
            )
        except OSError as error:
            raise CommandFailed(f"{self._folder}: cannot be read: {error.strerror}") from None
        return [folder / _NAME for folder in folders if self._removed(folder)]

    def _path(self, name: str) -> Path:
        return self._folder / name / _NAME

    def _lines(self, path: Path) -> list[str] | None:
        """Return the lines of a file of the owner's; None for what others wrote, and if there is none."""
        if path.is_symlink() or not path.is_file():
            return None
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        return lines if lines[:1] == [self.mark] else None

    def _written(self, path: Path, text: str, replace: bool) -> bool:
        try:
            lines = self._lines(path)
            if lines is None and os.path.lexists(path):
                if not replace:
                    raise CommandFailed(
                        f"{path}: exists, and was not written by this command: move it away, or use --replace"
                    )
                self._save(path)
            made = not path.parent.is_dir() or (lines or [])[1:2] == [_FOLDER_TOO]
            wanted = "\n".join([self.mark, *([_FOLDER_TOO] if made else []), text]).encode()
            if lines is not None and path.read_bytes() == wanted:
                return False
            if path.parent.is_dir():
                # If the process was killed in `_save`, this unlinks a second name of a file of others.
                self._files.put(path, wanted, path.with_name(self._new))
            else:
                # An empty folder would keep containerd from _default, so that it comes with its file.
                staging = self._folder / self._staging
                shutil.rmtree(staging, ignore_errors=True)
                staging.mkdir(parents=True)
                self._files.put(staging / _NAME, wanted, staging / self._new)
                staging.rename(path.parent)
                self._files.sync_folder(self._folder)
        except OSError as error:
            raise CommandFailed(f"{path}: cannot be written: {error.strerror}") from None
        return True

    def _save(self, path: Path) -> None:
        """Keep the file itself, with its owner, mode and dates, under a second name."""
        new = path.with_name(self._new)
        new.unlink(missing_ok=True)
        os.link(path, new, follow_symlinks=False)
        new.rename(path.with_name(self._saved))
        # A rename between two names of one file does nothing.
        new.unlink(missing_ok=True)

    def _removed(self, folder: Path) -> bool:
        path, saved = folder / _NAME, folder / self._saved
        try:
            (folder / self._new).unlink(missing_ok=True)
            lines = self._lines(path)
            if lines is None:
                # Written by others since: what was there before is theirs to restore.
                saved.unlink(missing_ok=True)
            elif os.path.lexists(saved):
                saved.rename(path)
            elif lines[1:2] == [_FOLDER_TOO] and os.listdir(folder) == [_NAME]:
                folder.rename(self._folder / self._staging)
                shutil.rmtree(self._folder / self._staging)
            else:
                path.unlink()
        except OSError as error:
            raise CommandFailed(f"{path}: cannot be removed: {error.strerror}") from None
        return lines is not None


def keep_up(
    folder: Path, act: Callable[[], Iterable[Path]], changed: Callable[[Path], None], seconds: float | None
) -> None:
    """Call `act` now and again, for some `seconds`, or if None until the process is told to end; report its changes.

    Only one process at a time does so for a folder, which is made if it is missing; another waits until it has ended.

    Raises:
        CommandFailed: the folder cannot be opened; and what `act` raises.
    """
    end = None if seconds is None else time.monotonic() + seconds
    # Not handlers: the process may be the first one of a container, for which a signal without a handler is ignored,
    # and none may come in the middle of a step.
    with _blocked(), _opened(folder) as descriptor:
        while not _locked(descriptor):
            if _ended(end):
                return
        while True:
            for path in act():
                changed(path)
            if _ended(end):
                return


@contextmanager
def _blocked() -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _opened(folder: Path) -> Iterator[int]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise CommandFailed(f"{folder}: cannot be opened: {error.strerror}") from None
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _ended(end: float | None) -> bool:
    """Wait for a pause; tell whether the time is over, or the process was told to end."""
    pause = _PAUSE if end is None else max(0.0, min(_PAUSE, end - time.monotonic()))
    told = signal.sigtimedwait(_ENDS, pause)
    return told is not None or (end is not None and time.monotonic() >= end)
