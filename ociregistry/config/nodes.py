"""YAML values that know their place, so that an error can tell file, line and key."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import yaml

from ociregistry.config.files import ConfigFiles, Versions
from ociregistry.config.values import did_you_mean, printable


class ConfigInvalid(Exception):
    """A setting is invalid; the message says where it was set and what is wrong with it."""

    def __init__(self, message: str, files: Versions = MappingProxyType({})) -> None:
        """Describe the setting by `message`; `files` are those that were read until then."""
        # It names files, whose names may be no UTF-8, and tells of values.
        super().__init__(printable(message))
        self.files = files


class Node:
    """A value in the file `path`; errors call it `key`."""

    def __init__(self, files: ConfigFiles, path: Path, node: yaml.Node | None, key: str = "") -> None:
        """Wrap a YAML node, None for an empty file; the files that it names are read by `files`."""
        self._files = files
        self._path = path
        self._node = node
        self._key = key

    @classmethod
    def read(cls, path: Path, files: ConfigFiles) -> Node:
        """Read and parse a file.

        Raises:
            ConfigInvalid: it cannot be read, is not UTF-8, or is not YAML.
        """
        try:
            return cls(files, path, yaml.compose(files.read(path).decode("utf-8"), Loader=yaml.SafeLoader))
        except OSError as error:
            raise ConfigInvalid(f"{path}: cannot be read: {error.strerror}") from None
        except UnicodeDecodeError:
            raise ConfigInvalid(f"{path}: is not UTF-8") from None
        except yaml.MarkedYAMLError as error:
            line = error.problem_mark.line + 1 if error.problem_mark else 1
            raise ConfigInvalid(f"{path}:{line}: is not YAML: {_without_content(error.problem)}") from None
        except RecursionError:
            raise ConfigInvalid(f"{path}: is nested too deeply") from None
        except yaml.YAMLError as error:
            raise ConfigInvalid(f"{path}: is not YAML: {str(error).splitlines()[0]}") from None

    @property
    def where(self) -> str:
        """The place of the value: file, line and key."""
        return self._line + (f": {self._key}" if self._key else "")

    @property
    def _line(self) -> str:
        return f"{self._path}:{self._node.start_mark.line + 1 if self._node else 1}"

    def error(self, message: str) -> ConfigInvalid:
        """Make an error about this value, to be raised by the caller."""
        return ConfigInvalid(f"{self.where}: {message}")

    def missing(self, key: str, why: str) -> ConfigInvalid:
        """Make an error about a `key` that this mapping lacks, to be raised by the caller."""
        return ConfigInvalid(f"{self._line}: {key}: is missing: {why}")

    @property
    def is_absent(self) -> bool:
        """Whether there is no value (null or an empty file); its key is then treated as missing."""
        return self._node is None or (
            isinstance(self._node, yaml.ScalarNode) and self._node.tag == "tag:yaml.org,2002:null"
        )

    @property
    def is_empty(self) -> bool:
        """Whether the value is absent, `{}` or `[]`."""
        return self.is_absent or (isinstance(self._node, yaml.CollectionNode) and not self._node.value)

    @property
    def is_list(self) -> bool:
        """Whether the value is a list."""
        return isinstance(self._node, yaml.SequenceNode)

    def mapping(self, *known: str, below: str = "") -> Mapping[str, Node]:
        """Return the values of a mapping by key, without absent ones.

        Errors about a value name its key, prefixed with `below`.

        Raises:
            ConfigInvalid: this is not a mapping, a key is not `known`, or a key occurs twice.
        """
        if self.is_absent:
            return {}
        if not isinstance(self._node, yaml.MappingNode):
            raise self.error("a mapping is expected, such as {KEY: VALUE}")
        found: dict[str, Node] = {}
        for key_node, value in self._node.value:
            key = Node(self._files, self._path, key_node, "a key").text()
            at = Node(self._files, self._path, key_node, below + key)
            if key not in known:
                raise at.error(f"unknown key{did_you_mean(key, known)}")
            if key in found:
                raise at.error("duplicate key")
            found[key] = Node(self._files, self._path, value, below + key)
        return {key: node for key, node in found.items() if not node.is_absent}

    def items(self, example: str = "[VALUE, VALUE]") -> list[Node]:
        """Return the values of a list; an absent list is empty.

        Raises:
            ConfigInvalid: this is not a list; the message shows `example`.
        """
        if self.is_absent:
            return []
        if not isinstance(self._node, yaml.SequenceNode):
            raise self.error(f"a list is expected, such as {example}")
        return [Node(self._files, self._path, node, self._key) for node in self._node.value]

    def text(self) -> str:
        """Return a scalar as written.

        Raises:
            ConfigInvalid: this is not a scalar.
        """
        if not isinstance(self._node, yaml.ScalarNode):
            raise self.error("a single value is expected")
        return str(self._node.value)

    def word(self) -> str:
        """Return a scalar of one or more printable characters.

        Raises:
            ConfigInvalid: this is not a scalar, is empty, or has other characters.
        """
        text = self.text()
        if not text or not text.isprintable():
            raise self.error("printable characters are expected, at least one")
        return text

    def flag(self) -> bool:
        """Return the boolean `true` or `false`.

        Raises:
            ConfigInvalid: this is something else.
        """
        text = self.text()
        if text.lower() not in ("true", "false"):
            raise self.error(f"{text!r}: true or false is expected")
        return text.lower() == "true"

    def path(self) -> Path:
        """Return a path; a relative one starts at the folder of the configuration file.

        Raises:
            ConfigInvalid: this is no path, or names an unknown user after `~`.
        """
        try:
            return self._path.absolute().parent / Path(self.word()).expanduser()
        except RuntimeError:
            raise self.error("unknown user") from None

    def contents(self) -> bytes:
        """Read the file whose path is this value.

        Raises:
            ConfigInvalid: this is no path, or the file cannot be read.
        """
        path = self.path()
        try:
            return self._files.read(path)
        except (OSError, ValueError) as error:
            raise self.error(f"{path} cannot be read: {getattr(error, 'strerror', error)}") from None


def _without_content(problem: str | None) -> str:
    """Remove quoted text from a message of the YAML parser, because it may be a password."""
    return re.sub(r"'[^']{2,}'", "something", (problem or "").replace(r"character '\t'", "a tab"))
