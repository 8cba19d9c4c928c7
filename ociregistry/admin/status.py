"""The facts that an operator asks for, as one value: `/status` and `/metrics` are made from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta

from ociregistry import __version__
from ociregistry.admin.errors import LoggedError, RecentErrors
from ociregistry.admin.requests import Requests
from ociregistry.pullthrough.cache import PullThrough
from ociregistry.pullthrough.completion import Completion, Incomplete
from ociregistry.pullthrough.download import Download
from ociregistry.pullthrough.loader import Preloader, PreloadProgress
from ociregistry.pullthrough.maintenance import Maintenance, MaintenanceState
from ociregistry.store.space import Room
from ociregistry.store.store import Counts, Store
from ociregistry.upstream.breaker import LinkState
from ociregistry.upstream.network import Network


@dataclass(frozen=True, slots=True)
class DownloadState:
    """A blob that is being downloaded."""

    blob: str
    repository: str
    """With its upstream."""
    upstream: str
    bytes: int
    """Bytes that are here."""
    size: int | None
    """Bytes of the whole blob; None while that is unknown."""
    clients: int
    """Clients that wait for it; 0 for a download in the background."""


@dataclass(frozen=True, slots=True)
class Status:
    """What the daemon is, has and does."""

    version: str
    started: datetime
    stopping: bool
    """Whether only requests in flight are still answered."""
    reasons: Sequence[str]
    """Why the store does not work as promised; empty if it does."""
    listeners: Sequence[str]
    store: str
    """The folder of the store."""
    records: Counts
    disk: Room
    incomplete: Incomplete
    downloads: Sequence[DownloadState]
    links: Sequence[LinkState]
    bandwidth_limit: float | None
    """Bytes per second of all upstreams together, at this time; None for no limit."""
    received: Mapping[str, int]
    """Bytes that came since the start, by the upstream that was asked for them."""
    preload: PreloadProgress | None
    maintenance: MaintenanceState
    in_flight: int
    """Requests that are being answered, and new connections that have not sent their first one."""
    requests: Requests
    """Answered requests since the start: the counters themselves, which go on counting."""
    errors: Sequence[LoggedError]
    """The last failures that were logged, the oldest first."""


@dataclass(frozen=True, slots=True)
class Server:
    """What serves clients, as far as the status needs it."""

    addresses: Callable[[], Sequence[str]]
    in_flight: Callable[[], int]
    stopping: Callable[[], bool]
    requests: Requests


class StatusReader:
    """Makes the status from the parts of the daemon; it reads memory alone."""

    def __init__(
        self,
        started: datetime,
        path: str,
        server: Server,
        store: Store,
        network: Network,
        cache: PullThrough,
        completion: Completion,
        preloader: Preloader | None,
        maintenance: Maintenance,
        errors: RecentErrors,
    ) -> None:
        """Read these parts; `path` is the folder of the store."""
        self._started = started
        self._path = path
        self._server = server
        self._store = store
        self._network = network
        self._cache = cache
        self._completion = completion
        self._preloader = preloader
        self._maintenance = maintenance
        self._errors = errors

    def read(self) -> Status:
        """Return the status at this time."""
        return Status(
            version=__version__,
            started=self._started,
            stopping=self._server.stopping(),
            reasons=tuple(self._store.faults.sentences),
            listeners=tuple(self._server.addresses()),
            store=self._path,
            records=self._store.counts,
            disk=self._store.room,
            incomplete=self._completion.incomplete,
            downloads=tuple(map(_state_of, self._cache.in_flight.values())),
            links=self._network.links,
            bandwidth_limit=self._network.rate,
            received=self._network.received,
            preload=self._preloader.progress if self._preloader is not None else None,
            maintenance=self._maintenance.state,
            in_flight=self._server.in_flight(),
            requests=self._server.requests,
            errors=self._errors.errors,
        )


def _state_of(download: Download) -> DownloadState:
    return DownloadState(
        blob=str(download.digest),
        repository=str(download.repository),
        upstream=str(download.repository.upstream),
        bytes=download.length,
        size=download.size,
        clients=download.clients,
    )


def document(status: Status, now: datetime) -> dict[str, object]:
    """Return the status at the time `now` as a JSON document.

    Times are in UTC (RFC 3339), sizes in bytes, durations in seconds.
    """
    return {
        "status": "degraded" if status.reasons else "ok",
        "reasons": list(status.reasons),
        "version": status.version,
        "started": _time(status.started),
        "uptime_seconds": round((now - status.started).total_seconds()),
        "stopping": status.stopping,
        "listeners": list(status.listeners),
        "store": {"path": status.store, **asdict(status.records)},
        "disk": asdict(status.disk),
        "incomplete": asdict(status.incomplete),
        "downloads": [asdict(download) for download in status.downloads],
        "links": [_link(link, now) for link in status.links],
        "bandwidth_limit": status.bandwidth_limit,
        "received_bytes": dict(status.received),
        "preload": asdict(status.preload) if status.preload is not None else None,
        "maintenance": {
            key: _time(value) if isinstance(value, datetime) else value
            for key, value in asdict(status.maintenance).items()
        },
        "requests_in_flight": status.in_flight,
        "requests": [
            {"kind": kind.value, "outcome": outcome.value, "answers": tally.answers, "bytes": tally.bytes}
            for kind, outcome, tally in status.requests.tallies()
        ],
        "answers_cut": [
            {"kind": kind.value, "by": by.value, "answers": count}
            for (kind, by), count in status.requests.cut.items()
        ],
        "errors": [
            {"time": _time(error.time), "namespace": error.namespace, "text": error.text} for error in status.errors
        ],
    }


def _link(link: LinkState, now: datetime) -> dict[str, object]:
    return {
        "host": link.host,
        "up": link.up,
        "since": _time(now - timedelta(seconds=link.for_seconds)),
        "why": link.why,
        "next_probe_seconds": None if link.next_probe is None else round(link.next_probe, 1),
    }


def _time(moment: datetime) -> str:
    return moment.isoformat(timespec="seconds")
