"""`containerd-config`: prints or writes the configuration with which containerd and other clients use the daemon."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from twisted.python import usage

from ociregistry.commands.hosts_files import HostsFiles, keep_up
from ociregistry.commands.options import Command, print_lines
from ociregistry.config.values import parse_duration
from ociregistry.errors import NameInvalid
from ociregistry.names import DOCKER_HUB, Upstream
from ociregistry.process import print_error
from ociregistry.settings import Settings
from ociregistry.upstream.network import api_host

_FOLDER = "/etc/containerd/certs.d"
_URL = re.compile(r"(?P<scheme>https?)://(?P<host>[^/?#@]+)/?")
_OWNER = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9._/-]{0,127}")
_ALWAYS = "always"
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
            raise ValueError(f"{text!r}: a URL such as http://localhost:8080 is expected, without a path")
        try:
            return cls(match["scheme"], Upstream.parse(match["host"]).name)
        except NameInvalid as error:
            raise ValueError(f"{text!r}: {error.message}") from None

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
        ["owner", None, None, "Word that tells the files of one owner from those of others (default: none)."],
        ["stay", None, None, "Keep them written, or removed, for so long, such as 60s, or always."],
    ]
    optFlags = [
        ["write", None, "Write the hosts.toml files; those that others wrote are kept."],
        ["replace", None, "With --write: replace files that others wrote; --remove restores them."],
        ["remove", None, "Remove the hosts.toml files that --write wrote."],
    ]

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
        except ValueError as error:
            raise usage.UsageError(f"--url {error}") from None
        try:
            self.upstreams = [
                Upstream.parse(one.strip()) for one in (self["upstreams"] or "").split(",") if one.strip()
            ]
        except NameInvalid as error:
            raise usage.UsageError(f"--upstreams: {error.message}") from None
        if (self["cert"] is None) != (self["key"] is None):
            raise usage.UsageError("--cert and --key go together")
        if self["write"] and self["remove"]:
            raise usage.UsageError("--write and --remove exclude each other")
        if self["replace"] and not self["write"]:
            raise usage.UsageError("--replace goes with --write")
        if self["stay"] and not (self["write"] or self["remove"]):
            raise usage.UsageError("--stay goes with --write or --remove")
        if self["owner"] is not None and not _OWNER.fullmatch(self["owner"]):
            raise usage.UsageError(f"--owner {self['owner']!r}: letters, digits and . _ / - are expected")
        stay = None if self["stay"] == _ALWAYS else self.value("stay", parse_duration)
        self._seconds = stay.total_seconds() if stay is not None else None
        for option in ("dir", "ca", "cert", "key"):
            path = self[option]
            if path is not None and not (path.isprintable() and os.path.isabs(path) and not set(path) & set("\"'\\")):
                raise usage.UsageError(f"--{option} {path!r}: an absolute path is expected, without quotes")

    def run(self, settings: Settings) -> int:
        """Print the configuration of all clients, or with --write or --remove change the hosts.toml files.

        Raises:
            CommandFailed: a file cannot be written or removed, or exists and was not written by this command.
        """
        folder = Path(self["dir"])
        files = HostsFiles(folder, self["owner"] or "")
        if self["remove"]:
            self._change(folder, files.remove, "removed")
            return 0
        mirrors = self.mirrors or [Mirror("https" if settings.tls else "http", f"localhost:{settings.port}")]
        texts = self._texts(mirrors, settings)
        if self["write"]:
            if not self.upstreams:
                _warn_of_overrides(folder, mirrors)
            self._change(folder, lambda: files.write(texts, replace=bool(self["replace"])), "wrote")
            if not self["stay"]:
                print_lines(_config_toml(self["dir"]))
            return 0
        for name, text in texts.items():
            print_lines([f"# {folder / name / 'hosts.toml'}", files.mark, text])
        print_lines(_config_toml(self["dir"]))
        print_lines(_other_clients(mirrors, self.upstreams or _usual(settings)))
        return 0

    def _change(self, folder: Path, act: Callable[[], list[Path]], what: str) -> None:
        if self["stay"]:
            keep_up(folder, act, lambda path: print_lines([f"{what} {path}"]), self._seconds)
        else:
            print_lines(f"{what} {path}" for path in act())

    def _texts(self, mirrors: Sequence[Mirror], settings: Settings) -> dict[str, str]:
        """Return the texts of the hosts.toml files by the names of their folders."""
        if not self.upstreams:
            return {"_default": self._hosts_toml(None, mirrors)}
        servers = {one.name: f"{settings.entry(one).scheme or 'https'}://{api_host(one)}" for one in self.upstreams}
        return {name: self._hosts_toml(server, mirrors) for name, server in servers.items()}

    def _hosts_toml(self, server: str | None, mirrors: Sequence[Mirror]) -> str:
        lines = []
        if server is not None:
            lines += ["# When no daemon answers, containerd asks the registry itself.", f'server = "{server}"']
        for mirror in mirrors:
            lines += ["", f'[host."{mirror}"]', '  capabilities = ["pull", "resolve"]']
            if mirror.scheme == "https":
                lines += [f'  ca = "{self["ca"]}"'] if self["ca"] else []
                lines += [f'  client = [["{self["cert"]}", "{self["key"]}"]]'] if self["cert"] else []
        return "\n".join(lines) + "\n"


def _warn_of_overrides(folder: Path, mirrors: Sequence[Mirror]) -> None:
    """Warn of folders for single registries that do not name these `mirrors`: containerd prefers them to _default.

    It does so even if there is no hosts.toml in them.
    """
    folders = [path for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
    for path in sorted(path for path in folders if path.name != "_default" and not path.name.startswith(".")):
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
