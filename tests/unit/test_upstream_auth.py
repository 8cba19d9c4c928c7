"""Retries after a 401: which credentials are sent in which order, and when the client gives up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ociregistry.config.registries import Helper, IdentityToken, Login, Password
from ociregistry.errors import Unavailable
from ociregistry.upstream.auth import Authorization
from ociregistry.upstream.credentials import basic
from tests.unit.support.bodies import ScriptedAnswer
from tests.unit.support.common import failed, fired
from tests.unit.test_upstream_client import CDN, OK, REG, TOKEN, Asking, redirect, token

USER = Password("user", "s3cret")
BASIC = basic(USER)
HELPER = Helper("fake")


def refusal(*challenges: str) -> dict[str, Any]:
    """Return a 401 with these challenges."""
    return {"status": 401, "headers": {"WWW-Authenticate": list(challenges)}}


def wants(scope: str = "repository:team/app:pull", error: str = "", realm: str = TOKEN) -> dict[str, Any]:
    """Return a 401 that demands a token for a scope."""
    return refusal(f'Bearer realm="{realm}",service="s",scope="{scope}"' + (f',error="{error}"' if error else ""))


WANTS_BASIC = refusal('Basic realm="reg"')


class HelperStub:
    """A credential helper that returns a new password each time."""

    def __init__(self) -> None:
        self.asked = 0

    async def __call__(self, helper: Helper) -> Password:
        self.asked += 1
        return self.password(self.asked)

    @staticmethod
    def password(number: int) -> Password:
        """Return the n-th password."""
        return Password("user", f"secret{number}")


class ClientWithAnswers(Asking):
    """A client whose registry gives these answers and whose token service issues t1, t2, …"""

    def __init__(self, *answers: dict[str, Any], login: Login | None = None, most: int = 100) -> None:
        tokens = [token(f"t{number}") for number in range(1, most)]
        self.helper = HelperStub()
        super().__init__(
            {TOKEN: tokens, CDN: [OK], REG: answers}, login=login, ask=self.helper, trusts="auth.example"
        )

    @property
    def shown(self) -> list[str | None]:
        """Return the Authorization header of each request to the registry."""
        return [authorization for url, authorization in self.asked if url.startswith(REG)]

    @property
    def scopes(self) -> list[list[str]]:
        """Return the scopes of each issued token."""
        queries = [urlsplit(url).query for url in self.http.urls if url.startswith(TOKEN)]
        return [parse_qs(query).get("scope", []) for query in queries]


def test_password_is_sent_after_a_basic_challenge() -> None:
    asking = ClientWithAnswers(WANTS_BASIC, OK, login=USER)
    assert asking.status() == 200
    assert asking.shown == [None, BASIC]
    # Later requests send it at once, for any path.
    assert asking.status(path="team/other", what="tags/list") == 200
    assert asking.shown == [None, BASIC, BASIC]


def test_refused_password_is_sent_once() -> None:
    asking = ClientWithAnswers(WANTS_BASIC, login=USER)
    assert asking.status() == 401
    assert asking.shown == [None, BASIC]


@pytest.mark.parametrize("login", [None, IdentityToken("t")])
def test_no_password_no_credentials_sent(login: Login | None) -> None:
    asking = ClientWithAnswers(WANTS_BASIC, login=login)
    assert asking.status() == 401
    assert len(asking.shown) <= 2
    assert set(asking.shown) == {None}


def test_bearer_is_preferred_to_basic() -> None:
    asking = ClientWithAnswers(refusal('Basic realm="reg"', f'Bearer realm="{TOKEN}"'), OK, login=USER)
    assert asking.status() == 200
    assert asking.shown == [None, "Bearer t1"]


def test_cached_helper_password_is_renewed_after_a_401() -> None:
    asking = ClientWithAnswers(WANTS_BASIC, OK, WANTS_BASIC, OK, login=HELPER)
    assert (asking.status(), asking.status()) == (200, 200)
    first, second = (basic(HelperStub.password(number)) for number in (1, 2))
    assert asking.shown == [None, first, first, second]


def test_fresh_helper_password_is_not_renewed() -> None:
    asking = ClientWithAnswers(WANTS_BASIC, OK, WANTS_BASIC, login=HELPER)
    assert (asking.status(), asking.status()) == (200, 401)
    first, second = (basic(HelperStub.password(number)) for number in (1, 2))
    assert asking.shown == [None, first, first, second]
    assert asking.helper.asked == 2


def test_helper_is_not_run_without_a_challenge() -> None:
    asking = ClientWithAnswers(OK, login=HELPER)
    assert asking.status() == 200
    assert asking.helper.asked == 0


def test_cached_token_is_renewed_after_a_401() -> None:
    asking = ClientWithAnswers(wants(), OK, wants(error="invalid_token"), OK)
    assert (asking.status(), asking.status()) == (200, 200)
    assert asking.shown == [None, "Bearer t1", "Bearer t1", "Bearer t2"]


@pytest.mark.parametrize("error", ["", "invalid_token", "insufficient_scope"])
def test_refused_fresh_token_is_final(error: str) -> None:
    asking = ClientWithAnswers(wants(), wants(error=error))
    assert asking.status() == 401
    assert asking.shown == [None, "Bearer t1"]


def test_insufficient_scope_gets_a_token_for_both_scopes() -> None:
    asking = ClientWithAnswers(wants("a"), wants("b", "insufficient_scope"), OK)
    assert asking.status() == 200
    assert asking.shown == [None, "Bearer t1", "Bearer t2"]
    assert asking.scopes == [["a"], ["a", "b"]]
    # The wider scope is remembered.
    assert asking.status() == 200
    assert asking.shown[3:] == ["Bearer t2"]


def test_scope_is_widened_only_for_insufficient_scope() -> None:
    asking = ClientWithAnswers(wants("a"), wants("b", "invalid_token"), OK)
    assert asking.status() == 401
    assert asking.scopes == [["a"]]


def test_endless_scope_demands_are_given_up() -> None:
    asking = ClientWithAnswers(*(wants(f"scope{number}", "insufficient_scope") for number in range(50)))
    assert asking.status() == 401
    assert asking.shown == [None, "Bearer t1", "Bearer t2", "Bearer t3"]


def test_registry_switches_from_bearer_to_basic() -> None:
    asking = ClientWithAnswers(wants(), OK, WANTS_BASIC, OK, login=USER)
    assert (asking.status(), asking.status()) == (200, 200)
    assert asking.shown == [None, "Bearer t1", "Bearer t1", BASIC]


def test_registry_alternating_between_schemes_is_given_up() -> None:
    asking = ClientWithAnswers(*([wants("a"), WANTS_BASIC] * 20), login=USER)
    assert asking.status() == 401
    assert len(asking.shown) <= 4


SCOPELESS = ("", ',scope=""', ',scope=" "')
"""Forms of a challenge without a scope."""
OURS = "repository:team/app:pull"


def wants_any(scope: str = "", error: str = "") -> dict[str, Any]:
    """Return a 401 that demands a token without a scope."""
    return refusal(f'Bearer realm="{TOKEN}",service="s"{scope}' + (f',error="{error}"' if error else ""))


@pytest.mark.parametrize("scope", SCOPELESS)
@pytest.mark.parametrize("login", [None, USER, HELPER])
def test_challenge_without_scope_gets_repository_scope(scope: str, login: Login | None) -> None:
    asking = ClientWithAnswers(wants_any(scope), OK, login=login)
    assert asking.status() == 200
    assert asking.shown == [None, "Bearer t1"]
    assert asking.scopes == [[OURS]]


@pytest.mark.parametrize("scope", SCOPELESS)
def test_identity_token_request_gets_repository_scope(scope: str) -> None:
    asking = ClientWithAnswers(wants_any(scope), OK, login=IdentityToken("s3cret"))
    assert asking.status() == 200
    (form,) = [sent.body for sent in asking.http.sent if sent.method == "POST"]
    assert parse_qs((form or b"").decode())["scope"] == [OURS]


def test_repositories_without_scope_share_no_token() -> None:
    asking = ClientWithAnswers(wants_any(), OK, OK, wants_any(), OK)
    assert (asking.status(), asking.status(what="manifests/1")) == (200, 200)
    assert asking.status(path="team/other") == 200
    assert asking.shown == [None, "Bearer t1", "Bearer t1", None, "Bearer t2"]
    assert asking.scopes == [[OURS], ["repository:team/other:pull"]]


def test_repository_token_may_be_widened() -> None:
    asking = ClientWithAnswers(wants_any(), wants("b", "insufficient_scope"), OK)
    assert asking.status() == 200
    assert asking.scopes == [[OURS], [OURS, "b"]]


@pytest.mark.parametrize("scope", SCOPELESS)
def test_insufficient_scope_without_scope_adds_repository_scope(scope: str) -> None:
    asking = ClientWithAnswers(wants("a"), wants_any(scope, "insufficient_scope"), OK)
    assert asking.status() == 200
    assert asking.scopes == [["a"], ["a", OURS]]


@pytest.mark.parametrize("scope", SCOPELESS)
def test_insufficient_repository_token_is_final(scope: str) -> None:
    asking = ClientWithAnswers(wants_any(), wants_any(scope, "insufficient_scope"))
    assert asking.status() == 401
    assert asking.scopes == [[OURS]]


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("v2/team/app/blobs/x", "team/app"),
        ("v2/project/mirrored/app/blobs/x", "project/mirrored/app"),
        ("below/v2/a/v2/manifests/blobs/x?n=1", "a/v2/manifests"),
        # With no repository in the URL, the requested one is the best guess.
        ("storage/x", "team/app"),
        ("v2/token", "team/app"),
        ("v2/a:push,b/blobs/x", "team/app"),
        ("v2/a%20b/blobs/x", "team/app"),
    ],
)
def test_scope_is_taken_from_the_redirect_target(path: str, name: str) -> None:
    asking = Asking({REG: [redirect(f"{CDN}{path}")], CDN: [wants_any(), OK], TOKEN: [token("t")]}, login=USER)
    assert asking.status() == 200
    (url, shown), *_ = [one for one in asking.asked if one[0].startswith(TOKEN)]
    assert parse_qs(urlsplit(url).query)["scope"] == [f"repository:{name}:pull"]
    assert shown is None


def test_scope_is_taken_from_redirect_within_the_host() -> None:
    asking = ClientWithAnswers(redirect("/v2/moved/app/blobs/x"), wants_any(), redirect("/v2/moved/app/blobs/x"), OK)
    assert asking.status() == 200
    assert asking.scopes == [["repository:moved/app:pull"]]


CHALLENGES = st.sampled_from(
    [
        "Basic",
        "Negotiate",
        f'Bearer realm="{TOKEN}"',
        f'Bearer realm="{TOKEN}",scope="",error="insufficient_scope"',
        f'Bearer realm="{TOKEN}",scope="a",error="insufficient_scope"',
        f'Bearer realm="{TOKEN}",scope="b",error="insufficient_scope"',
        f'Bearer realm="{TOKEN}",scope="c d",error="insufficient_scope"',
        f'Bearer realm="{TOKEN}",scope="a",error="invalid_token"',
    ]
)
ANSWERS = st.lists(st.lists(CHALLENGES, max_size=2), min_size=1, max_size=12)


@given(ANSWERS, st.sampled_from([None, USER, IdentityToken("t"), HELPER]), st.integers(1, 3))
def test_any_sequence_of_challenges_ends(answers: Sequence[Sequence[str]], login: Login | None, times: int) -> None:
    asking = ClientWithAnswers(*(refusal(*challenges) for challenges in answers), login=login)
    for _ in range(times):
        assert asking.status() == 401
    assert len(asking.shown) <= 4 * times
    assert len(asking.scopes) <= 3 * times


def test_token_challenge_after_refused_password_is_final() -> None:
    asking = ClientWithAnswers(WANTS_BASIC, wants(), login=USER)
    assert asking.status() == 401


def test_refusal_by_another_host_keeps_helper_password() -> None:
    script = {REG: [WANTS_BASIC, redirect(f"{CDN}x"), OK], CDN: [WANTS_BASIC]}
    helper = HelperStub()
    asking = Asking(script, login=HELPER, ask=helper)
    assert (asking.status(), asking.status()) == (401, 200)
    assert helper.asked == 1


def test_redirect_target_with_endless_demands_is_given_up() -> None:
    asking = Asking(
        {REG: [redirect(f"{CDN}x")], CDN: [wants(f"s{n}", "insufficient_scope") for n in range(50)]}
        | {TOKEN: [token(f"t{n}") for n in range(50)]}
    )
    assert asking.status() == 401
    assert len([url for url in asking.http.urls if url.startswith(CDN)]) == 4


def test_requests_to_all_redirect_targets_are_limited() -> None:
    """Each target demands a token and is asked once."""
    hosts = [f"https://cdn{number}.example/" for number in range(50)]
    asking = Asking({REG: [*map(redirect, hosts), OK], TOKEN: [token("t")]} | {host: [wants()] for host in hosts})
    assert asking.status() == 401
    assert len([url for url in asking.http.urls if url.startswith(REG)]) == 9


def test_registry_switches_from_basic_to_bearer() -> None:
    asking = ClientWithAnswers(WANTS_BASIC, OK, *[wants()] * 2, OK, login=USER)
    asking.status()
    # This request may fail, but not all later ones.
    asking.status()
    assert asking.status() == 200


@pytest.mark.parametrize("gone", [{"status": 404}, {"status": 500}, Unavailable("host name cannot be resolved")])
def test_moved_token_service_is_found(gone: ScriptedAnswer) -> None:
    new = "https://new.example/token"
    asking = Asking({TOKEN: [token("t"), gone], new: [token("new")], REG: [wants(), OK, wants(realm=new), OK]})
    assert asking.status() == 200
    asking.clock.advance(3600)
    # This request may fail, but not all later ones.
    failed(asking.ask(), Unavailable)
    assert asking.status() == 200


def test_helper_is_not_run_for_each_repository() -> None:
    """An initial challenge of a repository does not refuse the helper's password."""
    asking = ClientWithAnswers(wants("a"), OK, wants("b"), OK, wants("c"), OK, login=HELPER)
    for number in range(3):
        assert asking.status(path=f"team/r{number}") == 200
    assert asking.helper.asked == 1


def test_remembered_challenges_are_limited() -> None:
    asking = ClientWithAnswers(*([wants(), OK] * 1200), most=1300)
    for number in range(1200):
        fired(asking.ask(path=f"team/r{number}"))
    assert len(asking.client._authenticator._challenges) <= 1000


def test_least_recently_used_challenge_is_dropped_beyond_1000() -> None:
    asking = ClientWithAnswers(*([wants(), OK] * 1000), OK, wants(), OK, OK, OK, wants(), OK)
    for number in (*range(1000), 0, 1000, 0, 2, 1):
        assert asking.status(path=f"team/r{number}") == 200
    # Repositories 1000 and 1 have no remembered challenge, so their first requests carry no token.
    token = "Bearer t1"
    assert asking.shown[2000:] == [token, None, token, token, token, None, token]


def test_authorization_is_not_printed() -> None:
    assert "s3cret" not in repr(Authorization("Bearer s3cret", cached=False))
