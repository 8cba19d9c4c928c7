"""Mirrors: asked in order before the registry, with the ns parameter; the registry's answer is final."""

from __future__ import annotations

from typing import Any

import pytest
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.logger import LogEvent, LogLevel

from ociregistry.config.registries import Login, Password
from ociregistry.context import Priority
from ociregistry.errors import Denied, LoopDetected, ManifestUnknown, RegistryError, Unavailable
from ociregistry.names import Repository, Upstream
from ociregistry.upstream.auth import AccessRefused
from ociregistry.upstream.breaker import LinkDown
from ociregistry.upstream.client import BaseUrl, Client
from ociregistry.upstream.credentials import Credentials
from ociregistry.upstream.http import DEFAULT_OPTIONS, NoTls, RequestOptions, Response
from ociregistry.upstream.mirrors import MirrorClient, Sources
from ociregistry.upstream.origin import Origin
from ociregistry.upstream.registry import ConnectionLimit, Registry
from tests.unit.support.bodies import ScriptedAnswer, ScriptedExchanges
from tests.unit.support.common import failed, fired, texts
from tests.unit.support.http_agents import INSTANCE, client_over, no_helper
from tests.unit.test_upstream_client import OK, TOKEN, challenge
from tests.unit.test_upstream_registry import GOOD, IMAGE, TAGGED

ONE, TWO, OWN = "https://one.example", "http://two.example:8080/docker", "https://reg.example"
APP = Repository(Upstream("reg.example"), "team/app")
DOWN = Unavailable("the connection was refused")


def outcome(status: int, host: str = "one.example") -> str:
    """Return how messages spell the status of a host's response to an anonymous request."""
    return f"{status}: {host} refused anonymous access (private, or absent)" if status in (401, 403) else f"{status}"


def mirror(url: str, http: ScriptedExchanges, clock: Clock, ns: str, login: Login | None = None) -> MirrorClient:
    """Return the mirror at a URL."""
    scheme, _, rest = url.partition("://")
    host, _, path = rest.partition("/")
    base = BaseUrl(scheme, host, f"/{path}/v2" if path else "/v2", ns)

    def trusted(realm: Origin) -> bool:
        return realm.host == host

    async def http_allowed() -> bool:
        raise AssertionError("its scheme is known")

    client = Client(host, base, http, Credentials(login, no_helper, clock), trusted, http_allowed, clock)
    return MirrorClient(url, client, clock)


class MirroredRegistry:
    """The registry reg.example behind two mirrors, with scripted answers."""

    def __init__(
        self,
        one: ScriptedAnswer,
        two: ScriptedAnswer,
        own: ScriptedAnswer,
        *more: ScriptedAnswer,
        ns: str = "reg.example",
        login: Login | None = None,
        alone: bool = False,
    ) -> None:
        """Script the answers; `more` are later ones of the first mirror.

        With `alone`, the registry is never asked.
        """
        self.clock = Clock()
        self.http = ScriptedExchanges({ONE: [one, *more], TWO: [two], OWN: [own], TOKEN: [{"status": 403}]})
        mirrors = [
            mirror(ONE, self.http, self.clock, ns, login),
            mirror(TWO, self.http, self.clock, ns),
        ]
        self.sources = Sources("reg.example", mirrors, None if alone else client_over(self.http, self.clock))

    def ask(self, path: str = "blobs/x", options: RequestOptions = DEFAULT_OPTIONS) -> Deferred[Response]:
        """Send a request."""
        asked = Deferred.fromCoroutine(self.sources.request("GET", APP, path, {"Accept": "a"}, options))
        return asked.addCallback(lambda answered: answered[0])

    @property
    def registry(self) -> Registry:
        """The registry, which uses its mirrors."""
        return Registry(Upstream("reg.example"), self.sources, ConnectionLimit(1), INSTANCE)

    @property
    def asked(self) -> list[str]:
        """Return the hosts in the order of requests."""
        return [url.split("/")[2].split(".")[0] for url in self.http.urls]


