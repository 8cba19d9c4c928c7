"""Completion in a real zsh; bash's is tested in tests/unit/test_tools.py."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.processes import run
from tools.generate import main

# A zsh in a terminal: $1 is the folder of the completion, $2 what is typed before the tab, once the prompt appears.
_TYPE = r"""
zmodload zsh/zpty
zpty terminal zsh -f -i
zpty -w terminal "fpath=($1 \$fpath); autoload -Uz compinit; compinit -u -D; bindkey '^I' list-choices; print REA''DY"
zpty -r terminal shown '*READY*2004h'
zpty -w -n terminal "$2"$'\t'
zpty -w terminal $'\025'"print LIS''TED"
zpty -r terminal shown '*LISTED*'
print -r -- "$shown"
zpty -d terminal
"""
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of completions from which the package is built."""
    folder = tmp_path_factory.mktemp("generated")
    main(folder)
    return folder


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("ociregistry --max-", {"--max-bandwidth", "--max-connections"}),
        ("ociregistry --log-level ", {"debug", "error", "info", "trace", "warn"}),
        ("ociregistry --air-gapped ch", {"check"}),
        ("ociregistry check --config", {"--config-path"}),
        ("ociregistry prune --d", {"--default-ns", "--dry-run"}),
    ],
)
def test_zsh_completion_offers_matching_words(folder: Path, typed: str, offered: set[str]) -> None:
    shown = run(["zsh", "-f", "-c", _TYPE, "zsh", str(folder), typed]).stdout
    words = set(_CONTROL.sub(" ", shown).split())
    assert offered <= words, shown
    assert not {"--help", "load"} & words
