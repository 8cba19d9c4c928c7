"""The process itself: its file descriptors, its clock, and the last line before it exits."""

from __future__ import annotations

import resource
import sys
import time
from typing import Any, NoReturn


def take_all_file_descriptors() -> None:
    """Raise the soft limit of file descriptors to the hard limit; the usual 1024 is meant for select()."""
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def count_steadily(reactor: Any) -> None:
    """Make the reactor use the monotonic clock, so that a change of the system time does not move timers.

    Twisted uses the wall clock: when it is set back, timers are late by the difference.
    """
    reactor.seconds = time.monotonic


def complain(line: str) -> None:
    """Print a line to stderr, if there is one."""
    # Not sys.stderr: twistd redirects that to its log.
    if sys.__stderr__ is not None:
        print(f"ociregistry: {line}", file=sys.__stderr__)


def exit_with(message: str, status: int) -> NoReturn:
    """Print `message` to stderr and exit with `status`."""
    complain(message)
    raise SystemExit(status)
