"""The first process of a node: it gives the node files of its own, then runs Kubernetes and containerd in them.

Run by `cluster`, in new network, mount and pid namespaces, with the folder of the node as its argument. It waits for
a line on its standard input, which says that the network is there, and runs until one of the daemons ends.
"""

from __future__ import annotations

import json
import os
import ssl
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.kubernetes.layout import (
    ADDRESS,
    ADMIN,
    CONTAINERD,
    NAME,
    PAUSE,
    POD_NETWORK,
    SERVICE_NETWORK,
    USERS,
    Layout,
)

_PATIENCE = 300
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

_CONTAINERD_CONFIG = """\
version = 3
disabled_plugins = ['io.containerd.nri.v1.nri']
[plugins.'io.containerd.cri.v1.images'.pinned_images]
  sandbox = '{pause}'
[plugins.'io.containerd.cri.v1.images'.registry]
  config_path = '/etc/containerd/certs.d'
[plugins.'io.containerd.cri.v1.runtime']
  # Without CAP_SYS_RESOURCE, as in a container, the score cannot be lowered.
  restrict_oom_score_adj = true
[plugins.'io.containerd.cri.v1.runtime'.cni]
  bin_dirs = ['/usr/lib/cni']
"""

# What the kubelet would set for the whole machine. The files are covered by ones that have these values.
_SYSCTLS = {
    "vm/overcommit_memory": "1",
    "vm/panic_on_oom": "0",
    "kernel/panic": "10",
    "kernel/panic_on_oops": "1",
    "kernel/keys/root_maxkeys": "1000000",
    "kernel/keys/root_maxbytes": "25000000",
}


def main() -> None:
    """Run the node until one of its daemons ends."""
    layout = Layout(Path(sys.argv[1]))
    sys.stdin.readline()
    _own_files(layout)
    _configure(layout)
    daemons = _first_daemons(layout)
    _wait_for_api(layout, daemons)
    daemons.update(_later_daemons(layout))
    while True:
        _exit_if_ended(*os.wait(), daemons)


def _exit_if_ended(pid: int, status: int, daemons: Mapping[int, str]) -> None:
    """Exit if a process that ended is a daemon: the first process of a namespace is also the parent of orphans."""
    if pid in daemons:
        sys.exit(f"{daemons[pid]} ended with {os.waitstatus_to_exitcode(status)}")


def _own_files(layout: Layout) -> None:
    """Give the node /etc, /opt and /var of which it changes a copy, an empty /run, and disks for what is large."""
    changes = layout.folder / "changes"
    _mount("-t", "tmpfs", "tmpfs", str(changes))
    for name in ("etc", "opt", "var"):
        upper, work = changes / name, changes / f"{name}.work"
        upper.mkdir()
        work.mkdir()
        _mount("-t", "overlay", "-o", f"lowerdir=/{name},upperdir={upper},workdir={work}", "overlay", f"/{name}")
    _mount("-t", "tmpfs", "tmpfs", "/run")
    Path("/run/netns").mkdir()
    # An overlay cannot hold the upper folders of other overlays, which the containers have.
    for target in map(Path, ("/srv", "/var/lib/containerd", "/var/lib/etcd", "/var/lib/kubelet")):
        disk = layout.folder / target.name
        disk.mkdir()
        target.mkdir(exist_ok=True)
        _mount("--bind", str(disk), str(target))
    for number, (name, value) in enumerate(_SYSCTLS.items()):
        cover = changes / f"sysctl-{number}"
        cover.write_text(value)
        _mount("--bind", str(cover), f"/proc/sys/{name}")
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1")


def _configure(layout: Layout) -> None:
    resolver = Path("/etc/resolv.conf")
    resolver.unlink(missing_ok=True)
    resolver.touch()
    _empty("/etc/containerd")
    Path("/etc/containerd/config.toml").write_text(_CONTAINERD_CONFIG.format(pause=PAUSE))
    _empty("/etc/cni/net.d")
    ranges = {"type": "host-local", "ranges": [[{"subnet": POD_NETWORK}]], "routes": [{"dst": "0.0.0.0/0"}]}
    plugins = [
        {"type": "ptp", "ipMasq": False, "ipam": ranges},
        {"type": "portmap", "capabilities": {"portMappings": True}, "snat": True},
    ]
    _write(Path("/etc/cni/net.d/10-pods.conflist"), {"cniVersion": "1.0.0", "name": "pods", "plugins": plugins})
    rows = [(layout.token(user), user, user, *filter(None, [group])) for user, group in USERS.items()]
    layout.tokens.write_text("".join(f"{','.join(row)}\n" for row in rows))
    for user in USERS:
        _write(layout.kubeconfig(user), _kubeconfig(layout, user))
    _write(layout.folder / "kubelet.json", _kubelet_config(layout))
    _write(layout.folder / "kube-proxy.json", _proxy_config(layout))


def _kubeconfig(layout: Layout, user: str) -> Mapping[str, object]:
    cluster = {"server": "https://127.0.0.1:6443", "certificate-authority": str(layout.authority)}
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": NAME, "cluster": cluster}],
        "users": [{"name": user, "user": {"token": layout.token(user)}}],
        "contexts": [{"name": user, "context": {"cluster": NAME, "user": user}}],
        "current-context": user,
    }


