"""A real Prometheus reads the metrics of a real daemon, and evaluates the alerts and the dashboard in charts/."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from ociregistry.admin.metrics import DEFINITIONS
from tests.client import fetch
from tests.documents import blocks
from tests.peers import Prometheus, missing_package
from tests.processes import Daemon, free_port, run, wait_until
from tests.real.caches import daemon_in
from tests.upstream import ScriptedRegistry

CHARTS = Path(__file__).resolve().parents[2] / "charts"
ALERTS = CHARTS / "alerts.yaml"
ALERT_TESTS = CHARTS / "alerts_test.yaml"
DASHBOARD: Mapping[str, Any] = json.loads((CHARTS / "dashboards" / "ociregistry.json").read_text())
PANELS: Mapping[str, Mapping[str, Any]] = {
    panel["title"]: panel for panel in DASHBOARD["panels"] if panel["type"] != "row"
}
PAGE = CHARTS.parent / "docs" / "watching.md"
DOCUMENTED = next(yaml.safe_load(block.text) for block in blocks(PAGE) if block.language == "yaml")
"""The configuration of Prometheus in the documentation."""
INSTANCES = "label_values(ociregistry_build_info, instance)"
_SOON = 30.0


def rules() -> list[dict[str, Any]]:
    """Return the alerts."""
    (group,) = yaml.safe_load(ALERTS.read_text())["groups"]
    return list(group["rules"])


def expressions(panel: Mapping[str, Any]) -> list[str]:
    """Return the queries of a panel, with Grafana's variables as it replaces them."""
    values = {"$instance": ".*", "$__rate_interval": "5s", "$__range": "1m"}
    found = []
    for target in panel["targets"]:
        expression = str(target["expr"])
        for variable, value in values.items():
            expression = expression.replace(variable, value)
        assert "$" not in expression
        found.append(expression)
    return found


_KEYWORDS = {"and", "or", "unless", "offset", "bool", "inf", "nan"}


def metrics_in(expression: str) -> set[str]:
    """Return the names of metrics in an expression: no function, label, duration or keyword."""
    plain = re.sub(r'"[^"]*"', "", expression)
    plain = re.sub(r"\{[^}]*\}|\[[^\]]*\]", "", plain)
    plain = re.sub(r"\b(by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)", "", plain)
    plain = re.sub(r"\boffset\s+\w+", "", plain)
    return set(re.findall(r"(?<![\w.])[a-zA-Z_:][\w:]*(?!\w|\s*\()", plain)) - _KEYWORDS


@pytest.fixture(scope="module", autouse=True)
def _promtool() -> None:
    if package := missing_package("promtool"):
        pytest.fail(f"a peer is missing: apt-get install {package}", pytrace=False)


@dataclass(frozen=True)
class Watched:
    """A fresh daemon, and the Prometheus that scrapes it."""

    daemon: Daemon
    metrics: str
    """The URL of its metrics."""
    prometheus: Prometheus


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """A daemon that nothing was asked of, scraped often enough for rates."""
    folder, port = tmp_path_factory.mktemp("prometheus"), free_port()
    (scrape,) = DOCUMENTED["scrape_configs"]
    assert scrape["static_configs"] == [{"targets": ["localhost:8081"]}]
    scrape = {**scrape, "static_configs": [{"targets": [f"127.0.0.1:{port}"]}]}
    with (
        ScriptedRegistry() as upstream,
        daemon_in(folder, upstream, "--admin-listen", f"tcp:{port}:interface=127.0.0.1") as daemon,
        Prometheus(folder / "prometheus", scrape, ALERTS) as prometheus,
    ):
        wait_until(lambda: prometheus.query("count_over_time(up[1m]) > 3"), _SOON, "some scrapes")
        yield Watched(daemon, f"http://127.0.0.1:{port}/metrics", prometheus)


def test_metrics_have_no_fault(watched: Watched, tmp_path: Path) -> None:
    text = tmp_path / "metrics"
    text.write_bytes(fetch(watched.metrics).body)
    done = run(["sh", "-c", f"promtool check metrics < {text}"])
    assert (done.stdout, done.stderr) == ("", "")


def test_prometheus_knows_every_metric(watched: Watched) -> None:
    known = {one.name: (one.type, one.help) for one in DEFINITIONS}
    told = watched.prometheus.get("metadata")
    assert {name: (told[name][0]["type"], told[name][0]["help"]) for name in known} == known


def test_alerts_fire_as_their_tests_say() -> None:
    run(["promtool", "check", "rules", "--lint=all", "--lint-fatal", str(ALERTS)])
    run(["promtool", "test", "rules", str(ALERT_TESTS)])


