"""Tools of the fuzz tests: a connection that sends any bytes, and conditions for every answer."""

from __future__ import annotations

import hashlib
import io
import json
import re
import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tests.processes import Daemon

HANGS = 20.0
"""Seconds without a byte after which the daemon counts as hung: no answer here needs the network."""

CATALOG_OF_HEADERS = frozenset(
    {
        *("accept-ranges", "allow", "connection", "content-length", "content-range", "content-type", "date", "etag"),
        *("docker-content-digest", "docker-distribution-api-version", "link", "oci-filters-applied"),
        *("oci-namespace", "retry-after", "server", "x-content-type-options"),
    }
)

_HEX = "(?:[0-9a-f]{64}|[0-9a-f]{128})"
_STORED = re.compile(
    rf"(?:blobs|fat|img)/{_HEX}|pulls/lock|pulls/\d+/(?:lock|socket)|"
    rf"pulls/\d+/{_HEX}(?:\.note|\.new|\.note\.new|\.record|\.blob|\.wish(?:\.new)?)?"
)
_FOLDERS = re.compile(r"|blobs|fat|img|pulls|pulls/\d+|pulls/\d+/bad")

# What Python and the C library read by themselves, to import a module late or to look up a host, and the id of the
# boot.
_SYSTEM = ("/usr/", "/lib/", "/lib64/", "/var/run/nscd/")
_HARMLESS = frozenset(
    {
        *(
            "/etc/hosts",
            "/etc/resolv.conf",
            "/etc/nsswitch.conf",
            "/etc/host.conf",
            "/etc/gai.conf",
            "/etc/localtime",
            "/dev/null",
            "/sys/devices/system/cpu/online",
        ),
        *("/etc/ld.so.cache", "/proc/sys/kernel/random/boot_id"),
    }
)

_OWN_SOCKET = re.compile(r"/proc/self/fd/\d+/socket")
"""The socket in the daemon's pulls/<n>/, by a short path."""

Header = tuple[bytes, bytes]