def _kubelet_config(layout: Layout) -> Mapping[str, object]:
    certificate, key = layout.certificate(NAME)
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "failCgroupV1": False,
        "failSwapOn": False,
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": f"/{layout.group}",
        "containerRuntimeEndpoint": f"unix://{CONTAINERD}",
        "authentication": {"anonymous": {"enabled": False}, "x509": {"clientCAFile": str(layout.authority)}},
        "authorization": {"mode": "AlwaysAllow"},
        "tlsCertFile": str(certificate),
        "tlsPrivateKeyFile": str(key),
        "oomScoreAdj": 0,
        "resolvConf": "",
        # What is scarce on the machine is no concern of the node.
        "evictionHard": {"memory.available": "100Mi", "nodefs.available": "1%", "imagefs.available": "1%"},
        "imageGCHighThresholdPercent": 100,
        "imageGCLowThresholdPercent": 99,
        # Secrets and ConfigMaps that are mounted are written again at the next of these.
        "syncFrequency": "5s",
        "nodeStatusUpdateFrequency": "5s",
        "crashLoopBackOff": {"maxContainerRestartPeriod": "10s"},
    }


def _proxy_config(layout: Layout) -> Mapping[str, object]:
    return {
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "mode": "nftables",
        "clientConnection": {"kubeconfig": str(layout.kubeconfig("system:kube-proxy"))},
        "hostnameOverride": NAME,
        "clusterCIDR": POD_NETWORK,
        "nodePortAddresses": [f"{ADDRESS}/32", "127.0.0.0/8"],
        "oomScoreAdj": 0,
        # Limits of the whole machine are left alone.
        "conntrack": {"maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"},
    }


def _first_daemons(layout: Layout) -> dict[int, str]:
    certificate, key = layout.certificate("kubernetes")
    client, client_key = layout.certificate("kubelet-client")
    accounts, accounts_key = layout.certificate("service-accounts")
    etcd = ("--listen-client-urls", "http://127.0.0.1:2379", "--advertise-client-urls", "http://127.0.0.1:2379")
    peers = ("--listen-peer-urls", "http://127.0.0.1:2380")
    return _start(
        layout,
        ("etcd", "--data-dir", "/var/lib/etcd", "--unsafe-no-fsync", *etcd, *peers),
        ("containerd",),
        (
            "kube-apiserver",
            "--etcd-servers=http://127.0.0.1:2379",
            f"--advertise-address={ADDRESS}",
            f"--tls-cert-file={certificate}",
            f"--tls-private-key-file={key}",
            f"--token-auth-file={layout.tokens}",
            "--kubelet-preferred-address-types=InternalIP",
            f"--kubelet-client-certificate={client}",
            f"--kubelet-client-key={client_key}",
            f"--kubelet-certificate-authority={layout.authority}",
            f"--service-account-key-file={accounts}",
            f"--service-account-signing-key-file={accounts_key}",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-cluster-ip-range={SERVICE_NETWORK}",
            "--authorization-mode=Node,RBAC",
            "--enable-admission-plugins=NodeRestriction",
            "--allow-privileged=true",
            "--profiling=false",
        ),
    )


def _later_daemons(layout: Layout) -> dict[int, str]:
    _, service_accounts = layout.certificate("service-accounts")
    return _start(
        layout,
        (
            "kube-controller-manager",
            f"--kubeconfig={layout.kubeconfig('system:kube-controller-manager')}",
            "--use-service-account-credentials",
            f"--service-account-private-key-file={service_accounts}",
            f"--root-ca-file={layout.authority}",
            "--leader-elect=false",
            "--bind-address=127.0.0.1",
        ),
        (
            "kube-scheduler",
            f"--kubeconfig={layout.kubeconfig('system:kube-scheduler')}",
            "--leader-elect=false",
            "--bind-address=127.0.0.1",
        ),
        (
            "kubelet",
            f"--config={layout.folder / 'kubelet.json'}",
            f"--kubeconfig={layout.kubeconfig(f'system:node:{NAME}')}",
            f"--hostname-override={NAME}",
            f"--node-ip={ADDRESS}",
            "--v=2",
        ),
        ("kube-proxy", f"--config={layout.folder / 'kube-proxy.json'}"),
    )


def _start(layout: Layout, *commands: Sequence[str]) -> dict[int, str]:
    """Start daemons with their output in the logs; return their names by process id."""
    started = {}
    for command in commands:
        with layout.log(command[0]).open("ab") as log:
            process = subprocess.Popen(
                [str(layout.program(command[0])), *command[1:]],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "PATH": f"{layout.programs}:{_PATH}"},
            )
        started[process.pid] = command[0]
    return started


def _wait_for_api(layout: Layout, daemons: Mapping[int, str]) -> None:
    """Return when the API server is ready: the other daemons would give up.

    Raises:
        SystemExit: it does not become ready, or one of the daemons has ended.
    """
    context = ssl.create_default_context(cafile=str(layout.authority))
    request = urllib.request.Request("https://127.0.0.1:6443/readyz")
    request.add_header("Authorization", f"Bearer {layout.token(ADMIN)}")
    deadline = time.monotonic() + _PATIENCE
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(request, timeout=10, context=context):
                return
        except OSError:
            time.sleep(0.5)
        _exit_if_ended(*os.waitpid(-1, os.WNOHANG), daemons)
    sys.exit(f"kube-apiserver is not ready: {layout.log('kube-apiserver')}")


def _empty(folder: str) -> None:
    """Make a folder in place of the machine's own of that name."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    _mount("-t", "tmpfs", "tmpfs", folder)


def _mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)


def _write(path: Path, content: Mapping[str, object]) -> None:
    """Write JSON, which is valid YAML."""
    path.write_text(json.dumps(content))


if __name__ == "__main__":
    main()
