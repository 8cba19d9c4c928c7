"""Patterns: Python regular expressions, except those that Go would read differently."""

from __future__ import annotations

import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ociregistry.config.values import Patterns

UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
"""A busy machine must not fail the test by a deadline."""

NGINX = "docker.io/library/nginx:1.25"


def written(text: str) -> list[str]:
    """Return the expressions parsed from a text."""
    return [one.pattern for one in Patterns.parse(text).expressions]


def refusal(text: str) -> str:
    """Return the error for a text."""
    with pytest.raises(ValueError, match=r"^(the|an empty) pattern ") as refused:
        Patterns.parse(text)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("nginx", True),
        ("^docker.io/", True),
        ("^nginx", False),
        (r":1\.25$", True),
        (r"1\.26|1\.25", True),
        ("NGINX", False),
        ("(?i)NGINX", True),
        ("(?i:NGINX)", True),
        ("(?P<name>nginx)", True),
        ("apache,nginx", True),
        ("apache,caddy", False),
        (r"\bnginx\b", True),
        (r"\d{1,2}\.\d{2,}$", True),
        ("/nginx(?!:1)", False),
        (".", True),
    ],
)
def test_match_anywhere_in_image_url(text: str, found: bool) -> None:
    assert Patterns.parse(text).match(NGINX) is found


@pytest.mark.parametrize(
    ("text", "expressions"),
    [
        ("a", ["a"]),
        ("a,b", ["a", "b"]),
        (" a , b ", ["a", "b"]),
        ("x{1,2}", ["x{1,2}"]),
        ("x{1,}", ["x{1,}"]),
        ("x{1,2},y{3,4},z", ["x{1,2}", "y{3,4}", "z"]),
        ("x{12},y", ["x{12}", "y"]),
        (r"a\.b,c", [r"a\.b", "c"]),
        ("a{1,2}{3,4}|b,c", None),
        ("[0-9]{1,3},[a-z]", ["[0-9]{1,3}", "[a-z]"]),
    ],
)
def test_commas_separate_expressions_but_not_inside_repetitions(text: str, expressions: list[str] | None) -> None:
    if expressions is None:
        assert "multiple repeat" in refusal(text)
    else:
        assert written(text) == expressions


def test_comma_in_a_list_of_expressions_is_literal() -> None:
    patterns = Patterns.of(["a,b", "[,;]", r"\d"])
    assert [one.pattern for one in patterns.expressions] == ["a,b", "[,;]", r"\d"]
    assert patterns.match("x,y")
    assert not patterns.match("ab")
    assert Patterns.of([]).match("x") is False


@pytest.mark.parametrize("text", ["", " ", ",", "a,", ",a", "a,,b", "a, ,b", "x{1,2},"])
def test_empty_pattern_is_refused(text: str) -> None:
    assert refusal(text) == "an empty pattern matches every image URL"


OUTSIDE = [
    (r"\z", r"\Z is the end of the text here"),
    (r"\Q", "put a backslash before each special character"),
    (r"\E", "put a backslash before each special character"),
    (r"\p", "name the characters in [ ]"),
    (r"\P", "name the characters in [^ ]"),
    (r"\C", "a dot is one character"),
    ("(?U", "write *? or +? for a repetition that takes as little as it can"),
]
TEXTS = {
    r"\z": [r"nginx:1\z", r"\z", r"\\\z", r"[a]\z"],
    r"\Q": [r"\Qa.b\E", r"^\Qdocker.io\E/", r"\Q"],
    r"\E": [r"a\E"],
    r"\p": [r"\pN", r"\p{Greek}", r"x\p{^Lu}", r"\pL+"],
    r"\P": [r"\PN", r"\P{Greek}"],
    r"\C": [r"\C", r"a\C*b"],
    "(?U": ["(?U)a.*b", "(?U:a.*)b", "(?Us)a.*", "x(?U)"],
}


@pytest.mark.parametrize(("piece", "hint", "text"), [(p, hint, text) for p, hint in OUTSIDE for text in TEXTS[p]])
def test_go_syntax_is_refused_with_hint(piece: str, hint: str, text: str) -> None:
    assert refusal(text) == (f"the pattern {text!r} has {piece!r}, which is Go syntax, not Python's: {hint}")
    # With several, the first one is reported.
    assert f"the pattern {text!r} " in refusal(f"nginx,{text}")


