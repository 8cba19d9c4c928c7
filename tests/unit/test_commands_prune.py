"""`prune`: reports and removes what was selected; a dry run reports the same and removes nothing."""

from __future__ import annotations

import os
import re
from datetime import UTC, datetime, timedelta, tzinfo
from pathlib import Path

import pytest

from ociregistry.commands import prune as prune_command
from ociregistry.config.values import count_text, size_text
from ociregistry.names import Digest
from tests.unit.support.command_lines import file_contents, run, usage_error
from tests.unit.support.stores import StoreDir, day, list_of

NOW = datetime.now(UTC)
SHARED, ONE, TWO, THREE = b"shared config", b"layer of one", b"layer of the second", b"the third layer"


pytestmark = pytest.mark.usefixtures("utc_plus_one")


@pytest.fixture
def store_dir(root: Path) -> StoreDir:
    """Return a store with three images, of which two share a blob and all have one of their own."""
    store_dir = StoreDir(root)
    store_dir.image([SHARED, ONE], "one:1", created=day(1), pulled=NOW - timedelta(days=40))
    store_dir.image([SHARED, TWO], "two:2", created=day(2), pulled=NOW - timedelta(days=20))
    store_dir.image([THREE], "three:3", created=day(3), pulled=NOW)
    return store_dir


