"""The configuration file as a whole: a list of upstreams, or a mapping of options and sections."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field
from datetime import time, timedelta
from pathlib import Path
from typing import TypeVar

from ociregistry.config.nodes import Node
from ociregistry.config.registries import RegistrySettings, read_registries
from ociregistry.config.tls import ServerTls, read_server_tls
from ociregistry.config.values import Patterns, parse_duration, parse_share, parse_size
from ociregistry.names import Upstream
from ociregistry.platforms import Platform

T = TypeVar("T")


_RATE = re.compile(r"(?P<number>[0-9]{1,9}(?:\.[0-9]{1,6})?) ?(?P<unit>[kMG]?)bit")
_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9}
_TIME = re.compile(r"(?P<hour>[01]?[0-9]|2[0-4]):(?P<minute>[0-5][0-9])")
_LEAST = 8000
"""Bits a second: below it nothing would come in a client's time."""


@dataclass(frozen=True, slots=True)
class Window:
    """A time of every day, local, in which at most `rate` bytes a second may come; its end is not part of it."""

    begin: time
    end: time
    rate: float

    def holds(self, now: time) -> bool:
        """Whether it is that time; one that ends before it begins goes over midnight."""
        if self.begin < self.end:
            return self.begin <= now < self.end
        return now >= self.begin or now < self.end


def parse_rate(text: str) -> float | None:
    """Bytes a second, from `500kbit` or `2Mbit`; None for the empty string. Raises `ValueError`."""
    if not text:
        return None
    match = _RATE.fullmatch(text)
    bits = float(match["number"]) * _UNITS[match["unit"]] if match else 0.0
    if bits < _LEAST:
        raise ValueError("a rate such as 500kbit or 2Mbit is expected, 8kbit at least")
    return bits / 8


def read_windows(node: Node) -> tuple[Window, ...]:
    """The windows of a list of mappings; raises `ConfigInvalid`."""
    return tuple(map(_window, node.items()))


def _window(node: Node) -> Window:
    nodes = node.mapping("from", "to", "max", below="bandwidth.")
    for key in ("from", "to", "max"):
        if key not in nodes:
            raise node.missing(f"bandwidth.{key}", "a window has from, to and max")
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
    """When images go by themselves."""

    unused_for: timedelta | None
    """Those that nobody pulled for so long; None for none."""
    max_size: int | None
    """Bytes that the store may take; None for as many as there are."""
    keep: Patterns
    """Image URLs that never go."""
    every: timedelta
    max_share: int
    """Per cent of the images that may go at once because nobody pulled them."""


@dataclass(frozen=True, slots=True)
class VerifySettings:
    """When, and how fast, everything is hashed again."""

    every: timedelta
    max_rate: int | None
    """Bytes a second; None for as many as the disk gives."""


def read_prune(node: Node) -> PruneSettings:
    """The section `prune`; raises `ConfigInvalid`."""
    nodes = node.mapping("unused_for", "max_size", "keep", "every", "max_share", below="prune.")
    if "unused_for" not in nodes and "max_size" not in nodes:
        raise node.error("says neither unused_for nor max_size: nothing would ever go")
    return PruneSettings(
        unused_for=_parsed(nodes["unused_for"], parse_duration) if "unused_for" in nodes else None,
        max_size=_parsed(nodes["max_size"], parse_size) if "max_size" in nodes else None,
        keep=Patterns(tuple(one for item in _items(nodes.get("keep")) for one in _pattern(item).expressions)),
        every=_parsed(nodes["every"], parse_duration) if "every" in nodes else timedelta(hours=1),
        max_share=_parsed(nodes["max_share"], parse_share) if "max_share" in nodes else _USUAL_SHARE,
    )


def read_verify(node: Node) -> VerifySettings:
    """The section `verify`; raises `ConfigInvalid`."""
    nodes = node.mapping("every", "max_rate", below="verify.")
    if "every" not in nodes:
        raise node.missing("verify.every", "how often is to be said, such as 7d")
    return VerifySettings(
        every=_parsed(nodes["every"], parse_duration),
        max_rate=_parsed(nodes["max_rate"], parse_size) if "max_rate" in nodes else None,
    )


def _items(node: Node | None) -> list[Node]:
    return node.items() if node is not None else []


def _pattern(node: Node) -> Patterns:
    return _parsed(node, lambda text: Patterns.of([text]))


def _parsed(node: Node, parse: Callable[[str], T]) -> T:
    text = node.word()
    try:
        return parse(text)
    except ValueError as error:
        raise node.error(f"{text!r}: {error}") from None


_SECTIONS = ("registries", "listen", "bandwidth", "complete_metadata", "complete_platforms", "prune", "verify", "tls")
"""Keys that are no plain options."""


@dataclass(frozen=True, slots=True)
class Config:
    """What a file sets: option key -> its text and where it stands; and the sections that are no plain options."""

    path: Path
    values: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    listen: tuple[str, ...] = ()
    registries: Mapping[Upstream, RegistrySettings] = field(default_factory=dict)
    bandwidth: tuple[Window, ...] = ()
    complete_metadata: bool = True
    complete_platforms: tuple[Platform, ...] = ()
    prune: PruneSettings | None = None
    verify: VerifySettings | None = None
    tls: ServerTls | None = None
    tls_at: str = ""
    """Where it stands."""
    warnings: tuple[str, ...] = ()
    """What can be used, but is hardly what was meant."""


def read_config(path: Path, options: Set[str]) -> Config:
    """What the file at `path` says; `options` are the keys of plain options. Raises `ConfigInvalid`."""
    root = Node.read(path)
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
        listen=tuple(item.text() for item in nodes["listen"].items()) if "listen" in nodes else (),
        registries=registries,
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
