"""Responses without a network: the test plays the connection."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime, ITransport
from twisted.internet.task import Clock
from twisted.python.failure import Failure
from twisted.web.client import ResponseDone
from twisted.web.http_headers import Headers

from ociregistry.upstream.body import Body
from ociregistry.upstream.http import DEFAULT_OPTIONS, HttpClient, RequestOptions, Response

UPSTREAM = "reg.example"


class Connection:
    """The transport of a body."""

    def __init__(self) -> None:
        self.paused = False
        self.pauses = 0
        self.closed = False
        self.stalls: list[tuple[str, float]] = []

    def pauseProducing(self) -> None:
        """Pause; must not be paused."""
        assert not self.paused
        self.paused = True
        self.pauses += 1

    def resumeProducing(self) -> None:
        """Resume; must be paused."""
        assert self.paused
        self.paused = False

    def loseConnection(self) -> None:
        """Record the close."""
        self.closed = True

    abortConnection = loseConnection
    stopProducing = loseConnection

    def stalled(self, why: str, silent: float) -> None:
        """Record a stall."""
        self.stalls.append((why, silent))


def connected(clock: IReactorTime | None = None) -> tuple[Body, Connection]:
    """Return a body before its first byte."""
    connection = Connection()
    body = Body(UPSTREAM, clock or Clock(), connection.stalled)
    body.makeConnection(cast(ITransport, connection))
    return body, connection


def end(body: Body, why: BaseException | None = None) -> None:
    """End a body, normally unless another reason is given."""
    body.connectionLost(Failure(why or ResponseDone("")))


def answer(
    status: int = 200,
    data: bytes = b"",
    headers: Mapping[str, str | Sequence[str]] | None = None,
    url: str = f"https://{UPSTREAM}/v2/",
    length: int | None = None,
    method: str = "GET",
) -> Response:
    """Return a complete response."""
    body, _ = connected()
    if data:
        body.dataReceived(data)
    end(body)
    raw = {name: [value] if isinstance(value, str) else list(value) for name, value in (headers or {}).items()}
    return Response(UPSTREAM, status, url, len(data) if length is None else length, body, Headers(raw), method)


class Sent:
    """A request sent by the client."""

    def __init__(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes | None, options: RequestOptions
    ) -> None:
        self.options = options
        self.method = method
        self.url = url
        self.headers = dict(headers)
        self.body = body

    @property
    def authorization(self) -> str | None:
        """Return the Authorization header."""
        return self.headers.get("Authorization")


ScriptedAnswer = Mapping[str, Any] | Exception | None


class ScriptedExchanges(HttpClient):
    """Answers requests by a script: URL prefix -> answers in order, the last one for good.

    An answer is the keyword arguments of `answer`, an error to raise, or None for no answer at all.
    """

    def __init__(self, script: Mapping[str, Sequence[ScriptedAnswer]]) -> None:
        self.sent: list[Sent] = []
        self._script = {url: list(answers) for url, answers in script.items()}

    @property
    def urls(self) -> list[str]:
        """Return the URLs in order of requests."""
        return [sent.url for sent in self.sent]

    async def send(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        body: bytes | None = None,
        options: RequestOptions = DEFAULT_OPTIONS,
    ) -> Response:
        self.sent.append(Sent(method, url, headers, body, options))
        for prefix, answers in self._script.items():
            if url.startswith(prefix):
                scripted = answers.pop(0) if len(answers) > 1 else answers[0]
                if scripted is None:
                    silence: Deferred[Mapping[str, Any]] = Deferred()
                    scripted = await silence
                if isinstance(scripted, Exception):
                    raise scripted
                return answer(**{"url": url, "method": method, **scripted})
        raise AssertionError(f"{url} is not in the script")
