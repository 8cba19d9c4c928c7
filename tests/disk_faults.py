"""Failing disks: small file systems, and system calls that strace makes fail or hang."""

from __future__ import annotations

import mmap
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from signal import SIGCONT, SIGSTOP

import pytest

from tests.images import MIB
from tests.processes import run, wait_until

BLOCK = 4096
"""Bytes of a block of `Ext4`."""

_MAP_LOCKED = 0x2000
"""Of mmap(2), on x86, ARM and RISC-V; the module lacks it."""
_PATIENCE = 30
_LET_GO = 5
_UNFINISHED = " <unfinished ...>"
_PACKAGES = {
    "mount": "mount",
    "umount": "mount",
    "strace": "strace",
    "mkfs.ext4": "e2fsprogs",
    "bindfs": "bindfs",
    "fusermount3": "fuse3",
}


def need(*programs: str) -> None:
    """Fail where a program is missing, or without root: a skipped test would prove nothing."""
    missing = sorted({_PACKAGES[program] for program in programs if not shutil.which(program)})
    if missing:
        pytest.fail(f"a program is missing: apt-get install {' '.join(missing)}", pytrace=False)
    if os.geteuid() != 0:
        pytest.fail(f"{' and '.join(programs)} need root here", pytrace=False)


class SmallDisk:
    """A file system in memory, mounted at `path`, with room for `size` bytes."""

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        path.mkdir()
        run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)])

    def resize(self, size: int) -> None:
        """Set the total size in bytes, including what is used."""
        run(["mount", "-o", f"remount,size={size}", str(self.path)])

    @property
    def free(self) -> int:
        """Free bytes."""
        return shutil.disk_usage(self.path).free

    def close(self) -> None:
        """Unmount and discard the file system."""
        run(["umount", str(self.path)])


@contextmanager
def small_disk(path: Path, size: int) -> Iterator[SmallDisk]:
    """Mount a disk of `size` bytes at `path` until the block ends."""
    need("mount", "umount")
    disk = SmallDisk(path, size)
    try:
        yield disk
    finally:
        disk.close()


@dataclass(frozen=True)
class Ext4:
    """An ext4 file system, mounted at `path`, with filler files to use it up."""

    path: Path

    def fill_blocks(self) -> None:
        """Use up every free block."""
        # A running daemon may free a block meanwhile.
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
        """Use up every free inode."""
        os.sync()
        folder = self.path / "fillers"
        folder.mkdir(exist_ok=True)
        with suppress(OSError):
            for number in range(100_000):
                (folder / str(number)).touch()
        assert os.statvfs(self.path).f_ffree == 0

    def make_room(self) -> None:
        """Remove the filler files."""
        for path in (*self.path.glob("filler-*"), *self.path.glob("fillers/*")):
            path.unlink()

    @property
    def free_blocks(self) -> int:
        """Free blocks, after pending removals were written to the disk."""
        os.sync()
        return os.statvfs(self.path).f_bavail

    @property
    def free_inodes(self) -> int:
        """Free inodes, after pending removals were written to the disk."""
        os.sync()
        return os.statvfs(self.path).f_ffree


@contextmanager
def ext4_disk(path: Path, size: int, inodes: int, image: Path | None = None) -> Iterator[Ext4]:
    """Mount an ext4 of `size` bytes with at least `inodes` inodes at `path` until the block ends.

    It is in the file `image`, by default one beside `path`.
    """
    need("mount", "umount", "mkfs.ext4")
    image = image or path.with_suffix(".img")
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
class Fuse:
    """A folder that is passed through by a process, mounted at `path`."""

    path: Path
    pid: int

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Stop the process in the block: no call that needs it returns, as with a server or disk that is gone."""
        os.kill(self.pid, SIGSTOP)
        try:
            yield
        finally:
            os.kill(self.pid, SIGCONT)


@contextmanager
def fuse_disk(path: Path, *options: str) -> Iterator[Fuse]:
    """Mount an empty folder by FUSE at `path`, with these options of bindfs, until the block ends."""
    need("mount", "umount", "bindfs", "fusermount3")
    if not Path("/dev/fuse").exists():
        pytest.fail("this kernel has no FUSE", pytrace=False)
    source = path.with_name(f"{path.name}-behind")
    source.mkdir()
    path.mkdir()
    with subprocess.Popen(["bindfs", "-f", *options, str(source), str(path)], stdin=subprocess.DEVNULL) as process:
        disk = Fuse(path, process.pid)
        try:
            wait_until(lambda: path.is_mount() or process.poll() is not None, _PATIENCE, "it is mounted")
            yield disk
        finally:
            # The mount namespace of another test may keep a copy of this mount, or of a file system whose disk is a
            # file on it, for as long as that lives; without the process both are dead.
            run(["umount", "--lazy", str(path)], check=False)
            process.kill()


@contextmanager
def hanging_ext4(path: Path, size: int) -> Iterator[Fuse]:
    """Mount an ext4 of `size` bytes at `path` until the block ends; its disk is `image` on the FUSE that is yielded.

    While that is stopped, the disk hangs, but what the kernel has in memory can be read: of the files on the ext4,
    and of `image`.
    """
    with fuse_disk(path.with_name(f"{path.name}-disk")) as disk, ext4_disk(path, size, 10_000, disk.path / "image"):
        yield disk


def drop(path: Path) -> None:
    """Drop a file from memory."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextmanager
