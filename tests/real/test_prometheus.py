"""A real Prometheus reads the metrics of a real daemon, and evaluates the alerts and the dashboard in charts/."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from ociregistry.admin.metrics import DEFINITIONS
from tests.client import fetch
from tests.peers import Prometheus, missing_package
from tests.processes import Daemon, free_port, run, wait_until
from tests.real.caches import daemon_in
from tests.upstream import ScriptedRegistry

CHARTS = Path(__file__).resolve().parents[2] / "charts"
ALERTS = CHARTS / "alerts.yaml"
ALERT_TESTS = CHARTS / "alerts_test.yaml"
_SOON = 30.0


def rules() -> list[dict[str, Any]]:
    """Return the alerts."""
    (group,) = yaml.safe_load(ALERTS.read_text())["groups"]
    return list(group["rules"])


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
    scrape = {"job_name": "ociregistry", "static_configs": [{"targets": [f"127.0.0.1:{port}"]}]}
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


def test_no_alert_fires_for_a_fresh_daemon(watched: Watched) -> None:
    (group,) = watched.prometheus.get("rules")["groups"]
    assert [(rule["name"], rule["health"], rule["state"]) for rule in group["rules"]] == [
        (rule["alert"], "ok", "inactive") for rule in rules()
    ]
