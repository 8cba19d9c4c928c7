"""The configuration file as a whole: a list of upstreams, or a mapping of options and sections.

Also the sections `bandwidth`, `prune` and `verify`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field
from datetime import time, timedelta
from pathlib import Path
from typing import TypeVar

from ociregistry.config.files import ConfigFiles
from ociregistry.config.nodes import Node
from ociregistry.config.proxy import Proxies, read_proxies
from ociregistry.config.registries import RegistrySettings, read_registries
from ociregistry.config.tls import ServerTls, read_server_tls
from ociregistry.config.values import Patterns, parse_duration, parse_endpoint, parse_share, parse_size
from ociregistry.names import Upstream
from ociregistry.platforms import Platform

T = TypeVar("T")


_RATE = re.compile(r"(?P<number>[0-9]{1,9}(?:\.[0-9]{1,6})?) ?(?P<unit>[kMG]?)bit")
_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9}
_TIME = re.compile(r"(?P<hour>[01]?[0-9]|2[0-4]):(?P<minute>[0-5][0-9])")
_LEAST = 8000
"""Bits per second; with less, downloads are too slow for the timeouts of clients."""


@dataclass(frozen=True, slots=True)
class Window:
    """A daily time window with a limit of `rate` bytes per second.

    Times are local; `begin` is included, `end` is not.
    """

    begin: time
    end: time
    rate: float

    def holds(self, now: time) -> bool:
        """Tell whether `now` is in the window; one that ends before it begins spans midnight."""
        if self.begin < self.end:
            return self.begin <= now < self.end
        return now >= self.begin or now < self.end

    def __str__(self) -> str:
        return f"{self.begin:%H:%M}-{self.end:%H:%M}"


def parse_rate(text: str) -> float | None:
    """Parse a rate in bits per second, such as `500kbit` or `2Mbit`.

    Returns:
        Bytes per second, or None for the empty string.

    Raises:
        ValueError: it is malformed, or below `8kbit`.
    """
    if not text:
        return None
    match = _RATE.fullmatch(text)
    bits = float(match["number"]) * _UNITS[match["unit"]] if match else 0.0
    if bits < _LEAST:
        raise ValueError("a rate such as 500kbit or 2Mbit is expected, 8kbit at least")
    return bits / 8


def read_windows(node: Node) -> tuple[Window, ...]:
    """Read the section `bandwidth`, a list of mappings.

    Raises:
        ConfigInvalid: a key is missing or unknown, or a value is malformed.
    """
    return tuple(map(_window, node.items()))


def _window(node: Node) -> Window:
    nodes = node.mapping("from", "to", "max", below="bandwidth.")
    for key in ("from", "to", "max"):
        if key not in nodes:
            raise node.missing(f"bandwidth.{key}", "a window needs from, to and max")
    try:
        rate = parse_rate(nodes["max"].word())
    except ValueError as error:
        raise nodes["max"].error(f"{nodes['max'].word()!r}: {error}") from None
    assert rate is not None
    return Window(_time(nodes["from"]), _time(nodes["to"]), rate)


def _time(node: Node) -> time:
    match = _TIME.fullmatch(node.word())
    hour, minute = (int(match["hour"]), int(match["minute"])) if match else (99, 0)
    if hour > 24 or (hour == 24 and minute):
        raise node.error(f"{node.word()!r}: a time of the day such as 08:00 is expected")
    return time(hour % 24, minute)


_USUAL_SHARE = 50


@dataclass(frozen=True, slots=True)
class PruneSettings:
    """Settings of automatic pruning (section `prune`)."""

    unused_for: timedelta | None
    """Prune images that no client pulled for this long; None to keep them."""
    max_size: int | None
    """Bytes that the store may use; None for no limit."""
    keep: Patterns
    """Image URLs that are never pruned."""
    every: timedelta
    """Interval between two runs."""
    max_share: int
    """Percentage of the images: if more of them are unused, none is pruned for it, as the clock may be wrong."""


@dataclass(frozen=True, slots=True)
class VerifySettings:
    """Settings of automatic verification (section `verify`)."""

    every: timedelta
    """Interval between two runs."""
    max_rate: int | None
    """Bytes to read per second; None for no limit."""


def read_prune(node: Node) -> PruneSettings:
    """Read the section `prune`.

    Raises:
        ConfigInvalid: a key is missing or unknown, or a value is malformed.
    """
    nodes = node.mapping("unused_for", "max_size", "keep", "every", "max_share", below="prune.")
    if "unused_for" not in nodes and "max_size" not in nodes:
        raise node.error("has neither unused_for nor max_size: nothing would ever be pruned")
    return PruneSettings(
        unused_for=_parsed(nodes["unused_for"], parse_duration) if "unused_for" in nodes else None,
        max_size=_parsed(nodes["max_size"], parse_size) if "max_size" in nodes else None,
        keep=Patterns(tuple(one for item in _items(nodes.get("keep")) for one in _pattern(item).expressions)),
        every=_parsed(nodes["every"], parse_duration) if "every" in nodes else timedelta(hours=1),
        max_share=_parsed(nodes["max_share"], parse_share) if "max_share" in nodes else _USUAL_SHARE,
    )


def read_verify(node: Node) -> VerifySettings:
    """Read the section `verify`.

    Raises:
        ConfigInvalid: a key is missing or unknown, or a value is malformed.
    """
    nodes = node.mapping("every", "max_rate", below="verify.")
    if "every" not in nodes:
        raise node.missing("verify.every", "give an interval such as 7d")
    return VerifySettings(
        every=_parsed(nodes["every"], parse_duration),
        max_rate=_parsed(nodes["max_rate"], parse_size) if "max_rate" in nodes else None,
    )


def _items(node: Node | None) -> list[Node]:
    return node.items() if node is not None else []


def _pattern(node: Node) -> Patterns:
    return _parsed(node, lambda text: Patterns.of([text]))


def _endpoint(node: Node) -> str:
    return _parsed(node, parse_endpoint)


def _parsed(node: Node, parse: Callable[[str], T]) -> T:
    text = node.word()
    try:
        return parse(text)
    except ValueError as error:
        raise node.error(f"{text!r}: {error}") from None


_SECTIONS = (
    *("registries", "listen", "proxy", "bandwidth"),
    *("complete_metadata", "complete_platforms", "prune", "verify", "tls"),
)
"""Keys whose values are not those of a command-line option."""


@dataclass(frozen=True, slots=True)
class Config:
    """The contents of a configuration file."""

    path: Path
    values: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """Option key to its text and its place (file, line and key)."""
    listen: tuple[str, ...] = ()
    registries: Mapping[Upstream, RegistrySettings] = field(default_factory=dict)
    proxy: Proxies | None = None
    """The proxies of all upstreams; None for those of the environment."""
    bandwidth: tuple[Window, ...] = ()
    complete_metadata: bool = True
    complete_platforms: tuple[Platform, ...] = ()
    prune: PruneSettings | None = None
    verify: VerifySettings | None = None
    tls: ServerTls | None = None
    tls_at: str = ""
    """Place of the section `tls` (file, line and key), for errors."""
    warnings: tuple[str, ...] = ()
    """Messages about settings that are valid but probably a mistake."""


def read_config(path: Path, options: Set[str], files: ConfigFiles) -> Config:
    """Read the configuration file at `path`, and by `files` what it names; `options` are the keys of options.

    Raises:
        ConfigInvalid: the file cannot be read, a key is unknown, or a value is invalid.
    """
    root = Node.read(path, files)
    if root.is_list:
        registries, warnings = read_registries(root)
        return Config(path, registries=registries, warnings=warnings)
    nodes = root.mapping(*options, *_SECTIONS)
    registries, warnings = read_registries(nodes["registries"]) if "registries" in nodes else ({}, ())
    given = {key: node for key, node in nodes.items() if not node.is_empty}
    tls, bandwidth = given.get("tls"), given.get("bandwidth")
    return Config(
        path,
        values={key: (node.text(), node.where) for key, node in nodes.items() if key in options},
        listen=tuple(map(_endpoint, nodes["listen"].items('["tcp:8080"]'))) if "listen" in nodes else (),
        registries=registries,
        proxy=read_proxies(nodes["proxy"]) if "proxy" in nodes else None,
        bandwidth=read_windows(bandwidth) if bandwidth else (),
        complete_metadata=nodes["complete_metadata"].flag() if "complete_metadata" in nodes else True,
        complete_platforms=_platforms(nodes["complete_platforms"]) if "complete_platforms" in nodes else (),
        prune=read_prune(given["prune"]) if "prune" in given else None,
        verify=read_verify(given["verify"]) if "verify" in given else None,
        tls=read_server_tls(tls) if tls else None,
        tls_at=tls.where if tls else "",
        warnings=warnings,
    )


def _platforms(node: Node) -> tuple[Platform, ...]:
    return tuple(_platform(item) for item in node.items())


def _platform(node: Node) -> Platform:
    text = node.word()
    try:
        return Platform.parse(text)
    except ValueError as error:
        raise node.error(f"{text!r}: {error}") from None
