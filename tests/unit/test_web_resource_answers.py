"""Answers and their content."""

from __future__ import annotations

import json

import pytest

from ociregistry.errors import BlobUnknown, MethodUnsupported, RegistryError, Unavailable
from ociregistry.pullthrough.waiting import CacheStatus
from ociregistry.web.exchange import InMemory, SizeOnly
from ociregistry.web.resource import Answer, error_answer, json_answer
from tests.unit.support.common import fired


def body(answer: Answer) -> bytes:
    """Return the whole content."""
    return fired(answer.content.read(0, answer.content.size))


def test_content_in_memory() -> None:
    content = InMemory(b"0123456789")
    assert content.size == fired(content.more_than(0)) == fired(content.more_than(9)) == 10
    assert fired(content.read(2, 3)) == b"234"
    assert fired(content.read(8, 100)) == b"89"
    content.close()


def test_content_of_known_size_only() -> None:
    assert SizeOnly(4711).size == 4711


def test_json_document() -> None:
    answer = json_answer(200, {"a": ["ü"]}, {"X": "y"}, cache_status=CacheStatus.HIT)
    assert (answer.status, answer.cache_status, answer.ranged) == (200, CacheStatus.HIT, False)
    assert answer.headers == {"Content-Type": "application/json", "X": "y"}
    assert json.loads(body(answer)) == {"a": ["ü"]}


@pytest.mark.parametrize(
    "error", [BlobUnknown('not "there"\n'), Unavailable("down", 7), MethodUnsupported("PUT"), BlobUnknown("\ud800ü")]
)
def test_error_body(error: RegistryError) -> None:
    answer = error_answer(error)
    assert answer.status == error.status
    assert answer.headers == {"Content-Type": "application/json", **error.headers()}
    assert json.loads(body(answer)) == {"errors": [{"code": error.code, "message": error.message, "detail": None}]}
    assert body(answer).isascii()
