"""The process itself: its file descriptors, its clock, and the last line before it exits."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any, NoReturn


def raise_file_descriptor_limit() -> None:
    """Raise the soft limit of file descriptors to the hard limit; the usual 1024 is meant for select()."""
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def most_descriptors() -> int:
    """Return how many file descriptors this process may have once its limit is raised."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[1]


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT = 16 * 1024 * 1024
"""Bytes."""
_LARGEST_KEPT = 4 * 1024 * 1024
"""Bytes."""


def keep_freed_memory() -> None:
    """Let the C library keep some memory that was freed (mallopt(3)).

    Otherwise it returns the memory of each piece of a blob to the kernel, and that of the next one is filled with
    zeros: a fifth of the processor's time of a download.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # Other C libraries than GNU's lack it.
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, _KEPT)
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT)


def descriptors_are_scarce() -> bool:
    """Return whether less than about a quarter of the file descriptors that this process may have is free."""
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        lowest_free = lowest_free_descriptor()
    except OSError:
        return True
    return lowest_free >= most - most // 4


def lowest_free_descriptor() -> int:
    """Return the number that the next file or socket gets that is opened now.

    Raises:
        OSError: this process, or the machine, cannot open another file. Not every library says so when it cannot.
    """
    number = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    os.close(number)
    return number


def use_monotonic_clock(reactor: Any) -> None:
    """Make the reactor use the monotonic clock, so that a change of the system time does not move timers.

    Twisted uses the wall clock: when it is set back, timers are late by the difference.
    """
    reactor.seconds = time.monotonic


def let_interrupts_end_the_process() -> None:
    """Let SIGINT end the process at once, as SIGTERM does, while it starts and nothing has to be cleaned up.

    Python's own handler would raise KeyboardInterrupt in the middle of an import, which prints a traceback. Where
    SIGINT is ignored, as in the background of a shell, it stays so.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def let_reactor_handle_interrupts() -> None:
    """Undo `let_interrupts_end_the_process`: the reactor only replaces Python's own handler by one that stops it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def unusable_store(root: Path, error: OSError) -> str:
    """Return the line that says why a store cannot be used, and where permission is denied, for which user."""
    where = f": {error.filename}" if error.filename not in (None, str(root)) else ""
    user = f", as the user {os.geteuid()}" if isinstance(error, PermissionError) else ""
    return f"cannot use the store {root}: {error.strerror or error}{where}{user}"


def print_error(line: str) -> None:
    """Print a line to stderr, if there is one."""
    # Not sys.stderr: twistd redirects that to its log.
    if sys.__stderr__ is not None:
        print(f"ociregistry: {line}", file=sys.__stderr__)


def exit_with(message: str, status: int) -> NoReturn:
    """Print `message` to stderr and exit with `status`."""
    print_error(message)
    raise SystemExit(status)
