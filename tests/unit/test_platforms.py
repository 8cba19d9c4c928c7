"""Platforms: what of a list is wanted, whichever way lists and people spell it."""

from __future__ import annotations

import platform as machine
from collections.abc import Sequence

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ociregistry.manifests import OCI_MANIFEST, Descriptor, Manifest
from ociregistry.names import Digest
from ociregistry.platforms import ALL, Platform, chosen, machine_architecture, machine_os, parse_platforms
from tests.images import make_index

UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
"""A machine that has much else to do is no defect."""

WORDS = st.from_regex(r"[a-z0-9][a-z0-9_.-]{0,6}", fullmatch=True)
PLATFORMS = st.builds(Platform, WORDS, WORDS, WORDS | st.just(""))


def offered(*platforms: str) -> tuple[Descriptor, ...]:
    """The children of a list for these platforms; for `` one that tells none."""
    return tuple(
        Descriptor(Digest.of(str(number).encode()), 500, OCI_MANIFEST, platform)
        for number, platform in enumerate(platforms)
    )


def best(wanted: str, *there: str) -> str | None:
    """The platform of what is taken."""
    found = Platform.parse(wanted).best(offered(*there))
    return found.platform if found else None


def choice(wanted: str, *there: str) -> tuple[list[str], list[str]]:
    """The platforms of what is taken, and those for which there is nothing."""
    platforms = parse_platforms(wanted)
    children, found = chosen(offered(*there), platforms)
    return [child.platform for child in children], [str(one) for one in platforms if one not in found]


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("linux/amd64", Platform("linux", "amd64")),
        ("linux/arm/v7", Platform("linux", "arm", "v7")),
        ("windows/386", Platform("windows", "386")),
        ("wasip1/wasm", Platform("wasip1", "wasm")),
    ],
)
def test_a_platform_is_read(text: str, read: Platform) -> None:
    assert Platform.parse(text) == read
    assert str(read) == text


@pytest.mark.parametrize(
    "text",
    [
        *("", "linux", "amd64", "linux/", "/amd64", "linux//v7", "linux/arm/", "linux/arm/v7/x", "all"),
        *("Linux/amd64", "linux/amd 64", " linux/amd64", "linux/amd64\n", "-linux/amd64", f"linux/{'a' * 65}"),
    ],
)
def test_what_is_no_platform_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"^a platform such as linux/amd64 or linux/arm/v7 is expected$"):
        Platform.parse(text)


@UNHURRIED
@given(PLATFORMS)
def test_a_platform_is_spelled_as_it_is_read(one: Platform) -> None:
    assert Platform.parse(str(one)) == one


def test_several_are_read() -> None:
    assert parse_platforms("linux/amd64, linux/arm/v7") == (
        Platform("linux", "amd64"),
        Platform("linux", "arm", "v7"),
    )
    assert parse_platforms("linux/amd64") == (Platform("linux", "amd64"),)
    assert parse_platforms("all") == ALL == ()
    for text in ("", ",", "linux/amd64,", "linux/amd64,all", "all,all", "linux/amd64;linux/arm64"):
        with pytest.raises(ValueError, match="is expected"):
            parse_platforms(text)


@pytest.mark.parametrize(
    ("wanted", "there", "taken"),
    [
        ("linux/amd64", ["linux/arm64", "linux/amd64", "windows/amd64"], "linux/amd64"),
        ("linux/amd64", ["linux/amd64/v1"], "linux/amd64/v1"),
        ("linux/amd64", ["linux/amd64/v3", "linux/amd64/v1"], "linux/amd64/v1"),
        ("linux/amd64", ["linux/amd64/v3"], None),
        ("linux/amd64/v3", ["linux/amd64", "linux/amd64/v3"], "linux/amd64/v3"),
        ("linux/amd64/v3", ["linux/amd64"], None),
        ("linux/amd64/v1", ["linux/amd64"], "linux/amd64"),
        ("linux/arm64", ["linux/arm64/v8"], "linux/arm64/v8"),
        ("linux/arm64/v8", ["linux/arm64"], "linux/arm64"),
        ("linux/arm64/v8", ["linux/arm64", "linux/arm64/v8"], "linux/arm64/v8"),
        ("linux/arm", ["linux/arm/v5", "linux/arm/v6", "linux/arm/v7"], "linux/arm/v7"),
        ("linux/arm", ["linux/arm/v5", "linux/arm/v6"], "linux/arm/v6"),
        ("linux/arm", ["linux/arm/v7", "linux/arm"], "linux/arm"),
        ("linux/arm/v6", ["linux/arm/v7", "linux/arm/v6"], "linux/arm/v6"),
        ("linux/arm/v7", ["linux/arm"], None),
        ("linux/amd64", ["unknown/unknown"], None),
        ("linux/amd64", ["windows/amd64"], None),
        ("linux/amd64", [""], None),
        ("linux/amd64", [], None),
        ("linux/s390x", ["linux/s390x"], "linux/s390x"),
    ],
)
def test_the_best_one_is_taken(wanted: str, there: Sequence[str], taken: str | None) -> None:
    assert best(wanted, *there) == taken
    assert best(wanted, *reversed(there)) == taken


