"""The documentation's Markdown builds into a site, its links resolve, and its examples parse."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from contextlib import suppress
from itertools import pairwise, takewhile
from pathlib import Path
from typing import NoReturn

import pytest

from ociregistry.commands.containerd_config import ContainerdConfig
from ociregistry.settings import load_settings
from ociregistry.tap import Options
from tests.documents import PAGES, README, ROOT, Block, blocks

_LANGUAGES = {"sh", "text", "json", "yaml", "toml", "ini", "dockerfile"}
_ITEM = re.compile(r"(- |\d+\. )")
_LINK = re.compile(r"\]\(([^)\s]+)\)")

BLOCKS = [block for page in PAGES for block in blocks(page)]


def of(language: str, *pages: str) -> list[Block]:
    """Return the code blocks in a language, of the given pages or of all."""
    return [block for block in BLOCKS if block.language == language and (not pages or block.page.name in pages)]


def prose(page: Path) -> list[str]:
    """Return the lines of a page with code blocks blanked out."""
    text = page.read_text(encoding="utf-8")
    blank = re.sub(r"^```.*?^```$", lambda found: "\n" * found[0].count("\n"), text, flags=re.MULTILINE | re.DOTALL)
    return blank.splitlines()


def test_code_blocks_have_a_language() -> None:
    assert {block.language for block in BLOCKS} <= _LANGUAGES


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_markdown_is_portable_to_mkdocs(page: Path) -> None:
    """Python-Markdown supports no code block in a list item and no list directly after a paragraph."""
    lines = prose(page)
    wrong = [number for number, line in enumerate(lines, 1) if "```" in line]
    for number, (above, line) in enumerate(pairwise(lines), 2):
        inside = not above or above.startswith(" ") or _ITEM.match(above)
        if _ITEM.match(line) and not inside:
            wrong.append(number)
    assert wrong == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_resolve(page: Path) -> None:
    """MkDocs checks links and headings of the site, which does not include the README."""
    links = _LINK.findall("\n".join(prose(page)))
    files = [link.partition("#")[0] for link in links if not re.match(r"https?://|#", link)]
    assert [file for file in files if not (page.parent / file).is_file()] == []


def test_readme_links_to_every_page() -> None:
    links = {(ROOT / link).resolve() for link in _LINK.findall(README.read_text(encoding="utf-8"))}
    assert [page.name for page in PAGES if page not in {README, *links}] == []


CONFIGURATIONS = [
    one
    for one in of("yaml", "pruning.md", "bad-links.md", "kubernetes.md")
    if not (one.is_of_the_chart or one.is_of_the_cluster)
]


@pytest.mark.parametrize("block", CONFIGURATIONS, ids=str)
def test_configuration_examples_have_an_effect(block: Block, tmp_path: Path) -> None:
    path = tmp_path / "ociregistry.yaml"
    path.write_text(block.text)
    settings = load_settings({}, (), path)
    assert settings.warnings == ()
    path.write_text("")
    assert settings != load_settings({}, (), path)


class CommandAccepted(Exception):
    """The options of a command are sound."""


class ParsedOnly(Options):
    """The options without what they do: files that they name need not exist."""

    def _make_settings(self) -> None:
        pass

    def _run(self, command: object) -> NoReturn:
        raise CommandAccepted


def _documented_words() -> Iterator[tuple[str, list[str]]]:
    """Yield where a page shows the command, and the words behind its name."""
    for block in of("sh"):
        for line in block.text.replace("\\\n", " ").splitlines():
            lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
            lexer.whitespace_split = True
            words = list(lexer)
            for number, word in enumerate(words):
                # The name of a release, of a folder or of an account is another word's argument.
                if word == "ociregistry" and (number == 0 or words[number - 1] in {"|", "--", "&&", "sudo"}):
                    rest = words[number + 1 :]
                    yield str(block), list(takewhile(lambda one: one[0] not in "|&;<>()", rest))


@pytest.mark.parametrize(("where", "words"), list(_documented_words()))
def test_commands_are_accepted(where: str, words: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    """Also those that no test runs."""
    with suppress(CommandAccepted, SystemExit):
        ParsedOnly().parseOptions(words)
    assert capfd.readouterr().err == "", where


def test_containerd_examples_match_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    shown = of("toml")
    assert {block.page.name for block in shown} == {"containerd.md"}
    command = ContainerdConfig()
    command.parseOptions([])
    assert command.run(load_settings({}, (), None)) == 0
    printed = capsys.readouterr().out
    for block in shown:
        assert tomllib.loads(block.text)
        assert block.text in printed, block


def test_json_examples_parse() -> None:
    assert [json.loads(block.text) for block in of("json")]
