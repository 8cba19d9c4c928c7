"""Split YAML and JSON texts into documents, and parse them into values that know their lines.

YAML 1.1 as PyYAML reads it; documents are separated by lines that begin with `---` (YAML 1.2.2, "Document Markers").
A key that occurs twice has its last value, as in Kubernetes; `Mapping.replaced` has the earlier ones. Aliases are
references, not copies, so that a small file never becomes a large value. JSON texts may follow one another, as jq and
kubectl print them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml
from yaml.reader import Reader

from ociregistry.strictjson import JsonInvalid, parse_json_value

_LARGEST_YAML = 16 * 1024 * 1024
"""Characters of one YAML document, at most: it takes about 16 times as much memory, and a second for each 3 MB."""
_MOST_MERGED = 1_000_000
"""Keys that the merge keys (`<<`) of a document copy, at most."""
# With libyaml, parsing is ten times as fast; it is part of every common build of PyYAML.
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class Text(str):
    """A scalar of a YAML document, as written; a null is empty."""

    __slots__ = ("is_plain", "line")

    line: int
    """The line of the file, from 1."""
    is_plain: bool
    """Whether it is not quoted, and so may be a number or a boolean."""

    @property
    def is_string(self) -> bool:
        """Whether YAML takes it for a string."""
        return not self.is_plain or _tag(self) not in _NUMBERS


class Mapping(dict[str, Any]):
    """A mapping of a YAML document, with its merge keys applied."""

    __slots__ = ("line", "replaced")

    def __init__(self, line: int) -> None:
        super().__init__()
        self.line = line
        """The line of the file, from 1."""
        self.replaced: list[tuple[str, Any]] = []
        """Keys that occur again, with their earlier values."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where in a file something is."""

    line: int
    """The line of the file, from 1."""
    document: int
    """The number of the document, from 1; those without content do not count."""
    source: str
    """The template that helm made the document from; empty if the document does not say so."""

    def __str__(self) -> str:
        return f"{self.line}: document {self.document}" + (f" ({self.source})" if self.source else "")


@dataclass(frozen=True, slots=True)
class Part:
    """A document, or one of the `items` of a list in JSON."""

    place: Place
    value: Any
    """Mappings, lists and strings; of YAML `Mapping`, list and `Text`."""
    json: str = ""
    """The text of JSON, whose values do not know their lines."""

    def with_lines(self) -> Any:
        """Return the value, with `Mapping` and `Text` also if it comes from JSON; the same value if that fails."""
        try:
            return next((value for _, value in _composed(self.json, self.place.line)), self.value)
        except DocumentInvalid:
            # YAML lacks a few texts of JSON, such as characters of two escapes.
            return self.value


class DocumentInvalid(Exception):
    """A document cannot be parsed."""

    def __init__(self, line: int, why: str) -> None:
        super().__init__(why)
        self.line = line
        self.why = why


@dataclass(frozen=True, slots=True)
class Failure:
    """A document that cannot be parsed; those after its end are not affected."""

    place: Place
    why: str


_NOTHING = re.compile(r"(?:---)?(?:[ \t\n]++|#.*+|^%.*+)*+", re.MULTILINE)
"""A document without content: a separator, blank lines, comments and directives."""
_SOURCE = re.compile(r"(?:---[^\n]*\n)?(?:[ \t]*\n|#[^\n]*\n)*?# Source: ([^\n]{1,500})")
_JSON = re.compile(r'(?:---)?\s*(?:\{\s*["}]|\[\s*[\[\]{"])')
_BLANK = re.compile(r"[ \t\n\r]*")


def read_documents(text: str) -> Iterator[Part | Failure]:
    """Parse the documents of `text`, whose lines end with a newline alone."""
    number, line, position = 0, 1, 0
    for start, end in _split(text):
        line += text.count("\n", position, start)
        position = start
        if _NOTHING.fullmatch(text, start, end):
            continue
        is_json = _JSON.match(text, start, end)
        chunk = text[start:end]
        source = _SOURCE.match(chunk)
        place = Place(line, number + 1, source[1].strip() if source else "")
        for part in _json(chunk, place) if is_json else _yaml(chunk, place):
            number = part.place.document
            yield part


def _split(text: str) -> Iterator[tuple[int, int]]:
    """Yield where each document begins and ends; the separator is its beginning."""
    start = position = 0
    # Not by a regular expression: no other thread runs while it searches 100 MB.
    while (position := text.find("\n---", position) + 1) > 0:
        if text[position + 3 : position + 4] in ("", " ", "\t", "\n"):
            yield start, position
            start = position
    yield start, len(text)


