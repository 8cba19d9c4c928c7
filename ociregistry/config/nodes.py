"""YAML with the place of every value, so that an error can say file, line and key."""

from __future__ import annotations

import errno
import re
from collections.abc import Mapping
from pathlib import Path

import yaml


class ConfigInvalid(Exception):
    """A value that was set cannot be used; the message says where it was set and what is wrong with it."""


class Node:
    """A value in the file `path`; `key` is how errors call it."""

    def __init__(self, path: Path, node: yaml.Node | None, key: str = "") -> None:
        """`node` is None for a file without a value."""
        self._path = path
        self._node = node
        self._key = key

    @classmethod
    def read(cls, path: Path) -> Node:
        """The value that the file holds; raises `ConfigInvalid`."""
        try:
            return cls(path, yaml.compose(_read(path).decode("utf-8"), Loader=yaml.SafeLoader))
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
        """File, line and key."""
        return self._line + (f": {self._key}" if self._key else "")

    @property
    def _line(self) -> str:
        return f"{self._path}:{self._node.start_mark.line + 1 if self._node else 1}"

    def error(self, message: str) -> ConfigInvalid:
        """To be raised for this value."""
        return ConfigInvalid(_printable(f"{self.where}: {message}"))

    def missing(self, key: str, why: str) -> ConfigInvalid:
        """To be raised for a `key` that this mapping does not have."""
        return ConfigInvalid(_printable(f"{self._line}: {key}: is missing: {why}"))

    @property
    def is_absent(self) -> bool:
        """Whether there is no value, which is as if its key were not there."""
        return self._node is None or (
            isinstance(self._node, yaml.ScalarNode) and self._node.tag == "tag:yaml.org,2002:null"
        )

    @property
    def is_empty(self) -> bool:
        """Whether it is absent, `{}` or `[]`."""
        return self.is_absent or (isinstance(self._node, yaml.CollectionNode) and not self._node.value)

    @property
    def is_list(self) -> bool:
        """Whether it is a list."""
        return isinstance(self._node, yaml.SequenceNode)

    def mapping(self, *known: str, below: str = "") -> Mapping[str, Node]:
        """The values by their keys, without absent ones; raises `ConfigInvalid` for a key that is not `known`.

        Errors call them by their keys, with `below` in front.
        """
        if self.is_absent:
            return {}
        if not isinstance(self._node, yaml.MappingNode):
            raise self.error("a mapping is expected")
        found: dict[str, Node] = {}
        for key_node, value in self._node.value:
            key = Node(self._path, key_node, "a key").text()
            at = Node(self._path, key_node, below + key)
            if key not in known:
                raise at.error("there is no such key")
            if key in found:
                raise at.error("stands here twice")
            found[key] = Node(self._path, value, below + key)
        return {key: node for key, node in found.items() if not node.is_absent}

    def items(self) -> list[Node]:
        """The values of a list."""
        if self.is_absent:
            return []
        if not isinstance(self._node, yaml.SequenceNode):
            raise self.error("a list is expected")
        return [Node(self._path, node, self._key) for node in self._node.value]

    def text(self) -> str:
        """A single value, as it is written."""
        if not isinstance(self._node, yaml.ScalarNode):
            raise self.error("a single value is expected")
        return str(self._node.value)

    def word(self) -> str:
        """A single value of printable characters, at least one."""
        text = self.text()
        if not text or not text.isprintable():
            raise self.error("printable characters are expected, at least one")
        return text

    def flag(self) -> bool:
        """`true` or `false`."""
        text = self.text()
        if text.lower() not in ("true", "false"):
            raise self.error(f"{text!r}: true or false is expected")
        return text.lower() == "true"

    def path(self) -> Path:
        """A path; a relative one starts at the file's folder."""
        try:
            return self._path.absolute().parent / Path(self.word()).expanduser()
        except RuntimeError:
            raise self.error("there is no such user") from None

    def contents(self) -> bytes:
        """The contents of the file that is named."""
        path = self.path()
        try:
            return _read(path)
        except (OSError, ValueError) as error:
            raise self.error(f"{path} cannot be read: {getattr(error, 'strerror', error)}") from None


def _read(path: Path) -> bytes:
    if path.exists() and not path.is_file() and not path.is_dir():
        # A pipe would be waited for, at a reload for ever.
        raise OSError(errno.EINVAL, "it is no file")
    return path.read_bytes()


def _printable(text: str) -> str:
    """One line that every log can take."""
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode("ascii") for one in text)


def _without_content(problem: str | None) -> str:
    """What the parser finds wrong, without what stands there: it may be a password."""
    return re.sub(r"'[^']{2,}'", "something", problem or "")
