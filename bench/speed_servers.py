"""The servers of the benchmark of speed, and the upstream of all of them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from bench.badlink_caches import Drayage, missing
from tests.client import fetch
from tests.images import OCI_MANIFEST, Image, make_image
from tests.peers import DockerRegistry, missing_package
from tests.processes import Daemon, Server, answers, free_port
from tests.secure_peers import ServerTls, speaks_tls

ADDRESS = "127.0.0.1"
REPOSITORY, TAG = "bench/app", "1"
SMALL_LAYER = 18_000
"""Bytes of the small layer's file; in tar's records they make a blob of 20 kB."""

_ENDS = 30
"""Seconds."""

_TEMPORARY = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
_FETCHED = re.compile(r"^GET \S+/(?:blobs|manifests)/sha256:", re.MULTILINE)


@dataclass(frozen=True)
class Part:
    """A manifest or a blob: its path in the repository, its digest and its size in bytes."""

    path: str
    digest: str
    size: int


@dataclass(frozen=True)
class Content:
    """The image at the upstream: its manifest by tag and by digest, its config, a small layer and a big one."""

    by_tag: Part
    by_digest: Part
    config: Part
    small: Part
    big: Part

    @property
    def parts(self) -> tuple[Part, ...]:
        """All of them, in the order of a pull."""
        return (self.by_tag, self.by_digest, self.config, self.small, self.big)


def write_content(folder: Path, big: int) -> Content:
    """Write the files of a static registry below `folder`; the big layer holds a file of that many bytes."""
    small_image = make_image("speed/small", layers=1, layer_size=SMALL_LAYER)
    image = make_image("speed/big", layers=1, layer_size=big, base=small_image)
    root = folder / "v2" / REPOSITORY
    for name in ("manifests", "blobs"):
        (root / name).mkdir(parents=True)
    for reference in (TAG, image.manifest.digest):
        (root / "manifests" / reference).write_bytes(image.manifest.data)
    for blob in image.blobs:
        (root / "blobs" / blob.digest).write_bytes(blob.data)
    return _content(image)


def _content(image: Image) -> Content:
    manifest, size = image.manifest.digest, len(image.manifest.data)
    by_tag, by_digest = (Part(f"manifests/{reference}", manifest, size) for reference in (TAG, manifest))
    blobs = (Part(f"blobs/{blob.digest}", blob.digest, len(blob.data)) for blob in image.blobs)
    return Content(by_tag, by_digest, *blobs)


class Nginx(Server):
    """An nginx with its files in a folder; by default with a worker for each core, as Debian configures it.

    `http` are further lines of its section http.
    """

    def __init__(self, folder: Path, port: int, http: str, workers: str = "auto") -> None:
        self.port = port
        folder.mkdir(parents=True, exist_ok=True)
        temporary = "".join(f"{kind}_temp_path {folder}/{kind};\n" for kind in _TEMPORARY)
        # The workers of a master that runs as root would be another user, who cannot read a temporary folder.
        user = "user root;\n" if os.geteuid() == 0 else ""
        config = folder / "nginx.conf"
        config.write_text(
            f"{user}worker_processes {workers};\ndaemon off;\npid {folder}/nginx.pid;\n"
            "events { worker_connections 1024; }\n"
            f"http {{\nsendfile on;\ntcp_nopush on;\n{temporary}{http}}}\n"
        )
        super().__init__(["nginx", "-p", str(folder), "-c", str(config), "-e", "stderr"], folder / "nginx.log")

    def ready(self) -> bool:
        """Whether it answers."""
        return answers(f"http://{ADDRESS}:{self.port}/ready")

    def kill(self) -> None:
        """End the master by SIGTERM, which ends its workers at once; they would outlive a SIGKILL."""
        self.process.terminate()
        self.process.wait(_ENDS)


_READY = "location = /ready { return 200; }\n"


class Upstream(Nginx):
    """The upstream of all servers: an nginx that serves the files of `write_content`, and logs its requests."""

    def __init__(self, folder: Path, big: int) -> None:
        self.content = write_content(folder / "root", big)
        port = free_port()
        self.host = f"{ADDRESS}:{port}"
        self.url = f"http://{self.host}"
        self._access_log = folder / "access.log"
        version = "add_header Docker-Distribution-Api-Version registry/2.0;"
        digest = f"add_header Docker-Content-Digest {self.content.by_tag.digest};"
        http = (
            f"log_format request '$request_method $uri';\naccess_log {self._access_log} request;\n"
            f"server {{\nlisten {self.host};\nroot {folder}/root;\n{_READY}"
            f"location = /v2/ {{ {version} default_type application/json; return 200 '{{}}'; }}\n"
            f"location /v2/{REPOSITORY}/manifests/ {{ {version} {digest} default_type {OCI_MANIFEST}; }}\n"
            f"location /v2/{REPOSITORY}/blobs/ {{ {version} default_type application/octet-stream; }}\n}}\n"
        )
        super().__init__(folder, port, http, workers="1")

    @property
    def fetched(self) -> int:
        """How many blobs and manifests were fetched by digest so far."""
        # Its only worker logs an answer before it turns to another request.
        fetch(f"{self.url}/ready")
        return len(_FETCHED.findall(self._access_log.read_text()))


@dataclass(frozen=True)
class Place:
    """Where a server runs: its folder, its upstream, its certificate when it speaks TLS, and the code of some."""

    folder: Path
    upstream: Upstream
    tls: ServerTls | None = None
    drayage: Path | None = None
    """Its program."""
    before: Path | None = None
    """A checkout of an earlier commit."""

    @property
    def scheme(self) -> str:
        """The scheme that clients use."""
        return "https" if self.tls else "http"


@dataclass(frozen=True)
class Cache:
    """A server that is not started yet, and what encloses a path in the repository to a URL."""

    server: Server
    base: str
    query: str = ""

    def url(self, part: Part) -> str:
        """Return the URL of a manifest or blob."""
        return f"{self.base}/v2/{REPOSITORY}/{part.path}{self.query}"


class _SecureDaemon(Daemon):
    def ready(self) -> bool:
        return speaks_tls(ADDRESS, self.port)


def ours(place: Place) -> Cache:
    """Make our daemon, with its default log level."""
    kind = _SecureDaemon if place.tls else Daemon
    keys = {"cert": str(place.tls.certificate), "key": str(place.tls.key)} if place.tls else {}
    settings = {"tls": keys} if keys else {}
    daemon = kind(place.folder, {place.upstream.host: "http"}, "--log-level", "error", settings=settings)
    return Cache(daemon, f"{place.scheme}://{daemon.host}", f"?ns={place.upstream.host}")


def before(place: Place) -> Cache:
    """Make the daemon of an earlier commit.

    Raises:
        RuntimeError: the place has no checkout of one.
    """
    if place.before is None:
        raise RuntimeError("no checkout is given")
    cache = ours(place)
    server = cache.server
    # The current folder would come first.
    server.environment |= {"PYTHONPATH": str(place.before), "PYTHONSAFEPATH": "1"}
    if not _has_admin_listener(place.before):
        option = server.argv.index("--admin-listen")
        del server.argv[option : option + 2]
    return cache


def _has_admin_listener(checkout: Path) -> bool:
    return (checkout / "ociregistry" / "web" / "admin.py").exists()


class _Proxy(DockerRegistry):
    """A docker-registry as proxy that logs errors only, and caches descriptors, as Debian configures it."""

    def __init__(self, place: Place) -> None:
        self._secure = place.tls is not None
        port = free_port()
        http: dict[str, object] = {"addr": f"{ADDRESS}:{port}"}
        if place.tls:
            http["tls"] = {"certificate": str(place.tls.certificate), "key": str(place.tls.key)}
        sections: Mapping[str, Mapping[str, object]] = {
            "proxy": {"remoteurl": place.upstream.url},
            "log": {"level": "error", "accesslog": {"disabled": True}},
            "storage": {
                "cache": {"blobdescriptor": "inmemory"},
                "filesystem": {"rootdirectory": str(place.folder / "storage")},
            },
            "http": http,
        }
        super().__init__(place.folder, ADDRESS, port, sections=sections)

    def ready(self) -> bool:
        return speaks_tls(ADDRESS, self.port) if self._secure else super().ready()


def docker_registry(place: Place) -> Cache:
    """Make Debian's docker-registry as a proxy."""
    proxy = _Proxy(place)
    return Cache(proxy, f"{place.scheme}://{proxy.host}")