def _yaml(text: str, place: Place) -> Iterator[Part | Failure]:
    number = place.document
    try:
        if len(text) > _LARGEST_YAML:
            raise DocumentInvalid(place.line, f"is larger than {_LARGEST_YAML >> 20} MiB: JSON may be (-o json)")
        for line, value in _composed(text, place.line):
            # A separator may also follow a line separator of Unicode, which ends a line of YAML too.
            yield Part(Place(line, number, place.source), value)
            number += 1
    except DocumentInvalid as error:
        yield Failure(Place(error.line, number, place.source), error.why)


_TEMPLATE = re.compile(r"^[ \t]*(?:- +)*(?:[\w./-]+:[ \t]+)?\{\{")
"""A line of a template for helm: an action at its beginning, or as a value that is not quoted."""
_TAB = re.compile(r"[ -]*\t")
UNRENDERED = "is a template that was not rendered: run helm template, and give what it prints"


def _composed(text: str, first: int) -> Iterator[tuple[int, Any]]:
    """Parse YAML; yield the line and the value of each document. The text begins at the line `first`.

    Raises:
        DocumentInvalid: it is not YAML.
    """
    try:
        yield from _compose(text, first)
    except DocumentInvalid as error:
        raise _explained(text, first, error.line, error.why) from None
    except yaml.MarkedYAMLError as error:
        raise _explained(text, first, first + _line_of(error, text), f"is not YAML: {error.problem}") from None
    except (yaml.YAMLError, ValueError, OverflowError):
        # Without libyaml, PyYAML does not translate the errors of numbers in escapes and directives.
        found = Reader.NON_PRINTABLE.search(text)
        line = first + (text.count("\n", 0, found.start()) if found else 0)
        raise DocumentInvalid(line, "is not YAML: it has a character or a number that is not allowed") from None


def _line_of(error: yaml.MarkedYAMLError, text: str) -> int:
    """Return the line of an error, from 0: of what was begun, if it was not ended until the end of the text."""
    last = text.rstrip().count("\n")
    begun, noticed = error.context_mark, error.problem_mark
    if begun and noticed and ("simple key" in (error.context or "") or noticed.line > last):
        noticed = begun
    return min(noticed.line, last) if noticed else 0


def _explained(text: str, first: int, line: int, why: str) -> DocumentInvalid:
    """Make an error about the template or the tab that is probably the cause of one at `line`."""
    lines = text.split("\n")
    # The parser may notice it only at the next line.
    for at in (line - 1, line):
        if first <= at < first + len(lines) and _TEMPLATE.match(lines[at - first]):
            return DocumentInvalid(at, UNRENDERED)
    if line - first < len(lines) and _TAB.match(lines[line - first]):
        why = "is not YAML: a tab indents the line, where YAML wants spaces"
    return DocumentInvalid(line, why)


@dataclass(slots=True)
class _Open:
    """A mapping or a list whose end is not reached."""

    value: Mapping | list[Any]
    key: str | None = None
    """The key whose value comes next."""
    merges: bool = False
    """Whether that key is a merge key."""
    merged: list[Any] = field(default_factory=list)


def _compose(text: str, first: int) -> Iterator[tuple[int, Any]]:
    opened: list[_Open] = []
    anchors: dict[str, Any] = {}
    budget = _MOST_MERGED
    root: Any = None
    begins = first
    for event in yaml.parse(text, Loader=_LOADER):
        line = first + event.start_mark.line  # type: ignore[union-attr]  # events of a parser have their marks
        match event:
            case yaml.ScalarEvent():
                value: Any = _text(event, line)
            case yaml.MappingStartEvent():
                value = Mapping(line)
            case yaml.SequenceStartEvent():
                value = []
            case yaml.AliasEvent():
                if event.anchor not in anchors:
                    raise DocumentInvalid(line, "is not YAML: an alias (*) has no anchor (&) before it")
                value = anchors[event.anchor]
            case yaml.CollectionEndEvent():
                budget = _merge(opened.pop(), budget, line)
                continue
            case yaml.DocumentStartEvent():
                anchors.clear()
                root, begins = None, line
                continue
            case yaml.DocumentEndEvent():
                yield begins, root
                continue
            case _:
                continue
        if event.anchor and not isinstance(event, yaml.AliasEvent):
            anchors[event.anchor] = value
        if not opened:
            root, begins = value, line
        else:
            _put(opened[-1], value, line)
        if isinstance(event, yaml.CollectionStartEvent):
            opened.append(_Open(value))


def _text(event: yaml.ScalarEvent, line: int) -> Text:
    is_plain = event.implicit[0]
    text = Text("" if is_plain and event.value in _NULLS else event.value)
    text.line = line
    text.is_plain = is_plain
    return text


_NULLS = frozenset({"", "~", "null", "Null", "NULL"})
_NUMBERS = frozenset({"tag:yaml.org,2002:int", "tag:yaml.org,2002:float", "tag:yaml.org,2002:bool"})


