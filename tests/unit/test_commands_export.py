"""`export`: what is in the place of the archive is replaced only on request, and no unfinished archive stays."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

from tests.unit.support.command_lines import CommandResult, run
from tests.unit.support.exports import export, make_source


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Return the folder of the store that is exported."""
    return make_source(tmp_path / "source")


def refused(capfd: pytest.CaptureFixture[str], source: Path, target: Path, *options: str) -> str:
    """Return the one line of an export that fails."""
    result = run(capfd, "--image-path", source, "export", "--pattern", ".", "-o", target, *options)
    assert result == CommandResult(1, "", result.err)
    (line,) = result.err.splitlines()
    return line


def test_existing_file_is_not_replaced_unasked(
    capfd: pytest.CaptureFixture[str], source: Path, tmp_path: Path
) -> None:
    target = tmp_path / "images.tar"
    target.write_bytes(b"an earlier export")
    line = refused(capfd, source, target)
    assert line == f"ociregistry: {target}: exists: name another file, or replace it with --force"
    assert target.read_bytes() == b"an earlier export"


def test_folders_links_and_devices_are_never_replaced(
    capfd: pytest.CaptureFixture[str], source: Path, tmp_path: Path
) -> None:
    dangling = tmp_path / "link"
    dangling.symlink_to(tmp_path / "nowhere")
    for target in (tmp_path, dangling, Path("/dev/stdout"), Path("/dev/null")):
        for options in ((), ("--force",)):
            line = refused(capfd, source, target, *options)
            assert line == f"ociregistry: {target}: exists, and is no regular file: name another one"


def test_standard_output_is_no_file(
    capfd: pytest.CaptureFixture[str], source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(capfd, "--image-path", source, "export", "--pattern", ".", "-o", "-")
    assert (result.status, result.out) == (2, "")
    assert result.err.startswith("ociregistry: -o -: a file is expected")
    assert not (tmp_path / "-").exists()


def test_archive_left_by_a_killed_export_is_removed_and_a_running_one_stays(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "stick"
    folder.mkdir()
    left, running, foreign = (
        folder / name for name in (".ociregistry-export-1", ".ociregistry-export-2", ".other-1")
    )
    for path in (left, running, foreign):
        path.touch()
    descriptor = os.open(running, os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        export(source, folder / "images.tar")
    finally:
        os.close(descriptor)
    assert {path.name for path in folder.iterdir()} == {"images.tar", running.name, foreign.name}
