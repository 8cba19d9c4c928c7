"""The bytes that came from each upstream, by name for a bounded number of names."""

from __future__ import annotations

from ociregistry.upstream.traffic import MOST_NAMES, OTHER, Traffic


def test_configured_upstreams_count_by_name_from_the_beginning() -> None:
    traffic = Traffic(["reg.example"])
    assert traffic.received == {OTHER: 0, "reg.example": 0}
    traffic.add("reg.example", 5)
    traffic.add("unknown.example", 7)
    assert traffic.received == {OTHER: 7, "reg.example": 5}


def test_another_upstream_counts_by_name_once_it_has_delivered_a_manifest() -> None:
    traffic = Traffic([])
    traffic.add("reg.example", 3)
    for _ in range(2):
        traffic.delivered("reg.example")
        traffic.add("reg.example", 10)
    assert traffic.received == {OTHER: 3, "reg.example": 20}


def test_only_so_many_others_count_by_name() -> None:
    traffic = Traffic(["configured.example"])
    for number in range(MOST_NAMES + 1):
        traffic.delivered("configured.example")
        traffic.delivered(f"{number}.example")
        traffic.add(f"{number}.example", 1)
    assert len(traffic.received) == MOST_NAMES + 2
    assert traffic.received[OTHER] == 1


def test_reload_keeps_what_was_counted() -> None:
    traffic = Traffic(["old.example"])
    traffic.add("old.example", 5)
    traffic.reconfigure(["new.example"])
    traffic.add("old.example", 5)
    traffic.add("new.example", 1)
    assert traffic.received == {OTHER: 0, "old.example": 10, "new.example": 1}