def test_first_mirror_with_the_content_is_the_only_one_asked() -> None:
    mirrored = MirroredRegistry(OK, OK, OK)
    response = fired(mirrored.ask())
    assert (response.status, response.upstream) == (200, "reg.example")
    assert mirrored.http.urls == [f"{ONE}/v2/team/app/blobs/x?ns=reg.example"]
    assert mirrored.http.sent[0].headers == {"Accept": "a"}


@pytest.mark.parametrize("status", [200, 206])
def test_partial_content_is_accepted(status: int) -> None:
    assert fired(MirroredRegistry({"status": status}, OK, OK).ask()).status == status


@pytest.mark.parametrize("path", ["tags/list?n=5&last=a%2Fb", "tags/list"])
@pytest.mark.parametrize("ns", ["reg.example", "reg.example:5000", "docker.io"])
def test_ns_is_added_to_any_query(path: str, ns: str) -> None:
    mirrored = MirroredRegistry({"status": 404}, {"status": 404}, OK, ns=ns)
    assert fired(mirrored.ask(path)).status == 200
    separator = "&" if "?" in path else "?"
    assert mirrored.http.urls == [
        f"{ONE}/v2/team/app/{path}{separator}ns={ns}",
        f"{TWO}/v2/team/app/{path}{separator}ns={ns}",
        # The registry itself gets no ns.
        f"{OWN}/v2/team/app/{path}",
    ]


@pytest.mark.parametrize("status", [300, 304, 400, 401, 403, 404, 405, 416, 429, 500, 502, 503, 504])
def test_404_of_a_mirror_leads_to_the_next(status: int, events: list[LogEvent]) -> None:
    mirrored = MirroredRegistry({"status": status}, OK, OK)
    assert fired(mirrored.ask()).status == 200
    assert mirrored.asked == ["one", "two"]
    assert texts(events, LogLevel.debug) == [
        f"{APP}/blobs/x: mirror {ONE}: it answered {outcome(status)}; mirror {TWO}: it answered 200"
    ]


@pytest.mark.parametrize("error", [DOWN, NoTls("TLS failed"), Denied("it has the loopback address 127.0.0.1")])
def test_unavailable_mirror_is_skipped(error: RegistryError) -> None:
    mirrored = MirroredRegistry(error, OK, OK)
    assert fired(mirrored.ask()).status == 200
    assert mirrored.asked == ["one", "two"]


@pytest.mark.parametrize(("given", "mirrors"), [(30.0, 15.0), (10.0, 10.0), (5.0, 5.0)])
@pytest.mark.parametrize("priority", [Priority.URGENT, Priority.CLIENT])
def test_mirrors_have_15_seconds_for_headers(given: float, mirrors: float, priority: Priority) -> None:
    """The registry has no such limit; the priority is the same for all."""
    mirrored = MirroredRegistry(DOWN, DOWN, OK)
    assert fired(mirrored.ask(options=RequestOptions(given, priority))).status == 200
    options = [RequestOptions(timeout, priority) for timeout in (mirrors, mirrors, given)]
    assert [sent.options for sent in mirrored.http.sent] == options


@pytest.mark.parametrize("status", [200, 401, 403, 404, 500])
def test_registry_answer_is_final(status: int) -> None:
    mirrored = MirroredRegistry({"status": 404}, DOWN, {"status": status})
    response = fired(mirrored.ask())
    assert (response.status, response.url) == (status, f"{OWN}/v2/team/app/blobs/x")
    assert mirrored.asked == ["one", "two", "reg"]


@pytest.mark.parametrize("answer", [{"status": 404}, {"status": 503}, Denied("not allowed")])
def test_mirror_with_error_status_is_asked_again(answer: ScriptedAnswer, events: list[LogEvent]) -> None:
    mirrored = MirroredRegistry(answer, OK, OK)
    for _ in range(2):
        fired(mirrored.ask())
    assert mirrored.asked == ["one", "two"] * 2
    assert texts(events, LogLevel.warn) == []


