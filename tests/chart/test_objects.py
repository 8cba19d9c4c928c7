"""What the chart renders is valid, restricted, and without a secret in the wrong place."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from typing import Any

import pytest
import yaml

from tests.chart.pod_security import violations
from tests.chart.rendering import CHART, NAMESPACE, RELEASE, SCHEMAS, Rendered, program, render
from tests.chart.values import CASES, PASSWORD, SECRET_PASSWORD, Case, pems
from tests.processes import ROOT


def test_lint() -> None:
    done = subprocess.run(
        [program("helm"), "lint", "--strict", str(CHART)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stdout


def conform(text: str) -> dict[str, Any]:
    """Return what kubeconform says about the objects in a text of YAML."""
    where = f"{SCHEMAS}/{{{{ .ResourceKind }}}}{{{{ .KindSuffix }}}}.json"
    argv = [program("kubeconform"), "-strict", "-summary", "-output", "json", "-schema-location", where, "-"]
    done = subprocess.run(argv, input=text, capture_output=True, text=True, check=False)
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def test_objects_are_valid(rendered: Rendered) -> None:
    report = conform(rendered.text)
    assert report["resources"] == []
    assert report["summary"]["valid"] == len(rendered.objects) > 4


def test_wrong_objects_are_found() -> None:
    wrong = render({}).text.replace("fsGroup:", "fsGroups:").replace("storage: 50Gi", "storage: [50Gi]")
    assert {one["kind"] for one in conform(wrong)["resources"]} == {"Deployment", "PersistentVolumeClaim"}


def test_names_are_unique_and_the_namespace_is_written_out(rendered: Rendered) -> None:
    own = [one for one in rendered.objects if "labels" in one["metadata"]]
    keys = [(one["kind"], one["metadata"]["namespace"], one["metadata"]["name"]) for one in own]
    assert len(set(keys)) == len(keys)
    assert {namespace for _, namespace, _ in keys} <= {NAMESPACE, "nodes"}
    for one in own:
        labels = one["metadata"]["labels"]
        assert labels["app.kubernetes.io/instance"] == RELEASE
        assert labels["app.kubernetes.io/managed-by"] == "Helm"


def test_profile_restricted(rendered: Rendered, case: Case) -> None:
    for one, template in rendered.pods():
        spec = template["spec"]
        assert spec["automountServiceAccountToken"] is False
        if one["kind"] == "DaemonSet":
            hosts = {volume["hostPath"]["path"] for volume in spec["volumes"]}
            assert violations(spec) == [
                "volume hosts: hostPath",
                "container containerd-config: runAsNonRoot is not true",
                "container containerd-config: runAsUser is 0",
            ]
            assert len(hosts) == len(spec["volumes"]) == 1
            assert [mount["mountPath"] for mount in spec["containers"][0]["volumeMounts"]] == [*hosts]
        else:
            assert violations(spec) == ([] if case.restricted else ["volume store: hostPath"])
        for container in spec["containers"]:
            assert container["securityContext"]["readOnlyRootFilesystem"] is True


def test_node_configurer_is_alone_in_its_namespace() -> None:
    nodes = render(CASES["node configurer of k3s"].values)
    places = {(one["kind"], one["metadata"]["name"]): one["metadata"]["namespace"] for one in nodes.objects}
    elsewhere = {key for key, namespace in places.items() if namespace == "nodes"}
    name = f"{RELEASE}-ociregistry-nodes"
    assert elsewhere == {("DaemonSet", name), ("DaemonSet", f"{name}-remove"), ("Job", f"{name}-remove")}
    assert nodes.all("Role") + nodes.all("ClusterRole") == []
    without = render({"imagePullSecrets": [{"name": "pull"}]})
    assert [one for one in nodes.objects if one["metadata"]["namespace"] == NAMESPACE] == list(without.objects)


def test_no_secret_is_outside_a_secret(rendered: Rendered) -> None:
    outside = "".join(yaml.safe_dump(one) for one in rendered.objects if one["kind"] != "Secret")
    for secret in (PASSWORD, SECRET_PASSWORD, "12345678", "PRIVATE KEY", "BEGIN CERTIFICATE"):
        assert secret not in outside
    for config in rendered.all("ConfigMap"):
        assert "password:" not in str(config)


def test_secrets_are_mounted_as_folders(rendered: Rendered) -> None:
    for _, template in rendered.pods():
        for container in template["spec"]["containers"]:
            assert [mount for mount in container["volumeMounts"] if "subPath" in mount] == []


def test_values_with_secrets_make_one() -> None:
    secret = render(CASES["passwords in the values"].values).one("Secret")
    assert sorted(secret["data"]) == [
        "_2001_db8__1__5000.password",
        "mtls.internal.ca",
        "mtls.internal.cert",
        "mtls.internal.key",
        "number.internal.password",
        "registry.internal_5000.password",
    ]
    assert render(CASES["existing secrets"].values).all("Secret") == []
    assert pems()["tls.key"] not in render(CASES["tls in the values"].values).text


def selected(selector: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    return selector.items() <= labels.items()


def test_selectors(rendered: Rendered) -> None:
    """Each Service, policy and budget is for the daemon's pods, and for no others."""
    pod = rendered.pod["metadata"]["labels"]
    others = [template["metadata"]["labels"] for one, template in rendered.pods() if one["kind"] != "Deployment"]
    selectors = [one["spec"]["selector"] for one in rendered.all("Service")]
    selectors += [one["spec"]["podSelector"]["matchLabels"] for one in rendered.all("NetworkPolicy")]
    selectors += [one["spec"]["selector"]["matchLabels"] for one in rendered.all("PodDisruptionBudget")]
    selectors += [rendered.one("Deployment")["spec"]["selector"]["matchLabels"]]
    for selector in selectors:
        assert selected(selector, pod)
        assert not any(selected(selector, labels) for labels in others)
    for one, template in rendered.pods():
        if one["kind"] == "DaemonSet":
            assert selected(one["spec"]["selector"]["matchLabels"], template["metadata"]["labels"])
    daemons = [one["spec"]["selector"]["matchLabels"] for one in rendered.all("DaemonSet")]
    assert len({str(selector) for selector in daemons}) == len(daemons)