@pytest.fixture
def two_days_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the time to two days after the files were written."""

    class Later(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Later:
            then = datetime.now(tz) + timedelta(days=2)
            return cls.fromtimestamp(then.timestamp(), tz)

    monkeypatch.setattr(prune_command, "datetime", Later)


class Pruned:
    """Run `prune` after a dry run; check that both report the same and that the dry run changes nothing."""

    def __init__(self, store_dir: StoreDir, capfd: pytest.CaptureFixture[str]) -> None:
        self._store_dir = store_dir
        self._capfd = capfd

    def __call__(self, *options: str) -> list[str]:
        """Return the lines of the output."""
        before = file_contents(self._store_dir.root)
        would = self._lines(*options, "--dry-run")
        assert file_contents(self._store_dir.root) == before
        did = self._lines(*options)
        assert [_done(line) for line in would] == did
        return did

    def _lines(self, *options: str) -> list[str]:
        result = run(self._capfd, "--image-path", self._store_dir.root, "prune", *options)
        assert (result.status, result.err) == (0, "")
        return result.lines


def _done(line: str) -> str:
    for would, did in {
        "would prune": "pruned",
        "would reclaim": "reclaimed",
        "would be removed": "removed",
        "would become free": "are free again",
    }.items():
        line = line.replace(would, did)
    return line


@pytest.fixture
def pruned(store_dir: StoreDir, capfd: pytest.CaptureFixture[str]) -> Pruned:
    """Return a function that prunes the store."""
    return Pruned(store_dir, capfd)


def gone(lines: list[str]) -> list[str]:
    """Return the image URLs that were pruned, without the host."""
    return [
        match[1]
        for line in lines
        if (match := re.fullmatch(r"pruned reg\.example/(\S+) \w+ \d+ bytes of blobs", line))
    ]


def left(store_dir: StoreDir) -> list[str]:
    """Return the image URLs that are left."""
    return [row.url.removeprefix("reg.example/") for row in store_dir.snapshot().rows]


def test_output_lists_pruned_urls_and_bytes(store_dir: StoreDir, pruned: Pruned) -> None:
    size = store_dir.snapshot().rows[0].stored.size + len(ONE)
    assert pruned("--pattern", "one") == [
        f"pruned reg.example/one:1 image {len(ONE)} bytes of blobs",
        f"1 image URL, 1 record and 1 blob removed, {size} bytes ({size} B) are free again",
    ]
    assert left(store_dir) == ["three:3", "two:2"]
    assert store_dir.has(SHARED, ONE, TWO, THREE) == [True, False, True, True]


def test_dry_run_output(store_dir: StoreDir, capfd: pytest.CaptureFixture[str]) -> None:
    result = run(capfd, "prune", "--image-path", store_dir.root, "--pattern", "one,three", "--dry-run")
    assert result.lines[:2] == [
        f"would prune reg.example/one:1 image {len(ONE)} bytes of blobs",
        f"would prune reg.example/three:3 image {len(THREE)} bytes of blobs",
    ]
    going = [row.stored.size for row in store_dir.snapshot().rows if "two" not in row.url]
    size = sum(going) + len(ONE) + len(THREE)
    assert result.lines[2] == (
        f"2 image URLs, 2 records and 2 blobs would be removed, {size} bytes ({size_text(size)}) would become free"
    )
    assert (len(result.lines), result.status, result.err) == (3, 0, "")
    assert left(store_dir) == ["one:1", "three:3", "two:2"]


def test_older_spellings(store_dir: StoreDir, capfd: pytest.CaptureFixture[str]) -> None:
    for old, new in (
        (["--prune", "one,three"], ["prune", "--pattern", "one,three"]),
        (["--prune-before", "2026-01-03T00:00:00"], ["prune", "--before", "2026-01-03T00:00:00"]),
        (
            ["--prune", "o", "--prune-before", "2026-01-03T00:00:00"],
            ["prune", "--pattern=o", "--before=2026-01-03T00:00:00"],
        ),
    ):
        before = file_contents(store_dir.root)
        dry = run(capfd, "--image-path", store_dir.root, *old, "--dry-run")
        assert dry.out.count("would prune") > 0
        assert dry == run(capfd, "--image-path", store_dir.root, "--dry-run", *new)
        assert dry == run(capfd, "--image-path", store_dir.root, *new, "--dry-run")
        assert file_contents(store_dir.root) == before
    assert gone(run(capfd, "--image-path", store_dir.root, "--prune", "one,three").lines) == ["one:1", "three:3"]


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (["--pattern", "^reg.example/t"], ["three:3", "two:2"]),
        (["--pattern", "one,:2$"], ["one:1", "two:2"]),
        (["--pattern", "(one|two):[0-9]{1,3}"], ["one:1", "two:2"]),
        (["--pattern", "."], ["one:1", "three:3", "two:2"]),
        (["--pattern", "four"], []),
        # A local time; an image created at that very moment is not before it.
        (["--before", "2026-01-02T01:00:00"], []),
        (["--before", "2026-01-02T01:00:01"], ["one:1"]),
        (["--before", "2026-01-03T01:00:01"], ["one:1", "two:2"]),
        (["--unused-for", "30d"], ["one:1"]),
        (["--unused-for", "2w"], ["one:1", "two:2"]),
        (["--unused-for", "10d", "--pattern", "two,three"], ["two:2"]),
        (["--before", "2026-01-03T01:00:01", "--pattern", "two,three"], ["two:2"]),
        (["--before", "2026-01-02T01:00:01", "--pattern", "two,three"], []),
        (["--before", "2026-01-03T01:00:01", "--unused-for", "30d", "--pattern", "e"], ["one:1"]),
    ],
)
def test_all_conditions_must_match(store_dir: StoreDir, pruned: Pruned, options: list[str], names: list[str]) -> None:
    there = left(store_dir)
    lines = pruned(*options)
    assert gone(lines) == names
    assert lines[-1].startswith(f"{count_text(len(names), 'image URL')}, {count_text(len(names), 'record')} and ")
    assert left(store_dir) == [name for name in there if name not in names]
    if not names:
        assert lines == ["0 image URLs, 0 records and 0 blobs removed, 0 bytes (0 B) are free again"]


def test_matching_url_is_removed_image_stays_by_others(store_dir: StoreDir, pruned: Pruned) -> None:
    store_dir.image([SHARED, ONE], "other:1")
    assert pruned("--pattern", "one") == [
        "pruned reg.example/one:1 image 0 bytes of blobs",
        "1 image URL, 0 records and 0 blobs removed, 0 bytes (0 B) are free again",
    ]
    assert left(store_dir) == ["other:1", "three:3", "two:2"]
    assert store_dir.has(SHARED, ONE) == [True, True]


def test_shared_bytes_are_counted_once(store_dir: StoreDir, pruned: Pruned) -> None:
    store_dir.image([THREE], "three:4")
    *lines, total = pruned("--pattern", "one,two,three")
    listed_bytes = [int(match[1]) for line in lines if (match := re.search(r"(\d+) bytes of blobs$", line))]
    assert sum(listed_bytes) == sum(map(len, (SHARED, ONE, TWO, THREE)))
    assert total.startswith("4 image URLs, 3 records and 4 blobs removed, ")
    assert (store_dir.has(SHARED, ONE, TWO, THREE), left(store_dir)) == ([False] * 4, [])


def test_index_is_pruned_with_its_images(store_dir: StoreDir, pruned: Pruned) -> None:
    first = store_dir.image([b"first"], "app@")
    second = store_dir.image([b"second"], "app@", "app:second")
    store_dir.put(list_of(first, second), "app:1")
    lines = pruned("--pattern", "app:1")
    assert f"pruned reg.example/app@{first.digest} image 5 bytes of blobs" in lines
    assert "pruned reg.example/app:1 list 0 bytes of blobs" in lines
    assert "app:second" in left(store_dir)
    assert store_dir.has(b"first", b"second") == [False, True]


def test_last_pulled_survives_removal_of_a_url(store_dir: StoreDir, pruned: Pruned) -> None:
    manifest = store_dir.image([b"x"], "a:1", "b:1", pulled=day(7))
    pruned("--pattern", "/a:1")
    assert datetime.fromtimestamp(store_dir.path(manifest).stat().st_mtime, UTC) == day(7)


def orphans(store_dir: StoreDir) -> dict[str, bytes]:
    """Create an orphaned blob and an abandoned partial; return path and data of each."""
    name = Digest.of(b"half").hex
    folder = store_dir.root / "pulls" / "7"
    folder.mkdir()
    (folder / "lock").touch()
    (folder / name).write_bytes(b"ha")
    (folder / f"{name}.note").write_text('{"size": 4}')
    store_dir.blobs(b"unnamed")
    return {f"blobs/{Digest.of(b'unnamed').hex}": b"unnamed", f"pulls/7/{name}": b"ha"}


def test_orphans_older_than_a_day_are_removed(store_dir: StoreDir, pruned: Pruned, two_days_later: None) -> None:
    found = orphans(store_dir)
    assert pruned("--orphans") == [
        *(f"reclaimed {path} {len(data)} bytes" for path, data in found.items()),
        "2 orphans removed, 9 bytes (9 B) are free again",
    ]
    assert not any((store_dir.root / path).exists() for path in found)
    assert left(store_dir) == ["one:1", "three:3", "two:2"]
    assert store_dir.has(SHARED, ONE, TWO, THREE) == [True] * 4


def test_younger_orphans_stay(store_dir: StoreDir, pruned: Pruned) -> None:
    found = orphans(store_dir)
    assert pruned("--orphans") == ["0 orphans removed, 0 bytes (0 B) are free again"]
    assert all((store_dir.root / path).exists() for path in found)


def test_orphan_age_option(store_dir: StoreDir, pruned: Pruned, two_days_later: None) -> None:
    orphans(store_dir)
    assert pruned("--orphans", "--older-than", "3d") == ["0 orphans removed, 0 bytes (0 B) are free again"]
    assert pruned("--orphans", "--older-than", "47h")[-1] == "2 orphans removed, 9 bytes (9 B) are free again"


def test_images_and_orphans_together(store_dir: StoreDir, pruned: Pruned, two_days_later: None) -> None:
    orphans(store_dir)
    lines = pruned("--orphans", "--pattern", "one")
    assert gone(lines) == ["one:1"]
    assert [line.partition(",")[0] for line in lines if "free again" in line] == ["1 image URL", "2 orphans removed"]


def test_dry_run_creates_no_lock_file(store_dir: StoreDir, pruned: Pruned, two_days_later: None) -> None:
    orphans(store_dir)
    (store_dir.root / "pulls" / "7" / "lock").unlink()
    pruned("--orphans")


def test_missing_store_is_one_line_and_not_created(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for options in (["--pattern", "x"], ["--orphans"], ["--pattern", "x", "--dry-run"]):
        result = run(capfd, "--image-path", tmp_path / "none", "prune", *options)
        assert (result.status, result.out) == (1, "")
        why = "No such file or directory (--image-path names another)"
        assert result.err == f"ociregistry: cannot use the store {tmp_path}/none: {why}\n"
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("argv", "why"),
    [
        ([], "prune needs --pattern, --before, --unused-for or --orphans"),
        (["--dry-run"], "prune needs --pattern, --before, --unused-for or --orphans"),
        (["--pattern", "x", "--older-than", "2d"], "--older-than goes with --orphans"),
        (["--orphans", "--older-than", "2"], "--older-than '2': a time such as 30d, 12h, 90m or 45s is expected"),
        (["--unused-for", "a month"], "--unused-for 'a month': a time such as 30d, 12h, 90m or 45s is expected"),
        (["--before", "2024-02-30T00:00:00"], "--before '2024-02-30T00:00:00': a local date and time such as "),
        (["--pattern", "("], "--pattern '(': the pattern '(' is not a regular expression: "),
        (["--pattern", r"nginx\z"], r"which is Go syntax, not Python's: \Z is the end of the text here"),
        (["--pattern", "nginx,"], "an empty pattern matches every image URL"),
        (["--pattern", ""], "an empty pattern matches every image URL"),
        (["nginx"], "only options are expected here"),
        (["--pattern"], "--pattern requires argument"),
    ],
)
def test_usage_error_changes_nothing(
    store_dir: StoreDir, capfd: pytest.CaptureFixture[str], argv: list[str], why: str
) -> None:
    before = file_contents(store_dir.root)
    assert why in usage_error(capfd, "--image-path", store_dir.root, "prune", *argv)
    assert file_contents(store_dir.root) == before