@dataclass(frozen=True)
class Answer:
    """An answer as received."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Wire:
    """A persistent connection for requests that may be malformed; `connect` opens it, and reopens it."""

    def __init__(self, connect: Callable[[], socket.socket]) -> None:
        self._connect = connect
        self._socket: socket.socket | None = None
        self._file: io.BufferedReader | None = None

    def close(self) -> None:
        """Close the connection."""
        for end in (self._file, self._socket):
            if end is not None:
                end.close()
        self._socket = self._file = None

    def ask(self, method: bytes, target: bytes, headers: Sequence[Header] = (), body: bytes = b"") -> Answer | None:
        """Send a request line and headers with any bytes but CR LF; return the answer.

        None when the connection was closed without an answer, which HTTP allows for what is not a request.
        """
        lines = [method + b" " + target + b" HTTP/1.1", *(name + b": " + value for name, value in headers)]
        if body:
            lines.append(b"Content-Length: %d" % len(body))
        return self.say(b"".join(line.replace(b"\r\n", b"\n") + b"\r\n" for line in lines) + b"\r\n" + body)

    def say(self, request: bytes) -> Answer | None:
        """Send these bytes; return the answer."""
        if self._socket is None:
            self._socket = self._connect()
            self._socket.settimeout(HANGS)
            self._file = self._socket.makefile("rb")
        assert self._file is not None
        answer: Answer | None = None
        ended = True
        try:
            with suppress(ConnectionError):  # It may be closed while we send; its answer can still be read.
                self._socket.sendall(request)
            answer, ended = self._read(self._file, head=request.startswith(b"HEAD "))
        except ConnectionError:
            answer = None
        finally:
            if ended:
                self.close()
        return answer

    @staticmethod
    def _read(file: io.BufferedReader, *, head: bool) -> tuple[Answer | None, bool]:
        """Read the next answer that is not 1xx, and whether the connection ends with it."""
        while True:
            line = file.readline()
            if not line:
                return None, True
            status = re.fullmatch(rb"HTTP/1\.1 (\d{3}) [\x20-\x7e]+\r\n", line)
            assert status, line
            headers: dict[str, str] = {}
            while (line := file.readline()) not in (b"\r\n", b""):
                name, colon, value = line.decode("ascii").removesuffix("\r\n").partition(": ")
                assert colon, line
                assert name.lower() not in headers, f"{name} twice"
                headers[name.lower()] = value
            if status[1] != b"100":
                break
        length = headers.get("content-length")
        close = headers.get("connection") == "close" or length is None or "server" not in headers
        body = b"" if head and "server" in headers else file.read() if close else file.read(int(length or 0))
        return Answer(int(status[1]), headers, body), close


def assert_valid(answer: Answer | None, statuses: frozenset[int], method: bytes = b"GET") -> None:
    """Assert what holds for every answer, to any request."""
    if answer is None:
        return
    assert answer.status in statuses, answer
    assert answer.headers.keys() <= CATALOG_OF_HEADERS, answer
    if not answer.headers.get("server", "").startswith("ociregistry/"):
        # Twisted's own answer to what is not HTTP, after which it closes the connection, and to the target *.
        assert (answer.status, answer.body) in ((400, b""), (405, b"")), answer
        return
    if method == b"HEAD":
        return
    assert answer.headers["content-length"] == str(len(answer.body)), answer
    if answer.status >= 400:
        (error,) = json.loads(answer.body)["errors"]
        assert error["code"]
        assert error["message"]
    elif answer.status == 200 and "docker-content-digest" in answer.headers:
        algorithm, _, wanted = answer.headers["docker-content-digest"].partition(":")
        assert hashlib.new(algorithm, answer.body).hexdigest() == wanted, answer


def assert_log_is_clean(daemon: Daemon) -> None:
    """Assert that no defect was logged, and that no request injected a line into the log."""
    log = daemon.log
    for word in ("Traceback", "#critical]", "nhandled"):
        assert word not in log, log[max(0, log.index(word) - 500) : log.index(word) + 3000]
    for line in log.removesuffix("\n").split("\n"):
        assert line.isprintable(), repr(line)
        assert re.match(r"\d{4}-\d\d-\d\dT\S+ \[", line), repr(line)


def assert_store_is_clean(root: Path) -> None:
    """Assert that every file in the store has a name of the expected form."""
    for path in root.rglob("*"):
        name = str(path.relative_to(root))
        assert (_FOLDERS if path.is_dir() else _STORED).fullmatch(name), name
        assert not path.is_symlink(), name


def assert_paths_are_allowed(trace: Path, daemon: Daemon, imported: Sequence[str]) -> int:
    """Assert that every path in strace's output is in the store or harmless; return how many are in the store.

    `imported` are the folders from which modules are imported. Paths opened before the store was, when no request
    could be answered yet, are ignored.
    """
    root = str(daemon.image_path)
    _, opened, rest = trace.read_text(errors="replace").partition(f'"{root}/pulls/0/lock"')
    assert opened
    inside = 0
    for line in rest.splitlines()[1:]:
        if " getcwd(" in line:  # information from the kernel, not an argument
            continue
        for path in re.findall(r'(?:\(|, )"((?:[^"\\]|\\.)+)"', line):
            if path == root or path.startswith(f"{root}/"):
                name = path[len(root) + 1 :]
                assert _STORED.fullmatch(name) or _FOLDERS.fullmatch(name), line
                inside += 1
            else:
                # It looks whether its configuration has changed.
                harmless = path in (*_HARMLESS, str(daemon.config_path)) or _OWN_SOCKET.fullmatch(path)
                assert harmless or f"{path}/".startswith((*_SYSTEM, *imported)), line
                assert ".." not in path.split("/"), line
    return inside