def test_ports_lead_to_the_container(rendered: Rendered) -> None:
    (container,) = rendered.pod["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    config = yaml.safe_load(rendered.one("ConfigMap")["data"]["ociregistry.yaml"])
    assert ports == {"registry": 8080, "admin": int(config["admin_listen"].rpartition(":")[2])}
    for service in rendered.all("Service"):
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports.keys()
    probes = [container[f"{kind}Probe"]["httpGet"] for kind in ("startup", "readiness", "liveness")]
    assert probes == [{"path": path, "port": "admin"} for path in ("/readyz", "/readyz", "/livez")]
    for policy in rendered.all("NetworkPolicy"):
        assert {rule["ports"][0]["port"] for rule in policy["spec"]["ingress"]} <= ports.keys()


def test_admin_port_is_not_on_the_nodes(rendered: Rendered) -> None:
    public = rendered.one("Service")
    assert [port["name"] for port in public["spec"]["ports"]] == ["registry"]
    assert rendered.one("Service", "-admin")["spec"]["type"] == "ClusterIP"
    for policy in rendered.all("NetworkPolicy"):
        for rule in policy["spec"]["ingress"]:
            assert rule["ports"][0]["port"] == "registry" or rule["from"]


def test_service_monitor_finds_the_service() -> None:
    rendered = render(CASES["monitoring"].values)
    monitor = rendered.one("ServiceMonitor")["spec"]
    wanted = monitor["selector"]["matchLabels"]
    services = [one for one in rendered.all("Service") if selected(wanted, one["metadata"]["labels"])]
    assert [one["metadata"]["name"] for one in services] == [f"{RELEASE}-ociregistry-admin"]
    assert monitor["namespaceSelector"]["matchNames"] == [services[0]["metadata"]["namespace"]]
    (endpoint,) = monitor["endpoints"]
    assert (endpoint["port"], endpoint["path"]) == (services[0]["spec"]["ports"][0]["name"], "/metrics")
    assert endpoint["relabelings"] == [{"targetLabel": "job", "replacement": "ociregistry"}]
    for kind in ("ServiceMonitor", "PrometheusRule"):
        assert rendered.one(kind)["metadata"]["labels"]["release"] == "prometheus"


def test_alerts_and_dashboards_are_those_of_the_project() -> None:
    rendered = render(CASES["monitoring"].values)
    alerts = yaml.safe_load((ROOT / "charts" / "alerts.yaml").read_text())
    assert rendered.one("PrometheusRule")["spec"] == alerts
    dashboards = {path.name: json.loads(path.read_text()) for path in (ROOT / "charts" / "dashboards").glob("*.json")}
    assert dashboards
    data = rendered.one("ConfigMap", "-dashboards")["data"]
    assert {name: json.loads(text) for name, text in data.items()} == dashboards


@pytest.mark.parametrize(
    ("name", "strategy"),
    [("defaults", "Recreate"), ("hostPath", "Recreate"), ("emptyDir", "Recreate"), ("replicas", "RollingUpdate")],
)
def test_strategy(name: str, strategy: str) -> None:
    """A volume that one pod holds has to be given back before the next starts."""
    assert render(CASES[name].values).one("Deployment")["spec"]["strategy"]["type"] == strategy


def test_rollout_of_a_shared_volume_takes_no_pod_away() -> None:
    strategy = render(CASES["replicas"].values).one("Deployment")["spec"]["strategy"]
    assert strategy["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}


def test_values_of_replicas_arrive() -> None:
    name = "replicas of an existing claim"
    rendered, values = render(CASES[name].values), CASES[name].values
    assert rendered.one("Deployment")["spec"]["replicas"] == values["replicas"]
    assert rendered.one("PodDisruptionBudget")["spec"]["maxUnavailable"] == "50%"
    assert rendered.pod["spec"]["topologySpreadConstraints"] == values["topologySpreadConstraints"]
    claim = render(CASES["replicas"].values).one("PersistentVolumeClaim")["spec"]
    assert (claim["accessModes"], claim["storageClassName"]) == (["ReadWriteMany"], "cephfs")


def test_volume_is_given_to_the_user_once() -> None:
    """Not at each start, which takes minutes with a large store."""
    context = render({}).pod["spec"]["securityContext"]
    assert (context["fsGroup"], context["fsGroupChangePolicy"]) == (context["runAsUser"], "OnRootMismatch")


def test_network_policy() -> None:
    values = CASES["network policy"].values["networkPolicy"]
    policy = render(CASES["network policy"].values).one("NetworkPolicy")["spec"]
    clients, admin = policy["ingress"]
    assert clients == {"ports": [{"port": "registry", "protocol": "TCP"}], "from": values["clients"]}
    assert admin == {"ports": [{"port": "admin", "protocol": "TCP"}], "from": values["admin"]}
    assert (policy["egress"], policy["policyTypes"]) == (values["egress"], ["Ingress", "Egress"])
    usual = render({}).one("NetworkPolicy")["spec"]
    assert usual["policyTypes"] == ["Ingress"]
    assert [rule.keys() for rule in usual["ingress"]] == [{"ports"}, {"ports", "from"}]
    assert render(CASES["no network policy"].values).all("NetworkPolicy") == []


def test_several_replicas_are_spread_and_budgeted() -> None:
    rendered = render(CASES["replicas"].values)
    (constraint,) = rendered.pod["spec"]["topologySpreadConstraints"]
    assert selected(constraint["labelSelector"]["matchLabels"], rendered.pod["metadata"]["labels"])
    assert rendered.one("PodDisruptionBudget")["spec"]["maxUnavailable"] == 1
    assert render({}).all("PodDisruptionBudget") == []


def test_claim() -> None:
    assert render({}).one("PersistentVolumeClaim")["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}
    claim = render(CASES["claim"].values).one("PersistentVolumeClaim")
    assert claim["metadata"]["annotations"] == {"a": "b"}
    assert claim["spec"]["storageClassName"] == ""
    assert "storageClassName" not in render({}).one("PersistentVolumeClaim")["spec"]
    for name in ("existing claim", "hostPath", "emptyDir"):
        assert render(CASES[name].values).all("PersistentVolumeClaim") == []


def test_shutdown_has_the_time_that_the_daemon_takes() -> None:
    assert render({}).pod["spec"]["terminationGracePeriodSeconds"] == 45


def arguments(one: Mapping[str, Any]) -> list[str]:
    words: list[str] = one["spec"]["template"]["spec"]["containers"][0]["args"]
    return words


def test_node_configurer_writes_and_the_hook_removes() -> None:
    rendered = render(CASES["node configurer"].values)
    common = ["containerd-config", "--dir", "/etc/containerd/certs.d", "--owner", f"{NAMESPACE}/{RELEASE}"]
    writes, removes = rendered.one("DaemonSet", "-nodes"), rendered.one("DaemonSet", "-nodes-remove")
    assert arguments(writes) == [*common, "--url", "http://$(HOST_IP):31080", "--write", "--stay", "always"]
    assert arguments(removes) == [*common, "--remove", "--stay", "always"]
    assert "annotations" not in writes["metadata"]
    job = rendered.one("Job", "-nodes-remove")
    assert arguments(job) == ["containerd-config", "--dir", "/wait", "--remove", "--stay", "60s"]
    for hook in (removes, job):
        assert hook["metadata"]["annotations"]["helm.sh/hook"] == "post-delete"
    # The nodes begin before the time that they get.
    weights = [int(hook["metadata"]["annotations"]["helm.sh/hook-weight"]) for hook in (removes, job)]
    assert weights == sorted(set(weights))


def test_node_configurer_of_another_form() -> None:
    rendered = render(CASES["node configurer of k3s"].values)
    words = arguments(rendered.one("DaemonSet", "-nodes"))
    assert words.count("--url") == 2
    assert words[words.index("--ca") + 1] == "/etc/ssl/certs/cache.crt"
    assert "--replace" in words
    (container,) = rendered.one("DaemonSet", "-nodes")["spec"]["template"]["spec"]["containers"]
    assert container["securityContext"]["seLinuxOptions"] == {"type": "spc_t"}
    removing = render(CASES["node configurer removes"].values)
    assert arguments(removing.one("DaemonSet", "-nodes")) == arguments(removing.one("DaemonSet", "-nodes-remove"))
    secure = render({"nodeConfigurer": {"enabled": True}, "tls": {"secret": "server-tls"}})
    assert "https://$(HOST_IP):31080" in arguments(secure.one("DaemonSet", "-nodes"))
