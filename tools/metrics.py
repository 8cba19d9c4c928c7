"""Write docs/metrics.md from the definitions of the program: `python -m tools.metrics`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

from ociregistry.admin.errors import LoggedError
from ociregistry.admin.metrics import DEFINITIONS
from ociregistry.admin.requests import CutBy, Kind, Outcome, Requests
from ociregistry.admin.status import DownloadState, IncompleteImage, IncompleteState, Status, document
from ociregistry.pullthrough.loader import PreloadProgress
from ociregistry.pullthrough.maintenance import MaintenanceState
from ociregistry.settings import DEFAULT_ADMIN_LISTEN
from ociregistry.store.lookups import Counts
from ociregistry.store.space import Room
from ociregistry.store.usage import Usage
from ociregistry.upstream.bandwidth import BandwidthLimit
from ociregistry.upstream.breaker import LinkState

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "metrics.md"

_HEAD = f"""# Metrics and status

The daemon tells an operator what it does at an address apart from that of its clients, `--admin-listen`: by default
`{DEFAULT_ADMIN_LISTEN}`, port 8081 of this machine alone. `/metrics` is for Prometheus, `/status` has the
same facts as JSON, and `/` shows them on [a page](watching.md#the-page). They are read from memory, answer GET and
HEAD, and change nothing. There is no password, and the names of images and upstreams are shown: restrict who can
reach the address, or use a Unix socket such as `unix:/run/ociregistry/admin.sock:mode=660`.
`--admin-listen ''` serves them nowhere.

```sh
curl -s http://localhost:8081/status | jq '.status, .incomplete, .links'
```

Where the default address is in use, as by a second daemon on the machine, the daemon says so in one warning and goes
on without. An address that was given must be free, else the daemon does not start. When it stops, this address is
closed last, and `stopping` is true meanwhile.

(`python -m tools.metrics` generates this page from the definitions of the program.)

## Prometheus

[Watching it](watching.md#prometheus-and-grafana) has its configuration, the alerts, and a dashboard for Grafana.

Names of upstreams are values of labels only for those that are configured, and for a bounded number of others,
since clients may ask for any name. A request is counted when its answer has ended; requests that are no valid HTTP
are not counted, and those of commands that download through the daemon are. Times of answers begin with the last
byte of the request.

The usual metrics of the process and of Python (`process_…`, `python_…`) are there too.

| metric | type | labels | meaning |
|---|---|---|---|
"""
_STATUS = """
## Status

An example. Sizes are in bytes, durations in seconds, times in UTC.

```json
"""


def example() -> dict[str, object]:
    """Return the example of a status."""
    started = datetime(2026, 11, 25, 19, 20, 31, tzinfo=UTC)
    requests = Requests()
    requests.tally(Kind.MANIFEST, Outcome.HIT).count(1000, 0.0, 0.0)
    requests.tally(Kind.BLOB, Outcome.MISS).count(52_000_000, 2.0, 31.0)
    requests.cut[Kind.BLOB, CutBy.CLIENT] += 1
    told = document(
        Status(
            version="1.0.0",
            started=started,
            stopping=False,
            reasons=(),
            listeners=("[::]:8080",),
            air_gapped=False,
            store="/var/lib/ociregistry",
            records=Counts(lists=2, images=3),
            usage=Usage(bytes=61_004_812, blobs=11),
            disk=Room(size=100_000_000_000, free=20_000_000_000, reserve=2_000_000_000, full=False),
            incomplete=IncompleteState(images=1, bytes=40_000_000, pending=0, indexes=0, seconds_left=124),
            incomplete_images=(
                IncompleteImage(
                    "quay.io/jetstack/cert-manager-controller:v1.14.0", f"sha256:{'fedcba9876543210' * 4}", 40_000_000
                ),
            ),
            downloads=(
                DownloadState(
                    blob=f"sha256:{'0123456789abcdef' * 4}",
                    repository="quay.io/jetstack/cert-manager-controller",
                    upstream="quay.io",
                    bytes=9_000_000,
                    size=40_000_000,
                    clients=1,
                    started=started + timedelta(seconds=564),
                    rate=250_000.0,
                    seconds_left=124,
                    image="quay.io/jetstack/cert-manager-controller:v1.14.0",
                ),
            ),
            links=(
                LinkState("quay.io:443", named=True, up=True, for_seconds=300.0, why="", next_probe=None),
                LinkState(
                    "registry.k8s.io:443", named=True, up=False, for_seconds=60.0, why="no route", next_probe=12.5
                ),
            ),
            bandwidth=BandwidthLimit(250_000.0, "08:00-18:00"),
            received={"other": 0, "quay.io": 61_000_000},
            preload=PreloadProgress(images=9, loaded=5, failed=1),
            maintenance=MaintenanceState(next_prune=started + timedelta(hours=1)),
            in_flight=1,
            requests=requests,
            errors=(
                LoggedError(
                    started + timedelta(seconds=541),
                    "ociregistry.web",
                    "GET /v2/pause/manifests/3.9?ns=registry.k8s.io: 503 UNAVAILABLE: registry.k8s.io: no route",
                ),
            ),
        ),
        started + timedelta(seconds=600),
    )
    for key in ("requests", "answers_cut"):
        told[key] = [row for row in told[key] if row["answers"]]  # type: ignore[attr-defined]  # a list of mappings
    return told


def page() -> str:
    """Return the text of the page."""
    return "".join([_HEAD, *_table(), _STATUS, json.dumps(example(), indent=2), "\n```\n"])


def _table() -> Iterator[str]:
    for definition in DEFINITIONS:
        labels = ", ".join(f"`{label}`" for label in definition.labels)
        yield f"| `{definition.name}` | {definition.type} | {labels} | {definition.help} |\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
