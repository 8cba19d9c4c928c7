"""The command line as data, for manual pages and shell completion."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from twisted.python import usage

from ociregistry.commands.options import CommonOptions
from ociregistry.settings import LOG_LEVELS
from ociregistry.tap import Options

VALUES = {"log-level": LOG_LEVELS}
"""Options with a fixed set of values."""


@dataclass(frozen=True)
class Option:
    """An option, `--name` or `--name VALUE`."""

    name: str
    takes_value: bool
    help: str
    default: str = ""
    letter: str = ""
    """Its short spelling, as in `-o`; empty for none."""

    @property
    def spellings(self) -> tuple[str, ...]:
        """The option as typed."""
        return (f"--{self.name}", f"-{self.letter}") if self.letter else (f"--{self.name}",)


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
        found.append(Command(name, doc, synopsis, _flowing(getattr(options, "longdesc", "") or ""), own))
    return tuple(sorted(found, key=lambda command: command.name))


def options_of(options: usage.Options) -> tuple[Option, ...]:
    """Return the options of a parser, sorted."""
    return tuple(_option(options, name) for name in sorted(options.longOpt))


def _option(options: usage.Options, spelled: str) -> Option:
    name = spelled.removesuffix("=")
    doc = options.docs[name]
    text = _flowing(doc if isinstance(doc, str) else inspect.getdoc(doc) or "")
    # Our own tables write the default into the text, Twisted's keep it separately.
    written = re.fullmatch(r"(.*) \[(.*)\]\.?", text)
    text, default = (f"{written[1].removesuffix('.')}.", written[2]) if written else (text, _default(options, name))
    letters = [other for other, long in options.synonyms.items() if long == name and len(other) == 1]
    return Option(name, spelled.endswith("="), text, default, *letters)


def _default(options: usage.Options, name: str) -> str:
    value = options.defaults.get(name)
    return str(value) if value else ""


def _flowing(text: str) -> str:
    """Join the text into one line; of a method's docstring only the first paragraph counts."""
    return " ".join(inspect.cleandoc(text).partition("\n\n")[0].split())
