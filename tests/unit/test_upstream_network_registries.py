"""Allowed upstreams, and the cache of Registry objects."""

from __future__ import annotations

from typing import cast

import pytest

from ociregistry.errors import Denied
from ociregistry.names import Upstream
from ociregistry.upstream.network import Registries
from ociregistry.upstream.registry import Registry


class Made:
    """Creates registries without behaviour."""

    def __init__(self) -> None:
        self.upstreams: list[str] = []

    def __call__(self, upstream: Upstream) -> Registry:
        self.upstreams.append(upstream.name)
        return cast(Registry, object())


@pytest.mark.parametrize(
    ("globs", "name", "allowed"),
    [
        ((), "evil.example", True),
        (("*",), "evil.example", True),
        (("docker.io",), "docker.io", True),
        (("docker.io",), "evil.example", False),
        (("docker.io",), "docker.io.evil.example", False),
        (("docker.io",), "docker.io:5000", False),
        (("*.example",), "a.b.example", True),
        (("*.example",), "example", False),
        (("*.example",), "a.example:5000", False),
        (("*.example:*",), "a.example:5000", True),
        (("docker.io", "quay.io"), "quay.io", True),
        (("reg?.example",), "reg1.example", True),
        (("reg[12].example",), "reg3.example", False),
    ],
)
def test_allow_upstreams_globs(globs: tuple[str, ...], name: str, allowed: bool) -> None:
    made = Made()
    registries = Registries(globs, made)
    if allowed:
        registries.check(Upstream(name))
        registries.get(Upstream(name))
    else:
        with pytest.raises(Denied, match=f"^{name}: .*allow-upstreams"):
            registries.check(Upstream(name))
        with pytest.raises(Denied):
            registries.get(Upstream(name))
    assert made.upstreams == [name] * allowed


def test_ipv6_address_in_allow_upstreams() -> None:
    """Its brackets also are glob syntax."""
    Registries(("[::1]:5000",), Made()).check(Upstream("[::1]:5000"))


def test_one_registry_per_upstream() -> None:
    made = Made()
    registries = Registries((), made)
    one, other = Upstream("quay.io"), Upstream("docker.io")
    first = registries.get(one)
    assert registries.get(other) is not first
    assert registries.get(one) is first
    registries.check(Upstream("never.example"))
    assert made.upstreams == ["quay.io", "docker.io"]


def test_most_recently_used_registries_are_kept() -> None:
    made = Made()
    registries = Registries((), made)
    often = registries.get(Upstream("often.example"))
    for number in range(2000):
        registries.get(Upstream(f"r{number}.example"))
        assert registries.get(Upstream("often.example")) is often
    assert len(made.upstreams) == 2001
    registries.get(Upstream("r1999.example"))
    registries.get(Upstream("r0.example"))
    assert made.upstreams[2001:] == ["r0.example"]
    assert len(registries._registries) == 500


def test_new_settings_apply_to_all_registries() -> None:
    made = Made()
    registries = Registries(("quay.io",), made)
    old = registries.get(Upstream("quay.io"))
    registries.reconfigure(("quay.io", "docker.io"))
    assert registries.get(Upstream("quay.io")) is not old
    registries.get(Upstream("docker.io"))
    registries.reconfigure(("docker.io",))
    with pytest.raises(Denied):
        registries.get(Upstream("quay.io"))
    assert made.upstreams == ["quay.io", "quay.io", "docker.io"]
