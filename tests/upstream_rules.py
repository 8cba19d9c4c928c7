"""Faults of an upstream, as rules for the scripted registry: `registry.script(path, Cut(1000))`.

"After N" counts the bytes of the body of one answer; an offset counts those of the whole blob or manifest.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field, replace
from typing import Literal

from tests.upstream_http import Answer, Handler, Headers, Request, Rule, Wire, error


@dataclass(frozen=True)
class Reply(Rule):
    """Answer every request with this."""

    status: int
    body: bytes = b""
    headers: Headers = ()

    def __call__(self, request: Request, handler: Handler) -> Answer:
        """Return the answer without calling the handler."""
        return Answer(self.status, self.headers, self.body)


@dataclass(frozen=True)
class Below(Rule):
    """Serve the API below a path such as `/prefix`, as a reverse proxy does."""

    prefix: str

    def __call__(self, request: Request, handler: Handler) -> Answer:
        """The answer for the path without the prefix."""
        return handler(replace(request, path=request.path.removeprefix(self.prefix)))


@dataclass(frozen=True)
class Redirect(Rule):
    """Redirect to the same path at `to`, such as `http://127.0.0.1:5000`."""

    to: str
    status: int = 307

    def __call__(self, request: Request, handler: Handler) -> Answer:
        """Return the redirect without calling the handler."""
        query = f"?{request.query}" if request.query else ""
        return Answer(self.status, (("Location", f"{self.to}{request.path}{query}"),))


@dataclass(frozen=True)
class Hold(Rule):
    """Hold back after N bytes of the body (None: before the headers) until `release` is set.

    `reached` is set when an answer is held; its N bytes are with the kernel by then.
    """

    after: int | None = None
    release: threading.Event = field(default_factory=threading.Event)
    reached: threading.Event = field(default_factory=threading.Event)

    def concerns(self, method: str) -> bool:
        """Apply to methods with a body only, unless the headers are held."""
        return self.after is None or method != "HEAD"

    def __call__(self, request: Request, handler: Handler) -> Answer:
        """Add a stop to the handler's answer."""
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
        """Apply to methods with a body only, unless the headers are cut."""
        return self.after is None or method != "HEAD"

    def __call__(self, request: Request, handler: Handler) -> Answer:
        """Add a stop to the handler's answer."""
        return handler(request).with_stop(self.after, lambda wire: wire.cut(reset=self.reset))


@dataclass(frozen=True)
class Drip(Rule):
    """Send the body at this many bytes a second."""

    rate: float

    def concerns(self, method: str) -> bool:
        """Apply to methods with a body."""
        return method != "HEAD"

    def __call__(self, request: Request, handler: Handler) -> Answer:
        """Slow down the handler's answer."""
        return replace(handler(request), rate=self.rate)


@dataclass(frozen=True)
class Flip(Rule):
    """Invert the byte at an offset of the whole object, in whichever answers contain it."""

    offset: int

    def concerns(self, method: str) -> bool:
        """Apply to methods with a body."""
        return method != "HEAD"

    def __call__(self, request: Request, handler: Handler) -> Answer:
        """Return the handler's answer with one byte inverted."""
        answer = handler(request)
        place = self.offset - answer.start
        if not 0 <= place < len(answer.body):
            return answer
        body = bytearray(answer.body)
        body[place] ^= 0xFF
        return replace(answer, body=bytes(body))


@dataclass(frozen=True)
class Resize(Rule):
    """Make the body longer by this many zero bytes, or shorter when negative, with matching headers."""

    by: int

    def __call__(self, request: Request, handler: Handler) -> Answer:
        """Return the handler's answer with the body changed."""
        answer = handler(request)
        size = len(answer.body) + self.by
        return replace(answer, body=answer.body[:size].ljust(size, b"\0"))


@dataclass(frozen=True)
class Declare(Rule):
    """Send a Content-Length that differs from the body by this many bytes; the connection ends after the body."""

    by: int

    def __call__(self, request: Request, handler: Handler) -> Answer:
        """Return the handler's answer with a false length."""
        answer = handler(request)
        return replace(answer, declared=len(answer.body) + self.by)


@dataclass(frozen=True)
class NoLength(Rule):
    """Send no Content-Length: the body is chunked, or ends with the connection."""

    framing: Literal["chunked", "close"] = "chunked"

    def __call__(self, request: Request, handler: Handler) -> Answer:
        """Return the handler's answer with other framing."""
        return replace(handler(request), framing=self.framing)


@dataclass(frozen=True)
class IgnoreRange(Rule):
    """Answer 200 with everything, also to a request with a Range."""

    def __call__(self, request: Request, handler: Handler) -> Answer:
        """Return the handler's answer to the request without its Range."""
        kept = tuple(header for header in request.headers if header[0].lower() != "range")
        return handler(replace(request, headers=kept))


@dataclass(frozen=True)
class ContentRange(Rule):
    """Answer 206 with this Content-Range instead of the right one, or with none."""

    value: str | None

    def __call__(self, request: Request, handler: Handler) -> Answer:
        """Change the header of a 206 only."""
        answer = handler(request)
        return answer.with_header("Content-Range", self.value) if answer.status == 206 else answer


@dataclass(frozen=True)
class Header(Rule):
    """Set a header of the answer, or remove it."""

    name: str
    value: str | None

    def __call__(self, request: Request, handler: Handler) -> Answer:
        """Return the handler's answer with this header changed."""
        return handler(request).with_header(self.name, self.value)


@dataclass(frozen=True)
class NeedUserAgent(Rule):
    """Refuse requests without a User-Agent, as the fronts of Docker Hub, Wikimedia and AWS do."""

    def __call__(self, request: Request, handler: Handler) -> Answer:
        """Return 403 for a request without one."""
        return handler(request) if request.header("User-Agent") else error(403, "DENIED", "no User-Agent")
