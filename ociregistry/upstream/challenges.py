"""Challenges: how a registry wants to be told who asks (RFC 7617, RFC 6750, and the token authentication of
distribution)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice

_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
# A header may hold several challenges, and a challenge several parameters, with commas between all of them alike
# (RFC 9110, section 11.6.1): a part that begins with two words begins a challenge.
# A quote without its end goes to the end of the header, so that no part is tried twice.
_PART = re.compile(r'(?:[^",]|"(?:[^"\\]|\\.?)*(?:"|\Z))+', re.DOTALL)
_MOST = 8
_LONGEST = 4096
_BEGINNING = re.compile(rf"\s*(?P<scheme>{_TOKEN})(?:\s+(?!\s|=)(?P<rest>.*)|\s*)", re.DOTALL)
_PARAMETER = re.compile(rf'\s*(?P<name>{_TOKEN})\s*=\s*(?:"(?P<quoted>(?:[^"\\]|\\.)*)"|(?P<plain>[^\s",]+))\s*')


@dataclass(frozen=True, slots=True)
class BasicChallenge:
    """A user and a password are wanted."""


@dataclass(frozen=True, slots=True)
class BearerChallenge:
    """Where to fetch a token (`realm`, a URL), for which `service` and `scope`."""

    realm: str
    service: str = ""
    scope: str = ""

    @classmethod
    def parse(cls, header: str) -> BearerChallenge | None:
        """The Bearer challenge in a `WWW-Authenticate` header, or None if it is another one or malformed."""
        return next((found for found in _challenges([header]) if isinstance(found, BearerChallenge)), None)

    def with_default_scope(self, default: str) -> BearerChallenge:
        """Return the same challenge, with the scope `default` where it tells none or an empty one."""
        return self if self.scope.strip() else replace(self, scope=default)

    def widened(self, other: BearerChallenge) -> BearerChallenge:
        """The same for the scopes of `other` too."""
        scopes = dict.fromkeys([*self.scope.split(), *other.scope.split()])
        return replace(other, scope=" ".join(scopes))


Challenge = BasicChallenge | BearerChallenge


def best_challenge(headers: Iterable[str]) -> Challenge | None:
    """The challenge in these `WWW-Authenticate` headers that is answered: a Bearer one before a Basic one."""
    found = list(_challenges(headers))
    return next((one for one in found if isinstance(one, BearerChallenge)), next(iter(found), None))


def lacks_scope(headers: Iterable[str]) -> bool:
    """Whether a token was refused because it is for too little (RFC 6750, section 3.1)."""
    return ("bearer", "insufficient_scope") in ((scheme, told.get("error")) for scheme, told in _parsed(headers))


def _challenges(headers: Iterable[str]) -> Iterator[Challenge]:
    for scheme, told in _parsed(headers):
        if scheme == "basic":
            yield BasicChallenge()
        elif scheme == "bearer" and told.get("realm"):
            yield BearerChallenge(told["realm"], told.get("service", ""), told.get("scope", ""))


def _parsed(headers: Iterable[str]) -> list[tuple[str, dict[str, str]]]:
    """Each challenge: its scheme, and its parameters by their names, all in lower case."""
    challenges: list[tuple[str, dict[str, str]]] = []
    for header in islice(headers, _MOST):
        told: dict[str, str] = {}
        for part in _PART.findall(header[:_LONGEST]):
            beginning = _BEGINNING.fullmatch(part)
            if beginning is not None:
                told = {}
                challenges.append((beginning["scheme"].lower(), told))
            parameter = _PARAMETER.fullmatch((beginning["rest"] or "") if beginning else part)
            if parameter is not None:
                quoted = parameter["quoted"]
                value = parameter["plain"] if quoted is None else re.sub(r"\\(.)", r"\1", quoted)
                told[parameter["name"].lower()] = value
    return challenges
