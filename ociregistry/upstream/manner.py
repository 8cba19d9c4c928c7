"""How a request is made."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Manner:
    """How a request is made, with all that it takes: redirects, tokens."""

    within: float = 30.0
    """Seconds for the headers of each answer."""
    insist: bool = False
    """Whether it is made even if the host could not be reached a moment ago: somebody waits for it."""
    small: bool = False
    """Whether it is for a small object, which does not wait for a connection behind large ones."""
    last: bool = False
    """For the lowest priority: refused while the registry's rate limit is nearly used up."""


NORMALLY = Manner()
