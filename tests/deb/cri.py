"""A client of the containerd of a machine, as crictl and kubelets are."""

from __future__ import annotations

import shlex

from tests.cri import curl, failure, framed
from tests.deb.machine import Machine

_SOCKET = "/run/containerd/containerd.sock"
_FOLDER = "/srv/cri"


class Cri:
    """The image service of the containerd of a machine."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    def pull(self, reference: str) -> str:
        """Pull as `crictl pull` does; return containerd's error, empty for a success."""
        return self._call("PullImage", reference)

    def remove(self, reference: str) -> None:
        """Remove as `crictl rmi` does.

        Raises:
            RuntimeError: something of the image is left.
        """
        why = self._call("RemoveImage", reference) or self._machine.says("ctr --namespace k8s.io content ls --quiet")
        if why:
            raise RuntimeError(f"{reference} is not removed: {why}")

    def images(self) -> list[str]:
        """Return the names of containerd's images for the CRI."""
        return self._machine.says("ctr --namespace k8s.io images ls --quiet").splitlines()

    def _call(self, method: str, reference: str) -> str:
        """Call a method; return its error, empty for a success."""
        request = self._machine.path(f"{_FOLDER}/request")
        request.parent.mkdir(parents=True, exist_ok=True)
        request.write_bytes(framed({1: {1: reference}}))
        argv = curl(f"ImageService/{method}", _SOCKET, f"{_FOLDER}/request", f"{_FOLDER}/answer")
        return failure(self._machine.says(shlex.join(argv)))
