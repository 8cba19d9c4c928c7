"""Real tokens: which token services receive credentials, and how long tokens are used."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.certificates import Authority
from tests.client import fetch
from tests.images import Image, make_image
from tests.peers import DockerRegistry
from tests.processes import Daemon, free_port
from tests.real.caches import assert_error
from tests.secure_peers import SecureRegistry, ServerTls, own_address
from tests.token_service import JwtTokens, TokenService

StartDaemon = Callable[..., Daemon]

IMAGES = {tag: make_image(f"realms/{tag}", layers=1) for tag in "12"}
USER, PASSWORD = "operator", "tr0ub4dor:&3"
OFFERED = f"{USER}:{PASSWORD}"
OWN = "127.0.0.1"


@dataclass(frozen=True)
class Realms:
    """A registry on 127.0.0.1 that speaks TLS and accepts tokens, and services that issue them."""

    folder: Path
    storage: Path
    authority: Authority
    port: int

    @property
    def host(self) -> str:
        """The registry's host."""
        return f"{OWN}:{self.port}"

    def tokens(
        self, address: str = OWN, *, plain: bool = False, life: int = 300, anonymous: bool = False
    ) -> TokenService:
        """Make a token service, which the caller closes."""
        tls = None if plain else ServerTls(*self.authority.issue(address)).context_against_clients()
        return TokenService(
            self.authority, {} if anonymous else {USER: PASSWORD}, tls=tls, address=address, life=life
        )

    def registry(self, settings: Mapping[str, str]) -> SecureRegistry:
        """Make the registry, with these settings of its `auth: token`."""
        tls = ServerTls(*self.authority.issue(OWN))
        return SecureRegistry(self.folder, self.storage, OWN, self.port, tls=tls, tokens=settings)

    @contextmanager
    def serving(self, tokens: TokenService) -> Iterator[TokenService]:
        """Run both until the block ends."""
        with tokens, self.registry(tokens.settings):
            yield tokens

    def entry(self, **auth: str) -> dict[str, object]:
        """The registry's entry in the daemon's configuration."""
        return {"tls": {"ca": str(self.authority.ca)}, **({"auth": auth} if auth else {})}

    def login(self, **more: str) -> dict[str, object]:
        """The same with the correct user and password."""
        return self.entry(user=USER, password=PASSWORD, **more)


@pytest.fixture
def realms(registry: DockerRegistry, tmp_path: Path) -> Realms:
    """A registry with `IMAGES`."""
    for tag, image in IMAGES.items():
        registry.push("team/app", image, tag)
    return Realms(tmp_path / "secure", registry.storage, Authority(tmp_path / "authority"), free_port())


def _url(daemon: Daemon, tag: str) -> str:
    return f"{daemon.url}/v2/team/app/manifests/{tag}"


def _pull(daemon: Daemon, tag: str) -> None:
    image: Image = IMAGES[tag]
    assert fetch(_url(daemon, tag)).body == image.manifest.data
    for blob in image.blobs:
        assert fetch(f"{daemon.url}/v2/team/app/blobs/{blob.digest}").body == blob.data


@pytest.mark.parametrize("form", ["host", "url"])
def test_configured_token_service_on_another_host_gets_credentials(
    realms: Realms, start_daemon: StartDaemon, form: str
) -> None:
    with realms.serving(realms.tokens(own_address())) as tokens:
        realm = tokens.host if form == "host" else tokens.realm
        _pull(start_daemon({realms.host: realms.login(realm=realm)}, "--default-ns", realms.host), "1")
        assert tokens.offered == (OFFERED,)


def test_unconfigured_token_service_on_another_host_gets_no_credentials(
    realms: Realms, start_daemon: StartDaemon
) -> None:
    """As a compromised registry might send it: it is asked anonymously."""
    with realms.serving(realms.tokens(own_address())) as tokens:
        entries = {realms.host: realms.login(), tokens.host: {}}
        daemon = start_daemon(entries, "--default-ns", realms.host)
        assert_error(fetch(_url(daemon, "1")), 404, "MANIFEST_UNKNOWN")
        assert set(tokens.offered) == {None}
        assert tokens.realm in daemon.log


@pytest.mark.parametrize("named", [False, True], ids=["own_host", "named"])
def test_plain_http_token_service_gets_no_credentials(realms: Realms, start_daemon: StartDaemon, named: bool) -> None:
    """The registry speaks TLS, but an eavesdropper on the plain connection must not get the credentials."""
    with realms.serving(realms.tokens(plain=True)) as tokens:
        login = realms.login(realm=tokens.host) if named else realms.login()
        entries = {realms.host: login, tokens.host: {"scheme": "http"}}
        daemon = start_daemon(entries, "--default-ns", realms.host)
        assert_error(fetch(_url(daemon, "1")), 404, "MANIFEST_UNKNOWN")
        assert set(tokens.offered) == {None}


def test_unconfigured_token_service_on_loopback_is_not_contacted(realms: Realms, start_daemon: StartDaemon) -> None:
    """No upstream makes the daemon contact services on its own machine."""
    with realms.serving(realms.tokens(own_address())) as tokens:
        daemon = start_daemon({realms.host: realms.login()}, "--default-ns", realms.host)
        assert fetch(_url(daemon, "1")).status == 403
        assert tokens.connections == 0
        assert realms.host in daemon.log


def test_anonymous_tokens(realms: Realms, start_daemon: StartDaemon) -> None:
    """As public registries do it."""
    with realms.serving(realms.tokens(anonymous=True)) as tokens:
        entries = {realms.host: realms.entry(), tokens.host: {}}
        _pull(start_daemon(entries, "--default-ns", realms.host), "1")
        assert tokens.offered == (None,)


@pytest.mark.parametrize(("life", "fetched"), [(300, 1), (1, 2)])
def test_token_is_reused_until_it_expires(realms: Realms, start_daemon: StartDaemon, life: int, fetched: int) -> None:
    with realms.serving(realms.tokens(life=life)) as tokens:
        entries = {realms.host: realms.login(), tokens.host: {}}
        daemon = start_daemon(entries, "--default-ns", realms.host)
        assert fetch(_url(daemon, "1")).status == 200
        time.sleep(min(life, 1))
        assert fetch(_url(daemon, "2")).status == 200
        assert tokens.offered == (OFFERED,) * fetched


def test_token_that_the_registry_rejects_is_replaced(realms: Realms, start_daemon: StartDaemon) -> None:
    """The service has a new key, and the registry knows it."""
    other = Authority(realms.folder / "other")
    with realms.tokens() as tokens:
        entries = {realms.host: realms.login(), tokens.host: {}}
        daemon = start_daemon(entries, "--default-ns", realms.host)
        with realms.registry(tokens.settings):
            _pull(daemon, "1")
        tokens.script("/token", JwtTokens(*other.issue("token service"), {USER: PASSWORD}))
        with realms.registry({**tokens.settings, "rootcertbundle": str(other.ca)}):
            _pull(daemon, "2")
        assert tokens.offered == (OFFERED, OFFERED)
