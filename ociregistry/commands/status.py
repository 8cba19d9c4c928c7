"""`status`: prints what the daemon on the store does, or without a daemon, what the files of the store say."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from datetime import UTC, datetime
from typing import TypedDict

from ociregistry.admin.terminal import lines, sentence
from ociregistry.commands.facts import STOPPED, Document, Facts, Silent
from ociregistry.commands.options import Command, CommandFailed, print_lines, print_unreadable, standard_output
from ociregistry.process import print_error
from ociregistry.settings import Settings

_EXIT = {"ok": 0, "degraded": 1, "stopped": STOPPED}
_EVERY = 2.0
"""Seconds from one look to the next."""
_REST = 5
"""The pause between two readings of the files, where no daemon runs, as a multiple of the time of the last one."""
_HOME, _TO_END_OF_LINE, _TO_END_OF_SCREEN = "\x1b[H", "\x1b[K", "\x1b[J"


class Status(Command):
    """The options of `status`."""

    examples = ("status", "status --watch")
    longdesc = (
        "Prints whether the daemon on the store is well, its links and downloads, what is missing, the disk and the "
        "last errors. Exit status 1 if it is degraded, 2 if no daemon runs; then, what the files of the store say."
    )
    optFlags = [
        ["json", None, "Print all facts as JSON, as the daemon has them at /status."],
        ["watch", None, "Print them again every two seconds, until Ctrl-C."],
    ]

    def run(self, settings: Settings) -> int:
        """Print the status.

        Returns:
            Exit status 0 if the daemon is well, 1 if it is degraded, 2 if none runs.

        Raises:
            CommandFailed: the daemon does not answer, or cannot be asked.
            OSError: the store cannot be read.
        """
        facts = Facts(settings.image_path)
        if self["watch"]:
            return self._watch(facts)
        document = facts.read()
        print_lines(self._shown(document))
        print_unreadable(facts.unreadable)
        return _EXIT.get(document["status"], 1)

    def _watch(self, facts: Facts) -> int:
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            while True:
                time.sleep(self._look(facts))
        except KeyboardInterrupt:
            return 0

    def _look(self, facts: Facts) -> float:
        """Print the facts of now; return the seconds until the next look."""
        began = time.monotonic()
        try:
            document = facts.read()
        except Silent as silent:
            if self["json"]:
                print_error(str(silent))
            else:
                self._print(sentence(str(silent), **_terminal()))
            return _EVERY
        self._print(self._shown(document))
        took = time.monotonic() - began if document["status"] == "stopped" else 0.0
        return max(_EVERY, _REST * took)

    def _shown(self, document: Document) -> list[str]:
        if self["json"]:
            return [json.dumps(document, indent=None if self["watch"] else 2)]
        try:
            return lines(document, datetime.now(UTC), **_terminal())
        except (LookupError, TypeError, ValueError, AttributeError):
            version = document.get("version")
            raise CommandFailed(
                f"the daemon tells another status than this version, {version!r}: restart it"
            ) from None

    def _print(self, shown: list[str]) -> None:
        """Print a look: on a screen over the one before."""
        if self["json"] or not _is_screen():
            print_lines(shown if self["json"] else [*shown, ""])
            return
        height = shutil.get_terminal_size().lines - 1
        if len(shown) > height:
            shown = [*shown[: height - 1], f"and {len(shown) - height + 1} more lines"]
        print_lines([_HOME + "\n".join(f"{line}{_TO_END_OF_LINE}" for line in shown) + _TO_END_OF_SCREEN])


def _is_screen() -> bool:
    """Return whether the cursor can be moved on the standard output."""
    return standard_output().isatty() and os.environ.get("TERM", "dumb") != "dumb"


class _Terminal(TypedDict):
    width: int
    unicode: bool


def _terminal() -> _Terminal:
    """Return what the standard output can show; where it is no terminal, lines have 80 columns."""
    encoding = standard_output().encoding.lower().replace("-", "")
    return {"width": shutil.get_terminal_size().columns, "unicode": encoding == "utf8"}
