"""The chart's objects as `helm template` renders them."""

from __future__ import annotations

import base64
import functools
import json
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.processes import ROOT

CHART = ROOT / "charts" / "ociregistry"
SCHEMAS = Path(__file__).with_name("schemas")
RELEASE, NAMESPACE = "cache", "apps"

Object = Mapping[str, Any]
Values = Mapping[str, object]


class RenderFailed(Exception):
    """Helm refuses the values; the message is its own."""


def program(name: str) -> str:
    """Return the path of a program that `make test-chart` builds.

    Raises:
        AssertionError: it is missing.
    """
    path = shutil.which(name)
    assert path is not None, f"{name} is missing: make test-chart builds it"
    return path


@dataclass(frozen=True)
class Rendered:
    """The objects of one release."""

    text: str
    objects: tuple[Object, ...]

    def all(self, kind: str) -> list[Object]:
        """Return the objects of a kind."""
        return [one for one in self.objects if one["kind"] == kind]

    def one(self, kind: str, suffix: str = "") -> Object:
        """Return the object of a kind whose name ends with `suffix` behind the usual one."""
        (found,) = (one for one in self.all(kind) if one["metadata"]["name"] == f"{RELEASE}-ociregistry{suffix}")
        return found

    @property
    def pod(self) -> Object:
        """The template of the daemon's pods."""
        template: Object = self.one("Deployment")["spec"]["template"]
        return template

    def pods(self) -> Iterator[tuple[Object, Object]]:
        """Yield each object that makes pods, with their template."""
        for one in self.objects:
            if one["kind"] in ("DaemonSet", "Deployment", "Job"):
                yield one, one["spec"]["template"]

    def volume(self, existing: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
        """Return the files of the volume with the configuration, as the kubelet makes them.

        `existing` are the Secrets of the cluster, by their names.
        """
        (volume,) = (one for one in self.pod["spec"]["volumes"] if one["name"] == "config")
        files: dict[str, str] = {}
        for source in volume["projected"]["sources"]:
            ((kind, reference),) = source.items()
            data = self._data(kind, reference["name"], existing, optional=reference.get("optional", False))
            for item in reference.get("items") or [{"key": key, "path": key} for key in data]:
                assert item["path"] not in files, "two files with one path: the API server refuses this"
                files[item["path"]] = data[item["key"]]
        return files

    def _data(
        self, kind: str, name: str, existing: Mapping[str, Mapping[str, str]], *, optional: bool
    ) -> Mapping[str, str]:
        if kind == "configMap":
            data: Mapping[str, str] = self.one("ConfigMap")["data"]
            return data
        own = [one for one in self.all("Secret") if one["metadata"]["name"] == name]
        if own:
            return {key: base64.b64decode(text).decode() for key, text in own[0]["data"].items()}
        return existing.get(name, {}) if optional else existing[name]


def render(values: Values) -> Rendered:
    """Render the chart with these values.

    Raises:
        RenderFailed: helm refuses them.
    """
    return _render(json.dumps(values, sort_keys=True))


@functools.cache
def _render(values: str) -> Rendered:
    argv = [program("helm"), "template", RELEASE, str(CHART), "--namespace", NAMESPACE]
    argv += ["--values", "-"]
    done = subprocess.run(argv, input=values, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RenderFailed(done.stderr)
    return Rendered(done.stdout, tuple(filter(None, yaml.safe_load_all(done.stdout))))
