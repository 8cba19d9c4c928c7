"""Proxies in the configuration and the environment: what is one, who goes through it, and what errors tell."""

from __future__ import annotations

from pathlib import Path

import pytest

from ociregistry.config.nodes import ConfigInvalid
from ociregistry.config.proxy import NO_PROXIES, NoProxy, Proxies, Proxy
from ociregistry.names import Upstream
from ociregistry.settings import Settings, load_settings

ONE, OTHER = Proxy("http", "one.example", 3128), Proxy("http", "other.example", 3128)
SECRET = "s3cr3t"


@pytest.mark.parametrize(
    ("text", "proxy", "told"),
    [
        ("http://proxy.example:3128", Proxy("http", "proxy.example", 3128), "http://proxy.example:3128"),
        ("http://proxy.example", Proxy("http", "proxy.example", 80), "http://proxy.example:80"),
        ("https://proxy.example/", Proxy("https", "proxy.example", 443), "https://proxy.example:443"),
        ("http://squid_proxy:3128", Proxy("http", "squid_proxy", 3128), "http://squid_proxy:3128"),
        ("HTTP://Proxy.Example:3128/", Proxy("http", "proxy.example", 3128), "http://proxy.example:3128"),
        ("proxy:3128", Proxy("http", "proxy", 3128), "http://proxy:3128"),
        ("10.1.2.3:3128", Proxy("http", "10.1.2.3", 3128), "http://10.1.2.3:3128"),
        ("http://[fd00::1]:3128", Proxy("http", "fd00::1", 3128), "http://[fd00::1]:3128"),
        ("http://u:p@proxy:1", Proxy("http", "proxy", 1, "u", "p"), "http://proxy:1"),
        ("u:p@proxy:1", Proxy("http", "proxy", 1, "u", "p"), "http://proxy:1"),
        ("http://u@proxy:1", Proxy("http", "proxy", 1, "u"), "http://proxy:1"),
        ("http://d%5Cu:p%40%3A%2f:x@proxy:1", Proxy("http", "proxy", 1, "d\\u", "p@:/:x"), "http://proxy:1"),
    ],
)
def test_proxy_url(text: str, proxy: Proxy, told: str) -> None:
    assert Proxy.parse(text) == proxy
    assert str(proxy) == told


def test_text_of_proxy_has_no_user_and_password() -> None:
    proxy = Proxy.parse(f"http://{SECRET}-user:{SECRET}@proxy:1")
    assert SECRET not in f"{proxy} {proxy!r} {Proxies(proxy, proxy)!r}"


BAD = [
    "",
    "http://",
    "http://proxy:0",
    "http://proxy:65536",
    "http://proxy:x",
    "http://proxy/path",
    "http://proxy?query",
    "http://-proxy",
    "http://[::x]:1",
    "http://[1:2]:1",
    "http://a b:1",
    f"http://u:{SECRET}/x@proxy:1",
    f"http://u%3Ax:{SECRET}@proxy:1",
    f"http://u:{SECRET}%0A@proxy:1",
    f"socks5://u:{SECRET}@proxy:1",
]


@pytest.mark.parametrize("text", BAD)
def test_malformed_proxy_url(text: str) -> None:
    with pytest.raises(ValueError, match=r"expected|supported|printable") as refused:
        Proxy.parse(text)
    assert SECRET not in str(refused.value)


