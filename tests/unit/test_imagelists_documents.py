"""YAML and JSON texts: their documents, the lines of values and errors, and what is bounded."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml

from ociregistry.imagelists import documents
from ociregistry.imagelists.documents import Failure, Mapping, Part, Text, read_documents


@pytest.fixture(params=["CSafeLoader", "SafeLoader"], autouse=True)
def loader(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Parse YAML with libyaml and without; it is part of PyYAML's builds, and need not be."""
    name: str = request.param
    monkeypatch.setattr(documents, "_LOADER", getattr(yaml, name))
    return name


def values(text: str) -> list[Any]:
    """Return the values of all documents; there must be no error."""
    found = []
    for part in read_documents(text):
        assert isinstance(part, Part), part
        found.append(part.value)
    return found


def failures(text: str) -> list[str]:
    """Return the errors, with their places."""
    return [f"{one.place}: {one.why}" for one in read_documents(text) if isinstance(one, Failure)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1\n---\nb: 2\n", [{"a": "1"}, {"b": "2"}]),
        ("---\na: 1\n--- # a comment\nb: 2\n---", [{"a": "1"}, {"b": "2"}]),
        ("--- {a: 1}\n--- [b]\n--- c\n", [{"a": "1"}, ["b"], "c"]),
        ("---\n---\n# nothing\n---\n\n  # nothing\n---\na: 1\n", [{"a": "1"}]),
        ("%YAML 1.1\n---\na: 1\n...\n", [{"a": "1"}]),
        ("a: 1\n...\n---\nb: 2\n", [{"a": "1"}, {"b": "2"}]),
        ("a: 1\u2028---\nb: 2\n", [{"a": "1"}, {"b": "2"}]),
        # Only a line of its own separates.
        ("a: |\n  ---\n  x\nb: ---x\n", [{"a": "---\nx\n", "b": "---x"}]),
        ("a: ~\nb: null\nc:\nd: 'null'\n", [{"a": "", "b": "", "c": "", "d": "null"}]),
        # The last of two values of a key counts, as in Kubernetes.
        ("a: 1\na: 2\n", [{"a": "2"}]),
        ("a: &x {b: 1, c: 2}\nd: {<<: *x, c: 3}\n", [{"a": {"b": "1", "c": "2"}, "d": {"b": "1", "c": "3"}}]),
        (
            "a: &x {b: 1}\nc: &y {b: 2, d: 3}\ne:\n  <<: [*x, *y]\n",
            [{"a": {"b": "1"}, "c": {"b": "2", "d": "3"}, "e": {"b": "1", "d": "3"}}],
        ),
        ("'<<': 1\n", [{"<<": "1"}]),
        ('{"a": 1}', [{"a": 1}]),
        ('{"a": "x"}\n{"b": [2]}{}\n\n[{"c": null}]\n', [{"a": "x"}, {"b": [2]}, {}, [{"c": None}]]),
        ('---\n{"a": 1}\n{"b": 2}\n---\nc: 3\n', [{"a": 1}, {"b": 2}, {"c": "3"}]),
        # A list of Kubernetes comes item by item, and then without its items.
        ('{"kind": "List", "items": [{"a": 1} , {"b": 2}], "x": 3}', [{"a": 1}, {"b": 2}, {"kind": "List", "x": 3}]),
        ('{"items": []}', [{}]),
        ('{"items": [ ] }{ }', [{}, {}]),
        ('{"items": [1], "items": [2]}', [1, 2, {}]),
        ('{"items": {"a": 1}}', [{"items": {"a": 1}}]),
        # A flow mapping is YAML, unless it begins as JSON does.
        ("{a: 1}\n", [{"a": "1"}]),
    ],
)
def test_documents(text: str, expected: list[Any]) -> None:
    assert values(text) == expected


def test_empty_texts_have_no_documents() -> None:
    for text in ("", "\n", "---", "---\n...\n", "# a\n---\n# b\n", "\t\n \n"):
        assert [value for value in values(text) if value] == []


