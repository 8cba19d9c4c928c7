"""`status` beside a real daemon: in each of its states, without one, and watched on a terminal of 80 columns."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ociregistry import __version__
from tests.client import fetch
from tests.disk_faults import small_disk
from tests.images import MIB, make_image
from tests.processes import Daemon, free_port, run, twistd, wait_until
from tests.real.caches import SOON, blob_file
from tests.real.shells import Ended, as_nobody, assert_one_line, need_root, open_folder, run_process
from tests.real.terminals import on_terminal
from tests.upstream import ScriptedRegistry
from tests.upstream_rules import Hold

BUILT = make_image("status", layers=2, layer_size=MIB)
LAYER = BUILT.layers[0]
WHOLE = sum(len(blob.data) for blob in BUILT.blobs)
LONG = "/".join(["a-name-of-a-repository-that-is-longer-than-a-terminal-is-wide"] * 3)


class Watched:
    """A daemon that the tests ask by `status`, and more cheaply at its admin listener."""

    def __init__(self, start: Callable[..., Daemon], upstream: ScriptedRegistry, *options: str, **more: Any) -> None:
        self.port = free_port()
        listen = f"tcp:{self.port}:interface=127.0.0.1"
        self.daemon = start({upstream.host: "http"}, "--admin-listen", listen, *options, **more)
        self.upstream = upstream

    @property
    def told(self) -> dict[str, Any]:
        """The facts, as the admin listener tells them."""
        document: dict[str, Any] = json.loads(fetch(f"http://127.0.0.1:{self.port}/status").body)
        return document

    def status(self, *options: str) -> Ended:
        """Run `status` to its end; it prints ASCII in 80 columns."""
        done = run(command(self.daemon, *options), check=False, timeout=60)
        assert not re.search("[^ -~\n]", done.stdout), done.stdout
        assert max(map(len, done.stdout.splitlines()), default=0) <= 80 or "--json" in options
        return done

    def ask(self, path: str = "manifests/1", repository: str = "team/app") -> int:
        """Request it; return the status of the answer."""
        return fetch(f"{self.daemon.url}/v2/{repository}/{path}?ns={self.upstream.host}").status

    def pull(self) -> None:
        """Pull the image whole."""
        self.upstream.add("team/app", BUILT, "1")
        assert self.ask() == 200
        for blob in BUILT.blobs:
            assert self.ask(f"blobs/{blob.digest}") == 200
            wait_until(blob_file(self.daemon, blob.digest).exists, SOON, "the blob is stored")

    def wait(self, holds: Callable[[dict[str, Any]], object], what: str) -> None:
        """Return as soon as the facts are so."""
        wait_until(lambda: holds(self.told), 3 * SOON, what)


def command(daemon: Daemon, *options: str) -> list[str]:
    """Return the command line of `status` for the daemon's store."""
    common = ["--image-path", str(daemon.image_path), "--config-path", str(daemon.config_path)]
    return twistd(*common, "status", *options)


@pytest.fixture
def watch(start_daemon: Callable[..., Daemon], upstream: ScriptedRegistry) -> Callable[..., Watched]:
    """Start a daemon with these options."""
    return lambda *options, **more: Watched(start_daemon, upstream, *options, **more)


def test_daemon_that_is_well(watch: Callable[..., Watched]) -> None:
    watched = watch()
    watched.pull()
    watched.wait(lambda told: told["store"]["blobs"] is not None, "the store is measured")
    watched.wait(lambda told: not told["incomplete_images"], "the last blob is seen")
    done = watched.status()
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert re.fullmatch(rf"ociregistry {re.escape(__version__)}: well, up \d+ s", lines[0])
    assert "missing   nothing" in lines
    assert re.search(rf"^  up    {watched.upstream.host} for \d+ s$", done.stdout, re.MULTILINE)
    counted = re.search(
        r"^answers   (\d) hits?, (\d) miss(?:es)?, 0 errors, 2\.\d MB sent, 2\.\d MB received$",
        done.stdout,
        re.MULTILINE,
    )
    # The daemon completes the image by itself too: a layer may be there before it is asked for.
    assert counted is not None
    assert int(counted[1]) + int(counted[2]) == 4
    # By the same code as at the admin listener.
    by_command = json.loads(watched.status("--json").stdout)
    assert by_command.keys() == watched.told.keys()
    assert by_command["store"] == watched.told["store"]


