"""The Via header (RFC 9110, section 7.6.3): detects loops in a chain of caches."""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass

_INSTANCE = re.compile(r"ociregistry-[0-9a-f]{16}")
_LONGEST = 16
"""Number of caches. A longer chain is taken for a loop whose instance names change."""


def new_instance() -> str:
    """Make a random, unique name for this process."""
    return f"ociregistry-{secrets.token_hex(8)}"


@dataclass(frozen=True, slots=True)
class Via:
    """The instances of this program that a request came through, the nearest to the client first."""

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
