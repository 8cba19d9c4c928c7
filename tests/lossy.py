"""A file system that loses unsynced changes in a simulated power cut, in all ways that a real one may.

It works on a real folder and records what the disk would hold: for each file the bytes as of its last sync, for each
folder the names as of its last sync. Each later change may have reached the disk, or not, or in part.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from itertools import combinations, product
from pathlib import Path

from ociregistry.store.files import Files, SharedFile

_MOST_PENDING = 10
_MOST_WAYS = 1000


class PowerCut(Exception):
    """The machine is off: no further call has an effect."""


@dataclass(frozen=True)
class Disk:
    """The contents of a disk at boot: the bytes of each file, by its path below the store's root."""

    files: frozenset[tuple[str, bytes]]

    @classmethod
    def of(cls, folder: Path) -> Disk:
        """Read the contents of `folder`."""
        paths = (path for path in folder.rglob("*") if path.is_file())
        return cls(frozenset((str(path.relative_to(folder)), path.read_bytes()) for path in paths))

    def having(self, more: Mapping[str, bytes]) -> Disk:
        """Return a copy with more files, or with other bytes in them."""
        return Disk(frozenset({**dict(self.files), **more}.items()))

    def write(self, folder: Path) -> None:
        """Make `folder` hold these contents."""
        for name, data in self.files:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)

    def __str__(self) -> str:
        return ", ".join(f"{name} ({len(data)} bytes, {data.count(0)} zeros)" for name, data in sorted(self.files))


@dataclass(frozen=True)
class _Change:
    """A write (with its bytes) or a truncation of a file."""

    offset: int
    data: bytes | None = None

    def apply(self, content: bytes, *, data_lost: bool = False) -> bytes:
        """Return the content after the change; with `data_lost` only the size has reached the disk, not the bytes."""
        if self.data is None:
            return content[: self.offset].ljust(self.offset, b"\0")
        written = bytes(len(self.data)) if data_lost else self.data
        return content[: self.offset].ljust(self.offset, b"\0") + written + content[self.offset + len(written) :]


@dataclass(eq=False)
class _Inode:
    """A file, independent of its name: the content certainly on disk, and the changes since."""

    synced: bytes = b""
    changes: list[_Change] = field(default_factory=list)

    def content(self) -> bytes:
        """The content that a reader sees before the power cut."""
        content = self.synced
        for change in self.changes:
            content = change.apply(content)
        return content

    def sync(self) -> None:
        """Write all changes to the disk."""
        self.synced = self.content()
        self.changes.clear()

    def contents(self) -> set[bytes]:
        """Yield what may be found after a power cut: some of the changes, each with its bytes or its size alone."""
        found = {self.synced}
        for change in self.changes:
            found |= {change.apply(content, data_lost=lost) for content in found for lost in (False, True)}
        if len(found) > _MOST_WAYS:
            raise AssertionError(f"{len(self.changes)} unsynced changes are too many to try all states")
        return found


_Names = dict[Path, _Inode]


@dataclass(frozen=True, eq=False)
class _Naming:
    """A change of names: `old`, if any, is gone, and `inode`, if any, has the name `new`."""

    old: Path | None
    new: Path | None
    inode: _Inode | None

    def apply(self, names: _Names) -> None:
        """Apply the change atomically: all file systems with a journal do so for a rename."""
        if self.old is not None:
            names.pop(self.old, None)
        if self.new is not None and self.inode is not None:
            names[self.new] = self.inode

    def concerns(self, folder: Path) -> bool:
        """Whether a sync of `folder` writes the change to the disk."""
        return folder in {path.parent for path in (self.old, self.new) if path is not None}


