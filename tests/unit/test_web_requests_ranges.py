"""Range headers, following RFC 9110 and the conformance suite."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ociregistry.errors import RangeUnsatisfiable
from ociregistry.web.requests import Range, parse_range


@pytest.mark.parametrize(
    ("header", "start", "stop"),
    [
        ("bytes=500-1499", 500, 1500),
        ("bytes=500-", 500, 2048),
        ("bytes=-500", 1548, 2048),
        ("bytes=0-", 0, 2048),
        ("bytes=0-0", 0, 1),
        ("bytes=2047-2047", 2047, 2048),
        ("bytes=2000-5000", 2000, 2048),
        ("bytes=-5000", 0, 2048),
        (" Bytes = 5-9 ", 5, 10),
        ("bytes=0-9999999999999999999", 0, 2048),
    ],
)
def test_satisfiable_range(header: str, start: int, stop: int) -> None:
    assert parse_range(header, 2048) == Range(start, stop)


@pytest.mark.parametrize("header", ["bytes=500-0", "bytes=5000-10000", "bytes=2048-", "bytes=-0"])
def test_unsatisfiable_range(header: str) -> None:
    with pytest.raises(RangeUnsatisfiable) as refused:
        parse_range(header, 2048)
    assert refused.value.headers() == {"Content-Range": "bytes */2048"}


@pytest.mark.parametrize("header", ["bytes=0-", "bytes=-5", "bytes=0-0", "bytes=5-9"])
def test_empty_content_is_sent_whole(header: str) -> None:
    """As net/http of Go does, for clients that send a Range with every request."""
    assert parse_range(header, 0) is None


@pytest.mark.parametrize(
    "header",
    [
        "",
        "bytes",
        "bytes=",
        "bytes=-",
        "bytes=a-b",
        "bytes=0-1,5-6",
        "items=0-1",
        "bytes=+0-1",
        "bytes=0--1",
        "bytes=٣-",
    ],
)
def test_other_headers_are_ignored(header: str) -> None:
    assert parse_range(header, 2048) is None


SIZES = st.integers(0, 10)


@given(st.none() | SIZES, st.none() | SIZES, SIZES)
def test_range_selects_a_slice(first: int | None, last: int | None, size: int) -> None:
    data = bytes(range(size))
    if first is None:
        expected = data[-last:] if last else b""
    else:
        expected = data[first:] if last is None else data[first : last + 1]
    header = f"bytes={'' if first is None else first}-{'' if last is None else last}"
    try:
        part = parse_range(header, size)
    except RangeUnsatisfiable:
        found = b""
    else:
        found = data if part is None else data[part.start : part.stop]
    assert found == (data if first is last is None else expected)


@given(st.text() | st.text("bytes=0123-, ").map("bytes=".__add__), st.integers(0, 1 << 62))
def test_any_header_is_a_range_none_or_unsatisfiable(header: str, size: int) -> None:
    try:
        part = parse_range(header, size)
    except RangeUnsatisfiable:
        part = None
    assert part is None or 0 <= part.start < part.stop <= size
