"""Real registries that authenticate their clients: docker-registry itself, and nginx in front of one."""

from __future__ import annotations

import ctypes
import itertools
import os
import socket
import ssl
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.peers import DockerRegistry
from tests.processes import Server

HTTP, HTTPS = 80, 443

_HOSTS = itertools.count(1)
_COST_AND_SALT = "$2b$04$ociregistryociregistr."
_ASKING_TIMEOUT = 5.0
_TEMPORARY = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")


def own_address() -> str:
    """Return a loopback address unique to this process, for servers whose name has no port."""
    pid = os.getpid()
    return f"127.{128 + (pid >> 8) % 128}.{pid & 255}.{next(_HOSTS) % 254 + 1}"


def write_htpasswd(path: Path, users: Mapping[str, str]) -> Path:
    """Write users and passwords with bcrypt, the only hash that docker-registry accepts; nginx accepts it too."""
    path.write_text("".join(f"{user}:{_bcrypt(password)}\n" for user, password in users.items()))
    return path


def _bcrypt(password: str) -> str:
    library = ctypes.CDLL("libcrypt.so.1")
    library.crypt.restype = ctypes.c_char_p
    hashed: bytes | None = library.crypt(password.encode(), _COST_AND_SALT.encode())
    if hashed is None or not hashed.startswith(b"$2b$"):
        raise RuntimeError(f"libcrypt knows no bcrypt: {hashed!r}")
    return hashed.decode()


@dataclass(frozen=True)
class ServerTls:
    """A server's certificate and key, and the authority whose certificates it demands from clients."""

    certificate: Path
    key: Path
    client_ca: Path | None = None

    def context_against_clients(self) -> ssl.SSLContext:
        """Make the TLS context of a Python server that requests client certificates, and refuses every one."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.certificate, self.key)
        context.verify_mode = ssl.CERT_OPTIONAL  # An empty list of authorities: none is accepted.
        return context


class SecureRegistry(DockerRegistry):
    """A docker-registry that serves the `storage` of another one, on the scheme's default port.

    Only the users of `htpasswd` are admitted, or the holders of `tokens`, the settings of its `auth: token`.
    """

    def __init__(
        self,
        folder: Path,
        storage: Path,
        address: str,
        port: int | None = None,
        *,
        tls: ServerTls | None = None,
        htpasswd: Path | None = None,
        tokens: Mapping[str, str] | None = None,
    ) -> None:
        self._address, self._tls = address, tls
        own_port = HTTPS if tls else HTTP
        port = port or own_port
        host = address if port == own_port else f"{address}:{port}"
        http: dict[str, object] = {"addr": f"{address}:{port}"}
        sections: dict[str, Mapping[str, object]] = {"http": http}
        if tls:
            client_ca = {"clientcas": [str(tls.client_ca)]} if tls.client_ca else {}
            http["tls"] = {"certificate": str(tls.certificate), "key": str(tls.key), **client_ca}
        if htpasswd:
            sections["auth"] = {"htpasswd": {"realm": "test", "path": str(htpasswd)}}
        elif tokens:
            sections["auth"] = {"token": tokens}
        super().__init__(folder, address, port, storage=storage, sections=sections)
        self.host = host
        self.url = f"{'https' if tls else 'http'}://{host}"

    def ready(self) -> bool:
        """Whether it speaks TLS, or answers."""
        return speaks_tls(self._address, self.port) if self._tls else super().ready()


class Nginx(Server):
    """An nginx on port 443 that speaks TLS in front of the server at the URL `behind`, with its files in a folder."""

    def __init__(
        self, folder: Path, behind: str, address: str, *, tls: ServerTls, htpasswd: Path | None = None
    ) -> None:
        self._address = address
        folder.mkdir(parents=True, exist_ok=True)
        site = [
            f"listen {address}:{HTTPS} ssl",
            f"ssl_certificate {tls.certificate}",
            f"ssl_certificate_key {tls.key}",
        ]
        if tls.client_ca:
            site += ["ssl_verify_client on", f"ssl_client_certificate {tls.client_ca}"]
        if htpasswd:
            site += ["auth_basic test", f"auth_basic_user_file {htpasswd}"]
        config = folder / "nginx.conf"
        config.write_text(
            # A single process, so that no worker outlives it.
            f"daemon off; master_process off; pid {folder}/nginx.pid;\n"
            f"events {{}}\nhttp {{\naccess_log {folder}/access.log;\n"
            f"{_statements(f'{kind}_temp_path {folder}/{kind}' for kind in _TEMPORARY)}"
            f"server {{\n{_statements(site)}"
            f"location / {{ proxy_pass {behind}; proxy_http_version 1.1; proxy_set_header Host $http_host; }}\n"
            "}\n}\n"
        )
        argv = ["nginx", "-p", str(folder), "-c", str(config), "-e", "stderr"]
        super().__init__(argv, folder / "nginx.log")

    def ready(self) -> bool:
        """Whether it speaks TLS."""
        return speaks_tls(self._address, HTTPS)


def _statements(statements: Iterable[str]) -> str:
    return "".join(f"{statement};\n" for statement in statements)


def speaks_tls(address: str, port: int) -> bool:
    """Whether a server there completes a TLS handshake; its certificate is not verified."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with (
            socket.create_connection((address, port), timeout=_ASKING_TIMEOUT) as connection,
            context.wrap_socket(connection),
        ):
            return True
    except OSError:
        return False
