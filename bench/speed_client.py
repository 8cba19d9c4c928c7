"""The clients of the benchmark of speed: wrk, and readers of one big blob. They check every answer."""

from __future__ import annotations

import hashlib
import json
import socket
import ssl
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

from bench.speed_servers import Part
from tests.images import OCI_MANIFEST
from tests.processes import run

MOST_READERS = 4

_ACCEPT = OCI_MANIFEST
_PATIENCE = 120.0
_PIECE = 256 * 1024
"""Bytes; a larger buffer does not fit into the processor's cache."""
_HEADERS_END = b"\r\n\r\n"
_LONGEST_HEADERS = 4096
_HEAD_START = 0.2
"""Seconds from the order to read to the begin, so that all readers begin at once."""
# `done` alone costs nothing a request.
_SUMMARY = """
function done(summary, latency, requests)
    local errors = summary.errors
    local failed = errors.connect + errors.read + errors.write + errors.status + errors.timeout
    io.write(string.format('\\n{"requests": %d, "bytes": %d, "microseconds": %d, "failed": %d}\\n',
        summary.requests, summary.bytes, summary.duration, failed))
end
"""


class Wrk:
    """Runs wrk, with its script in a folder."""

    def __init__(self, folder: Path, seconds: int) -> None:
        self._script = folder / "summary.lua"
        self._script.write_text(_SUMMARY)
        self._seconds = seconds

    def rate(self, url: str, part: Part, connections: int) -> float:
        """Return the requests a second for one URL.

        Raises:
            RuntimeError: an answer was an error, or had another size.
        """
        load = ["--threads", "1", "--connections", str(connections), "--duration", f"{self._seconds}s"]
        # A slow answer is no error.
        options = ["--timeout", f"{_PATIENCE:.0f}s", "--header", f"Accept: {_ACCEPT}", "--script", str(self._script)]
        said = run(["wrk", *load, *options, url]).stdout
        found = json.loads(said.splitlines()[-1])
        # The answers that are not complete at the end count as bytes, not as requests.
        most = (found["requests"] + connections) * (part.size + _LONGEST_HEADERS)
        right = found["requests"] > 0 and found["requests"] * part.size < found["bytes"] < most
        if found["failed"] or not right:
            raise RuntimeError(f"{url}: not every answer was right: {said}")
        return float(found["requests"] / found["microseconds"] * 1e6)


class Connection:
    """A connection to one server, for one request after the other, over TLS when there is an authority `ca`."""

    def __init__(self, url: str, ca: Path | None) -> None:
        self._url = url
        self._host = urlsplit(url).netloc
        self._context = ssl.create_default_context(cafile=str(ca)) if ca else None
        # Without a copy there is less of the reader in the figures.
        self._flags = 0 if ca else socket.MSG_TRUNC
        self._socket = self._connected()
        self._is_last = False

    def _connected(self) -> socket.socket:
        address, _, port = self._host.partition(":")
        plain = socket.create_connection((address, int(port)), timeout=_PATIENCE)
        return self._context.wrap_socket(plain, server_hostname=address) if self._context else plain

    def close(self) -> None:
        """Close it."""
        self._socket.close()

    def request(self, url: str, size: int) -> bytes:
        """Send a request; return the first bytes of the body as soon as there are any.

        It connects anew when the server announced with the answer before that it closes; nginx does after 1,000.

        Raises:
            RuntimeError: the answer is not 200 with `size` bytes.
        """
        if self._is_last:
            self._socket.close()
            self._socket = self._connected()
        parts = urlsplit(url)
        target = f"{parts.path}?{parts.query}" if parts.query else parts.path
        wanted = f"GET {target} HTTP/1.1\r\nHost: {self._host}\r\nAccept: {_ACCEPT}\r\n\r\n"
        self._socket.sendall(wanted.encode())
        received = b""
        while not (received.partition(_HEADERS_END)[2] if _HEADERS_END in received else b""):
            if not (piece := self._socket.recv(65536)):
                raise RuntimeError(f"{url}: the connection ended: {received!r}")
            received += piece
        head, _, body = received.partition(_HEADERS_END)
        status, *headers = head.decode("latin-1").lower().split("\r\n")
        if " 200" not in status or f"content-length: {size}" not in headers:
            raise RuntimeError(f"{url}: 200 with {size} bytes was expected: {head!r}")
        self._is_last = "connection: close" in headers
        return body

    def receive(self, url: str, size: int) -> None:
        """Send a request, and receive the whole answer.

        Raises:
            RuntimeError: the answer is not 200 with `size` bytes, or ends early.
        """
        left = size - len(self.request(url, size))
        buffer = bytearray(min(left, _PIECE))
        while left:
            left -= self.discard(left, buffer)

    def discard(self, count: int, buffer: bytearray) -> int:
        """Receive at most `count` bytes, and forget them; return how many.

        Raises:
            RuntimeError: the connection ended.
        """
        return self._received(self._socket.recv_into(buffer, min(count, len(buffer)), self._flags))

    def fill(self, view: memoryview) -> int:
        """Receive bytes into the view; return how many.

        Raises:
            RuntimeError: the connection ended.
        """
        return self._received(self._socket.recv_into(view))

    def _received(self, count: int) -> int:
        if not count:
            raise RuntimeError(f"{self._url}: the body ended early")
        return count


@dataclass(frozen=True)
class Timing:
    """Seconds from before the connection to the first byte of a body, and to its last."""

    first: float
    all: float


class CheckedReader:
    """Reads parts into memory that is touched beforehand, and compares digests when the time is taken."""

    def __init__(self, largest: int) -> None:
        self._memory = bytearray(b"\x01") * largest

    def read(self, url: str, part: Part, ca: Path | None) -> Timing:
        """Read a part over a new connection.

        Raises:
            RuntimeError: the answer is not 200, or has another length or digest.
        """
        view = memoryview(self._memory)[: part.size]
        began = time.monotonic()
        with closing(Connection(url, ca)) as connection:
            body = connection.request(url, part.size)
            first = time.monotonic() - began
            view[: len(body)] = body
            done = len(body)
            while done < part.size:
                done += connection.fill(view[done:])
            timing = Timing(first, time.monotonic() - began)
        if f"sha256:{hashlib.sha256(view).hexdigest()}" != part.digest:
            raise RuntimeError(f"{url}: wrong bytes")
        return timing


@dataclass(frozen=True)
class _Order:
    """To read one part again and again for some seconds, from a time of the monotonic clock."""

    url: str
    size: int
    ca: Path | None
    begin: float
    seconds: float


@dataclass(frozen=True)
class Volume:
    """The bytes a second in the time given, and all bytes, also those after it."""

    rate: float
    bytes: int


def _read(order: _Order) -> Volume:
    """Read in one process. The answer that is under way at the end is read to its end."""
    buffer = bytearray(_PIECE)
    in_time = received = 0
    with closing(Connection(order.url, order.ca)) as connection:
        time.sleep(max(0.0, order.begin - time.monotonic()))
        end = time.monotonic() + order.seconds
        while not received or time.monotonic() < end:
            left = order.size
            count = len(connection.request(order.url, order.size))
            while True:
                left -= count
                received += count
                if time.monotonic() < end:
                    in_time = received
                if not left:
                    break
                count = connection.discard(left, buffer)
    return Volume(in_time / order.seconds, received)


class Readers:
    """Processes that read one part at the same time. All have started when this is made."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        processes = get_context("spawn")
        started = processes.Barrier(MOST_READERS + 1)
        self._pool = processes.Pool(MOST_READERS, started.wait)
        started.wait(_PATIENCE)

    def __enter__(self) -> Self:
        """Return the readers."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the processes."""
        self._pool.terminate()
        self._pool.join()

    def read(self, url: str, part: Part, ca: Path | None, readers: int) -> Volume:
        """Let that many processes read for the time given.

        Raises:
            RuntimeError: an answer was not right.
        """
        order = _Order(url, part.size, ca, time.monotonic() + _HEAD_START, self._seconds)
        found: Sequence[Volume] = self._pool.map(_read, [order] * readers, chunksize=1)
        return Volume(sum(volume.rate for volume in found), sum(volume.bytes for volume in found))
