"""Make manual pages: of the command line from its options, of the configuration file from the file itself."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from ociregistry.commands.help import Option
from tools.commandline import Command


def options_text(options: Iterable[Option]) -> str:
    """Format a list of options in roff."""
    return "".join(_option(option) for option in options)


def commands_text(commands: Iterable[Command]) -> str:
    """Format a list of commands in roff, each with the options that only it takes."""
    return "".join(_command(command) for command in commands)


def settings_text(example: str) -> str:
    """Format the fully commented-out configuration file in roff: each key, or keys that share a text.

    A comment has a space after its #; a line of YAML has none, or more than one.
    """
    sections = []
    for paragraph in example.split("\n\n")[1:]:
        comments = [line[2:] for line in paragraph.splitlines() if _is_comment(line)]
        code = [line[1:] for line in paragraph.splitlines() if not _is_comment(line)]
        if code:
            keys = ", ".join(line.partition(":")[0] for line in code if not line.startswith(" "))
            sections.append(f".TP\n.B {_escaped(keys)}\n{_flowing(comments)}{_literal(code)}")
        else:
            sections.append(f".PP\n{_flowing(comments)}")
    return "".join(sections)


def introduction(example: str) -> str:
    """Format the first comment of the configuration file in roff."""
    lines = [line[2:] for line in example.partition("\n\n")[0].splitlines()]
    return ".PP\n".join(_flowing(paragraph.split("\n")) for paragraph in "\n".join(lines).split("\n\n"))


def filled(template: str, parts: Mapping[str, str]) -> str:
    """Replace each @NAME@ in the template, with its newline where the part ends with one."""
    for name, text in parts.items():
        template = template.replace(f"@{name}@\n", text if text.endswith("\n") else f"{text}\n")
        template = template.replace(f"@{name}@", text)
    return template


def _option(option: Option) -> str:
    value = " \\fIvalue\\fR" if option.takes_value else ""
    default = f" Default: {_escaped(option.default)}." if option.default else ""
    spelled = ", ".join(f"\\fB{_escaped(spelling)}\\fR" for spelling in reversed(option.spellings))
    return f".TP\n{spelled}{value}\n{_line(option.help)}{default}\n"


def _command(command: Command) -> str:
    head = f".TP\n\\fB{_escaped(command.name)}\\fR {_escaped(command.synopsis)}\n"
    text = _line(command.description or f"{command.help[:1].upper()}{command.help[1:]}.") + "\n"
    options = f".RS\n{options_text(command.options)}.RE\n" if command.options else ""
    return f"{head}{text}{options}"


def _is_comment(line: str) -> bool:
    return re.match("# [^ ]", line) is not None


def _flowing(lines: Sequence[str]) -> str:
    return f"{_line(' '.join(lines))}\n" if lines else ""


def _literal(lines: Sequence[str]) -> str:
    body = "".join(f"{_line(line)}\n" for line in lines)
    return f".IP\n.EX\n{body}.EE\n"


def _line(text: str) -> str:
    """Protect a line of text that roff would take for a request."""
    text = _escaped(text)
    return f"\\&{text}" if text.startswith((".", "'")) else text


def _escaped(text: str) -> str:
    return text.replace("\\", "\\e").replace("-", "\\-")
