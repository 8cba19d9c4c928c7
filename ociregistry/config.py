"""The configuration file: YAML, read with the line of every key, so that an error can say where it is."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from ociregistry.errors import NameInvalid
from ociregistry.names import Upstream

_SCHEMES = ("http", "https")
_NOT_YET = frozenset({"auth", "tls", "mirrors", "bandwidth", "prune", "verify"})
"""Keys of the design whose work is still to be done; only an empty value is taken."""


class ConfigInvalid(Exception):
    """A value that was set cannot be used; the message says where it was set and what is wrong with it."""


@dataclass(frozen=True, slots=True)
class RegistrySettings:
    """What is configured for one upstream."""

    upstream: Upstream
    scheme: str | None = None
    """`http` or `https`; None to find out."""
    description: str = ""


@dataclass(frozen=True, slots=True)
class Config:
    """What a file sets: option key -> its text and where it stands."""

    path: Path
    values: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    listen: tuple[str, ...] = ()
    registries: Mapping[Upstream, RegistrySettings] = field(default_factory=dict)


def read_config(path: Path, options: Set[str]) -> Config:
    """What the file at `path` says; `options` are the keys of plain options. Raises `ConfigInvalid`."""
    try:
        root = yaml.compose(path.read_text("utf-8"), Loader=yaml.SafeLoader)
    except OSError as error:
        raise ConfigInvalid(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigInvalid(f"{path}: is not UTF-8") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigInvalid(f"{path}:{line}: is not YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise ConfigInvalid(f"{path}: is not YAML: {str(error).splitlines()[0]}") from None
    return _Reader(path, options).config(root)


class _Reader:
    def __init__(self, path: Path, options: Set[str]) -> None:
        self._path = path
        self._options = options

    def config(self, root: yaml.Node | None) -> Config:
        if root is None or _is_null(root):
            return Config(self._path)
        if isinstance(root, yaml.SequenceNode):
            return Config(self._path, registries=self._registries(root, "registries"))
        values: dict[str, tuple[str, str]] = {}
        listen: tuple[str, ...] = ()
        registries: Mapping[Upstream, RegistrySettings] = {}
        for key, node in self._items(root, "the file"):
            if _is_null(node):
                continue
            if key == "registries":
                registries = self._registries(node, key)
            elif key == "listen":
                listen = tuple(self._text(item, key) for item in self._sequence(node, key))
            elif key in self._options:
                values[key] = self._text(node, key), self._where(node)
            else:
                self._refuse(key, node)
        return Config(self._path, values, listen, registries)

    def _registries(self, node: yaml.Node, key: str) -> dict[Upstream, RegistrySettings]:
        registries: dict[Upstream, RegistrySettings] = {}
        for item in self._sequence(node, key):
            entry = self._registry(item)
            if entry.upstream in registries:
                raise self._error(item, f"name: {entry.upstream} is configured twice")
            registries[entry.upstream] = entry
        return registries

    def _registry(self, node: yaml.Node) -> RegistrySettings:
        texts: dict[str, str] = {}
        nodes: dict[str, yaml.Node] = {}
        for key, value in self._items(node, "an entry of registries"):
            if key in ("name", "scheme", "description"):
                if not _is_null(value):
                    texts[key], nodes[key] = self._text(value, key), value
            else:
                self._refuse(key, value)
        if "name" not in texts:
            raise self._error(node, "name: is missing in this entry of registries")
        scheme = texts.get("scheme")
        if scheme not in (*_SCHEMES, None):
            raise self._error(nodes["scheme"], f"scheme: {scheme!r}: http or https is expected")
        try:
            upstream = Upstream.parse(texts["name"])
        except NameInvalid as error:
            raise self._error(nodes["name"], f"name: {error.message}") from None
        return RegistrySettings(upstream, scheme, texts.get("description", ""))

    def _refuse(self, key: str, node: yaml.Node) -> None:
        if key not in _NOT_YET:
            raise self._error(node, f"{key}: there is no such key")
        empty = _is_null(node) or (isinstance(node, yaml.CollectionNode) and not node.value)
        if not empty:
            raise self._error(node, f"{key}: is not available in this version")

    def _items(self, node: yaml.Node, what: str) -> list[tuple[str, yaml.Node]]:
        if not isinstance(node, yaml.MappingNode):
            raise self._error(node, f"{what} must be a mapping")
        items: dict[str, yaml.Node] = {}
        for key_node, value in node.value:
            key = self._text(key_node, "a key")
            if key in items:
                raise self._error(key_node, f"{key}: stands here twice")
            items[key] = value
        return list(items.items())

    def _sequence(self, node: yaml.Node, key: str) -> list[yaml.Node]:
        if not isinstance(node, yaml.SequenceNode):
            raise self._error(node, f"{key}: a list is expected")
        return list(node.value)

    def _text(self, node: yaml.Node, key: str) -> str:
        if not isinstance(node, yaml.ScalarNode):
            raise self._error(node, f"{key}: a single value is expected")
        return str(node.value)

    def _error(self, node: yaml.Node, message: str) -> ConfigInvalid:
        return ConfigInvalid(f"{self._where(node)}: {message}")

    def _where(self, node: yaml.Node) -> str:
        return f"{self._path}:{node.start_mark.line + 1}"


def _is_null(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:null"
