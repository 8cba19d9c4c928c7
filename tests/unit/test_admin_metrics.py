"""Metrics: names, units, values, and labels that clients cannot multiply."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from prometheus_client.parser import text_string_to_metric_families
from twisted.internet.task import Clock

from ociregistry.admin.metrics import DEFINITIONS, Metrics
from ociregistry.admin.requests import BUCKETS, CutBy, Kind, Outcome, Requests
from ociregistry.upstream.bandwidth import BandwidthLimit
from ociregistry.upstream.breaker import CircuitBreakers, LinkState
from ociregistry.upstream.origin import Origin
from ociregistry.upstream.traffic import OTHER, Traffic
from tests.unit.support.statuses import STARTED, STATUS, Samples, samples, scraped

RECEIVED = "ociregistry_received_bytes_total"
UNITS = ("_total", "_bytes", "_seconds", "_bytes_per_second", "_info")
UNITLESS = re.compile(
    "_(?:degraded|in_flight|downloads|records|blobs|images|indexes|disk_full|link_up|links|files|faults|last_reload_successful)$"
)


def test_names_follow_the_conventions() -> None:
    """https://prometheus.io/docs/practices/naming/: a prefix, a base unit in plural, `_total` for counters."""
    names = [definition.name for definition in DEFINITIONS]
    assert len(set(names)) == len(names)
    for definition in DEFINITIONS:
        assert re.fullmatch("ociregistry(_[a-z]+)+", definition.name)
        assert definition.name.endswith(UNITS) or UNITLESS.search(definition.name), definition.name
        assert (definition.type == "counter") == definition.name.endswith("_total")
        assert definition.help.endswith(".")


def test_each_metric_has_its_type_and_meaning() -> None:
    families = {
        family.name: family for family in text_string_to_metric_families(Metrics(lambda: STATUS).text().decode())
    }
    for definition in DEFINITIONS:
        family = families[definition.name.removesuffix("_total")]
        assert (family.type, family.documentation) == (definition.type, definition.help)
    assert {"process_open_fds", "process_resident_memory_bytes", "python_gc_collections", "python_info"} <= set(
        families
    )


def test_values_are_those_of_the_status() -> None:
    found = scraped()

    def value(name: str, **labels: str) -> float:
        return found[f"ociregistry_{name}", tuple(sorted(labels.items()))]

    assert value("build_info", version="1.2.3") == 1
    assert value("degraded") == 0
    assert value("records", kind="list") == 2
    assert value("records", kind="image") == 3
    assert (value("store_bytes"), value("store_blobs")) == (1234, 8)
    assert value("disk_size_bytes") == 100
    assert value("disk_free_bytes") == 10
    assert value("disk_reserve_bytes") == 7
    assert value("disk_full") == 0
    assert value("incomplete_images") == 4
    assert value("missing_bytes") == 5
    assert value("pending_images") == 1
    assert value("incomplete_indexes") == 6
    assert [value("downloads", **{"for": who}) for who in ("clients", "background")] == [1, 2]
    assert value("downloads_missing_bytes") == 140
    assert value("bandwidth_limit_bytes_per_second") == 1000
    assert value("received_bytes_total", upstream="reg.example") == 12
    assert [value("preload_images", state=state) for state in ("all", "loaded", "failed")] == [9, 5, 1]
    assert value("last_prune_timestamp_seconds") == STARTED.timestamp()
    assert value("pruned_image_urls_total") == 3
    assert value("pruned_bytes_total") == 8
    assert value("verify_damaged_total") == 2
    assert value("damaged_files") == 1
    assert value("requests_in_flight") == 3
    assert value("link_up", host="reg.example:443") == 1
    assert value("link_up", host="down.example:443") == 0
    assert value("link_down_seconds", host="down.example:443") == 7.5
    assert [value("links", state=state) for state in ("up", "down")] == [1, 1]