def kept_in_memory(path: Path) -> Iterator[None]:
    """Have the kernel keep all bytes of a file in memory until the block ends.

    A machine that gives unused memory away may drop pages that are read all the time, where their neighbours are not.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, mmap.MAP_SHARED | _MAP_LOCKED, mmap.PROT_READ):
        yield


@dataclass(frozen=True)
class Trace:
    """The traced system calls of a process."""

    path: Path

    @property
    def text(self) -> str:
        """The output of strace so far."""
        return self.path.read_text()

    @property
    def calls(self) -> list[str]:
        """The calls that have ended, each in one line, without the thread."""
        return [call for _, call in self._ended()]

    def calls_of(self, thread: int) -> list[str]:
        """Return the calls of one thread, by the kernel's number: that of the process, for its first thread."""
        return [call for number, call in self._ended() if number == thread]

    def _ended(self) -> Iterator[tuple[int, str]]:
        begun: dict[str, str] = {}
        for line in self.text.splitlines():
            thread, _, call = line.partition(" ")
            if call.endswith(_UNFINISHED):
                begun[thread] = call.removesuffix(_UNFINISHED)
            else:
                _, resumed, rest = call.partition(" resumed>")
                yield int(thread), (begun.pop(thread) + rest if resumed else call).strip()

    @property
    def injected(self) -> int:
        """How many calls were made to fail so far."""
        return self.text.count("(INJECTED)")

    @property
    def begun(self) -> int:
        """How many calls were begun so far; the last can still be running."""
        return sum("resumed>" not in line and "(" in line for line in self.text.splitlines())

    @property
    def ended(self) -> int:
        """How many of the delayed calls have ended."""
        return self.text.count("(DELAYED)")

    def wait_injected(self) -> None:
        """Return when a call was made to fail."""
        wait_until(lambda: self.injected, _PATIENCE, "a system call fails")


@contextmanager
def faults(pid: int, calls: str, fault: str, log: Path, *options: str, seen: str = "") -> Iterator[Trace]:
    """Inject `fault` into the system calls `calls` of the process `pid` until the block ends.

    Both are spelled as strace spells them: `fsync` and `error=EIO`. Traced are these calls and those in `seen`.
    """
    with traced(pid, f"{calls}{seen and ','}{seen}", log, "-e", f"inject={calls}:{fault}", *options) as trace:
        yield trace


@contextmanager
def traced(pid: int, calls: str, log: Path, *options: str) -> Iterator[Trace]:
    """Trace the system calls `calls` of the process `pid` until the block ends."""
    need("strace")
    told = log.with_suffix(".stderr")
    argv = ["strace", "-f", "-y", "-p", str(pid), "-o", str(log), "-e", f"trace={calls}", *options]
    with told.open("wb") as stderr, subprocess.Popen(argv, stdin=subprocess.DEVNULL, stderr=stderr) as strace:
        try:
            wait_until(
                lambda: strace.poll() is not None or b" attached" in told.read_bytes(), _PATIENCE, "strace attaches"
            )
            if strace.poll() is not None:
                raise RuntimeError(f"{argv} ended with {strace.returncode}:\n{told.read_text()}")
            yield Trace(log)
        finally:
            # strace detaches, and the process continues.
            strace.terminate()
            try:
                strace.wait(_LET_GO)
            except subprocess.TimeoutExpired:
                # It holds on to a delayed call of a process that has ended.
                strace.kill()
