"""How twistd finds the daemon."""

from __future__ import annotations

from twisted.application.service import ServiceMaker

ociregistry = ServiceMaker(
    "ociregistry", "ociregistry.tap", "A pull-through caching OCI registry server", "ociregistry"
)