def test_mirror_with_refused_token_is_asked_again(events: list[LogEvent]) -> None:
    """The refusal may concern one repository only, as with ghcr.io."""
    mirrored = MirroredRegistry(challenge(), OK, OK)
    for _ in range(2):
        assert fired(mirrored.ask()).status == 200
    assert mirrored.asked == ["one", "auth", "two", "one", "auth", "two"]
    assert texts(events, LogLevel.warn) == []


def test_mirror_challenge_without_scope() -> None:
    """The scope has the repository's name at the registry, regardless of the mirror's path."""
    mirrored = MirroredRegistry(DOWN, challenge(""), DOWN)
    failed(mirrored.ask(), Unavailable)
    assert mirrored.http.urls[1:3] == [
        f"{TWO}/v2/team/app/blobs/x?ns=reg.example",
        f"{TOKEN}?service=s&scope=repository%3Ateam%2Fapp%3Apull",
    ]


def test_rate_limited_mirror_is_skipped() -> None:
    mirrored = MirroredRegistry({"status": 429, "headers": {"Retry-After": "20"}}, OK, OK, OK)
    for _ in range(2):
        fired(mirrored.ask())
    assert mirrored.asked == ["one", "two", "two"]
    mirrored.clock.advance(31)
    fired(mirrored.ask())
    assert mirrored.asked == ["one", "two", "two", "one"]


def test_registry_error_includes_mirror_errors() -> None:
    mirrored = MirroredRegistry(
        Unavailable("one.example: down"), {"status": 502}, Unavailable("reg.example: down", 42)
    )
    error = failed(mirrored.ask(), Unavailable)
    assert error.message == f"mirror {ONE}: down; mirror {TWO}: it answered 502; registry reg.example: down"
    assert error.retry_after == 42


def test_error_includes_denied_mirrors() -> None:
    mirrored = MirroredRegistry(Denied("one.example: it has a loopback address"), {"status": 404}, DOWN)
    message = failed(mirrored.ask(), Unavailable).message
    assert message == (
        f"mirror {ONE}: it has a loopback address; mirror {TWO}: it answered 404; "
        "registry reg.example: the connection was refused"
    )


def test_error_without_mirrors_is_unchanged() -> None:
    client = client_over(ScriptedExchanges({OWN: [DOWN]}))
    asked = Deferred.fromCoroutine(Sources("reg.example", [], client).request("GET", APP, "blobs/x", {}))
    assert failed(asked, Unavailable) is DOWN


def test_unknown_everywhere_stays_unknown() -> None:
    mirrored = MirroredRegistry({"status": 404}, {"status": 404}, challenge())
    error = failed(mirrored.ask(), AccessRefused)
    assert error.message == (
        f"mirror {ONE}: it answered 404; mirror {TWO}: it answered 404; "
        f"registry reg.example: its token service answered {outcome(403, 'auth.example')}"
    )
    denied = Denied("reg.example has the loopback address 127.0.0.1")
    assert failed(MirroredRegistry({"status": 404}, {"status": 404}, denied).ask(), Denied) is denied


def test_cancelled_request_does_not_disable_the_mirror() -> None:
    mirrored = MirroredRegistry(None, OK, OK, OK)
    asked = mirrored.ask()
    asked.cancel()
    asked.addErrback(lambda _: None)
    assert mirrored.clock.getDelayedCalls() == []
    fired(mirrored.ask())
    assert mirrored.asked == ["one", "one"]


