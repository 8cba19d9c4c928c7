"""Requests and circuit breakers: which outcomes open or close them, and which requests bypass them."""

from __future__ import annotations

from typing import Any

import pytest
from OpenSSL import SSL
from twisted.internet import error
from twisted.internet.defer import CancelledError, Deferred, succeed
from twisted.internet.task import Clock
from twisted.logger import LogEvent, LogLevel
from twisted.python.failure import Failure
from twisted.web.client import ResponseNeverReceived
from twisted.web.http_headers import Headers
from twisted.web.iweb import IAgent, IBodyProducer, IResponse
from zope.interface import implementer

from ociregistry.context import Priority, Wanted
from ociregistry.errors import Denied, Unavailable
from ociregistry.names import Repository, Upstream
from ociregistry.upstream.bandwidth import Bandwidth
from ociregistry.upstream.breaker import CircuitBreakers, LinkDown
from ociregistry.upstream.failures import CertificateRefused
from ociregistry.upstream.http import DEFAULT_OPTIONS, EncodedBody, HttpClient, RequestOptions, Response
from ociregistry.upstream.origin import Origin
from tests.unit.support.common import failed, on_reactor, texts, until
from tests.unit.support.http_agents import client_over
from tests.unit.support.wire import Network
from tests.unit.test_upstream_client import OK, Asking, redirect
from tests.upstream import ScriptedRegistry
from tests.upstream_rules import Hold, Reply

URL = "https://reg.example/v2/"


@implementer(IAgent)
class Waiting:
    """An agent whose requests are finished by the test."""

    def __init__(self) -> None:
        self.uris: list[bytes] = []
        self.asked: list[Deferred[IResponse]] = []

    def request(
        self, method: bytes, uri: bytes, headers: Headers | None = None, bodyProducer: IBodyProducer | None = None
    ) -> Deferred[IResponse]:
        """Record the request."""
        self.uris.append(uri)
        self.asked.append(Deferred())
        return self.asked[-1]