@pytest.mark.parametrize(
    ("text", "piece"),
    [
        ("[[:alpha:]]", "[:alpha:]"),
        ("[[:^alpha:]]", "[:^alpha:]"),
        ("nginx:[[:digit:]]+", "[:digit:]"),
        ("[a-z[:digit:]]", "[:digit:]"),
        ("[[:alpha:]_-]", "[:alpha:]"),
        ("[^[:space:]]", "[:space:]"),
        ("[][:alpha:]]", "[:alpha:]"),
        (r"[\][:alpha:]]", "[:alpha:]"),
        ("[:alpha:]", "[:alpha:]"),
        (r"[\pN]", r"\p"),
        (r"[a\PN-z]", r"\P"),
        (r"[^\p{Greek}]", r"\p"),
        (r"[\Qa-z\E]", r"\Q"),
        (r"[\z]", r"\z"),
        (r"[\C]", r"\C"),
        (r"[]\pN]", r"\p"),
        (r"[\]\pN]", r"\p"),
    ],
)
def test_posix_class_is_refused_with_hint(text: str, piece: str) -> None:
    hint = "name the characters, such as [a-z0-9]"
    assert refusal(text) == (f"the pattern {text!r} has {piece!r}, which is Go syntax, not Python's: {hint}")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (r"a\\z", r"a\z"),
        (r"a\\Qb", r"a\Qb"),
        (r"\\pN", r"\pN"),
        (r"\\\\z", r"\\z"),
        (r"a\Z", "a"),
        (r"\(?U", "U"),
        (r"\[[:]alpha", "[:alpha"),
        ("[:alph]", "p"),
        ("[]a]", "]"),
        ("[^]a]", "b"),
        ("[(?U)]", "?"),
        (r"[\w.-]+/nginx", NGINX),
        (r"[\\]z", r"\z"),
        (r"[\]]\\z", r"]\z"),
        ("a{,b", "a{,b"),
    ],
)
def test_similar_but_valid_syntax_is_accepted(text: str, found: str) -> None:
    assert Patterns.of([text]).match(found)


@pytest.mark.parametrize("text", [r"[\\z]", r"[\\p]", r"[a\\Q]"])
def test_escaped_backslash_in_class(text: str) -> None:
    assert Patterns.of([text]).match("\\")


def test_repetition_without_minimum_is_refused() -> None:
    assert "Go" in refusal("nginx{,3}")


@pytest.mark.parametrize(
    "text",
    [
        "[",
        "(",
        ")",
        "*",
        "a**",
        "(?P<x",
        "(?<a>x)",
        "a(?i)b",
        r"\x{41}",
        r"\8",
        "[z-a]",
        "\\",
        "(?z)",
        "x{2,1}",
        "(?-U)x",
    ],
)
def test_invalid_regular_expression_is_refused(text: str) -> None:
    assert refusal(f"nginx,{text}").startswith(f"the pattern {text!r} is not a regular expression: ")


@pytest.mark.parametrize("text", ["[[a]", "[a--b]", "[a||b]", "[a&&b]", "[a~~b]"])
def test_syntax_deprecated_in_python_is_refused(text: str) -> None:
    assert "is not a regular expression: Possible " in refusal(text)


@pytest.mark.parametrize("text", ["(" * 50_000, f"{'(?:' * 3000}a{')' * 3000}", "x{99999999999999999999}"])
def test_oversized_pattern_is_refused(text: str) -> None:
    assert "is not a regular expression: " in refusal(text)


def test_character_classes_are_ascii_as_in_go() -> None:
    for text in (r"^\w$", r"^\d$", r"^\W$"):
        assert Patterns.of([text]).match("٣") is (text == r"^\W$")


ALPHABET = st.sampled_from(
    [
        *"abz09.,:/{}()[]^$|*+?-_!=<>P\\&~ ",
        *(r"\z", r"\Q", r"\pN", "[[:alpha:]]", "(?U", "(?i", r"\\", "{1,2}", "\n", "ü"),
    ]
)


@UNHURRIED
@given(st.lists(ALPHABET, max_size=12).map("".join) | st.text(max_size=20))
def test_any_text_is_searchable_or_refused(text: str) -> None:
    try:
        patterns = Patterns.parse(text)
    except ValueError as refused:
        message = str(refused)
    else:
        message = "an empty pattern"
        assert patterns.expressions
        assert patterns.match("") in (True, False)
        assert not any(re.search(r"(?<!\\)(\\\\)*\\[zQEpPC]", one.pattern) for one in patterns.expressions)
    assert message.startswith(("the pattern ", "an empty pattern"))


@UNHURRIED
@given(st.lists(st.text("abc./:-_@0", min_size=1), min_size=1, max_size=4), st.text("abc./:-_@0"))
def test_escaped_words_are_found_literally(words: list[str], url: str) -> None:
    patterns = Patterns.parse(",".join(map(re.escape, words)))
    assert patterns.match(url) is any(word in url for word in words)
