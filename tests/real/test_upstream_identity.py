"""Certificates of real registries beyond the matrix: names, chains, and untrusted issuers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.certificates import Authority
from tests.client import fetch
from tests.images import digest_of, make_image
from tests.peers import DockerRegistry
from tests.processes import Daemon, free_port
from tests.real.caches import assert_error, error_lines
from tests.secure_peers import SecureRegistry, ServerTls
from tests.trust_store import TrustingDaemon
from tests.upstream import ScriptedRegistry
from tests.upstream_rules import Redirect

Skopeo = Callable[..., None]
StartDaemon = Callable[..., Daemon]

IMAGE = make_image("identity", layers=1)


@pytest.fixture
def storage(registry: DockerRegistry) -> Path:
    """The storage of a registry with an image."""
    registry.push("team/app", IMAGE, "1")
    return registry.storage


@dataclass(frozen=True)
class Pulling:
    """Pulls from a registry on 127.0.0.1 that presents a certificate, as `localhost`, or by its address."""

    storage: Path
    start_daemon: StartDaemon
    skopeo: Skopeo
    folder: Path

    def succeeds(self, tls: ServerTls, entry: Mapping[str, object], host: str = "localhost") -> None:
        """Assert that skopeo gets the image with `entry` as the registry's configuration."""
        with self._daemon(tls, entry, host) as (daemon, _):
            self.skopeo(f"{daemon.host}/team/app:1", f"dir:{self.folder}/copy")
            assert error_lines(daemon, 0) == []
        copied = {digest_of(file.read_bytes()) for file in (self.folder / "copy").iterdir()}
        assert copied > {IMAGE.manifest.digest, *(blob.digest for blob in IMAGE.blobs)}

    def fails(self, tls: ServerTls, entry: Mapping[str, object], why: str, host: str = "localhost") -> None:
        """Assert that the client gets 503, and that the only error line names the upstream and `why`."""
        with self._daemon(tls, entry, host) as (daemon, upstream):
            assert_error(fetch(f"{daemon.url}/v2/team/app/manifests/1"), 503, "UNAVAILABLE")
            (line,) = error_lines(daemon, 0)
            told = line.partition(": 503 UNAVAILABLE: ")[2]
            assert f"{upstream}: TLS failed: {why}" in told

    @contextmanager
    def _daemon(self, tls: ServerTls, entry: Mapping[str, object], host: str) -> Iterator[tuple[Daemon, str]]:
        port = free_port()
        upstream = f"{host}:{port}"
        with SecureRegistry(self.folder / "secure", self.storage, "127.0.0.1", port, tls=tls):
            yield self.start_daemon({upstream: entry}, "--default-ns", upstream), upstream


@pytest.fixture
def pulling(storage: Path, start_daemon: StartDaemon, skopeo: Skopeo, tmp_path: Path) -> Pulling:
    """Pulls from a registry with `IMAGE`."""
    return Pulling(storage, start_daemon, skopeo, tmp_path)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    """An authority unknown to the operating system."""
    return Authority(tmp_path / "authority")


def _entry(authority: Authority) -> dict[str, object]:
    return {"tls": {"ca": str(authority.ca)}}


def test_certificate_for_the_host_name_is_accepted(pulling: Pulling, authority: Authority) -> None:
    """No scheme is configured: https is tried first."""
    pulling.succeeds(ServerTls(*authority.issue("registry.example", "localhost")), _entry(authority))


@pytest.mark.parametrize(("host", "proven"), [("localhost", "127.0.0.1"), ("127.0.0.1", "localhost")])
def test_certificate_for_another_name_or_address_is_refused(
    pulling: Pulling, authority: Authority, host: str, proven: str
) -> None:
    why = f"the certificate of CN={proven} is refused: it is for another host name"
    pulling.fails(ServerTls(*authority.issue(proven)), _entry(authority), why, host)


def test_certificate_chains_of_server_and_client(pulling: Pulling, authority: Authority) -> None:
    between = Authority(authority.ca.parent, "authority between", authority)
    certificate, key = map(str, between.issue("client"))
    entry = {"tls": {"ca": str(authority.ca), "cert": certificate, "key": key}}
    pulling.succeeds(ServerTls(*between.issue("localhost"), authority.ca), entry)


def test_intermediate_authority_can_be_trusted(pulling: Pulling, authority: Authority) -> None:
    between = Authority(authority.ca.parent, "authority between", authority)
    pulling.succeeds(ServerTls(*between.issue("localhost")), _entry(between))


def test_incomplete_certificate_chain_is_refused(pulling: Pulling, authority: Authority) -> None:
    """A common mistake: the server presents its own certificate alone."""
    between = Authority(authority.ca.parent, "authority between", authority)
    certificate, key = between.issue("localhost")
    end = "-----END CERTIFICATE-----\n"
    certificate.write_text(certificate.read_text().partition(end)[0] + end)
    why = "the certificate of CN=localhost is refused: its issuer is not trusted"
    pulling.fails(ServerTls(certificate, key), _entry(authority), why)


def test_private_authority_is_not_trusted_by_default(pulling: Pulling, authority: Authority) -> None:
    why = "the certificate of CN=localhost is refused: its issuer is not trusted"
    pulling.fails(ServerTls(*authority.issue("localhost")), {"scheme": "https"}, why)


def test_self_signed_certificate_is_refused(pulling: Pulling, tmp_path: Path) -> None:
    """As appliances have by default."""
    tls = ServerTls(*Authority.self_signed(tmp_path / "self", "localhost"))
    pulling.fails(tls, {"scheme": "https"}, "the certificate of CN=localhost is refused: it is self-signed")


def test_self_signed_certificate_can_be_trusted(pulling: Pulling, tmp_path: Path) -> None:
    tls = ServerTls(*Authority.self_signed(tmp_path / "self", "localhost"))
    pulling.succeeds(tls, {"tls": {"ca": str(tls.certificate)}})


def test_private_registry_redirecting_to_public_storage(authority: Authority, skopeo: Skopeo, tmp_path: Path) -> None:
    """skopeo, which adds a registry's authority to those of the system, pulls from such registries."""
    public = Authority(tmp_path / "public", "public authority")
    with (
        ScriptedRegistry(tls=authority.server_context("localhost")) as registry,
        ScriptedRegistry(tls=public.server_context("127.0.0.1")) as storage,
    ):
        for one in (registry, storage):
            one.add("team/app", IMAGE, "1")
        registry.script("*/blobs/*", Redirect(storage.url))
        upstream = f"localhost:{registry.port}"
        entries = {upstream: _entry(authority), storage.host: "https"}
        with TrustingDaemon(tmp_path, (public.ca,), entries, "--default-ns", upstream) as daemon:
            skopeo(f"{daemon.host}/team/app:1", f"dir:{tmp_path}/copy")
            assert error_lines(daemon, 0) == []
        assert {request.path for request in storage.requests} == {
            f"/v2/team/app/blobs/{blob.digest}" for blob in IMAGE.blobs
        }
