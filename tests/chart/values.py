"""Values with which the chart is rendered, each with the Secrets of the cluster that they name."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from tests.certificates import Authority

PASSWORD = "s3cret: {{ not a template }} #'\""
SECRET_PASSWORD = "of an existing secret"


@cache
def pems() -> dict[str, str]:
    """Return an authority's certificate, and a certificate that it issued with its key."""
    with tempfile.TemporaryDirectory() as folder:
        authority = Authority(Path(folder))
        certificate, key = authority.issue("cache.internal")
        return {"ca.crt": authority.ca.read_text(), "tls.crt": certificate.read_text(), "tls.key": key.read_text()}


SECRETS = {
    "harbor": {"password": SECRET_PASSWORD, "robot": "another", **pems()},
    "server-tls": pems(),
}


@dataclass(frozen=True)
class Case:
    """Values, and what is exceptional about them."""

    values: dict[str, Any] = field(default_factory=dict)
    restricted: bool = True
    """Whether the profile restricted allows the daemon's pods."""


EVERY_SETTING: dict[str, object] = {
    "log_level": "info",
    "log_format": "json",
    "reserve": "5%",
    "pull_timeout": 1_000_000,
    "max_connections": 32,
    "max_bandwidth": "2Mbit",
    "bandwidth": [{"from": "08:00", "to": "18:00", "max": "500kbit"}],
    "always_pull_latest": True,
    "air_gapped": False,
    "complete_images": True,
    "complete_metadata": False,
    "complete_platforms": ["linux/amd64", "linux/arm64"],
    "allow_upstreams": "docker.io, *.internal:*",
    "proxy": "http://proxy.example:3128",
    "default_ns": "quay.io",
    "concurrent": 4,
    "platform": "linux/amd64,linux/arm/v7",
    "with_signatures": True,
    "prune": {"unused_for": "30d", "max_size": "50GB", "keep": ["^docker\\.io/library/"], "every": "1h"},
    "verify": {"every": "7d", "max_rate": "20MB"},
}

