"""Upstream access from the settings: configured names, trusted token services, and plain http."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from twisted.internet.defer import Deferred
from twisted.internet.error import DNSLookupError
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import Clock

from ociregistry.config.registries import Helper, IdentityToken, Login, Mirror, Password, RegistrySettings
from ociregistry.config.tls import UpstreamTls
from ociregistry.names import Upstream
from ociregistry.settings import Settings, load_settings
from ociregistry.upstream.client import BaseUrl
from ociregistry.upstream.network import Network, _trusted_with, api_host, configured_hosts
from ociregistry.upstream.origin import Origin
from tests.unit.support.common import fired
from tests.unit.support.http_agents import INSTANCE
from tests.unit.test_upstream_connect import Names, Resolved


def entry(name: str, **configured: Any) -> RegistrySettings:
    """Return an entry of `registries`."""
    return RegistrySettings(Upstream.parse(name), **configured)


def configured(*entries: RegistrySettings, default_ns: str = "docker.io") -> Settings:
    """Return the default settings with these entries."""
    registries = {one.upstream: one for one in entries}
    return replace(load_settings({}, (), None), registries=registries, default_ns=Upstream(default_ns))


SETTINGS = configured(
    entry("reg.example"),
    entry("ported.example:5000"),
    entry("tls.example:443"),
    entry("[fd00::1]"),
    entry("[::1]:5000"),
    entry("10.0.0.1:80"),
    entry(
        "mirrored.example",
        mirrors=(
            Mirror("http", Upstream("mirror.example:8080")),
            Mirror("https", Upstream("[::2]"), "/docker"),
            Mirror("https", Upstream("docker.io")),
        ),
    ),
    entry("split.example", realm=Upstream("realm.example:5001")),
    entry("other.example", realm=Upstream("anywhere.example")),
    entry("six.example", realm=Upstream("[::3]:5001")),
    default_ns="default.example:81",
)


@pytest.mark.parametrize(
    ("host", "ports"),
    [
        ("reg.example", {80, 443}),
        ("ported.example", {5000}),
        ("tls.example", {443}),
        ("fd00::1", {80, 443}),
        ("::1", {5000}),
        ("10.0.0.1", {80}),
        ("default.example", {81}),
        ("mirrored.example", {80, 443}),
        ("mirror.example", {8080}),
        ("::2", {80, 443}),
        ("registry-1.docker.io", {80, 443}),
        ("realm.example", {5001}),
        ("::3", {5001}),
        # No redirect can lead to these.
        ("docker.io", set()),
        ("auth.docker.io", set()),
        ("evil.example", set()),
        ("evil.reg.example", set()),
        ("example", set()),
        ("127.0.0.1", set()),
        ("fd00::2", set()),
        ("[::1]", set()),
    ],
)
def test_configured_names(host: str, ports: set[int]) -> None:
    named = configured_hosts(SETTINGS)
    asked = (80, 81, 443, 444, 5000, 5001, 8080)
    assert {port for port in asked if named(host, port)} == ports


def test_token_service_without_port_is_on_443() -> None:
    assert configured_hosts(SETTINGS)("anywhere.example", 443)


def test_only_a_changed_default_upstream_counts_as_configured() -> None:
    assert configured_hosts(configured())("registry-1.docker.io", 443)
    assert not configured_hosts(configured(default_ns="reg.example"))("registry-1.docker.io", 443)


@pytest.mark.parametrize(
    ("name", "host"),
    [
        ("docker.io", "registry-1.docker.io"),
        ("index.docker.io", "registry-1.docker.io"),
        ("docker.io:443", "docker.io:443"),
        ("quay.io", "quay.io"),
        ("reg.example:5000", "reg.example:5000"),
        ("[::1]:5000", "[::1]:5000"),
    ],
)
def test_api_host(name: str, host: str) -> None:
    assert api_host(Upstream.parse(name)) == host


def trusts(one: RegistrySettings, realm: str, path: str = "/token") -> bool:
    """Return whether a token service gets the credentials of an entry."""
    base = BaseUrl(one.scheme, api_host(one.upstream))
    return _trusted_with(one, base, base.origin(one.scheme or "https"))(Origin.of(f"{realm}{path}"))


@pytest.mark.parametrize(
    ("name", "realm", "trusted"),
    [
        ("reg.example", "https://reg.example", True),
        ("reg.example", "https://reg.example:8443", True),
        ("reg.example", "https://REG.example", True),
        ("reg.example:5000", "https://reg.example:5001", True),
        ("reg.example:5000", "https://reg.example", True),
        ("[::1]:5000", "https://[::1]:5001", True),
        ("docker.io", "https://registry-1.docker.io", True),
        ("docker.io", "https://auth.docker.io", True),
        ("docker.io", "https://auth.docker.io:444", True),
        ("reg.example", "http://reg.example", False),
        ("reg.example:80", "http://reg.example", False),
        ("docker.io", "http://auth.docker.io", False),
        ("reg.example", "https://evil.example", False),
        ("reg.example", "https://auth.reg.example", False),
        ("auth.reg.example", "https://reg.example", False),
        ("reg.example", "https://reg.example.evil.example", False),
        ("reg.example", "https://auth.docker.io", False),
        ("[::1]:5000", "https://[::2]:5000", False),
        ("docker.io:443", "https://auth.docker.io", False),
        ("docker.io", "https://docker.io", False),
        ("docker.io", "https://evil.docker.io", False),
    ],
)
def test_trusted_token_services(name: str, realm: str, trusted: bool) -> None:
    for scheme in ("https", None):
        assert trusts(entry(name, scheme=scheme), realm) is trusted


@pytest.mark.parametrize(
    ("realm", "trusted"),
    [
        ("http://reg.example:5000", True),
        ("http://reg.example", True),
        ("https://reg.example", True),
        ("http://evil.example", False),
        ("https://evil.example", False),
    ],
)
def test_credentials_over_http_need_scheme_http(realm: str, trusted: bool) -> None:
    assert trusts(entry("reg.example:5000", scheme="http"), realm) is trusted


@pytest.mark.parametrize(
    ("named", "realm", "trusted"),
    [
        ("auth.example", "https://auth.example", True),
        ("auth.example", "https://auth.example:8443", True),
        ("auth.example:8443", "https://auth.example:8443", True),
        ("[::2]:8443", "https://[::2]:8443", True),
        ("[::2]", "https://[::2]", True),
        ("auth.example:443", "https://auth.example", True),
        ("auth.example:8443", "https://auth.example", False),
        ("auth.example", "http://auth.example", False),
        ("auth.example", "https://evil.example", False),
        # The registry itself stays trusted.
        ("auth.example", "https://reg.example", True),
    ],
)
def test_configured_realm_is_trusted(named: str, realm: str, trusted: bool) -> None:
    assert trusts(entry("reg.example", realm=Upstream(named)), realm) is trusted


class PlainAllowed:
    """Whether plain http is allowed for an upstream with such addresses."""

    def __init__(self, resolved: Resolved, reactor: IReactorTime) -> None:
        self.names = Names(resolved)
        self._network = Network(configured(), INSTANCE, reactor)
        self._network._resolver = self.names

    def __call__(self, one: RegistrySettings, *, proxied: bool = False) -> bool:
        """Return the answer."""
        return fired(Deferred.fromCoroutine(self._asked(one, proxied)))

    async def _asked(self, one: RegistrySettings, proxied: bool) -> bool:
        return await self._network._http_allowed(one, proxied)()


@pytest.mark.parametrize(
    ("resolved", "allowed"),
    [
        (("10.0.0.1",), True),
        (("10.0.0.1", "fd00::1"), True),
        (("192.168.0.1", "8.8.8.8"), False),
        (("8.8.8.8", "192.168.0.1"), False),
        (("2606:4700:4700::1111",), False),
        (DNSLookupError("no such name"), False),
    ],
)
def test_http_is_allowed_if_all_addresses_are_private(resolved: Resolved, allowed: bool, clock: Clock) -> None:
    ask = PlainAllowed(resolved, clock)
    assert ask(entry("reg.example")) is allowed
    assert ask.names.asked == ["reg.example"]


def test_literal_ipv6_address_is_checked(clock: Clock) -> None:
    ask = PlainAllowed(("fd00::1",), clock)
    assert ask(entry("[fd00::1]"))
    assert ask.names.asked == ["fd00::1"]


@pytest.mark.parametrize("name", ["reg.example:5000", "reg.example:443", "[::1]:5000"])
def test_http_is_allowed_if_the_name_has_a_port(name: str, clock: Clock) -> None:
    ask = PlainAllowed(DNSLookupError("never asked"), clock)
    assert ask(entry(name))
    assert ask.names.asked == []


@pytest.mark.parametrize("login", [Password("u", "p"), IdentityToken("t"), Helper("h")])
@pytest.mark.parametrize("name", ["reg.example", "reg.example:5000"])
def test_http_is_never_allowed_with_credentials(name: str, login: Login, clock: Clock) -> None:
    assert not PlainAllowed(("10.0.0.1",), clock)(entry(name, login=login))


@pytest.mark.parametrize("name", ["reg.example", "reg.example:5000"])
def test_http_is_not_allowed_with_tls_settings(name: str, clock: Clock) -> None:
    assert not PlainAllowed(("10.0.0.1",), clock)(entry(name, tls=UpstreamTls(verify=False)))