def test_what_is_not_there_has_no_sample() -> None:
    found = {name for name, _ in scraped(bandwidth=BandwidthLimit(), preload=None, usage=None)}
    for name in (
        "store_bytes",
        "store_blobs",
        "bandwidth_limit_bytes_per_second",
        "preload_images",
        "next_prune_timestamp_seconds",
    ):
        assert f"ociregistry_{name}" not in found


def test_fault_is_told() -> None:
    found = scraped(reasons=("the disk is full", "a link is down"), faults=("the disk is full",))
    assert (found["ociregistry_degraded", ()], found["ociregistry_store_faults", ()]) == (1, 1)


def test_requests_and_histograms() -> None:
    requests = Requests()
    tally = requests.tally(Kind.BLOB, Outcome.MISS)
    tally.count(100, 0.02, 3.0)
    tally.count(1, 0.0, 1000.0)
    requests.tally(Kind.MANIFEST, Outcome.CLIENT_ERROR).count(0, 0.0, 0.0)
    requests.cut[Kind.BLOB, CutBy.SERVER] += 1
    found = scraped(requests=requests)
    miss = (("kind", "blob"), ("outcome", "miss"))
    assert found["ociregistry_requests_total", miss] == 2
    assert found["ociregistry_sent_bytes_total", miss] == 101
    assert found["ociregistry_requests_total", (("kind", "manifest"), ("outcome", "4xx"))] == 1
    assert found["ociregistry_answers_cut_total", (("by", "server"), ("kind", "blob"))] == 1
    assert sum(count for (name, _), count in found.items() if name == "ociregistry_requests_total") == 3
    for name, total, below in (("first_byte", 0.02, 2), ("request_duration", 1003.0, 1)):
        assert found[f"ociregistry_{name}_seconds_sum", miss] == pytest.approx(total)
        assert found[f"ociregistry_{name}_seconds_count", miss] == 2
        bounds = {
            dict(labels)["le"]: count
            for (sample, labels), count in found.items()
            if sample == f"ociregistry_{name}_seconds_bucket" and set(miss) <= set(labels)
        }
        assert len(bounds) == len(BUCKETS) + 1
        assert (bounds["+Inf"], bounds["10.0"]) == (2, below)


def test_host_that_has_just_been_lost_is_down() -> None:
    found = scraped(links=(LinkState("reg.example:443", True, False, 0.0, "", None),))
    assert found["ociregistry_link_up", (("host", "reg.example:443"),)] == 0


def test_names_of_upstreams_are_bounded(clock: Clock) -> None:
    """10,000 names that clients make up, all of which even answer, leave at most 60 values of each label."""

    def links() -> tuple[LinkState, ...]:
        return breakers.links(lambda host, port: host == "down.example")

    traffic, breakers = Traffic(["docker.io", "down.example"]), CircuitBreakers(clock)
    metrics = Metrics(lambda: replace(STATUS, links=links(), received=traffic.received))
    found: Samples = {}
    for number in range(10_000):
        name = f"made-up-{number}.example"
        traffic.add(name, 1)
        traffic.delivered(name)
        traffic.add(name, 1)
        breakers.get(Origin("https", name, 443)).enter(name).answered()
        if number % 1000 == 0:
            breakers.get(Origin("https", "down.example", 443)).failed(clock.seconds(), "no route")
            found |= samples(metrics.text())
    traffic.add("docker.io", 7)
    found |= samples(metrics.text())
    values: dict[str, set[str]] = {}
    for _, labels in found:
        for label, value in labels:
            values.setdefault(label, set()).add(value)
    assert max(map(len, values.values())) <= 60
    made_up = {f"made-up-{number}.example" for number in range(50)}
    assert values["upstream"] == made_up | {"docker.io", "down.example", OTHER}
    assert "down.example:443" in values["host"]
    received = {dict(labels)["upstream"]: count for (name, labels), count in found.items() if name == RECEIVED}
    assert (received["docker.io"], received["made-up-49.example"], sum(received.values())) == (7, 1, 20_007)
