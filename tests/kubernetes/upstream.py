"""The only upstream of the cluster: a registry outside, with a private authority and a password."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from tests.certificates import Authority
from tests.images import Image, Index, image_of_files, index_of, make_image
from tests.kubernetes.cluster import Cluster
from tests.kubernetes.layout import OUTSIDE, UPSTREAM
from tests.namespaces import call_in_network
from tests.peers import DockerRegistry
from tests.secure_peers import SecureRegistry, ServerTls, write_htpasswd

USER, PASSWORD = "cluster", "a secret of the cluster"
_BUSYBOX = Path("/bin/busybox")


def busybox(purpose: str, command: tuple[str, ...] = ("sleep", "2147483647")) -> Image:
    """Make an image of Debian's static busybox; each purpose has an image that shares no layer with another."""
    names = ("cat", "httpd", "ls", "sh", "sleep", "wget")
    files = {f"bin/{name}": "busybox" for name in names}
    purposes = {"purpose": purpose.encode()}
    return image_of_files({"bin/busybox": _BUSYBOX.read_bytes(), **files, **purposes}, command)


def busybox_index(purpose: str) -> Index:
    """Make a list of this image and one for another platform, as most images of the field are."""
    return index_of([busybox(purpose), make_image(purpose, platform="linux/arm64")])


class PrivateUpstream(SecureRegistry):
    """A docker-registry with these images by name, such as `team/app:1`, at the other end of the node's link."""

    def __init__(self, cluster: Cluster, folder: Path, images: Mapping[str, Image | Index]) -> None:
        self._network = cluster.outside_network
        with DockerRegistry(folder / "filled") as filled:
            for name, image in images.items():
                repository, _, tag = name.partition(":")
                filled.push(repository, image, tag)
        authority = Authority(folder, "upstream authority")
        self.authority = authority.ca
        tls = ServerTls(*authority.issue(OUTSIDE))
        users = write_htpasswd(folder / "htpasswd", {USER: PASSWORD})
        super().__init__(
            folder / "upstream", filled.storage, OUTSIDE, int(UPSTREAM.rpartition(":")[2]), tls=tls, htpasswd=users
        )
        self.argv = cluster.outside(self.argv)

    def ready(self) -> bool:
        """Whether it speaks TLS."""
        return call_in_network(self._network, super().ready)


def missing_programs() -> list[str]:
    """Return the Debian packages to install."""
    return [
        package
        for program, package in (
            (str(_BUSYBOX), "busybox-static"),
            ("/usr/lib/cni/ptp", "containernetworking-plugins"),
            ("docker-registry", "docker-registry"),
            ("ip", "iproute2"),
            ("iptables", "iptables"),
            ("mount", "mount"),
            ("nft", "nftables"),
            ("nsenter", "util-linux"),
            ("runc", "runc"),
        )
        if shutil.which(program) is None
    ]
