"""`status` without a daemon, and beside ones that answer as no daemon of this version does."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest

from ociregistry import __version__
from ociregistry.commands import facts
from ociregistry.store.files import Files
from ociregistry.store.workdir import ControlSocket, PendingFiles, PendingImage
from tests.unit.support.command_lines import CommandResult, file_contents, run, usage_error
from tests.unit.support.common import image
from tests.unit.support.stores import StoreDir, image_of, list_of

CONFIG, LAYER, OTHER = b"config", b"layer" * 100, b"other"
WHOLE, LACKING = image_of(CONFIG, LAYER), image_of(CONFIG, LAYER, OTHER)


@pytest.fixture
def store_dir(root: Path) -> StoreDir:
    """Return an empty store."""
    return StoreDir(root)


Ask = Callable[..., CommandResult]


@pytest.fixture
def ask(root: Path, capfd: pytest.CaptureFixture[str]) -> Ask:
    """Return a function that runs the command, and checks that it changes nothing."""

    def asked(*options: str) -> CommandResult:
        before = file_contents(root)
        result = run(capfd, "--image-path", root, "status", *options)
        assert file_contents(root) == before
        return result

    return asked


def test_files_of_an_empty_store(store_dir: StoreDir, ask: Ask) -> None:
    result = ask()
    assert (result.status, result.err) == (2, "")
    assert result.lines[0] == f"ociregistry {__version__}: no daemon runs; the files say"
    assert result.lines[-1] == "missing   nothing"


def test_json_of_a_store_whose_path_is_not_utf_8(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "\udcff"
    StoreDir(root)
    result = run(capfd, "--image-path", root, "status", "--json")
    assert result.status == 2
    assert json.loads(result.out)["store"]["path"] == rf"{tmp_path}/\udcff"


def test_files_tell_what_is_missing(store_dir: StoreDir, ask: Ask) -> None:
    """A blob that several images lack counts once, and an undecided image lacks nothing yet."""
    store_dir.put(WHOLE, "app:1", wanted=True)
    store_dir.put(LACKING, "app:2", wanted=True)
    unwanted = store_dir.put(image_of(b"unwanted"), "app:3", wanted=False)
    store_dir.put(list_of(WHOLE, unwanted), "app:list")
    store_dir.blobs(CONFIG)
    pulls = store_dir.root / "pulls" / "0"
    pulls.mkdir()
    undecided = PendingImage(unwanted.digest, image("reg.example/app:3").repository, undecided=True)
    PendingFiles(pulls, Files()).write(undecided)
    result = ask("--json")
    told = json.loads(result.out)
    assert (result.status, told["status"], told["version"], told["reasons"]) == (2, "stopped", __version__, [])
    assert told["incomplete"] == {"images": 3, "bytes": len(LAYER) + len(OTHER), "pending": 1}
    size = sum(path.stat().st_size for path in store_dir.root.rglob("*") if path.is_file())
    assert told["store"] == {"path": str(store_dir.root), "lists": 1, "images": 3, "bytes": size, "blobs": 1}
    assert 0 < told["disk"]["free"] <= told["disk"]["size"]


def test_unreadable_record_is_a_warning(store_dir: StoreDir, ask: Ask) -> None:
    (store_dir.root / "img" / ("0" * 64)).write_text("{")
    result = ask()
    assert result.status == 2
    assert result.err.startswith("ociregistry: warning: ignored, not a record that can be served: ")


def test_store_that_does_not_exist(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    result = run(capfd, "--image-path", root / "none", "status")
    assert (result.status, result.out) == (2, "")
    assert (
        result.err
        == f"ociregistry: no daemon runs, and there is no store at {root / 'none'} (--image-path names another)\n"
    )


def test_store_that_is_emptied_between_two_looks_is_still_watched(store_dir: StoreDir) -> None:
    """The daemon makes its folders again."""
    watched = facts.Facts(store_dir.root)
    for _ in range(2):
        assert watched.read()["store"]["images"] == 0
        for folder in store_dir.root.iterdir():
            folder.rmdir()
    assert list(store_dir.root.iterdir()) == []


def test_words_are_refused(capfd: pytest.CaptureFixture[str]) -> None:
    assert "only options are expected here" in usage_error(capfd, "status", "now")


@contextmanager
def daemon_answering(root: Path, answer: bytes | None) -> Iterator[None]:
    """Listen like a daemon that gives this answer to each request, or with None closes the connection."""
    folder = root / "pulls" / "0"
    folder.mkdir(parents=True, exist_ok=True)

    def serve() -> None:
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            # A connection that only tried whether a daemon listens sends nothing.
            with connection:
                if connection.recv(65536) and answer is not None:
                    connection.sendall(answer)

    with ExitStack() as stack:
        control_socket = stack.enter_context(closing(ControlSocket(folder)))
        listening = stack.enter_context(socket.socket(socket.AF_UNIX))
        listening.bind(control_socket.path)
        listening.listen()
        thread = threading.Thread(target=serve)
        thread.start()
        stack.callback(thread.join)
        # Closing it alone would not wake the thread.
        stack.callback(listening.shutdown, socket.SHUT_RDWR)
        yield


def answered(body: bytes, status: int = 200) -> bytes:
    """Return an HTTP answer."""
    return b"HTTP/1.1 %d x\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%b" % (status, len(body), body)


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (answered(b"{}", 404), "tells no status: is it of an earlier version? Restart it"),
        (answered(b"no JSON"), "tells no status: is it of an earlier version? Restart it"),
        (answered(b"[]"), "tells no status: is it of an earlier version? Restart it"),
        (answered(b'{"version": "9.9", "status": "ok"}'), "another status than this version, '9.9': restart it"),
        (
            answered(b'{"version": 7, "status": "odd", "reasons": 1}'),
            "another status than this version, 7: restart it",
        ),
    ],
)
def test_daemon_of_another_version_is_one_line(root: Path, ask: Ask, answer: bytes, why: str) -> None:
    with daemon_answering(root, answer):
        result = ask()
    assert (result.status, result.out) == (1, "")
    assert result.err.startswith("ociregistry: the daemon ")
    assert result.err.endswith(f"{why}\n")


def test_json_is_passed_on_as_it_is(root: Path, ask: Ask) -> None:
    for state, status in (("ok", 0), ("degraded", 1), ("of another version", 1)):
        with daemon_answering(root, answered(json.dumps({"status": state, "new": "\x1b[2J"}).encode())):
            result = ask("--json")
        assert (result.status, json.loads(result.out)) == (status, {"status": state, "new": "\x1b[2J"})
        assert "\x1b" not in result.out
        (root / "pulls" / "0" / "socket").unlink()


def test_daemon_that_ends_meanwhile_does_not_run(store_dir: StoreDir, ask: Ask) -> None:
    with daemon_answering(store_dir.root, None):
        assert ask().status == 2


def test_daemon_that_accepts_no_connection_is_silent(root: Path, ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither one that does not answer, nor one beside which many wait to be accepted, takes for ever."""
    monkeypatch.setattr(facts, "_WITHIN", 0.2)
    folder = root / "pulls" / "0"
    folder.mkdir(parents=True)
    with ExitStack() as stack:
        control_socket = stack.enter_context(closing(ControlSocket(folder)))
        listening = stack.enter_context(socket.socket(socket.AF_UNIX))
        listening.bind(control_socket.path)
        listening.listen(3)
        for _ in range(4):
            result = ask()
            assert (result.status, result.out) == (1, "")
            assert result.err == f"ociregistry: the daemon on {root} runs, but has not answered within 0 s\n"
