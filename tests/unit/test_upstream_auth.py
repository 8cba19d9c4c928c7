"""How often a registry that says 401 is asked again, and with what: until it can be convinced, and not for ever."""

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
from tests.unit.support.bodies import Told
from tests.unit.support.doubles import failed, fired
from tests.unit.test_upstream_client import CDN, OK, REG, TOKEN, Asking, redirect, token

USER = Password("user", "s3cret")
BASIC = basic(USER)
HELPER = Helper("fake")


def refusal(*challenges: str) -> dict[str, Any]:
    """A 401 with these challenges."""
    return {"status": 401, "headers": {"WWW-Authenticate": list(challenges)}}


def wants(scope: str = "repository:team/app:pull", error: str = "", realm: str = TOKEN) -> dict[str, Any]:
    """A 401 that wants a token for a scope."""
    return refusal(f'Bearer realm="{realm}",service="s",scope="{scope}"' + (f',error="{error}"' if error else ""))


WANTS_BASIC = refusal('Basic realm="reg"')


class Helpful:
    """A helper with a new password every time it is asked."""

    def __init__(self) -> None:
        self.asked = 0

    async def __call__(self, helper: Helper) -> Password:
        self.asked += 1
        return self.password(self.asked)

    @staticmethod
    def password(number: int) -> Password:
        """What it says the n-th time."""
        return Password("user", f"secret{number}")


class Convinced(Asking):
    """A client whose registry gives these answers, and its token service t1, t2, …"""

    def __init__(self, *answers: dict[str, Any], login: Login | None = None, most: int = 100) -> None:
        tokens = [token(f"t{number}") for number in range(1, most)]
        self.helper = Helpful()
        super().__init__(
            {TOKEN: tokens, CDN: [OK], REG: answers}, login=login, ask=self.helper, trusts="auth.example"
        )

    @property
    def shown(self) -> list[str | None]:
        """What the registry was shown, one for each request."""
        return [how for url, how in self.asked if url.startswith(REG)]

    @property
    def scopes(self) -> list[list[str]]:
        """The scopes of each token."""
        queries = [urlsplit(url).query for url in self.http.urls if url.startswith(TOKEN)]
        return [parse_qs(query).get("scope", []) for query in queries]


def test_a_password_is_shown_when_it_is_wanted() -> None:
    asking = Convinced(WANTS_BASIC, OK, login=USER)
    assert asking.status() == 200
    assert asking.shown == [None, BASIC]
    # From then on at once, whatever is asked for.
    assert asking.status(path="team/other", what="tags/list") == 200
    assert asking.shown == [None, BASIC, BASIC]


def test_a_password_that_is_refused_is_not_shown_twice() -> None:
    asking = Convinced(WANTS_BASIC, login=USER)
    assert asking.status() == 401
    assert asking.shown == [None, BASIC]


@pytest.mark.parametrize("login", [None, IdentityToken("t")])
def test_who_has_no_password_shows_none(login: Login | None) -> None:
    asking = Convinced(WANTS_BASIC, login=login)
    assert asking.status() == 401
    assert len(asking.shown) <= 2
    assert set(asking.shown) == {None}


def test_a_token_is_fetched_where_a_password_would_do() -> None:
    asking = Convinced(refusal('Basic realm="reg"', f'Bearer realm="{TOKEN}"'), OK, login=USER)
    assert asking.status() == 200
    assert asking.shown == [None, "Bearer t1"]


def test_a_password_that_a_helper_gave_earlier_may_be_out_of_date() -> None:
    asking = Convinced(WANTS_BASIC, OK, WANTS_BASIC, OK, login=HELPER)
    assert (asking.status(), asking.status()) == (200, 200)
    first, second = (basic(Helpful.password(number)) for number in (1, 2))
    assert asking.shown == [None, first, first, second]


def test_but_not_one_that_it_gave_for_this_request() -> None:
    asking = Convinced(WANTS_BASIC, OK, WANTS_BASIC, login=HELPER)
    assert (asking.status(), asking.status()) == (200, 401)
    first, second = (basic(Helpful.password(number)) for number in (1, 2))
    assert asking.shown == [None, first, first, second]
    assert asking.helper.asked == 2


def test_a_helper_is_not_asked_for_what_nobody_wants() -> None:
    asking = Convinced(OK, login=HELPER)
    assert asking.status() == 200
    assert asking.helper.asked == 0


def test_a_token_from_an_earlier_request_may_be_out_of_date() -> None:
    asking = Convinced(wants(), OK, wants(error="invalid_token"), OK)
    assert (asking.status(), asking.status()) == (200, 200)
    assert asking.shown == [None, "Bearer t1", "Bearer t1", "Bearer t2"]


