"""The package installed on a machine with an upstream and containerd."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tests.certificates import Authority
from tests.deb.cri import Cri
from tests.deb.machine import Machine
from tests.images import Image, make_image
from tests.peers import DockerRegistry

UPSTREAM = "upstream.test"
ADDRESS = "127.0.0.2"
REPOSITORY = "team/app"
REFERENCE = f"{UPSTREAM}/{REPOSITORY}:1"
LOADED = f"{UPSTREAM}/team/loaded:1"
CONFIG = "/etc/ociregistry/ociregistry.yaml"
STORE = "/var/lib/ociregistry"
DAEMON = "http://localhost:8080"
MANIFEST = f"{DAEMON}/v2/{REPOSITORY}/manifests/1?ns={UPSTREAM}"

_ENTRY = f"""
registries:
  - name: {UPSTREAM}
    tls:
      ca: {UPSTREAM}.crt
"""
_CONTAINERD = "/etc/containerd/config.toml"
_CERTS = "/etc/containerd/certs.d"
# The output of containerd-config for the versions of containerd in Debian 12 and 13.
_LINES = re.compile(r"; up to version 1\.7:\n(.*?\n)\n", re.DOTALL)
# Folders in which others write meanwhile: the kernel, systemd and its journal, dpkg, and the other programs.
_OTHERS = (
    *("dev", "proc", "run", "sys", "tmp", "srv", "root"),
    *("var/cache", "var/log", "var/tmp", "var/lib/containerd", "var/lib/docker-registry", "var/lib/systemd"),
    *("var/lib/dpkg", "var/lib/apt"),
)


class Installation:
    """A machine from before the installation until after the purge."""

    def __init__(self, machine: Machine, package: Path, folder: Path) -> None:
        self.machine = machine
        self.cri = Cri(machine)
        self._package = package
        self._folder = folder
        self.image: Image = make_image("deb", layers=2, layer_size=300_000)
        self.loaded: Image = make_image("loaded", layers=2, layer_size=200_000)
        self.files_before: frozenset[str] = frozenset()

    def set_up(self) -> None:
        """Start the upstream, record the machine's files, and install the package."""
        self._start_upstream()
        self.files_before = self.files()
        shutil.copy(self._package, self.machine.path("/srv/ociregistry.deb"))
        self.machine.run("apt-get install --yes /srv/ociregistry.deb </dev/null")

    def configure_containerd(self) -> None:
        """Run containerd-config, and follow its output word for word."""
        said = self.machine.says("ociregistry containerd-config --write")
        lines = _LINES.search(said)
        assert lines is not None, said
        with self.machine.path(_CONTAINERD).open("a") as config:
            config.write(lines[1])
        self.machine.run("systemctl restart containerd")

    def forget_containerd(self) -> None:
        """Remove what `configure_containerd` wrote: the administrator's files, which no package removes."""
        shutil.rmtree(self.machine.path(_CERTS))

    def configure_the_upstream(self) -> None:
        """Name the upstream and its authority, as an administrator does."""
        shutil.copy(self._authority.ca, self.machine.path(f"/etc/ociregistry/{UPSTREAM}.crt"))
        with self.machine.path(CONFIG).open("a") as config:
            config.write(_ENTRY)

    @contextmanager
    def changed(self, files: Mapping[str, str]) -> Iterator[None]:
        """Write these files for the unit's next start; after the block restore the old ones and restart."""
        before = {path: path.read_text() if path.exists() else None for path in map(self.machine.path, files)}
        for name, given in files.items():
            self.machine.write(name, given)
        self.machine.run("systemctl daemon-reload")
        try:
            yield
        finally:
            for path, text in before.items():
                if text is not None:
                    path.write_text(text)
                    continue
                path.unlink()
                if not any(path.parent.iterdir()):
                    path.parent.rmdir()
            self.machine.run("systemctl daemon-reload && systemctl restart ociregistry")

    def pull(self) -> str:
        """Pull the image afresh by containerd's CRI plugin, as containerd-config configured it.

        Returns:
            containerd's error, empty for a success.
        """
        if self.cri.images():
            self.cri.remove(REFERENCE)
        return self.cri.pull(REFERENCE)

    def pull_by_ctr(self) -> str:
        """Pull by ctr, which does not use the CRI plugin and has to be given the folder."""
        pulled = self.machine.run(f"ctr images pull --hosts-dir {_CERTS} {REFERENCE}", check=False)
        return f"{pulled.stdout}{pulled.stderr}" if pulled.returncode else ""

    def status(self, url: str) -> str:
        """Return the status of a GET; 000 without an answer."""
        return self.machine.run(f"curl -s -o /dev/null -w '%{{http_code}}' '{url}'", check=False).stdout

    def files(self) -> frozenset[str]:
        """Return all files and folders of the machine but those of `_OTHERS`."""
        pruned = " -o ".join(f"-path ./{other}" for other in _OTHERS)
        return frozenset(self.machine.says(f"cd / && find . -xdev \\( {pruned} \\) -prune -o -print").splitlines())

    def _start_upstream(self) -> None:
        """Run Debian's docker-registry as a service, with content that was pushed to one outside."""
        self._authority = Authority(self._folder, UPSTREAM)
        certificate, key = self._authority.issue(UPSTREAM)
        with DockerRegistry(self._folder / "registry") as registry:
            registry.push(REPOSITORY, self.image, "1")
            registry.push("team/loaded", self.loaded, "1")
        home = "/var/lib/docker-registry"
        shutil.copytree(registry.storage, self.machine.path(home), dirs_exist_ok=True)
        for source, name in ((certificate, "tls.crt"), (key, "tls.key")):
            shutil.copy(source, self.machine.path(f"{home}/{name}"))
        tls = {"certificate": f"{home}/tls.crt", "key": f"{home}/tls.key"}
        settings = {
            "version": "0.1",
            "storage": {"filesystem": {"rootdirectory": home}},
            "http": {"addr": f"{ADDRESS}:443", "tls": tls},
        }
        self.machine.write("/etc/docker/registry/config.yml", json.dumps(settings))
        self.machine.write("/etc/hosts", f"127.0.0.1 localhost\n{ADDRESS} {UPSTREAM}\n")
        # Its user may not use port 443.
        dropin = "/etc/systemd/system/docker-registry.service.d/user.conf"
        self.machine.write(dropin, "[Service]\nUser=root\n")
        self.machine.run("systemctl daemon-reload && systemctl restart docker-registry")
