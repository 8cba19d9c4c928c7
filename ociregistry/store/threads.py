"""The store's threads: for what waits for the disk, which may never answer."""

from __future__ import annotations

import errno
import os
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import get_native_id
from typing import Any, ParamSpec, TypeVar

from twisted.internet.defer import Deferred, DeferredSemaphore, execute, fail, succeed
from twisted.internet.interfaces import IReactorFromThreads, IReactorTime
from twisted.internet.task import LoopingCall
from twisted.internet.threads import deferToThreadPool
from twisted.logger import Logger
from twisted.python.threadpool import ThreadPool

from ociregistry.concurrency import DaemonThreadPool
from ociregistry.store.files import SharedFile, close_descriptor, read_written
from ociregistry.store.pagecache import SLICE, TURN, is_resident, read_resident, send_for_a_turn
from ociregistry.store.sockets import SocketNumber, send_file

_log = Logger(namespace="ociregistry.store")

P = ParamSpec("P")
T = TypeVar("T")

_READERS = 8
"""Reads that run at once, not counting the slow ones."""
_SLOW = 2
"""Seconds after which a read is slow: another one may run beside it."""
_MOST_READERS = 64
"""Reads that run at once, counting the slow ones."""
_MOST_SENDERS = _READERS // 2
"""Threads that send what is in memory, at once; others are left for reads that wait for the disk."""
_WRITERS = 16
"""Writes that run at once."""
_OF_ONE_FILE = 2
"""Reads of one file that run at once, so that a file that hangs takes no more threads."""
READ_WITHIN = 20
"""Seconds after which a read counts as hung: a sleeping disk has started by then, and a client still waits."""
_SLOW_WRITE = 10
"""Seconds after which a write may be what a client waits for."""
WRITTEN_WITHIN = 60
"""Seconds after which a write counts as hung; a slow disk takes long to sync a large file."""
_END_WITHIN = 3.0
"""Seconds that the running jobs get to end when the threads are stopped."""


class Hung(OSError):
    """The read of a file has not returned for a long time."""

    def __init__(self, path: Path) -> None:
        super().__init__(errno.ETIMEDOUT, f"the disk has not answered for {READ_WITHIN} s", str(path))


@dataclass(eq=False)
class _Job:
    """Work that waits for a thread, or runs in one."""

    seconds: int = 0
    """For how long a read has run, or a write has waited and run.

    Seconds in which a read of several files went on are left out. Counted, not measured: that this process or its
    machine was stopped must not look like a disk that hangs.
    """
    hung: bool = False


@dataclass(eq=False, kw_only=True)
class _Read(_Job):
    work: Callable[[], Any]
    path: Path | None = None
    """The file, where a single one is read."""
    discard: Callable[[Any], object] = lambda result: None
    """Called with a result that comes when `result` has fired."""
    leases: tuple[SharedFile, ...] = ()
    result: Deferred[Any] = field(default_factory=Deferred)
    answered: bool = False
    """Whether `result` has fired."""
    in_memory: bool = False
    """Whether it sends what is in memory: it does not count among the reads of its file, which it would hold up."""
    thread: int = 0
    """The kernel's number of the thread that runs it."""
    _turns: str = ""

    def run(self) -> Any:
        """Run it in this thread."""
        self.thread = get_native_id()
        return self.work()

    def goes_on(self) -> bool:
        """Tell whether it reads several files, and its thread has not only waited since the last call."""
        if self.path is not None:
            return False
        before = self._turns
        with suppress(OSError):
            # The third number counts how often it was given a processor (the kernel's sched-stats.rst).
            self._turns = Path(f"/proc/self/task/{self.thread}/schedstat").read_text().split()[2]
        return self._turns != before


