"""What may go wrong at an upstream: rules for the scripted registry, as `registry.script(path, Cut(1000))`.

"After N" counts the bytes of the body of one answer, an offset those of the whole blob or manifest.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field, replace
from typing import Literal

from tests.upstream_http import Answer, Handler, Headers, Request, Rule, Wire, error


@dataclass(frozen=True)
class Reply(Rule):
    """Answer with this, whatever was asked."""

    status: int
    body: bytes = b""
    headers: Headers = ()

    def __call__(self, request: Request, handler: Handler) -> Answer:
        """Never asks the handler."""
        return Answer(self.status, self.headers, self.body)


@dataclass(frozen=True)
class Redirect(Rule):
    """Send the client to the same path at `to`, such as `http://127.0.0.1:5000`."""

    to: str
    status: int = 307

    def __call__(self, request: Request, handler: Handler) -> Answer:
        """Never asks the handler."""
        query = f"?{request.query}" if request.query else ""
        return Answer(self.status, (("Location", f"{self.to}{request.path}{query}"),))


@dataclass(frozen=True)
class Hold(Rule):
    """Hold back after N bytes of the body (None: before the headers) until `release` is set.

    `reached` tells that an answer stands there; its N bytes are in the kernel's hands by then.
    """

    after: int | None = None
    release: threading.Event = field(default_factory=threading.Event)
    reached: threading.Event = field(default_factory=threading.Event)

    def concerns(self, method: str) -> bool:
        """HEAD has headers only."""
        return self.after is None or method != "HEAD"

    def __call__(self, request: Request, handler: Handler) -> Answer:
        """The same, with a stop."""
        return handler(request).with_stop(self.after, self._hold)

    def _hold(self, wire: Wire) -> None:
        self.reached.set()
        wire.wait(self.release)


@dataclass(frozen=True)
class Cut(Rule):
    """End the connection after N bytes of the body (None: before the headers), with FIN or with RST."""

    after: int | None
    reset: bool = False

    def concerns(self, method: str) -> bool:
        """HEAD has headers only."""
        return self.after is None or method != "HEAD"

    def __call__(self, request: Request, handler: Handler) -> Answer:
        """The same, with a stop."""
        return handler(request).with_stop(self.after, lambda wire: wire.cut(reset=self.reset))


@dataclass(frozen=True)
class Drip(Rule):
    """Send the body at this many bytes a second."""

    rate: float

    def concerns(self, method: str) -> bool:
        """HEAD has no body."""
        return method != "HEAD"

    def __call__(self, request: Request, handler: Handler) -> Answer:
        """The same, but slow."""
        return replace(handler(request), rate=self.rate)


@dataclass(frozen=True)
class Flip(Rule):
    """Damage the byte at an offset of the whole object, wherever an answer carries it."""

    offset: int

    def concerns(self, method: str) -> bool:
        """HEAD has no body."""
        return method != "HEAD"

    def __call__(self, request: Request, handler: Handler) -> Answer:
        """The same with one byte inverted."""
        answer = handler(request)
        place = self.offset - answer.start
        if not 0 <= place < len(answer.body):
            return answer
        body = bytearray(answer.body)
        body[place] ^= 0xFF
        return replace(answer, body=bytes(body))


@dataclass(frozen=True)
class Resize(Rule):
    """A body that is longer by so many zero bytes, or shorter when negative; the headers agree with it."""

    by: int

    def __call__(self, request: Request, handler: Handler) -> Answer:
        """The same with another body."""
        answer = handler(request)
        size = len(answer.body) + self.by
        return replace(answer, body=answer.body[:size].ljust(size, b"\0"))


@dataclass(frozen=True)
class Declare(Rule):
    """A Content-Length that differs from the body by so many bytes; the connection ends after the body."""

    by: int

    def __call__(self, request: Request, handler: Handler) -> Answer:
        """The same body under a false length."""
        answer = handler(request)
        return replace(answer, declared=len(answer.body) + self.by)


@dataclass(frozen=True)
class NoLength(Rule):
    """No Content-Length: the body comes in chunks, or ends where the connection is closed."""

    framing: Literal["chunked", "close"] = "chunked"

    def __call__(self, request: Request, handler: Handler) -> Answer:
        """The same body, framed otherwise."""
        return replace(handler(request), framing=self.framing)


@dataclass(frozen=True)
class IgnoreRange(Rule):
    """Answer 200 with everything, also when a Range was asked for."""

    def __call__(self, request: Request, handler: Handler) -> Answer:
        """What the handler gives without a Range."""
        kept = tuple(header for header in request.headers if header[0].lower() != "range")
        return handler(replace(request, headers=kept))


@dataclass(frozen=True)
class ContentRange(Rule):
    """A 206 with this Content-Range instead of the right one, or with none."""

    value: str | None

    def __call__(self, request: Request, handler: Handler) -> Answer:
        """The same for everything but a 206."""
        answer = handler(request)
        return answer.with_header("Content-Range", self.value) if answer.status == 206 else answer


@dataclass(frozen=True)
class Header(Rule):
    """Set a header of the answer, or leave it out."""

    name: str
    value: str | None

    def __call__(self, request: Request, handler: Handler) -> Answer:
        """The same with this header changed."""
        return handler(request).with_header(self.name, self.value)


@dataclass(frozen=True)
class NeedUserAgent(Rule):
    """Refuse requests without a User-Agent, as the fronts of Docker Hub, Wikimedia and AWS do."""

    def __call__(self, request: Request, handler: Handler) -> Answer:
        """403 for a request without one."""
        return handler(request) if request.header("User-Agent") else error(403, "DENIED", "no User-Agent")
