"""A Kubernetes of one node, in namespaces of its own: all programs are the real ones. Requires root.

Nothing outlives the process that made it: the kernel ends the node with it, and with the node's first process all
others and the namespaces. Control groups and the folder of a run that was killed go at the next.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.certificates import Authority
from tests.kubernetes.layout import (
    ADDRESS,
    ADMIN,
    KUBERNETES_SERVICE,
    NAME,
    OUTSIDE,
    Layout,
)
from tests.kubernetes.marks import make_groups, own_name, remove_groups, remove_leftovers
from tests.processes import ROOT, run, wait_until

PROGRAMS = ("containerd", "containerd-shim-runc-v2", "ctr", "etcd", "helm", "kubernetes")
_NAMES = ("kube-apiserver", "kube-controller-manager", "kube-proxy", "kube-scheduler", "kubectl", "kubelet")
_PATIENCE = 300
_WITH_US = ("setpriv", "--pdeathsig", "KILL")
_JOIN = 'for group in $GROUPS_TO_JOIN; do echo $$ >"$group/cgroup.procs"; done; exec "$@"'


class Cluster:
    """The node, and a place outside that a link connects to it; both run until the block ends.

    `programs` are the folders of what `make test-kubernetes` builds, as in PATH. The logs are copied to `logs`.
    """

    def __init__(self, programs: str, logs: Path) -> None:
        self.programs = programs
        self._kept_logs = logs
        self.layout = Layout(Path(tempfile.gettempdir(), own_name()))
        self._node: subprocess.Popen[bytes] | None = None
        self._outside: subprocess.Popen[bytes] | None = None
        self._leader = 0

    def __enter__(self) -> Self:
        """Start the cluster, and wait until the node is ready for pods."""
        remove_leftovers(self.layout.folder.parent)
        self.layout.folder.mkdir()
        try:
            self._prepare()
            self._start()
            self._wait_for_node()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End everything, and remove all but the logs."""
        self._end()

    def inside(self, argv: Sequence[str]) -> list[str]:
        """Return the command line that runs `argv` on the node."""
        path = f"PATH={self.layout.programs}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        kubeconfig = f"KUBECONFIG={self.layout.kubeconfig(ADMIN)}"
        enter = ("nsenter", "--target", str(self._leader), "--mount", "--net", "--pid")
        return [*enter, "env", path, kubeconfig, *argv]

    def outside(self, argv: Sequence[str]) -> list[str]:
        """Return the command line that runs `argv` at the other end of the node's link; the process becomes that."""
        assert self._outside is not None
        return ["nsenter", "--target", str(self._outside.pid), "--net", *argv]

    @property
    def outside_network(self) -> Path:
        """The file of the network there."""
        assert self._outside is not None
        return Path(f"/proc/{self._outside.pid}/ns/net")

    def run(self, *argv: str, timeout: float = _PATIENCE) -> str:
        """Run a program on the node; return its output.

        Raises:
            RuntimeError: it failed; the message has its output.
        """
        return run(self.inside(argv), timeout=timeout).stdout

    def kubectl(self, *arguments: str, timeout: float = _PATIENCE) -> str:
        """Run kubectl as the administrator; return its output."""
        return self.run("kubectl", *arguments, timeout=timeout)

    def get(self, *arguments: str) -> Any:
        """Return an object, or a list, as `kubectl get` finds it."""
        return json.loads(self.kubectl("get", *arguments, "--output", "json"))

    def apply(self, *objects: object) -> None:
        """Create or change objects."""
        path = self.layout.folder / "applied.json"
        path.write_text(json.dumps({"apiVersion": "v1", "kind": "List", "items": objects}))
        self.kubectl("apply", "--filename", str(path))

    def ctr(self, *arguments: str) -> str:
        """Run ctr on the node's images and containers that the kubelet knows."""
        return self.run("ctr", "--namespace", "k8s.io", *arguments)

    def path(self, path: str) -> Path:
        """Return our path of a file of the node."""
        return Path(f"/proc/{self._leader}/root", path.lstrip("/"))

    def cut_link(self) -> None:
        """Cut the link between the node and the place outside."""
        run(self.outside(["ip", "link", "set", "node", "down"]))

    def restore_link(self) -> None:
        """Restore the link."""
        run(self.outside(["ip", "link", "set", "node", "up"]))
        run(self.outside(["ip", "route", "replace", "default", "via", ADDRESS]))

    def _prepare(self) -> None:
        layout = self.layout
        for name in ("bin", "changes", "logs"):
            (layout.folder / name).mkdir()
        for name, program in (*zip(PROGRAMS, PROGRAMS, strict=True), *((name, "kubernetes") for name in _NAMES)):
            found = shutil.which(program, path=self.programs)
            if found is None:
                raise FileNotFoundError(f"{program} in {self.programs}")
            layout.program(name).symlink_to(found)
        authority = Authority(layout.authority.parent, layout.authority.stem)
        services = ("kubernetes.default", "kubernetes.default.svc")
        authority.issue("kubernetes", *services, "localhost", "127.0.0.1", KUBERNETES_SERVICE, ADDRESS)
        authority.issue(NAME, ADDRESS)
        for name in ("kubelet-client", "service-accounts"):
            authority.issue(name)

    def _start(self) -> None:
        groups = make_groups(self.layout.group)
        unshare = ("unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
        node = (sys.executable, "-m", "tests.kubernetes.node", str(self.layout.folder))
        with self.layout.log("node").open("wb") as log:
            self._node = subprocess.Popen(
                ["sh", "-ec", _JOIN, "sh", *_WITH_US, *unshare, *node],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                cwd=ROOT,
                env={**os.environ, "GROUPS_TO_JOIN": " ".join(map(str, groups))},
            )
            self._outside = subprocess.Popen(
                [*_WITH_US, "unshare", "--net", "sleep", "infinity"], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        wait_until(lambda: self._separate(self._outside) and self._child(), _PATIENCE, "the namespaces")
        self._leader = self._child()
        self._connect()
        assert self._node.stdin is not None
        self._node.stdin.write(b"connected\n")
        self._node.stdin.close()

    def _connect(self) -> None:
        """Connect the node and the place outside; each is the other's way to everywhere."""
        assert self._outside is not None
        node, outside = str(self._leader), str(self._outside.pid)
        peer = ("peer", "name", "node", "netns", outside)
        run(["ip", "link", "add", "outside", "netns", node, "type", "veth", *peer])
        ends = ((node, "outside", ADDRESS, OUTSIDE), (outside, "node", OUTSIDE, ADDRESS))
        for pid, device, address, other in ends:
            enter = ("nsenter", "--target", pid, "--net", "ip")
            run([*enter, "link", "set", "lo", "up"])
            run([*enter, "address", "add", f"{address}/24", "dev", device])
            run([*enter, "link", "set", device, "up"])
            run([*enter, "route", "add", "default", "via", other])

    def _wait_for_node(self) -> None:
        def succeeds(*arguments: str) -> bool:
            return run(self.inside(["kubectl", *arguments]), check=False).returncode == 0

        def ready() -> bool:
            # Pods need the account, which is made a little later than the API server is ready.
            waited = ("wait", "--for=condition=Ready", f"node/{NAME}", "--timeout=5s")
            return self._child() != 0 and succeeds(*waited) and succeeds("get", "serviceaccount", "default")

        wait_until(ready, _PATIENCE, f"the node is ready; see {self._kept_logs}")

    def _child(self) -> int:
        """Return the node's first process, 0 for none yet."""
        assert self._node is not None
        if self._node.poll() is not None:
            raise RuntimeError(f"the node has ended:\n{self.layout.log('node').read_text()}")
        pid = self._node.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return int(children[0]) if children and self._separate(self._node) else 0

    def _separate(self, process: subprocess.Popen[bytes] | None) -> bool:
        """Whether a process has entered a network of its own."""
        assert process is not None
        return os.readlink(f"/proc/{process.pid}/ns/net") != os.readlink("/proc/self/ns/net")

    def _end(self) -> None:
        for process in (self._node, self._outside):
            if process is not None:
                process.kill()
                process.wait(_PATIENCE)
        remove_groups(self.layout.group)
        logs = self.layout.folder / "logs"
        if logs.exists():
            shutil.copytree(logs, self._kept_logs, dirs_exist_ok=True)
        shutil.rmtree(self.layout.folder)
