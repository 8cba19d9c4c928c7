"""Serves requests: calls the handler, sends its answer or its error, and writes the error log lines.

This is the only place that renders errors and logs failed requests.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET, Request

from ociregistry import __version__
from ociregistry.context import Context, Via
from ociregistry.errors import MethodUnsupported, OutOfDescriptors, RegistryError, is_out_of_descriptors
from ociregistry.pullthrough.cache import Content
from ociregistry.pullthrough.waiting import CacheStatus
from ociregistry.web.channel import Channel, InFlight
from ociregistry.web.exchange import ABSENT, Exchange, InMemory, Logged
from ociregistry.web.hits import Hits, Repeat
from ociregistry.web.producer import SendLimits
from ociregistry.web.requests import Query, Range, parse_range

_log = Logger(namespace="ociregistry.web")


@dataclass(frozen=True, slots=True)
class Answer:
    """An HTTP response: status, headers and content.

    `ranged` says whether Range requests apply. `cache_status` is None where the cache is not involved. `repeat` is
    given where the answer may be remembered.
    """

    status: int
    content: Content
    headers: Mapping[str, str] = field(default_factory=dict)
    ranged: bool = False
    cache_status: CacheStatus | None = None
    repeat: Repeat | None = None
    is_probe: bool = False
    """Whether the request is one of many, every few seconds, by a program that looks whether this one is well."""


def json_answer(
    status: int,
    document: object,
    headers: Mapping[str, str] | None = None,
    *,
    media_type: str = "application/json",
    cache_status: CacheStatus | None = None,
) -> Answer:
    """Make an answer whose body is `document` as JSON."""
    body = json.dumps(document).encode()
    return Answer(status, InMemory(body), {"Content-Type": media_type, **(headers or {})}, cache_status=cache_status)


def error_answer(error: RegistryError) -> Answer:
    """Make the answer for `error`; the body has the form of the specification's section "Error Codes"."""
    document = {"errors": [{"code": error.code, "message": error.message, "detail": None}]}
    return json_answer(error.status, document, error.headers())


Handler = Callable[[str, bytes, Query, Context], Coroutine[Deferred[Any], Any, Answer]]
"""A coroutine function that answers a method, a percent-encoded path, a query and the request's context; it raises
`RegistryError` for a request that fails."""

Guard = Callable[[Request], None]
"""Looks at a request before its handler does; it raises `RegistryError` for one that is refused."""


def admit(request: Request) -> None:
    """Refuse nothing."""


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

    def __init__(
        self,
        handler: Handler,
        in_flight: InFlight,
        hits: Hits,
        limits: SendLimits,
        clock: IReactorTime,
        guard: Guard = admit,
    ) -> None:
        super().__init__()
        self._handler = handler
        self._guard = guard
        self._in_flight = in_flight
        self._hits = hits
        self._limits = limits
        self._clock = clock

    def render(self, request: Request) -> int:
        """Start to answer `request`. Never raises."""
        answering = _Answering(request, self._guard, self._handler, self._hits, self._limits, self._clock)
        self._in_flight.began()
        served = Deferred.fromCoroutine(answering.serve())
        served.addErrback(answering.exchange.fail)
        served.addBoth(lambda _: self._in_flight.ended())
        return NOT_DONE_YET


class _Answering:
    """A request that is being answered by the handler."""

    def __init__(
        self,
        request: Request,
        guard: Guard,
        handler: Handler,
        hits: Hits,
        limits: SendLimits,
        clock: IReactorTime,
    ) -> None:
        self._request = request
        self._guard = guard
        self._channel = cast(Channel, request.channel)
        self._handler = handler
        self._hits = hits
        self._limits = limits
        self._method = request.method
        namespace = request.args.get(b"ns", [ABSENT])[0]
        agent = request.requestHeaders.getRawHeaders(b"user-agent", [ABSENT])[0]
        self._logged = Logged.of(request.method, request.uri, request.path, namespace, agent)
        self._settings = hits.settings
        self.exchange = Exchange(self._channel, self._logged, limits, clock)
        request.notifyFinish().addErrback(lambda _: self.exchange.disconnected())

    async def serve(self) -> None:
        """Answer the request; return when the answer is sent or the client is gone."""
        answer = await self._answer()
        try:
            if not self.exchange.gone:
                await self._send(answer)
        finally:
            answer.content.close()
        self.exchange.log_access(self._request.code, answer.cache_status, is_probe=answer.is_probe)
        self.exchange.count(answer.status if self.exchange.gone else self._request.code, answer.cache_status)

    async def _answer(self) -> Answer:
        request = self._request
        try:
            if self._method not in (b"GET", b"HEAD"):
                raise MethodUnsupported(f"{self._logged.method} is not supported: this server is pull-only")
            self._guard(request)
            header = b",".join(request.requestHeaders.getRawHeaders(b"via", []))
            # A command on the control socket: it has no address.
            patient = not hasattr(request.getClientAddress(), "port")
            context = Context(Via.parse(header.decode("latin-1")), patient=patient)
            return await self._handler(self._logged.method, request.path, request.args, context)
        except RegistryError as error:
            return self._failed(error)
        except Exception as error:
            if is_out_of_descriptors(error):
                return self._failed(OutOfDescriptors(f"{self._logged.uri}: {error}"))
            self.exchange.log_defect(Failure())
            return error_answer(InternalError("an internal error"))

    def _failed(self, error: RegistryError) -> Answer:
        if isinstance(error, OutOfDescriptors):
            if self._limits.seldom.due():
                _log.error("out of file descriptors, requests get 503: {why}", why=error.message)
            return error_answer(OutOfDescriptors("this server has no file descriptor left for the request"))
        # What a client asked for in vain is no fault of this server or of a link.
        log = _log.info if error.status < 500 else _log.error
        self.exchange.log_failure(
            log, "{method} {uri}: {status} {code}: {why}", status=error.status, why=error.message, code=error.code
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
        # Send the headers now: the first byte of the content may take long to arrive.
        request.write(b"")
        line = self._channel.request_line
        if answer.repeat is not None and line is not None and self._settings == self._hits.settings:
            self._hits.remember(line, self._channel.head, answer.content, answer.repeat, self._logged)
        if self._method == b"HEAD" or await self._send_content(answer.content, part or Range(0, size)):
            request.finish()

    async def _send_content(self, content: Content, part: Range) -> bool:
        in_memory = content.size if isinstance(content, InMemory) else 0
        return await self.exchange.send(content, part, in_memory=in_memory)

    def _in_part(self, answer: Answer) -> tuple[Answer, Range | None]:
        header, condition = self._header(b"range"), self._header(b"if-range")
        if not answer.ranged or header is None or self._method != b"GET":
            return answer, None
        if condition is not None and condition != answer.headers.get("ETag"):
            return answer, None
        try:
            return answer, parse_range(header, answer.content.size)
        except RegistryError as error:
            return self._failed(error), None

    def _header(self, name: bytes) -> str | None:
        # With a str as the name, Twisted decodes the value as UTF-8, which fails for other bytes.
        value = self._request.getHeader(name)
        return None if value is None else value.decode("latin-1")
