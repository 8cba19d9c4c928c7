"""The command line as data, for manual pages and shell completion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from twisted.python import usage

from ociregistry.commands.help import Option, flowing, options_of
from ociregistry.commands.options import CommonOptions
from ociregistry.settings import LOG_FORMATS, LOG_LEVELS
from ociregistry.tap import Options

VALUES = {"log-level": LOG_LEVELS, "log-format": LOG_FORMATS}
"""Options with a fixed set of values."""


@dataclass(frozen=True)
class Command:
    """A subcommand, and the options that only it takes."""

    name: str
    help: str
    synopsis: str
    """What may follow its name."""
    description: str
    options: tuple[Option, ...]


def common() -> tuple[Option, ...]:
    """Return the options accepted before and after a command, sorted."""
    return options_of(CommonOptions())


def former() -> tuple[Option, ...]:
    """Return the options that are other spellings of commands, sorted; they replace a command."""
    known = {option.name for option in common()}
    return tuple(option for option in options_of(Options()) if option.name not in known)


def commands() -> tuple[Command, ...]:
    """Return all commands, sorted."""
    known = {option.name for option in common()}
    found = []
    table: Sequence[Any] = Options.subCommands
    for name, _shortcut, parser, doc in table:
        options: usage.Options = parser()
        own = tuple(option for option in options_of(options) if option.name not in known)
        synopsis = getattr(options, "synopsis", "[options]")
        found.append(Command(name, doc, synopsis, flowing(getattr(options, "longdesc", "") or ""), own))
    return tuple(sorted(found, key=lambda command: command.name))
