"""One exchange: a request, as far as the log needs it, and the content that is sent for it.

Both ways of answering a request send and log by it: `resource`, which parses the request, and `hits`, which does not.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from twisted.internet.address import IPv4Address, IPv6Address
from twisted.internet.defer import CancelledError, Deferred, succeed
from twisted.internet.interfaces import IAddress, IReactorTime
from twisted.logger import Logger, LogLevel
from twisted.python.failure import Failure

from ociregistry.admin.requests import CutBy, kind_of, outcome_of
from ociregistry.errors import RegistryError
from ociregistry.pullthrough.cache import Content
from ociregistry.pullthrough.waiting import CacheStatus
from ociregistry.web.channel import Channel, host_and_port
from ociregistry.web.producer import SLOWEST, ClientGone, ContentProducer, SendLimits, SlowClient
from ociregistry.web.requests import Range

_log = Logger(namespace="ociregistry.web")


class InMemory:
    """Content that is held in memory."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    @property
    def size(self) -> int:
        """Size in bytes."""
        return len(self.data)

    def more_than(self, offset: int) -> Deferred[int]:
        """Return a Deferred that has fired with the size: all bytes are available."""
        return succeed(self.size)

    def read(self, offset: int, count: int) -> Deferred[bytes]:
        """Return a Deferred that has fired with at most `count` bytes from `offset` on."""
        return succeed(self.data[offset : offset + count])

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


_USER_AGENT = re.compile(rb"\r\nuser-agent:[ \t]*(?P<agent>[^\r\n]*)", re.IGNORECASE)
_LONGEST_AGENT = 200
ABSENT = b"-"
"""Stands for what a request does not have."""


@dataclass(frozen=True, slots=True)
class Logged:
    """What the log says of a request."""

    method: str
    uri: str
    path: str
    """The target without its query."""
    ns: str
    user_agent: str

    @classmethod
    def of(cls, method: bytes, uri: bytes, path: bytes, ns: bytes, user_agent: bytes) -> Logged:
        """Take over parts of a request, which may hold anything."""
        return cls(*map(_printable, (method, uri, path, ns, user_agent[:_LONGEST_AGENT])))

    def asked_by(self, request: bytes) -> Logged:
        """Return the same for a request whose bytes are given; only its User-Agent is another one."""
        match = _USER_AGENT.search(request)
        agent = ABSENT if match is None else match["agent"].rstrip()
        return replace(self, user_agent=_printable(agent[:_LONGEST_AGENT]))


