"""The options that the daemon and all commands share, and output to the terminal."""

from __future__ import annotations

import errno
import getopt
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn, TextIO, TypeVar

from twisted.python import usage

from ociregistry import __version__
from ociregistry.process import print_error
from ociregistry.settings import OPTIONS, Option, Settings
from ociregistry.store.paths import is_store
from ociregistry.store.scan import unreadable_lines

T = TypeVar("T")

ANOTHER = "(--image-path names another)"
"""What to do where there is no store."""


class CommandFailed(Exception):
    """A command failed; the message is the line to print."""

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(message)
        self.status = status
        """The exit status: 1 for a failure, 2 for invalid input."""


def _help(option: Option) -> str:
    return f"{option.help} [{option.default}]" if option.default else option.help


class CommonOptions(usage.Options):
    """The options that are accepted both before and after the name of a command."""

    optParameters = [
        *([option.name, None, None, _help(option)] for option in OPTIONS if not option.is_flag),
        ["config-path", None, None, "YAML file with upstreams and options."],
    ]
    optFlags = [
        *([option.name, None, option.help] for option in OPTIONS if option.is_flag),
        ["no-complete-images", None, "Fetch only the layers that clients request."],
    ]

    def __init__(self) -> None:
        super().__init__()
        self.listen: list[str] = []

    def parseArgs(self, *words: str) -> None:
        """Refuse words that are no options; commands that take them override this.

        Raises:
            usage.UsageError: there are some.
        """
        if words:
            raise usage.UsageError(f"{' '.join(map(repr, words))}: only options are expected here")

    def opt_listen(self, endpoint: str) -> None:
        """Endpoint to listen on in place of --port, such as tcp:8080:interface=127.0.0.1. Repeatable."""
        self.listen.append(endpoint)

    def opt_help(self) -> NoReturn:
        """Print this help and exit."""
        # Not at the top: a start without --help does not wait for what only help needs.
        from ociregistry.commands.help import help_text

        command = self.parent.subCommand if isinstance(self.parent, CommonOptions) else None
        common = {name.removesuffix("=") for name in CommonOptions().longOpt}
        _print_and_exit(help_text(self, command or "", common))

    opt_h = opt_help

    def opt_version(self) -> NoReturn:
        """Print the version and exit."""
        _print_and_exit(f"ociregistry {__version__}")


def _print_and_exit(text: str) -> NoReturn:
    try:
        print_lines([text])
    except CommandFailed as error:
        print_error(str(error))
        raise SystemExit(error.status) from None
    raise SystemExit(0)


class Command(CommonOptions):
    """A command with its options; invalid options raise `usage.UsageError` while they are parsed."""

    examples: Sequence[str] = ()
    """Command lines for --help, without the name of the program."""

    def parseOptions(self, options: Sequence[str] | None = None) -> None:
        """Parse the options, also those after arguments.

        Raises:
            usage.UsageError: an option is unknown or lacks its value.
        """
        try:
            given, arguments = getopt.gnu_getopt(list(options or ()), self.shortOpt, self.longOpt)
        except getopt.error as error:
            raise usage.UsageError(str(error)) from None
        flags = {f"--{name}" for name in self.longOpt if not name.endswith("=")}
        flags |= {f"-{letter}" for letter in re.findall("[a-z](?!:)", self.shortOpt)}
        words = [word for name, value in given for word in ((name,) if name in flags else (name, value))]
        super().parseOptions([*words, "--", *arguments])

    def run(self, settings: Settings) -> int:
        """Run the command.

        Returns:
            The exit status: 0, or 1 if a part failed.

        Raises:
            CommandFailed: the command cannot be carried out.
            OSError: the store cannot be used.
        """
        raise NotImplementedError

    def is_given(self, *names: str) -> bool:
        """Tell whether one of these options is on the command line, before the name of the command or after it."""
        both = [self] if self.parent is None else [self, self.parent]
        return any(options[name] not in (None, 0) for options in both for name in names)

    def value(self, name: str, parse: Callable[[str], T]) -> T | None:
        """Parse the value of the option `name`; return None if it is not given.

        Raises:
            usage.UsageError: `parse` refuses the value.
        """
        text = self[name]
        if text is None:
            return None
        try:
            return parse(text)
        except ValueError as error:
            raise usage.UsageError(f"--{name} {text!r}: {error}") from None


def check_store(root: Path) -> None:
    """Check that there is a store at `root`: only `load` and the daemon make one.

    Raises:
        FileNotFoundError: there is none; its `strerror` says how to name another folder.
        OSError: the folder cannot be examined.
    """
    why = "there is none in this folder"
    try:
        if is_store(root):
            return
    except FileNotFoundError as error:
        why = str(error.strerror)
    raise FileNotFoundError(errno.ENOENT, f"{why} {ANOTHER}", str(root))


def print_unreadable(files: Mapping[Path, str]) -> None:
    """Print warnings about the `files` among the records that could not be read, with the reasons."""
    for line in unreadable_lines(files):
        print_error(f"warning: {line}")


def standard_output() -> TextIO:
    """Return stdout.

    Raises:
        CommandFailed: it is closed.
    """
    if sys.stdout is None:
        raise CommandFailed("cannot print: the standard output is closed")
    return sys.stdout


def print_lines(lines: Iterable[str]) -> None:
    """Print to stdout; escape characters that its encoding lacks.

    Raises:
        CommandFailed: stdout is closed or cannot be written.
        SystemExit: the reader closed the pipe.
    """
    stdout = standard_output()
    try:
        for line in lines:
            stdout.buffer.write(f"{line}\n".encode(stdout.encoding, "backslashreplace"))
        stdout.flush()
    except OSError as error:
        # Without this, Python flushes again when the process ends, and prints a second error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stdout.fileno())
        if isinstance(error, BrokenPipeError):
            raise SystemExit(1) from None
        raise CommandFailed(f"cannot print: {error.strerror}") from None
