"""Registries that authenticate clients do so with skopeo, without our daemon in between."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.certificates import Authority
from tests.images import make_image
from tests.peers import DockerRegistry
from tests.secure_peers import Nginx, SecureRegistry, ServerTls, own_address, write_htpasswd
from tests.token_service import JwtTokens, TokenService

Skopeo = Callable[..., None]

USER, PASSWORD = "operator", "tr0ub4dor:&3"
RIGHT, WRONG = f"{USER}:{PASSWORD}", f"{USER}:{PASSWORD[::-1]}"
UNAUTHORIZED = "unauthorized"


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    """An authority for servers and clients."""
    return Authority(tmp_path / "authority")


@pytest.fixture
def pull(skopeo: Skopeo, tmp_path: Path, authority: Authority) -> Callable[..., None]:
    """Pull from a host with these credentials, with or without the authority's client certificate."""
    trusting, known = tmp_path / "trusting", tmp_path / "known"
    for folder in (trusting, known):
        folder.mkdir()
        shutil.copy(authority.ca, folder / "ca.crt")
    certificate, key = authority.issue("client")
    shutil.copy(certificate, known / "client.cert")
    shutil.copy(key, known / "client.key")

    def pull(host: str, login: str, *, certified: bool = True) -> None:
        options = ["--src-tls-verify=true", "--src-creds", login, "--src-cert-dir"]
        skopeo(f"{host}/team/app:1", f"dir:{tmp_path}/copy", *options, str(known if certified else trusting))

    return pull


@pytest.fixture(params=["docker_registry", "nginx"])
def host(
    request: pytest.FixtureRequest, registry: DockerRegistry, authority: Authority, tmp_path: Path
) -> Iterator[str]:
    """The host of a registry that requires a client certificate, a user and a password."""
    registry.push("team/app", make_image("secure", layers=1), "1")
    htpasswd = write_htpasswd(tmp_path / "htpasswd", {USER: PASSWORD})
    host = own_address()
    tls = ServerTls(*authority.issue(host), authority.ca)
    with ExitStack() as stack:
        if request.param == "nginx":
            stack.enter_context(Nginx(tmp_path / "nginx", registry.url, host, tls=tls, htpasswd=htpasswd))
        else:
            folder = tmp_path / "secure"
            stack.enter_context(SecureRegistry(folder, registry.storage, host, tls=tls, htpasswd=htpasswd))
        yield host


def test_passwords_and_client_certificates(host: str, pull: Callable[..., None]) -> None:
    pull(host, RIGHT)
    with pytest.raises(RuntimeError, match=UNAUTHORIZED):
        pull(host, WRONG)
    with pytest.raises(RuntimeError, match=r"tls: bad certificate|400 \(Bad Request\)"):
        pull(host, RIGHT, certified=False)


def test_tokens_need_a_password_and_expire(
    registry: DockerRegistry, authority: Authority, pull: Callable[..., None], tmp_path: Path
) -> None:
    """A request for a token needs the password but no client certificate; an expired token is refused."""
    registry.push("team/app", make_image("secure", layers=1), "1")
    host = own_address()
    tls = ServerTls(*authority.issue(host))
    with (
        TokenService(authority, {USER: PASSWORD}, tls=tls.context_against_clients(), address=host) as tokens,
        SecureRegistry(tmp_path / "secure", registry.storage, host, tls=tls, tokens=tokens.settings),
    ):
        pull(host, RIGHT, certified=False)
        with pytest.raises(RuntimeError, match=UNAUTHORIZED):
            pull(host, WRONG, certified=False)
        assert tokens.offered == (RIGHT, WRONG)
        # The server's alert may come after the client has begun to write.
        with pytest.raises(RuntimeError, match=r"bad certificate|unknown certificate|broken pipe|reset by peer"):
            pull(host, RIGHT)
        assert tokens.offered == (RIGHT, WRONG)
        stale = JwtTokens(*authority.issue("token service"), {USER: PASSWORD}, life=-3600)
        tokens.script("/token", stale)
        with pytest.raises(RuntimeError, match=UNAUTHORIZED):
            pull(host, RIGHT, certified=False)
