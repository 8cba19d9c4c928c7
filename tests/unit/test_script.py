"""The console script."""

from __future__ import annotations

import sys

import pytest
from twisted.scripts import twistd

from ociregistry.script import main


@pytest.mark.parametrize("arguments", [[], ["--port", "5000"], ["check", "--config-path", "x.yaml"]])
def test_it_is_twistd_in_the_foreground_without_a_pid_file(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    ran: list[list[str]] = []
    monkeypatch.setattr(sys, "argv", ["ociregistry", *arguments])
    monkeypatch.setattr(twistd, "run", lambda: ran.append(sys.argv))
    main()
    assert ran == [["ociregistry", "--nodaemon", "--pidfile=", "ociregistry", *arguments]]
