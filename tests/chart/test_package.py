"""The packaged chart, as `make chart` leaves it."""

from __future__ import annotations

import json
import subprocess
import tarfile
from collections.abc import Mapping
from pathlib import Path

import pytest
import yaml

from ociregistry import __version__
from tests.chart.rendering import CHART, NAMESPACE, RELEASE, program, render
from tests.chart.values import CASES
from tests.processes import ROOT

PACKAGE = ROOT / "build" / f"ociregistry-chart-{__version__}.tgz"


@pytest.fixture(scope="module")
def files() -> dict[str, str]:
    """The files of the package."""
    with tarfile.open(PACKAGE) as archive:
        members = [member for member in archive if member.isfile()]
        read = {member.name: archive.extractfile(member) for member in members}
        return {name: file.read().decode() for name, file in read.items() if file is not None}


def test_package_holds_what_it_needs(files: dict[str, str]) -> None:
    paths = {str(path.relative_to(CHART.parent)) for path in CHART.rglob("*") if path.is_file()}
    dashboards = {f"ociregistry/files/dashboards/{path.name}" for path in (ROOT / "charts" / "dashboards").iterdir()}
    assert files.keys() == paths | dashboards
    assert files["ociregistry/files/alerts.yaml"] == (ROOT / "charts" / "alerts.yaml").read_text()
    for name in dashboards:
        assert files[name] == (ROOT / "charts" / "dashboards" / Path(name).name).read_text()


def test_package_renders_the_same(files: dict[str, str]) -> None:
    for name in ("defaults", "monitoring", "node configurer"):
        argv = [
            program("helm"),
            "template",
            RELEASE,
            str(PACKAGE),
            "--namespace",
            NAMESPACE,
        ]
        values = json.dumps(CASES[name].values)
        done = subprocess.run([*argv, "--values", "-"], input=values, capture_output=True, text=True, check=True)
        assert tuple(filter(None, yaml.safe_load_all(done.stdout))) == render(CASES[name].values).objects
        # Nothing beside the objects, such as remarks about links.
        assert done.stderr == ""


def test_metadata_is_what_artifacthub_reads(files: dict[str, str]) -> None:
    about = yaml.safe_load(files["ociregistry/Chart.yaml"])
    annotations = about["annotations"]
    assert about["description"]
    assert about["keywords"]
    assert about["maintainers"]
    assert {annotations["artifacthub.io/license"], annotations["artifacthub.io/category"]} == {
        "Apache-2.0",
        "storage",
    }
    for image in yaml.safe_load(annotations["artifacthub.io/images"]):
        assert image.keys() >= {"name", "image"}
    kinds = {change["kind"] for change in yaml.safe_load(annotations["artifacthub.io/changes"])}
    assert kinds <= {"added", "changed", "deprecated", "removed", "fixed", "security"}


NOTES = """\
apiVersion: v1
kind: ConfigMap
metadata: {name: notes}
data:
  notes: |
    {{- include "ociregistry/templates/NOTES.txt" . | nindent 4 }}
"""
"""Helm prints the notes only when it installs, for which it needs a cluster."""


def notes(values: Mapping[str, object]) -> str:
    objects = render({**values, "extraObjects": [NOTES]}).all("ConfigMap")
    (text,) = (one["data"]["notes"] for one in objects if one["metadata"]["name"] == "notes")
    return str(text)


@pytest.mark.parametrize("name", CASES)
def test_notes_tell_the_next_step(name: str) -> None:
    text = notes(CASES[name].values)
    assert f"rollout status deployment/{RELEASE}-ociregistry" in text
    assert "crictl pull" in text
    enabled = CASES[name].values.get("nodeConfigurer", {}).get("enabled", False)
    persistence = CASES[name].values.get("persistence", {}).get("type", "claim")
    assert ("containerd-config --url" in text) != enabled
    assert ("pod-security.kubernetes.io/enforce=privileged" in text) == (
        (enabled and "removes" not in name) or persistence == "hostPath"
    )
    assert ("describe persistentvolumeclaim" in text) == (persistence == "claim")
    assert "\n\n\n" not in text


LEFT = "`helm uninstall` leaves the claim"
OUTSIDE = "is outside the usual range"


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("defaults", "--url http://ADDRESS-OF-THE-NODE:31080 --write"),
        ("tls by a secret", "--url https://ADDRESS-OF-THE-NODE:31080 --write"),
        ("tls in the values", "--url https://ADDRESS-OF-THE-NODE:31080 --write"),
        ("clusterIP", "--url http://ADDRESS-OF-THE-SERVICE:8080 --write"),
        ("loadBalancer", "--url http://ADDRESS-OF-THE-SERVICE:443 --write"),
        ("emptyDir", "what is cached is lost with the pod"),
        ("hostPath", f"kubectl label namespace {NAMESPACE} --overwrite"),
        ("node configurer", f"kubectl label namespace {NAMESPACE} --overwrite"),
        ("node configurer of k3s", "kubectl label namespace nodes --overwrite"),
        ("node configurer of k3s", "kubectl --namespace nodes rollout status"),
        ("node configurer removes", "set nodeConfigurer.enabled=false"),
        ("defaults", LEFT),
    ],
)
def test_notes_are_of_the_values(name: str, told: str) -> None:
    assert told in notes(CASES[name].values)


def test_notes_leave_out_what_is_not_so() -> None:
    assert LEFT not in notes(CASES["claim"].values)
    for port in (80, 29999, 32768):
        assert f"The node port {port} {OUTSIDE}" in notes({"service": {"nodePort": port}})
        assert OUTSIDE not in notes({"service": {"nodePort": port, "type": "ClusterIP"}})
    for port in (30000, 32767):
        assert OUTSIDE not in notes({"service": {"nodePort": port}})


@pytest.mark.parametrize("name", ["missing.tar", "other.tar"])
def test_import_names_what_is_no_archive_of_images(tmp_path: Path, name: str) -> None:
    with tarfile.open(tmp_path / "other.tar", "w") as archive:
        archive.add(CHART / "Chart.yaml", "manifest.json")
    script = ["sh", str(CHART / "import-images.sh"), str(tmp_path / name)]
    failed = subprocess.run(script, capture_output=True, text=True, check=False)
    why = {"missing.tar": "cannot be read", "other.tar": "not an OCI layout, as it has no index.json"}[name]
    assert failed.returncode == 1
    assert failed.stderr.splitlines()[-1].startswith(f"{script[1]}: {script[2]}: {why}")
    assert len(failed.stderr.splitlines()) == 1
