"""Pseudo-terminals for commands: what they write, and what a person sees of it."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import termios
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.processes import ROOT, wait_until

_CONTROL = re.compile(r"\x1b\[(?P<count>\d*)(?P<what>[A-Za-z])|(?P<one>[\r\n])|(?P<text>[^\x1b\r\n]+)")


@dataclass
class Terminal:
    """A process on a terminal of this size; what it writes is kept."""

    process: subprocess.Popen[bytes]
    master: int
    width: int
    height: int
    written: bytearray = field(default_factory=bytearray)

    def read(self) -> str:
        """Return all that was written so far."""
        while select.select([self.master], [], [], 0)[0]:
            try:
                piece = os.read(self.master, 65536)
            except OSError:
                # The process has ended.
                break
            if not piece:
                break
            self.written += piece
        # The last character may not have come whole yet.
        return self.written.decode(errors="ignore")

    def screen(self) -> list[str]:
        """Return the lines that a person sees now; fail where the process writes beyond the screen."""
        cells = [[" "] * self.width for _ in range(self.height)]
        row = column = position = 0
        written = self.read()
        while position < len(written):
            found = _CONTROL.match(written, position)
            if found is None:
                # A sequence that has not come whole yet.
                assert len(written) - position < 10, repr(written[position : position + 20])
                break
            position = found.end()
            match found["one"], found["what"]:
                case "\r", _:
                    column = 0
                case "\n", _:
                    row += 1
                    assert row < self.height, "it scrolls"
                case _, "A":
                    row = max(0, row - int(found["count"] or 1))
                case _, "H":
                    row = column = 0
                case _, "K":
                    cells[row][column:] = [" "] * (self.width - column)
                case _, "J":
                    cells[row][column:] = [" "] * (self.width - column)
                    cells[row + 1 :] = [[" "] * self.width for _ in range(self.height - row - 1)]
                case _, None:
                    text = found["text"]
                    assert column + len(text) <= self.width, f"wider than the terminal: {text!r}"
                    cells[row][column : column + len(text)] = text
                    column += len(text)
                case _, other:
                    raise AssertionError(f"unsupported by this terminal: {other!r}")
        return [line for line in ("".join(line).rstrip() for line in cells) if line]

    def wait(self, shows: Callable[[list[str]], object], what: str, timeout: float = 30) -> list[str]:
        """Return the screen as soon as it shows something."""
        wait_until(lambda: shows(self.screen()), timeout, what)
        return self.screen()

    def end(self, timeout: float = 120) -> int:
        """Wait until the process has ended; return its exit status."""
        # It ends when all that it writes is read.
        wait_until(lambda: (self.read(), self.process.poll() is not None)[1], timeout, "the end of the process")
        assert self.process.returncode is not None
        return self.process.returncode

    def interrupt(self) -> int:
        """Type Ctrl-C; return the exit status."""
        os.write(self.master, b"\x03")
        return self.process.wait(15)


@contextmanager
def on_terminal(
    argv: Sequence[str], folder: Path, width: int, height: int, environment: Mapping[str, str] | None = None
) -> Iterator[Terminal]:
    """Run a process on a terminal until the block ends."""
    master, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))
    added = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "LC_ALL": "C.UTF-8", **(environment or {})}
    added = {key: value for key, value in added.items() if key not in ("COLUMNS", "LINES")}
    # In a session of its own on this terminal, so that Ctrl-C is a signal.
    argv = ["setsid", "--ctty", *argv]
    with subprocess.Popen(argv, cwd=folder, env=added, stdin=its, stdout=its, stderr=its) as process:
        os.close(its)
        try:
            yield Terminal(process, master, width, height)
        finally:
            process.kill()
            os.close(master)