class _CachingNginx(Nginx):
    def __init__(self, place: Place) -> None:
        port = free_port()
        self._secure = place.tls is not None
        listen = f"listen {ADDRESS}:{port};\n"
        if place.tls:
            listen = (
                f"listen {ADDRESS}:{port} ssl;\nssl_certificate {place.tls.certificate};\n"
                f"ssl_certificate_key {place.tls.key};\n"
            )
        http = (
            f"access_log off;\nproxy_cache_path {place.folder}/cache keys_zone=cache:10m inactive=1d max_size=100g;\n"
            f"server {{\n{listen}{_READY}"
            f"location / {{\nproxy_pass {place.upstream.url};\nproxy_http_version 1.1;\n"
            "proxy_cache cache;\nproxy_cache_valid 200 1d;\nproxy_cache_lock on;\nproxy_cache_key $request_uri;\n"
            "}\n}\n"
        )
        super().__init__(place.folder, port, http)

    def ready(self) -> bool:
        return speaks_tls(ADDRESS, self.port) if self._secure else super().ready()


def nginx(place: Place) -> Cache:
    """Make an nginx with proxy_cache."""
    server = _CachingNginx(place)
    return Cache(server, f"{place.scheme}://{ADDRESS}:{server.port}")


def drayage(place: Place) -> Cache:
    """Make drayage, which speaks no TLS with a given certificate.

    Raises:
        RuntimeError: the place has no program of drayage, or wants TLS.
    """
    if place.drayage is None or place.tls:
        raise RuntimeError("drayage cannot run there")
    server = Drayage(place.drayage, place.folder, place.upstream.url)
    server.environment["RUST_LOG"] = "error"
    return Cache(server, server.url)


OURS, NGINX, DOCKER_REGISTRY, DRAYAGE = "ociregistry", "nginx", "docker-registry", "drayage"
BEFORE = "before"
SERVERS: Mapping[str, Callable[[Place], Cache]] = {
    OURS: ours,
    DOCKER_REGISTRY: docker_registry,
    NGINX: nginx,
    DRAYAGE: drayage,
    BEFORE: before,
}
WITHOUT_TLS = frozenset({DRAYAGE})


def missing_server(name: str, root: Path, program: Path | None) -> str | None:
    """Return why a server cannot run, or None. Without its `program`, drayage is installed below `root`."""
    if name == BEFORE:
        return None
    if name == NGINX:
        package = missing_package(name)
        return package and f"not installed: apt-get install {package}"
    if name == DRAYAGE and program:
        return None if os.access(program, os.X_OK) else f"{program} cannot be executed"
    return missing(name, root)