def test_control_socket_serves_the_status_by_get_and_head_alone(watch: Callable[..., Watched]) -> None:
    daemon = watch().daemon
    socket = str(daemon.image_path / "pulls" / "0" / "socket")
    curl = ["curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", "--unix-socket", socket]
    codes = {
        method: run([*curl, "-X", method, "http://any.example/status"]).stdout
        for method in ("GET", "POST", "PUT", "DELETE")
    }
    codes["HEAD"] = run([*curl, "-I", "http://any.example/status"]).stdout
    assert codes == {"GET": "200", "HEAD": "200", "POST": "405", "PUT": "405", "DELETE": "405"}
    assert run([*curl, "http://localhost/metrics"]).stdout == "404"
    assert fetch(f"{daemon.url}/status").status == 404


def test_download_has_a_bar(watch: Callable[..., Watched]) -> None:
    """With the image that it is for, its rate and the time that is left."""
    watched = watch("--max-bandwidth", "800kbit")
    watched.upstream.add(LONG, BUILT, "1")
    assert watched.ask(repository=LONG) == 200
    watched.wait(lambda told: [one for one in told["downloads"] if one["seconds_left"]], "a download has a rate")
    done = watched.status()
    assert done.returncode == 0
    assert re.search(r"\[#+-+\] +\d+% [\d.]+ [kM]?B of 1\.\d MB, [\d.]+ kB/s, \d+ s left\n", done.stdout)
    assert re.search(r"downloads: \d, [\d.]+ kB/s, at most 100\.0 kB/s\n", done.stdout)
    assert re.search(rf"^  {watched.upstream.host}/a-name\S+\.\.\.\S+-wide:1, background$", done.stdout, re.MULTILINE)
    assert re.search(r"missing   [\d.]+ MB of 1 image, here in \d+ s\n", done.stdout)


def test_killed_daemon(watch: Callable[..., Watched]) -> None:
    """The files tell what is there and what is missing."""
    watched = watch()
    watched.pull()
    watched.daemon.kill()
    blob_file(watched.daemon, LAYER.digest).unlink()
    done = watched.status()
    assert (done.returncode, done.stderr) == (2, "")
    assert done.stdout.startswith(f"ociregistry {__version__}: no daemon runs; the files say\n")
    assert re.search(r"^ +0 lists, 1 image, 1\.\d MB in 2 blobs$", done.stdout, re.MULTILINE)
    assert re.search(r"^missing   1\.\d MB of 1 image$", done.stdout, re.MULTILINE)
    told = json.loads(watched.status("--json").stdout)
    assert (told["status"], told["incomplete"]) == ("stopped", {"images": 1, "bytes": len(LAYER.data), "pending": 0})
    root = watched.daemon.image_path
    used = sum(path.lstat().st_size for path in root.rglob("*") if not path.is_dir())
    assert told["store"] == {"path": str(root), "lists": 0, "images": 1, "bytes": used, "blobs": 2}
    watched.daemon.start()
    assert watched.status().returncode == 0


def test_air_gapped_daemon_is_well(watch: Callable[..., Watched]) -> None:
    watched = watch("--air-gapped")
    assert watched.ask() == 404
    done = watched.status()
    assert (done.returncode, done.stdout.split(", up")[0]) == (0, f"ociregistry {__version__}: well, air-gapped")


def test_link_that_is_down_while_bytes_are_wanted(watch: Callable[..., Watched]) -> None:
    watched = watch()
    host = watched.upstream.host
    watched.upstream.add("team/app", BUILT, "1")
    watched.upstream.script("/v2/*/blobs/*", Hold())
    assert watched.ask() == 200
    watched.wait(lambda told: told["incomplete"]["images"], "it is known to be incomplete")
    assert watched.told["status"] == "ok"
    watched.upstream.close()
    watched.wait(lambda told: told["status"] == "degraded", "the link is down")
    done = watched.status()
    assert done.returncode == 1
    assert done.stdout.startswith(f"ociregistry {__version__}: degraded, up")
    assert f"! {host} cannot be reached, and something from it is wanted:" in done.stdout
    assert re.search(rf"  down  {host} for \d+ s, next probe in \d+ s\n", done.stdout)
    assert re.search(r"^missing   2\.\d MB of 1 image$", done.stdout, re.MULTILINE)


