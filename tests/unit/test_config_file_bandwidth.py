"""Rates and time windows of the `bandwidth` section, and their errors."""

from __future__ import annotations

from datetime import time
from pathlib import Path

import pytest

from ociregistry.config.file import Window, parse_rate
from tests.unit.support.config_files import read, refusal


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Return the path of a configuration file that does not exist yet."""
    return tmp_path / "ociregistry.yaml"


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("500kbit", 62_500),
        ("2Mbit", 250_000),
        ("1.5Mbit", 187_500),
        ("2 Mbit", 250_000),
        ("8kbit", 1000),
        ("8000bit", 1000),
        ("0.008Mbit", 1000),
        ("1Gbit", 125_000_000),
        ("999999999Gbit", 999_999_999 * 125_000_000),
        ("", None),
    ],
)
def test_rate_is_parsed(text: str, rate: float | None) -> None:
    assert parse_rate(text) == rate


@pytest.mark.parametrize(
    "text",
    [
        *("0", "0kbit", "7kbit", "7.999kbit", "7999bit", "-8kbit", "+8kbit", ".5Mbit", "1.Mbit", "1e6bit", "nan"),
        *("inf", "2", "2M", "2mbit", "2MBit", "2Mbit/s", "2Mbps", "2Mibit", "2MB", "2  Mbit", " 2Mbit", "2Mbit "),
        *("2Mbit\n", "٢Mbit", "1234567890bit", "0.0000001Gbit", "kbit", "all", "none"),
    ],
)
def test_malformed_rate_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"^a rate such as 500kbit or 2Mbit is expected, 8kbit at least$"):
        parse_rate(text)


def test_windows_keep_their_order(path: Path) -> None:
    text = 'bandwidth:\n- {from: "08:00", to: "18:00", max: 500kbit}\n- from: 22:30\n  to: 6:05\n  max: 2Mbit\n'
    assert read(path, text).bandwidth == (
        Window(time(8), time(18), 62_500.0),
        Window(time(22, 30), time(6, 5), 250_000.0),
    )


@pytest.mark.parametrize("text", ["bandwidth:\n", "bandwidth: []\n", "port: 1\n"])
def test_empty_section_has_no_windows(path: Path, text: str) -> None:
    assert read(path, text).bandwidth == ()


@pytest.mark.parametrize(
    ("begin", "end", "within", "outside"),
    [
        ("08:00", "18:00", ["08:00", "12:00", "17:59"], ["07:59", "18:00", "00:00"]),
        ("22:00", "06:00", ["22:00", "23:59", "00:00", "05:59"], ["21:59", "06:00", "12:00"]),
        ("18:00", "24:00", ["18:00", "23:59"], ["17:59", "00:00", "08:00"]),
        ("00:00", "06:00", ["00:00", "05:59"], ["06:00", "23:59"]),
        ("00:00", "24:00", ["00:00", "12:00", "23:59"], []),
        ("09:00", "09:00", ["08:59", "09:00"], []),
    ],
)
def test_window_contains_time_of_day(path: Path, begin: str, end: str, within: list[str], outside: list[str]) -> None:
    (window,) = read(path, f"bandwidth: [{{from: '{begin}', to: '{end}', max: 8kbit}}]").bandwidth
    for texts, holds in ((within, True), (outside, False)):
        for text in texts:
            assert window.holds(time.fromisoformat(text)) is holds, text


GOOD = "from: 08:00\n  to: 18:00\n  max: 500kbit\n"


@pytest.mark.parametrize(
    ("text", "line", "key"),
    [
        ("bandwidth: 2Mbit", 1, "bandwidth"),
        ("bandwidth: {from: '08:00', to: '18:00', max: 8kbit}", 1, "bandwidth"),
        ("\nbandwidth:\n- 2Mbit\n", 3, "bandwidth"),
        ("bandwidth:\n- []\n", 2, "bandwidth"),
        ("bandwidth:\n- from: 08:00\n  to: 18:00\n", 2, "bandwidth.max"),
        ("bandwidth:\n- to: 18:00\n  max: 8kbit\n", 2, "bandwidth.from"),
        ("bandwidth:\n- from: 08:00\n  to:\n  max: 8kbit\n", 2, "bandwidth.to"),
        ("bandwidth:\n- \n", 2, "bandwidth.from"),
        (f"bandwidth:\n- {GOOD}  days: all\n", 5, "bandwidth.days"),
        (f"bandwidth:\n- {GOOD}  max: 8kbit\n", 5, "bandwidth.max"),
        (f"bandwidth:\n- {GOOD}- {GOOD.replace('500', '5')}", 7, "bandwidth.max"),
        (f"bandwidth:\n- {GOOD.replace('500kbit', '[8kbit]')}", 4, "bandwidth.max"),
        (f"bandwidth:\n- {GOOD.replace('500kbit', repr(''))}", 4, "bandwidth.max"),
        *(
            (f"bandwidth:\n- {GOOD.replace('18:00', wrong)}", 3, "bandwidth.to")
            for wrong in ("24:01", "25:00", "18:60", "18", "18:0", "6pm", "'18:00 '", "'-1:00'", "18:00:00", "[]")
        ),
    ],
)
def test_error_names_file_line_and_key(path: Path, text: str, line: int, key: str) -> None:
    assert refusal(path, text).startswith(f"{path}:{line}: {key}: ")


def test_error_names_expected_value(path: Path) -> None:
    refused = refusal(path, f"bandwidth:\n- {GOOD.replace('500kbit', '5')}")
    assert refused.endswith(": '5': a rate such as 500kbit or 2Mbit is expected, 8kbit at least")
    refused = refusal(path, f"bandwidth:\n- {GOOD.replace('08:00', '8h')}")
    assert refused.endswith(": '8h': a time of the day such as 08:00 is expected")
    refused = refusal(path, "bandwidth:\n- {from: 08:00}")
    assert refused.endswith(": is missing: a window needs from, to and max")
