"""The chart installed in the cluster, and workloads beside it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ociregistry import __version__
from tests.kubernetes.cluster import Cluster
from tests.kubernetes.layout import NAME
from tests.processes import ROOT, wait_until

CHART = ROOT / "build" / f"ociregistry-chart-{__version__}.tgz"
RELEASE = NAMESPACE = "ociregistry"
VOLUME = "store"
HOSTS = "/etc/containerd/certs.d/_default/hosts.toml"

_SELECTOR = f"app.kubernetes.io/instance={RELEASE},app.kubernetes.io/component=registry"
_NODES = "ociregistry-nodes"
"""The namespace of the node configurer."""
_PATIENCE = 300
_USER = 65532


class Installation:
    """A release of the chart, whose claim is bound to a volume on the node."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._values: dict[str, object] = {
            "persistence": {"storageClass": "-", "volumeName": VOLUME, "size": "1Gi"},
            "nodeConfigurer": {"enabled": True, "namespace": _NODES, "replace": True, "uninstallSeconds": 20},
            "config": {"log_level": "info"},
        }

    def make_namespaces(self) -> None:
        """Make a namespace of the profile restricted, and one that permits the node configurer its hostPath."""
        for name, profile in ((NAMESPACE, "restricted"), (_NODES, "privileged")):
            metadata = {"name": name, "labels": {"pod-security.kubernetes.io/enforce": profile}}
            self._cluster.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": metadata})

    def make_volume(self, folder: str, node: str = NAME) -> Path:
        """Make a volume in a folder of a node; return our path of the folder."""
        path = self._cluster.path(folder)
        path.mkdir(parents=True)
        os.chown(path, _USER, _USER)
        here = {"key": "kubernetes.io/hostname", "operator": "In", "values": [node]}
        self._cluster.apply(
            {
                "apiVersion": "v1",
                "kind": "PersistentVolume",
                "metadata": {"name": VOLUME},
                "spec": {
                    "capacity": {"storage": "1Gi"},
                    "accessModes": ["ReadWriteOnce"],
                    "persistentVolumeReclaimPolicy": "Retain",
                    "hostPath": {"path": folder},
                    "nodeAffinity": {"required": {"nodeSelectorTerms": [{"matchExpressions": [here]}]}},
                },
            }
        )
        return path

    def delete_volume(self) -> None:
        """Delete the claim and the volume; the folder stays."""
        self._cluster.kubectl("delete", "persistentvolumeclaim", RELEASE, "--namespace", NAMESPACE)
        self._cluster.kubectl("delete", "persistentvolume", VOLUME)

    def install(self, *, wait: bool = True) -> None:
        """Run `helm install`; it may wait until everything is ready."""
        waiting = ("--wait",) if wait else ()
        self._helm("install", RELEASE, str(CHART), "--values", self._write_values(), *waiting)

    def upgrade(self, **values: object) -> None:
        """Run `helm upgrade` with further values."""
        self._values.update(values)
        self._helm("upgrade", RELEASE, str(CHART), "--values", self._write_values(), "--wait")

    def uninstall(self) -> None:
        """Run `helm uninstall`."""
        self._helm("uninstall", RELEASE, "--wait")

    def pod(self) -> Any:
        """Return the pod of the cache, of which there is one."""
        (pod,) = self._cluster.get("pods", "--namespace", NAMESPACE, "--selector", _SELECTOR)["items"]
        return pod

    def delete_pod(self) -> None:
        """Delete the pod of the cache, and wait until it is gone."""
        self._cluster.kubectl("delete", "pods", "--namespace", NAMESPACE, "--selector", _SELECTOR)

    def wait_for_event(self, text: str) -> None:
        """Return when an event in its namespace matches a regular expression."""
        wait_until(lambda: re.search(text, events(self._cluster, NAMESPACE)), _PATIENCE, f"an event like {text}")

    def run(self, *arguments: str) -> str:
        """Run a command of the program in the pod of the cache."""
        name = self.pod()["metadata"]["name"]
        return self._cluster.kubectl("exec", "--namespace", NAMESPACE, name, "--", "ociregistry", *arguments)

    def log(self) -> str:
        """Return the log of the cache."""
        return self._cluster.kubectl("logs", "--namespace", NAMESPACE, "--selector", _SELECTOR, "--tail=-1")

    def wait_until_ready(self) -> None:
        """Return when the Deployment is as it should be."""
        rollout = ("rollout", "status", f"deployment/{RELEASE}", "--namespace", NAMESPACE)
        self._cluster.kubectl(*rollout, f"--timeout={_PATIENCE}s")

    def _helm(self, *arguments: str) -> None:
        self._cluster.run("helm", "--namespace", NAMESPACE, "--timeout", f"{_PATIENCE}s", *arguments)

    def _write_values(self) -> str:
        path = self._cluster.layout.folder / "values.json"
        path.write_text(json.dumps(self._values))
        return str(path)


