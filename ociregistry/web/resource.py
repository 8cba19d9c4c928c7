"""Serves requests: calls the handler, sends its answer or its error, and writes the access and error log lines.

This is the only place that renders errors and logs failed requests.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from twisted.internet.address import IPv4Address, IPv6Address
from twisted.internet.defer import CancelledError, Deferred, succeed
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET, Request

from ociregistry import __version__
from ociregistry.context import Context, Via
from ociregistry.errors import MethodUnsupported, OutOfDescriptors, RegistryError, is_out_of_descriptors
from ociregistry.pullthrough.cache import Content
from ociregistry.web.channel import Channel, InFlight, host_and_port
from ociregistry.web.producer import SLOWEST, ContentProducer, SendLimits, SlowClient
from ociregistry.web.requests import Query, Range, parse_range

_log = Logger(namespace="ociregistry.web")


class InMemory:
    """Content that is held in memory."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    @property
    def size(self) -> int:
        """Size in bytes."""
        return len(self._data)

    def more_than(self, offset: int) -> Deferred[int]:
        """Return a Deferred that has fired with the size: all bytes are available."""
        return succeed(self.size)

    def read(self, offset: int, count: int) -> Deferred[bytes]:
        """Return a Deferred that has fired with at most `count` bytes from `offset` on."""
        return succeed(self._data[offset : offset + count])

    def close(self) -> None:
        """Do nothing: there is no file to close."""


class SizeOnly(InMemory):
    """Content of which only the size is known, for the answer to a HEAD request."""

    def __init__(self, size: int) -> None:
        super().__init__(b"")
        self._size = size

    @property
    def size(self) -> int:
        """Size in bytes of what a GET would return."""
        return self._size


@dataclass(frozen=True, slots=True)
class Answer:
    """An HTTP response: status, headers and content.

    `ranged` says whether Range requests apply. `hit` is True for a cache hit, False for a miss, and None where the
    cache is not involved.
    """

    status: int
    content: Content
    headers: Mapping[str, str] = field(default_factory=dict)
    ranged: bool = False
    hit: bool | None = None


def json_answer(
    status: int,
    document: object,
    headers: Mapping[str, str] | None = None,
    *,
    media_type: str = "application/json",
    hit: bool | None = None,
) -> Answer:
    """Make an answer whose body is `document` as JSON."""
    body = json.dumps(document).encode()
    return Answer(status, InMemory(body), {"Content-Type": media_type, **(headers or {})}, hit=hit)


def error_answer(error: RegistryError) -> Answer:
    """Make the answer for `error`; the body has the form of the specification's section "Error Codes"."""
    document = {"errors": [{"code": error.code, "message": error.message, "detail": None}]}
    return json_answer(error.status, document, error.headers())


Handler = Callable[[str, bytes, Query, Context], Coroutine[Deferred[Any], Any, Answer]]
"""A coroutine function that answers a method, a percent-encoded path, a query and the request's context; it raises
`RegistryError` for a request that fails."""

_COMMON_HEADERS = {
    "Docker-Distribution-API-Version": "registry/2.0",
    "Server": f"ociregistry/{__version__}",
    "X-Content-Type-Options": "nosniff",
}


class InternalError(RegistryError):
    """A bug in this program."""


class HandlerResource(Resource):
    """Answers all GET and HEAD requests at and below its path with one `handler`."""

    isLeaf = True

    def __init__(self, handler: Handler, in_flight: InFlight, limits: SendLimits, clock: IReactorTime) -> None:
        super().__init__()
        self._handler = handler
        self._in_flight = in_flight
        self._limits = limits
        self._clock = clock

    def render(self, request: Request) -> int:
        """Start to answer `request`. Never raises."""
        exchange = _Exchange(request, self._handler, self._limits, self._clock)
        self._in_flight.began()
        served = Deferred.fromCoroutine(exchange.serve())
        served.addErrback(exchange.fail)
        served.addBoth(lambda _: self._in_flight.ended())
        return NOT_DONE_YET


