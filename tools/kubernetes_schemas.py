"""Write tests/chart/schemas from the OpenAPI of Kubernetes: `python -m tools.kubernetes_schemas` (needs Go).

What an API server publishes at /openapi/v3 is in the Go module of Kubernetes, the resources of others are in theirs.
Kept are the kinds that the chart uses, without descriptions, in the form in which kubeconform reads them.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "tests" / "chart" / "schemas"

_KUBERNETES = "k8s.io/kubernetes@v1.37.2"
_KINDS = {
    "api__v1": ("ConfigMap", "Namespace", "PersistentVolumeClaim", "Pod", "Secret", "Service", "ServiceAccount"),
    "apis__apps__v1": ("DaemonSet", "Deployment"),
    "apis__batch__v1": ("Job",),
    "apis__networking.k8s.io__v1": ("Ingress", "NetworkPolicy"),
    "apis__policy__v1": ("PodDisruptionBudget",),
}
_OPERATOR = "github.com/prometheus-operator/prometheus-operator@v0.85.0"
_GATEWAY = "sigs.k8s.io/gateway-api@v1.6.0"
_RESOURCES = (
    (_OPERATOR, "example/prometheus-operator-crd/monitoring.coreos.com_servicemonitors.yaml", "v1"),
    (_OPERATOR, "example/prometheus-operator-crd/monitoring.coreos.com_prometheusrules.yaml", "v1"),
    (_GATEWAY, "config/crd/standard/gateway.networking.k8s.io_httproutes.yaml", "v1"),
)
_COMMON = "definitions.json"
_KEPT = frozenset(
    (
        *(
            "$ref",
            "additionalProperties",
            "allOf",
            "anyOf",
            "const",
            "enum",
            "format",
            "items",
            "maximum",
            "maxItems",
        ),
        *(
            "maxLength",
            "maxProperties",
            "minimum",
            "minItems",
            "minLength",
            "minProperties",
            "not",
            "oneOf",
            "pattern",
        ),
        *("properties", "required", "type", "uniqueItems"),
    )
)
_FORMATS = frozenset({"date-time", "byte"})


def _module(name: str) -> Path:
    """Return the folder of a Go module, which is downloaded if it is missing."""
    done = subprocess.run(["go", "mod", "download", "-json", name], capture_output=True, check=True, cwd="/")
    return Path(json.loads(done.stdout)["Dir"])


def reduced(schema: Any) -> Any:
    """Return a schema without descriptions and defaults, which refuses properties that it does not name."""
    if isinstance(schema, list):
        return [reduced(one) for one in schema]
    if not isinstance(schema, Mapping):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    found = {key: value for key, value in schema.items() if key in _KEPT}
    if found.get("format") not in _FORMATS:
        found.pop("format", None)
    if "allOf" in found and len(found["allOf"]) == 1 and "$ref" in found["allOf"][0]:
        return {"$ref": found["allOf"][0]["$ref"].replace("#/components/schemas/", "#/definitions/")}
    for key, value in found.items():
        if key == "properties":
            found[key] = {name: reduced(one) for name, one in value.items()}
        elif key == "$ref":
            found[key] = value.replace("#/components/schemas/", "#/definitions/")
        else:
            found[key] = reduced(value)
    if "properties" in found and not schema.get("x-kubernetes-preserve-unknown-fields"):
        found.setdefault("additionalProperties", False)
    return found


def _references(schema: Any) -> Iterable[str]:
    if isinstance(schema, Mapping):
        for key, value in schema.items():
            if key == "$ref":
                yield value.rpartition("/")[2]
            else:
                yield from _references(value)
    elif isinstance(schema, list):
        for one in schema:
            yield from _references(one)


def _file(kind: str, group: str, version: str) -> str:
    return "-".join(filter(None, (kind.lower(), group.partition(".")[0], version))) + ".json"


def schemas() -> dict[str, Any]:
    """Return the schemas by the names of their files."""
    files: dict[str, Any] = {}
    known: dict[str, Any] = {}
    folder = _module(_KUBERNETES) / "api" / "openapi-spec" / "v3"
    for name, kinds in _KINDS.items():
        document = json.loads((folder / f"{name}_openapi.json").read_text(encoding="utf-8"))
        for key, schema in document["components"]["schemas"].items():
            known[key] = reduced(schema)
            for named in schema.get("x-kubernetes-group-version-kind", ()):
                if named["kind"] in kinds and key.endswith(f".{named['kind']}"):
                    path = _file(named["kind"], named["group"], named["version"])
                    files[path] = {"$ref": f"{_COMMON}#/definitions/{key}"}
    needed = {reference for schema in files.values() for reference in _references(schema)}
    while more := {one for key in needed for one in _references(known[key])} - needed:
        needed |= more
    files[_COMMON] = {"definitions": {key: known[key] for key in sorted(needed)}}
    for module, path, version in _RESOURCES:
        definition = yaml.safe_load((_module(module) / path).read_text(encoding="utf-8"))["spec"]
        (schema,) = (one["schema"]["openAPIV3Schema"] for one in definition["versions"] if one["name"] == version)
        files[_file(definition["names"]["kind"], definition["group"], version)] = reduced(schema)
    return files


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, schema in schemas().items():
        text = json.dumps(schema, indent=1, sort_keys=True)
        (FOLDER / name).write_text(f"{text}\n", encoding="utf-8")
