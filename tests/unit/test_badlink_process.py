"""The bad-link proxy as a program, controlled by a person or by a blocking test."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys

import pytest

from tests.badlink import Counts
from tests.badlink_process import LinkProcess
from tests.processes import ROOT


def served(connection: socket.socket) -> bytes:
    """Return all that a client sends on one connection before it closes."""
    with connection:
        data = b""
        while piece := connection.recv(65536):
            data += piece
    return data


def test_process_accepts_commands_and_counts() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        target = f"127.0.0.1:{server.getsockname()[1]}"
        with LinkProcess(target, "--cut-bytes", "3kB") as link:
            assert link.tell(down=True) == Counts()
            client = socket.create_connection(("127.0.0.1", link.port), 10)
            client.sendall(b"hello")
            server.settimeout(0.3)
            with pytest.raises(TimeoutError):
                server.accept()
            link.tell(up=True, rate="80Mbit", rtt=10)
            server.settimeout(10)
            accepted, _ = server.accept()
            assert accepted.recv(5, socket.MSG_WAITALL) == b"hello"
            accepted.sendall(bytes(10_000))
            assert len(served(client)) == 3000
            accepted.close()
            assert link.counts.down == 3000
            with pytest.raises(ValueError, match="colour"):
                link.tell(colour="red")
            with pytest.raises(ValueError, match="amount"):
                link.tell(rate="red")
            link.tell(refuse=True)
            with pytest.raises(OSError, match="refused"):
                socket.create_connection(("127.0.0.1", link.port), 10)
        assert link.counts == Counts(up=5, down=3000, accepted=1, dialled=1, cut=1, open=link.counts.open)


def test_sigterm_ends_it_and_prints_counts() -> None:
    argv = [sys.executable, "-m", "tests.badlink", "--hole", "--up", "20", "--down", "10", "127.0.0.1:1"]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        where = json.loads(process.stdout.readline())
        counts = {"accepted": 0}
        with socket.create_connection(("127.0.0.1", where["port"]), 10):
            while not counts["accepted"]:
                process.stdin.write('{"count": true}\n')
                process.stdin.flush()
                counts = json.loads(process.stdout.readline())
        process.send_signal(signal.SIGTERM)
        counts = json.loads(process.stdout.read())
        assert process.wait(10) == 0
    assert (counts["accepted"], counts["dialled"]) == (1, 0)


@pytest.mark.parametrize("wrong", [["--up", "3"], ["--rate", "fast"], ["--cut-by", "knife"], []])
def test_invalid_option_is_an_error(wrong: list[str]) -> None:
    target = ["127.0.0.1:1"] if wrong else ["nowhere"]
    argv = [sys.executable, "-m", "tests.badlink", *wrong, *target]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT, check=False, stdin=subprocess.DEVNULL)
    assert done.returncode == 2
    assert "error: " in done.stderr
