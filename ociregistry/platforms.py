"""Platforms: which images of a manifest list are wanted.

The names are those of the OCI Image specification ("image index"), which are Go's GOOS and GOARCH.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass

from ociregistry.manifests import Descriptor

_WORD = "[a-z0-9][a-z0-9_.-]{0,63}"
_PLATFORM = re.compile(f"(?P<os>{_WORD})/(?P<architecture>{_WORD})(?:/(?P<variant>{_WORD}))?")
_MACHINES = {
    "x86_64": "amd64",
    "aarch64": "arm64",
    "i386": "386",
    "i686": "386",
    "armv7l": "arm",
    "armv6l": "arm",
    "loongarch64": "loong64",
}
"""What the kernel calls a machine, where that is not what Go calls it."""
_ARM = ("v7", "v6", "v5")
_USUAL_VARIANTS = {"arm": _ARM[1:] if platform.machine() == "armv6l" else _ARM, "arm64": ("v8",), "amd64": ("v1",)}
"""The variants that are meant when none is named, the best first."""


@dataclass(frozen=True, slots=True)
class Platform:
    """One platform; without a `variant`, the usual one."""

    os: str
    architecture: str
    variant: str = ""

    @classmethod
    def parse(cls, text: str) -> Platform:
        """The platform that `linux/arm64` or `linux/arm/v7` names; raises `ValueError`."""
        match = _PLATFORM.fullmatch(text)
        if match is None:
            raise ValueError("a platform such as linux/amd64 or linux/arm/v7 is expected")
        return cls(match["os"], match["architecture"], match["variant"] or "")

    def best(self, offered: Sequence[Descriptor]) -> Descriptor | None:
        """The one of those `offered` that is for this platform, or None."""
        usual = _USUAL_VARIANTS.get(self.architecture, ())
        variants = (self.variant,) if self.variant else ("", *usual)
        if (self.variant,) == usual:
            # Lists often leave out the only one that there is.
            variants += ("",)
        by_platform = {one.platform: one for one in reversed(offered)}
        spelled = (str(Platform(self.os, self.architecture, variant)) for variant in variants)
        return next((by_platform[name] for name in spelled if name in by_platform), None)

    def __str__(self) -> str:
        return "/".join(filter(None, (self.os, self.architecture, self.variant)))


NO_PLATFORM = "unknown/unknown"
"""What buildkit calls the platform of attestations."""
ALL: tuple[Platform, ...] = ()
"""Whatever a list names."""


def parse_platforms(text: str) -> tuple[Platform, ...]:
    """The platforms in `text`, separated by commas; `ALL` for `all`. Raises `ValueError`."""
    return ALL if text == "all" else tuple(Platform.parse(one.strip()) for one in text.split(","))


def chosen(
    offered: Sequence[Descriptor], wanted: Sequence[Platform]
) -> tuple[tuple[Descriptor, ...], frozenset[Platform]]:
    """Those of a list's children that are `wanted`, and the platforms that they are for.

    A child that tells no platform, such as a list in a list, counts as wanted.
    """
    if not wanted:
        return tuple(offered), frozenset()
    found = {platform: best for platform in wanted if (best := platform.best(offered)) is not None}
    digests = {best.digest for best in found.values()}
    return tuple(one for one in offered if one.digest in digests or not one.platform), frozenset(found)


def machine_os() -> str:
    """The operating system of this machine."""
    return platform.system().lower()


def machine_architecture() -> str:
    """The architecture of this machine."""
    machine = platform.machine().lower()
    return _MACHINES.get(machine, machine)
