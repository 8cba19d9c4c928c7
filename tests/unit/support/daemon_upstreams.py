"""The image that a daemon under test pulls, and the requests that its upstream received."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from ociregistry.daemon import Daemon
from ociregistry.names import Digest, ImageReference
from tests.images import make_image
from tests.unit.support.common import image
from tests.unit.support.daemons import Daemons
from tests.upstream import ScriptedRegistry

BUILT = make_image("beside", layers=2, layer_size=30_000)
LAYER = BUILT.layers[0]


def app(upstream: ScriptedRegistry, tag: str = "1") -> ImageReference:
    """Return the reference of the image at the upstream."""
    return image(f"{upstream.host}/team/app:{tag}")


def start(daemons: Daemons, upstream: ScriptedRegistry, *argv: str) -> Daemon:
    """Start a daemon that may use the upstream."""
    return daemons.start("--default-ns", upstream.host, *argv)


def here(root: Path, digest: str) -> Path:
    """Return the path of a blob."""
    return root / "blobs" / Digest(digest).hex


def counts(upstream: ScriptedRegistry) -> Counter[str]:
    """Return the number of requests by path."""
    return Counter(request.path for request in upstream.requests)
