"""A pull-only, pull-through, caching OCI Distribution server for bad links."""

__version__ = "0.1.0"