class Exchange:
    """A request that is being answered."""

    def __init__(self, channel: Channel, logged: Logged, limits: SendLimits, clock: IReactorTime) -> None:
        self.gone = False
        """Whether the client has closed the connection."""
        self._channel = channel
        self._logged = logged
        self._limits = limits
        self._clock = clock
        self._began = clock.seconds()
        self._peer: IAddress = channel.getPeer()
        self._sending: Deferred[None] = succeed(None)
        self._sent = 0
        self._first_sent_at: float | None = None
        self._cut_by: CutBy | None = None
        self._failure_logged = False

    def disconnected(self) -> None:
        """Stop sending: the client has closed the connection."""
        self.gone = True
        self._sending.cancel()

    async def send(self, content: Content, part: Range, *, in_memory: int, sent: int = 0) -> bool:
        """Send a part of `content`, of which `in_memory` bytes are held in memory; `sent` bytes were sent before.

        Returns:
            Whether the client got all of it; the connection is closed otherwise.
        """
        producer = ContentProducer(self._channel, content, in_memory, self._limits, self._clock)
        self._sending = Deferred.fromCoroutine(producer.send(part.start, part.stop))
        try:
            try:
                await self._sending
            finally:
                self._sent = sent + producer.sent
                self._first_sent_at = self._began if sent else producer.first_sent_at
        except CancelledError:
            return False
        except Exception as error:
            self._cut_by = CutBy.CLIENT if isinstance(error, SlowClient | ClientGone) else CutBy.SERVER
            self._end_short(error)
            return False
        return not self.gone

    def _end_short(self, error: Exception) -> None:
        if isinstance(error, SlowClient):
            self.log_failure(_log.warn, "{method} {uri}: {client}: {why}", why=error, bytes=self._sent)
        elif isinstance(error, RegistryError | OSError):
            self.log_failure(_log.error, "{method} {uri}: response truncated: {why}", why=error, bytes=self._sent)
        elif not isinstance(error, ClientGone):
            self.log_defect(Failure())
        if self.gone:
            return
        if isinstance(error, SlowClient | ClientGone):
            self._channel.abort()
        else:
            # No finish(): the client must receive fewer bytes than Content-Length, ended by a FIN, not an RST. The
            # timeout drops bytes that the client does not read in time.
            self._channel.setTimeout(SLOWEST)
            self._channel.loseConnection()

    def log_failure(self, log: Callable[..., None], message: str, **fields: object) -> None:
        """Log why the request failed, in place of the access log's line."""
        self._failure_logged = True
        log(message, **self._fields(), uri=self._logged.uri, **fields)

    def fail(self, failure: Failure) -> None:
        """Log a bug and close the connection, so that the client does not wait for more bytes."""
        self.log_defect(failure)
        self.count(500, None)
        if not self.gone:
            self._channel.loseConnection()

    def log_defect(self, failure: Failure) -> None:
        """Log a bug in this program, in place of the access log's line."""
        self._failure_logged = True
        _log.failure(
            "a defect in answering {uri}", failure, LogLevel.critical, **self._fields(), uri=self._logged.uri
        )

    def count(self, status: int, cache_status: CacheStatus | None) -> None:
        """Count the request, which has been answered, or cannot be any more."""
        requests, kind, now = self._limits.requests, kind_of(self._logged.path), self._clock.seconds()
        hit = None if cache_status is None else cache_status.is_hit
        first = now if self._first_sent_at is None else self._first_sent_at
        requests.tally(kind, outcome_of(status, hit)).count(self._sent, first - self._began, now - self._began)
        cut_by = self._cut_by or (CutBy.CLIENT if self.gone else None)
        if cut_by is not None:
            requests.cut[kind, cut_by] += 1

    def log_access(self, status: int, cache_status: CacheStatus | None, *, is_probe: bool = False) -> None:
        """Write the line of the access log, unless the log has said already why the request failed."""
        if not self._failure_logged and self._limits.logs_requests():
            milliseconds = self._milliseconds
            log_access(self._logged, status, self._sent, milliseconds, self._client, cache_status, is_probe=is_probe)

    def _fields(self) -> dict[str, object]:
        return {**_fields(self._logged, self._client), "milliseconds": self._milliseconds}

    @property
    def _milliseconds(self) -> int:
        return round((self._clock.seconds() - self._began) * 1000)

    @property
    def _client(self) -> str:
        return client_of(self._peer)


def client_of(peer: object) -> str:
    """Return the name of a client for the log."""
    # Commands are at the control socket, which has no address.
    return host_and_port(peer) if isinstance(peer, IPv4Address | IPv6Address) else "a command"


def log_access(
    logged: Logged,
    status: int,
    sent: int,
    milliseconds: int,
    client: str,
    cache_status: CacheStatus | None,
    *,
    is_probe: bool = False,
) -> None:
    """Write a line of the access log, at level debug for a probe; `sent` are the bytes of the content."""
    log = _log.debug if is_probe else _log.info
    log(
        "{method} {path} ns={ns} {status} {bytes} bytes {milliseconds} ms {client} {cache_status}",
        **_fields(logged, client),
        status=status,
        bytes=sent,
        milliseconds=milliseconds,
        cache_status="-" if cache_status is None else cache_status.value,
    )


def _fields(logged: Logged, client: str) -> dict[str, object]:
    """Return the fields that all events of a request have."""
    return {
        "method": logged.method,
        "path": logged.path,
        "ns": logged.ns,
        "client": client,
        "user_agent": logged.user_agent,
    }


def _printable(text: bytes) -> str:
    """Escape text from a client, so that a log line stays one line."""
    return text.decode("latin-1").encode("unicode_escape").decode("ascii")
