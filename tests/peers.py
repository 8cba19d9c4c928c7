"""The real programs around the daemon: a registry as upstream, containerd and skopeo as clients, Prometheus."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote, urlencode

from tests.client import Response, fetch
from tests.images import Blob, Image, Index
from tests.processes import Server, answers, free_port, run

PACKAGES = {
    "docker-registry": "docker-registry",
    "containerd": "containerd",
    "ctr": "containerd",
    "skopeo": "skopeo",
    "nginx": "nginx-light",
    "tinyproxy": "tinyproxy",
    "update-ca-certificates": "ca-certificates",
    "unshare": "util-linux",
    "mount": "mount",
    "wrk": "wrk",
    "prometheus": "prometheus",
    "promtool": "prometheus",
    "chromium": "chromium",
    "chromedriver": "chromium-driver",
    "pngquant": "pngquant",
    "glusterd": "glusterfs-server",
    "syncthing": "syncthing",
}
NOWHERE = "http://127.0.0.1:1"

_ACCESS = re.compile(r'"([A-Z]+) (\S+) HTTP/1\.[01]" (\d+) (\d+)')
# Not needed for pulls; they would need kernel modules, cgroups or folders elsewhere.
_DISABLED = [
    "io.containerd.grpc.v1.cri",
    "io.containerd.internal.v1.opt",
    "io.containerd.internal.v1.restart",
    "io.containerd.internal.v1.tracing",
    "io.containerd.monitor.v1.cgroups",
    "io.containerd.runtime.v1.linux",
    "io.containerd.snapshotter.v1.aufs",
    "io.containerd.snapshotter.v1.btrfs",
    "io.containerd.snapshotter.v1.devmapper",
    "io.containerd.snapshotter.v1.zfs",
    "io.containerd.tracing.processor.v1.otlp",
]


def missing_package(program: str) -> str | None:
    """Return the Debian package to install when this program of `PACKAGES` is missing."""
    return None if shutil.which(program) else PACKAGES[program]


@dataclass(frozen=True)
class Access:
    """One line of an access log."""

    method: str
    path: str
    status: int
    sent: int


class DockerRegistry(Server):
    """Debian's docker-registry (CNCF distribution) on a loopback address, plain HTTP, with its files in a folder.

    After `kill` or `terminate`, `start` restarts it on the same port with its content. On port 80 its name `host` is
    the address alone. It can share the `storage` of another one. `sections` are further sections of its
    configuration.
    """

    def __init__(
        self,
        folder: Path,
        address: str = "127.0.0.1",
        port: int | None = None,
        *,
        storage: Path | None = None,
        sections: Mapping[str, Mapping[str, object]] | None = None,
    ) -> None:
        self.port = port or free_port()
        self.host = address if self.port == 80 else f"{address}:{self.port}"
        self.url = f"http://{self.host}"
        folder.mkdir(parents=True, exist_ok=True)
        self.storage = storage or folder / "storage"
        config = folder / "config.yml"
        settings: dict[str, object] = {
            "version": "0.1",
            "log": {"level": "info", "accesslog": {"disabled": False}},
            "storage": {"filesystem": {"rootdirectory": str(self.storage)}},
            "http": {"addr": f"{address}:{self.port}"},
            **(sections or {}),
        }
        config.write_text(json.dumps(settings))  # JSON is valid YAML.
        super().__init__(["docker-registry", "serve", str(config)], folder / "docker-registry.log")

    def ready(self) -> bool:
        """Whether it answers; the check does not use /v2/, where tests count requests."""
        return answers(f"{self.url}/")

    def push(self, repository: str, what: Image | Index, *tags: str) -> None:
        """Upload an image or an index with all its blobs."""
        for blob in what.blobs:
            self._push_blob(repository, blob)
        for manifest in what.manifests:
            for reference in tags if manifest is what.manifest and tags else (manifest.digest,):
                url = f"{self.url}/v2/{repository}/manifests/{reference}"
                _put(url, manifest.data, manifest.media_type)

    def _push_blob(self, repository: str, blob: Blob) -> None:
        begun = fetch(f"{self.url}/v2/{repository}/blobs/uploads/", method="POST")
        _expect(202, begun)
        url = f"{begun.headers['Location']}&digest={quote(blob.digest)}"
        _put(url, blob.data, "application/octet-stream")

    @property
    def requests(self) -> tuple[Access, ...]:
        """Return its access log so far, pushes included."""
        lines = (Access(line[1], line[2], int(line[3]), int(line[4])) for line in _ACCESS.finditer(self.log))
        return tuple(line for line in lines if line.path != "/")

    def count(self, method: str | None = None, path: str = "") -> int:
        """Count the requests with this method (None: any) for paths with this prefix."""
        return sum(method in (None, line.method) and line.path.startswith(path) for line in self.requests)


class Containerd(Server):
    """A separate containerd with all its files in one folder, driven by `ctr`."""

    def __init__(self, folder: Path) -> None:
        self._kept = (folder / "root", folder / "state")
        self._address = folder / "containerd.sock"
        config = folder / "config.toml"
        config.write_text(
            "version = 2\n"
            f'root = "{self._kept[0]}"\nstate = "{self._kept[1]}"\n'
            f"disabled_plugins = {json.dumps(_DISABLED)}\n"
            f'[grpc]\naddress = "{self._address}"\n'
        )
        super().__init__(["containerd", "--config", str(config)], folder / "containerd.log")
        self.snapshotter = ""
        """What unpacks images on this machine; known when it has started."""

    def ready(self) -> bool:
        """Whether it answers ctr."""
        return self.ctr("version").returncode == 0

    def start(self) -> Self:
        """Start it, and find a snapshotter that works on this machine."""
        super().start()
        plugins = _checked(self.ctr("plugins", "ls"))
        overlayfs = re.search(r"^io\.containerd\.snapshotter\.v1 +overlayfs .* ok *$", plugins, re.MULTILINE)
        self.snapshotter = "overlayfs" if overlayfs else "native"
        return self

    def ctr(self, *arguments: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        """Run ctr against it; the caller checks the return code."""
        return run(["ctr", "--address", str(self._address), *arguments], check=False, timeout=timeout)

    def pull(
        self, ref: str, hosts_dir: Path | None = None, *options: str, timeout: float = 120
    ) -> subprocess.CompletedProcess[str]:
        """Pull and unpack this platform's image, by the mirrors of `hosts_dir`, else over plain HTTP.

        The caller checks the return code.
        """
        hosts = ["--plain-http"] if hosts_dir is None else ["--hosts-dir", str(hosts_dir)]
        chosen = ["--snapshotter", self.snapshotter]
        return self.ctr("images", "pull", *hosts, *chosen, *options, ref, timeout=timeout)

    def remove(self, ref: str) -> None:
        """Remove an image and its content, so that the next pull fetches everything."""
        _checked(self.ctr("images", "rm", "--sync", ref))

    def wipe(self) -> None:
        """Remove everything, also the leftovers of a failed pull, and restart."""
        self.kill()
        for folder in self._kept:
            shutil.rmtree(folder)
        self.start()

    @property
    def content(self) -> frozenset[str]:
        """Return the digests of its content: manifests, configs and layers."""
        return frozenset(_checked(self.ctr("content", "ls", "-q")).split())

    def unpacked(self, ref: str) -> bool:
        """Whether the image is complete and its file system ready for a container."""
        lines = _checked(self.ctr("images", "check", f"name=={ref}")).splitlines()[1:]
        return len(lines) == 1 and " complete (" in lines[0] and lines[0].split()[-1] == "true"


Labels = tuple[tuple[str, str], ...]
"""Names and values, in the order of the names."""


class Prometheus(Server):
    """A Prometheus on a loopback address with its storage in a folder, which scrapes one target every second.

    The scrape job is `scrape`, as in `scrape_configs`, with its own interval if it has none.
    """

    def __init__(self, folder: Path, scrape: Mapping[str, object], *rules: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        config = folder / "prometheus.yml"
        settings = {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": [str(path) for path in rules],
            "scrape_configs": [scrape],
        }
        config.write_text(json.dumps(settings))  # JSON is valid YAML.
        options = [f"--config.file={config}", f"--storage.tsdb.path={folder / 'storage'}"]
        super().__init__(
            ["prometheus", *options, f"--web.listen-address=127.0.0.1:{port}"], folder / "prometheus.log"
        )

    def ready(self) -> bool:
        """Whether it has read its storage."""
        return answers(f"{self.url}/-/ready")

    def get(self, path: str, **query: str) -> Any:
        """Return the `data` of an answer of its API.

        Raises:
            RuntimeError: it refuses the request; the message has its reason.
        """
        answer = fetch(f"{self.url}/api/v1/{path}?{urlencode(query)}")
        document = json.loads(answer.body)
        if document["status"] != "success":
            raise RuntimeError(f"{path} {query}: {document['error']}")
        return document["data"]

    def query(self, expression: str) -> dict[Labels, float]:
        """Return the value of an expression now, by the labels of its series.

        Raises:
            RuntimeError: it is no expression.
        """
        data = self.get("query", query=expression)
        if data["resultType"] == "scalar":
            return {(): float(data["result"][1])}
        return {tuple(sorted(one["metric"].items())): float(one["value"][1]) for one in data["result"]}


def hosts_dir(folder: Path, mirror: str, *registries: str, server: str = NOWHERE) -> Path:
    """Make a folder like /etc/containerd/certs.d that sends pulls from these registries to the URL `mirror`.

    When the mirror refuses, containerd uses the URL `server`, by default one that refuses connections.
    """
    hosts = f'server = "{server}"\n[host."{mirror}"]\ncapabilities = ["pull", "resolve"]\n'
    for registry in registries:
        (folder / registry).mkdir(parents=True, exist_ok=True)
        (folder / registry / "hosts.toml").write_text(hosts)
    return folder


def skopeo_copy(ref: str, destination: str, *options: str, timeout: float = 120) -> None:
    """Copy `127.0.0.1:5000/name:tag` over plain HTTP to `oci:FOLDER:TAG` or `dir:FOLDER`.

    Raises:
        RuntimeError: skopeo failed.
    """
    source = ["--src-tls-verify=false", *options, f"docker://{ref}"]
    run(["skopeo", "--insecure-policy", "copy", *source, destination], timeout=timeout)


def _put(url: str, data: bytes, media_type: str) -> None:
    _expect(201, fetch(url, method="PUT", headers={"Content-Type": media_type}, body=data))


def _expect(status: int, answer: Response) -> None:
    if answer.status != status:
        raise RuntimeError(f"docker-registry gave {answer.status}: {answer.body.decode(errors='replace')}")


def _checked(done: subprocess.CompletedProcess[str]) -> str:
    if done.returncode:
        raise RuntimeError(f"{done.args} gave {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout
