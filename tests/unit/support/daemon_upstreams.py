"""What a daemon under test pulls, where from, and how often it asked."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from ociregistry.daemon import Daemon
from ociregistry.names import Digest, ImageReference
from tests.images import make_image
from tests.unit.support.daemons import Daemons
from tests.unit.support.doubles import image
from tests.upstream import ScriptedRegistry

BUILT = make_image("beside", layers=2, layer_size=30_000)
LAYER = BUILT.layers[0]


def app(upstream: ScriptedRegistry, tag: str = "1") -> ImageReference:
    """An image at the upstream."""
    return image(f"{upstream.host}/team/app:{tag}")


def start(daemons: Daemons, upstream: ScriptedRegistry, *argv: str) -> Daemon:
    """A daemon that may ask the upstream."""
    return daemons.start("--default-ns", upstream.host, *argv)


def here(root: Path, digest: str) -> Path:
    """Where a blob is."""
    return root / "blobs" / Digest(digest).hex


def counts(upstream: ScriptedRegistry) -> Counter[str]:
    """How often the upstream was asked for what."""
    return Counter(request.path for request in upstream.requests)