class Threads:
    """A thread pool each for reads and writes; a thread each to wait for the store's lock, close files, and compute.

    So a hanging fsync delays no hit, and a held lock delays no blob. Reads of a file that hangs take few threads, and
    fail after `READ_WITHIN` seconds; further ones fail at once, until the first has returned.
    """

    def __init__(self, reactor: IReactorFromThreads, clock: IReactorTime) -> None:
        self._reactor = reactor
        self._reading = DaemonThreadPool(_MOST_READERS, "store-reading")
        self._writing = DaemonThreadPool(_WRITERS, "store-writing")
        self._in_turn = DaemonThreadPool(1, "store-in-turn")
        self._closing = DaemonThreadPool(1, "store-closing")
        self._computing = DaemonThreadPool(1, "store-computing")
        self._waiting: dict[_Read, None] = {}
        """The reads that wait for a thread, in their order."""
        self._reads: dict[_Read, None] = {}
        """The reads that run, in their order."""
        self._writes: dict[_Job, None] = {}
        """The writes that wait or run, in their order."""
        self._turns = DeferredSemaphore(min(len(os.sched_getaffinity(0)), _MOST_SENDERS))
        self._quick = 0
        """The number of reads that run and are not slow."""
        self._of_file: Counter[Path] = Counter()
        """File -> the number of its reads that run."""
        self._logged = False
        """Whether it was logged that the disk does not answer."""
        self._loop = LoopingCall(self._look)
        self._loop.clock = clock

    def start(self) -> None:
        """Start the threads. Call this after the process has daemonized: threads do not survive a fork."""
        for pool in self._pools:
            pool.start()
        self._loop.start(1.0, now=False)

    def stop(self) -> None:
        """End the threads. Blocks until the running jobs have ended, for a few seconds at most.

        What has not returned by then is logged, and ends with the process.
        """
        self._loop.stop()
        for job in list(self._waiting):
            self._drop(job)
        threads = [thread for pool in self._pools for thread in pool.end()]
        until = time.monotonic() + _END_WITHIN
        for thread in threads:
            thread.join(max(0.0, until - time.monotonic()))
        if running := sum(thread.is_alive() for thread in threads):
            _log.error("stopping although the disk does not answer: {why}", why=_counted(running))

    @property
    def _pools(self) -> tuple[DaemonThreadPool, ...]:
        return self._reading, self._writing, self._in_turn, self._closing, self._computing

    @property
    def hung(self) -> str:
        """A sentence about the reads and writes that have not returned for long; empty if there are none."""
        hung = [job for job in (*self._reads, *self._writes) if job.hung]
        paths = sorted({str(job.path) for job in hung if isinstance(job, _Read) and job.path is not None})
        of = f", among them of {paths[0]}" if paths else ""
        return f"the disk does not answer: {_counted(len(hung))}{of}" if hung else ""

    @property
    def writes_slowly(self) -> bool:
        """Whether a write has waited and run for long."""
        return any(job.seconds >= _SLOW_WRITE for job in self._writes)

    def read(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Deferred[T]:
        """Run `function`, which reads folders or several files, in a thread, however long it takes."""
        return self._submit(_Read(work=lambda: function(*args, **kwargs)))

    def read_file(
        self,
        path: Path,
        function: Callable[[], T],
        *,
        discard: Callable[[T], object] = lambda result: None,
        leases: tuple[SharedFile, ...] = (),
    ) -> Deferred[T]:
        """Run `function`, which reads the file at `path`, in a thread.

        `discard` is called with a result that comes too late, or after the Deferred was cancelled. The `leases` on
        what it uses are released when `function` has ended, or when it is not run.

        Raises:
            Hung: through the Deferred: it has not returned for `READ_WITHIN` seconds, or such a read of the same file
                has not returned yet.
        """
        return self._submit(_Read(path=path, work=function, discard=discard, leases=leases))

    def read_at(self, file: SharedFile, path: Path, offset: int, count: int) -> Deferred[bytes]:
        """Read at most `count` of the bytes at `offset` of `file`, which was opened at `path`.

        If the kernel has them in memory the Deferred has fired already; otherwise a thread reads them.

        Raises:
            OSError: they cannot be read; through the Deferred if a thread reads them.
        """
        descriptor = file.fileno()
        if data := read_resident(descriptor, offset, count):
            return succeed(data)
        return self.read_file(path, lambda: read_written(descriptor, count, offset), leases=(file.lease(),))

    def send_at(
        self, file: SharedFile, path: Path, offset: int, count: int, to: int, *, in_thread: bool
    ) -> Deferred[int]:
        """Send at most `count` of the bytes at `offset` of `file`, opened at `path`, to the socket `to`.

        If the kernel has them in memory the Deferred has fired already; with `in_thread`, a thread sends them, at
        most one for each core at a time. Other bytes are sent by one of the threads that may wait for the disk. While
        the disk does not answer, no thread is asked to send what is in memory.

        Threads send to a duplicate of the socket: the connection may be closed meanwhile, and its number be used for
        another one.

        Returns:
            The number of bytes that were sent, 0 if the socket takes none at present.

        Raises:
            EOFError: through the Deferred: the file ends at `offset`.
            OSError: the bytes cannot be read, the connection is lost, or there is no descriptor for the duplicate;
                through the Deferred if a thread sends them.
        """
        first = min(count, SLICE)
        if not is_resident(file.fileno(), offset, first):
            return self._submit(self._sending(file, path, offset, first, SocketNumber.of(to)))
        if in_thread and self._answers:
            return self._turns.run(self._take_turn, file, path, offset, min(count, TURN), SocketNumber.of(to))
        return execute(send_file, to, file.fileno(), offset, first)

    def _take_turn(self, file: SharedFile, path: Path, offset: int, count: int, to: SocketNumber) -> Deferred[int]:
        """Send in a thread at once; send nothing if the disk may be needed by now, so that the caller asks again."""
        if not (self._answers and is_resident(file.fileno(), offset, min(count, SLICE))):
            return succeed(0)
        job = self._sending(file, path, offset, count, to)
        job.in_memory = True
        job.result = Deferred(lambda _: self._cancelled(job))
        # What waits for the disk must not hold up the turns of others.
        self._begin(job)
        return job.result

    def _sending(self, file: SharedFile, path: Path, offset: int, count: int, to: SocketNumber) -> _Read:
        def send() -> int:
            # Not earlier: what waits would hold a second descriptor for each client.
            with to.duplicated() as socket:
                return send_for_a_turn(socket, file.fileno(), offset, count)

        return _Read(path=path, work=send, leases=(file.lease(),))

    @property
    def _answers(self) -> bool:
        """Whether no read of a file is slow."""
        return not any(job.path is not None and job.seconds >= _SLOW for job in self._reads)

    def close(self, descriptor: int) -> None:
        """Close a file in a thread: the space of a removed file is freed then, which takes a second for gigabytes."""
        if self._closing.started:
            self._closing.callInThread(close_descriptor, descriptor)
        else:
            close_descriptor(descriptor)

    def compute(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Deferred[T]:
        """Run `function`, which uses memory alone, in a thread that no disk holds up."""
        return deferToThreadPool(self._reactor, self._computing, function, *args, **kwargs)

    def write(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Deferred[T]:
        """Run `function`, which writes or syncs, in a thread."""
        return self._write(self._writing, lambda: function(*args, **kwargs))

    def write_in_turn(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Deferred[T]:
        """Run `function`, which writes or syncs, in a thread, one job after the other."""
        return self._write(self._in_turn, lambda: function(*args, **kwargs))

    def _write(self, pool: ThreadPool, work: Callable[[], T]) -> Deferred[T]:
        job = _Job()
        self._writes[job] = None
        result: Deferred[T] = Deferred()

        def ended(succeeded: bool, outcome: Any) -> None:
            self._reactor.callFromThread(self._written, job, result, outcome)

        pool.callInThreadWithCallback(ended, work)
        return result

    def _written(self, job: _Job, result: Deferred[Any], outcome: Any) -> None:
        # Not by the Deferred: that fires at once when it is cancelled.
        del self._writes[job]
        result.callback(outcome)

    def _submit(self, job: _Read) -> Deferred[Any]:
        if job.path is not None and (self._exhausted or self._hangs(job.path)):
            self._release(job)
            return fail(Hung(job.path))
        job.result = Deferred(lambda _: self._cancelled(job))
        self._waiting[job] = None
        self._begin_waiting()
        return job.result

    @property
    def _exhausted(self) -> bool:
        """Whether all threads for reading hang."""
        return sum(job.hung for job in self._reads) >= _MOST_READERS

    def _hangs(self, path: Path) -> bool:
        return any(job.hung and job.path == path for job in self._reads)

    def _cancelled(self, job: _Read) -> None:
        job.answered = True
        self._drop(job)

    def _drop(self, job: _Read) -> None:
        """Take a read that has not begun out of the queue."""
        if job in self._waiting:
            del self._waiting[job]
            self._release(job)

    def _begin_waiting(self) -> None:
        while self._quick < _READERS and len(self._reads) < _MOST_READERS:
            ready = (job for job in self._waiting if job.path is None or self._of_file[job.path] < _OF_ONE_FILE)
            job = next(ready, None)
            if job is None:
                return
            del self._waiting[job]
            self._begin(job)

    def _begin(self, job: _Read) -> None:
        self._reads[job] = None
        self._quick += 1
        if job.path is not None and not job.in_memory:
            self._of_file[job.path] += 1

        def ended(succeeded: bool, result: Any) -> None:
            self._reactor.callFromThread(self._end, job, succeeded, result)

        self._reading.callInThreadWithCallback(ended, job.run)

    def _end(self, job: _Read, succeeded: bool, result: Any) -> None:
        del self._reads[job]
        self._release(job)
        self._quick -= job.seconds < _SLOW
        if job.path is not None and not job.in_memory:
            self._of_file[job.path] -= 1
            if not self._of_file[job.path]:
                del self._of_file[job.path]
        self._begin_waiting()
        if not job.answered:
            job.answered = True
            job.result.callback(result)
        elif succeeded:
            job.discard(result)

    def _release(self, job: _Read) -> None:
        for lease in job.leases:
            lease.release(self.close)

    def _look(self) -> None:
        for job in (*self._reads, *self._writes):
            # Asked each second, as it compares with the second before. Many files take long over a network.
            if isinstance(job, _Read) and job.goes_on() and job.seconds > _SLOW:
                continue
            job.seconds += 1
            job.hung = job.seconds >= (READ_WITHIN if isinstance(job, _Read) else WRITTEN_WITHIN)
        for read in list(self._reads):
            if read.seconds == _SLOW:
                self._quick -= 1
            if read.seconds == READ_WITHIN and read.path is not None:
                self._give_up(read.path)
        self._log_change()
        self._begin_waiting()

    def _log_change(self) -> None:
        hung = self.hung
        if hung and not self._logged:
            _log.error("{why}", why=hung)
        elif self._logged and not hung:
            _log.warn("the disk answers again")
        self._logged = bool(hung)

    def _give_up(self, path: Path) -> None:
        """Fail all reads of `path`; where no thread is left, those of all files."""
        for job in [*self._reads, *self._waiting]:
            if job.path is not None and not job.answered and (job.path == path or self._exhausted):
                job.answered = True
                self._drop(job)
                job.result.errback(Hung(job.path))


def _counted(jobs: int) -> str:
    return "1 read or write has not returned" if jobs == 1 else f"{jobs} reads and writes have not returned"
