"""The facts that an operator asks for, as one value: `/status` and `/metrics` are made from it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime, timedelta
from heapq import nlargest

from twisted.internet.interfaces import IReactorTime

from ociregistry import __version__
from ociregistry.admin.errors import LoggedError, RecentErrors
from ociregistry.admin.rates import Rates, seconds_left
from ociregistry.admin.requests import Requests
from ociregistry.config.values import count_text, printable
from ociregistry.names import Digest, Repository, repository_of
from ociregistry.pullthrough.cache import PullThrough
from ociregistry.pullthrough.completion import Completion, Incomplete
from ociregistry.pullthrough.download import Download
from ociregistry.pullthrough.loader import Preloader, PreloadProgress
from ociregistry.pullthrough.maintenance import Maintenance, MaintenanceState
from ociregistry.store.lookups import Counts
from ociregistry.store.space import Room
from ociregistry.store.store import Store
from ociregistry.store.usage import Usage
from ociregistry.upstream.bandwidth import BandwidthLimit
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
    started: datetime
    rate: float | None = None
    """Bytes per second of the last ten seconds; None until it is known."""
    seconds_left: int | None = None
    """Until it is complete at this rate; None where the size or the rate is unknown, or no byte comes."""
    image: str | None = None
    """An image URL that the blob is fetched for; None where that is not known, or the blob is in many images."""


@dataclass(frozen=True, slots=True)
class IncompleteState(Incomplete):
    """What is known to be missing, and when it will be here."""

    seconds_left: int | None = None
    """Until all missing bytes are here, if nothing else comes from upstreams. None in the cases in which that of a
    download is, while a link is down from which something is wanted, and while the disk has no room."""


@dataclass(frozen=True, slots=True)
class IncompleteImage:
    """A wanted image that lacks blobs."""

    image: str
    """An image URL of it or of an index that names it: the newest tag, if there is one."""
    digest: str
    bytes: int
    """Bytes that it lacks."""


@dataclass(frozen=True, slots=True)
class Status:
    """What the daemon is, has and does."""

    version: str
    started: datetime
    stopping: bool
    """Whether only requests in flight are still answered."""
    reasons: Sequence[str]
    """Why the daemon does not work as it should: faults of the store, links that are down although something from
    them is wanted, and settings that could not be reloaded. Empty if it does."""
    listeners: Sequence[str]
    air_gapped: bool
    """Whether no upstream is ever asked."""
    store: str
    """The folder of the store."""
    records: Counts
    usage: Usage | None
    """What the store uses of the disk; None until that is known."""
    disk: Room
    incomplete: IncompleteState
    incomplete_images: Sequence[IncompleteImage]
    """The 50 images that lack most, the one that lacks most first."""
    downloads: Sequence[DownloadState]
    links: Sequence[LinkState]
    bandwidth: BandwidthLimit
    """The limit of all upstreams together at this time."""
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
    faults: Sequence[str] = ()
    """Those of the reasons that are faults of the store."""
    reload_failed: str = ""
    """Why the settings as they are in the files now are not in force; empty if the last reload succeeded."""


@dataclass(frozen=True, slots=True)
class Server:
    """What serves clients, as far as the status needs it."""

    addresses: Callable[[], Sequence[str]]
    in_flight: Callable[[], int]
    stopping: Callable[[], bool]
    reload_failed: Callable[[], str]
    """Tells why the last reload failed, the empty string if it did not."""
    requests: Requests


class StatusReader:
    """Makes the status from the parts of the daemon; it reads memory alone."""

    def __init__(
        self,
        started: datetime,
        path: str,
        air_gapped: bool,
        server: Server,
        store: Store,
        network: Network,
        cache: PullThrough,
        completion: Completion,
        preloader: Preloader | None,
        maintenance: Maintenance,
        rates: Rates,
        errors: RecentErrors,
        clock: IReactorTime,
    ) -> None:
        """Read these parts; `path` is the folder of the store."""
        self._started = started
        self._path = path
        self._air_gapped = air_gapped
        self._server = server
        self._store = store
        self._network = network
        self._cache = cache
        self._completion = completion
        self._preloader = preloader
        self._maintenance = maintenance
        self._rates = rates
        self._errors = errors
        self._clock = clock

    def read(self) -> Status:
        """Return the status at this time."""
        links, faults = self._network.links, self._store.faults.sentences
        incomplete, reload_failed = self._incomplete(links), self._server.reload_failed()
        return Status(
            version=__version__,
            started=self._started,
            stopping=self._server.stopping(),
            reasons=tuple(reasons(faults, links, incomplete, reload_failed)),
            listeners=tuple(self._server.addresses()),
            air_gapped=self._air_gapped,
            store=printable(self._path),
            records=self._store.counts,
            usage=self._store.usage.latest,
            disk=self._store.room,
            incomplete=incomplete,
            incomplete_images=tuple(_incomplete_images(self._store, self._completion.missing)),
            downloads=tuple(map(self._download, self._cache.in_flight.values())),
            links=links,
            bandwidth=self._network.bandwidth,
            received=self._network.received,
            preload=self._preloader.progress if self._preloader is not None else None,
            maintenance=self._maintenance.state,
            in_flight=self._server.in_flight(),
            requests=self._server.requests,
            errors=self._errors.errors,
            faults=tuple(faults),
            reload_failed=reload_failed,
        )

    def _incomplete(self, links: Sequence[LinkState]) -> IncompleteState:
        found = self._completion.incomplete
        # Blobs count as missing until they are complete.
        here = sum(download.length for download in self._cache.in_flight.values())
        waits = self._store.faults.has_no_room or any(link.wanted for link in links)
        left = None if waits else seconds_left(max(0, found.bytes - here), self._rates.all)
        return IncompleteState(found.images, found.bytes, found.pending, found.indexes, left)

    def _download(self, download: Download) -> DownloadState:
        here, size, rate = download.length, download.size, self._rates.of(download)
        return DownloadState(
            blob=str(download.digest),
            repository=str(download.repository),
            upstream=str(download.repository.upstream),
            bytes=here,
            size=size,
            clients=download.clients,
            started=datetime.now(UTC) - timedelta(seconds=self._clock.seconds() - download.began),
            rate=rate,
            seconds_left=seconds_left(None if size is None else max(0, size - here), rate),
            image=image_of(self._store, download.repository, download.digest),
        )


_FEW = 10
"""Manifests that name a blob, at most, for its image to be looked for: a layer may be in thousands."""


def image_of(store: Store, repository: Repository, blob: Digest) -> str | None:
    """Return an image URL of a repository for which a blob is fetched: the newest tag, if there is one."""
    naming = store.naming(blob)
    if len(naming) > _FEW:
        return None
    manifests = {*naming, *(index for image in naming for index in store.indexes(image))}
    name = str(repository)
    return _newest(store, manifests, lambda url: repository_of(url) == name)


def _newest(store: Store, manifests: Iterable[Digest], is_known: Callable[[str], bool] = bool) -> str | None:
    """Return the newest image URL, a tag if there is one, that manifests have and `is_known` is true of."""
    entries = (store.entry(manifest) for manifest in manifests)
    known = [
        ("@" not in url, dates.confirmed, url)
        for entry in entries
        if entry is not None
        for url, dates in entry.images.items()
        if is_known(url)
    ]
    return max(known)[-1] if known else None


_MOST = 50
"""Incomplete images that are told."""


def _incomplete_images(store: Store, missing: Mapping[Digest, int]) -> Iterator[IncompleteImage]:
    for digest in nlargest(_MOST, missing, key=lambda image: missing[image]):
        if missing[digest]:
            url = _newest(store, [digest, *store.indexes(digest)])
            yield IncompleteImage(url or str(digest), str(digest), missing[digest])


_MOST_HOSTS = 10
"""Hosts that are named as reasons; the links tell of each."""


def reasons(
    faults: Sequence[str], links: Sequence[LinkState], incomplete: Incomplete, reload_failed: str = ""
) -> Iterator[str]:
    """Yield why the daemon is degraded: the one place that decides it.

    A host that nothing has ever come from may be one that a client has made up, so it counts only if bytes are
    missing, and after the others; clients may make up a thousand.
    """
    yield from faults
    wanted = [link for link in links if link.wanted and (link.named or incomplete.bytes)]
    wanted.sort(key=lambda link: not link.named)
    for link in wanted[:_MOST_HOSTS]:
        yield f"{link.host} cannot be reached, and something from it is wanted: {link.why}"
    others = len(wanted) - _MOST_HOSTS
    if others > 0:
        yield f"{count_text(others, 'other host')} cannot be reached, and something is wanted from there"
    if reload_failed:
        yield f"the earlier settings are in force, as the reload failed: {reload_failed}"


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
        "air_gapped": status.air_gapped,
        "store": {"path": status.store, **asdict(status.records), **_usage(status.usage)},
        "disk": asdict(status.disk),
        "incomplete": asdict(status.incomplete),
        "incomplete_images": [asdict(image) for image in status.incomplete_images],
        "downloads": [_with_times(download) for download in status.downloads],
        "links": [_link(link, now) for link in status.links],
        "bandwidth": asdict(status.bandwidth),
        "received_bytes": dict(status.received),
        "preload": asdict(status.preload) if status.preload is not None else None,
        "maintenance": _with_times(status.maintenance),
        "requests_in_flight": status.in_flight,
        "requests": [
            {"kind": kind.value, "outcome": outcome.value, "answers": tally.answers, "bytes": tally.bytes}
            for kind, outcome, tally in status.requests.tallies()
        ],
        "answers_cut": [
            {"kind": kind.value, "by": by.value, "answers": count}
            for (kind, by), count in status.requests.cut.items()
        ],
        "reload_failed": status.reload_failed or None,
        "errors": [
            {"time": _time(error.time), "namespace": error.namespace, "text": error.text} for error in status.errors
        ],
    }


def _usage(usage: Usage | None) -> dict[str, int | None]:
    return dict.fromkeys(field.name for field in fields(Usage)) if usage is None else asdict(usage)


def _with_times(value: DownloadState | MaintenanceState) -> dict[str, object]:
    return {key: _time(one) if isinstance(one, datetime) else one for key, one in asdict(value).items()}


def _link(link: LinkState, now: datetime) -> dict[str, object]:
    return {
        "host": link.host,
        "up": link.up,
        "since": _time(now - timedelta(seconds=link.for_seconds)),
        "why": link.why,
        "wanted": link.wanted,
        "next_probe_seconds": None if link.next_probe is None else round(link.next_probe, 1),
    }


def _time(moment: datetime) -> str:
    return moment.isoformat(timespec="seconds")
