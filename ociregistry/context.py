"""The context of a request: the caches that it came through, and its priority at the upstream."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from twisted.internet.defer import Deferred

from ociregistry.errors import Unavailable

_INSTANCE = re.compile(r"ociregistry-[0-9a-f]{16}")
_LONGEST = 16
"""Number of caches. A longer chain is taken for a loop whose instance names change."""


def new_instance() -> str:
    """Make a random, unique name for this process."""
    return f"ociregistry-{secrets.token_hex(8)}"


@dataclass(frozen=True, slots=True)
class Via:
    """The instances of this program that a request came through, the nearest to the client first.

    They are in the `Via` header (RFC 9110, section 7.6.3), which detects loops in a chain of caches.
    """

    instances: tuple[str, ...] = ()

    @classmethod
    def parse(cls, via: str) -> Via:
        """Parse a `Via` header; entries of other programs are ignored."""
        return cls(tuple(_INSTANCE.findall(via)))

    def loops_through(self, instance: str) -> bool:
        """Tell whether the request came through `instance` before, or through too many instances."""
        return instance in self.instances or len(self.instances) > _LONGEST

    def through(self, instance: str) -> str:
        """Return the `Via` header of a request that `instance` sends upstream to answer this one."""
        return ", ".join(f"1.1 {name}" for name in (*self.instances, instance))


NO_VIA = Via()
"""The request comes from a client, not from another cache."""


class Priority(IntEnum):
    """Which requests to an upstream go first, from the last to the first."""

    METADATA = 0
    """Metadata of an index's other platforms; also waits while the registry's rate limit is nearly used up."""
    PRELOAD = 1
    """Blobs of preloaded images and of repairs, many at a time."""
    BACKGROUND = 2
    """A blob that no client waits for, one at a time for each upstream."""
    CLIENT = 3
    """What a client waits for."""
    URGENT = 4
    """The rest of what a client already gets, which an open circuit breaker does not refuse."""

    @property
    def pauses(self) -> bool:
        """Whether a download pauses while others receive bytes for clients."""
        return self < Priority.CLIENT

    @property
    def uses_reserved(self) -> bool:
        """Whether large blobs may use the reserved connections, too.

        Where many come at a time they would leave none; those that clients wait for take the connections for blobs.
        """
        return self in (Priority.METADATA, Priority.BACKGROUND)


Again = Callable[[], Coroutine[Deferred[Any], Any, object] | None]
"""Fetches something once more in the background, and keeps the result; returns None while that is being fetched."""


@dataclass(frozen=True, slots=True, eq=False)
class Wanted:
    """What a request is for: such a request goes on when its host is silent, and its late response is kept."""

    link_down: Callable[[Unavailable], object]
    """Called when the host counts as down, so that no client waits any longer."""
    again: Again | None = None
    """The best probe of a host; None where the request is not to be repeated without a client."""


@dataclass(frozen=True, slots=True)
class Context:
    """What decides how a request is passed on to an upstream."""

    via: Via = NO_VIA
    priority: Priority = Priority.CLIENT
    patient: bool = False
    """Whether a command waits, as long as the request to the upstream goes on."""
    wanted: Wanted | None = None

    @property
    def from_cache(self) -> bool:
        """Whether another cache waits, not a client or a command."""
        return bool(self.via.instances) and not self.patient


FROM_CLIENT = Context()
"""A client or a command waits for the result, and no cache is between them and this process."""
IN_BACKGROUND = Context(priority=Priority.BACKGROUND)
"""The store needs the result, and no client waits for it."""
