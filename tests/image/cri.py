"""A containerd with its CRI plugin, and pods in it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tests.cri import Message, curl, decoded, failure, framed, unframed
from tests.processes import Server, run

_CONTAINER, _NODE = 1, 2  # whose namespace
_NAMESPACE = "default"


class NodeContainerd(Server):
    """A containerd as nodes have it, with all its files in one folder; pods are in the network of this machine."""

    def __init__(self, folder: Path, sandbox_image: str) -> None:
        self._folder = folder
        self._socket = folder / "containerd.sock"
        config = folder / "config.toml"
        config.write_text(
            f'version = 2\nroot = "{folder}/root"\nstate = "{folder}/state"\n'
            f'[grpc]\naddress = "{self._socket}"\n'
            '[plugins."io.containerd.grpc.v1.cri"]\n'
            f'sandbox_image = "{sandbox_image}"\nstream_server_port = "0"\n'
            # Without it a sandbox needs CAP_SYS_RESOURCE, which root does not have everywhere.
            "restrict_oom_score_adj = true\n"
            f'[plugins."io.containerd.internal.v1.opt"]\npath = "{folder}/opt"\n'
        )
        super().__init__(["containerd", "--config", str(config)], folder / "containerd.log")

    def ready(self) -> bool:
        """Whether it answers ctr."""
        return run(["ctr", "--address", str(self._socket), "version"], check=False).returncode == 0

    def ctr(self, *arguments: str) -> str:
        """Run ctr in the namespace of kubelets; return its output.

        Raises:
            RuntimeError: it failed.
        """
        return run(["ctr", "--address", str(self._socket), "--namespace", "k8s.io", *arguments]).stdout

    def call(self, service: str, method: str, message: Message) -> dict[int, list[bytes | int]]:
        """Call a method of the CRI; return the fields of the answer.

        Raises:
            RuntimeError: containerd gave an error.
        """
        request, answer = self._folder / "request", self._folder / "answer"
        request.write_bytes(framed(message))
        said = run(curl(f"{service}/{method}", str(self._socket), str(request), str(answer))).stdout
        if why := failure(said):
            raise RuntimeError(f"{method}: {why}\n{self.log}")
        return unframed(answer.read_bytes())


class Pod:
    """A sandbox with one container, as a kubelet makes them of a pod with `hostNetwork`."""

    def __init__(self, node: NodeContainerd, image: str, arguments: list[str], store: Path) -> None:
        self._node = node
        namespaces: Message = {1: _NODE, 2: _CONTAINER}  # network and processes, as kubelets set them
        metadata: Message = {1: "ociregistry", 2: "the-uid", 3: _NAMESPACE}
        sandbox: Message = {1: metadata, 8: {2: {1: namespaces}}}
        self._sandbox = _text(node.call("RuntimeService", "RunPodSandbox", {1: sandbox}), 1)
        # As the restricted profile asks for: no privileges, and a root that is not writable.
        security: Message = {1: {2: ["ALL"]}, 3: namespaces, 7: 1, 11: 1}
        container: Message = {
            1: {1: "ociregistry"},
            2: {1: image},
            4: arguments,
            7: {1: "/var/lib/ociregistry", 2: str(store)},
            15: {2: security},
        }
        wanted: Message = {1: self._sandbox, 2: container, 3: sandbox}
        self._container = _text(node.call("RuntimeService", "CreateContainer", wanted), 1)

    def start(self) -> None:
        """Start the container."""
        self._node.call("RuntimeService", "StartContainer", {1: self._container})

    def stop(self, timeout: int) -> int:
        """Stop the container by SIGTERM, and after `timeout` seconds by SIGKILL; return its exit status."""
        self._node.call("RuntimeService", "StopContainer", {1: self._container, 2: timeout})
        status = _fields(self._node.call("RuntimeService", "ContainerStatus", {1: self._container}), 1)
        # Zero is left out of a message.
        (code,) = status.get(7, [0])
        assert isinstance(code, int)
        return code

    def remove(self) -> None:
        """Remove the sandbox with its container."""
        self._node.call("RuntimeService", "StopPodSandbox", {1: self._sandbox})
        self._node.call("RuntimeService", "RemovePodSandbox", {1: self._sandbox})


def _text(fields: Mapping[int, list[bytes | int]], number: int) -> str:
    (value,) = fields[number]
    assert isinstance(value, bytes)
    return value.decode()


def _fields(fields: Mapping[int, list[bytes | int]], number: int) -> dict[int, list[bytes | int]]:
    (value,) = fields[number]
    assert isinstance(value, bytes)
    return decoded(value)
