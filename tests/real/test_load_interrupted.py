"""An interrupted load ends at once with one line; the next one continues it."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.images import MIB, Image, make_image
from tests.processes import ROOT, wait_until
from tests.real.caches import scripted
from tests.real.shells import Ended, Shell, assert_one_line, blobs_in, digests, shell_in, succeeded
from tests.upstream import ScriptedRegistry
from tests.upstream_rules import Drip, Hold

_SOON = 30.0
_AGAIN = 1.05
"""Maximum bytes over the link in the end, relative to the images' size."""

BIG = make_image("interrupted", layers=3, layer_size=8 * MIB)
SMALL = [make_image(f"interrupted/{number}") for number in range(5)]
WHOLE = sum(len(blob.data) for image in (BIG, *SMALL) for blob in image.blobs)

NOT_ONE_LINE = "Download logs at level error that the server is stopping"


@pytest.fixture
def shell(upstream: ScriptedRegistry, tmp_path: Path) -> Shell:
    """An empty store, and a list of one big image and some small ones."""
    upstream.add("team/app", BIG, "big")
    for number, image in enumerate(SMALL):
        upstream.add("team/app", image, f"small{number}")
    tags = ["big", *(f"small{number}" for number in range(len(SMALL)))]
    (tmp_path / "list").write_text("".join(f"{upstream.host}/team/app:{tag}\n" for tag in tags))
    return shell_in(tmp_path, [{"name": upstream.host, "scheme": "http"}])


@contextmanager
def loading(shell: Shell, *options: str) -> Iterator[subprocess.Popen[str]]:
    """Run a load; its output is in a file."""
    with _printed(shell).open("w") as stdout:
        process = subprocess.Popen(
            shell.argv("load", str(shell.folder / "list"), *options),
            cwd=shell.folder,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
        )
    with process:
        try:
            yield process
        finally:
            process.kill()


def _printed(shell: Shell) -> Path:
    return shell.folder / "stdout"


def interrupted(process: subprocess.Popen[str], number: int = signal.SIGINT) -> Ended:
    """Send this signal and return how the process ended."""
    process.send_signal(number)
    _, errors = process.communicate(timeout=_SOON)
    return Ended(process.args, process.returncode, "", errors)


def partial(shell: Shell, layer: str) -> int:
    """Return how many bytes of a layer are in the store."""
    path = shell.store / "pulls" / "0" / layer.removeprefix("sha256:")
    return path.stat().st_size if path.exists() else 0


def bytes_sent(upstream: ScriptedRegistry) -> int:
    """Return how many bytes of blobs the upstream has sent."""
    return sum(request.sent for request in upstream.requests if "/blobs/" in request.path)


def assert_in_store(shell: Shell, *images: Image) -> None:
    """Assert that the store has exactly these images, complete."""
    assert blobs_in(shell.store) == digests(*images)
    assert succeeded(shell.run("verify")).endswith(" 0 damaged\n")


@contextmanager
def held_load(upstream: ScriptedRegistry, shell: Shell) -> Iterator[subprocess.Popen[str]]:
    """Run a load that has stored the small images and 4 MiB of the second of three layers, and gets no more of it."""
    layer = BIG.layers[1].digest
    hold = Hold(4 * MIB)
    with scripted(upstream, f"/v2/team/app/blobs/{layer}", hold), loading(shell, "--concurrent", "3") as process:
        wait_until(lambda: partial(shell, layer) == 4 * MIB, _SOON, "half of the layer is in the store")
        wait_until(
            lambda: len(blobs_in(shell.store)) == len(digests(BIG, *SMALL)) - 1, _SOON, "all other blobs are stored"
        )
        wait_until(lambda: _printed(shell).read_text().count("\n") == len(SMALL), _SOON, "the small ones are loaded")
        yield process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupted_load_prints_one_line(upstream: ScriptedRegistry, shell: Shell, number: int) -> None:
    with held_load(upstream, shell) as process:
        done = interrupted(process, number)
    assert_one_line(done, 1, "interrupted; what is complete is kept, and the next run continues from there")
    # Only the loaded images were printed.
    assert [line.split()[0] for line in _printed(shell).read_text().splitlines()] == ["loaded:"] * len(SMALL)


def test_second_interrupt_prints_one_line(upstream: ScriptedRegistry, shell: Shell) -> None:
    with held_load(upstream, shell) as process:
        process.send_signal(signal.SIGINT)
        done = interrupted(process)
    assert done.returncode in (1, -signal.SIGINT)
    assert "Traceback" not in done.stderr


def test_next_load_resumes_an_interrupted_one(upstream: ScriptedRegistry, shell: Shell) -> None:
    with held_load(upstream, shell) as process:
        assert interrupted(process).returncode == 1
    done = succeeded(shell.run("load", str(shell.folder / "list")))
    assert done.splitlines()[-1] == f"1 loaded, {len(SMALL)} already there, 0 failed"
    assert bytes_sent(upstream) <= _AGAIN * WHOLE
    (again,) = [request for request in upstream.requests if request.header("Range")]
    assert again.path.endswith(BIG.layers[1].digest)
    assert again.header("Range") == f"bytes={4 * MIB}-"
    assert_in_store(shell, BIG, *SMALL)
    asked = len(upstream.requests)
    done = succeeded(shell.run("load", str(shell.folder / "list")))
    assert done.splitlines()[-1] == f"0 loaded, {1 + len(SMALL)} already there, 0 failed"
    assert len(upstream.requests) == asked


def test_repeatedly_interrupted_load_completes(upstream: ScriptedRegistry, shell: Shell) -> None:
    """Interrupted at arbitrary moments; everything crosses the link once, except what was in transit."""
    with scripted(upstream, "/v2/team/app/blobs/*", Drip(MIB)):
        for tenth in (1, 4, 7):
            with loading(shell, "--concurrent", "2") as process:
                wait_until(lambda: bytes_sent(upstream) >= WHOLE * tenth / 10, _SOON, "some more")  # noqa: B023  # waited for within this round
                assert interrupted(process).returncode == 1
    succeeded(shell.run("load", str(shell.folder / "list")))
    assert WHOLE <= bytes_sent(upstream) <= _AGAIN * WHOLE
    assert_in_store(shell, BIG, *SMALL)


def test_interrupt_while_reading_the_list_prints_no_traceback(shell: Shell) -> None:
    """Interrupted while the list is read from a pipe without a writer."""
    pipe = shell.folder / "list"
    pipe.unlink()
    os.mkfifo(pipe)
    # The pipe can be opened for writing once it is open for reading.
    with loading(shell) as process, pipe.open("wb"):
        done = interrupted(process)
    assert done.returncode in (1, -signal.SIGINT)
    assert "Traceback" not in done.stderr