def _tag(text: str) -> str:
    tag: str = yaml.SafeLoader("").resolve(yaml.ScalarNode, str(text), (True, False))
    return tag


def _put(into: _Open, value: Any, line: int) -> None:
    """Add the next key or value to a mapping, or the next item to a list.

    Raises:
        DocumentInvalid: a key is not a scalar.
    """
    if isinstance(into.value, list):
        into.value.append(value)
    elif into.key is None:
        if not isinstance(value, Text):
            raise DocumentInvalid(line, "has a key that is not a word")
        into.key, into.merges = str(value), value == "<<" and value.is_plain
    elif into.merges:
        into.merged.append(value)
        into.key = None
    else:
        if into.key in into.value:
            into.value.replaced.append((into.key, into.value[into.key]))
        into.value[into.key] = value
        into.key = None


def _merge(ended: _Open, budget: int, line: int) -> int:
    """Add what a mapping merges, where it has no value of its own; return what is left of the budget.

    Raises:
        DocumentInvalid: there is something else than mappings to merge, or too much.
    """
    for source in (one for merged in ended.merged for one in (merged if isinstance(merged, list) else [merged])):
        if not isinstance(source, Mapping) or isinstance(ended.value, list):
            raise DocumentInvalid(line, "is not YAML: a merge key (<<) needs a mapping")
        budget -= len(source)
        if budget < 0:
            raise DocumentInvalid(line, f"merges more than {_MOST_MERGED} keys by <<")
        for key, value in list(source.items()):
            ended.value.setdefault(key, value)
    return budget


def _json(text: str, place: Place) -> Iterator[Part | Failure]:
    """Parse the JSON values in `text`, one after the other."""
    position = _after_blank(text, 3 if text.startswith("---") else 0)
    line, counted, number = place.line, 0, place.document

    def place_of(position: int) -> Place:
        """Return the place of a position that is not before the last one that was asked for."""
        nonlocal line, counted
        line += text.count("\n", counted, position)
        counted = position
        return Place(line, number, "")

    try:
        while position < len(text):
            position = yield from _json_value(text, position, place_of)
            position = _after_blank(text, position)
            number += 1
    except JsonInvalid as error:
        yield Failure(place_of(error.position), f"is not JSON: {error}")


_PlaceOf = Callable[[int], Place]


def _json_value(text: str, start: int, place_of: _PlaceOf) -> Generator[Part, None, int]:
    """Parse the JSON value at `start`, a list of Kubernetes item by item; return the index behind its end.

    Raises:
        JsonInvalid: it is not JSON.
    """
    place = place_of(start)
    if text[start] != "{":
        value, end = parse_json_value(text, start)
        yield Part(place, value, text[start:end])
        return end
    # A cluster has thousands of pods in one list: only one of them at a time is in memory.
    others: dict[str, Any] = {}
    has_items = False
    position = _after_blank(text, start + 1)
    is_end = text.startswith("}", position)
    while not is_end:
        key, position = parse_json_value(text, position)
        if not isinstance(key, str):
            raise JsonInvalid("a key in double quotes is expected", position)
        position = _after(text, position, ":")
        if key == "items" and text.startswith("[", position):
            has_items = True
            position = yield from _json_items(text, position, place_of)
        else:
            others[key], position = parse_json_value(text, position)
        position, is_end = _next(text, position, "}")
    yield Part(place, others, "" if has_items else text[start : position + 1])
    return position + 1


def _json_items(text: str, start: int, place_of: _PlaceOf) -> Generator[Part, None, int]:
    """Parse the JSON array at `start` item by item; return the index behind its end.

    Raises:
        JsonInvalid: it is not JSON.
    """
    position = _after_blank(text, start + 1)
    is_end = text.startswith("]", position)
    while not is_end:
        begins = position
        value, position = parse_json_value(text, begins)
        yield Part(place_of(begins), value, text[begins:position])
        position, is_end = _next(text, position, "]")
    return position + 1


def _next(text: str, position: int, end: str) -> tuple[int, bool]:
    """Return the index of the next member or item, or that of the end, and whether it is the end.

    Raises:
        JsonInvalid: there is neither a comma nor the end.
    """
    position = _after_blank(text, position)
    is_end = text.startswith(end, position)
    return (position if is_end else _after(text, position, ",")), is_end


def _after_blank(text: str, position: int) -> int:
    found = _BLANK.match(text, position)
    assert found is not None
    return found.end()


def _after(text: str, position: int, mark: str) -> int:
    """Return the index behind a mark and the blanks around it.

    Raises:
        JsonInvalid: there is another character.
    """
    position = _after_blank(text, position)
    if not text.startswith(mark, position):
        raise JsonInvalid(f"{mark!r} is expected", position)
    return _after_blank(text, position + 1)