def test_parts_know_line_number_and_template() -> None:
    text = """\
# Source: web/templates/nothing.yaml
---
# Source: web/templates/a.yaml
kind: A
---
kind: B
# Source: not/at/the/beginning.yaml
---

# a comment
# Source: web/templates/c.yaml
kind: C
"""
    places = [str(part.place) for part in read_documents(text)]
    assert places == [
        "4: document 1 (web/templates/a.yaml)",
        "6: document 2",
        "12: document 3 (web/templates/c.yaml)",
    ]


def test_values_know_their_lines() -> None:
    (value,) = values("# first\na:\n  - b: |\n      x\n    c: 'y'\n")
    (item,) = value["a"]
    assert isinstance(item, Mapping)
    assert (value.line, item.line) == (2, 3)
    assert [(item[key].line, item[key].is_string) for key in "bc"] == [(3, True), (5, True)]


def test_strings_are_told_from_numbers() -> None:
    (value,) = values("[1.25, '1.25', true, v1, 0x10, 2024-01-01, !!str 5, 12:30]\n")
    assert all(isinstance(one, Text) for one in value)
    assert [one.is_string for one in value] == [False, True, False, True, False, True, True, False]


def test_json_gets_lines_when_they_are_wanted() -> None:
    text = '\n{"items": [\n  {"a":\n    "b"},\n  {"c": {\n    "d": "e"}}]}\n'
    first, second, rest = (part for part in read_documents(text) if isinstance(part, Part))
    assert [str(part.place) for part in (first, second, rest)] == ["3: document 1", "5: document 1", "2: document 1"]
    assert first.with_lines()["a"].line == 4
    assert second.with_lines()["c"]["d"].line == 6
    assert rest.with_lines() == rest.value == {}


def test_json_that_is_no_yaml_stays_without_lines() -> None:
    text = json.dumps({"a": "\U0001f600\x7f", "b": "c\td"})
    (part,) = read_documents(text)
    assert isinstance(part, Part)
    assert part.with_lines()["b"] == part.value["b"] == "c\td"


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("a: 1\n b: 2\n", "2: document 1: is not YAML: "),
        ("a: 1\n---\nb: [1\n---\nc: 3\n", "3: document 2: is not YAML: "),
        ("a: 1\nb: [1,\n  2\n\n", "2: document 1: is not YAML: "),
        ("a: [\n  1,\n  2: : 3,\n  4]\n", "3: document 1: is not YAML: "),
        ("a: 1\nnginx\nb: 2\n", "2: document 1: is not YAML: "),
        ("a: 1\nnginx\n", "2: document 1: is not YAML: "),
        ("a: *b\n", "1: document 1: is not YAML: an alias (*) has no anchor (&) before it"),
        ("a: &x 1\n---\nb: *x\n", "3: document 2: is not YAML: an alias (*) has no anchor (&) before it"),
        ("a:\n\tb: 1\n", "2: document 1: is not YAML: a tab indents the line, where YAML wants spaces"),
        ("a: 1\n---\nb: 2\n\x01: c\n", "4: document 2: is not YAML: "),
        ("a: '\n", "1: document 1: is not YAML: "),
        ("? [a]\n: b\n", "1: document 1: has a key that is not a word"),
        ("<<: 1\n", "2: document 1: is not YAML: a merge key (<<) needs a mapping"),
        ("a: !e!b c\n", "1: document 1: is not YAML: "),
        ('a: "\\UFFFFFFFF"\n', "1: document 1: is not YAML: "),
        ('{"a": 1,}', "1: document 1: is not JSON: "),
        ('{"a": 1\n', "2: document 1: is not JSON: ',' is expected"),
        ('{"a"\n 1}', "2: document 1: is not JSON: ':' is expected"),
        ('{"items": [\n{"a": 1}\n{"b": 2}]}', "3: document 1: is not JSON: ',' is expected"),
        ('{"items": [\n{"a": 1},\n{"b": NaN}]}', "3: document 1: is not JSON: NaN is no number"),
        ('{"items": [\n{"a": 1},\n{"b": ', "3: document 1: is not JSON: expecting value"),
        ('{"items": [1,]}', "1: document 1: is not JSON: expecting value"),
        ('{"items": [1],}', "1: document 1: is not JSON: "),
        ('{"items": [1]', "1: document 1: is not JSON: ',' is expected"),
        ('{"items": [1', "1: document 1: is not JSON: ',' is expected"),
        ('{"a": 1}\n{"b": 2}\n{x}\n', "3: document 3: is not JSON: "),
        ('{"a": 1}\nText\n', "2: document 2: is not JSON: expecting value"),
        ('{"items": [1], 1: 2}', "1: document 1: is not JSON: a key in double quotes is expected"),
        ('{"a": ' + "[" * 100_000, "1: document 1: is not JSON: it is nested too deeply"),
    ],
)
def test_failure_has_line_and_document(text: str, where: str) -> None:
    (failure,) = failures(text)
    assert failure.startswith(where)
    assert len(failure.splitlines()) == 1


