"""Platforms: selects images of an index.

The names are those of the OCI Image specification ("image index"), which are Go's GOOS and GOARCH; others that are in
use, such as x86_64, are normalized where they are parsed.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass

from ociregistry.manifests import Descriptor, normalized_platform, spell_platform

_WORD = "[a-z0-9][a-z0-9_.-]{0,63}"
_PLATFORM = re.compile(f"(?P<os>{_WORD})/(?P<architecture>{_WORD})(?:/(?P<variant>{_WORD}))?")
_MACHINES = {"i686": "386", "armv7l": "arm", "armv6l": "arm", "loongarch64": "loong64"}
"""Names of machines: the kernel's to Go's, where they differ and are not used for images."""
_ARM = ("v7", "v6", "v5")
_USUAL_VARIANTS = {"arm": _ARM[1:] if platform.machine() == "armv6l" else _ARM}
"""Variants of an architecture to use when none is given, the best first; for others, the empty one."""


@dataclass(frozen=True, slots=True)
class Platform:
    """A platform, normalized; an empty `variant` stands for the usual ones of the architecture.

    An `os_version` such as `10.0.17763` stands for all versions that begin with it; an empty one for all.
    """

    os: str
    architecture: str
    variant: str = ""
    os_version: str = ""

    @classmethod
    def parse(cls, text: str) -> Platform:
        """Parse a platform such as `linux/arm64` or `linux/arm/v7`, in any spelling that is in use.

        Raises:
            ValueError: it is malformed.
        """
        match = _PLATFORM.fullmatch(text.lower())
        if match is None:
            raise ValueError("a platform such as linux/amd64 or linux/arm/v7 is expected")
        os, architecture, variant = normalized_platform(match["os"], match["architecture"], match["variant"] or "")
        if architecture == "arm" and variant == "v7" and match["variant"] is None:
            # An index without a variant means v7, but a platform without one stands for the older ones, too.
            variant = ""
        return cls(os, architecture, variant)

    def fitting(self, offered: Sequence[Descriptor]) -> tuple[Descriptor, ...]:
        """Return the descriptors that fit this platform best: those of one variant, in all versions of its system."""
        offered = [one for one in offered if self._has_version(one)]
        best = self.best(offered)
        return tuple(one for one in offered if best is not None and one.platform == best.platform)

    def _has_version(self, one: Descriptor) -> bool:
        return not one.os_version or f"{one.os_version}.".startswith(f"{self.os_version}." if self.os_version else "")

    def best(self, offered: Sequence[Descriptor]) -> Descriptor | None:
        """Return the first descriptor of the variant that fits this platform best, or None if none fits."""
        variants = (self.variant,) if self.variant else _USUAL_VARIANTS.get(self.architecture, ("",))
        by_platform = {one.platform: one for one in reversed(offered)}
        spelled = (str(Platform(self.os, self.architecture, variant)) for variant in variants)
        return next((by_platform[name] for name in spelled if name in by_platform), None)

    def __str__(self) -> str:
        return spell_platform("/".join(filter(None, (self.os, self.architecture, self.variant))), self.os_version)


NO_PLATFORM = "unknown/unknown"
"""The platform that BuildKit gives to attestations."""
ALL: tuple[Platform, ...] = ()
"""All platforms of an index."""


def parse_platforms(text: str) -> tuple[Platform, ...]:
    """Parse platforms separated by commas; `all` gives `ALL`.

    Raises:
        ValueError: a platform is malformed.
    """
    return ALL if text == "all" else tuple(Platform.parse(one.strip()) for one in text.split(","))


def chosen(
    offered: Sequence[Descriptor], wanted: Sequence[Platform]
) -> tuple[tuple[Descriptor, ...], frozenset[Platform]]:
    """Select the children of an index for the `wanted` platforms, in all versions of their operating systems.

    Children without a platform, such as a nested index, are always selected.

    Returns:
        The selected children, in the order of the index, and the platforms for which one was found. With `ALL`,
        all children and no platforms.
    """
    if not wanted:
        return tuple(offered), frozenset()
    found = {platform: fitting for platform in wanted if (fitting := platform.fitting(offered))}
    digests = {one.digest for fitting in found.values() for one in fitting}
    return tuple(one for one in offered if one.digest in digests or not one.platform), frozenset(found)


def machine_os() -> str:
    """Return the operating system of this machine in the words of Go, such as `linux`."""
    return platform.system().lower()


def machine_architecture() -> str:
    """Return the architecture of this machine in the words of Go, such as `amd64`."""
    machine = platform.machine().lower()
    return _MACHINES.get(machine) or normalized_platform("", machine, "")[1]
