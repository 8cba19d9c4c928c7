"""Amounts of time and of bytes, as people write them."""

from __future__ import annotations

import re
from datetime import datetime, timedelta

_DURATION = re.compile(r"(?P<number>[0-9]{1,6}) ?(?P<unit>[smhdw])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_LONGEST = 36_500 * _SECONDS["d"]
_SIZE = re.compile(r"(?P<number>[0-9]{1,12}(?:\.[0-9]{1,6})?) ?(?P<unit>[kKMGT]?)(?P<binary>i?)B?")
_SHARE = re.compile(r"(?P<percent>[0-9]{1,3}) ?%")
_POWERS = {"": 0, "k": 1, "K": 1, "M": 2, "G": 3, "T": 4}
_LOCAL_TIME = "%Y-%m-%dT%H:%M:%S"


def parse_duration(text: str) -> timedelta:
    """The time that `30d`, `12h`, `90m`, `45s` or `2w` is; raises `ValueError`."""
    match = _DURATION.fullmatch(text)
    seconds = int(match["number"]) * _SECONDS[match["unit"]] if match else 0
    if not seconds:
        raise ValueError("a time such as 30d, 12h, 90m or 45s is expected")
    if seconds > _LONGEST:
        raise ValueError("a time of 100 years at most is expected")
    return timedelta(seconds=seconds)


def parse_size(text: str) -> int:
    """Bytes, from `50GB` or `20MiB`; raises `ValueError`."""
    match = _SIZE.fullmatch(text)
    size = int(float(match["number"]) * (1024 if match["binary"] else 1000) ** _POWERS[match["unit"]]) if match else 0
    if not size:
        raise ValueError("a size such as 50GB, 500MB or 20MiB is expected")
    return size


def parse_share(text: str) -> int:
    """Parse a share such as `50%`.

    Returns: per cent, from 1 to 100.

    Raises: `ValueError`.
    """
    match = _SHARE.fullmatch(text)
    percent = int(match["percent"]) if match else 0
    if not 1 <= percent <= 100:
        raise ValueError("a share from 1% to 100% is expected")
    return percent


def parse_local_time(text: str) -> datetime:
    """The time, local to this machine, that `2024-03-01T22:17:30` is; raises `ValueError`."""
    try:
        if not re.fullmatch(r"[0-9]{4}(-[0-9]{2}){2}T([0-9]{2}:){2}[0-9]{2}", text):
            raise ValueError
        return datetime.strptime(text, _LOCAL_TIME).astimezone()
    except (ValueError, OverflowError, OSError):
        raise ValueError("a local date and time such as 2024-03-01T22:17:30 is expected") from None


def local_time(moment: datetime) -> str:
    """`moment` as it is local to this machine, such as `2024-03-01T22:17:30`."""
    return moment.astimezone().strftime(_LOCAL_TIME)


def size_text(size: int) -> str:
    """`size` bytes for people, such as `12.3 MB`."""
    amount, units = float(size), ["B", "kB", "MB", "GB", "TB"]
    while amount >= 999.95 and len(units) > 1:
        amount, units = amount / 1000, units[1:]
    return f"{size} B" if units[0] == "B" else f"{amount:.1f} {units[0]}"
