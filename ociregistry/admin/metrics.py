"""The status as metrics for Prometheus, made at each scrape.

Names and units follow https://prometheus.io/docs/practices/naming/. The values of labels are bounded: clients may ask
for any number of hosts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import accumulate

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from ociregistry.admin.requests import BUCKETS, Histogram, Kind, Outcome
from ociregistry.admin.status import Status
from ociregistry.upstream.traffic import MOST_NAMES

Sample = tuple[Sequence[str], float]
"""The values of the labels, and the value."""


@dataclass(frozen=True, slots=True)
class Definition:
    """A metric: its name as it is scraped, type, meaning and labels, and how its samples are read."""

    name: str
    help: str
    read: Callable[[Status], Iterable[Sample]]
    labels: Sequence[str] = ()

    @property
    def type(self) -> str:
        """Its type for Prometheus."""
        return "counter" if self.name.endswith("_total") else "gauge"

    def family(self, status: Status) -> Metric:
        """Return the metric with its samples."""
        kind = CounterMetricFamily if self.type == "counter" else GaugeMetricFamily
        family = kind(self.name, self.help, labels=self.labels)
        for labels, value in self.read(status):
            family.add_metric(labels, value)
        return family


@dataclass(frozen=True, slots=True)
class HistogramDefinition:
    """A histogram of the times of answers, by kind and outcome."""

    name: str
    help: str
    read: Callable[[Status, Kind, Outcome], Histogram]
    labels: Sequence[str] = ("kind", "outcome")
    type: str = "histogram"

    def family(self, status: Status) -> Metric:
        """Return the metric with its samples."""
        family = HistogramMetricFamily(self.name, self.help, labels=self.labels)
        for kind in Kind:
            for outcome in (Outcome.HIT, Outcome.MISS):
                histogram = self.read(status, kind, outcome)
                bounds = [*map(str, BUCKETS), "+Inf"]
                buckets = list(zip(bounds, accumulate(histogram.counts), strict=True))
                family.add_metric([kind.value, outcome.value], buckets, histogram.sum)
        return family


def _one(read: Callable[[Status], float | None]) -> Callable[[Status], Iterable[Sample]]:
    """Return a reader of one value; None is no sample."""

    def samples(status: Status) -> Iterator[Sample]:
        value = read(status)
        if value is not None:
            yield (), value

    return samples


def _moment(read: Callable[[Status], datetime | None]) -> Callable[[Status], Iterable[Sample]]:
    def seconds(status: Status) -> float | None:
        moment = read(status)
        return None if moment is None else moment.timestamp()

    return _one(seconds)


def _answers(status: Status) -> Iterator[Sample]:
    return (((kind.value, outcome.value), tally.answers) for kind, outcome, tally in status.requests.tallies())


def _sent(status: Status) -> Iterator[Sample]:
    return (((kind.value, outcome.value), tally.bytes) for kind, outcome, tally in status.requests.tallies())


def _cut(status: Status) -> Iterator[Sample]:
    return (((kind.value, by.value), count) for (kind, by), count in status.requests.cut.items())


def _received(status: Status) -> Iterator[Sample]:
    return (((name,), count) for name, count in status.received.items())


DEFINITIONS: tuple[Definition | HistogramDefinition, ...] = (
    Definition(
        "ociregistry_build_info", "1; the label tells the version.", lambda s: [((s.version,), 1)], ("version",)
    ),
    Definition(
        "ociregistry_degraded",
        "1 while the store does not work as it should, a link is down although something from it is wanted, or "
        "the last reload of the settings failed.",
        _one(lambda s: bool(s.reasons)),
    ),
    Definition(
        "ociregistry_store_faults",
        "Faults for which the store does not work as it should, as /health tells them.",
        _one(lambda s: len(s.faults)),
    ),
    Definition(
        "ociregistry_config_last_reload_successful",
        "0 if the settings could not be reloaded, so that the earlier ones are in force.",
        _one(lambda s: not s.reload_failed),
    ),
    Definition(
        "ociregistry_requests_total",
        "Answered requests. The kind is manifest, blob or other; the outcome hit, miss, none (the cache is not "
        "involved), 4xx or 5xx.",
        _answers,
        ("kind", "outcome"),
    ),
    Definition(
        "ociregistry_sent_bytes_total",
        "Bytes of content sent to clients.",
        _sent,
        ("kind", "outcome"),
    ),
    Definition(
        "ociregistry_answers_cut_total",
        "Answers that ended before their last byte, by the side that ended them: client or server.",
        _cut,
        ("kind", "by"),
    ),
    HistogramDefinition(
        "ociregistry_first_byte_seconds",
        "Time from a request to the first byte of the content; to the end of the answer where there is no content.",
        lambda status, kind, outcome: status.requests.tally(kind, outcome).first_byte,
    ),
    HistogramDefinition(
        "ociregistry_request_duration_seconds",
        "Time from a request to the last byte of the answer.",
        lambda status, kind, outcome: status.requests.tally(kind, outcome).duration,
    ),
    Definition(
        "ociregistry_requests_in_flight",
        "Requests that are being answered, and new connections that have not sent their first one.",
        _one(lambda s: s.in_flight),
    ),
    Definition(
        "ociregistry_received_bytes_total",
        "Bytes of content that came from upstreams, by the upstream or mirror that was asked. By name: those "
        f"configured, and the first {MOST_NAMES} others that delivered a manifest, from then on.",
        _received,
        ("upstream",),
    ),
    Definition(
        "ociregistry_link_up",
        f"1 if the host can be reached, 0 if not. By name: those configured, and the first {MOST_NAMES} others that "
        "have answered.",
        lambda s: [((link.host,), link.up) for link in s.links if link.named],
        ("host",),
    ),
    Definition(
        "ociregistry_link_down_seconds",
        "For how long the host cannot be reached; 0 if it can.",
        lambda s: [((link.host,), 0 if link.up else link.for_seconds) for link in s.links if link.named],
        ("host",),
    ),
    Definition(
        "ociregistry_links",
        "All hosts that were contacted of late, or could not be, up or down.",
        lambda s: [
            (("up",), sum(link.up for link in s.links)),
            (("down",), sum(not link.up for link in s.links)),
        ],
        ("state",),
    ),
    Definition(
        "ociregistry_bandwidth_limit_bytes_per_second",
        "The limit of all upstreams together at this time; absent without a limit.",
        _one(lambda s: s.bandwidth.limit),
    ),
    Definition(
        "ociregistry_downloads",
        "Blobs that are being downloaded: for clients, or in the background.",
        lambda s: [
            (("clients",), sum(download.clients > 0 for download in s.downloads)),
            (("background",), sum(download.clients == 0 for download in s.downloads)),
        ],
        ("for",),
    ),
    Definition(
        "ociregistry_downloads_missing_bytes",
        "Bytes that the blobs being downloaded still lack, as far as their sizes are known.",
        _one(lambda s: sum(max(0, (download.size or 0) - download.bytes) for download in s.downloads)),
    ),
    Definition(
        "ociregistry_records",
        "Manifests in the store: lists (indexes) and images.",
        lambda s: [(("list",), s.records.lists), (("image",), s.records.images)],
        ("kind",),
    ),
    Definition(
        "ociregistry_store_bytes",
        "The sizes of all files of the store, found every 5 to 60 s; absent until they are known.",
        _one(lambda s: s.usage.bytes if s.usage is not None else None),
    ),
    Definition(
        "ociregistry_store_blobs",
        "Whole blobs in the store, counted as often; absent until they are known.",
        _one(lambda s: s.usage.blobs if s.usage is not None else None),
    ),
    Definition(
        "ociregistry_incomplete_images", "Pulled images that lack blobs.", _one(lambda s: s.incomplete.images)
    ),
    Definition(
        "ociregistry_pending_images",
        "Incomplete images of which it is still open whether they are wanted.",
        _one(lambda s: s.incomplete.pending),
    ),
    Definition(
        "ociregistry_incomplete_indexes",
        "Indexes that lack manifests or configs of some platforms.",
        _one(lambda s: s.incomplete.indexes),
    ),
    Definition("ociregistry_missing_bytes", "Bytes that incomplete images lack.", _one(lambda s: s.incomplete.bytes)),
    Definition("ociregistry_disk_size_bytes", "Size of the disk of the store.", _one(lambda s: s.disk.size)),
    Definition("ociregistry_disk_free_bytes", "Free bytes on the disk of the store.", _one(lambda s: s.disk.free)),
    Definition("ociregistry_disk_reserve_bytes", "Bytes that downloads leave free.", _one(lambda s: s.disk.reserve)),
    Definition(
        "ociregistry_disk_full",
        "1 while most downloads stop, as little is free beside the reserve.",
        _one(lambda s: s.disk.full),
    ),
    Definition(
        "ociregistry_preload_images",
        "Images of --preload-images: all in the file, loaded, and failed for good; absent without that option.",
        lambda s: (
            []
            if s.preload is None
            else [
                (("all",), s.preload.images),
                (("loaded",), s.preload.loaded),
                (("failed",), s.preload.failed),
            ]
        ),
        ("state",),
    ),
    Definition(
        "ociregistry_last_prune_timestamp_seconds",
        "When the store was last pruned on schedule; absent before.",
        _moment(lambda s: s.maintenance.last_prune),
    ),
    Definition(
        "ociregistry_next_prune_timestamp_seconds",
        "When the store will be pruned; absent without a schedule.",
        _moment(lambda s: s.maintenance.next_prune),
    ),
    Definition(
        "ociregistry_pruned_image_urls_total",
        "Image URLs that were pruned on schedule.",
        _one(lambda s: s.maintenance.pruned_image_urls),
    ),
    Definition(
        "ociregistry_pruned_bytes_total",
        "Bytes that became free by pruning on schedule.",
        _one(lambda s: s.maintenance.pruned_bytes),
    ),
    Definition(
        "ociregistry_last_verify_timestamp_seconds",
        "When the store was last verified, by any process; absent without a schedule.",
        _moment(lambda s: s.maintenance.last_verify),
    ),
    Definition(
        "ociregistry_next_verify_timestamp_seconds",
        "When the store will be verified; absent without a schedule.",
        _moment(lambda s: s.maintenance.next_verify),
    ),
    Definition(
        "ociregistry_verify_damaged_total",
        "Damaged files that verifications on schedule have found.",
        _one(lambda s: s.maintenance.damaged_in_all),
    ),
    Definition(
        "ociregistry_damaged_files",
        "Damaged files that the last verification on schedule found; 0 before the first one.",
        _one(lambda s: s.maintenance.damaged),
    ),
)
"""All metrics of this program."""


class StatusCollector(Collector):
    """Makes metrics of the status."""

    def __init__(self, read: Callable[[], Status]) -> None:
        """Call `read` at each scrape."""
        self._read = read

    def collect(self) -> Iterator[Metric]:
        """Yield all metrics."""
        status = self._read()
        for definition in DEFINITIONS:
            yield definition.family(status)

    def describe(self) -> Iterable[Metric]:
        """Name no metrics: the registry would ask for the status before the daemon runs."""
        return ()


class Metrics:
    """The metrics of the daemon, of its process and of Python."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, read: Callable[[], Status]) -> None:
        """Call `read` for the status at each scrape."""
        self._registry = CollectorRegistry()
        self._registry.register(StatusCollector(read))
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)
        GCCollector(registry=self._registry)

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self._registry)