class LossyFiles(Files):
    """The files below `root`, on a machine with this `boot` id, with a power cut instead of operation `cut_at`.

    Operations count from 0; without `cut_at` the power stays. The initial contents of `root` are on disk.
    """

    def __init__(self, root: Path, boot: str, cut_at: int | None = None) -> None:
        self.operations: list[str] = []
        """The operations so far."""
        self.off = False
        self._root = root
        self._boot = boot
        self._cut_at = cut_at
        self._inodes: dict[int, _Inode] = {}
        self._pending: list[_Naming] = []
        for path in root.rglob("*"):
            if path.is_file():
                self._inodes[path.stat().st_ino] = _Inode(path.read_bytes())
        self._names: _Names = {path: self._inodes[path.stat().st_ino] for path in root.rglob("*") if path.is_file()}
        self._synced_names = dict(self._names)
        self._synced_folders = {root, *(path for path in root.rglob("*") if path.is_dir())}

    def _do(self, what: str, *paths: Path) -> None:
        if self.off or len(self.operations) == self._cut_at:
            self.off = True
            raise PowerCut(f"at operation {len(self.operations)}, {what}")
        self.operations.append(f"{what} {' '.join(str(path.relative_to(self._root)) for path in paths)}".strip())

    def create(self, path: Path) -> SharedFile:
        self.unlink(path)
        self._do("create", path)
        file = super().create(path)
        inode = self._inodes[path.stat().st_ino] = _Inode()
        self._name(None, path, inode)
        return file

    def open(self, path: Path) -> SharedFile:
        if self.off:
            raise PowerCut("open")
        return super().open(path)

    def write(self, file: SharedFile, data: bytes, offset: int) -> None:
        self._do(f"write {len(data)} bytes at {offset}")
        super().write(file, data, offset)
        self._inode(file).changes.append(_Change(offset, bytes(data)))

    def truncate(self, file: SharedFile, size: int) -> None:
        self._do(f"truncate to {size} bytes")
        super().truncate(file, size)
        self._inode(file).changes.append(_Change(size))

    def sync_data(self, file: SharedFile) -> None:
        self._do("fdatasync")
        self._inode(file).sync()

    def sync(self, file: SharedFile) -> None:
        self._do("fsync")
        self._inode(file).sync()

    def rename(self, path: Path, target: Path) -> None:
        self._do("rename", path, target)
        super().rename(path, target)
        self._name(path, target, self._names[path])

    def sync_folder(self, folder: Path) -> None:
        self._do("fsync of the folder", folder)
        self._synced_folders.update(path for path in folder.iterdir() if path.is_dir())
        for number, naming in enumerate(self._pending):
            if naming.concerns(folder):
                naming.apply(self._synced_names)
                if naming.old is not None:  # This name was given to it earlier and has been replaced since.
                    self._pending[:number] = [_forget(naming.old, earlier) for earlier in self._pending[:number]]
        self._pending = [naming for naming in self._pending if not naming.concerns(folder)]

    def unlink(self, path: Path) -> None:
        if path in self._names:
            self._do("unlink", path)
            super().unlink(path)
            self._name(path, None, None)
        elif path.exists():
            raise AssertionError(f"{path} was not created through this object")

    def boot(self) -> str:
        return self._boot

    def _name(self, old: Path | None, new: Path | None, inode: _Inode | None) -> None:
        naming = _Naming(old, new, inode)
        naming.apply(self._names)
        self._pending.append(naming)

    def _inode(self, file: SharedFile) -> _Inode:
        return self._inodes[os.fstat(file.fileno()).st_ino]

    # States after the end

    def left_by_kill(self) -> Disk:
        """Return what another process finds after a kill on the running machine."""
        return self._disk({path: inode.content() for path, inode in self._names.items()})

    def left_by_power_cut(self) -> set[Disk]:
        """Yield every state in which the machine may start again.

        Of the name changes that were not synced any subset may have happened. For each file the unsynced bytes may be
        there, or only the size, or a part with a hole, or neither. A new folder may be gone with its content, unless
        its parent was synced.
        """
        if len(self._pending) > _MOST_PENDING:
            raise AssertionError(f"{len(self._pending)} unsynced names are too many to try all states")
        contents = cache(_Inode.contents)
        disks = set()
        for names in self._ways_of_naming():
            for ways in product(*(contents(inode) for inode in names.values())):
                disks.add(self._disk(dict(zip(names, ways, strict=True))))
        return disks

    def _ways_of_naming(self) -> Iterator[_Names]:
        for count in range(len(self._pending) + 1):
            for happened in combinations(self._pending, count):
                names = dict(self._synced_names)
                for naming in happened:
                    naming.apply(names)
                yield names
                yield {path: inode for path, inode in names.items() if self._is_synced(path.parent)}

    def _is_synced(self, folder: Path) -> bool:
        return folder == self._root or (folder in self._synced_folders and self._is_synced(folder.parent))

    def _disk(self, contents: Mapping[Path, bytes]) -> Disk:
        return Disk(frozenset((str(path.relative_to(self._root)), data) for path, data in contents.items()))


def _forget(name: Path, naming: _Naming) -> _Naming:
    return _Naming(naming.old, None, None) if naming.new == name else naming
