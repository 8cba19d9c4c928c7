"""Write docs/configuration.md from the tables of the program: `python -m tools.reference`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from ociregistry.commands.help import Option
from ociregistry.settings import OPTIONS
from tools.commandline import Command, commands, common, former

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "configuration.md"
EXAMPLE = ROOT / "etc" / "ociregistry.yaml"

_HEAD = """# Configuration

The command line takes precedence over the file that `--config-path` names, and the file over the defaults. The file
is YAML: the names of options as keys, with `_` for `-`, and the sections below; or only the list of `registries`.
Paths in the file are relative to the file. An unknown key, or a value of the wrong type, is an error that names file,
line and key.

(`python -m tools.reference` generates this page from the tables of the program.)

## Options

Options are accepted before and after a command.

"""
_FORMER = """
## Other spellings

The Go server of the same name has options in place of some commands; they are accepted too.

"""
_SECTIONS = """
## Sections of the file

[Upstreams](upstreams.md) explains `registries`, [Bad links](bad-links.md) `bandwidth`, [Listing, pruning,
verifying](pruning.md) `prune` and `verify`. This file comes with the program; it shows each key with its default,
or with an example where there is no default:

"""


def page() -> str:
    """Return the text of the page."""
    keys = {"listen": "listen", **{option.name: option.key for option in OPTIONS}}
    parts = [_HEAD, *_table(common(), keys), "\n## Commands\n"]
    for command in commands():
        parts += _command(command)
    parts += [_FORMER, *_table(former(), {})]
    code = "".join(f"    {line}".rstrip() + "\n" for line in EXAMPLE.read_text(encoding="utf-8").splitlines())
    return "".join([*parts, _SECTIONS, code])


def _command(command: Command) -> Iterator[str]:
    yield f"\n### {command.name}\n\n{command.description or command.help}\n"
    if command.options:
        yield "\n"
        yield from _table(command.options, {})


def _table(options: Iterable[Option], keys: dict[str, str]) -> Iterator[str]:
    yield "| option | key in the file | default | meaning |\n" if keys else "| option | default | meaning |\n"
    yield "|---|---|---|---|\n" if keys else "|---|---|---|\n"
    for option in options:
        value = " VALUE" if option.takes_value else ""
        spelled = ", ".join(f"`{spelling}{value}`" for spelling in option.spellings)
        key = keys.get(option.name)
        cells = [spelled, *([f"`{key}`" if key else ""] if keys else [])]
        cells += [f"`{option.default}`" if option.default else "", _escaped(option.help)]
        yield f"| {' | '.join(cells)} |\n"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