CASES = {
    "defaults": Case(),
    "claim": Case(
        {
            "persistence": {
                "size": "10Gi",
                "storageClass": "-",
                "selector": {"matchLabels": {"disk": "store"}},
                "volumeName": "store-0",
                "annotations": {"a": "b"},
                "keep": False,
            }
        }
    ),
    "existing claim": Case({"persistence": {"type": "existingClaim", "existingClaim": "store"}}),
    "hostPath": Case(
        {"persistence": {"type": "hostPath", "hostPath": "/srv/store"}, "nodeSelector": {"disk": "large"}},
        restricted=False,
    ),
    "emptyDir": Case({"persistence": {"type": "emptyDir", "size": "2Gi"}}),
    "replicas": Case(
        {"replicas": 3, "persistence": {"accessModes": ["ReadWriteMany"], "storageClass": "cephfs"}},
    ),
    "replicas of an existing claim": Case(
        {
            "replicas": 2,
            "persistence": {"type": "existingClaim", "existingClaim": "store", "accessModes": ["ReadWriteMany"]},
            "podDisruptionBudget": {"maxUnavailable": "50%"},
            "topologySpreadConstraints": [
                {"maxSkew": 1, "topologyKey": "topology.kubernetes.io/zone", "whenUnsatisfiable": "DoNotSchedule"}
            ],
        }
    ),
    "every setting": Case({"config": EVERY_SETTING}),
    "preload": Case({"preload": ["registry.k8s.io/pause:3.10", "quay.io/team/app@sha256:" + "0" * 64]}),
    "passwords in the values": Case(
        {
            "registries": [
                {"name": "registry.internal:5000", "auth": {"user": "puller", "password": PASSWORD}},
                {"name": "[2001:db8::1]:5000", "auth": {"user": "puller", "password": PASSWORD}},
                {"name": "number.internal", "auth": {"user": "puller", "password": "12345678"}},
                {
                    "name": "mtls.internal",
                    "tls": {"ca": pems()["ca.crt"], "cert": pems()["tls.crt"], "key": pems()["tls.key"]},
                },
                {"name": "docker.io", "mirrors": ["http://region.internal:8080"], "mirrors_only": True},
            ]
        }
    ),
    "existing secrets": Case(
        {
            "registries": [
                {
                    "name": "harbor.internal",
                    "description": "the team's",
                    "auth": {"user": "puller", "secret": "harbor", "realm": "auth.internal"},
                    "tls": {"secret": "harbor", "ca": "ca.crt", "cert": "tls.crt", "key": "tls.key"},
                },
                {"name": "harbor.internal:8443", "auth": {"user": "r", "secret": "harbor", "key": "robot"}},
                {"name": "again.internal", "auth": {"user": "puller", "secret": "harbor"}},
            ]
        }
    ),
    "password in the environment": Case(
        {
            "registries": [{"name": "ghcr.io", "auth": {"user": "puller", "password_env": "GHCR_TOKEN"}}],
            "extraEnv": [
                {"name": "GHCR_TOKEN", "valueFrom": {"secretKeyRef": {"name": "ghcr", "key": "token"}}},
                {"name": "NO_PROXY", "value": "10.0.0.0/8"},
            ],
        }
    ),
    "tls by a secret": Case({"tls": {"secret": "server-tls"}}),
    "tls by a secret with client certificates": Case({"tls": {"secret": "server-tls", "client_ca": "ca.crt"}}),
    "tls in the values": Case(
        {"tls": {"cert": pems()["tls.crt"], "key": pems()["tls.key"], "client_ca": pems()["ca.crt"]}}
    ),
    "clusterIP": Case({"service": {"type": "ClusterIP", "clusterIP": "10.96.0.80", "annotations": {"a": "b"}}}),
    "loadBalancer": Case(
        {
            "service": {
                "type": "LoadBalancer",
                "port": 443,
                "loadBalancerIP": "192.0.2.1",
                "loadBalancerSourceRanges": ["10.0.0.0/8"],
                "externalTrafficPolicy": "Local",
                "ipFamilyPolicy": "PreferDualStack",
            }
        }
    ),
    "ingress": Case(
        {
            "ingress": {
                "enabled": True,
                "className": "nginx",
                "annotations": {"nginx.ingress.kubernetes.io/proxy-buffering": "off"},
                "hosts": ["cache.example", "cache2.example"],
                "tls": [{"secretName": "web", "hosts": ["cache.example"]}],
            }
        }
    ),
    "httpRoute": Case(
        {
            "httpRoute": {
                "enabled": True,
                "annotations": {"a": "b"},
                "parentRefs": [{"name": "gateway", "namespace": "infra"}],
                "hostnames": ["cache.example"],
            }
        }
    ),
    "monitoring": Case(
        {
            "metrics": {
                "serviceMonitor": {
                    "enabled": True,
                    "labels": {"release": "prometheus"},
                    "interval": "30s",
                    "scrapeTimeout": "10s",
                },
                "prometheusRule": {"enabled": True, "labels": {"release": "prometheus"}},
                "dashboards": {"enabled": True, "annotations": {"grafana_folder": "Registries"}},
            }
        }
    ),
    "network policy": Case(
        {
            "networkPolicy": {
                "clients": [{"ipBlock": {"cidr": "10.0.0.0/8"}}],
                "admin": [{"podSelector": {"matchLabels": {"app": "prometheus"}}}],
                "egress": [{"to": [{"ipBlock": {"cidr": "0.0.0.0/0"}}]}],
            }
        }
    ),
    "no network policy": Case({"networkPolicy": {"enabled": False}}),
    "node configurer": Case({"nodeConfigurer": {"enabled": True}}),
    "node configurer of k3s": Case(
        {
            "nodeConfigurer": {
                "enabled": True,
                "namespace": "nodes",
                "dir": "/var/lib/rancher/k3s/agent/etc/containerd/certs.d",
                "urls": ["https://$(HOST_IP):31443", "https://cache2.internal"],
                "ca": "/etc/ssl/certs/cache.crt",
                "replace": True,
                "uninstallSeconds": 5,
                "securityContext": {"seLinuxOptions": {"type": "spc_t"}},
            },
            "imagePullSecrets": [{"name": "pull"}],
        }
    ),
    "node configurer removes": Case({"nodeConfigurer": {"enabled": True, "remove": True}}),
    "everything else": Case(
        {
            "image": {"repository": "registry.internal/ociregistry", "digest": "sha256:" + "1" * 64},
            "nameOverride": "cache",
            "fullnameOverride": "cache-ociregistry",
            "adminListen": "tcp6:9091",
            "resources": {},
            "serviceAccount": {"create": False},
            "priorityClassName": "",
            "dnsPolicy": "ClusterFirst",
            "hostAliases": [{"ip": "10.0.0.1", "hostnames": ["registry.internal"]}],
            "tolerations": [{"key": "edge", "operator": "Exists"}],
            "affinity": {"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": []}},
            "labels": {"team": "edge"},
            "podAnnotations": {"note": "a"},
            "podLabels": {"zone": "b"},
            "extraVolumes": [{"name": "csi", "emptyDir": {}}],
            "extraVolumeMounts": [{"name": "csi", "mountPath": "/secrets"}],
            "extraObjects": [
                {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "extra"}, "data": {"a": "b"}},
                "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: '{{ .Release.Name }}-templated'}\n",
            ],
        }
    ),
}
