"""Rate limit headers: requests of the lowest priority wait while a registry's limit is nearly used up."""

from __future__ import annotations

from typing import Any

import pytest
from twisted.internet.defer import Deferred

from ociregistry.context import Context, Priority
from ociregistry.errors import Unavailable
from ociregistry.names import Repository, Upstream
from ociregistry.upstream.http import DEFAULT_OPTIONS, RequestOptions, Response
from ociregistry.upstream.registry import Registry
from tests.unit.support.common import failed, fired
from tests.unit.support.http_agents import registry_over
from tests.unit.test_upstream_client import CDN, HOP, OK, REG, TOKEN, Asking, challenge, redirect, token
from tests.unit.test_upstream_registry import GOOD, IMAGE, TAGGED
from tests.unit.test_upstream_registry_mirrors import MirroredRegistry

LAST = RequestOptions(priority=Priority.METADATA)
APP = Repository(Upstream("reg.example"), "team/app")


def limited(remaining: str, limit: str = "", reset: str = "", **more: Any) -> dict[str, Any]:
    """Return a response with these headers; empty ones are left out."""
    answer = {"RateLimit-Limit": limit, "ratelimit-remaining": remaining, "RateLimit-Reset": reset}
    return {"headers": {name: value for name, value in answer.items() if value}, **more}


LOW = limited("25;w=21600", "100;w=21600")
ENOUGH = limited("26;w=21600", "100;w=21600")
SILENT: dict[str, Any] = {}


def ask(asking: Asking, options: RequestOptions = LAST) -> Deferred[Response]:
    """Send a request for a manifest with these options."""
    return Deferred.fromCoroutine(asking.client.request("GET", APP, "manifests/1", {}, options))


def held(asking: Asking) -> int:
    """Return for how many seconds a request of the lowest priority is held back, 0 if it is sent."""
    sent = len(asking.asked)
    asked = ask(asking)
    if len(asking.asked) > sent:
        assert fired(asked).status == 200
        return 0
    return failed(asked, Unavailable).retry_after


def after(answer: dict[str, Any]) -> int:
    """Return for how many seconds a request is held back after this response."""
    asking = Asking({REG: [answer, SILENT]})
    fired(ask(asking, DEFAULT_OPTIONS))
    return held(asking)


@pytest.mark.parametrize(
    ("remaining", "limit", "low"),
    [
        ("25;w=21600", "100;w=21600", True),
        ("26;w=21600", "100;w=21600", False),
        ("0;w=21600", "100;w=21600", True),
        ("25", "100", True),
        ("26", "100", False),
        (" 25 ; w=60", "100, 100;w=10, 1000;w=3600", True),
        ("26", "1000", True),
        ("250", "1000", True),
        ("251", "1000", False),
        # The limit itself is not sent.
        ("25", "", True),
        ("26", "", False),
        ("25", "many", True),
        ("26", "1" * 13, False),
    ],
)
def test_requests_are_held_below_a_quarter_of_the_limit(remaining: str, limit: str, low: bool) -> None:
    assert bool(after(limited(remaining, limit))) is low


@pytest.mark.parametrize("remaining", ["", "few", "-1", "1.5", "0x10", ";w=60", "²", "1" * 13, "1" * 10_000, "w=1"])
def test_malformed_headers_are_ignored(remaining: str) -> None:
    assert after(limited(remaining, "100;w=21600")) == 0
    # Earlier values stay valid.
    asking = Asking({REG: [LOW, limited(remaining, "100;w=21600"), SILENT]})
    fired(ask(asking, DEFAULT_OPTIONS))
    fired(ask(asking, DEFAULT_OPTIONS))
    assert held(asking) > 0


@pytest.mark.parametrize(
    ("answer", "seconds"),
    [
        (limited("0;w=8000", "100;w=8000"), 2000),
        (limited("0", "100;w=8000"), 2000),
        (limited("0;w=8000"), 2000),
        (limited("0;w=21600", "100;w=21600"), 3600),
        (limited("0;w=100", "100;w=100"), 60),
        (limited("0", "100", "700"), 700),
        # The reset time takes precedence.
        (limited("0;w=8000", "100;w=8000", "700"), 700),
        (limited("0", "100", "10"), 60),
        (limited("0", "100", "1609844400"), 3600),
        (limited("0", "100"), 900),
        (limited("0;w=soon", "100;x=1", "soon"), 900),
        (limited("0;x=1;w=8000", "100"), 2000),
    ],
)
def test_hold_time(answer: dict[str, Any], seconds: int) -> None:
    asking = Asking({REG: [answer, SILENT]})
    fired(ask(asking, DEFAULT_OPTIONS))
    assert held(asking) == seconds
    asking.clock.advance(seconds - 1)
    assert held(asking) == 1
    asking.clock.advance(1)
    assert held(asking) == 0


