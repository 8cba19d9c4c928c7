"""Durations, sizes and local times: parsing, errors, and round trips."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ociregistry.config.values import (
    USUAL_RESERVE,
    count_text,
    local_time,
    parse_duration,
    parse_local_time,
    parse_reserve,
    parse_size,
    rate_text,
    size_text,
    span_text,
)

UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
"""A busy machine must not fail the test by a deadline."""

ANYTHING = st.text(max_size=12) | st.text("0123456789 .-:+TkKMGiBsmhdwe_", max_size=20)


@pytest.fixture
def berlin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Set the time zone to Berlin; 02:30 did not exist on 31 March 2024 and existed twice on 27 October."""
    # Written out, because some machines lack the zone database.
    monkeypatch.setenv("TZ", "CET-1CEST,M3.5.0,M10.5.0/3")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("45s", timedelta(seconds=45)),
        ("90m", timedelta(minutes=90)),
        ("12h", timedelta(hours=12)),
        ("30d", timedelta(days=30)),
        ("30 d", timedelta(days=30)),
        ("2w", timedelta(days=14)),
        ("007d", timedelta(days=7)),
    ],
)
def test_duration_is_parsed(text: str, read: timedelta) -> None:
    assert parse_duration(text) == read


@pytest.mark.parametrize(
    "text",
    [
        *("", "d", "30", "0d", "-1d", "+1d", "1.5d", "1D", "1d ", " 1d", "1  d", "1d\n"),
        *("1d12h", "30 days", "1y", "٣d", "10000000s"),
    ],
)
def test_malformed_duration_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"^a time such as 30d, 12h, 90m or 45s is expected$"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("1", 1),
        ("1B", 1),
        ("500MB", 500_000_000),
        ("500M", 500_000_000),
        ("50GB", 50_000_000_000),
        ("50 GB", 50_000_000_000),
        ("20MiB", 20 * 1024 * 1024),
        ("20Mi", 20 * 1024 * 1024),
        ("1.5kB", 1500),
        ("1.5KB", 1500),
        ("2TiB", 2 * 1024**4),
        ("2TB", 2 * 10**12),
        ("0.001kB", 1),
    ],
)
def test_size_is_parsed(text: str, read: int) -> None:
    assert parse_size(text) == read


@pytest.mark.parametrize(
    "text",
    [
        *("", "B", "GB", "0", "0GB", "0.4", "-1GB", "+1GB", "1e9", ".5GB", "1.GB", "1,5GB"),
        *("1gb", "1PB", "1 G B", "1GB ", "٣GB"),
    ],
)
def test_malformed_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"^a size such as 50GB, 500MB or 20MiB is expected$"):
        parse_size(text)


def test_local_time_is_in_the_machines_zone(berlin: None) -> None:
    assert parse_local_time("2024-03-01T22:17:30") == datetime(2024, 3, 1, 21, 17, 30, tzinfo=UTC)
    assert parse_local_time("2024-07-01T22:17:30") == datetime(2024, 7, 1, 20, 17, 30, tzinfo=UTC)
    assert local_time(datetime(2024, 3, 1, 21, 17, 30, tzinfo=UTC)) == "2024-03-01T22:17:30"
    # Of two possible times the first, so that nothing newer is pruned.
    assert parse_local_time("2024-10-27T02:30:00") == datetime(2024, 10, 27, 0, 30, tzinfo=UTC)
    assert parse_local_time("2024-03-31T02:30:00").tzinfo is not None


@pytest.mark.parametrize(
    "text",
    [
        *("", "2024-03-01", "2024-03-01T22:17", "2024-03-01 22:17:30", "2024-03-01t22:17:30", "22:17:30"),
        *("2024-02-30T00:00:00", "2023-02-29T00:00:00", "2024-13-01T00:00:00", "2024-00-01T00:00:00"),
        *("2024-03-01T24:00:00", "2024-03-01T22:60:00", "2024-03-01T22:17:60", "2024-03-01T22:17:61"),
        *("2024-03-01T22:17:30Z", "2024-03-01T22:17:30+01:00", "2024-03-01T22:17:30.5", "2024-3-1T22:17:30"),
        *(" 2024-03-01T22:17:30", "2024-03-01T22:17:30\n", "٢٠٢٤-03-01T22:17:30", "0000-01-01T00:00:00", "30d"),
    ],
)
def test_malformed_local_time_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"^a local date and time such as 2024-03-01T22:17:30 is expected$"):
        parse_local_time(text)


