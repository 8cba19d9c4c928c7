"""Credentials of an upstream: configured, or from a helper whose answer is cached."""

from __future__ import annotations

import base64

import pytest
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock

from ociregistry.config.registries import Helper, IdentityToken, Login, Password
from ociregistry.errors import Unavailable
from ociregistry.upstream.credentials import Credentials, basic
from tests.unit.support.common import failed, fired
from tests.unit.support.http_agents import no_helper

Known = Password | IdentityToken


class HelperStub:
    """A helper that returns a new password each time, at once or when the test says so."""

    def __init__(self) -> None:
        self.asked: list[Helper] = []
        self.hold = False
        self.held: list[Deferred[Known]] = []

    async def __call__(self, helper: Helper) -> Known:
        self.asked.append(helper)
        if self.hold:
            self.held.append(Deferred())
            return await self.held[-1]
        return Password("user", f"secret{len(self.asked)}")


class Asked:
    """Credentials from a helper."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.helper = HelperStub()
        self.credentials = Credentials(Helper("ecr-login"), self.helper, self.clock)

    def get(self) -> Deferred[Known | None]:
        """Request the credentials."""
        return Deferred.fromCoroutine(self.credentials.get())

    @property
    def secret(self) -> str:
        """Return the password returned now."""
        known = fired(self.get())
        assert isinstance(known, Password)
        return known.password


@pytest.mark.parametrize("login", [None, Password("u", "p"), IdentityToken("t")])
def test_configured_credentials(login: Login | None, clock: Clock) -> None:
    credentials = Credentials(login, no_helper, clock)
    for _ in range(2):
        assert fired(Deferred.fromCoroutine(credentials.get())) == login
        assert credentials.configured is (login is not None)
        assert not credentials.from_helper
        credentials.forget()


def test_helper_runs_on_demand() -> None:
    asked = Asked()
    assert asked.credentials.configured
    assert not asked.credentials.from_helper
    assert asked.helper.asked == []
    assert fired(asked.get()) == Password("user", "secret1")
    assert asked.helper.asked == [Helper("ecr-login")]
    assert asked.credentials.from_helper


def test_concurrent_requests_run_the_helper_once() -> None:
    asked = Asked()
    asked.helper.hold = True
    waiting = [asked.get() for _ in range(4)]
    waiting[0].cancel()
    waiting.pop(0).addErrback(lambda _: None)
    asked.helper.held[0].callback(Password("user", "secret"))
    assert [fired(one) for one in waiting] == [Password("user", "secret")] * 3
    assert len(asked.helper.asked) == 1


def test_helper_answer_is_cached_for_five_minutes() -> None:
    asked = Asked()
    assert asked.secret == "secret1"
    asked.clock.advance(299.9)
    assert (asked.secret, asked.credentials.from_helper) == ("secret1", True)
    asked.clock.advance(0.1)
    assert not asked.credentials.from_helper
    assert asked.secret == "secret2"


def test_forget_drops_the_cached_answer() -> None:
    asked = Asked()
    assert asked.secret == "secret1"
    asked.credentials.forget()
    assert not asked.credentials.from_helper
    assert asked.secret == "secret2"


def test_helper_failure_is_not_cached() -> None:
    asked = Asked()
    asked.helper.hold = True
    waiting = [asked.get() for _ in range(2)]
    asked.helper.held[0].errback(Unavailable("no credentials"))
    for one in waiting:
        failed(one, Unavailable)
    asked.helper.hold = False
    assert asked.secret == "secret2"


@pytest.mark.parametrize(
    ("user", "password"), [("u", "p"), ("AWS", "a:b:c"), ("u", "pass word"), ("ü", "pässwört€"), ("u", "x" * 5000)]
)
def test_basic_authorization_header(user: str, password: str) -> None:
    kind, _, encoded = basic(Password(user, password)).partition(" ")
    assert kind == "Basic"
    # RFC 7617: no colon in the user, UTF-8 by convention.
    assert base64.b64decode(encoded, validate=True).decode("utf-8").split(":", 1) == [user, password]
    assert "\n" not in encoded


@pytest.mark.parametrize("login", [Password("user", "s3cret"), IdentityToken("s3cret")])
def test_secret_is_not_printed(login: Login) -> None:
    assert "s3cret" not in repr(login) + str(login)
