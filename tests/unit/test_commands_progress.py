"""Progress of commands: bars on a terminal, otherwise one line per finished image."""

from __future__ import annotations

import io
import sys
from typing import Any

import pytest
from tqdm import tqdm

from ociregistry.commands.progress import Bars, Lines, bar, on_terminal, shown
from ociregistry.pullthrough.loader import LoadResult, LoadStatus

NGINX, REDIS = "docker.io/library/nginx:1.25", "docker.io/library/redis:7"
LOADED = LoadResult(NGINX, LoadStatus.LOADED, blobs=2, bytes=1000)


class Terminal(io.StringIO):
    """An output that claims to be a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Return what is drawn on the terminal."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "__stderr__", terminal)
    return terminal


def drawn() -> int:
    """Return the number of bars on the screen."""
    bars: Any = tqdm
    return len(bars._instances)


def test_pipe_gets_one_line_per_image(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    for stderr in (io.StringIO(), None):
        monkeypatch.setattr(sys, "__stderr__", stderr)
        assert not on_terminal()
        with shown() as progress:
            assert type(progress) is Lines
            progress.expect(NGINX, 1000)
            progress.advance(NGINX, 1000)
            progress.ended(LOADED)
            progress.ended(LoadResult(REDIS, LoadStatus.FAILED, f"{REDIS}: it is not there"))
        assert capfd.readouterr().out.splitlines() == [
            f"loaded: {NGINX}: 2 blobs, 1000 bytes",
            f"failed: {REDIS}: it is not there",
        ]
        assert not isinstance(stderr, io.StringIO) or stderr.getvalue() == ""


def test_terminal_shows_bars(terminal: Terminal, capfd: pytest.CaptureFixture[str]) -> None:
    assert on_terminal()
    with shown() as progress:
        assert isinstance(progress, Bars)
        progress.expect(NGINX, 600)
        progress.expect(NGINX, 400)
        progress.expect(REDIS, 3000)
        progress.advance(NGINX, 1000)
        screen = terminal.getvalue()
        assert drawn() == 3
        for text in (NGINX, REDIS, "in total", "1.00k", "4.00k"):
            assert text in screen
        progress.ended(LOADED)
        assert drawn() == 2
        progress.advance(REDIS, 10)
    assert capfd.readouterr().out.splitlines() == [f"loaded: {NGINX}: 2 blobs, 1000 bytes"]
    assert drawn() == 0


def test_present_image_has_no_bar(terminal: Terminal, capfd: pytest.CaptureFixture[str]) -> None:
    with shown() as progress:
        progress.expect(NGINX, 0)
        progress.advance(REDIS, 0)
        progress.ended(LoadResult(NGINX, LoadStatus.PRESENT))
    assert NGINX not in terminal.getvalue()
    assert capfd.readouterr().out.splitlines() == [f"already there: {NGINX}"]


def test_bars_are_removed_on_failure(terminal: Terminal) -> None:
    def fail() -> None:
        with shown() as progress:
            progress.expect(NGINX, 5)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert drawn() == 0


def test_bar_starts_no_thread(terminal: Terminal) -> None:
    with bar("verifying", 10):
        assert tqdm.monitor is None
