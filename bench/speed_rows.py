"""The rows of the benchmark of speed, and how one server is measured for them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from bench.speed_client import CheckedReader, Readers, Timing, Wrk
from bench.speed_servers import Cache, Part, Upstream
from tests import procfs
from tests.processes import wait_until

TLS = "tls-"
"""Prefix of the rows over TLS."""

_SETTLES = 60.0


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    key: str
    title: str
    places: int


ROWS = (
    Row("manifest-digest", "hot manifest by digest, /s", 0),
    Row("manifest-tag", "hot manifest by tag, /s", 0),
    Row("manifest-digest-200", "hot manifest by digest, 200 connections, /s", 0),
    Row("manifest-tag-200", "hot manifest by tag, 200 connections, /s", 0),
    Row("small-blob", "hot 20 kB blob, /s", 0),
    Row("one-reader", "hot {big} blob, one reader, GB/s", 2),
    Row("four-readers", "hot {big} blob, four readers, GB/s", 2),
    Row("processor", "processor seconds a GB (hot, one reader)", 2),
    Row("cold-first", "cold {big} blob: first byte, s", 3),
    Row("cold-all", "cold {big} blob: all, s", 2),
    Row("memory", "peak memory, MiB", 0),
    Row("tls-manifest-digest", "TLS: hot manifest by digest, /s", 0),
    Row("tls-one-reader", "TLS: hot {big} blob, one reader, GB/s", 2),
    Row("tls-four-readers", "TLS: hot {big} blob, four readers, GB/s", 2),
    Row("tls-processor", "TLS: processor seconds a GB (hot, one reader)", 2),
    Row("tls-cold-first", "TLS: cold {big} blob: first byte, s", 3),
    Row("tls-cold-all", "TLS: cold {big} blob: all, s", 2),
)


@dataclass(frozen=True)
class Clients:
    """What asks the servers."""

    wrk: Wrk
    checked: CheckedReader
    readers: Readers


@dataclass
class Visit:
    """The measurement of one server that has just been started with an empty cache, from a cold pull to hits.

    `ca` is the authority of its certificate, when it speaks TLS.
    """

    cache: Cache
    upstream: Upstream
    clients: Clients
    ca: Path | None
    found: dict[str, float] = field(default_factory=dict)

    def measure(self, wanted: Collection[str]) -> Mapping[str, float]:
        """Return the figures of the wanted rows, whose keys lack the prefix of TLS.

        Raises:
            RuntimeError: an answer was not right, or a hit came from the upstream.
        """
        self._pull()
        wait_until(self._is_cached, _SETTLES, "all from the cache")
        fetched = self.upstream.fetched
        self._hits(wanted)
        self._volumes(wanted)
        if self.upstream.fetched != fetched:
            raise RuntimeError(f"{self.cache.base}: hits came from the upstream")
        self.found["memory"] = sum(map(procfs.peak_memory, self._processes)) / 2**20
        return {key: value for key, value in self.found.items() if key in wanted}

    @property
    def _processes(self) -> list[int]:
        return procfs.family(self.cache.server.process.pid)

    def _pull(self) -> None:
        content, fetched = self.upstream.content, self.upstream.fetched
        for part in content.parts:
            timing = self._read(part)
            if part is content.big:
                self.found |= {"cold-first": timing.first, "cold-all": timing.all}
        if self.upstream.fetched == fetched:
            raise RuntimeError(f"{self.cache.base}: the cache was not empty")

    def _is_cached(self) -> bool:
        """Whether all of the image came without the upstream; it is compared once more."""
        fetched = self.upstream.fetched
        for part in self.upstream.content.parts:
            self._read(part)
        return self.upstream.fetched == fetched

    def _read(self, part: Part) -> Timing:
        return self.clients.checked.read(self.cache.url(part), part, self.ca)

    def _hits(self, wanted: Collection[str]) -> None:
        content = self.upstream.content
        for key, part, connections in (
            ("manifest-digest", content.by_digest, 16),
            ("manifest-tag", content.by_tag, 16),
            ("manifest-digest-200", content.by_digest, 200),
            ("manifest-tag-200", content.by_tag, 200),
            ("small-blob", content.small, 16),
        ):
            if key in wanted:
                self.found[key] = self.clients.wrk.rate(self.cache.url(part), part, connections)

    def _volumes(self, wanted: Collection[str]) -> None:
        big = self.upstream.content.big
        for key, readers in (("one-reader", 1), ("four-readers", 4)):
            if key in wanted or (readers == 1 and "processor" in wanted):
                before = self._processor_time()
                volume = self.clients.readers.read(self.cache.url(big), big, self.ca, readers)
                self.found[key] = volume.rate / 1e9
                if readers == 1:
                    self.found["processor"] = (self._processor_time() - before) / (volume.bytes / 1e9)

    def _processor_time(self) -> float:
        return sum(map(procfs.processor_time, self._processes))
