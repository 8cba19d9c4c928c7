"""How fast bytes come: those of each download, and those of all upstreams together.

Their counters are read once a second, so that counting costs nothing where the bytes come.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection
from math import ceil

from twisted.application.service import Service
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import LoopingCall

from ociregistry.pullthrough.download import Download

_EVERY = 1.0
"""Seconds from one reading to the next."""
_OVER = 10
"""Readings: a rate is that of the last ten seconds."""


class _Readings:
    """The last readings of a counter of bytes."""

    def __init__(self) -> None:
        self._readings: deque[tuple[float, int]] = deque(maxlen=_OVER + 1)

    def add(self, now: float, count: int) -> None:
        self._readings.append((now, count))

    @property
    def rate(self) -> float | None:
        """Bytes per second; None with a single reading."""
        if len(self._readings) < 2:
            return None
        (began, before), (ended, after) = self._readings[0], self._readings[-1]
        return max(0, after - before) / (ended - began) if ended > began else None


class Rates(Service):
    """The rates of the last ten seconds, in bytes per second; of what is younger, since it began."""

    def __init__(
        self, downloads: Callable[[], Collection[Download]], received: Callable[[], int], clock: IReactorTime
    ) -> None:
        """Read `downloads`, those in flight, and `received`, the bytes that came from all upstreams."""
        self._downloads = downloads
        self._received = received
        self._clock = clock
        self._of: dict[Download, _Readings] = {}
        self._all = _Readings()
        self._loop = LoopingCall(self._read)
        self._loop.clock = clock

    def startService(self) -> None:
        """Begin to read."""
        super().startService()
        self._loop.start(_EVERY)

    def stopService(self) -> None:
        """Stop reading."""
        super().stopService()
        self._loop.stop()

    def _read(self) -> None:
        now = self._clock.seconds()
        self._of = {download: self._of.get(download) or _Readings() for download in self._downloads()}
        for download, readings in self._of.items():
            readings.add(now, download.received)
        self._all.add(now, self._received())

    def of(self, download: Download) -> float | None:
        """Return the rate of a download; None until it is known."""
        readings = self._of.get(download)
        return None if readings is None else readings.rate

    @property
    def all(self) -> float | None:
        """The rate of all upstreams together; None until it is known."""
        return self._all.rate


def seconds_left(missing: int | None, rate: float | None) -> int | None:
    """Return in how many seconds `missing` bytes come at a rate; None where either is unknown, or no byte comes."""
    return ceil(missing / rate) if missing is not None and rate else None
