"""Parsing of WWW-Authenticate challenges."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ociregistry.upstream.auth import (
    BasicChallenge,
    BearerChallenge,
    Challenge,
    best_challenge,
    lacks_scope,
)


def bearer_in(header: str) -> BearerChallenge | None:
    """Return the Bearer challenge that a header is answered for, or None."""
    found = best_challenge([header])
    return found if isinstance(found, BearerChallenge) else None


@pytest.mark.parametrize(
    ("header", "challenge"),
    [
        (
            'Bearer realm="https://auth.docker.io/token",service="registry.docker.io",scope="repository:a/b:pull"',
            BearerChallenge("https://auth.docker.io/token", "registry.docker.io", "repository:a/b:pull"),
        ),
        ('bearer realm="https://a/t"', BearerChallenge("https://a/t")),
        ('BEARER  realm = "https://a/t" , service = s', BearerChallenge("https://a/t", "s")),
        ("Bearer realm=https://a/t,service=s", BearerChallenge("https://a/t", "s")),
        ('Bearer REALM="https://a/t",Scope="a b"', BearerChallenge("https://a/t", "", "a b")),
        ('Bearer realm="https://a/t?x=\\"1,2\\"",service=""', BearerChallenge('https://a/t?x="1,2"', "")),
        (
            'Bearer error="insufficient_scope",scope="repository:a/b:pull,push",realm="https://a/t"',
            BearerChallenge("https://a/t", "", "repository:a/b:pull,push"),
        ),
        ('  Bearer realm="https://a/t"  ', BearerChallenge("https://a/t")),
    ],
)
def test_bearer_challenge(header: str, challenge: BearerChallenge) -> None:
    assert bearer_in(header) == challenge


@pytest.mark.parametrize(
    "header",
    [
        "",
        "Bearer",
        "Bearer ",
        "Bearer realm",
        'Bearer realm=""',
        'Bearer service="s",scope="x"',
        'Basic realm="https://a/t"',
        'Bearers realm="https://a/t"',
        "Negotiate",
    ],
)
def test_other_or_malformed_challenge(header: str) -> None:
    assert bearer_in(header) is None


VALUES = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=20)


def quoted(value: str) -> str:
    """Return a value as a quoted string."""
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


@given(VALUES.filter(bool), VALUES, VALUES, st.permutations(["realm", "service", "scope"]))
def test_quoted_values_round_trip(realm: str, service: str, scope: str, order: list[str]) -> None:
    values = {"realm": realm, "service": service, "scope": scope}
    header = "Bearer " + ",".join(f"{name}={quoted(values[name])}" for name in order)
    assert bearer_in(header) == BearerChallenge(realm, service, scope)


@given(st.text() | st.text('Bearr realm=",\\ ', max_size=40).map("Bearer ".__add__))
def test_any_header_is_a_challenge_or_none(header: str) -> None:
    challenge = bearer_in(header)
    assert challenge is None or challenge.realm


BEARER = 'Bearer realm="https://a/t",service="s"'


@pytest.mark.parametrize(
    ("headers", "best"),
    [
        ([BEARER], BearerChallenge("https://a/t", "s")),
        (['Basic realm="reg"'], BasicChallenge()),
        (["basic"], BasicChallenge()),
        (["BASIC realm=reg, charset=UTF-8"], BasicChallenge()),
        (['Basic realm="reg"', BEARER], BearerChallenge("https://a/t", "s")),
        ([BEARER, 'Basic realm="reg"'], BearerChallenge("https://a/t", "s")),
        ([BEARER, 'Bearer realm="https://b/t"'], BearerChallenge("https://a/t", "s")),
        (['Bearer service="s"', 'Bearer realm="https://b/t"'], BearerChallenge("https://b/t")),
        (["Negotiate", 'Digest realm="x",nonce="y"', "Basic realm=reg"], BasicChallenge()),
        (['Bearer service="s"', "Basic realm=reg"], BasicChallenge()),
        ([], None),
        ([""], None),
        (["Negotiate", "Basicly realm=reg", 'Bearer service="s"'], None),
        # Several challenges in one header: RFC 9110, section 11.6.1.
        pytest.param(['Basic realm="reg", ' + BEARER], BearerChallenge("https://a/t", "s")),
        pytest.param([BEARER + ', Basic realm="reg"'], BearerChallenge("https://a/t", "s")),
        pytest.param(["Negotiate, Basic realm=reg"], BasicChallenge()),
        # Text inside quotes is no challenge.
        (['Digest realm="Basic, Bearer realm=x"'], None),
    ],
)
def test_bearer_is_preferred_to_basic(headers: list[str], best: Challenge | None) -> None:
    assert best_challenge(headers) == best
    assert best_challenge(iter(headers)) == best


@pytest.mark.parametrize(
    ("headers", "lacks"),
    [
        ([f'{BEARER},error="insufficient_scope"'], True),
        ([f"{BEARER}, error=insufficient_scope"], True),
        (["Basic realm=reg", 'Bearer error="insufficient_scope"'], True),
        ([f'{BEARER},error="invalid_token"'], False),
        ([BEARER], False),
        (['Basic realm=reg,error="insufficient_scope"'], False),
        ([], False),
    ],
)
def test_insufficient_scope(headers: list[str], lacks: bool) -> None:
    assert lacks_scope(headers) is lacks


@pytest.mark.parametrize(
    ("known", "wanted", "both"),
    [
        ("a", "b", "a b"),
        ("a b", "b c", "a b c"),
        ("a", "a", "a"),
        ("", "a", "a"),
        ("a", "", "a"),
        ("", "", ""),
    ],
)
def test_widened_scope(known: str, wanted: str, both: str) -> None:
    wide = BearerChallenge("https://old/t", "old", known).widened(BearerChallenge("https://new/t", "new", wanted))
    assert wide == BearerChallenge("https://new/t", "new", both)


@pytest.mark.parametrize(("requested", "scope"), [("", "a"), (" ", "a"), ("b", "b"), ("b c", "b c")])
def test_default_scope(requested: str, scope: str) -> None:
    challenge = BearerChallenge("https://a/t", "s", requested)
    assert challenge.with_default_scope("a") == BearerChallenge("https://a/t", "s", scope)
