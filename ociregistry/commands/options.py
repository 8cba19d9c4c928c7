"""What the command line of the daemon and of every command has in common."""

from __future__ import annotations

import getopt
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import NoReturn, TypeVar

from twisted.python import usage

from ociregistry import __version__
from ociregistry.settings import OPTIONS, Option, Settings

T = TypeVar("T")


class CommandFailed(Exception):
    """A command could not do what it was told; the message is the one line that says why."""

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(message)
        self.status = status
        """The exit status: 1 when something failed, 2 when what was asked for cannot be meant."""


def _help(option: Option) -> str:
    return f"{option.help} [{option.default}]" if option.default else option.help


class CommonOptions(usage.Options):
    """Options that are taken before and after the name of a command."""

    optParameters = [
        *([option.name, None, None, _help(option)] for option in OPTIONS if not option.is_flag),
        ["config-path", None, None, "YAML file with upstreams and options."],
    ]
    optFlags = [
        *([option.name, None, option.help] for option in OPTIONS if option.is_flag),
        ["no-complete-images", None, "Leave it to clients which layers are fetched."],
    ]

    def __init__(self) -> None:
        super().__init__()
        self.listen: list[str] = []

    def opt_listen(self, endpoint: str) -> None:
        """Endpoint to listen on in place of --port, such as tcp:8080:interface=127.0.0.1. Repeatable."""
        self.listen.append(endpoint)

    def opt_version(self) -> NoReturn:
        """Print the version and exit."""
        try:
            print_lines([f"ociregistry {__version__}"])
        except CommandFailed as error:
            complain(str(error))
            raise SystemExit(error.status) from None
        raise SystemExit(0)


class Command(CommonOptions):
    """The options of a command; those that are wrong are a `usage.UsageError` while they are parsed."""

    def parseOptions(self, options: Sequence[str] | None = None) -> None:
        """Also takes options that stand behind arguments."""
        try:
            given, arguments = getopt.gnu_getopt(list(options or ()), self.shortOpt, self.longOpt)
        except getopt.error as error:
            raise usage.UsageError(str(error)) from None
        flags = {f"--{name}" for name in self.longOpt if not name.endswith("=")}
        words = [word for name, value in given for word in ((name,) if name in flags else (name, value))]
        super().parseOptions([*words, "--", *arguments])

    def run(self, settings: Settings) -> int:
        """Does it; gives the exit status: 0, or 1 when something failed. Raises `CommandFailed`, and `OSError` of
        the store."""
        raise NotImplementedError

    def value(self, name: str, parse: Callable[[str], T]) -> T | None:
        """What the option `name` says, or None if it is not given; raises `usage.UsageError`."""
        text = self[name]
        if text is None:
            return None
        try:
            return parse(text)
        except ValueError as error:
            raise usage.UsageError(f"--{name} {text!r}: {error}") from None


def print_lines(lines: Iterable[str]) -> None:
    """Prints to stdout, whatever its encoding; raises `CommandFailed` when nobody takes it."""
    if sys.stdout is None:
        raise CommandFailed("cannot print: the standard output is closed")
    try:
        for line in lines:
            sys.stdout.buffer.write(f"{line}\n".encode(sys.stdout.encoding, "backslashreplace"))
        sys.stdout.flush()
    except OSError as error:
        # Python would try again at the end of the process, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            raise SystemExit(1) from None
        raise CommandFailed(f"cannot print: {error.strerror}") from None


def complain(line: str) -> None:
    """Prints to stderr."""
    # twistd makes a log of sys.stderr.
    if sys.__stderr__ is not None:
        print(f"ociregistry: {line}", file=sys.__stderr__)