def test_failure_hides_no_other_document() -> None:
    text = "a: 1\n---\nb: [\n---\nc: 3\n---\nd: ]\n---\ne: 5\n"
    parts = list(read_documents(text))
    assert [part.value for part in parts if isinstance(part, Part)] == [{"a": "1"}, {"c": "3"}, {"e": "5"}]
    assert [str(part.place) for part in parts if isinstance(part, Failure)] == ["3: document 2", "7: document 4"]


def test_items_before_a_failure_in_json_are_read() -> None:
    first, second = read_documents('{"items": [{"a": 1}, {"b": 2')
    assert isinstance(first, Part)
    assert isinstance(second, Failure)
    assert first.value == {"a": 1}


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("kind: Pod\nmetadata:\n  name: {{ .Release.Name }}-web\n", 3),
        ("{{- if .Values.enabled }}\nkind: Pod\n{{- end }}\n", 1),
        ("kind: Pod\nspec:\n  containers:\n    - image: {{ .Values.image }}\n", 4),
        ('kind: Pod\nmetadata:\n  labels:\n    {{- include "x.labels" . | nindent 4 }}\nspec: {}\n', 4),
        ("kind: Pod\nspec:\n  - {{ .x }}\n", 3),
        ('{{ printf "%s" .x }}\n', 1),
        ("{{/* a comment */}}\nkind: Pod\n", 1),
        ("kind: Pod\n{{- with .Values.x }}\nspec: {}\n", 2),
    ],
)
def test_template_is_named_as_such(text: str, line: int) -> None:
    for before in (0, 2):
        (failure,) = failures("a: 1\n---\n" * before + text)
        assert failure.startswith(
            f"{line + 2 * before}: document {1 + before}: is a template that was not rendered: "
        )
        assert "run helm template" in failure


def test_error_far_from_a_text_with_braces_is_not_a_template() -> None:
    (failure,) = failures("a: |\n  {{ $labels.x }}\nb: c\nd: [\n")
    assert "is not YAML" in failure


def test_aliases_are_references() -> None:
    bomb = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 200))
    (value,) = values(bomb)
    assert len(value) == 200
    (value,) = values("a: &a [*a, {b: *a}]\n")
    assert value["a"][0] is value["a"] is value["a"][1]["b"]


def test_merged_keys_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "_MOST_MERGED", 1000)
    many = ", ".join(f"k{n}: v" for n in range(100))
    merging = "".join(f"m{n}: {{<<: *x}}\n" for n in range(11))
    (failure,) = failures(f"x: &x {{{many}}}\n{merging}")
    assert failure == "12: document 1: merges more than 1000 keys by <<"
    assert failures(f"x: &x {{{many}}}\n{merging.replace('m10', 'm9')[:-14]}") == []
    assert values("a: &a {b: 1, <<: *a}\n") == [{"a": {"b": "1"}}]


@pytest.mark.parametrize("text", ["[" * 9000 + "]" * 9000, "a: " + "{a: " * 9000 + "}" * 9000, "- " * 3000 + "a"])
def test_depth_overflows_nothing(text: str) -> None:
    assert len(list(read_documents(text))) == 1


def test_large_yaml_document_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "_LARGEST_YAML", 1024 * 1024)
    long = "x" * 1024 * 1024
    text = f'a: 1\n---\nb: {long}\n---\nc: 3\n---\n{{"d": "{long}"}}\n'
    assert failures(text) == ["2: document 2: is larger than 1 MiB: JSON may be (-o json)"]
    assert [part.value for part in read_documents(text) if isinstance(part, Part)] == [
        {"a": "1"},
        {"c": "3"},
        {"d": long},
    ]
