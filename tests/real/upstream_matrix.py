"""The kinds of upstreams: how they authenticate themselves, and their clients."""

from __future__ import annotations

import base64
import itertools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.certificates import Authority
from tests.images import Image, make_image
from tests.peers import DockerRegistry
from tests.processes import Daemon
from tests.secure_peers import Nginx, SecureRegistry, ServerTls, own_address, write_htpasswd
from tests.token_service import TokenService
from tests.trust_store import TrustingDaemon

FRONTS = ("docker_registry", "nginx")
AUTHS = ("anonymous", "basic", "token")
TRUSTS = ("os_store", "private_ca", "skip_verify", "wrong_ca", "expired", "other_host")
CLIENTS = ("any_client", "right_client", "wrong_client", "missing_client")
WRONG_LOGINS = ("wrong_login", "missing_login")

USER, PASSWORD = "operator", "tr0ub4dor:&3"
TOKEN_PORT = 5001
ELSEWHERE = "elsewhere.example"

_OUR_TRUST = {
    "wrong_ca": "issuer is not trusted",
    "expired": "expired",
    "other_host": "for another host name",
}


@dataclass(frozen=True)
class Cell:
    """One kind of upstream, and the daemon's configuration for it."""

    front: str
    scheme: str
    auth: str
    trust: str = ""
    client: str = ""
    login: str = ""
    """Empty: the correct credentials, where any are required."""

    def __str__(self) -> str:
        return "-".join(filter(None, (self.front, self.scheme, self.auth, self.trust, self.client, self.login)))

    @property
    def refuses(self) -> str | None:
        """Why the daemon must refuse the upstream's certificate, None when it is good."""
        return _OUR_TRUST.get(self.trust)

    @property
    def demands_client(self) -> bool:
        """Whether it demands a client certificate."""
        return self.client not in ("", "any_client")

    @property
    def outcome(self) -> tuple[int, str]:
        """The status that a client gets, and the code of the error."""
        if self.refuses or self.client in ("wrong_client", "missing_client"):
            return 503, "UNAVAILABLE"
        return (404, "MANIFEST_UNKNOWN") if self.login else (200, "")

    @property
    def sampled(self) -> bool:
        """Whether it is in the sample, where any two values of two axes meet, and not only behind a refusal.

        A Latin square: the good certificates are at all three remainders of 3.
        """
        if self.login or self.scheme == "http":
            return self.front == "docker_registry"
        number = AUTHS.index(self.auth) + TRUSTS.index(self.trust) + CLIENTS.index(self.client)
        return number % 3 == 0 and (self.front == "docker_registry" or self.trust == "private_ca")


CELLS = (
    *(Cell("docker_registry", "http", auth) for auth in AUTHS),
    *(Cell(front, "https", *axes) for front in FRONTS for axes in itertools.product(AUTHS, TRUSTS, CLIENTS)),
    *(Cell("docker_registry", "http", auth, login=login) for auth in AUTHS[1:] for login in WRONG_LOGINS),
    *(
        Cell(front, "https", auth, "private_ca", "any_client", login)
        for front in FRONTS
        for auth in AUTHS[1:]
        for login in WRONG_LOGINS
    ),
)


@dataclass(frozen=True)
class Upstream:
    """An upstream of this kind that serves an image, and a daemon that has its configuration."""

    name: str
    certificate: str
    """The common name of its certificate."""
    repository: str
    image: Image
    """Its image, by the tag 1."""
    daemon: Daemon
    registry: DockerRegistry
    tokens: TokenService | None

    @property
    def ref(self) -> str:
        """skopeo's name of the image at the daemon."""
        return f"{self.daemon.host}/{self.name}/{self.repository}:1"

    @property
    def url(self) -> str:
        """The URL of the image's manifest at the daemon."""
        return f"{self.daemon.url}/v2/{self.name}/{self.repository}/manifests/1"


class Matrix:
    """Upstreams of all kinds, each started on demand at a separate address, and a daemon configured for them all.

    There are two daemons: requests that concern the operating system's trust store go to one whose trust store
    contains the upstreams' authority.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._numbers = itertools.count(1)
        self._authority = Authority(folder / "authority")
        self._stranger = Authority(folder / "stranger", "stranger")
        self._clients = Authority(folder / "clients", "client authority")
        self._identities = {
            "right_client": self._clients.issue("client"),
            "wrong_client": self._stranger.issue("client"),
        }
        self._htpasswd = write_htpasswd(folder / "htpasswd", {USER: PASSWORD})
        self._open = DockerRegistry(folder / "open")
        self._addresses = {cell: own_address() for cell in CELLS}
        self._daemons = {
            False: Daemon(folder, self._entries(trusting=False)),
            True: TrustingDaemon(folder, (self._authority.ca,), self._entries(trusting=True)),
        }
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        """Start the daemons."""
        with ExitStack() as stack:
            for server in (self._open, *self._daemons.values()):
                stack.enter_context(server)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the daemons; none may have logged an unhandled failure, or a password."""
        self._stack.close()
        for daemon in self._daemons.values():
            for never in ("Traceback (most recent call last)", "unhandled error", *_secrets()):
                assert never.lower() not in daemon.log.lower()

    @contextmanager
    def upstream(self, cell: Cell) -> Iterator[Upstream]:
        """Run an upstream of this kind, with an image not pulled yet, until the block ends."""
        number = next(self._numbers)
        folder = self._folder / f"{number}-{cell}"
        image, repository = make_image(folder, layers=1), f"team/app-{number}"
        self._open.push(repository, image, "1")
        address = self._addresses[cell]
        daemon = self._daemons[_concerns_trust_store(cell)]
        certificate = ELSEWHERE if cell.trust in ("other_host", "skip_verify") else address
        with ExitStack() as stack:
            tls = self._tls(cell, certificate) if cell.scheme == "https" else None
            tokens = stack.enter_context(self._token_service(address, tls)) if cell.auth == "token" else None
            registry = self._registry(stack, cell, folder, tls, tokens)
            yield Upstream(address, certificate, repository, image, daemon, registry, tokens)

    def _registry(
        self, stack: ExitStack, cell: Cell, folder: Path, tls: ServerTls | None, tokens: TokenService | None
    ) -> SecureRegistry:
        address, storage = self._addresses[cell], self._open.storage
        settings = tokens.settings if tokens else None
        htpasswd = self._htpasswd if cell.auth == "basic" else None
        if cell.front == "docker_registry" or tls is None:
            registry = SecureRegistry(folder, storage, address, tls=tls, htpasswd=htpasswd, tokens=settings)
            return stack.enter_context(registry)
        # At the same address, open, and in plain HTTP: no client may fall back to it.
        registry = stack.enter_context(SecureRegistry(folder, storage, address, tokens=settings))
        stack.enter_context(Nginx(folder / "nginx", registry.url, address, tls=tls, htpasswd=htpasswd))
        return registry

    def _tls(self, cell: Cell, name: str) -> ServerTls:
        issuer = self._stranger if cell.trust == "skip_verify" else self._authority
        pair = issuer.issue(name, expired=cell.trust in ("expired", "skip_verify"))
        return ServerTls(*pair, self._clients.ca if cell.demands_client else None)

    def _token_service(self, address: str, tls: ServerTls | None) -> TokenService:
        """Make a token service beside the registry.

        It refuses client certificates, which are for the registry alone.
        """
        context = tls.context_against_clients() if tls else None
        users = {USER: PASSWORD}
        return TokenService(self._clients, users, tls=context, address=address, port=TOKEN_PORT)

    def _entries(self, *, trusting: bool) -> dict[str, dict[str, object]]:
        """Return a daemon's configuration: the upstreams and their token services, which must be named too."""
        entries: dict[str, dict[str, object]] = {}
        for cell, address in self._addresses.items():
            if _concerns_trust_store(cell) == trusting:
                entries[address] = self._entry(cell)
                if cell.auth == "token":
                    entries[f"{address}:{TOKEN_PORT}"] = {"scheme": cell.scheme}
        return entries

    def _entry(self, cell: Cell) -> dict[str, object]:
        entry: dict[str, object] = {"scheme": cell.scheme}
        if cell.auth != "anonymous" and cell.login != "missing_login":
            entry["auth"] = {"user": USER, "password": PASSWORD[::-1] if cell.login else PASSWORD}
        tls: dict[str, object] = {}
        if cell.trust in ("private_ca", "expired", "other_host"):
            tls["ca"] = str(self._authority.ca)
        elif cell.trust == "wrong_ca":
            tls["ca"] = str(self._stranger.ca)
        elif cell.trust == "skip_verify":
            tls["insecure_skip_verify"] = True
        if cell.client in self._identities:
            tls["cert"], tls["key"] = map(str, self._identities[cell.client])
        return {**entry, "tls": tls} if tls else entry


def _secrets() -> list[str]:
    """Return the passwords, plain and as sent over the wire."""
    passwords = (PASSWORD, PASSWORD[::-1])
    return [*passwords, *(base64.b64encode(f"{USER}:{one}".encode()).decode() for one in passwords)]


def _concerns_trust_store(cell: Cell) -> bool:
    """Whether the upstream's authority is in the operating system's trust store. A `ca` replaces that."""
    return cell.trust in ("os_store", "wrong_ca")
