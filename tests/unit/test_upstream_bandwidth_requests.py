"""Rate limits (429): the registry is not asked again before Retry-After, and clients get it too."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest

from ociregistry.errors import Unavailable
from tests.unit.support.common import failed
from tests.unit.test_upstream_client import CDN, HOP, OK, REG, TOKEN, Asking, challenge, token


def throttled(retry_after: str | None) -> dict[str, Any]:
    """Return a 429."""
    return {"status": 429, "headers": {} if retry_after is None else {"Retry-After": retry_after}}


@pytest.mark.parametrize(
    ("retry_after", "seconds"), [("7", 7), ("3600", 3600), ("86400", 3600), (None, 5), ("soon", 5)]
)
def test_no_request_before_retry_after(retry_after: str | None, seconds: int) -> None:
    asking = Asking({REG: [throttled(retry_after), OK]})
    assert asking.status() == 429
    asking.clock.advance(seconds - 0.5)
    # For any path.
    for path in ("team/app", "team/other"):
        refused = failed(asking.ask(path=path, what="manifests/1"), Unavailable)
        assert refused.retry_after == 1
    assert len(asking.asked) == 1
    asking.clock.advance(0.5)
    assert asking.status() == 200


def test_error_meanwhile_has_remaining_retry_after() -> None:
    asking = Asking({REG: [throttled("100"), OK]})
    asking.status()
    asking.clock.advance(29.5)
    refused = failed(asking.ask(), Unavailable)
    assert refused.message == "reg.example: rate limited (429), retry in 70 s"
    assert (refused.retry_after, refused.headers()) == (71, {"Retry-After": "71"})


def test_retry_after_date() -> None:
    asking = Asking({REG: [throttled(format_datetime(datetime.now(UTC) + timedelta(seconds=100), usegmt=True)), OK]})
    asking.status()
    # The date has no fractions of a second, and the test takes some time.
    assert 90 <= failed(asking.ask(), Unavailable).retry_after <= 100
    asking.clock.advance(100)
    assert asking.status() == 200


@pytest.mark.parametrize("off", [timedelta(days=3650), timedelta(days=-365)])
def test_retry_after_date_is_compared_with_the_date_of_the_response(off: timedelta) -> None:
    """This machine's clock may be wrong."""
    sent = datetime.now(UTC) + off
    dates = {"Date": format_datetime(sent, usegmt=True)}
    dates["Retry-After"] = format_datetime(sent + timedelta(seconds=100), usegmt=True)
    asking = Asking({REG: [{"status": 429, "headers": dates}, OK]})
    asking.status()
    assert failed(asking.ask(), Unavailable).retry_after == 100


@pytest.mark.parametrize("retry_after", ["0", "Fri, 31 Dec 1999 23:59:59 GMT"])
def test_retry_after_in_the_past(retry_after: str) -> None:
    asking = Asking({REG: [throttled(retry_after), OK]})
    assert (asking.status(), asking.status()) == (429, 200)


def test_registries_are_limited_separately() -> None:
    one, other = Asking({REG: [throttled("60")]}), Asking({REG: [OK]})
    assert (one.status(), other.status()) == (429, 200)


@pytest.mark.parametrize("status", [403, 500, 503])
def test_retry_after_of_other_statuses_is_ignored(status: int) -> None:
    asking = Asking({REG: [{"status": status, "headers": {"Retry-After": "60"}}, OK]})
    assert (asking.status(), asking.status()) == (status, 200)


def test_429_of_the_token_service() -> None:
    asking = Asking({REG: [challenge(), OK], TOKEN: [throttled("60"), token("t")]})
    refused = failed(asking.ask(), Unavailable)
    assert refused.message == "reg.example: its token service answered 429"
    assert refused.retry_after == 60
    asking.clock.advance(59)
    failed(asking.ask(), Unavailable)
    assert len(asking.asked) == 2
    asking.clock.advance(1)
    assert asking.status() == 200


def test_429_of_a_redirect_target() -> None:
    asking = Asking({REG: [HOP, OK], CDN: [throttled("60")]})
    assert asking.status() == 429
    failed(asking.ask(), Unavailable)
    assert len(asking.asked) == 2
