"""Values that contradict each other are refused by a line that says what to do."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.chart.rendering import CHART, RenderFailed, render

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"replicas": 2}, "replicas: 2 pods need one volume that all of them can write: set persistence.accessModes"),
    ({"replicas": 2, "persistence": {"type": "emptyDir"}}, "(persistence.type is emptyDir)"),
    ({"replicas": 2, "persistence": {"type": "hostPath"}}, "(persistence.type is hostPath)"),
    # The access modes are those of a claim.
    (
        {"replicas": 2, "persistence": {"type": "emptyDir", "accessModes": ["ReadWriteMany"]}},
        "a storage class that offers it (persistence.type is emptyDir)",
    ),
    ({"replicas": 2, "persistence": {"type": "existingClaim", "existingClaim": "a"}}, "replicas: 2 pods need one"),
    ({"persistence": {"type": "existingClaim"}}, "persistence.existingClaim: the name of the claim is missing"),
    ({"persistence": {"existingClaim": "a"}}, "persistence.existingClaim: has no effect with persistence.type claim"),
    ({"service": {"clusterIP": "None"}}, "service.clusterIP: nodes do not resolve the names of Services"),
    ({"ingress": {"enabled": True}}, "ingress.hosts: a host name is missing"),
    ({"httpRoute": {"enabled": True}}, "httpRoute.parentRefs: a gateway is missing"),
    ({"tls": {"cert": "-----BEGIN CERTIFICATE-----"}}, "tls: a certificate and its key go together"),
    ({"tls": {"client_ca": "-----BEGIN CERTIFICATE-----"}}, "tls: a certificate and its key go together"),
    (
        {"tls": {"secret": "a", "client_ca": "-----BEGIN CERTIFICATE-----\n"}},
        "tls.client_ca: beside `secret`,",
    ),
    ({"config": {"proxy": "http://u:p@proxy:1"}}, "config.proxy: a password would be in the ConfigMap"),
    ({"registries": [{"name": "a.b", "proxy": "http://u:p@c"}]}, "registries (a.b).proxy: a password would be in"),
    ({"registries": [{"name": "a.b", "auth": {"identity_token": "x"}}]}, "auth.identity_token: it would be in the"),
    ({"registries": [{"name": "a.b", "auth": {"user": "u", "key": "x"}}]}, "auth.key: has no effect without secret"),
    (
        {"registries": [{"name": "a.b", "auth": {"user": "u", "secret": "s", "password": "p"}}]},
        "registries (a.b).auth: secret, password, password_file and password_env exclude each other",
    ),
    ({"registries": [{"name": "a.b", "tls": {"secret": "s"}}]}, "tls.secret: name its keys, such as `ca: ca.crt`"),
    ({"registries": [{"name": "a.b", "tls": {"ca": "ca.crt"}}]}, "registries (a.b).tls.ca: PEM text, an absolute"),
    ({"registries": [{"name": "a.b", "tls": {"secret": "s", "ca": "/a"}}]}, "tls.ca: beside `secret`, the name of a"),
    (
        {"nodeConfigurer": {"enabled": True}, "service": {"type": "ClusterIP"}},
        "nodeConfigurer.urls: with service.type ClusterIP the address that nodes use is missing",
    ),
    ({"nodeConfigurer": {"remove": True}}, "nodeConfigurer.remove: needs nodeConfigurer.enabled"),
    # By the schema.
    ({"replica": 2}, "additional properties 'replica' not allowed"),
    ({"config": {"loglevel": "info"}}, "additional properties 'loglevel' not allowed"),
    ({"config": {"port": 5000}}, "additional properties 'port' not allowed"),
    ({"config": {"log_level": "loud"}}, "/config/log_level"),
    ({"config": {"max_bandwidth": "2Mbps"}}, "/config/max_bandwidth"),
    ({"config": {"bandwidth": [{"from": "08:00", "to": "18:00", "max": "2MB"}]}}, "/config/bandwidth/0/max"),
    ({"config": {"reserve": "much"}}, "/config/reserve"),
    ({"config": {"prune": {"max_size": "40 gigabytes"}}}, "/config/prune/max_size"),
    ({"config": {"prune": {"max_share": "0.5"}}}, "/config/prune/max_share"),
    ({"config": {"verify": {"max_rate": "5MB/s"}}}, "/config/verify/max_rate"),
    ({"config": {"max_connections": 10001}}, "/config/max_connections"),
    ({"config": {"concurrent": 0}}, "/config/concurrent"),
    ({"config": {"bandwidth": [{"from": "08:00", "max": "2Mbit"}]}}, "missing property 'to'"),
    ({"registries": [{}]}, "missing property 'name'"),
    ({"registries": [{"name": "a.b", "nam": "a.b"}]}, "additional properties 'nam' not allowed"),
    ({"registries": [{"name": "https://a.b"}]}, "/registries/0/name"),
    ({"registries": [{"name": "a.b/team"}]}, "/registries/0/name"),
    ({"registries": [{"name": "a.b", "auth": {"user": "u", "password": 123}}]}, "got number, want string"),
    ({"registries": [{"name": "a.b", "auth": {"password_file": "relative"}}]}, "/registries/0/auth/password_file"),
    ({"registries": [{"name": "a.b", "mirrors": ["mirror:8080"]}]}, "/registries/0/mirrors/0"),
    ({"registries": [{"name": "a.b", "mirrors": ["https://user:secret@mirror"]}]}, "/registries/0/mirrors/0"),
    ({"replicas": -1}, "/replicas"),
    ({"adminListen": "8081"}, "/adminListen"),
    ({"service": {"nodePort": 0}}, "/service/nodePort"),
    ({"service": {"port": 65536}}, "/service/port"),
    ({"service": {"type": "ExternalName"}}, "/service/type"),
    ({"persistence": {"type": "pvc"}}, "/persistence/type"),
    ({"persistence": {"size": "50 GB"}}, "/persistence/size"),
    ({"persistence": {"accessModes": []}}, "/persistence/accessModes"),
    ({"persistence": {"accessModes": ["ReadWriteAll"]}}, "/persistence/accessModes/0"),
    ({"persistence": {"type": "hostPath", "hostPath": "store"}}, "/persistence/hostPath"),
    ({"image": {"digest": "sha256:1"}}, "/image/digest"),
    ({"nodeConfigurer": {"urls": ["10.0.0.1:31080"]}}, "/nodeConfigurer/urls/0"),
    ({"nodeConfigurer": {"dir": "certs.d"}}, "/nodeConfigurer/dir"),
    ({"nodeConfigurer": {"uninstallSeconds": 3601}}, "/nodeConfigurer/uninstallSeconds"),
    ({"preload": ["two words"]}, "/preload/0"),
]


@pytest.mark.parametrize(("values", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(RenderFailed) as refused:
        render(values)
    assert message in str(refused.value)


def open_objects(schema: Any, path: str = "") -> Iterator[str]:
    """Yield the paths in a schema of objects that allow other keys than those that it names."""
    if isinstance(schema, dict):
        if "properties" in schema and schema.get("additionalProperties") is not False:
            yield path
        for key, value in schema.items():
            yield from open_objects(value, f"{path}/{key}")


def test_misspelt_keys_are_refused_everywhere() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
    # The rest of a variable is what Kubernetes allows.
    assert list(open_objects(schema)) == ["/properties/extraEnv/items"]