class Workload:
    """A Deployment of one pod with an image, in the namespace `default`."""

    def __init__(self, cluster: Cluster, name: str, image: str) -> None:
        self._cluster = cluster
        self._selector = f"app={name}"
        self.name = name
        self.image = image

    def create(self) -> None:
        """Create the Deployment; it is not waited for."""
        labels = {"app": self.name}
        container = {"name": "main", "image": self.image, "imagePullPolicy": "IfNotPresent"}
        pod = {"terminationGracePeriodSeconds": 0, "containers": [container]}
        spec = {
            "replicas": 1,
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": pod},
        }
        metadata = {"name": self.name, "namespace": "default"}
        self._cluster.apply({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": metadata, "spec": spec})

    def wait_until_running(self) -> None:
        """Return when its pod runs.

        Raises:
            RuntimeError: it does not; the message has the events.
        """
        try:
            self._cluster.kubectl("rollout", "status", f"deployment/{self.name}", f"--timeout={_PATIENCE}s")
        except RuntimeError as problem:
            raise RuntimeError(f"{problem}\n{events(self._cluster, 'default')}") from problem

    def wait_for_event(self, text: str) -> None:
        """Return when an event of one of its pods matches a regular expression."""
        found = f"{self.name}-.*: .*{text}"
        wait_until(lambda: re.search(found, events(self._cluster, "default")), _PATIENCE, f"an event like {found}")

    def recreate_without_image(self) -> None:
        """End the pod, remove its image and all content from the node, and let the pod be made again."""
        self._scale(0)
        self._cluster.kubectl("wait", "--for=delete", "pods", "--selector", self._selector, f"--timeout={_PATIENCE}s")
        remove_image(self._cluster, self.image)
        self._scale(1)

    def delete(self) -> None:
        """Delete it and its pod."""
        self._cluster.kubectl("delete", "deployment", self.name, "--cascade=foreground")

    def _scale(self, replicas: int) -> None:
        self._cluster.kubectl("scale", f"deployment/{self.name}", f"--replicas={replicas}")


def events(cluster: Cluster, namespace: str) -> str:
    """Return the events in a namespace, a line for each: the name of the object, and the message."""
    found = cluster.get("events", "--namespace", namespace)["items"]
    return "".join(f"{one['involvedObject'].get('name', '')}: {one.get('message', '')}\n" for one in found)


def image_rows(cluster: Cluster) -> Mapping[str, str]:
    """Return the digests of the node's images by name; the kubelet knows an image by several."""
    rows = (line.split() for line in cluster.ctr("images", "ls").splitlines()[1:])
    return {name: digest for name, _, digest, *_ in rows}


def remove_image(cluster: Cluster, image: str) -> None:
    """Remove an image from the node by all its names, as `crictl rmi` does, with its content.

    Raises:
        RuntimeError: its manifest is still there.
    """
    rows = image_rows(cluster)
    digest = rows[image]
    cluster.ctr("images", "rm", "--sync", *(name for name, target in rows.items() if target == digest))
    if digest in cluster.ctr("content", "ls", "-q").split():
        raise RuntimeError(f"{image} is still on the node")
