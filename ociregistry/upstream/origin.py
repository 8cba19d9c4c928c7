"""Origins of URLs (RFC 6454), targets of redirects, and URLs without their secrets."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from urllib.parse import urljoin, urlsplit

_PORTS = {"http": 80, "https": 443}
_CHARACTERS = re.compile(r"[!-~]+")


@dataclass(frozen=True, slots=True)
class Origin:
    """The origin of a URL (RFC 6454); `host` is in lower case, an IPv6 address without brackets."""

    scheme: str
    host: str
    port: int

    @property
    def netloc(self) -> str:
        """The host and the port as in a URL: an IPv6 address in brackets."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    @classmethod
    @lru_cache(maxsize=128)
    def of(cls, url: str) -> Origin:
        """Return the origin of `url`.

        Raises:
            ValueError: it is not an http or https URL with a host (RFC 3986), or it contains a user or the port 0.
        """
        # `urlsplit` accepts other characters, and removes some.
        parts = urlsplit(url if _CHARACTERS.fullmatch(url) else "")
        if parts.scheme not in _PORTS or not parts.hostname or "@" in parts.netloc or parts.port == 0:
            raise ValueError(f"{without_query(url)!r} is not an http or https URL")
        return cls(parts.scheme, parts.hostname, parts.port or _PORTS[parts.scheme])


def redirected(url: str, location: str) -> str:
    """Return the target of a redirect from `url` with the header `Location: location`.

    Raises:
        ValueError: the target has no `Origin`, or the redirect leads from https to http.
    """
    try:
        target = urljoin(url, location)
        scheme = Origin.of(target).scheme
    except ValueError:
        raise ValueError(f"it redirects to {without_query(location)!r}, which is not an http or https URL") from None
    if Origin.of(url).scheme == "https" and scheme == "http":
        raise ValueError("it redirects from https to http")
    return target


def without_query(url: str) -> str:
    """Return at most 200 characters of a URL for a message, without the query and the user.

    The query may contain a signature, and the user a password.
    """
    return re.sub(r"//[^/]*@", "//", url.partition("?")[0])[:200]
