"""Names, addresses and files of the node, as `cluster` outside and `node` inside see them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

NAME = "node1"
ADDRESS = "10.98.0.1"
OUTSIDE = "10.98.0.2"
POD_NETWORK = "10.97.0.0/24"
SERVICE_NETWORK = "10.96.0.0/16"
KUBERNETES_SERVICE = "10.96.0.1"
"""The address of the API server for pods: the first of the services."""

CONTAINERD = "/run/containerd/containerd.sock"
UPSTREAM = f"{OUTSIDE}:5000"
PAUSE = f"{UPSTREAM}/pause:1"

ADMIN = "admin"
USERS = {
    ADMIN: "system:masters",
    "system:kube-controller-manager": "",
    "system:kube-scheduler": "",
    "system:kube-proxy": "",
    f"system:node:{NAME}": "system:nodes",
}
"""The users of the API server, each with its group, if any."""


@dataclass(frozen=True)
class Layout:
    """The files of a node in its folder, which has the same path inside and outside."""

    folder: Path

    @property
    def group(self) -> str:
        """The name of the node's control group."""
        return self.folder.name

    @property
    def programs(self) -> Path:
        """The folder of Kubernetes', etcd's and containerd's programs."""
        return self.folder / "bin"

    def program(self, name: str) -> Path:
        """One of these programs."""
        return self.programs / name

    def log(self, daemon: str) -> Path:
        """The output of a daemon."""
        return self.folder / "logs" / f"{daemon}.log"

    @property
    def authority(self) -> Path:
        """The certificate of the cluster's authority."""
        return self.folder / "pki" / f"{NAME}-authority.crt"

    def certificate(self, name: str) -> tuple[Path, Path]:
        """A certificate of that authority, and its key."""
        path = self.folder / "pki" / f"{name}.crt"
        return path, path.with_suffix(".key")

    @property
    def tokens(self) -> Path:
        """The tokens of all users, for the API server."""
        return self.folder / "tokens.csv"

    def token(self, user: str) -> str:
        """Return the token of a user."""
        return f"{user.replace(':', '-')}-token"

    def kubeconfig(self, user: str) -> Path:
        """The configuration with which a user asks the API server."""
        return self.folder / f"{user.replace(':', '-')}.kubeconfig"
