"""Origins, and where redirects may lead."""

from __future__ import annotations

from contextlib import suppress
from urllib.parse import urljoin

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ociregistry.upstream.origin import Origin, redirected, without_query


@pytest.mark.parametrize(
    ("url", "origin"),
    [
        ("https://reg.example/v2/", Origin("https", "reg.example", 443)),
        ("http://reg.example", Origin("http", "reg.example", 80)),
        ("https://reg.example:/", Origin("https", "reg.example", 443)),
        ("https://reg.example:443/", Origin("https", "reg.example", 443)),
        ("https://reg.example:80/", Origin("https", "reg.example", 80)),
        ("HTTPS://REG.Example:5000/", Origin("https", "reg.example", 5000)),
        ("https://[FD00::1]:5000/", Origin("https", "fd00::1", 5000)),
        ("https://[::1]?q=a/b@c", Origin("https", "::1", 443)),
        ("https://reg.example/@evil.example", Origin("https", "reg.example", 443)),
        ("https://reg.example?@evil.example", Origin("https", "reg.example", 443)),
        ("https://reg.example#@evil.example", Origin("https", "reg.example", 443)),
    ],
)
def test_origin_of_a_url(url: str, origin: Origin) -> None:
    assert Origin.of(url) == origin


@pytest.mark.parametrize(
    "url",
    [
        *("", "reg.example", "//reg.example/", "/v2/", "https:", "https://", "https:///v2/", "https:reg.example"),
        *("ftp://reg.example/", "file:///etc/passwd", "javascript://reg.example/", "ws://reg.example"),
        *("https://user@reg.example/", "https://user:password@reg.example/", "https://@reg.example/"),
        *("https://reg.example@evil.example/", "https://evil.example\\@reg.example/"),
        *(
            "https://reg.example:0/",
            "https://reg.example:65536/",
            "https://reg.example:-1/",
            "https://reg.example:x/",
        ),
        *(
            "https://[::1",
            "https://::1]/",
            "https://[reg.example].evil.example/",
            "https://evil.example[reg.example]/",
        ),
    ],
)
def test_url_of_no_web_server_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"is not an http or https URL$|URL|[Pp]ort|address"):
        Origin.of(url)


def test_query_is_not_in_the_error() -> None:
    assert without_query("https://cdn.example/x?X-Signature=secret?y") == "https://cdn.example/x"
    assert len(without_query("https://cdn.example/" + "x" * 10_000)) == 200
    with pytest.raises(ValueError, match=r"^'ftp://cdn.example/x' is not an http or https URL$"):
        Origin.of("ftp://cdn.example/x?X-Signature=secret")


@pytest.mark.parametrize(
    ("url", "location", "target"),
    [
        ("https://a/b/c?d", "/e?f=%2F", "https://a/e?f=%2F"),
        ("https://a/b/c?d", "e", "https://a/b/e"),
        ("https://a/b/c?d", "?e", "https://a/b/c?e"),
        ("https://a/b/c", "//cdn/e", "https://cdn/e"),
        ("https://a/b", "https://cdn:8443/e", "https://cdn:8443/e"),
        ("http://a/b", "https://a/b", "https://a/b"),
        ("http://a/b", "http://cdn/b", "http://cdn/b"),
    ],
)
def test_redirect_target(url: str, location: str, target: str) -> None:
    assert redirected(url, location) == target


@pytest.mark.parametrize("location", ["http://a/b", "HTTP://a/b", "http:b", "http://a:443/"])
def test_redirect_from_https_to_http_is_refused(location: str) -> None:
    with pytest.raises(ValueError, match=r"redirects from https to http$|is not an http or https URL$"):
        redirected("https://a/b", location)


def test_malformed_redirect_error_has_no_query() -> None:
    with pytest.raises(ValueError, match=r"^it redirects to 'ftp://cdn/x', which is not an http or https URL$"):
        redirected("https://a/b", "ftp://cdn/x?secret")


@given(st.text() | st.text("htps:/@[]#?\\.%0 a").map("https:".__add__))
def test_any_location_is_a_url_or_refused(location: str) -> None:
    with suppress(ValueError):
        target = redirected("https://reg.example/v2/", location)
        assert Origin.of(target).scheme == "https"
        assert target == urljoin("https://reg.example/v2/", location)
