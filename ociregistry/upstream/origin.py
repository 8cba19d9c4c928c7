"""Origins of URLs (RFC 6454), redirects from one to another, and URLs without what may be secret in them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import urljoin, urlsplit

_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a URL leads (RFC 6454); `host` is lower-case, an IPv6 address without its brackets."""

    scheme: str
    host: str
    port: int

    @classmethod
    def of(cls, url: str) -> Origin:
        """The origin of an http or https URL without a user; raises `ValueError` for any other."""
        parts = urlsplit(url)
        if parts.scheme not in _PORTS or not parts.hostname or "@" in parts.netloc or parts.port == 0:
            raise ValueError(f"{without_query(url)!r} is no URL of a web server")
        return cls(parts.scheme, parts.hostname, parts.port or _PORTS[parts.scheme])


def redirected(url: str, location: str) -> str:
    """Where a redirect at `url` leads; raises `ValueError` when it leads nowhere, or from https to http."""
    try:
        target = urljoin(url, location)
        scheme = Origin.of(target).scheme
    except ValueError:
        raise ValueError(f"it redirects to {without_query(location)!r}, which is no URL of a web server") from None
    if Origin.of(url).scheme == "https" and scheme == "http":
        raise ValueError("it redirects from https to http")
    return target


def without_query(url: str) -> str:
    """For a message: the query may hold a signature, and what stands before the host a password."""
    return re.sub(r"//[^/]*@", "//", url.partition("?")[0])[:200]