@pytest.mark.parametrize("error", ["", "invalid_token", "insufficient_scope"])
def test_a_new_token_that_is_refused_is_the_end(error: str) -> None:
    asking = Convinced(wants(), wants(error=error))
    assert asking.status() == 401
    assert asking.shown == [None, "Bearer t1"]


def test_but_one_for_too_little_is_followed_by_one_for_more() -> None:
    asking = Convinced(wants("a"), wants("b", "insufficient_scope"), OK)
    assert asking.status() == 200
    assert asking.shown == [None, "Bearer t1", "Bearer t2"]
    assert asking.scopes == [["a"], ["a", "b"]]
    # Which is known for the next time.
    assert asking.status() == 200
    assert asking.shown[3:] == ["Bearer t2"]


def test_more_is_wanted_only_where_it_says_so() -> None:
    asking = Convinced(wants("a"), wants("b", "invalid_token"), OK)
    assert asking.status() == 401
    assert asking.scopes == [["a"]]


def test_a_registry_that_always_wants_more_is_given_up() -> None:
    asking = Convinced(*(wants(f"scope{number}", "insufficient_scope") for number in range(50)))
    assert asking.status() == 401
    assert asking.shown == [None, "Bearer t1", "Bearer t2", "Bearer t3"]


def test_a_registry_that_takes_passwords_from_now_on() -> None:
    asking = Convinced(wants(), OK, WANTS_BASIC, OK, login=USER)
    assert (asking.status(), asking.status()) == (200, 200)
    assert asking.shown == [None, "Bearer t1", "Bearer t1", BASIC]


def test_one_that_changes_its_mind_all_the_time_is_given_up() -> None:
    asking = Convinced(*([wants("a"), WANTS_BASIC] * 20), login=USER)
    assert asking.status() == 401
    assert len(asking.shown) <= 4


SCOPELESS = ("", ',scope=""', ',scope=" "')
"""How challenges do not tell for what they want a token."""
OURS = "repository:team/app:pull"


def wants_any(scope: str = "", error: str = "") -> dict[str, Any]:
    """A 401 that wants a token, and does not tell for what."""
    return refusal(f'Bearer realm="{TOKEN}",service="s"{scope}' + (f',error="{error}"' if error else ""))


@pytest.mark.parametrize("scope", SCOPELESS)
@pytest.mark.parametrize("login", [None, USER, HELPER])
def test_a_challenge_without_a_scope_is_answered_with_a_token_for_the_repository(
    scope: str, login: Login | None
) -> None:
    asking = Convinced(wants_any(scope), OK, login=login)
    assert asking.status() == 200
    assert asking.shown == [None, "Bearer t1"]
    assert asking.scopes == [[OURS]]


@pytest.mark.parametrize("scope", SCOPELESS)
def test_so_it_is_where_an_identity_token_is_posted(scope: str) -> None:
    asking = Convinced(wants_any(scope), OK, login=IdentityToken("s3cret"))
    assert asking.status() == 200
    (form,) = [sent.body for sent in asking.http.sent if sent.method == "POST"]
    assert parse_qs((form or b"").decode())["scope"] == [OURS]


def test_two_repositories_behind_a_challenge_without_a_scope_share_no_token() -> None:
    asking = Convinced(wants_any(), OK, OK, wants_any(), OK)
    assert (asking.status(), asking.status(what="manifests/1")) == (200, 200)
    assert asking.status(path="team/other") == 200
    assert asking.shown == [None, "Bearer t1", "Bearer t1", None, "Bearer t2"]
    assert asking.scopes == [[OURS], ["repository:team/other:pull"]]


def test_a_token_for_the_repository_may_be_for_too_little() -> None:
    asking = Convinced(wants_any(), wants("b", "insufficient_scope"), OK)
    assert asking.status() == 200
    assert asking.scopes == [[OURS], [OURS, "b"]]


@pytest.mark.parametrize("scope", SCOPELESS)
def test_too_little_without_a_scope_means_the_repository(scope: str) -> None:
    asking = Convinced(wants("a"), wants_any(scope, "insufficient_scope"), OK)
    assert asking.status() == 200
    assert asking.scopes == [["a"], ["a", OURS]]


@pytest.mark.parametrize("scope", SCOPELESS)
def test_a_token_for_the_repository_that_does_not_suffice_is_the_end(scope: str) -> None:
    asking = Convinced(wants_any(), wants_any(scope, "insufficient_scope"))
    assert asking.status() == 401
    assert asking.scopes == [[OURS]]


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("v2/team/app/blobs/x", "team/app"),
        ("v2/project/mirrored/app/blobs/x", "project/mirrored/app"),
        ("below/v2/a/v2/manifests/blobs/x?n=1", "a/v2/manifests"),
        # No repository: ours is the best guess.
        ("storage/x", "team/app"),
        ("v2/token", "team/app"),
        ("v2/a:push,b/blobs/x", "team/app"),
        ("v2/a%20b/blobs/x", "team/app"),
    ],
)
def test_where_a_redirect_leads_a_repository_may_have_another_name(path: str, name: str) -> None:
    asking = Asking({REG: [redirect(f"{CDN}{path}")], CDN: [wants_any(), OK], TOKEN: [token("t")]}, login=USER)
    assert asking.status() == 200
    (url, shown), *_ = [one for one in asking.asked if one[0].startswith(TOKEN)]
    assert parse_qs(urlsplit(url).query)["scope"] == [f"repository:{name}:pull"]
    assert shown is None


