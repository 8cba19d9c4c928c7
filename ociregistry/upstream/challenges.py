"""Bearer challenges: what a registry wants to see a token for (RFC 6750, and the token authentication of
distribution)."""

from __future__ import annotations

import re
from dataclasses import dataclass

_PARAMETER = re.compile(r'\s*([a-zA-Z_]+)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s",]+))\s*(?:,|$)')


@dataclass(frozen=True, slots=True)
class BearerChallenge:
    """Where to fetch a token (`realm`, a URL), for which `service` and `scope`."""

    realm: str
    service: str = ""
    scope: str = ""

    @classmethod
    def parse(cls, header: str) -> BearerChallenge | None:
        """The Bearer challenge in a `WWW-Authenticate` header, or None if it is another one or malformed."""
        scheme, _, rest = header.strip().partition(" ")
        if scheme.lower() != "bearer":
            return None
        parameters = {
            match[1].lower(): re.sub(r"\\(.)", r"\1", match[2]) if match[2] is not None else match[3]
            for match in _PARAMETER.finditer(rest)
        }
        if not parameters.get("realm"):
            return None
        return cls(parameters["realm"], parameters.get("service", ""), parameters.get("scope", ""))