class _Exchange:
    """One request and its answer."""

    def __init__(self, request: Request, handler: Handler, limits: SendLimits, clock: IReactorTime) -> None:
        self._request = request
        self._handler = handler
        self._limits = limits
        self._clock = clock
        self._began = clock.seconds()
        self._method = _printable(request.method)
        self._gone = False
        self._failure_logged = False
        self._sending: Deferred[None] = succeed(None)
        request.notifyFinish().addErrback(self._disconnected)

    async def serve(self) -> None:
        """Answer the request; return when the answer is sent or the client is gone."""
        answer = await self._answer()
        try:
            if not self._gone:
                await self._send(answer)
        finally:
            answer.content.close()
        self._log_access(answer)

    def fail(self, failure: Failure) -> None:
        """Log a bug and close the connection, so that the client does not wait for more bytes."""
        self._log_defect(failure)
        if not self._gone:
            self._request.channel.loseConnection()

    def _disconnected(self, _: object) -> None:
        self._gone = True
        self._sending.cancel()

    async def _answer(self) -> Answer:
        request = self._request
        try:
            if self._method not in ("GET", "HEAD"):
                raise MethodUnsupported(f"{self._method} is not supported: this server is pull-only")
            header = b",".join(request.requestHeaders.getRawHeaders(b"via", []))
            # A command on the control socket: it has no address.
            patient = not hasattr(request.getClientAddress(), "port")
            context = Context(Via.parse(header.decode("latin-1")), patient=patient)
            return await self._handler(self._method, request.path, request.args, context)
        except RegistryError as error:
            return self._failed(error)
        except Exception as error:
            if is_out_of_descriptors(error):
                return self._failed(OutOfDescriptors(f"{self._path}: {error}"))
            self._log_defect(Failure())
            return error_answer(InternalError("an internal error"))

    def _failed(self, error: RegistryError) -> Answer:
        if isinstance(error, OutOfDescriptors):
            if self._limits.seldom.due():
                _log.error("out of file descriptors, requests get 503: {why}", why=error.message)
            return error_answer(OutOfDescriptors("this server has no file descriptor left for the request"))
        # What a client asked for in vain is no fault of this server or of a link.
        log = _log.info if error.status < 500 else _log.error
        self._log_failure(
            log, "{method} {path}: {status} {code}: {why}", status=error.status, why=error.message, code=error.code
        )
        return error_answer(error)

    async def _send(self, answer: Answer) -> None:
        answer, part = self._in_part(answer)
        request = self._request
        request.setResponseCode(answer.status)
        size = answer.content.size if part is None else part.stop - part.start
        headers = {**_COMMON_HEADERS, **answer.headers, "Content-Length": str(size)}
        if answer.ranged:
            headers["Accept-Ranges"] = "bytes"
        if part is not None:
            request.setResponseCode(206)
            headers["Content-Range"] = f"bytes {part.start}-{part.stop - 1}/{answer.content.size}"
        for name, value in headers.items():
            request.responseHeaders.setRawHeaders(name, [value])
        if self._method != "HEAD":
            # Send the headers now: the first byte of the content may take long to arrive.
            request.write(b"")
            await self._send_content(answer, part or Range(0, size))
        elif not self._gone:
            request.finish()

    def _in_part(self, answer: Answer) -> tuple[Answer, Range | None]:
        header, condition = self._header(b"range"), self._header(b"if-range")
        if not answer.ranged or header is None or self._method != "GET":
            return answer, None
        if condition is not None and condition != answer.headers.get("ETag"):
            return answer, None
        try:
            return answer, parse_range(header, answer.content.size)
        except RegistryError as error:
            return self._failed(error), None

    async def _send_content(self, answer: Answer, part: Range) -> None:
        in_memory = answer.content.size if isinstance(answer.content, InMemory) else 0
        producer = ContentProducer(self._request, answer.content, in_memory, self._limits, self._clock)
        self._sending = Deferred.fromCoroutine(producer.send(part.start, part.stop))
        try:
            await self._sending
        except CancelledError:
            return
        except Exception as error:
            self._end_short(error)
            return
        if not self._gone:
            self._request.finish()

    def _end_short(self, error: Exception) -> None:
        if isinstance(error, SlowClient):
            self._log_failure(_log.warn, "{method} {path}: {client}: {why}", why=error)
        elif isinstance(error, RegistryError | OSError):
            self._log_failure(_log.error, "{method} {path}: response truncated: {why}", why=error)
        else:
            self._log_defect(Failure())
        if self._gone:
            return
        channel = cast(Channel, self._request.channel)
        if isinstance(error, SlowClient):
            channel.abort()
        else:
            # No finish(): the client must receive fewer bytes than Content-Length, ended by a FIN, not an RST. The
            # timeout drops bytes that the client does not read in time.
            channel.setTimeout(SLOWEST)
            channel.loseConnection()

    def _header(self, name: bytes) -> str | None:
        # With a str as the name, Twisted decodes the value as UTF-8, which fails for other bytes.
        value = self._request.getHeader(name)
        return None if value is None else value.decode("latin-1")

    @property
    def _path(self) -> str:
        return _printable(self._request.uri)

    @property
    def _client(self) -> str:
        address = self._request.getClientAddress()
        return host_and_port(address) if isinstance(address, IPv4Address | IPv6Address) else "a command"

    def _log_failure(self, log: Callable[..., None], message: str, **fields: object) -> None:
        """Log why the request failed, in place of the access log's line."""
        self._failure_logged = True
        log(message, method=self._method, path=self._path, client=self._client, **fields)

    def _log_defect(self, failure: Failure) -> None:
        self._failure_logged = True
        _log.failure("a defect in answering {path}", failure, path=self._path)

    def _log_access(self, answer: Answer) -> None:
        if self._failure_logged:
            return
        request = self._request
        _log.info(
            "{method} {path} ns={ns} {status} {bytes} bytes {milliseconds} ms {client} {outcome}",
            method=self._method,
            path=_printable(request.path),
            ns=_printable(request.args.get(b"ns", [b"-"])[0]),
            status=request.code,
            bytes=request.sentLength,
            milliseconds=round((self._clock.seconds() - self._began) * 1000),
            client=self._client,
            outcome={True: "hit", False: "miss", None: "-"}[answer.hit],
        )


def _printable(text: bytes) -> str:
    """Escape text from a client, so that a log line stays one line."""
    return text.decode("latin-1").encode("unicode_escape").decode("ascii")
