"""The Helm chart without helm: what in it depends on the program or on other files of the project."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import yaml

from ociregistry import __version__
from ociregistry.config.file import _SECTIONS
from ociregistry.daemon import _AT_NEXT_START
from ociregistry.settings import OPTIONS
from tests.processes import ROOT
from tools.chart_readme import CHART, page, rows
from tools.kubernetes_schemas import FOLDER, reduced

OWN_VALUES = {"admin_listen", "image_path", "listen", "port", "preload_images", "registries", "tls"}
"""Settings of the daemon for which the chart has values of its own, or which a pod does not have."""


def schema() -> Any:
    return json.loads((CHART / "values.schema.json").read_text())


def test_readme_is_current() -> None:
    assert (CHART / "README.md").read_text() == page()


def test_versions_are_those_of_the_program() -> None:
    about = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert (about["version"], about["appVersion"]) == (__version__, __version__)
    (image,) = yaml.safe_load(about["annotations"]["artifacthub.io/images"])
    repository = yaml.safe_load((CHART / "values.yaml").read_text())["image"]["repository"]
    assert image["image"] == f"{repository}:{__version__}"


def test_every_setting_is_a_value() -> None:
    known = set(schema()["properties"]["config"]["properties"])
    assert known == {*(option.key for option in OPTIONS), *_SECTIONS} - OWN_VALUES


def test_settings_of_the_next_start_are_the_daemons() -> None:
    (line,) = re.findall(r"range list (.*) -\}\}", (CHART / "templates" / "_config.tpl").read_text())[-1:]
    known = set(re.findall(r'"(\w+)"', line))
    # Of `platform`, as the daemon has it, these are parts.
    assert known == {*_AT_NEXT_START, "arch", "os", "os_version"} - {"image_path", "listen", "port", "preload_images"}


def test_schema_names_every_value() -> None:
    def compare(values: dict[str, Any], found: dict[str, Any], where: str) -> None:
        if "properties" not in found:
            return
        assert found["additionalProperties"] is False, where
        assert values.keys() - found["properties"].keys() == set(), where
        for key, value in values.items():
            if isinstance(value, dict):
                compare(value, found["properties"][key], f"{where}.{key}")

    values = yaml.safe_load((CHART / "values.yaml").read_text())
    compare(values, schema(), "values")
    # `global` is what a parent chart hands down.
    assert schema()["properties"].keys() - values.keys() == {"global"}


def test_alerts_and_dashboards_are_links() -> None:
    """A copy could differ."""
    assert (CHART / "files" / "alerts.yaml").resolve() == ROOT / "charts" / "alerts.yaml"
    assert (CHART / "files" / "dashboards").resolve() == ROOT / "charts" / "dashboards"


def test_rows_of_values() -> None:
    text = (
        "# About the file.\n\n# -- One,\n# two.\nfirst: 1\n"
        "group:\n  # -- A | B.\n  # @default -- that of the cluster\n  second: ''\n"
        "# -- Whole.\nthird: {a: [1]}\n"
    )
    assert list(rows(text)) == [
        "| `first` | int | `1` | One, two. |\n",
        "| `group.second` | string | that of the cluster | A \\| B. |\n",
        '| `third` | object | `{"a": [1]}` | Whole. |\n',
    ]
    with pytest.raises(ValueError, match=r"group\.bare: has no description"):
        list(rows("group:\n  bare: 1\n"))


def test_schemas_of_kubernetes_are_small() -> None:
    assert 0 < sum(path.stat().st_size for path in FOLDER.iterdir()) < 600_000


def test_schema_of_kubernetes_is_reduced() -> None:
    found = reduced(
        {
            "description": "a",
            "type": "object",
            "x-kubernetes-group-version-kind": [],
            "properties": {
                "description": {"type": "string", "description": "b", "default": ""},
                "spec": {"allOf": [{"$ref": "#/components/schemas/io.Spec"}], "default": {}},
                "port": {"x-kubernetes-int-or-string": True, "anyOf": []},
                "free": {"type": "object", "properties": {}, "x-kubernetes-preserve-unknown-fields": True},
            },
        }
    )
    assert found == {
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "description": {"type": "string"},
            "spec": {"$ref": "#/definitions/io.Spec"},
            "port": {"type": ["integer", "string"]},
            "free": {"type": "object", "properties": {}},
        },
    }
