"""`containerd-config`: prints or writes the configuration with which containerd and other clients use the daemon."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from twisted.python import usage

from ociregistry.commands.options import Command, CommandFailed, print_lines
from ociregistry.errors import NameInvalid
from ociregistry.names import DOCKER_HUB, Upstream
from ociregistry.process import print_error
from ociregistry.settings import Settings
from ociregistry.upstream.network import api_host

_FOLDER = "/etc/containerd/certs.d"
_URL = re.compile(r"(?P<scheme>https?)://(?P<host>[^/?#@]+)/?")
_OURS = "# Written by ociregistry containerd-config, which may write it anew."
_USUAL = ("docker.io", "quay.io", "registry.k8s.io", "ghcr.io", "gcr.io")
"""Registries to configure for clients that need an entry for each upstream."""


@dataclass(frozen=True, slots=True)
class Mirror:
    """The address of a daemon as clients see it."""

    scheme: str
    host: str

    @classmethod
    def parse(cls, text: str) -> Mirror:
        """Parse a URL such as `http://localhost:8080`.

        Raises:
            ValueError: it is malformed, or has a path.
        """
        match = _URL.fullmatch(text)
        if match is None:
            raise ValueError("a URL such as http://localhost:8080 is expected, without a path")
        try:
            return cls(match["scheme"], Upstream.parse(match["host"]).name)
        except NameInvalid as error:
            raise ValueError(error.message) from None

    def __str__(self) -> str:
        return f"{self.scheme}://{self.host}"


class ContainerdConfig(Command):
    """The options of `containerd-config`."""

    examples = ("containerd-config", "containerd-config --url http://10.0.0.1:8080 --write")
    longdesc = (
        "Prints or writes the hosts.toml files with which containerd pulls through the daemon, and prints the lines "
        "for its config.toml and the configuration of CRI-O, podman, k3s and dockerd."
    )
    optParameters = [
        ["dir", None, _FOLDER, "Folder from which containerd reads hosts.toml files."],
        ["upstreams", None, None, "Upstreams, separated by commas, to write a file for each (default: one for all)."],
        ["ca", None, None, "File, on the node, with the authority that issued the daemon's certificate."],
        ["cert", None, None, "File with the node's certificate, if the daemon requires one."],
        ["key", None, None, "File with the key of that certificate."],
    ]
    optFlags = [["write", None, "Write the hosts.toml files."]]

    def __init__(self) -> None:
        super().__init__()
        self._urls: list[str] = []

    def opt_url(self, url: str) -> None:
        """URL of the daemon, such as http://localhost:8080. Repeatable: the first that answers is used."""
        self._urls.append(url)

    def postOptions(self) -> None:
        """Parse the values of the options.

        Raises:
            usage.UsageError: a value is invalid, or --cert and --key are not given together.
        """
        try:
            self.mirrors = [Mirror.parse(url) for url in self._urls]
            self.upstreams = [
                Upstream.parse(one.strip()) for one in (self["upstreams"] or "").split(",") if one.strip()
            ]
        except (ValueError, NameInvalid) as error:
            raise usage.UsageError(f"{error}") from None
        if (self["cert"] is None) != (self["key"] is None):
            raise usage.UsageError("--cert and --key go together")
        for option in ("dir", "ca", "cert", "key"):
            path = self[option]
            if path is not None and not (path.isprintable() and os.path.isabs(path) and not set(path) & set("\"'\\")):
                raise usage.UsageError(f"--{option} {path!r}: an absolute path is expected, without quotes")

    def run(self, settings: Settings) -> int:
        """Print the configuration of all clients, or write the hosts.toml files with --write.

        Raises:
            CommandFailed: a file cannot be written, or exists and was not written by this command.
        """
        mirrors = self.mirrors or [Mirror("https" if settings.tls else "http", f"localhost:{settings.port}")]
        files = self._files(mirrors, settings)
        if self["write"]:
            for path, text in files.items():
                _write(path, text)
            print_lines(f"wrote {path}" for path in files)
            print_lines(_config_toml(self["dir"]))
            if not self.upstreams:
                _warn_of_overrides(Path(self["dir"]), mirrors)
            return 0
        for path, text in files.items():
            print_lines([f"# {path}", text])
        print_lines(_config_toml(self["dir"]))
        print_lines(_other_clients(mirrors, self.upstreams or _usual(settings)))
        return 0

    def _files(self, mirrors: Sequence[Mirror], settings: Settings) -> dict[Path, str]:
        folder = Path(self["dir"])
        if not self.upstreams:
            return {folder / "_default" / "hosts.toml": self._hosts_toml(None, mirrors)}
        servers = {one.name: f"{settings.entry(one).scheme or 'https'}://{api_host(one)}" for one in self.upstreams}
        return {folder / name / "hosts.toml": self._hosts_toml(server, mirrors) for name, server in servers.items()}

    def _hosts_toml(self, server: str | None, mirrors: Sequence[Mirror]) -> str:
        lines = [_OURS]
        if server is not None:
            lines += ["# When no daemon answers, containerd asks the registry itself.", f'server = "{server}"']
        for mirror in mirrors:
            lines += ["", f'[host."{mirror}"]', '  capabilities = ["pull", "resolve"]']
            if mirror.scheme == "https":
                lines += [f'  ca = "{self["ca"]}"'] if self["ca"] else []
                lines += [f'  client = [["{self["cert"]}", "{self["key"]}"]]'] if self["cert"] else []
        return "\n".join(lines) + "\n"


