"""Write the picture of the page in docs/watching.md, of an example: `python -m tools.screenshot`.

It needs Debian's chromium, pngquant and fonts-dejavu-core.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from importlib.resources import files
from pathlib import Path
from shutil import copy

from twisted.web.template import flattenString

from ociregistry.admin.errors import LoggedError
from ociregistry.admin.images import Selection, select
from ociregistry.admin.requests import Kind, Outcome, Requests
from ociregistry.admin.status import DownloadState, IncompleteImage, IncompleteState, Status
from ociregistry.names import Digest
from ociregistry.pullthrough.maintenance import MaintenanceState
from ociregistry.store.listing import ListedImage, Listing, Order
from ociregistry.store.lookups import Counts
from ociregistry.store.space import Room
from ociregistry.store.usage import Usage
from ociregistry.upstream.bandwidth import BandwidthLimit
from ociregistry.upstream.breaker import LinkState
from ociregistry.web.page import page

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs" / "assets" / "page.png"
SIZE = (1040, 1490)
"""Pixels."""
_NOW = datetime(2026, 11, 25, 19, 30, tzinfo=UTC)
_STARTED = _NOW - timedelta(days=12, hours=4)
_NGINX = "docker.io/library/nginx:1.29"
_CERT_MANAGER = "quay.io/jetstack/cert-manager-controller:v1.19.1"
_KUBE_PROXY = "registry.k8s.io/kube-proxy:v1.34.2"
_MISSING = {_NGINX: 40_100_000, _KUBE_PROXY: 21_900_000, _CERT_MANAGER: 7_100_000}
"""Bytes that images lack."""
_IMAGES = (
    ("registry.k8s.io/pause:3.10", 300_000, 300, 1.4),
    (_KUBE_PROXY, 26_000_000, 0.1, 0.05),
    ("registry.k8s.io/coredns/coredns:v1.12.4", 22_400_000, 290, 30),
    (_NGINX, 59_800_000, 0.1, 0.1),
    (_CERT_MANAGER, 20_300_000, 0.3, 0.2),
    ("ghcr.io/fluxcd/source-controller:v1.7.4", 36_100_000, 120, 4),
)
"""Image URL, size in bytes, and the hours since it was created and last pulled."""


def _digest(text: str) -> Digest:
    return Digest.of(text.encode())


def _download(image: str, here: int, size: int, rate: float, clients: int) -> DownloadState:
    repository = image.rpartition(":")[0]
    return DownloadState(
        blob=str(_digest(f"layer of {image}")),
        repository=repository,
        upstream=repository.partition("/")[0],
        bytes=here,
        size=size,
        clients=clients,
        started=_NOW - timedelta(minutes=3),
        rate=rate,
        seconds_left=round((size - here) / rate),
        image=image,
    )


def _requests() -> Requests:
    requests = Requests()
    for outcome, count, size in ((Outcome.HIT, 2841, 4_100_000), (Outcome.MISS, 96, 9_300_000)):
        for _ in range(count):
            requests.tally(Kind.BLOB, outcome).count_at_once(size, 0.1)
    requests.tally(Kind.MANIFEST, Outcome.SERVER_ERROR).count_at_once(0, 0.1)
    return requests


def _status() -> Status:
    return Status(
        version="1.0.0",
        started=_STARTED,
        stopping=False,
        reasons=("docker.io cannot be reached, and something from it is wanted: no route to host",),
        listeners=("[::]:8080",),
        air_gapped=False,
        store="/var/lib/ociregistry",
        records=Counts(lists=61, images=74),
        usage=Usage(bytes=14_200_000_000, blobs=511),
        disk=Room(size=64_000_000_000, free=41_300_000_000, reserve=3_200_000_000, full=False),
        incomplete=IncompleteState(images=3, bytes=sum(_MISSING.values()), seconds_left=279),
        incomplete_images=tuple(
            IncompleteImage(image, str(_digest(image)), missing) for image, missing in _MISSING.items()
        ),
        downloads=(
            _download(_CERT_MANAGER, 13_200_000, 20_300_000, 187_000.0, 3),
            _download(_KUBE_PROXY, 4_100_000, 26_000_000, 61_000.0, 0),
        ),
        links=(
            LinkState("docker.io:443", True, False, 1130.0, "no route to host", 14.0, wanted=True),
            LinkState("quay.io:443", True, True, 88_000.0, "", None),
            LinkState("registry.k8s.io:443", True, True, 88_200.0, "", None),
        ),
        bandwidth=BandwidthLimit(250_000.0, "08:00-18:00"),
        received={"other": 0, "quay.io": 893_000_000},
        preload=None,
        maintenance=MaintenanceState(
            last_prune=_NOW - timedelta(hours=16),
            next_prune=_NOW + timedelta(hours=8),
            pruned_image_urls=4,
            pruned_bytes=910_000_000,
        ),
        in_flight=4,
        requests=_requests(),
        errors=(
            LoggedError(
                _NOW - timedelta(minutes=18),
                "ociregistry.web",
                "GET /v2/library/nginx/manifests/1.29?ns=docker.io: 503 UNAVAILABLE: docker.io: no route to host",
            ),
        ),
    )


def _listing() -> Listing:
    images = [
        ListedImage(url, False, size, _NOW - timedelta(hours=age), _NOW - timedelta(hours=pulled), (_digest(url),))
        for url, size, age, pulled in _IMAGES
    ]
    newest = sorted(images, key=lambda one: one.pulled)
    return Listing({**dict.fromkeys(Order, images), Order.PULLED: newest})


def html() -> bytes:
    """Return the page of the example."""
    selected = select(_listing(), Selection(order=Order.PULLED, descending=True))
    missing = {_digest(image): size for image, size in _MISSING.items()}
    static = {name: name for name in ("icon.svg", "page.css", "page.js")}
    made: list[bytes] = []
    # All of it is here, so that the Deferred fires at once.
    flattenString(None, page(_status(), _NOW, selected, missing, static)).addCallback(made.append)
    return b"<!DOCTYPE html>" + made[0]


def take(picture: Path) -> None:
    """Take a picture of the page by Debian's chromium, without its script: no daemon would answer that."""
    with tempfile.TemporaryDirectory() as folder:
        at = Path(folder) / "index.html"
        at.write_bytes(html())
        copy(str(files("ociregistry.web").joinpath("static", "page.css")), folder)
        switches = (
            *("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
            f"--user-data-dir={folder}/profile",
            f"--window-size={SIZE[0]},{SIZE[1]}",
            f"--screenshot={picture}",
        )
        subprocess.run(["chromium", *switches, at.as_uri()], check=True, capture_output=True, timeout=120)
    # 256 colours take a third of the bytes.
    subprocess.run(["pngquant", "--force", "--strip", "--output", picture, "256", picture], check=True, timeout=120)


def main(arguments: Sequence[str]) -> None:
    """Write the picture in docs/, or at the path that is given."""
    take(Path(arguments[0]) if arguments else PICTURE)


if __name__ == "__main__":
    main(sys.argv[1:])
