"""docs/watching.md lists every field of the events that this program logs."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from datetime import datetime, timedelta
from string import Formatter
from typing import Any

import pytest
from twisted.python.failure import Failure

from ociregistry.admin.terminal import lines
from ociregistry.log import json_line
from ociregistry.pullthrough.waiting import CacheStatus
from tests.documents import ROOT, blocks
from tools.metrics import example

PAGE = ROOT / "docs" / "watching.md"
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "ociregistry").rglob("*.py")}


def logging_calls() -> Iterator[tuple[str, ast.Call]]:
    """Yield each call that logs, with where it is: of a logger, or of the exchange's method that calls one."""
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and re.fullmatch(
                r"_log\.(debug|info|warn|error|critical|failure)|log|(self\.)?(_?exchange\.)?log_failure",
                ast.unparse(node.func),
            ):
                yield f"{path.relative_to(ROOT)}:{node.lineno}", node


def shared_fields() -> set[str]:
    """Return the names of the fields that the events of a request have in common."""
    functions = [
        node
        for tree in TREES.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.name == "_fields"
    ]
    keys = [
        key
        for function in functions
        for node in ast.walk(function)
        if isinstance(node, ast.Dict)
        for key in node.keys
    ]
    return {key.value for key in keys if isinstance(key, ast.Constant) and isinstance(key.value, str)}


def section(heading: str) -> str:
    """Return the text below a heading, up to the next one."""
    return PAGE.read_text(encoding="utf-8").partition(f"# {heading}\n")[2].partition("\n#")[0]


def listed(heading: str) -> list[str]:
    """Return what the first column of the table below a heading lists."""
    rows = re.findall(r"^\| (`.*?) \|", section(heading), re.MULTILINE)
    return [name for row in rows for name in re.findall("`([^`]+)`", row)]


def test_every_field_is_listed_once() -> None:
    logged = {word.arg for _, call in logging_calls() for word in call.keywords if word.arg} | shared_fields()
    names = listed("Fields of requests") + listed("Fields of other events")
    assert sorted(names) == sorted(logged)


def test_every_event_has_the_fields_of_its_text() -> None:
    common = shared_fields() | {"uri"}
    lacking = []
    for where, call in logging_calls():
        texts = [one.value for one in call.args if isinstance(one, ast.Constant) and isinstance(one.value, str)]
        given = {word.arg for word in call.keywords}
        given |= common if None in given or "log_failure" in ast.unparse(call.func) else set()
        for text in texts:
            named = {name for _, name, _, _ in Formatter().parse(text) if name}
            lacking += [(where, name) for name in named - given]
    assert lacking == []


def test_every_cache_status_is_listed() -> None:
    assert listed("The log") == [*(status.value for status in CacheStatus), "-"]


def test_keys_of_every_event_are_listed() -> None:
    assert listed("JSON") == list(json.loads(json_line({"log_failure": Failure(KeyError("k"))})))


def test_examples_are_the_same_request() -> None:
    (text,) = [block.text for block in blocks(PAGE) if (block.language, block.heading) == ("text", "The log")]
    (example,) = [json.loads(block.text) for block in blocks(PAGE) if block.language == "json"]
    assert text.partition("] ")[2] == f"{example['message']}\n"
    assert set(example) - {"time", "level", "namespace", "message"} <= set(listed("Fields of requests"))


@pytest.mark.usefixtures("utc_plus_one")
def test_status_on_a_terminal_is_that_of_the_other_page() -> None:
    (text,) = [block.text for block in blocks(PAGE) if (block.language, block.heading) == ("text", "On a terminal")]
    document: dict[str, Any] = example()
    now = datetime.fromisoformat(document["started"]) + timedelta(seconds=document["uptime_seconds"])
    assert text == "".join(f"{line}\n" for line in lines(document, now, 80, unicode=False))