def _write(path: Path, text: str) -> None:
    try:
        if path.exists() and not path.read_text(errors="replace").startswith(_OURS):
            raise CommandFailed(f"{path}: exists, and was not written by this command: move it away first")
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.new")
        temporary.write_text(text)
        temporary.rename(path)
    except OSError as error:
        raise CommandFailed(f"{path}: cannot be written: {error.strerror}") from None


def _warn_of_overrides(folder: Path, mirrors: Sequence[Mirror]) -> None:
    """Warn of folders for single registries that do not name these `mirrors`: containerd prefers them to _default.

    It does so even if there is no hosts.toml in them.
    """
    for path in sorted(path for path in folder.iterdir() if path.is_dir() and path.name != "_default"):
        hosts = path / "hosts.toml"
        try:
            text = hosts.read_text(errors="replace")
        except OSError:
            text = ""
        if not any(f'"{mirror}"' in text for mirror in mirrors):
            what = hosts if text else path
            print_error(
                f"warning: {what}: for {path.name} containerd uses this in place of _default, and does not ask the "
                f"daemon: move it away, or write it anew with --upstreams {path.name}"
            )


def _config_toml(folder: str) -> Iterator[str]:
    yield "# /etc/containerd/config.toml must name that folder, and containerd be restarted once; up to version 1.7:"
    yield '[plugins."io.containerd.grpc.v1.cri".registry]'
    yield f'  config_path = "{folder}"'
    yield ""
    yield "# (A new config.toml begins with the line `version = 2`.)"
    yield ""
    yield "# and from version 2.0 on, in a file of `version = 3`:"
    yield '[plugins."io.containerd.cri.v1.images".registry]'
    yield f'  config_path = "{folder}"'
    yield ""


def _usual(settings: Settings) -> list[Upstream]:
    return [*dict.fromkeys([*map(Upstream, _USUAL), *settings.registries])]


def _other_clients(mirrors: Sequence[Mirror], upstreams: Sequence[Upstream]) -> Iterator[str]:
    yield "# CRI-O, podman and skopeo: /etc/containers/registries.conf.d/ociregistry.conf"
    for upstream in upstreams:
        yield from _registries_conf(mirrors, upstream)
    yield "# k3s and RKE2: /etc/rancher/k3s/registries.yaml, /etc/rancher/rke2/registries.yaml"
    yield "mirrors:"
    yield '  "*":'
    yield "    endpoint:"
    yield from (f'      - "{mirror}"' for mirror in mirrors)
    yield ""
    yield f"# dockerd: /etc/docker/daemon.json, for {DOCKER_HUB} alone"
    yield json.dumps({"registry-mirrors": [str(mirror) for mirror in mirrors]}, indent=2)


def _registries_conf(mirrors: Sequence[Mirror], upstream: Upstream) -> Iterator[str]:
    if upstream.port is not None:
        yield f"# {upstream}: these clients cannot name an upstream with a port"
        yield ""
        return
    yield "[[registry]]"
    yield f'prefix = "{upstream}"'
    yield f'location = "{upstream}"'
    for mirror in mirrors:
        yield "[[registry.mirror]]"
        yield f'location = "{mirror.host}/{upstream}"'
        yield f"insecure = {'true' if mirror.scheme == 'http' else 'false'}"
    yield ""
