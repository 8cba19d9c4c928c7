"""The section `registries`: an entry for each upstream with settings of its own."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from ociregistry.config.nodes import Node
from ociregistry.config.proxy import Proxies, read_proxies
from ociregistry.config.tls import SYSTEM_TRUST, UpstreamTls, read_upstream_tls
from ociregistry.errors import NameInvalid
from ociregistry.names import Upstream

_NOT_IN_MIRRORS = re.compile(r"[^!-~]|[?#]")
"""What the URL of a mirror must not contain."""
_HELPER = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9._-]*")
_LOGINS = ("user", "identity_token", "credential_helper")
_PASSWORDS = ("password", "password_file", "password_env")


@dataclass(frozen=True, slots=True)
class Password:
    """A login with a user and a password."""

    user: str
    password: str = field(repr=False)
    source: str = "password"
    """The key of the configuration that gave the password."""


@dataclass(frozen=True, slots=True)
class IdentityToken:
    """A login with an identity token, for which the token service issues access tokens."""

    token: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Helper:
    """A login with a credential helper, a program `docker-credential-NAME` that prints user and password."""

    name: str

    @property
    def program(self) -> str:
        """The name of the program."""
        return f"docker-credential-{self.name}"


Login = Password | IdentityToken | Helper


@dataclass(frozen=True, slots=True)
class Mirror:
    """A registry that is asked before the upstream.

    Its login and TLS settings are in its own entry of `registries`.
    """

    scheme: str
    host: Upstream
    path: str = ""

    @property
    def api(self) -> str:
        """The path of its API: a `path` in which one part is `v2` as it is, another below `/v2`.

        What follows `v2` is the beginning of the repository names, such as a project of Harbor.
        """
        return self.path if "v2" in self.path.split("/") else f"/v2{self.path}"

    @property
    def takes_ns(self) -> bool:
        """Whether it is told by the parameter `ns` which upstream is meant; else its path says that."""
        return self.api.endswith("/v2")

    def __str__(self) -> str:
        return f"{self.scheme}://{self.host}{self.path}"


@dataclass(frozen=True, slots=True)
class RegistrySettings:
    """The settings of one upstream."""

    upstream: Upstream
    scheme: str | None = None
    """`http` or `https`; None to detect it."""
    description: str = ""
    login: Login | None = None
    realm: Upstream | None = None
    """The host of the token service, if it differs from the upstream's."""
    tls: UpstreamTls = SYSTEM_TRUST
    mirrors: tuple[Mirror, ...] = ()
    mirrors_only: bool = False
    """Whether the upstream itself is never asked."""
    proxy: Proxies | None = None
    """The proxies of this upstream; None for those of `Settings`."""

    @property
    def must_be_secure(self) -> bool:
        """Whether a login or TLS settings rule out the fallback to http; `scheme: http` overrides this."""
        return self.login is not None or self.tls != SYSTEM_TRUST


def read_registries(node: Node) -> tuple[dict[Upstream, RegistrySettings], tuple[str, ...]]:
    """Read the section `registries`.

    Returns:
        The entries by upstream, and warnings about settings that are probably a mistake.

    Raises:
        ConfigInvalid: an entry is invalid, occurs twice, or contradicts the entry of its mirror.
    """
    registries: dict[Upstream, RegistrySettings] = {}
    mirrors: list[tuple[Mirror, Node]] = []
    warnings: list[str] = []
    for item in node.items("- name: docker.io"):
        nodes = item.mapping("name", "description", "scheme", "auth", "tls", "mirrors", "mirrors_only", "proxy")
        entry, warned = _registry(item, nodes)
        if entry.upstream in registries:
            raise nodes["name"].error(f"{entry.upstream} is configured twice")
        registries[entry.upstream] = entry
        mirrors += [(mirror, nodes["mirrors"]) for mirror in entry.mirrors]
        warnings += warned
    for mirror, at in mirrors:
        behind = registries.get(mirror.host)
        secure = behind is not None and behind.scheme != "http" and (behind.scheme or behind.must_be_secure)
        if mirror.scheme == "http" and secure:
            raise at.error(f"{mirror}: the entry of {mirror.host} is for https, or needs scheme: http as well")
    return registries, tuple(warnings)


