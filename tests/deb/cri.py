"""A client of containerd's CRI plugin, as crictl and kubelets are: Debian has neither, but a curl with HTTP/2."""

from __future__ import annotations

import re
import shlex
from urllib.parse import unquote

from tests.deb.machine import Machine

_SOCKET = "/run/containerd/containerd.sock"
_FOLDER = "/srv/cri"
_STATUS = re.compile(r"^grpc-status: ([0-9]+)\s*$", re.MULTILINE)
_MESSAGE = re.compile(r"^grpc-message: (.*?)\s*$", re.MULTILINE)


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
        # message PullImageRequest { ImageSpec image = 1; … } and message ImageSpec { string image = 1; … }, framed by
        # gRPC: a byte for "not compressed", and the length.
        message = _field_1(_field_1(reference.encode()))
        request = self._machine.path(f"{_FOLDER}/request")
        request.parent.mkdir(parents=True, exist_ok=True)
        request.write_bytes(b"\0" + len(message).to_bytes(4, "big") + message)
        said = self._machine.says(
            f"curl --silent --show-error --max-time 100 --http2-prior-knowledge --unix-socket {_SOCKET}"
            " --header 'Content-Type: application/grpc' --header 'TE: trailers'"
            f" --data-binary @{_FOLDER}/request --dump-header - --output {_FOLDER}/answer"
            f" {shlex.quote(f'http://localhost/runtime.v1.ImageService/{method}')}"
        )
        status = _STATUS.search(said)
        if status is not None and status[1] == "0":
            return ""
        why = _MESSAGE.search(said)
        return unquote(why[1]) if why and why[1] else f"no answer: {said}"


def _field_1(value: bytes) -> bytes:
    """Encode bytes as the first field of a protobuf message."""
    assert len(value) < 128, "one byte says how many"
    return bytes([1 << 3 | 2, len(value)]) + value