def test_each_alert_is_tested_when_it_fires_and_when_not() -> None:
    cases = [case for test in yaml.safe_load(ALERT_TESTS.read_text())["tests"] for case in test["alert_rule_test"]]
    tested = {(case["alertname"], bool(case.get("exp_alerts"))) for case in cases}
    assert tested == {(rule["alert"], fires) for rule in rules() for fires in (True, False)}


def test_each_alert_says_what_to_do() -> None:
    for rule in rules():
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert set(rule["annotations"]) == {"summary", "description"}
        for text in rule["annotations"].values():
            assert re.fullmatch(r"\S.*\.", text), rule["alert"]
            assert "://" not in text


def test_each_alert_is_documented() -> None:
    listed = re.findall(r"^\| `(OCI\w+)` \| (\w+) \|", PAGE.read_text(), re.MULTILINE)
    assert listed == [(rule["alert"], rule["labels"]["severity"]) for rule in rules()]


def test_documented_configuration_is_valid(tmp_path: Path) -> None:
    """The alerts have the name that it gives them."""
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(DOCUMENTED))
    shutil.copy(ALERTS, tmp_path / DOCUMENTED["rule_files"][0])
    run(["promtool", "check", "config", str(tmp_path / "prometheus.yml")])


def test_no_alert_fires_for_a_fresh_daemon(watched: Watched) -> None:
    (group,) = watched.prometheus.get("rules")["groups"]
    assert [(rule["name"], rule["health"], rule["state"]) for rule in group["rules"]] == [
        (rule["alert"], "ok", "inactive") for rule in rules()
    ]


def test_metrics_in_an_expression() -> None:
    expression = (
        'sum by (le) (rate(a_bucket{b="c d", e=~"f"}[5m])) / 1e3 * max_over_time(g[1h] offset 1d) and h_total > 0'
    )
    assert metrics_in(expression) == {"a_bucket", "g", "h_total"}


def test_alerts_and_dashboard_name_only_metrics_that_there_are() -> None:
    known = {"up"}
    for one in DEFINITIONS:
        known |= {f"{one.name}_bucket"} if one.type == "histogram" else {one.name}
    listed = set(re.findall(r"^\| `(\w+)`", (CHARTS.parent / "docs" / "metrics.md").read_text(), re.MULTILINE))
    assert {name.removesuffix("_bucket") for name in known} == listed | {"up"}
    for expression in [rule["expr"] for rule in rules()] + [
        one for panel in PANELS.values() for one in expressions(panel)
    ]:
        assert metrics_in(expression), expression
        assert metrics_in(expression) <= known, expression


def test_dashboard_has_the_form_that_grafana_imports() -> None:
    """Any data source and any daemon can be chosen, and no two panels share an id or a place."""
    assert (DASHBOARD["uid"], DASHBOARD["id"], DASHBOARD["schemaVersion"]) == ("ociregistry", None, 39)
    source, instance = DASHBOARD["templating"]["list"]
    assert (source["name"], source["type"], source["query"]) == ("datasource", "datasource", "prometheus")
    assert (instance["name"], instance["type"], instance["query"]["query"]) == ("instance", "query", INSTANCES)
    chosen = {"type": "prometheus", "uid": f"${{{source['name']}}}"}
    assert instance["datasource"] == chosen
    numbers = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(numbers)) == len(numbers)
    assert len(PANELS) == sum(panel["type"] != "row" for panel in DASHBOARD["panels"])
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert taken.isdisjoint(cells), panel["title"]
        assert all(x < 24 for x, _ in cells), panel["title"]
        taken |= cells
    for title, panel in PANELS.items():
        assert panel["description"].endswith("."), title
        assert panel["datasource"] == chosen, title
        references = [target["refId"] for target in panel["targets"]]
        assert len(set(references)) == len(references), title
        for target in panel["targets"]:
            assert target["datasource"] == chosen, title
            selectors = re.findall(r"ociregistry_\w+(\{[^}]*\})?", target["expr"])
            assert all(selector.startswith('{instance=~"$instance"') for selector in selectors), title


def test_each_panel_shows_something_for_a_fresh_daemon(watched: Watched) -> None:
    """Shares of requests are no numbers before the first request."""
    without_numbers = set()
    for title, panel in PANELS.items():
        answers = [watched.prometheus.query(expression) for expression in expressions(panel)]
        values = [value for answer in answers for value in answer.values()]
        assert values, title
        without_numbers |= {title} if all(map(math.isnan, values)) else set()
    times = {"First byte of hits", "First byte of misses", "Duration of misses"}
    assert without_numbers == {"Hit ratio", "Hit ratio over time", *times}


def test_variable_lists_the_daemons(watched: Watched) -> None:
    metric = INSTANCES.removeprefix("label_values(").partition(",")[0]
    host = watched.metrics.removeprefix("http://").removesuffix("/metrics")
    assert watched.prometheus.get("label/instance/values", **{"match[]": metric}) == [host]
