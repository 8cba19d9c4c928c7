"""The values of the chart that docs/kubernetes.md shows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from ociregistry.settings import load_settings
from tests.chart.rendering import CHART, render
from tests.chart.values import pems
from tests.documents import ROOT, Block, blocks

PAGE = ROOT / "docs" / "kubernetes.md"
SHOWN = [block for block in blocks(PAGE) if block.is_of_the_chart]
SECRETS = {"harbor": {"password": "p", **pems()}}


@pytest.mark.parametrize("block", SHOWN, ids=str)
def test_values_have_an_effect(block: Block, tmp_path: Path) -> None:
    rendered = render(yaml.safe_load(block.text))
    assert rendered.objects != render({}).objects
    for name, text in rendered.volume(SECRETS).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert load_settings({}, (), tmp_path / "ociregistry.yaml").warnings == ()


def test_volume_is_one_for_the_claim() -> None:
    """That of the quick start: without a storage class, which the empty name stands for."""
    (block,) = [block for block in blocks(PAGE) if block.is_of_the_cluster]
    volume = yaml.safe_load(block.text)["spec"]
    claim = render({"fullnameOverride": "ociregistry"}).all("PersistentVolumeClaim")[0]
    assert volume["claimRef"]["name"] == claim["metadata"]["name"]
    assert volume["accessModes"] == claim["spec"]["accessModes"]
    assert volume["capacity"]["storage"] == claim["spec"]["resources"]["requests"]["storage"]


def test_values_in_the_text_exist() -> None:
    text = PAGE.read_text(encoding="utf-8")
    values = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
    known = "|".join(values)
    found = re.findall(rf"(?:`|--set |,)((?:{known})(?:\.[a-zA-Z_]+)+)", text)
    assert len(found) > 15
    for path in found:
        where = values
        for key in path.split("."):
            # These are the daemon's own, for which the schema stands.
            if where == {} or isinstance(where, list):
                break
            assert key in where, path
            where = where[key]