def test_full_disk(tmp_path: Path, watch: Callable[..., Watched]) -> None:
    with small_disk(tmp_path / "disk", 24 * MIB) as disk:
        watched = watch(image_path=disk.path / "images")
        assert watched.status().returncode == 0
        (disk.path / "filler").write_bytes(bytes(disk.free - MIB))
        watched.wait(lambda told: told["disk"]["full"], "the disk is full")
        done = watched.status()
        assert done.returncode == 1
        assert "! the disk is full: 0 B are free beside the reserve, so no larger download fits\n" in done.stdout
        assert re.search(r"disk      [\d.]+ [kM]B of 25\.2 MB free, 1\.3 MB kept in reserve, full\n", done.stdout)
        watched.daemon.terminate()


def test_image_that_does_not_fit(tmp_path: Path, watch: Callable[..., Watched]) -> None:
    """The disk is not full, but the image will not be here, however fast the link is."""
    with small_disk(tmp_path / "disk", 24 * MIB) as disk:
        watched = watch(image_path=disk.path / "images")
        watched.pull()
        watched.upstream.add("team/large", make_image("large", layers=1, layer_size=30 * MIB), "1")
        assert watched.ask(repository="team/large") == 200
        watched.wait(lambda told: told["status"] == "degraded", "it is refused")
        assert not watched.told["disk"]["full"]
        assert watched.told["incomplete"]["seconds_left"] is None
        done = watched.status()
        assert done.returncode == 1
        told = " ".join(done.stdout.split())
        assert re.search(r"! the disk has no room for a download of 31\.5 MB: \S+ MB are free beside", told)
        watched.daemon.terminate()


def test_damage_that_cannot_be_repaired(watch: Callable[..., Watched]) -> None:
    """As the schedule of verification says, one is due when the daemon starts again."""
    watched = watch(settings={"verify": {"every": "1h"}})
    watched.pull()
    assert watched.status().returncode == 0
    watched.daemon.terminate()
    watched.upstream.close()
    blob_file(watched.daemon, LAYER.digest).write_bytes(bytes(len(LAYER.data)))
    os.utime(watched.daemon.image_path / "pulls" / "verified", (0, 0))
    watched.daemon.start()
    watched.wait(lambda told: any("damaged and could not be" in reason for reason in told["reasons"]), "the damage")
    watched.wait(lambda told: told["maintenance"]["damaged"], "the end of the verification")
    done = watched.status()
    assert done.returncode == 1
    assert "! 1 blob is damaged and could not be fetched again:\n" in done.stdout
    assert re.search(r"verify    last \S+, next in \S+ min, 1 damaged, 0 repaired\n", done.stdout)


def test_daemon_that_hangs(watch: Callable[..., Watched]) -> None:
    watched = watch()
    watched.daemon.process.send_signal(signal.SIGSTOP)
    try:
        silent = f"the daemon on {watched.daemon.image_path} runs, but has not answered within 5 s"
        assert_one_line(watched.status(), 1, silent)
    finally:
        watched.daemon.process.send_signal(signal.SIGCONT)
    assert watched.status().returncode == 0


def test_another_user_is_told_as_whom_to_run() -> None:
    need_root()
    with open_folder() as folder, Daemon(folder) as daemon:
        daemon.config_path.chmod(0o644)
        for mode in (0o755, 0o750):
            daemon.image_path.chmod(mode)
            done = run_process(as_nobody(command(daemon)), folder)
            assert_one_line(
                done,
                1,
                "cannot ask the daemon as the user nobody: ",
                f"the store {daemon.image_path} belongs to the user root; run this as its user, or as root",
            )


def test_store_that_does_not_exist(tmp_path: Path) -> None:
    done = run_process(twistd("--image-path", str(tmp_path / "none"), "status"), tmp_path)
    why = f"there is no store at {tmp_path / 'none'} (--image-path names another)"
    assert_one_line(done, 2, f"no daemon runs, and {why}")


