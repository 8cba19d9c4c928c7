"""The short way for hits: whole answers, remembered by the request line as it stands on the wire.

An answer is remembered when the usual way has given it, and it is served as long as that would give it again, which
the answer itself tells from memory: no thread, no file and no parsing beyond the request line.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from cachetools import LRUCache
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.web.http import datetimeToString

from ociregistry.admin.requests import Outcome, Tally, kind_of
from ociregistry.pullthrough.cache import Content
from ociregistry.pullthrough.waiting import CacheStatus
from ociregistry.store.blobs import StoredBlob
from ociregistry.store.pagecache import SLICE
from ociregistry.web.channel import BUFFER, Channel, InFlight
from ociregistry.web.exchange import Exchange, InMemory, Logged, SizeOnly, client_of, log_access
from ociregistry.web.producer import SendLimits
from ociregistry.web.requests import Range

Repeat = Callable[[], Content | None]
"""Does what a repeated request does and returns its content, or None where the answer may be another one."""

_MOST = 32 * 1024 * 1024
"""Bytes of answers that are remembered."""
_LARGEST = 64 * 1024
"""Bytes in memory of an answer that is remembered."""
_OVERHEAD = 2500
"""Bytes, about, that an answer takes beside its content and its request line."""
_LINES = 5
"""How often the bytes of a request line are kept: in the key, and in the parts that the log gets."""
_DATE = b"\r\nDate: "


@dataclass(frozen=True, slots=True)
class Hit:
    """An answer that is remembered."""

    before_date: bytes
    after_date: bytes
    """The rest of the head, to the empty line."""
    repeat: Repeat
    size: int
    logged: Logged
    tally: Tally
    cost: int
    """The bytes of memory that it takes."""


class Hits:
    """The answers to the last requests, and the short way that serves them."""

    def __init__(self, in_flight: InFlight, limits: SendLimits, clock: IReactorTime, most: int = _MOST) -> None:
        self._in_flight = in_flight
        self._limits = limits
        self._clock = clock
        self._hits: LRUCache[bytes, Hit] = LRUCache(most, getsizeof=_cost_of)
        self.settings = 0
        """Grows with each change of the settings: an answer by earlier ones is not remembered."""
        self._second = 0
        self._date = b""

    def forget(self) -> None:
        """Forget all answers: the settings have changed."""
        self.settings += 1
        self._hits.clear()

    def remember(self, request_line: bytes, head: bytes, content: Content, repeat: Repeat, logged: Logged) -> None:
        """Remember an answer with status 200, with this head and content."""
        before, found, after = head.partition(_DATE)
        in_memory = len(content.data) if isinstance(content, InMemory) else 0
        cost = _OVERHEAD + _LINES * len(request_line) + in_memory
        tally = self._limits.requests.tally(kind_of(logged.path), Outcome.HIT)
        hit = Hit(before + found, after[after.index(b"\r\n") :], repeat, content.size, logged, tally, cost)
        if found and in_memory <= _LARGEST:
            self._hits[request_line] = hit

    def answer(self, channel: Channel, request_line: bytes, request: bytes) -> bool:
        """Answer a plain request with this line, or return False: it is to take the usual way."""
        began = time.perf_counter()
        # A get() would look twice.
        try:
            hit = self._hits[request_line]
        except KeyError:
            return False
        content = hit.repeat()
        if content is None:
            return False
        if content.size != hit.size:
            content.close()
            return False
        channel.answered()
        sent = self._send_at_once(channel, self._head(hit), content)
        if sent < hit.size and not isinstance(content, SizeOnly):
            self._send_rest(channel, self._logged(hit, request), content, sent)
            return True
        content.close()
        hit.tally.count_at_once(sent, time.perf_counter() - began)
        if self._limits.logs_requests():
            logged = self._logged(hit, request)
            log_access(logged, 200, sent, 0, client_of(channel.getPeer()), CacheStatus.HIT)
        return True

    def _logged(self, hit: Hit, request: bytes) -> Logged:
        """Return what the log says of a request, if its line is read at all."""
        return hit.logged.asked_by(request) if self._limits.logs_requests() else hit.logged

    def _head(self, hit: Hit) -> bytes:
        second = int(time.time())
        if second != self._second:
            self._second, self._date = second, datetimeToString(second)
        return b"".join((hit.before_date, self._date, hit.after_date))

    def _send_at_once(self, channel: Channel, head: bytes, content: Content) -> int:
        """Send or write the head, and what can be sent of the content without waiting; return the latter's size."""
        body = content.data if isinstance(content, InMemory | StoredBlob) else b""
        data = head + body
        if not channel.is_plain and len(data) <= BUFFER:
            channel.write(data)
            return len(body)
        file = content if content.size and not body and isinstance(content, StoredBlob) else None
        sent = channel.send_now(data, more=file is not None)
        if sent < len(head):
            channel.write(head[sent:])
            return 0
        if file is not None and (socket := channel.socket) is not None:
            return file.send_at_once(socket, 0, min(file.size, SLICE))
        return sent - len(head)

    def _send_rest(self, channel: Channel, logged: Logged, content: Content, sent: int) -> None:
        exchange = Exchange(channel, logged, self._limits, self._clock)
        channel.begin(exchange.disconnected)
        self._in_flight.began()
        sending = Deferred.fromCoroutine(self._finish(channel, exchange, content, sent))
        sending.addErrback(exchange.fail)
        sending.addBoth(lambda _: self._in_flight.ended())

    async def _finish(self, channel: Channel, exchange: Exchange, content: Content, sent: int) -> None:
        in_memory = content.size - sent if isinstance(content, InMemory) else 0
        try:
            whole = await exchange.send(content, Range(sent, content.size), in_memory=in_memory, sent=sent)
        finally:
            content.close()
        exchange.log_access(200, CacheStatus.HIT)
        exchange.count(200, CacheStatus.HIT)
        if whole:
            channel.end()


def _cost_of(hit: Hit) -> int:
    return hit.cost
