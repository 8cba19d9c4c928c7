"""The sections `prune` and `verify`, and their errors."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest

from ociregistry.config.file import PruneSettings, VerifySettings
from tests.unit.support.config_files import read, refusal

NGINX = "docker.io/library/nginx:1.25"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Return the path of a configuration file that does not exist yet."""
    return tmp_path / "ociregistry.yaml"


def pruning(path: Path, text: str) -> PruneSettings:
    """Return the prune settings of a section."""
    prune = read(path, f"prune: {text}\n").prune
    assert prune is not None
    return prune


def expressions(settings: PruneSettings) -> list[str]:
    """Return the expressions of `keep`."""
    return [one.pattern for one in settings.keep.expressions]


def test_all_prune_keys(path: Path) -> None:
    text = "\n  unused_for: 30d\n  max_size: 50GB\n  keep:\n    - ^docker\\.io/\n    - 'a, b{1,2}'\n"
    text += "  every: 2h\n  max_share: 20%\n"
    prune = pruning(path, text)
    assert prune.max_share == 20
    assert (prune.unused_for, prune.max_size, prune.every) == (timedelta(days=30), 50 * 10**9, timedelta(hours=2))
    assert expressions(prune) == [r"^docker\.io/", "a, b{1,2}"]
    assert prune.keep.match(NGINX)
    assert not prune.keep.match("quay.io/nginx:1")


def test_unused_for_or_max_size_is_enough(path: Path) -> None:
    unused = pruning(path, "{unused_for: 90m}")
    assert (unused.unused_for, unused.max_size, unused.every) == (timedelta(minutes=90), None, timedelta(hours=1))
    large = pruning(path, "{max_size: 20MiB}")
    assert (large.unused_for, large.max_size, large.every) == (None, 20 * 1024 * 1024, timedelta(hours=1))
    for prune in (unused, large):
        assert prune.max_share == 50
        assert expressions(prune) == []
        assert not prune.keep.match(NGINX)


def test_without_sections_maintenance_is_off(path: Path) -> None:
    for text in ("", "prune:\nverify:\n", "prune: {}\nverify: {}\n", "prune: ~\nverify: null\n"):
        config = read(path, text)
        assert (config.prune, config.verify) == (None, None)


def test_empty_values_are_ignored(path: Path) -> None:
    prune = pruning(path, "{unused_for: ~, max_size: 1kB, keep: , every: }")
    assert (prune.unused_for, prune.max_size, prune.every) == (None, 1000, timedelta(hours=1))
    assert expressions(pruning(path, "{max_size: 1kB, keep: []}")) == []


@pytest.mark.parametrize("text", ["{every: 1h}", "{keep: [nginx]}", "{unused_for: , max_size: }"])
def test_section_that_never_prunes_is_refused(path: Path, text: str) -> None:
    why = "prune: has neither unused_for nor max_size: nothing would ever be pruned"
    assert refusal(path, f"\nprune: {text}\n") == f"{path}:2: {why}"


def test_verify_keys(path: Path) -> None:
    assert read(path, "verify: {every: 7d, max_rate: 20MB}").verify == VerifySettings(timedelta(days=7), 20 * 10**6)
    assert read(path, "verify: {every: 12h}").verify == VerifySettings(timedelta(hours=12), None)
    assert read(path, "verify: {every: 12h, max_rate: }").verify == VerifySettings(timedelta(hours=12), None)


@pytest.mark.parametrize("text", ["{max_rate: 20MB}", "{every: , max_rate: 20MB}", "\n  max_rate: 20MB\n"])
def test_verify_interval_is_required(path: Path, text: str) -> None:
    refused = refusal(path, f"verify: {text}\n")
    assert refused.endswith(": verify.every: is missing: give an interval such as 7d")


TIME = "a time such as 30d, 12h, 90m or 45s is expected"
SHARE = "a share from 1% to 100% is expected"
SIZE = "a size such as 50GB, 500MB or 20MiB is expected"


@pytest.mark.parametrize(
    ("text", "line", "why"),
    [
        ("prune:\n  unused_for: 30\n", 2, f"prune.unused_for: '30': {TIME}"),
        ("prune:\n  max_size: 1kB\n  unused_for: 0d\n", 3, f"prune.unused_for: '0d': {TIME}"),
        ("prune: {unused_for: [1d]}", 1, "prune.unused_for: a single value is expected"),
        ("prune: {unused_for: ''}", 1, "prune.unused_for: printable characters are expected, at least one"),
        ("prune: {max_size: 50gb}", 1, f"prune.max_size: '50gb': {SIZE}"),
        ("prune: {max_size: 0}", 1, f"prune.max_size: '0': {SIZE}"),
        ("prune: {max_size: 90%}", 1, f"prune.max_size: '90%': {SIZE}"),
        ("prune: {max_size: 1kB, every: hourly}", 1, f"prune.every: 'hourly': {TIME}"),
        ("prune: {max_size: 1kB, max_share: 50}", 1, f"prune.max_share: '50': {SHARE}"),
        ("prune:\n  max_size: 1kB\n  max_share: 0%\n", 3, f"prune.max_share: '0%': {SHARE}"),
        ("prune: {max_size: 1kB, max_share: 101%}", 1, f"prune.max_share: '101%': {SHARE}"),
        ("prune: {max_size: 1kB, keep: nginx}", 1, "prune.keep: a list is expected"),
        ("prune: {max_size: 1kB, keep: [[nginx]]}", 1, "prune.keep: a single value is expected"),
        ("prune: {max_size: 1kB, keep: ['']}", 1, "prune.keep: printable characters are expected, at least one"),
        (
            "prune:\n  max_size: 1kB\n  keep:\n  - a\n  - '('\n",
            5,
            "prune.keep: '(': the pattern '(' is not a regular",
        ),
        (
            "prune: {max_size: 1kB, keep: ['x\\z']}",
            1,
            r"prune.keep: 'x\\z': the pattern 'x\\z' has '\\z', which is Go syntax",
        ),
        ("prune: {max_size: 1kB, keep: ['[[:alpha:]]']}", 1, "prune.keep: '[[:alpha:]]': the pattern "),
        ("prune: 30d", 1, "prune: a mapping is expected"),
        ("prune: [30d]", 1, "prune: a mapping is expected"),
        ("prune: {max_size: 1kB, unused-for: 1d}", 1, "prune.unused-for: unknown key"),
        ("prune: {max_size: 1kB, max_size: 2kB}", 1, "prune.max_size: duplicate key"),
        ("verify: 7d", 1, "verify: a mapping is expected"),
        ("verify: {every: weekly}", 1, f"verify.every: 'weekly': {TIME}"),
        ("verify:\n  every: 7d\n  max_rate: fast\n", 3, f"verify.max_rate: 'fast': {SIZE}"),
        ("verify: {every: 7d, repair: true}", 1, "verify.repair: unknown key"),
    ],
)
def test_error_names_file_line_and_key(path: Path, text: str, line: int, why: str) -> None:
    assert refusal(path, text).startswith(f"{path}:{line}: {why}")