def test_of_two_for_the_same_platform_it_is_the_first() -> None:
    """As containerd has it."""
    children = offered("windows/amd64", "linux/amd64", "windows/amd64")
    assert Platform("windows", "amd64").best(children) is children[0]


@pytest.mark.parametrize(
    ("wanted", "there", "taken", "lacking"),
    [
        ("linux/amd64", ["linux/amd64", "linux/arm64", "unknown/unknown"], ["linux/amd64"], []),
        ("linux/arm64,linux/amd64", ["linux/amd64", "linux/arm64"], ["linux/amd64", "linux/arm64"], []),
        ("linux/amd64,linux/arm64", ["linux/amd64"], ["linux/amd64"], ["linux/arm64"]),
        ("linux/s390x,windows/amd64", ["linux/amd64"], [], ["linux/s390x", "windows/amd64"]),
        ("linux/amd64,linux/amd64/v1", ["linux/amd64"], ["linux/amd64"], []),
        ("all", ["linux/amd64", "unknown/unknown", ""], ["linux/amd64", "unknown/unknown", ""], []),
        # What tells no platform may be a list that has the one that is wanted.
        ("linux/amd64", [""], [""], ["linux/amd64"]),
        ("linux/amd64", ["linux/arm64", ""], [""], ["linux/amd64"]),
        ("linux/amd64", ["", "linux/amd64"], ["", "linux/amd64"], []),
        ("linux/amd64", [], [], ["linux/amd64"]),
    ],
)
def test_what_is_wanted_of_a_list_is_chosen(
    wanted: str, there: Sequence[str], taken: list[str], lacking: list[str]
) -> None:
    assert choice(wanted, *there) == (taken, lacking)


@UNHURRIED
@given(st.lists(PLATFORMS, max_size=4), st.lists(PLATFORMS, max_size=4))
def test_what_is_chosen_is_offered_and_in_its_order(wanted: list[Platform], there: list[Platform]) -> None:
    children = offered(*map(str, there))
    taken, found = chosen(children, wanted)
    assert len(taken) == len(children) or wanted
    positions = [children.index(child) for child in taken]
    assert positions == sorted(positions)
    assert found <= set(wanted)
    for platform in wanted:
        assert (platform.best(taken) is not None) == (platform in found)


@pytest.mark.parametrize(
    ("kernel", "name"),
    [
        ("x86_64", "amd64"),
        ("AMD64", "amd64"),
        ("aarch64", "arm64"),
        ("armv7l", "arm"),
        ("armv6l", "arm"),
        ("i686", "386"),
        ("i386", "386"),
        ("loongarch64", "loong64"),
        *((same, same) for same in ("riscv64", "ppc64le", "s390x")),
    ],
)
def test_the_machine_is_called_as_images_call_it(monkeypatch: pytest.MonkeyPatch, kernel: str, name: str) -> None:
    monkeypatch.setattr(machine, "machine", lambda: kernel)
    assert machine_architecture() == name
    assert Platform.parse(f"{machine_os()}/{machine_architecture()}") == Platform("linux", name)


def test_the_names_are_those_of_manifests() -> None:
    listed = make_index("platforms", platforms=["linux/arm/v7"])
    (child,) = Manifest.parse(listed.manifest.data, listed.manifest.media_type).children
    assert (child.platform, child.media_type) == (str(Platform("linux", "arm", "v7")), OCI_MANIFEST)
