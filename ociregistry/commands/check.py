"""`check`: prints how each upstream will be reached according to the configuration, or with --connect, asks each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twisted.internet.defer import Deferred, gatherResults

from ociregistry.commands.options import Command, print_lines
from ociregistry.commands.running import run_on_reactor
from ociregistry.composition import make_store, put_together
from ociregistry.config.proxy import NO_PROXIES, Proxies, Proxy
from ociregistry.config.registries import Helper, IdentityToken, Password, RegistrySettings
from ociregistry.config.tls import UpstreamTls
from ociregistry.errors import RegistryError, Unavailable
from ociregistry.imagelists.reading import read_image_list
from ociregistry.manifests import canonical_media_type
from ociregistry.names import Upstream
from ociregistry.openssl import Certificates, KeyPair
from ociregistry.process import print_error
from ociregistry.settings import Settings
from ociregistry.upstream.auth import AccessRefused
from ociregistry.upstream.client import BaseUrl, Client
from ociregistry.upstream.http import Response
from ociregistry.upstream.network import Network, api_host, is_allowed, route_of
from ociregistry.upstream.origin import Origin

_SYSTEM = "the operating system's trust store"


class Check(Command):
    """The options of `check`."""

    examples = ("check", "check --connect")
    longdesc = (
        "Prints each upstream of the configuration and how it will be reached; with --connect, asks each of them."
    )
    optFlags = [
        ["connect", None, "Ask each upstream and mirror of the configuration once, and print what it answers."]
    ]

    def run(self, settings: Settings) -> int:
        """Print the report to stdout and the warnings to stderr.

        Returns:
            Exit status 1 if an upstream or mirror cannot be reached, or refuses access.

        Raises:
            CommandFailed: the command was interrupted.
        """
        if self["connect"]:
            good = run_on_reactor(lambda reactor: _connect(settings, reactor), settings)
        else:
            print_lines(report(settings))
            good = True
        for warning in (*settings.warnings, *_not_preloaded(settings.preload_images)):
            print_error(f"warning: {warning}")
        return 0 if good else 1


def _not_preloaded(path: Path | None) -> Sequence[str]:
    """Return what the daemon would log about the image list at `path`; nothing of a pipe, as that is read once."""
    if path is None or path.is_fifo():
        return ()
    try:
        return read_image_list(path).errors
    except OSError as error:
        return (f"{path}: cannot be read: {error.strerror}",)


def report(settings: Settings) -> Iterator[str]:
    """Yield the lines to print; they contain no password or token."""
    yield from _clients(settings)
    yield from _upstreams(settings)
    yield f"the store, at {settings.image_path}"


def _upstreams(settings: Settings) -> Iterator[str]:
    if settings.air_gapped:
        yield "every upstream"
        yield "  never contacted: the daemon is air-gapped"
        return
    for entry in settings.registries.values():
        yield from _upstream(entry, settings)
    yield "every other upstream" + _allowed(None, settings)
    proxies = settings.proxy.proxies
    private = "" if proxies.https else ", or with private addresses alone,"
    yield f"  https, certificate verified by {_SYSTEM}"
    yield f"  http where a name with a port{private} does not speak TLS"
    yield "  anonymous"
    if proxies != NO_PROXIES:
        yield f"  {_through(proxies, ('https', 'http'))}"
        no_proxy = settings.proxy.no_proxy.text
        yield f"  without a proxy where it is {f'in NO_PROXY ({no_proxy}) or ' if no_proxy else ''}on this machine"


def _clients(settings: Settings) -> Iterator[str]:
    yield f"clients, at {', '.join(settings.listen) or f'port {settings.port}'}"
    if settings.tls is None:
        speaks_tls = bool(settings.listen) and all(endpoint.startswith("ssl:") for endpoint in settings.listen)
        yield f"  {'https' if speaks_tls else 'http'}"
    else:
        yield f"  https, {_identity(settings.tls.identity)}"
        if settings.tls.client_ca is not None:
            yield f"  only with a certificate of {settings.tls.client_ca.path}"


def _upstream(entry: RegistrySettings, settings: Settings) -> Iterator[str]:
    description = f" ({entry.description})" if entry.description else ""
    yield f"{entry.upstream}{description}{_allowed(entry.upstream, settings)}"
    for mirror in entry.mirrors:
        behind = settings.entry(mirror.host)
        through = _proxy(behind, settings, (mirror.scheme,))
        tls = _tls(behind.tls) if mirror.scheme == "https" else ""
        where = f"{mirror.scheme}://{mirror.host}{mirror.api}"
        yield f"  first {where}{tls}, {_login(behind)}{f', {through}' if through else ''}"
    if entry.mirrors_only:
        yield f"  never {api_host(entry.upstream)} itself: mirrors_only"
        return
    scheme = entry.scheme or "https"
    tls = _tls(entry.tls) if scheme == "https" else ""
    fallback = _fallback(entry, settings)
    yield f"  {'then ' if entry.mirrors else ''}{scheme}://{api_host(entry.upstream)}{tls}{fallback}"
    yield f"  {_login(entry)}"
    if through := _proxy(entry, settings, (scheme, "http") if fallback else (scheme,)):
        yield f"  {through}"


def _fallback(entry: RegistrySettings, settings: Settings) -> str:
    if entry.scheme is not None or entry.must_be_secure:
        return ""
    fallback = ", or http if it does not speak TLS"
    if entry.upstream.port is not None:
        return fallback
    # The addresses of a host behind a proxy are not known here.
    return "" if _proxies(entry, settings).https else f"{fallback} and has private addresses alone"


def _proxies(entry: RegistrySettings, settings: Settings) -> Proxies:
    base = BaseUrl(entry.scheme, api_host(entry.upstream))
    route = route_of(entry, base, settings.proxy)
    return Proxies(route.to(base.origin("http")), route.to(base.origin("https")))


def _proxy(entry: RegistrySettings, settings: Settings, schemes: Sequence[str]) -> str:
    """Return the proxies of an upstream for URLs of `schemes`; empty where no proxy is configured at all."""
    if settings.proxy.proxies == NO_PROXIES and entry.proxy in (None, NO_PROXIES):
        return ""
    return _through(_proxies(entry, settings), schemes)


def _through(proxies: Proxies, schemes: Sequence[str]) -> str:
    def told(proxy: Proxy | None) -> str:
        return f"through the proxy {proxy}" if proxy is not None else "without a proxy"

    ways = {scheme: told(getattr(proxies, scheme)) for scheme in schemes}
    if len(set(ways.values())) == 1:
        return ways[schemes[0]]
    return ", ".join(f"{scheme} {way}" for scheme, way in ways.items())


def _allowed(upstream: Upstream | None, settings: Settings) -> str:
    if upstream is None:
        return f", if it is one of {', '.join(settings.allow_upstreams)}" if settings.allow_upstreams else ""
    return "" if is_allowed(upstream, settings.allow_upstreams) else ": NOT ALLOWED by allow_upstreams"


def _login(entry: RegistrySettings) -> str:
    match entry.login:
        case Password(user=user, source=source):
            login = f"as the user {user}, by {source}"
        case IdentityToken():
            login = "by an identity token"
        case Helper(program=program):
            login = f"as {program} says"
        case _:
            return "anonymous"
    return login + (f", also to the token service {entry.realm}" if entry.realm else "")


def _tls(tls: UpstreamTls) -> str:
    return f", {_trust(tls.ca, tls.verify)}" + (f", {_identity(tls.client)}" if tls.client else "")


def _trust(ca: Certificates | None, verify: bool) -> str:
    if not verify:
        return "certificate NOT VERIFIED"
    return f"certificate verified by {ca.path if ca else _SYSTEM}"


def _identity(pair: KeyPair) -> str:
    certificate = pair.certificate
    subject = certificate.to_cryptography().subject.rfc4514_string()
    expires = (certificate.get_notAfter() or b"").decode("ascii")
    return f"our certificate {subject} until {expires[:4]}-{expires[4:6]}-{expires[6:8]}"


_OK, _NOT_FOUND, _RATE_LIMITED = 200, 404, 429
_MOST_OF_ROOT = 64 * 1024
"""Bytes."""


@dataclass(frozen=True, slots=True)
class _Source:
    """A registry or mirror that --connect asks: its name for the output, and the entry with its login."""

    name: str
    client: Client
    entry: RegistrySettings


async def _connect(settings: Settings, reactor: Any) -> bool:
    """Ask all sources at the same time, and print one line for each; return whether all answered and gave access."""
    if settings.air_gapped:
        print_lines(["every upstream: not asked: the daemon is air-gapped"])
        return True
    if not settings.registries:
        print_lines(["no upstream is configured: none was asked"])
        return True
    allowed = {upstream for upstream in settings.registries if is_allowed(upstream, settings.allow_upstreams)}
    # The store is not opened.
    network = put_together(settings, make_store(settings, reactor, adopts=False), reactor).network
    network.startService()
    try:
        sources = [
            source
            for upstream in settings.registries
            if upstream in allowed
            for source in _sources(settings.entry(upstream), settings, network)
        ]
        asked = [Deferred.fromCoroutine(_ask(source, settings)) for source in sources]
        outcomes = await gatherResults(asked, consumeErrors=True)
    finally:
        network.stopService()
    print_lines(f"{source.name}: {told}" for source, (_, told) in zip(sources, outcomes, strict=True))
    print_lines(f"{one}: not asked{_allowed(one, settings)}" for one in settings.registries if one not in allowed)
    return all(good for good, _ in outcomes)


def _sources(entry: RegistrySettings, settings: Settings, network: Network) -> Iterator[_Source]:
    for mirror in entry.mirrors:
        client = network.mirror_client(mirror, entry.upstream)
        yield _Source(f"{entry.upstream}, mirror {mirror}", client, settings.entry(mirror.host))
    if not entry.mirrors_only:
        yield _Source(str(entry.upstream), network.own_client(entry.upstream), entry)


async def _why_no_registry(response: Response) -> str:
    """Read the response to a request for the root of the API; return why it is not that of a registry, if it is not.

    A registry has that root (OCI Distribution specification, "Determining Support"). A page is not told by its type:
    quay.io sends `true` as HTML.
    """
    try:
        data = await response.collect(_MOST_OF_ROOT)
    except Unavailable:
        data = b""
    if response.status == _NOT_FOUND:
        return f"it answered 404 at {response.url}: there is no registry, or its path is another one"
    html = canonical_media_type(response.header("content-type")) == "text/html"
    if response.status == _OK and html and data.lstrip()[:1] in (b"<", b""):
        return "it sent an HTML page, as login pages and captive portals are"
    return ""


async def _ask(source: _Source, settings: Settings) -> tuple[bool, str]:
    """Return whether a source gives access to the root of its API, and one line about what it answered."""
    missing = "" if source.entry.login else "; no credentials are configured for it"
    try:
        response = await source.client.ping()
    except RegistryError as error:
        refused = missing if isinstance(error, AccessRefused) else ""
        return False, f"FAILED: {error.message.removeprefix(f'{source.entry.upstream}: ')}{refused}"
    if why := await _why_no_registry(response):
        return False, f"FAILED: {why}"
    if response.refusal or response.status >= 500 or response.status == _RATE_LIMITED:
        return False, f"FAILED: it answered {response.outcome}{missing if response.refusal else ''}"
    scheme = Origin.of(response.url).scheme
    unasked = " (it did not ask for credentials)" if source.entry.login and not response.login else ""
    through = _proxy(source.entry, settings, (scheme,))
    login = f"as {response.login}" if response.login else "anonymous"
    return True, f"ok: {scheme}, {login}{unasked}{f', {through}' if through else ''}"