def test_watch_on_a_terminal(watch: Callable[..., Watched], tmp_path: Path) -> None:
    """It is drawn in place, survives a restart of the daemon and one that hangs, and ends by Ctrl-C."""
    watched = watch(image_path=tmp_path / "\x1b[2J\nstore")
    daemon = watched.daemon
    watched.upstream.add(LONG, BUILT, "1")
    hold = Hold(100_000)
    watched.upstream.script("/v2/*/blobs/*", hold)
    assert watched.ask(repository=LONG) == 200
    with on_terminal(command(daemon, "--watch"), tmp_path, 80, 24) as terminal:
        lines = terminal.wait(lambda lines: any("%" in line for line in lines), "a download")
        assert re.fullmatch(rf"ociregistry {re.escape(__version__)}: well, up \d+ s", lines[0])
        assert any(line.endswith(r"\x1b[2J\nstore") for line in lines)
        assert any(re.fullmatch(r"  127\S+/a-name\S+\.\.\.\S+-wide:1, background", line) for line in lines)
        first = lines[0]
        terminal.wait(lambda lines: lines[0] != first, "the next look")
        daemon.kill()
        lines = terminal.wait(lambda lines: "no daemon runs" in lines[0], "it is gone")
        assert not any("%" in line for line in lines)
        hold.release.set()
        daemon.start()
        terminal.wait(lambda lines: "well, up" in lines[0], "it is back")
        daemon.process.send_signal(signal.SIGSTOP)
        terminal.wait(lambda lines: "has not answered" in " ".join(lines), "it hangs")
        daemon.process.send_signal(signal.SIGCONT)
        terminal.wait(lambda lines: "well, up" in lines[0], "it answers again")
        assert terminal.interrupt() == 0


def test_small_terminal_does_not_scroll(watch: Callable[..., Watched], tmp_path: Path) -> None:
    with on_terminal(command(watch().daemon, "--watch"), tmp_path, 30, 4) as terminal:
        lines = terminal.wait(lambda lines: len(lines) == 3, "three lines and the cursor's")
        assert re.fullmatch(r"and \d+ more lines", lines[-1])
        assert terminal.interrupt() == 0


def test_watch_on_a_dumb_terminal_is_plain(watch: Callable[..., Watched], tmp_path: Path) -> None:
    argv = command(watch().daemon, "--watch")
    with on_terminal(argv, tmp_path, 80, 24, {"TERM": "dumb"}) as terminal:
        wait_until(lambda: terminal.read().count("ociregistry ") == 2, SOON, "the second look")
        assert terminal.interrupt() == 0
        assert "\x1b" not in terminal.read()


@pytest.mark.parametrize("options", [(), ("--json",), ("--watch",), ("--watch", "--json")])
def test_closed_standard_output(watch: Callable[..., Watched], options: tuple[str, ...]) -> None:
    daemon = watch().daemon
    done = run(["sh", "-c", 'exec "$@" >&-', "sh", *command(daemon, *options)], check=False, timeout=60)
    assert (done.returncode, done.stderr) == (1, "ociregistry: cannot print: the standard output is closed\n")


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_watch_in_a_pipe_is_plain(watch: Callable[..., Watched], options: tuple[str, ...]) -> None:
    """One look after the other, or a JSON document a line."""
    argv = command(watch().daemon, "--watch", *options)
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            looks, written = 0, []
            while looks < 2:
                written.append(process.stdout.readline())
                looks += written[-1].startswith(("ociregistry ", "{"))
            process.send_signal(signal.SIGINT)
            assert process.wait(20) == 0
        finally:
            process.kill()
    assert not any("\x1b" in line for line in written)
    if options:
        assert [json.loads(line)["status"] for line in written] == ["ok", "ok"]


def test_terminal_without_utf_8_gets_ascii(watch: Callable[..., Watched], tmp_path: Path) -> None:
    daemon = watch(image_path=tmp_path / "Geräte").daemon
    for encoding, shown in (("ascii", r"Ger\xe4te"), ("utf-8", "Geräte")):
        done = run(command(daemon), environment={"PYTHONIOENCODING": encoding})
        assert shown in done.stdout
