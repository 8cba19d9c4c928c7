"""Clients that compare answers byte for byte, and requests made up for them."""

from __future__ import annotations

import random
import re
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass

PATIENCE = 30.0
"""Seconds without a byte after which the daemon counts as hung."""

_DATE = re.compile(rb"\r\nDate: [^\r]*")
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


@dataclass(frozen=True)
class Answer:
    """An answer without its date, and whether the connection ended with it."""

    head: bytes
    body: bytes
    ended: bool

    def __str__(self) -> str:
        return f"{self.head!r} {len(self.body)} bytes{', ended' if self.ended else ''}"


class Client:
    """A connection that `connect` opens, and opens again after its end."""

    def __init__(self, connect: Callable[[], socket.socket], piece: int = 1 << 20) -> None:
        """Read at most `piece` bytes at once."""
        self._connect = connect
        self._piece = piece
        self._socket: socket.socket | None = None
        self._received = bytearray()

    def close(self) -> None:
        """Close the connection."""
        if self._socket is not None:
            self._socket.close()
        self._socket = None
        self._received.clear()

    def send(self, data: bytes) -> None:
        """Send bytes."""
        if self._socket is None:
            self._socket = self._connect()
            self._socket.settimeout(PATIENCE)
        self._socket.sendall(data)

    def ask(self, request: bytes, *, as_sent: bytes | None = None) -> Answer:
        """Send a request, or instead `as_sent`, which means the same; return its answer."""
        self.send(as_sent or request)
        last = b" HTTP/1.1\r\n" not in request
        return self.answer(head=request.startswith(b"HEAD "), last=last)

    def answer(self, *, head: bool = False, last: bool = False, pause: Callable[[], object] = lambda: None) -> Answer:
        """Receive one answer, to a HEAD request if `head`; `pause` is called before each read.

        With `last`, or where the answer says so, the connection is to end after it.
        """
        assert self._socket is not None
        ended = False
        while (end := self._received.find(b"\r\n\r\n")) < 0 or self._received.startswith(_CONTINUE):
            if self._received.startswith(_CONTINUE):
                del self._received[: len(_CONTINUE)]
            elif not (ended := not self._read(pause)):
                continue
            else:
                break
        start = bytes(self._received[: end + 4])
        length = re.search(rb"\r\nContent-Length: ([0-9]+)\r\n", start)
        closes = last or not length or b"\r\nConnection: close\r\n" in start
        wanted = 0 if head or not length else int(length[1])
        while len(self._received) < len(start) + wanted or closes:
            if not self._read(pause):
                ended = True
                break
        count = len(self._received) if ended else len(start) + wanted
        body = bytes(self._received[len(start) : count])
        del self._received[:count]
        if ended:
            self.close()
        return Answer(_DATE.sub(b"", start), body, ended)

    def _read(self, pause: Callable[[], object]) -> bool:
        assert self._socket is not None
        pause()
        try:
            data = self._socket.recv(self._piece)
        except ConnectionError:
            data = b""
        self._received += data
        return bool(data)


def usual(request: bytes) -> bytes:
    """Return bytes that mean the same request, and never take the short way: an empty line is to be ignored."""
    return b"\r\n" + request


@dataclass(frozen=True)
class Made:
    """A request that was made up."""

    data: bytes
    path: str
    """What it asks for, below /v2/."""
    plain: bool
    """Whether its answer may be remembered."""

    @property
    def line(self) -> bytes:
        """The request line."""
        return self.data.partition(b"\r\n")[0]


_HARMLESS = [
    *(
        "Accept: */*",
        "accept: application/vnd.oci.image.index.v1+json, application/json;q=0.5",
        "Accept-Encoding: gzip",
    ),
    *("User-Agent: containerd/2.0", "Authorization: Bearer x", "connection:keep-alive", "Connection: Keep-Alive"),
    *("X-Long: " + "y" * 500, "X-Empty:", "Host: else.example", "Cache-Control: no-cache", "Accept-Language:   de  "),
    *("X-!#$%&'*+.^_`|~: a", "Origin: http://x", "Forwarded: for=1.2.3.4", "X-Range: bytes=0-1", "Pragma: x:y:z"),
]
_UNUSUAL = [
    *(
        "Range: bytes=0-0",
        "Range: bytes=5-",
        "Range: bytes=-7",
        "range: bytes=0-",
        "Range: bytes=9999999-",
        "Range: x",
    ),
    *(
        "If-Range: x",
        'If-None-Match: "x"',
        "If-Modified-Since: x",
        "Via: 1.1 other",
        "Expect: 100-continue",
    ),
    *("Expect: x", "Content-Length: 0", "Content-Type: text/plain", "Connection: close", "Connection: keep-alive, x"),
    *("Connection: Upgrade", "Upgrade: h2c", "TE: trailers", "Trailer: x", "Cookie: a=b; c", "X: a\r\n b", "X: \xe4"),
    *("X: a\tb", "X : a", "no colon", "Content-Length: x", "Transfer-Encoding: identity", "X: \x01", "Via:"),
    *("Connection:  close ", "X: " + "z" * 4200),
]
_METHODS = ["GET"] * 12 + ["HEAD"] * 4 + ["PUT", "DELETE", "OPTIONS", "get", "Head", "G"]
_VERSIONS = ["HTTP/1.1"] * 20 + ["HTTP/1.0", "HTTP/1.2", "http/1.1", "HTTP/2.0"]


def _letters(text: str, chance: random.Random) -> str:
    """Percent-encode some of the letters and digits."""
    return "".join(f"%{ord(c):02x}" if c.isalnum() and chance.random() < 0.05 else c for c in text)


def make_request(chance: random.Random, paths: Sequence[str], host: str, series: str = "") -> Made:
    """Make up a request for one of the `paths` below /v2/ of the upstream `host`.

    Requests of another `series` have other targets.
    """
    asked = chance.choice(paths)
    path = _letters(asked, chance) if chance.random() < 0.2 else asked
    spelled = chance.choice([host, host.replace(":", "%3A"), host.replace(".", "%2e")]) + f"&y={series}"
    target = chance.choice(
        [f"/v2/{path}?ns={spelled}"] * 6
        + [
            f"/v2/{host}/{path}?y={series}",
            f"/v2/{path}?x=1&ns={spelled}",
            f"/v2/{path}?ns={spelled}&ns=else.example",
        ]
        + [f"/v2/{path}?ns={spelled}&x={chance.randrange(20)}", f"http://cache/v2/{path}?ns={spelled}"]
        + [f"/v2//{path}?ns={spelled}", f"/v2/{path}/?ns={spelled}", f"/v2/{path}?ns={spelled}#x"]
    )
    method, version = chance.choice(_METHODS), chance.choice(_VERSIONS)
    headers = chance.sample(_HARMLESS, chance.randrange(4))
    unusual = chance.sample(_UNUSUAL, chance.choice([0, 0, 0, 0, 0, 1, 1, 2]))
    headers = [*chance.choice([["Host: cache"], ["Host: cache"], ["host:"], []]), *headers, *unusual]
    chance.shuffle(headers)
    lines = [f"{method} {target} {version}", *headers, "", ""]
    plain = method in ("GET", "HEAD") and version == "HTTP/1.1" and not unusual
    return Made("\r\n".join(lines).encode("latin-1"), asked, plain)