def test_held_request_is_refused_with_reason() -> None:
    asking = Asking({REG: [LOW, SILENT]})
    fired(ask(asking, DEFAULT_OPTIONS))
    asking.clock.advance(100)
    refused = failed(ask(asking), Unavailable)
    assert refused.message == "reg.example: rate limit nearly used up, lowest-priority requests paused for 3500 s"
    assert refused.retry_after == 3500
    assert len(asking.asked) == 1


@pytest.mark.parametrize("priority", sorted(set(Priority) - {Priority.METADATA}))
def test_other_priorities_are_not_held(priority: Priority) -> None:
    asking = Asking({REG: [limited("0;w=21600", "100;w=21600")]})
    for _ in range(3):
        assert fired(ask(asking, RequestOptions(priority=priority))).status == 200
    assert held(asking) > 0


def test_nothing_is_held_before_the_first_headers() -> None:
    asking = Asking({REG: [SILENT]})
    assert [held(asking) for _ in range(3)] == [0, 0, 0]


def test_latest_headers_count() -> None:
    asking = Asking({REG: [LOW, ENOUGH, SILENT, LOW, SILENT]})
    fired(ask(asking, DEFAULT_OPTIONS))
    assert held(asking) > 0
    fired(ask(asking, DEFAULT_OPTIONS))
    assert [held(asking), held(asking)] == [0, 0]
    assert held(asking) > 0


def test_one_probe_is_sent_after_the_hold_time() -> None:
    asking = Asking({REG: [LOW, None]})
    fired(ask(asking, DEFAULT_OPTIONS))
    asking.clock.advance(3600)
    assert not ask(asking).called
    assert held(asking) == 3600
    assert len(asking.asked) == 2


@pytest.mark.parametrize(
    ("answer", "then"), [(LOW, 3600), (SILENT, 3600), (limited("0", "100", "70"), 70), (ENOUGH, 0)]
)
def test_headers_of_the_probe_decide(answer: dict[str, Any], then: int) -> None:
    asking = Asking({REG: [LOW, answer, SILENT]})
    fired(ask(asking, DEFAULT_OPTIONS))
    asking.clock.advance(3600)
    assert [held(asking), held(asking)] == [0, then]


def test_limit_of_a_redirect_target_is_separate() -> None:
    asking = Asking({REG: [redirect(f"{CDN}x")], CDN: [LOW]})
    fired(ask(asking, DEFAULT_OPTIONS))
    assert held(asking) == 0


def test_limit_of_the_token_service_is_separate() -> None:
    asking = Asking({REG: [challenge(), SILENT], TOKEN: [token("t") | LOW]})
    fired(ask(asking, DEFAULT_OPTIONS))
    assert held(asking) == 0


@pytest.mark.parametrize("status", [401, 404, 500])
def test_headers_of_an_error_response_count(status: int) -> None:
    asking = Asking({REG: [LOW | {"status": status}, SILENT]})
    fired(ask(asking, DEFAULT_OPTIONS))
    assert held(asking) > 0


def test_each_registry_has_its_own_limit() -> None:
    """A mirror whose limit is nearly used up is skipped."""
    mirrored = MirroredRegistry(LOW, {"status": 404}, SILENT)
    for options in (DEFAULT_OPTIONS, LAST, LAST):
        assert fired(mirrored.ask("manifests/1", options)).status == 200
    assert mirrored.asked == ["one", "two", "reg", "two", "reg"]


def test_manifest_request_has_the_priority_of_its_context() -> None:
    headers = {**GOOD["headers"], **LOW["headers"]}
    asking = Asking({REG: [{**GOOD, "headers": headers}]})
    registry: Registry = registry_over(asking.client)
    assert fired(Deferred.fromCoroutine(registry.manifest(TAGGED, Context(priority=Priority.METADATA)))) == IMAGE
    assert [sent.options.priority for sent in asking.http.sent] == [Priority.METADATA]
    failed(Deferred.fromCoroutine(registry.manifest(TAGGED, Context(priority=Priority.METADATA))), Unavailable)
    assert fired(Deferred.fromCoroutine(registry.manifest(TAGGED))) == IMAGE


@pytest.mark.parametrize("where", [REG, TOKEN, CDN])
def test_429_for_lowest_priority_does_not_block_others(where: str) -> None:
    """Otherwise a client in the middle of a pull would wait because of a background request."""
    throttled = {"status": 429, "headers": {"Retry-After": "3600"}}
    answers = {
        REG: {REG: [throttled, OK]},
        TOKEN: {REG: [challenge(), challenge(), OK], TOKEN: [throttled, token("t")]},
        CDN: {REG: [HOP, HOP], CDN: [throttled, OK]},
    }
    asking = Asking(answers[where])
    asked = ask(asking)
    if where == TOKEN:
        assert failed(asked, Unavailable).retry_after == 3600
    else:
        response = fired(asked)
        assert (response.status, response.retry_after) == (429, 3600)
    assert fired(ask(asking, DEFAULT_OPTIONS)).status == 200
