"""Forward proxies: the key `proxy`, and the environment variables HTTP_PROXY, HTTPS_PROXY and NO_PROXY.

The variables mean what they mean to Go's net/http, and so to containerd: upper case comes before lower case, and this
machine itself is never asked through a proxy.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from urllib.parse import unquote

from ociregistry.config.nodes import ConfigInvalid, Node
from ociregistry.names import is_host

_PORTS = {"http": 80, "https": 443}
_SCHEME = re.compile(r"(?P<scheme>[a-z0-9+.-]+)://", re.IGNORECASE)
_REST = re.compile(
    r"(?:(?P<user>[^:/]*)(?::(?P<password>[^/]*))?@)?"
    r"(?P<host>[a-z0-9_](?:[a-z0-9._-]*[a-z0-9_])?|\[[0-9a-f:.]+\])(?::(?P<port>[0-9]{1,5}))?/?",
    re.IGNORECASE,
)
_NONE = "none"


@dataclass(frozen=True, slots=True)
class Proxy:
    """A forward proxy; its text is its URL without user and password. An IPv6 address in `host` has no brackets."""

    scheme: str
    host: str
    port: int
    user: str = field(default="", repr=False)
    password: str = field(default="", repr=False)

    @classmethod
    def parse(cls, text: str) -> Proxy:
        """Parse a URL such as `http://user:password@proxy.example:3128`; without a scheme it is http.

        Raises:
            ValueError: it is malformed; the message leaves the text out, because it may hold a password.
        """
        match = _SCHEME.match(text)
        scheme = match["scheme"].lower() if match else "http"
        if scheme not in _PORTS:
            raise ValueError(f"{scheme} proxies are not supported, only http and https")
        rest = _REST.fullmatch(text, match.end() if match else 0)
        if rest is None or not is_host(rest["host"]) or not 0 < int(rest["port"] or 1) < 65536:
            raise ValueError(
                "a URL such as http://proxy.example:3128 is expected, without a path, and with % for special "
                "characters of a password (RFC 3986)"
            )
        user, password = unquote(rest["user"] or ""), unquote(rest["password"] or "")
        if ":" in user or not (user + password).isprintable():
            raise ValueError("the user must not contain a colon, and user and password must be printable (RFC 7617)")
        host = rest["host"].lower().strip("[]")
        return cls(scheme, host, int(rest["port"] or _PORTS[scheme]), user, password)

    def __str__(self) -> str:
        return f"{self.scheme}://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Proxies:
    """The proxy for http URLs and the one for https URLs; None to connect directly."""

    http: Proxy | None = None
    https: Proxy | None = None


NO_PROXIES = Proxies()


@dataclass(frozen=True, slots=True)
class _Entry:
    """An entry of NO_PROXY: the hosts in `network`, or those whose name ends with `suffix`, at `port` or at any."""

    suffix: str
    network: ipaddress.IPv4Network | ipaddress.IPv6Network | None = None
    port: int | None = None

    @classmethod
    def parse(cls, text: str) -> _Entry:
        """Parse a network (CIDR), or `*`, a domain or an IP address, each with a port or without.

        `example.com` covers the domain itself and all below it, `.example.com` and `*.example.com` those below it.

        Raises:
            ValueError: it is malformed.
        """
        if "/" in text:
            return cls("", ipaddress.ip_network(text, strict=False))
        host, port = text, None
        if match := re.fullmatch(r"(\[[^\]]*\]|[^:]*):([0-9]{1,5})", text):
            host, port = match[1], int(match[2])
        try:
            return cls("", ipaddress.ip_network(host.strip("[]")), port)
        except ValueError:
            if not re.fullmatch(r"\*|(\*?\.)?[a-z0-9_-]+(\.[a-z0-9_-]+)*\.?", host):
                raise
        return cls(host.removeprefix("*").rstrip("."), None, port)

    def covers(self, host: str, port: int) -> bool:
        """Tell whether this entry is about a host, in lower case, and port."""
        if self.port not in (None, port):
            return False
        if self.network is not None:
            return (address := _address(host)) is not None and address in self.network
        if self.suffix.startswith(".") or not self.suffix:
            return host.endswith(self.suffix)
        return host == self.suffix or host.endswith(f".{self.suffix}")


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return None


@dataclass(frozen=True, slots=True)
class NoProxy:
    """The hosts that are asked directly: those of NO_PROXY, and in any case those on this machine."""

    text: str = ""
    _entries: tuple[_Entry, ...] = ()

    @classmethod
    def parse(cls, text: str, warn: Callable[[str], object]) -> NoProxy:
        """Parse a list with commas or blanks between its entries; call `warn` with each that is malformed."""
        entries = []
        for entry in filter(None, re.split(r"[,\s]+", text.lower())):
            try:
                entries.append(_Entry.parse(entry))
            except ValueError:
                warn(entry)
        return cls(",".join(filter(None, re.split(r"[,\s]+", text))), tuple(entries))

    def covers(self, host: str, port: int) -> bool:
        """Tell whether a host (an IPv6 address without brackets) is asked directly."""
        host = host.lower().rstrip(".")
        address = _address(host)
        on_this_machine = address.is_loopback if address else f".{host}".endswith(".localhost")
        return on_this_machine or any(entry.covers(host, port) for entry in self._entries)


@dataclass(frozen=True, slots=True)
class ProxySettings:
    """The proxies of upstreams whose entry has no `proxy` of its own, and the hosts that none of them is for."""

    proxies: Proxies
    no_proxy: NoProxy


def read_proxies(node: Node) -> Proxies:
    """Read the key `proxy`: the URL of a proxy for all URLs, or `none`.

    Raises:
        ConfigInvalid: it is malformed.
    """
    text = node.word()
    if text == _NONE:
        return NO_PROXIES
    try:
        proxy = Proxy.parse(text)
    except ValueError as error:
        raise node.error(f"{error}; or {_NONE}") from None
    return Proxies(proxy, proxy)


def read_environment(
    configured: Proxies | None, environment: Mapping[str, str]
) -> tuple[ProxySettings, tuple[str, ...]]:
    """Read the environment variables; `configured` proxies take the place of HTTP_PROXY and HTTPS_PROXY.

    Returns:
        The settings, and warnings about what is ignored.

    Raises:
        ConfigInvalid: a variable that is used is malformed.
    """
    proxies = configured
    if proxies is None:
        proxies = Proxies(_variable("HTTP_PROXY", environment), _variable("HTTPS_PROXY", environment))
    warnings: list[str] = []

    def warn(entry: str) -> None:
        warnings.append(f"NO_PROXY: {entry[:100]!r} is ignored: it is no host, domain, address or network")

    no_proxy = NoProxy.parse(_value("NO_PROXY", environment)[1], warn)
    return ProxySettings(proxies, no_proxy), tuple(warnings)


def _value(name: str, environment: Mapping[str, str]) -> tuple[str, str]:
    """Return the spelling of a variable that is set, and its value; the name as it is and "" where neither is."""
    spelled = next((one for one in (name, name.lower()) if environment.get(one)), name)
    return spelled, environment.get(spelled, "").strip()


def _variable(name: str, environment: Mapping[str, str]) -> Proxy | None:
    spelled, text = _value(name, environment)
    try:
        return Proxy.parse(text) if text else None
    except ValueError as error:
        raise ConfigInvalid(f"environment variable {spelled}: {error}") from None
