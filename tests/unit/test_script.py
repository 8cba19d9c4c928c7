"""The console script."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from twisted.scripts import twistd

from ociregistry import script

pytestmark = pytest.mark.usefixtures("interrupts")


def twistd_arguments(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> list[str]:
    """Return the arguments passed to twistd."""
    argument_lists: list[list[str]] = []
    monkeypatch.setattr(sys, "argv", ["ociregistry", *arguments])
    monkeypatch.setattr(twistd, "run", lambda: argument_lists.append(sys.argv))
    script.main()
    return argument_lists[0]


@pytest.mark.parametrize("arguments", [[], ["--port", "5000"], ["check", "--config-path", "x.yaml"]])
def test_script_runs_twistd_in_foreground_without_pid_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: list[str]
) -> None:
    monkeypatch.setattr(script, "CONFIG", tmp_path / "none.yaml")
    assert twistd_arguments(monkeypatch, *arguments) == [
        "ociregistry",
        "--nodaemon",
        "--pidfile=",
        "ociregistry",
        *arguments,
    ]


def test_installed_configuration_is_the_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = tmp_path / "ociregistry.yaml"
    config.touch()
    monkeypatch.setattr(script, "CONFIG", config)
    assert twistd_arguments(monkeypatch, "list")[-4:] == ["ociregistry", "--config-path", str(config), "list"]
