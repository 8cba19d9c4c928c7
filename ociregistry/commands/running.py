"""Runs a command: as the owner of the store, and on the reactor until it ends or is interrupted."""

from __future__ import annotations

import os
import pwd
import signal
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TextIO, TypeVar, cast

from twisted.internet.defer import CancelledError, Deferred
from twisted.logger import globalLogBeginner, textFileLogObserver
from twisted.python.failure import Failure

from ociregistry.commands.options import CommandFailed
from ociregistry.log import LevelFilter, writes
from ociregistry.process import keep_freed_memory, raise_file_descriptor_limit, use_monotonic_clock
from ociregistry.settings import Settings

T = TypeVar("T")


_SERVICE = "ociregistry"
"""The user as which the packaged service runs; its home is the service's store."""


def become_owner(root: Path) -> None:
    """Switch from root to the user that owns the store at `root`, so that new files belong to that user.

    A store that the packaged service has not made yet, as it was never started, is made for its user. Does nothing
    if this process is not root's, or if the store is root's or missing.

    Raises:
        CommandFailed: the user cannot be changed.
        OSError: the folder of the store cannot be made or examined.
    """
    if os.geteuid() != 0:
        return
    _make_for_service(root)
    try:
        status = root.stat()
    except FileNotFoundError:
        return
    if status.st_uid == 0:
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
        raise CommandFailed(
            f"{root}: cannot switch to its owner, the user {status.st_uid}: {error.strerror}"
        ) from None


def _make_for_service(root: Path) -> None:
    """Make the folder of the store, if it is the packaged service's and missing or empty, as systemd does."""
    try:
        user = pwd.getpwnam(_SERVICE)
    except KeyError:
        return
    if Path(user.pw_dir) != root or (root.exists() and any(root.iterdir())):
        return
    root.mkdir(mode=0o750, parents=True, exist_ok=True)
    os.chown(root, user.pw_uid, user.pw_gid)


def handled_signals() -> list[signal.Signals]:
    """Return the signals that end a command, without those that are ignored, as SIGHUP is under nohup."""
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    return [number for number in signals if signal.getsignal(number) is not signal.SIG_IGN]


def run_on_reactor(work: Callable[[Any], Coroutine[Deferred[Any], Any, T]], settings: Settings) -> T:
    """Run `work` on the reactor and return its result; log to stderr, as the settings say.

    Raises:
        CommandFailed: a signal interrupted it.
        Exception: any exception of `work`.
    """
    from twisted.internet import reactor as installed

    reactor: Any = installed
    use_monotonic_clock(reactor)
    # Not sys.stderr: twistd redirects that to its log.
    text = textFileLogObserver(cast(TextIO, sys.__stderr__))
    observer = LevelFilter(settings.log_level).before(writes(text, settings.log_format))
    globalLogBeginner.beginLoggingTo([observer], redirectStandardIO=False, discardBuffer=True)
    raise_file_descriptor_limit()
    keep_freed_memory()
    handled = handled_signals()
    ended: list[T | Failure] = []

    def begin() -> None:
        running = Deferred.fromCoroutine(work(reactor))

        def interrupt(*_: object) -> None:
            # A second signal must not interrupt the clean-up.
            for number in handled:
                signal.signal(number, signal.SIG_IGN)
            reactor.callFromThread(running.cancel)

        for number in handled:
            signal.signal(number, interrupt)
        running.addBoth(ended.append)
        running.addBoth(lambda _: reactor.stop())

    reactor.callWhenRunning(begin)
    reactor.run()
    (result,) = ended
    if not isinstance(result, Failure):
        return result
    if result.check(CancelledError):
        raise CommandFailed("interrupted; what is complete is kept, and the next run continues from there")
    result.raiseException()
    raise AssertionError("a failure that raises nothing")
