"""`check`: prints how each upstream will be reached according to the configuration; makes no connection."""

from __future__ import annotations

from collections.abc import Iterator

from ociregistry.commands.options import Command, print_lines
from ociregistry.config.registries import Helper, IdentityToken, Password, RegistrySettings
from ociregistry.config.tls import UpstreamTls
from ociregistry.names import Upstream
from ociregistry.openssl import Certificates, KeyPair
from ociregistry.process import complain
from ociregistry.settings import Settings
from ociregistry.upstream.network import api_host, is_allowed

_SYSTEM = "the operating system's trust store"


class Check(Command):
    """The options of `check`."""

    longdesc = "Prints each upstream of the configuration, and how it will be reached. Makes no connection."

    def run(self, settings: Settings) -> int:
        """Print the report to stdout and the warnings to stderr."""
        print_lines(report(settings))
        for warning in settings.warnings:
            complain(f"warning: {warning}")
        return 0


def report(settings: Settings) -> Iterator[str]:
    """Yield the lines to print; they contain no password or token."""
    yield from _clients(settings)
    if settings.air_gapped:
        yield "every upstream"
        yield "  never contacted: the daemon is air-gapped"
        return
    for entry in settings.registries.values():
        yield from _upstream(entry, settings)
    yield "every other upstream" + _allowed(None, settings)
    yield f"  https, certificate verified by {_SYSTEM}"
    yield "  http where a name with a port, or with private addresses alone, does not speak TLS"
    yield "  anonymous"


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
        yield f"  first {mirror}{_tls(behind.tls) if mirror.scheme == 'https' else ''}, {_login(behind)}"
    scheme = entry.scheme or "https"
    plain = entry.scheme is None and not entry.must_be_secure
    fallback = ", or http if it does not speak TLS" if plain else ""
    if plain and entry.upstream.port is None:
        fallback += " and has private addresses alone"
    tls = _tls(entry.tls) if scheme == "https" else ""
    yield f"  {'then ' if entry.mirrors else ''}{scheme}://{api_host(entry.upstream)}{tls}{fallback}"
    yield f"  {_login(entry)}"


def _allowed(upstream: Upstream | None, settings: Settings) -> str:
    if upstream is None:
        return f", if it is one of {', '.join(settings.allow_upstreams)}" if settings.allow_upstreams else ""
    return "" if is_allowed(upstream, settings.allow_upstreams) else ": NOT ALLOWED by allow_upstreams"


def _login(entry: RegistrySettings) -> str:
    match entry.login:
        case Password(user=user, source=source):
            who = f"as the user {user}, by {source}"
        case IdentityToken():
            who = "by an identity token"
        case Helper(program=program):
            who = f"as {program} says"
        case _:
            return "anonymous"
    return who + (f", also to the token service {entry.realm}" if entry.realm else "")


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