@UNHURRIED
@given(st.datetimes(datetime(1970, 1, 2), datetime(2100, 1, 1)))  # noqa: DTZ001  # local times are what is told
def test_local_time_round_trip(moment: datetime) -> None:
    """Except for the repeated hour in autumn."""
    formatted = local_time(moment.replace(tzinfo=UTC))
    again = parse_local_time(formatted)
    assert local_time(again) == formatted
    assert moment.replace(tzinfo=UTC) - again in (timedelta(microseconds=moment.microsecond), timedelta(hours=1))


def refusal(parse: Callable[[str], object], text: str) -> str:
    """Return the error for a text, empty if it is accepted."""
    try:
        parse(text)
    except ValueError as refused:
        return str(refused)
    return ""


@UNHURRIED
@given(ANYTHING)
def test_any_text_is_parsed_or_refused_with_expectation(text: str) -> None:
    for parse in (parse_duration, parse_size, parse_local_time):
        assert re.fullmatch("|a .* is expected", refusal(parse, text))


@UNHURRIED
@given(st.from_regex(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}", fullmatch=True))
def test_any_accepted_local_time_is_comparable(text: str) -> None:
    if not refusal(parse_local_time, text):
        now = datetime.now(UTC)
        assert (parse_local_time(text) < now) is not (parse_local_time(text) >= now)


@pytest.mark.parametrize("text", ["999999d", "999999w", "110000w"])
def test_duration_beyond_the_calendar_is_refused(text: str) -> None:
    assert refusal(parse_duration, text).endswith(" is expected")


@pytest.mark.parametrize(
    ("size", "formatted"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (12_345, "12.3 kB"),
        (999_949, "999.9 kB"),
        (999_950, "1.0 MB"),
        (12_345_678, "12.3 MB"),
        (50 * 10**9, "50.0 GB"),
        (10**12, "1.0 TB"),
        (12_345 * 10**12, "12345.0 TB"),
    ],
)
def test_size_is_formatted(size: int, formatted: str) -> None:
    assert size_text(size) == formatted


@UNHURRIED
@given(st.integers(1, 10**16))
def test_size_round_trip_is_approximate(size: int) -> None:
    assert abs(parse_size(size_text(size)) - size) <= size * 0.05


@pytest.mark.parametrize(
    ("text", "of_10_gb", "of_1_tb"),
    [
        ("", 500 * 10**6, 2 * 10**9),
        ("5%", 500 * 10**6, 50 * 10**9),
        ("12.5 %", 1250 * 10**6, 125 * 10**9),
        ("0%", 0, 0),
        ("1GB", 10**9, 10**9),
        ("20GB", 10 * 10**9, 20 * 10**9),
    ],
)
def test_reserve_is_a_size_or_a_percentage(text: str, of_10_gb: int, of_1_tb: int) -> None:
    reserve = parse_reserve(text)
    assert (reserve.of(10 * 10**9), reserve.of(10**12)) == (of_10_gb, of_1_tb)
    assert (reserve == USUAL_RESERVE) == (not text)


@pytest.mark.parametrize("text", ["100%", "-5%", "%", "5 percent", "0GB", "5%,2GB", " 5%", "1e1%"])
def test_malformed_reserve_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="a size such as 1GB or a share of the disk such as 5% is expected"):
        parse_reserve(text)


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 image URLs"), (1, "1 image URL"), (2, "2 image URLs"), (11, "11 image URLs")]
)
def test_count_text(number: int, text: str) -> None:
    assert count_text(number, "image URL") == text


def test_count_text_of_a_noun_with_another_plural() -> None:
    assert [count_text(number, "miss", "misses") for number in (0, 1, 2)] == ["0 misses", "1 miss", "2 misses"]


def test_rate_text() -> None:
    assert [rate_text(rate) for rate in (0.0, 999.6, 250_000.0)] == ["0 B/s", "1.0 kB/s", "250.0 kB/s"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-5, "0 s"), (0, "0 s"), (119.9, "119 s"), (120, "2 min"), (7199, "119 min"), (7200, "2 h 0 min"),
        (11_100, "3 h 5 min"), (172_799, "47 h 59 min"), (172_800, "2 d 0 h"), (10_000_000, "115 d 17 h"),
    ],
)  # fmt: skip
def test_spans(seconds: float, text: str) -> None:
    assert span_text(seconds) == text
