"""What the daemon does by itself to keep the cache small and sound: the sections `prune` and `verify`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

from ociregistry.config.nodes import Node
from ociregistry.config.patterns import Patterns
from ociregistry.config.quantities import parse_duration, parse_share, parse_size

T = TypeVar("T")

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
