"""One exchange: a request, as far as the log needs it, and the content that is sent for it.

Both ways of answering a request send and log by it: `resource`, which parses the request, and `hits`, which does not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from twisted.internet.address import IPv4Address, IPv6Address
from twisted.internet.defer import CancelledError, Deferred, succeed
from twisted.internet.interfaces import IAddress, IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure

from ociregistry.errors import RegistryError
from ociregistry.pullthrough.cache import Content
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


@dataclass(frozen=True, slots=True)
class Logged:
    """What the log says of a request."""

    method: str
    uri: str
    path: str
    """The target without its query."""
    ns: str

    @classmethod
    def of(cls, method: bytes, uri: bytes, path: bytes, ns: bytes) -> Logged:
        """Take over parts of a request, which may hold anything."""
        return cls(*map(_printable, (method, uri, path, ns)))


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
            await self._sending
        except CancelledError:
            return False
        except Exception as error:
            self._end_short(error)
            return False
        finally:
            self._sent = sent + producer.sent
        return not self.gone

    def _end_short(self, error: Exception) -> None:
        if isinstance(error, SlowClient):
            self.log_failure(_log.warn, "{method} {path}: {client}: {why}", why=error)
        elif isinstance(error, RegistryError | OSError):
            self.log_failure(_log.error, "{method} {path}: response truncated: {why}", why=error)
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
        log(message, method=self._logged.method, path=self._logged.uri, client=self._client, **fields)

    def fail(self, failure: Failure) -> None:
        """Log a bug and close the connection, so that the client does not wait for more bytes."""
        self.log_defect(failure)
        if not self.gone:
            self._channel.loseConnection()

    def log_defect(self, failure: Failure) -> None:
        """Log a bug in this program, in place of the access log's line."""
        self._failure_logged = True
        _log.failure("a defect in answering {path}", failure, path=self._logged.uri)

    def log_access(self, status: int, hit: bool | None, *, is_probe: bool = False) -> None:
        """Write the line of the access log, unless the log has said already why the request failed."""
        if not self._failure_logged and self._limits.logs_requests():
            milliseconds = round((self._clock.seconds() - self._began) * 1000)
            log_access(self._logged, status, self._sent, milliseconds, self._client, hit, is_probe=is_probe)

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
    hit: bool | None,
    *,
    is_probe: bool = False,
) -> None:
    """Write a line of the access log, at level debug for a probe; `sent` are the bytes of the content."""
    log = _log.debug if is_probe else _log.info
    log(
        "{method} {path} ns={ns} {status} {bytes} bytes {milliseconds} ms {client} {outcome}",
        method=logged.method,
        path=logged.path,
        ns=logged.ns,
        status=status,
        bytes=sent,
        milliseconds=milliseconds,
        client=client,
        outcome={True: "hit", False: "miss", None: "-"}[hit],
    )


def _printable(text: bytes) -> str:
    """Escape text from a client, so that a log line stays one line."""
    return text.decode("latin-1").encode("unicode_escape").decode("ascii")
