"""The progress of a load: bars on a terminal, a line for each image in a pipe."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.images import MIB, make_image
from tests.real.shells import Shell, blobs_in, digests, shell_in, succeeded
from tests.real.terminals import on_terminal
from tests.upstream import ScriptedRegistry
from tests.upstream_rules import Drip

_WIDTH, _HEIGHT = 160, 40

IMAGES = {tag: make_image(f"shown/{tag}", layers=2, layer_size=2 * MIB) for tag in ("one", "two", "three")}


@pytest.fixture
def shell(upstream: ScriptedRegistry, tmp_path: Path) -> Shell:
    """A list of three slow images, and of one that does not exist."""
    for tag, image in IMAGES.items():
        upstream.add("team/app", image, tag)
    upstream.script("/v2/team/app/blobs/*", Drip(2 * MIB))
    urls = [f"{upstream.host}/team/app:{tag}" for tag in (*IMAGES, "missing")]
    (tmp_path / "list").write_text("\n".join(urls))
    return shell_in(tmp_path, [{"name": upstream.host, "scheme": "http"}], concurrent=2)


def is_result_line(upstream: ScriptedRegistry, line: str) -> bool:
    """Whether this is the final line of an image, as printed into a pipe."""
    name = re.escape(f"{upstream.host}/team/app:")
    return bool(re.fullmatch(rf"(loaded: {name}\w+: 3 blobs, \d+ bytes|failed: {name}missing: .+)", line))


def test_terminal_shows_bars_until_the_end(upstream: ScriptedRegistry, shell: Shell) -> None:
    with on_terminal(shell.argv("load", str(shell.folder / "list")), shell.folder, _WIDTH, _HEIGHT) as terminal:
        assert terminal.end() == 1
        written, lines = terminal.read(), terminal.screen()
    bars = [part for part in re.split("[\r\n]", written) if "%|" in part]
    for name in ("in total", *(f"{upstream.host}/team/app:{tag}" for tag in IMAGES)):
        own = [bar for bar in bars if bar.removeprefix("\x1b[A").startswith(name)]
        # Size, total, elapsed and remaining time, and the rate.
        assert any(
            re.search(r"\d%\|.*\| \d[\d.]*[kM]?/\d[\d.]*M \[\d\d:\d\d<\d\d:\d\d, +[\d.]+[kM]?B/s\]", bar)
            for bar in own
        ), (name, own[:20])
    whole = f"{sum(len(blob.data) for image in IMAGES.values() for blob in image.blobs) / 1e6:.1f}M"
    assert any(bar.startswith("in total") and f"/{whole} [" in bar for bar in bars)
    assert sum(is_result_line(upstream, line) for line in lines) == 4, lines
    assert "3 loaded, 0 already there, 1 failed" in lines
    assert "ociregistry: 1 of 4 images could not be loaded" in lines
    assert not [line for line in lines if "%|" in line]
    assert blobs_in(shell.store) == digests(*IMAGES.values())


def test_terminal_shows_no_bar_for_cached_images(upstream: ScriptedRegistry, shell: Shell) -> None:
    (shell.folder / "list").write_text(f"{upstream.host}/team/app:one\n")
    succeeded(shell.run("load", str(shell.folder / "list")))
    with on_terminal(shell.argv("load", str(shell.folder / "list")), shell.folder, _WIDTH, _HEIGHT) as terminal:
        assert terminal.end() == 0
        lines = terminal.screen()
    assert lines == [
        f"already there: {upstream.host}/team/app:one",
        "0 loaded, 1 already there, 0 failed",
    ]


def test_pipe_gets_one_line_per_image(upstream: ScriptedRegistry, shell: Shell) -> None:
    done = shell.piped("load $PWD/list", "| cat")
    lines = done.stdout.splitlines()
    assert len(lines) == 5
    assert all(is_result_line(upstream, line) for line in lines[:-1]), lines
    assert lines[-1] == "3 loaded, 0 already there, 1 failed"
    assert done.stderr == "ociregistry: 1 of 4 images could not be loaded\n"
    assert "\x1b" not in done.stdout
    assert "\r" not in done.stdout