def _registry(item: Node, nodes: Mapping[str, Node]) -> tuple[RegistrySettings, tuple[str, ...]]:
    if "name" not in nodes:
        raise item.missing("name", "every entry of registries needs one")
    upstream = _upstream(nodes["name"], _without_user(nodes["name"]))
    scheme = nodes["scheme"].text() if "scheme" in nodes else None
    if scheme not in ("http", "https", None):
        raise nodes["scheme"].error(f"{scheme!r}: http or https is expected")
    login, realm = _auth(nodes["auth"]) if "auth" in nodes else (None, None)
    tls, warnings = read_upstream_tls(nodes["tls"]) if "tls" in nodes else (SYSTEM_TRUST, ())
    if scheme == "http" and tls != SYSTEM_TRUST:
        raise nodes["tls"].error("has no effect with scheme: http")
    mirrors = tuple(map(_mirror, nodes["mirrors"].items())) if "mirrors" in nodes else ()
    mirrors_only = "mirrors_only" in nodes and nodes["mirrors_only"].flag()
    if mirrors_only and not mirrors:
        raise nodes["mirrors_only"].error("needs mirrors: nothing else would be asked")
    description = _description(nodes["description"]) if "description" in nodes else ""
    proxy = read_proxies(nodes["proxy"]) if "proxy" in nodes else None
    return RegistrySettings(upstream, scheme, description, login, realm, tls, mirrors, mirrors_only, proxy), warnings


def _description(node: Node) -> str:
    description = " ".join(node.text().split())
    if not description.isprintable():
        raise node.error("printable characters are expected")
    return description


def _without_user(node: Node) -> str:
    text = node.word()
    if "@" in text:
        # The message leaves the text out, because it may hold a password.
        raise node.error("credentials are not allowed here: put them into auth of the registries entry for that host")
    return text


def _upstream(node: Node, text: str) -> Upstream:
    try:
        return Upstream.parse(text)
    except NameInvalid as error:
        raise node.error(error.message) from None


def _auth(node: Node) -> tuple[Login | None, Upstream | None]:
    nodes = node.mapping(*_LOGINS, *_PASSWORDS, "realm", below="auth.")
    realm = _realm(nodes["realm"]) if "realm" in nodes else None
    logins = [key for key in _LOGINS if key in nodes]
    passwords = [key for key in _PASSWORDS if key in nodes]
    if len(logins) > 1:
        raise nodes[logins[1]].error(f"conflicts with {logins[0]}: give only one of them")
    if len(passwords) > 1:
        raise nodes[passwords[1]].error(f"conflicts with {passwords[0]}: give only one of them")
    if passwords and logins != ["user"]:
        raise nodes[passwords[0]].error("has no effect without user")
    if "user" in nodes:
        if not passwords:
            raise nodes["user"].error(f"one of {', '.join(_PASSWORDS)} is missing beside it")
        if ":" in nodes["user"].word():
            raise nodes["user"].error("a user must not contain a colon (RFC 7617)")
        return Password(nodes["user"].word(), _password(nodes[passwords[0]], passwords[0]), passwords[0]), realm
    if "identity_token" in nodes:
        return IdentityToken(nodes["identity_token"].word()), realm
    if "credential_helper" in nodes:
        return _helper(nodes["credential_helper"]), realm
    return None, realm


def _password(node: Node, source: str) -> str:
    if source == "password":
        return node.word()
    if source == "password_env":
        where = f"the environment variable {node.word()}"
        if node.word() not in os.environ:
            raise node.error(f"{where} is not set")
        password = os.environ[node.word()]
    else:
        where = str(node.path())
        password = node.contents().decode("utf-8", "surrogateescape")
    password = password.rstrip("\r\n")
    if not password or not password.isprintable():
        raise node.error(f"{where} holds no password of printable characters")
    return password


def _helper(node: Node) -> Helper:
    helper = Helper(node.word())
    if not _HELPER.fullmatch(helper.name):
        raise node.error(f"{helper.name!r} is not the NAME of a docker-credential-NAME program")
    if shutil.which(helper.program) is None:
        raise node.error(f"there is no program {helper.program} in PATH")
    return helper


def _realm(node: Node) -> Upstream:
    text = _without_user(node)
    _, separator, rest = text.partition("://")
    return _upstream(node, rest.partition("/")[0] if separator else text)


def _mirror(node: Node) -> Mirror:
    text = _without_user(node)
    try:
        parts = urlsplit(text)
    except ValueError:
        raise node.error(f"{text!r} is not a URL") from None
    host = _upstream(node, parts.netloc) if parts.netloc else None
    if host is None or parts.scheme not in ("http", "https") or _NOT_IN_MIRRORS.search(text):
        raise node.error(f"{text!r}: a URL such as https://mirror:8080 is expected")
    return Mirror(parts.scheme, host, parts.path.rstrip("/"))