def test_mirror_has_its_own_credentials() -> None:
    wants: dict[str, Any] = {"status": 401, "headers": {"WWW-Authenticate": "Basic"}}
    mirrored = MirroredRegistry(wants, wants, wants, login=Password("u", "p"))
    assert fired(mirrored.ask()).status == 401
    shown = [bool(sent.authorization) for sent in mirrored.http.sent]
    assert list(zip(mirrored.asked, shown, strict=True)) == [
        ("one", False),
        ("one", True),
        ("two", False),
        ("reg", False),
    ]


def test_registry_uses_its_mirrors() -> None:
    mirrored = MirroredRegistry(GOOD, OK, {"status": 404}, {"status": 404})
    assert fired(Deferred.fromCoroutine(mirrored.registry.manifest(TAGGED))) == IMAGE
    mirrored = MirroredRegistry({"status": 404}, {"status": 403}, challenge())
    # A refusing token service means the same as a 403.
    unknown = failed(Deferred.fromCoroutine(mirrored.registry.manifest(TAGGED)), ManifestUnknown)
    assert unknown.message == (
        f"{TAGGED}: mirror {ONE}: it answered 404; mirror {TWO}: it answered {outcome(403, 'two.example')}; "
        f"registry reg.example: its token service answered {outcome(403, 'auth.example')}"
    )
    mirrored = MirroredRegistry({"status": 404}, DOWN, {"status": 404}, {"status": 404})
    unknown = failed(Deferred.fromCoroutine(mirrored.registry.manifest(TAGGED)), ManifestUnknown)
    assert unknown.message == (
        f"{TAGGED}: mirror {ONE}: it answered 404; mirror {TWO}: the connection was refused; "
        "registry reg.example: it answered 404"
    )


@pytest.mark.parametrize("media_type", ["text/html", "Text/HTML; charset=utf-8"])
def test_html_page_is_skipped(media_type: str) -> None:
    mirrored = MirroredRegistry({"status": 200, "headers": {"Content-Type": media_type}}, OK, OK)
    assert fired(mirrored.ask()).status == 200
    assert mirrored.asked == ["one", "two"]


# Mirrors alone


UNKNOWN_TOKEN = challenge()
"""A challenge whose token service refuses access."""


def test_registry_is_never_asked_where_its_mirrors_stand_for_it() -> None:
    mirrored = MirroredRegistry({"status": 404}, GOOD, OK, alone=True)
    assert fired(Deferred.fromCoroutine(mirrored.registry.manifest(TAGGED))) == IMAGE
    assert mirrored.asked == ["one", "two"]


@pytest.mark.parametrize("one", [{"status": 401}, {"status": 403}, {"status": 404}, UNKNOWN_TOKEN])
@pytest.mark.parametrize("two", [{"status": 401}, {"status": 403}, {"status": 404}, UNKNOWN_TOKEN])
def test_what_no_mirror_has_is_unknown(one: ScriptedAnswer, two: ScriptedAnswer) -> None:
    mirrored = MirroredRegistry(one, two, OK, alone=True)
    unknown = failed(Deferred.fromCoroutine(mirrored.registry.manifest(TAGGED)), ManifestUnknown)
    assert f"mirror {ONE}: it" in unknown.message or f"mirror {ONE}: its token service answered" in unknown.message
    assert f"mirror {TWO}: it" in unknown.message
    assert "reg" not in mirrored.asked


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (Unavailable("one.example: the connection was refused", 17), "the connection was refused"),
        ({"status": 429, "headers": {"Retry-After": "17"}}, "it answered 429"),
        ({"status": 503, "headers": {"Retry-After": "17"}}, "it answered 503"),
        ({"status": 408, "headers": {"Retry-After": "17"}}, "it answered 408"),
    ],
)
def test_what_a_mirror_that_cannot_be_asked_may_have_is_unavailable(answer: ScriptedAnswer, why: str) -> None:
    first = MirroredRegistry(answer, {"status": 404}, OK, alone=True)
    error = failed(Deferred.fromCoroutine(first.registry.manifest(TAGGED)), Unavailable)
    assert error.message == f"reg.example, by its mirrors alone: mirror {ONE}: {why}; mirror {TWO}: it answered 404"
    assert error.retry_after == 17
    last = MirroredRegistry({"status": 404}, answer, OK, alone=True)
    error = failed(Deferred.fromCoroutine(last.registry.manifest(TAGGED)), Unavailable)
    assert error.message.startswith(
        f"reg.example, by its mirrors alone: mirror {ONE}: it answered 404; mirror {TWO}: "
    )
    assert "reg" not in [*first.asked, *last.asked]


