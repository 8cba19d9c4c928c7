"""Runs a command: as the owner of the store, on the reactor until its work is done or interrupted."""

from __future__ import annotations

import os
import pwd
import resource
import signal
import sys
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TextIO, TypeVar, cast

from twisted.internet.defer import CancelledError, Deferred
from twisted.logger import FilteringLogObserver, globalLogBeginner, textFileLogObserver
from twisted.python.failure import Failure

from ociregistry.commands.options import CommandFailed
from ociregistry.log import AtLeast

T = TypeVar("T")


def become_owner(root: Path) -> None:
    """If this process is root's and the store at `root` is another user's, it is that user's from now on.

    Raises `CommandFailed`.
    """
    try:
        status = root.stat()
    except FileNotFoundError:
        return
    if os.geteuid() != 0 or status.st_uid == 0:
        return
    try:
        user = pwd.getpwuid(status.st_uid)
    except KeyError:
        groups, group = [status.st_gid], status.st_gid
    else:
        groups, group = os.getgrouplist(user.pw_name, user.pw_gid), user.pw_gid
    try:
        os.setgroups(groups)
        os.setgid(group)
        os.setuid(status.st_uid)
    except OSError as error:
        raise CommandFailed(f"{root}: cannot become its owner, the user {status.st_uid}: {error.strerror}") from None


def heeded_signals() -> list[signal.Signals]:
    """Those by which somebody ends a command. What is ignored stays so: nohup means it."""
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    return [number for number in signals if signal.getsignal(number) is not signal.SIG_IGN]


def take_all_file_descriptors() -> None:
    """Raises the customary soft limit of 1024, which is for programs that use select()."""
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def count_steadily(reactor: Any) -> None:
    """Make the reactor's time that of the monotonic clock, so that setting the machine's clock moves no timer.

    Twisted counts by the wall clock: when that is put back, timers wait until it has come so far again.
    """
    reactor.seconds = time.monotonic


def run_to_end(work: Callable[[Any], Coroutine[Deferred[Any], Any, T]], log_level: str) -> T:
    """What `work`, which is given the reactor, gives; what is logged from `log_level` on goes to stderr.

    Raises what it raises, and `CommandFailed` when it is interrupted.
    """
    from twisted.internet import reactor as installed

    reactor: Any = installed
    count_steadily(reactor)
    # twistd makes a log of sys.stderr.
    observer = FilteringLogObserver(textFileLogObserver(cast(TextIO, sys.__stderr__)), [AtLeast(log_level)])
    globalLogBeginner.beginLoggingTo([observer], redirectStandardIO=False, discardBuffer=True)
    take_all_file_descriptors()
    heeded = heeded_signals()
    ended: list[T | Failure] = []

    def begin() -> None:
        running = Deferred.fromCoroutine(work(reactor))

        def interrupt(*_: object) -> None:
            # Once: what is tidied up then must come to its end.
            for number in heeded:
                signal.signal(number, signal.SIG_IGN)
            reactor.callFromThread(running.cancel)

        for number in heeded:
            signal.signal(number, interrupt)
        running.addBoth(ended.append)
        running.addBoth(lambda _: reactor.stop())

    reactor.callWhenRunning(begin)
    reactor.run()
    (result,) = ended
    if not isinstance(result, Failure):
        return result
    if result.check(CancelledError):
        raise CommandFailed("interrupted; what is complete stays, and the next run goes on from there")
    result.raiseException()
    raise AssertionError("a failure that raises nothing")
