"""The configuration file as a whole: a list of upstreams, or a mapping of options and sections."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path

from ociregistry.config.bandwidth import Window, read_windows
from ociregistry.config.nodes import Node
from ociregistry.config.registries import RegistrySettings, read_registries
from ociregistry.config.tls import ServerTls, read_server_tls
from ociregistry.config.upkeep import PruneSettings, VerifySettings, read_prune, read_verify
from ociregistry.names import Upstream
from ociregistry.platforms import Platform

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