def test_mirror_after_bad_body_counts_as_one_that_cannot_be_asked() -> None:
    mirrored = MirroredRegistry({**GOOD, "data": b"<html>"}, {"status": 404}, OK, {"status": 404}, alone=True)
    error = failed(Deferred.fromCoroutine(mirrored.registry.manifest(TAGGED)), Unavailable)
    assert f"mirror {ONE}: not asked for 10 s: " in error.message
    assert error.retry_after == 10
    mirrored.clock.advance(10)
    failed(Deferred.fromCoroutine(mirrored.registry.manifest(TAGGED)), ManifestUnknown)


def test_html_page_of_a_mirror_is_unavailable() -> None:
    page: dict[str, Any] = {"status": 200, "headers": {"Content-Type": "text/html"}}
    mirrored = MirroredRegistry({"status": 404}, page, OK, alone=True)
    error = failed(Deferred.fromCoroutine(mirrored.registry.manifest(TAGGED)), Unavailable)
    assert error.message.endswith(f"mirror {TWO}: it sent an HTML page, as login pages and captive portals are")


def test_mirror_without_referrers_api_is_asked_for_the_tag() -> None:
    absent: dict[str, Any] = {"status": 404, "data": b'{"errors": [{"code": "MANIFEST_UNKNOWN"}]}'}
    mirrored = MirroredRegistry({"status": 404}, {"status": 404}, OK, {"status": 404}, alone=True)
    mirrored.http._script[TWO] = [{"status": 404}, absent]
    found = fired(Deferred.fromCoroutine(mirrored.registry.referrers(APP, IMAGE.digest)))
    assert found.children == ()
    assert [url.split("/")[-2] for url in mirrored.http.urls] == ["referrers", "referrers", "manifests", "manifests"]


def test_last_mirror_alone_has_the_time_of_the_registry() -> None:
    mirrored = MirroredRegistry(DOWN, DOWN, OK, alone=True)
    failed(mirrored.ask(options=RequestOptions(30.0)), Unavailable)
    assert [sent.options.timeout for sent in mirrored.http.sent] == [15.0, 30.0]


def test_loop_through_a_mirror_alone_is_denied() -> None:
    loop: dict[str, Any] = {"status": 403, "headers": {"Via": f"1.1 {INSTANCE}"}}
    mirrored = MirroredRegistry({"status": 404}, loop, OK, alone=True)
    failed(Deferred.fromCoroutine(mirrored.registry.manifest(TAGGED)), LoopDetected)


def test_mirrors_alone_that_count_as_down_are_no_other_failure() -> None:
    """Then nothing is given up, and clients get 503 at once."""
    down, later = LinkDown("two.example:8080: no answer", 3), LinkDown("one.example: no route", 7)
    for one, two in (({"status": 404}, down), (later, down), (down, {"status": 404})):
        mirrored = MirroredRegistry(one, two, OK, alone=True)
        error = failed(Deferred.fromCoroutine(mirrored.registry.manifest(TAGGED)), LinkDown)
        assert error.retry_after == 3
        assert error.message.startswith(f"reg.example, by its mirrors alone: mirror {ONE}: ")
    mirrored = MirroredRegistry({"status": 500}, down, OK, alone=True)
    other = failed(Deferred.fromCoroutine(mirrored.registry.manifest(TAGGED)), Unavailable)
    assert not isinstance(other, LinkDown)
