"""Disks that fail: ones that are too small, and system calls that fail or hang as strace tells them."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.images import MIB
from tests.processes import run, wait_until

BLOCK = 4096
"""Bytes of a block of `Ext4`."""

_PATIENCE = 30
_PACKAGES = {"mount": "mount", "umount": "mount", "strace": "strace", "mkfs.ext4": "e2fsprogs"}


def need(*programs: str) -> None:
    """Fail where one of these is missing, or where we are not root: a test that did not run shows nothing."""
    missing = sorted({_PACKAGES[program] for program in programs if not shutil.which(program)})
    if missing:
        pytest.fail(f"a program is missing: apt-get install {' '.join(missing)}", pytrace=False)
    if os.geteuid() != 0:
        pytest.fail(f"{' and '.join(programs)} need root here", pytrace=False)


class SmallDisk:
    """A file system in memory, mounted at `path`, that holds so many bytes."""

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        path.mkdir()
        run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)])

    def resize(self, size: int) -> None:
        """Gives it room for so many bytes, what is in it included."""
        run(["mount", "-o", f"remount,size={size}", str(self.path)])

    @property
    def free(self) -> int:
        """Bytes."""
        return shutil.disk_usage(self.path).free

    def close(self) -> None:
        """Unmounts it; what is in it is lost."""
        run(["umount", str(self.path)])


@contextmanager
def small_disk(path: Path, size: int) -> Iterator[SmallDisk]:
    """A disk of `size` bytes at `path`, until the block ends."""
    need("mount", "umount")
    disk = SmallDisk(path, size)
    try:
        yield disk
    finally:
        disk.close()


@dataclass(frozen=True)
class Ext4:
    """A file system as machines have it, mounted at `path`, with files of our own to fill it up."""

    path: Path

    def fill_blocks(self) -> None:
        """Takes every free block."""
        # A daemon that runs may give a block back meanwhile.
        for number in range(10):
            if self.free_blocks == 0:
                break
            for size in (MIB, BLOCK):
                with (self.path / f"filler-{number}-{size}").open("wb", buffering=0) as filler, suppress(OSError):
                    while True:
                        filler.write(bytes(size))
                        os.fsync(filler.fileno())
        assert self.free_blocks == 0
        with pytest.raises(OSError, match="No space left"):
            (self.path / "folder").mkdir()

    def fill_inodes(self) -> None:
        """Takes every free inode."""
        os.sync()
        folder = self.path / "fillers"
        folder.mkdir(exist_ok=True)
        with suppress(OSError):
            for number in range(100_000):
                (folder / str(number)).touch()
        assert os.statvfs(self.path).f_ffree == 0

    def make_room(self) -> None:
        """Gives back what was taken."""
        for path in (*self.path.glob("filler-*"), *self.path.glob("fillers/*")):
            path.unlink()

    @property
    def free_blocks(self) -> int:
        """Blocks that no file has, when what was removed is on disk."""
        os.sync()
        return os.statvfs(self.path).f_bavail

    @property
    def free_inodes(self) -> int:
        """Inodes that no file has, when what was removed is on disk."""
        os.sync()
        return os.statvfs(self.path).f_ffree


@contextmanager
def ext4_disk(path: Path, size: int, inodes: int) -> Iterator[Ext4]:
    """A disk of `size` bytes with so many inodes, or a few more, at `path`, until the block ends."""
    need("mount", "umount", "mkfs.ext4")
    image = path.with_suffix(".img")
    with image.open("wb") as file:
        file.truncate(size)
    run(["mkfs.ext4", "-q", "-m", "0", "-b", str(BLOCK), "-N", str(inodes), str(image)])
    path.mkdir()
    run(["mount", "-o", "loop", str(image), str(path)])
    try:
        yield Ext4(path)
    finally:
        run(["umount", str(path)])


@dataclass(frozen=True)
class Trace:
    """The system calls of a process."""

    path: Path

    @property
    def text(self) -> str:
        """What strace wrote so far."""
        return self.path.read_text()

    @property
    def injected(self) -> int:
        """How many calls were made to fail so far."""
        return self.text.count("(INJECTED)")

    @property
    def begun(self) -> int:
        """How many calls were begun so far, one of which can be under way still."""
        return sum("resumed>" not in line and "(" in line for line in self.text.splitlines())

    @property
    def ended(self) -> int:
        """How many of those that were made to wait have ended."""
        return self.text.count("(DELAYED)")

    def wait_injected(self) -> None:
        """Returns when one was."""
        wait_until(lambda: self.injected, _PATIENCE, "a system call fails")


@contextmanager
def faults(pid: int, calls: str, fault: str, log: Path, *options: str, seen: str = "") -> Iterator[Trace]:
    """Until the block ends the system calls `calls` of the process `pid` have the fault `fault`.

    Both as strace spells them: `fsync` and `error=EIO`. They are traced, and those that are to be `seen` too.
    """
    need("strace")
    told = log.with_suffix(".stderr")
    argv = ["strace", "-f", "-y", "-p", str(pid), "-o", str(log)]
    argv += ["-e", f"trace={calls}{seen and ','}{seen}", "-e", f"inject={calls}:{fault}", *options]
    with told.open("wb") as stderr, subprocess.Popen(argv, stdin=subprocess.DEVNULL, stderr=stderr) as strace:
        try:
            wait_until(
                lambda: strace.poll() is not None or b" attached" in told.read_bytes(), _PATIENCE, "strace attaches"
            )
            if strace.poll() is not None:
                raise RuntimeError(f"{argv} ended with {strace.returncode}:\n{told.read_text()}")
            yield Trace(log)
        finally:
            # It lets go of the process, which goes on.
            strace.terminate()
            strace.wait(_PATIENCE)