def test_error_names_unsupported_scheme() -> None:
    with pytest.raises(ValueError, match="socks5h proxies are not supported, only http and https"):
        Proxy.parse("socks5h://proxy:1080")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the file is."""
    return tmp_path / "ociregistry.yaml"


def load(path: Path, text: str, **environment: str) -> Settings:
    """The settings that a file with this text makes on a machine with this environment."""
    path.write_text(text)
    return load_settings({}, (), path, environment)


@pytest.mark.parametrize("text", [text for text in BAD if text])
def test_error_in_file_names_file_line_and_key(path: Path, text: str) -> None:
    for before, key in (("\n", "proxy"), ("registries:\n- name: reg.example\n  ", "proxy")):
        with pytest.raises(ConfigInvalid) as refused:
            load(path, f"{before}proxy: '{text}'\n")
        assert str(refused.value).startswith(f"{path}:{before.count(chr(10)) + 1}: {key}: ")
        assert str(refused.value).endswith("; or none")
        assert SECRET not in str(refused.value)


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"])
def test_error_in_environment_names_the_variable(variable: str) -> None:
    with pytest.raises(ConfigInvalid, match=f"^environment variable {variable}: a URL such as "):
        load_settings({}, (), None, {variable: f"http://u:{SECRET}@proxy:x"})


def test_malformed_variable_is_ignored_when_the_file_has_a_proxy(path: Path) -> None:
    settings = load(path, "proxy: none\n", HTTP_PROXY="socks5://proxy:1080")
    assert settings.proxy.proxies == NO_PROXIES


@pytest.mark.parametrize(
    ("environment", "proxies"),
    [
        ({}, NO_PROXIES),
        ({"HTTP_PROXY": str(ONE)}, Proxies(ONE, None)),
        ({"https_proxy": str(ONE)}, Proxies(None, ONE)),
        ({"http_proxy": str(ONE), "HTTPS_PROXY": str(OTHER)}, Proxies(ONE, OTHER)),
        ({"http_proxy": str(ONE), "HTTP_PROXY": str(OTHER)}, Proxies(OTHER, None)),
        ({"http_proxy": str(ONE), "HTTP_PROXY": ""}, Proxies(ONE, None)),
        ({"ALL_PROXY": str(ONE)}, NO_PROXIES),
    ],
)
def test_proxies_of_the_environment(environment: dict[str, str], proxies: Proxies) -> None:
    assert load_settings({}, (), None, environment).proxy.proxies == proxies


def test_file_takes_precedence_over_environment(path: Path) -> None:
    settings = load(path, f"proxy: {ONE}\nregistries:\n- name: a.b\n- name: c.d\n  proxy: none\n", HTTP_PROXY="x:1")
    assert settings.proxy.proxies == Proxies(ONE, ONE)
    assert settings.entry(Upstream("a.b")).proxy is None
    assert settings.entry(Upstream("c.d")).proxy == NO_PROXIES


def covers(text: str, host: str, port: int = 443) -> bool:
    """Whether a host is asked directly."""
    malformed: list[str] = []
    no_proxy = NoProxy.parse(text, malformed.append)
    assert malformed == []
    return no_proxy.covers(host, port)


@pytest.mark.parametrize(
    ("text", "direct", "proxied"),
    [
        ("reg.example", ["reg.example", "a.reg.example", "REG.example", "reg.example."], ["areg.example", "example"]),
        (".reg.example", ["a.reg.example", "a.b.reg.example"], ["reg.example", "areg.example"]),
        ("*.reg.example", ["a.reg.example"], ["reg.example", "areg.example"]),
        ("Reg.Example.", ["reg.example"], ["example"]),
        ("a.b, c.d\te.f ,,", ["a.b", "c.d", "e.f"], ["g.h"]),
        ("*", ["reg.example", "8.8.8.8", "fd00::1"], []),
        ("10.1.2.3", ["10.1.2.3"], ["10.1.2.4", "110.1.2.3"]),
        ("10.0.0.0/8", ["10.1.2.3"], ["11.1.2.3", "10.example", "fd00::1"]),
        ("10.1.2.3/8", ["10.9.9.9"], ["11.1.2.3"]),
        ("fd00::/8", ["fd00::1"], ["fe00::1", "10.0.0.1"]),
        ("fd00::1", ["fd00::1", "fd00:0::1"], ["fd00::2"]),
        ("my_host", ["my_host"], ["host"]),
        ("", [], ["reg.example", "8.8.8.8"]),
        # This machine is never asked through a proxy.
        ("", ["localhost", "a.localhost", "127.0.0.1", "127.9.9.9", "::1"], ["localhost.example"]),
    ],
)
def test_no_proxy_matches_hosts(text: str, direct: list[str], proxied: list[str]) -> None:
    assert [host for host in direct if not covers(text, host)] == []
    assert [host for host in proxied if covers(text, host)] == []


@pytest.mark.parametrize(
    ("text", "host"),
    [
        ("reg.example:5000", "reg.example"),
        (".example:5000", "reg.example"),
        ("10.1.2.3:5000", "10.1.2.3"),
        ("[fd00::1]:5000", "fd00::1"),
        ("*:5000", "any.example"),
    ],
)
def test_no_proxy_with_port(text: str, host: str) -> None:
    assert covers(text, host, 5000)
    assert not covers(text, host, 443)


@pytest.mark.parametrize("entry", ["10.0.0.0/99", "http://reg.example", "a:b:c", "x*y", "reg.example:x", "10.*"])
def test_malformed_no_proxy_entry_is_ignored_with_a_warning(entry: str) -> None:
    settings = load_settings({}, (), None, {"no_proxy": f"a.b,{entry},c.d"})
    assert settings.warnings == (f"NO_PROXY: {entry!r} is ignored: it is no host, domain, address or network",)
    assert settings.proxy.no_proxy.covers("a.b", 1)
    assert settings.proxy.no_proxy.covers("c.d", 1)
    assert not settings.proxy.no_proxy.covers("reg.example", 443)
