"""The Via header (RFC 9110, section 7.6.3): caches can be chained, and must not ask each other in a loop."""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass

_INSTANCE = re.compile(r"ociregistry-[0-9a-f]{16}")
_LONGEST = 16
"""Caches; a longer chain is a circle that somebody disguises."""


def new_instance() -> str:
    """A name for this process, unlike that of any other."""
    return f"ociregistry-{secrets.token_hex(8)}"


@dataclass(frozen=True, slots=True)
class Via:
    """The instances of this program that stand between a request and its client, the client's side first."""

    instances: tuple[str, ...] = ()

    @classmethod
    def parse(cls, via: str) -> Via:
        """The chain in a `Via` header (RFC 9110, section 7.6.3); what is not ours in it is left out."""
        return cls(tuple(_INSTANCE.findall(via)))

    def loops_through(self, instance: str) -> bool:
        """Whether the request has been at `instance` before."""
        return instance in self.instances or len(self.instances) > _LONGEST

    def through(self, instance: str) -> str:
        """The `Via` header of a request that `instance` makes to answer this one."""
        return ", ".join(f"1.1 {name}" for name in (*self.instances, instance))


NO_VIA = Via()
"""The client itself asks."""
