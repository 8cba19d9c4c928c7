"""Help on the command line: the options as data, the text of --help, and what a mistyped word may have meant."""

from __future__ import annotations

import inspect
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from twisted.python import usage

from ociregistry.config import values

_WIDEST = 100
"""Columns."""
_INDENT = 26
"""Columns before the text of an option."""


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


def options_of(options: usage.Options) -> tuple[Option, ...]:
    """Return the options of a parser, sorted."""
    return tuple(_option(options, name) for name in sorted(options.longOpt))


def _option(options: usage.Options, spelled: str) -> Option:
    name = spelled.removesuffix("=")
    doc = options.docs[name]
    text = flowing(doc if isinstance(doc, str) else inspect.getdoc(doc) or "")
    # Our own tables write the default into the text, Twisted's keep it separately.
    written = re.fullmatch(r"(.*) \[(.*)\]\.?", text)
    text, default = (f"{written[1].removesuffix('.')}.", written[2]) if written else (text, _default(options, name))
    letters = [other for other, long in options.synonyms.items() if long == name and len(other) == 1]
    return Option(name, spelled.endswith("="), text, default, *letters)


def _default(options: usage.Options, name: str) -> str:
    value = options.defaults.get(name)
    return str(value) if value else ""


def flowing(text: str) -> str:
    """Join the text into one line; of a method's docstring only the first paragraph counts."""
    return " ".join(inspect.cleandoc(text).partition("\n\n")[0].split())


def program() -> str:
    """Return what is typed before the options: `ociregistry`, or `twistd ociregistry` under twistd."""
    name = os.path.basename(sys.argv[0])
    return f"{name} ociregistry" if name.startswith("twistd") else "ociregistry"


def help_text(options: usage.Options, command: str, common: Collection[str]) -> str:
    """Return the text of --help: usage, description, the parser's own options, the `common` ones, examples.

    `command` is the name of the command that `options` belong to; empty for the whole command line.
    """
    typed = f"{program()} {command}" if command else program()
    everything = options_of(options)
    shared = [option for option in everything if option.name in common]
    own = [option for option in everything if option.name not in common]
    commands: Sequence[Any] = getattr(options, "subCommands", ())
    parts = [f"Usage: {typed} {getattr(options, 'synopsis', '[options]')}"]
    described: str | None = getattr(options, "longdesc", None)
    parts += [_filled(described)] if described else []
    if commands:
        lines = (_entry(name, f"{about[:1].upper()}{about[1:]}.") for name, _, _, about in commands)
        parts += [_section("Commands (COMMAND --help describes one)", lines)]
        parts += [_section("Options, before or after a command", map(_described, shared))]
        parts += [_section("Options in place of a command, as the Go server has them", map(_described, own))]
    elif own:
        parts += [_section("Options", map(_described, own))]
        parts += [_section("Options of all commands", map(_described, shared))]
    else:
        parts += [_section("Options", map(_described, shared))]
    examples: Sequence[str] = getattr(options, "examples", ())
    parts += [_section("Examples", (f"  {program()} {example}" for example in examples))] if examples else []
    return "\n\n".join(parts)


def _section(title: str, lines: Iterable[str]) -> str:
    return "\n".join([f"{title}:", *lines])


def _described(option: Option) -> str:
    long, *short = option.spellings
    spelled = ", ".join([*short, long])
    text = f"{option.help} [{option.default}]" if option.default else option.help
    return _entry(f"{spelled}=" if option.takes_value else spelled, text)


def _entry(name: str, text: str) -> str:
    lines = textwrap.wrap(text, _columns() - _INDENT) or [""]
    first = f"  {name}".ljust(_INDENT)
    if len(first) > _INDENT:
        return "\n".join([first, *(" " * _INDENT + line for line in lines)])
    return "\n".join([first + lines[0], *(" " * _INDENT + line for line in lines[1:])])


def _filled(text: str) -> str:
    return textwrap.fill(text, _columns())


def _columns() -> int:
    return max(2 * _INDENT, min(_WIDEST, shutil.get_terminal_size().columns))


def did_you_mean(error: str, options: usage.Options) -> str:
    """Return the near command or option where `error` is about an unknown one; the empty string if there is none."""
    unknown = re.match(r"option (--[^\s=]+) not recognized|Unknown command: (\S+)", error)
    if unknown is None:
        return ""
    option, command = unknown.groups()
    parser: Any = getattr(options, "subOptions", options)
    commands: Sequence[Any] = getattr(options, "subCommands", ())
    known = [f"--{name.removesuffix('=')}" for name in parser.longOpt] if option else [name for name, *_ in commands]
    return values.did_you_mean(option or command, known)
