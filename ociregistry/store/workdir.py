"""pulls/<n>/: the work in progress of one process, with its lock, pending images and control socket.

What a process that ended has left there is taken over by another process.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ociregistry.errors import RegistryError
from ociregistry.names import Digest, Repository, Upstream
from ociregistry.store.files import Files, close_descriptor, is_at, is_full, lock, locked, read_regular
from ociregistry.store.paths import (
    LOCK_NAME,
    NOTE_SUFFIX,
    PENDING_SUFFIX,
    SOCKET_NAME,
    bad_folder,
    pending_path,
    pulls_folder,
    pulls_folders,
    store_folders,
    store_lock,
    temporary,
)
from ociregistry.strictjson import parse_json


def wanted_blobs(root: Path, blobs_of: Callable[[Digest], Iterable[Digest]]) -> frozenset[Digest]:
    """Return the blobs that any process is to fetch for pending images of the store at `root`. Blocks.

    `blobs_of` returns the blobs that the record of a manifest names, or none if there is no record.

    Raises:
        OSError: a folder cannot be read.
    """
    paths = (path for folder in pulls_folders(root) for path in folder.glob(f"*{PENDING_SUFFIX}"))
    manifests = (Digest.from_hex(path.stem) for path in paths)
    return frozenset(blob for manifest in manifests if manifest is not None for blob in blobs_of(manifest))


@dataclass(frozen=True, slots=True)
class PendingImage:
    """An image whose blobs are to be fetched from `repository`.

    It is `undecided` while it may turn out not to be wanted.
    """

    image: Digest
    repository: Repository
    undecided: bool = False


class PendingFiles:
    """The files of the pending images of one process, `<hex of the manifest>.wish` in its folder.

    All methods block.

    Raises:
        OSError: a file cannot be read, written or removed.
    """

    def __init__(self, folder: Path, files: Files) -> None:
        self._folder = folder
        self._files = files

    def write(self, pending: PendingImage) -> None:
        """Write the file of one pending image."""
        repository = pending.repository
        document: dict[str, object] = {"upstream": repository.upstream.name, "repository": repository.path}
        document |= {"undecided": True} if pending.undecided else {}
        path = self._path(pending.image)
        self._files.put(path, json.dumps(document).encode() + b"\n", temporary(path))

    def remove(self, manifest: Digest) -> None:
        """Remove the file of a pending image, if it is there."""
        self._files.unlink(self._path(manifest))

    def read(self) -> Iterator[PendingImage]:
        """Yield the pending images, removing files that cannot be read or parsed."""
        for path in sorted(path for path in self._folder.glob(f"*{PENDING_SUFFIX}") if path.is_file()):
            pending = _read(path)
            if pending is None:
                self._files.unlink(path)
            else:
                yield pending

    def scan(self) -> Iterator[PendingImage]:
        """Yield the pending images without removing anything; the folder may belong to another process."""
        for path in self._folder.glob(f"*{PENDING_SUFFIX}"):
            pending = _read(path)
            if pending is not None:
                yield pending

    def _path(self, manifest: Digest) -> Path:
        return pending_path(self._folder, manifest)


def undecided_images(root: Path) -> frozenset[Digest]:
    """Return the undecided pending images of all processes on the store at `root`. Blocks."""
    files = (PendingFiles(folder, Files()) for folder in pulls_folders(root))
    return frozenset(pending.image for one in files for pending in one.scan() if pending.undecided)


def _read(path: Path) -> PendingImage | None:
    manifest = Digest.from_hex(path.stem)
    if manifest is None:
        return None
    try:
        document = parse_json(read_regular(path))
        repository = Repository.at(Upstream.parse(document["upstream"]), document["repository"])
        return PendingImage(manifest, repository, document.get("undecided") is True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RegistryError):
        return None


@contextmanager
def store_locked(root: Path) -> Iterator[None]:
    """Hold the exclusive lock of the store at `root`: a flock on pulls/lock. Blocks.

    On a disk without space for that file the folder `root` is locked instead. That excludes every other process, as
    the file is only made under the folder's lock.

    Raises:
        OSError: the lock cannot be opened or taken.
    """
    path = store_lock(root)
    if not path.exists():
        with _folder_locked(root):
            if not _made(path):
                yield
                return
    with locked(path):
        yield


def _made(path: Path) -> bool:
    """Make an empty file and its folder; tell whether there was space for them."""
    try:
        path.parent.mkdir(exist_ok=True)
        path.touch()
    except OSError as error:
        if not is_full(error):
            raise
        return False
    return True


@contextmanager
def _folder_locked(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            # NFS locks only what is open for writing, which a folder never is.
            if error.errno != errno.EBADF:
                raise
        yield
    finally:
        close_descriptor(descriptor)


class PullsFolder:
    """The pulls/<n>/ of this process, held by a flock on its `lock` for as long as the process lives.

    It is taken at its first use, so that a process that writes nothing there needs no space for it. Where another
    program has removed or replaced it, the next use takes another one.
    """

    def __init__(self, root: Path, files: Files, *, adopts: bool = True) -> None:
        """Use the store at `root`.

        With `adopts`, take over the partials and pending images of processes that have ended, from this and other
        folders. Without it, skip folders that hold leftovers.
        """
        self._root = root
        self._files = files
        self._adopts = adopts
        self._taking = threading.Lock()
        self._taken: tuple[Path, int] | None = None
        """The folder, and the descriptor of its lock."""
        self.times_taken = 0
        """How often a folder was taken."""

    @property
    def path(self) -> Path:
        """The folder: the first that no process held when it was taken. Blocks.

        Raises:
            OSError: the folder cannot be taken, also when there is no space for a new one; the next call tries again.
        """
        with self._taking:
            if self._taken is not None and not is_at(self._taken[1], self._taken[0] / LOCK_NAME):
                close_descriptor(self._taken[1])
                self._taken = None
            if self._taken is None:
                self._taken = self._take()
                self.times_taken += 1
            return self._taken[0]

    def renew(self) -> None:
        """Take another folder if the one that was taken is gone; a process that adopts also takes its first. Blocks.

        Raises:
            OSError: the folder cannot be taken.
        """
        if self._adopts or self.times_taken:
            self.path  # noqa: B018  # the property takes it

    def _take(self) -> tuple[Path, int]:
        # They may have been removed together with pulls/<n>/, and the next blob or record needs them.
        for needed in store_folders(self._root):
            needed.mkdir(parents=True, exist_ok=True)
        shared = store_lock(self._root)
        if not shared.exists():
            # Made while there is space, for processes that need the lock when there is none.
            with _folder_locked(self._root):
                _made(shared)
        number = 0
        while True:
            folder = pulls_folder(self._root) / str(number)
            folder.mkdir(parents=True, exist_ok=True)
            try:
                held = lock(folder / LOCK_NAME, wait=False)
            except OSError:
                # An empty folder must not use up the inode that its lock needs.
                with suppress(OSError):
                    folder.rmdir()
                raise
            if held is not None and (self._adopts or not any(_is_kept(path, folder) for path in folder.iterdir())):
                break
            if held is not None:
                close_descriptor(held)
            number += 1
        try:
            self._fill(folder)
        except BaseException:
            close_descriptor(held)
            raise
        return folder, held

    def _fill(self, folder: Path) -> None:
        for other in pulls_folders(self._root):
            if self._adopts and other != folder:
                self._adopt(other, folder)
        for path in folder.iterdir():
            if path.is_file() and path.name != LOCK_NAME and not _is_kept(path, folder):
                self._files.unlink(path)
        self._files.sync_folder(folder)
        self._files.sync_folder(folder.parent)

    def _adopt(self, folder: Path, ours: Path) -> None:
        try:
            held = lock(folder / LOCK_NAME, wait=False)
        except OSError as error:
            if not is_full(error):
                raise
            return
        if held is None:
            return
        try:
            # An earlier process may have been killed after it took over a note and before its partial.
            left = [path for path in folder.iterdir() if _is_kept(path, folder, ours)]
            # Notes first: a note without its partial does no harm, but a partial without its note would be removed.
            for path in sorted(left, reverse=True):
                if not (ours / path.name).exists():
                    # Another process may have removed it as an orphan meanwhile.
                    with suppress(FileNotFoundError):
                        self._files.rename(path, ours / path.name)
            for path in folder.iterdir():
                if path.is_file() and path.name != LOCK_NAME:
                    self._files.unlink(path)
        finally:
            close_descriptor(held)

    @property
    def bad(self) -> Path:
        """The quarantine folder, for files whose content is not what it should be. It is made at its first use.

        Raises:
            OSError: it cannot be made.
        """
        path = bad_folder(self.path)
        path.mkdir(exist_ok=True)
        return path

    def quarantine(self, path: Path) -> Path | None:
        """Quarantine what is damaged at `path` in bad/, or remove it where there is no space for that. Blocks.

        Returns:
            Where in bad/ it is now, or None if it was removed.

        Raises:
            OSError: it can be neither moved nor removed.
        """
        try:
            place = _place_for(path, self.bad)
            self._files.rename(path, place)
        except OSError as error:
            if not is_full(error):
                raise
            self._files.unlink(path)
            return None
        return place

    def close(self) -> None:
        """Release the folder, so that another process can take it."""
        if self._taken is not None:
            close_descriptor(self._taken[1])
            self._taken = None


def _place_for(path: Path, folder: Path) -> Path:
    """Return where in `folder` `path` can be renamed to: no file replaces a folder there, and no folder anything."""
    target, number = folder / path.name, 0
    while target.is_dir() or (path.is_dir() and target.exists()):
        number += 1
        target = folder / f"{path.name}.{number}"
    return target


def _is_kept(path: Path, *folders: Path) -> bool:
    """Tell whether `path` is a pending image, or belongs to a partial in one of the `folders`."""
    return path.suffix == PENDING_SUFFIX or _belongs_to_partial(path, *folders)


def _belongs_to_partial(path: Path, *folders: Path) -> bool:
    """Tell whether `path` is a partial or its note, and the other of the two is in one of the `folders`."""
    name = path.name.removesuffix(NOTE_SUFFIX)
    if Digest.from_hex(name) is None:
        return False
    return all(any((folder / half).is_file() for folder in folders) for half in (name, name + NOTE_SUFFIX))


class ControlSocket:
    """The control socket in a folder, with a path that is short enough for the kernel wherever the store is."""

    def __init__(self, folder: Path) -> None:
        """Open the folder.

        Raises:
            OSError: it cannot be opened.
        """
        self._folder = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self.path = f"/proc/self/fd/{self._folder}/{SOCKET_NAME}"

    def clear(self) -> None:
        """Remove the socket of a process that was killed, if it is there."""
        Path(self.path).unlink(missing_ok=True)

    def is_open(self) -> bool:
        """Tell whether a process listens on the socket, also one that is too busy to accept connections.

        Raises:
            OSError: the socket cannot be connected to, for another reason than that no process listens.
        """
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking:
            # Where many connections wait to be accepted, it would wait behind them.
            asking.setblocking(False)
            try:
                asking.connect(self.path)
            except BlockingIOError:
                return True
            except (FileNotFoundError, ConnectionRefusedError):
                return False
            return True

    def close(self) -> None:
        """Close the folder, which makes `path` unusable."""
        close_descriptor(self._folder)


def find_daemon(root: Path) -> ControlSocket | None:
    """Return the control socket of the daemon that runs on the store at `root`, or None. The caller closes it.

    Raises:
        OSError: a folder or a socket cannot be opened.
    """
    for folder in pulls_folders(root):
        control_socket = ControlSocket(folder)
        try:
            found = control_socket.is_open()
        except OSError:
            control_socket.close()
            raise
        if found:
            return control_socket
        control_socket.close()
    return None
