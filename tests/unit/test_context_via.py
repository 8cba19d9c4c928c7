"""Parsing and rendering of the Via header."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ociregistry.context import NO_VIA, Via, new_instance

A, B, C = (f"ociregistry-{letter * 16}" for letter in "abc")
INSTANCES = st.from_regex("ociregistry-[0-9a-f]{16}", fullmatch=True)
VISIBLE = st.text(st.characters(min_codepoint=32, max_codepoint=255), max_size=30)


def test_instance_name_is_unique_per_process() -> None:
    names = {new_instance() for _ in range(100)}
    assert len(names) == 100
    for name in names:
        assert re.fullmatch("ociregistry-[0-9a-f]{16}", name)
        assert Via.parse(f"1.1 {name}") == Via((name,))


@pytest.mark.parametrize(
    ("via", "instances"),
    [
        ("", ()),
        (f"1.1 {A}", (A,)),
        (f"1.1 {A}, 1.1 {B}", (A, B)),
        (f"1.1 {B},1.1 {A}", (B, A)),
        (f"HTTP/1.1 {A} (ours),  2 {B}", (A, B)),
        (f"1.1 {A}, 1.1 {A}", (A, A)),
        ("1.1 varnish, 1.0 proxy.example:8080 (squid/5.7)", ()),
        (f"1.1 varnish, 1.1 {A}, 1.1 google, 1.1 {B}, 2 cdn", (A, B)),
        ("1.1 ociregistry, 1.1 ociregistry-abc, 1.1 ociregistry-0123456789ABCDEF", ()),
        ("1.1 \xff, ,,", ()),
    ],
)
def test_own_entries_of_via_are_kept(via: str, instances: tuple[str, ...]) -> None:
    assert Via.parse(via) == Via(instances)


def test_via_for_the_next_request() -> None:
    assert NO_VIA == Via() == Via.parse("")
    assert NO_VIA.through(A) == f"1.1 {A}"
    assert Via((A, B)).through(C) == f"1.1 {A}, 1.1 {B}, 1.1 {C}"


def test_via_loops_through_earlier_instances() -> None:
    via = Via((A, B))
    assert via.loops_through(A)
    assert via.loops_through(B)
    assert not via.loops_through(C)
    assert not NO_VIA.loops_through(A)


def test_more_than_sixteen_entries_are_a_loop() -> None:
    assert not Via((A,) * 16).loops_through(B)
    assert Via((A,) * 17).loops_through(B)
    # Foreign entries do not count: proxies before us are out of our scope.
    assert not Via.parse(f"{'1.1 varnish, ' * 100}1.1 {A}").loops_through(B)


@given(st.lists(INSTANCES, max_size=20), INSTANCES)
def test_via_round_trip(instances: list[str], instance: str) -> None:
    via = Via.parse(Via(tuple(instances)).through(instance))
    assert via == Via((*instances, instance))
    assert via.loops_through(instance)


@given(VISIBLE)
def test_only_own_entries_are_passed_on(via: str) -> None:
    assert re.fullmatch(r"(1\.1 ociregistry-[0-9a-f]{16}(, )?)+", Via.parse(via).through(A))


@given(st.lists(INSTANCES | VISIBLE.filter(lambda text: "ociregistry-" not in text), max_size=6))
def test_any_text_between_entries(words: list[str]) -> None:
    assert Via.parse(", ".join(words)).instances == tuple(word for word in words if word.startswith("ociregistry-"))