class Sending:
    """Send requests through one circuit breaker."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.agent = Waiting()
        self.dropped = 0
        self.http = HttpClient(
            "reg.example", self.agent, CircuitBreakers(clock), Bandwidth(None, (), clock), self._drop, clock
        )

    def _drop(self) -> None:
        self.dropped += 1

    def probe(self) -> Deferred[Response]:
        """Send a request that passes as a probe."""
        return self.send(RequestOptions(priority=Priority.BACKGROUND))

    def send(self, options: RequestOptions = DEFAULT_OPTIONS, url: str = URL) -> Deferred[Response]:
        """Send a request."""
        return Deferred.fromCoroutine(self.http.send("GET", url, {}, options=options))

    def fails(self, why: Exception, options: RequestOptions = DEFAULT_OPTIONS) -> Deferred[Response]:
        """Send a request that fails, as often as it is sent."""
        sent = self.send(options)
        while not sent.called:
            self.agent.asked[-1].errback(why)
        return sent

    @property
    def is_down(self) -> bool:
        """Return whether the next request is refused."""
        before = len(self.agent.asked)
        sent = self.send()
        if sent.called:
            failed(sent, LinkDown)
            assert len(self.agent.asked) == before
            return True
        sent.cancel()
        failed(sent, CancelledError)
        return False


@pytest.fixture
def sending(clock: Clock) -> Sending:
    """Return a sender with a closed breaker."""
    return Sending(clock)


def never_received(why: Exception) -> ResponseNeverReceived:
    """Return the exception as an Agent raises it."""
    return ResponseNeverReceived([Failure(why)])


@pytest.mark.parametrize(
    "why",
    [
        error.DNSLookupError(),
        error.ConnectionRefusedError(),
        error.NoRouteError(),
        error.TimeoutError(),
        error.TCPTimedOutError(),
        error.ConnectError(),
        never_received(error.TimeoutError()),
        never_received(SSL.Error()),
    ],
    ids=repr,
)
def test_failures_that_open_the_breaker(sending: Sending, events: list[LogEvent], why: Exception) -> None:
    failed(sending.fails(why), Unavailable)
    assert sending.is_down
    (line,) = texts(events, LogLevel.warn)
    assert line.startswith("reg.example:443 cannot be reached: ")
    assert sending.dropped == 0


def test_handshake_that_breaks_twice_counts_as_one_failure(sending: Sending, events: list[LogEvent]) -> None:
    """The next probe is due after the interval of a first failure."""
    failed(sending.fails(never_received(SSL.Error())), Unavailable)
    assert len(sending.agent.asked) == 2
    assert len(texts(events, LogLevel.warn)) == 1
    sending.clock.advance(1)
    assert not sending.probe().called


def test_handshake_that_breaks_once_does_not_count(sending: Sending, events: list[LogEvent]) -> None:
    sent = sending.send()
    sending.agent.asked[0].errback(never_received(SSL.Error()))
    assert not sent.called
    assert not sending.is_down
    assert texts(events, LogLevel.warn) == []


@pytest.mark.parametrize(
    "why", [error.ConnectionRefusedError(), error.TimeoutError(), never_received(error.ConnectionAborted())], ids=repr
)
def test_other_failures_are_not_retried(sending: Sending, why: Exception) -> None:
    failed(sending.fails(why), Unavailable)
    assert len(sending.agent.asked) == 1


@pytest.mark.parametrize("gives_up", ["caller", "deadline"])
def test_retry_shares_the_deadline(sending: Sending, gives_up: str) -> None:
    sent = sending.send(RequestOptions(8))
    sending.clock.advance(5)
    sending.agent.asked[0].errback(never_received(error.ConnectionDone()))
    if gives_up == "caller":
        sent.cancel()
    else:
        sending.clock.advance(3)
    failed(sent, CancelledError if gives_up == "caller" else Unavailable)
    assert len(sending.agent.asked) == 2
    assert sending.clock.getDelayedCalls() == []


@pytest.mark.parametrize(
    ("why", "kind"),
    [
        (never_received(CertificateRefused("CN=x", "its issuer is not trusted")), Unavailable),
        (never_received(SSL.Error([("", "", "wrong version number")])), Unavailable),
        (never_received(error.ConnectionLost()), Unavailable),
        (never_received(error.ConnectionDone()), Unavailable),
        (EncodedBody("it sent gzip"), Unavailable),
        (ValueError("no HTTP"), Unavailable),
        (Denied("not that address"), Denied),
    ],
    ids=repr,
)
def test_failures_that_do_not_open_the_breaker(
    sending: Sending, events: list[LogEvent], why: Exception, kind: type[Exception]
) -> None:
    failed(sending.fails(why), kind)
    assert not sending.is_down
    assert texts(events, LogLevel.warn) == []


@pytest.mark.parametrize("why", [Denied("no"), never_received(error.ConnectionLost())], ids=repr)
def test_next_request_after_the_interval_is_the_probe(sending: Sending, why: Exception) -> None:
    failed(sending.fails(error.NoRouteError()), Unavailable)
    sending.clock.advance(1)
    assert sending.is_down
    failed(sending.fails(why, RequestOptions(priority=Priority.BACKGROUND)), Exception)
    assert sending.is_down
    sending.clock.advance(2)
    assert not sending.probe().called


def test_urgent_request_is_sent_while_the_breaker_is_open(sending: Sending) -> None:
    failed(sending.fails(error.NoRouteError()), Unavailable)
    assert sending.is_down
    urgent = sending.send(RequestOptions(priority=Priority.URGENT))
    assert len(sending.agent.asked) == 2
    urgent.cancel()
    failed(urgent, CancelledError)


@pytest.mark.parametrize("timeout", [8.0, 9.5])
def test_header_timeout_opens_the_breaker(sending: Sending, timeout: float) -> None:
    sent = sending.send(RequestOptions(timeout))
    sending.clock.advance(timeout - 0.125)
    assert not sent.called
    sending.clock.advance(0.125)
    assert failed(sent, Unavailable).message == "reg.example: no response in time"
    # Idle connections are dropped, because other requests on the same path are affected too.
    assert sending.dropped == 1
    assert sending.is_down
    assert sending.clock.getDelayedCalls() == []


@pytest.mark.parametrize(
    "error_of_agent", [None, error.ConnectingCancelledError("here"), never_received(CancelledError())]
)
def test_cancelled_request_does_not_count(sending: Sending, error_of_agent: Exception | None) -> None:
    sent = sending.send()
    if error_of_agent is None:
        sent.cancel()
    else:
        sending.agent.asked[0].errback(error_of_agent)
    failed(sent, CancelledError)
    assert sending.dropped == 0
    assert not sending.is_down
    assert sending.clock.getDelayedCalls() == []


def test_cancelled_probe_lets_the_next_one_pass(sending: Sending) -> None:
    failed(sending.fails(error.NoRouteError()), Unavailable)
    sending.clock.advance(1)
    probe = sending.probe()
    assert sending.is_down
    probe.cancel()
    failed(probe, CancelledError)
    sending.clock.advance(2)
    assert not sending.probe().called


def test_silent_request_goes_on_for_its_content(sending: Sending, events: list[LogEvent]) -> None:
    """What wants it is told after 10 s; the response after 50 s is returned, and closes the breaker."""
    told: list[Unavailable] = []
    sent = sending.send(RequestOptions(wanted=Wanted(told.append)))
    sending.clock.advance(9.875)
    assert told == []
    sending.clock.advance(0.125)
    assert [type(one) for one in told] == [LinkDown]
    assert sending.is_down
    sending.clock.advance(40)
    assert not sent.called
    sending.agent.asked[0].errback(never_received(EncodedBody("it sent gzip")))
    failed(sent, Unavailable)
    assert len(texts(events, LogLevel.warn)) == 1


def test_silent_request_lives_for_60_seconds(sending: Sending) -> None:
    sent = sending.send(RequestOptions(wanted=Wanted(lambda error: None)))
    sending.clock.advance(59.875)
    assert not sent.called
    sending.clock.advance(0.125)
    failed(sent, Unavailable)
    assert sending.clock.getDelayedCalls() == []


def test_silent_request_that_nothing_waits_for_ends(sending: Sending) -> None:
    sent = sending.send()
    sending.clock.advance(10)
    failed(sent, Unavailable)
    assert sending.is_down
    assert sending.clock.getDelayedCalls() == []


def test_probe_tells_at_once_that_the_link_is_down(sending: Sending) -> None:
    """A client that joins it does not wait for it; it lives for 25 s."""
    failed(sending.fails(error.NoRouteError()), Unavailable)
    sending.clock.advance(1)
    told: list[Unavailable] = []
    probe = sending.send(RequestOptions(priority=Priority.BACKGROUND, wanted=Wanted(told.append)))
    assert [type(one) for one in told] == [LinkDown]
    sending.clock.advance(24.875)
    assert not probe.called
    sending.clock.advance(0.125)
    failed(probe, Unavailable)


@pytest.mark.parametrize("status", [200, 404, 401, 429, 500, 503])
@on_reactor
async def test_any_response_closes_the_breaker(
    network: Network, upstream: ScriptedRegistry, clock: Clock, events: list[LogEvent], status: int
) -> None:
    upstream.script("*", Reply(status))
    http = network.http("reg.example", clock=clock)
    http._breakers.get(Origin.of(upstream.url)).enter("reg.example").failed("no route")
    with pytest.raises(LinkDown):
        await http.send("GET", upstream.url, {})
    for options in (RequestOptions(priority=Priority.URGENT), DEFAULT_OPTIONS):
        response = await http.send("GET", upstream.url, {}, options=options)
        assert response.status == status
        await response.discard()
    assert [line.partition(" can")[2] for line in texts(events, LogLevel.warn)] == [
        "not be reached: no route",
        " be reached again, after 0 s",
    ]


@on_reactor
async def test_silent_body_opens_the_breaker(network: Network, upstream: ScriptedRegistry, clock: Clock) -> None:
    upstream.script("*", Reply(200, bytes(100_000)))
    hold = Hold(1000)
    upstream.script("*", hold)
    http = network.http("reg.example", clock=clock)
    response = await http.send("GET", upstream.url, {})
    await until(lambda: response.body._buffered)
    clock.advance(10)
    with pytest.raises(Unavailable):
        await response.collect(100_000)
    with pytest.raises(LinkDown):
        await http.send("GET", upstream.url, {})
    hold.release.set()
    assert clock.getDelayedCalls() == []


@on_reactor
async def test_silence_of_an_older_body_is_ignored(
    network: Network, upstream: ScriptedRegistry, clock: Clock
) -> None:
    upstream.script("/slow", Reply(200, bytes(100_000)))
    hold = Hold(1000)
    upstream.script("/slow", hold)
    upstream.script("/", Reply(200))
    http = network.http("reg.example", clock=clock)
    response = await http.send("GET", f"{upstream.url}/slow", {})
    await until(lambda: response.body._buffered)
    clock.advance(5)
    breaker = http._breakers.get(Origin.of(upstream.url))
    breaker.enter("reg.example").failed("no route")
    breaker.answered()
    clock.advance(5)
    with pytest.raises(Unavailable):
        await response.collect(100_000)
    await (await http.send("GET", f"{upstream.url}/", {})).discard()
    hold.release.set()


def test_refused_https_falls_back_to_http_with_open_breaker(sending: Sending) -> None:
    client = client_over(sending.http, sending.clock, scheme=None, http_allowed=lambda: succeed(True))
    where = Repository(Upstream("reg.example"), "team/app")
    first = Deferred.fromCoroutine(client.request("GET", where, "manifests/1"))
    sending.agent.asked[0].errback(error.ConnectionRefusedError())
    second = Deferred.fromCoroutine(client.request("GET", where, "manifests/2"))
    http = [uri for uri in sending.agent.uris if uri.startswith(b"http:")]
    assert http
    for asked in (first, second):
        asked.addErrback(lambda failure: None)
        asked.cancel()
    assert len(http) == 2


def test_refusal_by_another_host_causes_no_http_fallback() -> None:
    cdn = "https://cdn.example/"
    script: dict[str, list[Any]] = {
        cdn: [LinkDown("down", 1, refused=True)],
        "https://reg.example/": [redirect(cdn)],
        "http:": [OK],
    }
    asking = Asking(script, scheme=None)
    failed(asking.ask(), Unavailable)
    assert asking.http_considered == 0
