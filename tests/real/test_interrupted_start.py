"""A process that is interrupted while it starts ends by the signal, and prints no traceback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.processes import ROOT, Daemon, twistd
from tests.real.caches import SOON

INTERRUPTED_IMPORT = """
import os, sys, time

class Interrupting:
    '''Send the signal when the module is about to be imported, as a user may at any time.'''

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == os.environ["INTERRUPTED_IMPORT"]:
            os.kill(os.getpid(), int(os.environ["INTERRUPTED_BY"]))
            time.sleep(0.5)
        return None

sys.meta_path.insert(0, Interrupting)
"""

SCRIPT = [sys.executable, "-c", "from ociregistry.script import main; main()"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("arguments", [("list",), ("load", "-"), ()], ids=["list", "load", "daemon"])
@pytest.mark.parametrize(
    ("start", "module"),
    [
        (SCRIPT, "twisted.scripts.twistd"),
        (SCRIPT, "ociregistry.tap"),
        (SCRIPT, "ociregistry.settings"),
        (twistd(), "ociregistry.settings"),
    ],
)
def test_start_interrupted_at_an_import(
    tmp_path: Path, start: Sequence[str], module: str, arguments: Sequence[str], number: int
) -> None:
    (tmp_path / "sitecustomize.py").write_text(INTERRUPTED_IMPORT)
    done = subprocess.run(
        [*start, "--image-path", str(tmp_path / "images"), *arguments],
        check=False,
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONPATH": f"{tmp_path}:{ROOT}",
            "INTERRUPTED_IMPORT": module,
            "INTERRUPTED_BY": str(int(number)),
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SOON,
    )
    assert (done.returncode, done.stdout, done.stderr) == (-number, "", "")
    assert not (tmp_path / "images").exists()


def test_interrupt_stops_a_running_daemon_in_order(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon()
    daemon.process.send_signal(signal.SIGINT)
    # twistd ends by the signal after it has stopped everything.
    assert daemon.process.wait(SOON) == -signal.SIGINT
    assert "Server Shut Down" in daemon.log


def test_tests_that_are_started_in_the_background_interrupt_all_the_same() -> None:
    """A shell starts background processes with SIGINT ignored, nohup with SIGHUP."""
    selected = [__file__, "-k", test_interrupt_stops_a_running_daemon_in_order.__name__]
    background = ["bash", "-c", "trap '' INT HUP; exec \"$@\"", "bash", sys.executable, "-m", "pytest", "-q"]
    done = subprocess.run([*background, *selected], check=False, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout
