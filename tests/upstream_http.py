"""The parts of the scripted registry: requests, answers, rules, and the connection."""

from __future__ import annotations

import fcntl
import json
import socket
import struct
import termios
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from http import HTTPStatus
from typing import Literal
from urllib.parse import parse_qs

PIECE = 64 * 1024
POLL = 0.02

Headers = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Request:
    """A request as received, and the progress of its answer."""

    method: str
    path: str
    query: str
    headers: Headers
    connection: int
    body: bytes = b""
    status: int | None = None
    sent: int = 0
    done: bool = False

    def values(self, name: str) -> tuple[str, ...]:
        """Return all values of a header, in order."""
        return tuple(value for key, value in self.headers if key.lower() == name.lower())

    def header(self, name: str) -> str | None:
        """Return the first value of a header."""
        return next(iter(self.values(name)), None)

    def parameters(self, name: str) -> tuple[str, ...]:
        """Return all values of a query parameter, decoded."""
        return tuple(parse_qs(self.query, keep_blank_values=True).get(name, ()))


@dataclass(frozen=True)
class Answer:
    """What to send, and actions on the way.

    `start` is the offset of `body` in the whole object. Each stop runs when that many bytes of the body are sent; a
    negative one runs before the headers.
    """

    status: int
    headers: Headers = ()
    body: bytes = b""
    start: int = 0
    framing: Literal["length", "chunked", "close"] = "length"
    declared: int | None = None
    rate: float | None = None
    stops: tuple[tuple[int, Callable[[Wire], None]], ...] = ()

    def with_header(self, name: str, value: str | None) -> Answer:
        """Return a copy with this header set, or without it."""
        kept = tuple(header for header in self.headers if header[0].lower() != name.lower())
        return replace(self, headers=kept if value is None else (*kept, (name, value)))

    def with_stop(self, after: int | None, action: Callable[[Wire], None]) -> Answer:
        """Return a copy with an action after that many bytes of the body; None: before the headers."""
        return replace(self, stops=(*self.stops, (-1 if after is None else after, action)))


Handler = Callable[[Request], Answer]


class Rule:
    """A rule between a request and its answer: it may change either, or answer without calling `handler`."""

    def concerns(self, method: str) -> bool:
        """Whether the rule is for this method. A rule about the body's transfer is not for HEAD."""
        return True

    def __call__(self, request: Request, handler: Handler) -> Answer:
        """Return the answer to give; the base class returns that of `handler`."""
        return handler(request)


def error(status: int, code: str, message: str = "") -> Answer:
    """Make an answer with the error body of the OCI distribution spec."""
    body = json.dumps({"errors": [{"code": code, "message": message, "detail": None}]}).encode()
    return Answer(status, (("Content-Type", "application/json"),), body)


class Wire:
    """Sends one answer over a connection and reports every byte of its body that the kernel has taken."""

    def __init__(self, connection: socket.socket, closing: threading.Event, sent: Callable[[int], None]) -> None:
        self._connection = connection
        self._closing = closing
        self._sent = sent

    def send(self, answer: Answer, *, headers_only: bool) -> bool:
        """Send the answer; return whether the connection can carry another one."""
        body = memoryview(b"" if headers_only else answer.body)
        stops = sorted(answer.stops, key=lambda stop: stop[0])
        for after, action in stops:
            if after < 0:
                action(self)
        self._connection.sendall(_head(answer))
        started, position = time.monotonic(), 0
        for after, action in stops if not headers_only else ():
            if 0 <= after <= len(body):
                self._write(body, position, after, answer, started)
                position = after
                action(self)
        self._write(body, position, len(body), answer, started)
        if answer.framing == "chunked" and not headers_only:
            self._connection.sendall(b"0\r\n\r\n")
        return answer.framing != "close" and answer.declared is None

    def wait(self, event: threading.Event) -> None:
        """Wait until `event` is set, or the registry closes."""
        while not event.wait(POLL):
            self._give_up_when_closing()

    def cut(self, *, reset: bool) -> None:
        """End the connection, with FIN or with RST, once the peer has received what was sent so far."""
        if reset:
            # RST discards what still waits in our kernel, and a test needs the peer to have N bytes.
            while _unacknowledged(self._connection):
                self._give_up_when_closing(POLL / 10)
            self._connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self._connection.close()
        raise ConnectionAbortedError("cut as scripted")

    def _write(self, body: memoryview, start: int, end: int, answer: Answer, started: float) -> None:
        size = max(1, int(answer.rate * POLL)) if answer.rate else PIECE
        for position in range(start, end, size):
            piece = body[position : min(position + size, end)]
            if answer.framing == "chunked":
                self._connection.sendall(b"%x\r\n" % len(piece))
            self._push(piece)
            if answer.framing == "chunked":
                self._connection.sendall(b"\r\n")
            if answer.rate:
                self._give_up_when_closing(started + (position + len(piece)) / answer.rate - time.monotonic())

    def _push(self, piece: memoryview) -> None:
        while piece:
            # Counted before sending and corrected after: a byte that was received must never be missing from the
            # count.
            self._sent(len(piece))
            count = 0
            try:
                count = self._connection.send(piece)
            finally:
                self._sent(count - len(piece))
            piece = piece[count:]

    def _give_up_when_closing(self, wait: float = 0) -> None:
        if self._closing.wait(max(0, wait)):
            raise ConnectionAbortedError("the registry closes")


def _head(answer: Answer) -> bytes:
    headers = list(answer.headers)
    if answer.framing == "chunked":
        headers.append(("Transfer-Encoding", "chunked"))
    elif answer.framing == "length":
        headers.append(("Content-Length", str(len(answer.body) if answer.declared is None else answer.declared)))
    if answer.framing == "close" or answer.declared is not None:
        headers.append(("Connection", "close"))
    lines = [
        f"HTTP/1.1 {answer.status} {HTTPStatus(answer.status).phrase}",
        *(f"{k}: {v}" for k, v in headers),
    ]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def _unacknowledged(connection: socket.socket) -> int:
    """Return how many bytes the peer's kernel has not acknowledged yet; 0 when it is gone."""
    if connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
        return 0
    waiting: int = struct.unpack("i", fcntl.ioctl(connection.fileno(), termios.TIOCOUTQ, bytes(4)))[0]
    return waiting