def test_a_redirect_to_a_repository_of_the_same_host_keeps_its_name() -> None:
    asking = Convinced(redirect("/v2/moved/app/blobs/x"), wants_any(), redirect("/v2/moved/app/blobs/x"), OK)
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
def test_whatever_a_registry_wants_there_is_an_end(
    answers: Sequence[Sequence[str]], login: Login | None, times: int
) -> None:
    asking = Convinced(*(refusal(*challenges) for challenges in answers), login=login)
    for _ in range(times):
        assert asking.status() == 401
    assert len(asking.shown) <= 4 * times
    assert len(asking.scopes) <= 3 * times


def test_a_password_that_is_refused_for_a_token_is_an_answer() -> None:
    asking = Convinced(WANTS_BASIC, wants(), login=USER)
    assert asking.status() == 401


def test_what_another_host_refuses_is_no_word_about_our_password() -> None:
    script = {REG: [WANTS_BASIC, redirect(f"{CDN}x"), OK], CDN: [WANTS_BASIC]}
    helper = Helpful()
    asking = Asking(script, login=HELPER, ask=helper)
    assert (asking.status(), asking.status()) == (401, 200)
    assert helper.asked == 1


def test_a_host_that_is_redirected_to_is_given_up_as_well() -> None:
    asking = Asking(
        {REG: [redirect(f"{CDN}x")], CDN: [wants(f"s{n}", "insufficient_scope") for n in range(50)]}
        | {TOKEN: [token(f"t{n}") for n in range(50)]}
    )
    assert asking.status() == 401
    assert len([url for url in asking.http.urls if url.startswith(CDN)]) == 4


def test_so_are_all_hosts_together_that_it_redirects_to() -> None:
    """Each of them wants a token, and none is asked twice."""
    hosts = [f"https://cdn{number}.example/" for number in range(50)]
    asking = Asking({REG: [*map(redirect, hosts), OK], TOKEN: [token("t")]} | {host: [wants()] for host in hosts})
    assert asking.status() == 401
    assert len([url for url in asking.http.urls if url.startswith(REG)]) == 9


def test_a_registry_that_wants_tokens_from_now_on() -> None:
    asking = Convinced(WANTS_BASIC, OK, *[wants()] * 2, OK, login=USER)
    asking.status()
    # This one may be lost, but not all that follow.
    asking.status()
    assert asking.status() == 200


@pytest.mark.parametrize("gone", [{"status": 404}, {"status": 500}, Unavailable("host name cannot be resolved")])
def test_a_registry_whose_token_service_has_moved(gone: Told) -> None:
    new = "https://new.example/token"
    asking = Asking({TOKEN: [token("t"), gone], new: [token("new")], REG: [wants(), OK, wants(realm=new), OK]})
    assert asking.status() == 200
    asking.clock.advance(3600)
    # This one may be lost, but not all that follow.
    failed(asking.ask(), Unavailable)
    assert asking.status() == 200


def test_a_helper_is_not_asked_again_for_every_repository() -> None:
    """What a repository wants to begin with is no refusal of what the helper said."""
    asking = Convinced(wants("a"), OK, wants("b"), OK, wants("c"), OK, login=HELPER)
    for number in range(3):
        assert asking.status(path=f"team/r{number}") == 200
    assert asking.helper.asked == 1


def test_what_a_thousand_repositories_wanted_is_enough_to_know() -> None:
    asking = Convinced(*([wants(), OK] * 1200), most=1300)
    for number in range(1200):
        fired(asking.ask(path=f"team/r{number}"))
    assert len(asking.client._authenticator._challenges) <= 1000


def test_of_a_thousand_repositories_the_challenge_used_least_recently_is_forgotten() -> None:
    asking = Convinced(*([wants(), OK] * 1000), OK, wants(), OK, OK, OK, wants(), OK)
    for number in (*range(1000), 0, 1000, 0, 2, 1):
        assert asking.status(path=f"team/r{number}") == 200
    # Of 1000 and 1 the challenge is not known, so their first requests carry no token.
    token = "Bearer t1"
    assert asking.shown[2000:] == [token, None, token, token, token, None, token]


def test_a_authorization_is_not_printed() -> None:
    assert "s3cret" not in repr(Authorization("Bearer s3cret", cached=False))
