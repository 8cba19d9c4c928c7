"""Statuses of a daemon, and its metrics as Prometheus reads them."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from ociregistry.admin.metrics import Metrics
from ociregistry.admin.requests import Requests
from ociregistry.admin.status import DownloadState, IncompleteImage, IncompleteState, Status
from ociregistry.pullthrough.loader import PreloadProgress
from ociregistry.pullthrough.maintenance import MaintenanceState
from ociregistry.store.lookups import Counts
from ociregistry.store.space import Room
from ociregistry.store.usage import Usage
from ociregistry.upstream.bandwidth import BandwidthLimit
from ociregistry.upstream.breaker import LinkState

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]
"""Name and sorted labels -> value."""

STARTED = datetime(2026, 3, 1, 22, 17, 30, tzinfo=UTC)
PULLED = DownloadState("sha256:00", "reg.example/app", "reg.example", 30, 100, 2, STARTED)
STATUS = Status(
    version="1.2.3",
    started=STARTED,
    stopping=False,
    reasons=(),
    listeners=("127.0.0.1:8080",),
    air_gapped=False,
    store="/srv/images",
    records=Counts(lists=2, images=3),
    usage=Usage(bytes=1234, blobs=8),
    disk=Room(size=100, free=10, reserve=7, full=False),
    incomplete=IncompleteState(images=4, bytes=5, pending=1, indexes=6),
    incomplete_images=(IncompleteImage("reg.example/app:1", "sha256:11", 5),),
    downloads=(PULLED, replace(PULLED, clients=0), replace(PULLED, clients=0, size=None)),
    links=(
        LinkState("reg.example:443", True, True, 9.0, "", None),
        LinkState("down.example:443", True, False, 7.5, "lost", 2.0),
    ),
    bandwidth=BandwidthLimit(1000.0),
    received={"other": 0, "reg.example": 12},
    preload=PreloadProgress(images=9, loaded=5, failed=1),
    maintenance=MaintenanceState(
        last_prune=STARTED, pruned_image_urls=3, pruned_bytes=8, damaged=1, damaged_in_all=2
    ),
    in_flight=3,
    requests=Requests(),
    errors=(),
)


def samples(text: bytes) -> Samples:
    """Return the samples of a scrape, as Prometheus' own parser reads them; none may be there twice."""
    found: Samples = {}
    for family in text_string_to_metric_families(text.decode()):
        for sample in family.samples:
            key = sample.name, tuple(sorted(sample.labels.items()))
            assert key not in found, key
            found[key] = sample.value
    return found


def scraped(**changes: Any) -> Samples:
    """Return the samples for the status with these changes."""
    status = replace(STATUS, **changes)
    return samples(Metrics(lambda: status).text())
