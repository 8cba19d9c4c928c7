"""What the fuzz tests share: a wire that takes any bytes, and what must hold whatever was sent."""

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
"""Seconds without a byte: no answer here needs the network."""

CATALOG_OF_HEADERS = frozenset(
    {
        *("accept-ranges", "allow", "connection", "content-length", "content-range", "content-type", "date", "etag"),
        *("docker-content-digest", "docker-distribution-api-version", "link", "oci-filters-applied"),
        *("oci-namespace", "retry-after", "server", "x-content-type-options"),
    }
)

_HEX = "(?:[0-9a-f]{64}|[0-9a-f]{128})"
_STORED = re.compile(
    rf"(?:blobs|fat|img)/{_HEX}|pulls/lock|pulls/\d+/(?:lock|socket)|pulls/\d+/{_HEX}(?:\.note|\.new|\.note\.new|\.record|\.wish(?:\.new)?)?"
)
_FOLDERS = re.compile(r"|blobs|fat|img|pulls|pulls/\d+|pulls/\d+/bad")

# What Python and the C library look at by themselves, to import a module late or to look up a host; and what
# tells one run of the machine from the next.
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
        ),
        *("/etc/ld.so.cache", "/proc/sys/kernel/random/boot_id"),
    }
)

_OWN_SOCKET = re.compile(r"/proc/self/fd/\d+/socket")
"""That in the daemon's pulls/<n>/, by a short path."""

Header = tuple[bytes, bytes]


@dataclass(frozen=True)
class Answer:
    """What came back."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Wire:
    """A connection that is kept, for requests that may be malformed; `connect` opens it, and opens it again."""

    def __init__(self, connect: Callable[[], socket.socket]) -> None:
        self._connect = connect
        self._socket: socket.socket | None = None
        self._file: io.BufferedReader | None = None

    def close(self) -> None:
        """Give the connection back."""
        for end in (self._file, self._socket):
            if end is not None:
                end.close()
        self._socket = self._file = None

    def ask(self, method: bytes, target: bytes, headers: Sequence[Header] = (), body: bytes = b"") -> Answer | None:
        """The answer to a request line and headers that may hold any bytes but CR LF.

        None when the connection was closed without one, as HTTP allows for what is no request at all.
        """
        lines = [method + b" " + target + b" HTTP/1.1", *(name + b": " + value for name, value in headers)]
        if body:
            lines.append(b"Content-Length: %d" % len(body))
        return self.say(b"".join(line.replace(b"\r\n", b"\n") + b"\r\n" for line in lines) + b"\r\n" + body)

    def say(self, request: bytes) -> Answer | None:
        """The answer to these bytes."""
        if self._socket is None:
            self._socket = self._connect()
            self._socket.settimeout(HANGS)
            self._file = self._socket.makefile("rb")
        assert self._file is not None
        answer: Answer | None = None
        ended = True
        try:
            with suppress(ConnectionError):  # it may be closed while we speak; what it said can still be read
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
        """The next answer but 1xx, and whether the connection ends with it."""
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


def check(answer: Answer | None, statuses: frozenset[int], method: bytes = b"GET") -> None:
    """What holds for every answer, whatever was asked."""
    if answer is None:
        return
    assert answer.status in statuses, answer
    assert answer.headers.keys() <= CATALOG_OF_HEADERS, answer
    if not answer.headers.get("server", "").startswith("ociregistry/"):
        # Twisted's own word on what is no HTTP, after which it closes the connection, and on the target *.
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


def check_log(daemon: Daemon) -> None:
    """No defect was logged, and nobody wrote lines of his own into it."""
    log = daemon.log
    for word in ("Traceback", "#critical]", "nhandled"):
        assert word not in log, log[max(0, log.index(word) - 500) : log.index(word) + 3000]
    for line in log.removesuffix("\n").split("\n"):
        assert line.isprintable(), repr(line)
        assert re.match(r"\d{4}-\d\d-\d\dT\S+ \[", line), repr(line)


def check_store(root: Path) -> None:
    """Every file in the store has a name of the expected form."""
    for path in root.rglob("*"):
        name = str(path.relative_to(root))
        assert (_FOLDERS if path.is_dir() else _STORED).fullmatch(name), name
        assert not path.is_symlink(), name


def check_trace(trace: Path, daemon: Daemon, imported: Sequence[str]) -> int:
    """Every path that the daemon gave to the kernel, by the word of strace, is one of the store or harmless.

    Gives the number of those in the store. `imported` are the folders that modules come from. What was opened
    before the store was, when no request could be answered yet, is not looked at.
    """
    root = str(daemon.image_path)
    _, opened, rest = trace.read_text(errors="replace").partition(f'"{root}/pulls/0/lock"')
    assert opened
    inside = 0
    for line in rest.splitlines()[1:]:
        if " getcwd(" in line:  # what the kernel says, not what it is asked
            continue
        for path in re.findall(r'(?:\(|, )"((?:[^"\\]|\\.)+)"', line):
            if path == root or path.startswith(f"{root}/"):
                name = path[len(root) + 1 :]
                assert _STORED.fullmatch(name) or _FOLDERS.fullmatch(name), line
                inside += 1
            else:
                harmless = path in _HARMLESS or _OWN_SOCKET.fullmatch(path)
                assert harmless or f"{path}/".startswith((*_SYSTEM, *imported)), line
                assert ".." not in path.split("/"), line
    return inside
