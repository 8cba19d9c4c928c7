"""What `helm template` and `kubectl get -o json` print, with images to choose."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

_WORKLOAD = """\
---
# Source: shop/charts/{name}/templates/{kind_lower}.yaml
apiVersion: apps/v1
kind: {kind}
metadata:
  name: release-{name}
  namespace: default
  labels:
    helm.sh/chart: {name}-1.2.3
    app.kubernetes.io/managed-by: Helm
  annotations:
    checksum/config: 0f343b0931126a20f133d67c2b018a3b
spec:
  replicas: 1
  selector:
    matchLabels:
      app.kubernetes.io/name: {name}
  template:
    metadata:
      labels:
        app.kubernetes.io/name: {name}
    spec:
      securityContext:
        {{}}
      containers:
        - name: {name}
          securityContext:
            {{}}
          image: "{image}"
          imagePullPolicy: IfNotPresent
          args:
            - "--template={{{{ .Namespace }}}}"
          livenessProbe:
            httpGet:
              path: /
              port: http
          resources:
            {{}}
"""

_OTHERS = """\
---
# Source: shop/templates/serviceaccount.yaml
apiVersion: v1
kind: ServiceAccount
metadata:
  name: release-shop
automountServiceAccountToken: true
---
# Source: shop/templates/configmap.yaml
apiVersion: v1
kind: ConfigMap
metadata:
  name: release-shop
data:
  # A manifest within a text is no object.
  pod.yaml: |
    containers:
      - image: not/this-one:v1
    {{- range .Alerts }}
  empty:
---
# Source: shop/templates/nothing.yaml
---
# Source: shop/templates/tests/test-connection.yaml
apiVersion: v1
kind: Pod
metadata:
  name: "release-shop-test-connection"
  annotations:
    "helm.sh/hook": test
spec:
  containers:
    - name: wget
      image: {image}
      command: ['wget']
      args: ['release-shop:80']
  restartPolicy: Never
"""


def helm_template(images: Sequence[str]) -> str:
    """Return the output of `helm template` for a chart with a workload for each image, a hook for the last one."""
    kinds = ("Deployment", "StatefulSet", "DaemonSet")
    workloads = [
        _WORKLOAD.format(name=f"part{number}", kind=kind, kind_lower=kind.lower(), image=image)
        for number, image in enumerate(images[:-1])
        for kind in [kinds[number % len(kinds)]]
    ]
    return "".join(workloads) + _OTHERS.replace("{image}", images[-1])


def pod(name: str, images: Sequence[str], **spec: Any) -> dict[str, Any]:
    """Return a pod as the API server has it, with a container for each image."""
    containers = [{"image": image, "name": f"c{number}"} for number, image in enumerate(images)]
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"annotations": {"text": '{"image": "no/image:v1"}'}, "name": name, "namespace": "default"},
        "spec": {"containers": containers, **spec},
        "status": {"containerStatuses": [{"image": f"sha256:{'ab' * 32}", "name": "c0"}], "phase": "Running"},
    }


def kubectl_json(pods: Sequence[dict[str, Any]]) -> str:
    """Return the output of `kubectl get pods -o json`."""
    listed = {"apiVersion": "v1", "items": pods, "kind": "List", "metadata": {"resourceVersion": ""}}
    return json.dumps(listed, indent=4) + "\n"
