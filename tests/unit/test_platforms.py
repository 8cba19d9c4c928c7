"""Platforms: parsing, and selection from an index."""

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
"""A busy machine must not fail the test by a deadline."""

WORDS = st.from_regex(r"[a-z0-9][a-z0-9_.-]{0,6}", fullmatch=True)
PLATFORMS = st.builds(Platform, WORDS, WORDS, WORDS | st.just(""))


def offered(*platforms: str) -> tuple[Descriptor, ...]:
    """Return children of an index with these platforms; `` stands for a child without one."""
    return tuple(
        Descriptor.parse(
            {
                "mediaType": OCI_MANIFEST,
                "digest": Digest.of(str(number).encode()),
                "size": 500,
                "platform": dict(zip(("os", "architecture", "variant"), platform.split("/"), strict=False)),
            }
        )
        for number, platform in enumerate(platforms)
    )


def in_versions(*versions: str) -> tuple[Descriptor, ...]:
    """The children of a list for windows/amd64 in these versions, and one for linux/amd64 at the end."""
    *windows, linux = offered(*["windows/amd64"] * len(versions), "linux/amd64")
    return *(one._replace(os_version=version) for one, version in zip(windows, versions, strict=True)), linux


def best(wanted: str, *there: str) -> str | None:
    """Return the platform of the selected child."""
    found = Platform.parse(wanted).best(offered(*there))
    return found.platform if found else None


def choice(wanted: str, *there: str) -> tuple[list[str], list[str]]:
    """Return the platforms of the selected children, and the wanted ones that are missing."""
    platforms = parse_platforms(wanted)
    children, found = chosen(offered(*there), platforms)
    return [child.platform for child in children], [str(one) for one in platforms if one not in found]


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("linux/amd64", Platform("linux", "amd64")),
        ("linux/arm/v7", Platform("linux", "arm", "v7")),
        ("windows/386", Platform("windows", "386")),
        ("linux/arm", Platform("linux", "arm")),
        ("linux/arm64/v9", Platform("linux", "arm64", "v9")),
        ("wasip1/wasm", Platform("wasip1", "wasm")),
    ],
)
def test_platform_is_parsed(text: str, read: Platform) -> None:
    assert Platform.parse(text) == read
    assert str(read) == text


@pytest.mark.parametrize(
    ("text", "spelled"),
    [
        *((f"Linux/{name}", "linux/amd64") for name in ("AMD64", "x86_64", "x86-64", "amd64/v1")),
        *((f"linux/{name}", "linux/arm64") for name in ("aarch64", "AArch64/v8", "arm64/8", "arm64/v8.0")),
        *((f"linux/{name}", "linux/arm64/v9") for name in ("arm64/9", "arm64/9.0", "aarch64/v9.0")),
        *((f"linux/{name}", "linux/arm/v7") for name in ("arm/7", "armhf/v7", "arm/V7")),
        *((f"linux/{name}", "linux/arm/v6") for name in ("arm/6", "armel")),
        *((f"linux/{name}", "linux/arm") for name in ("arm", "armhf")),
        ("linux/i386", "linux/386"),
        ("macos/arm64", "darwin/arm64"),
    ],
)
def test_platform_in_other_spellings(text: str, spelled: str) -> None:
    """Those that containerd normalizes."""
    assert str(Platform.parse(text)) == spelled


@pytest.mark.parametrize(
    "text",
    [
        *("", "linux", "amd64", "linux/", "/amd64", "linux//v7", "linux/arm/", "linux/arm/v7/x", "all"),
        *("linux/amd 64", " linux/amd64", "linux/amd64\n", "-linux/amd64", f"linux/{'a' * 65}"),
    ],
)
def test_malformed_platform_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"^a platform such as linux/amd64 or linux/arm/v7 is expected$"):
        Platform.parse(text)


@UNHURRIED
@given(PLATFORMS)
def test_platform_round_trip(one: Platform) -> None:
    assert Platform.parse(str(one)) == one


def test_list_of_platforms() -> None:
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
        ("linux/amd64", ["linux/amd64/v1"], "linux/amd64"),
        ("linux/amd64", ["linux/amd64/v3", "linux/amd64/v1"], "linux/amd64"),
        ("linux/x86_64", ["linux/amd64"], "linux/amd64"),
        ("linux/amd64", ["linux/x86_64"], "linux/amd64"),
        ("linux/i386", ["linux/386"], "linux/386"),
        ("darwin/arm64", ["macOS/AArch64"], "darwin/arm64"),
        ("linux/amd64", ["linux/amd64/v3"], None),
        ("linux/amd64/v3", ["linux/amd64", "linux/amd64/v3"], "linux/amd64/v3"),
        ("linux/amd64/v3", ["linux/amd64"], None),
        ("linux/amd64/v1", ["linux/amd64"], "linux/amd64"),
        ("linux/arm64", ["linux/arm64/v8"], "linux/arm64"),
        ("linux/arm64/v8", ["linux/arm64"], "linux/arm64"),
        ("linux/aarch64", ["linux/arm64/v8"], "linux/arm64"),
        ("linux/arm64", ["linux/arm64/v8.0"], "linux/arm64"),
        ("linux/arm64/9", ["linux/arm64", "linux/arm64/v9.0"], "linux/arm64/v9"),
        ("linux/arm64", ["linux/arm64/v9"], None),
        ("linux/arm", ["linux/arm/v5", "linux/arm/v6", "linux/arm/v7"], "linux/arm/v7"),
        ("linux/arm", ["linux/arm/v5", "linux/arm/v6"], "linux/arm/v6"),
        ("linux/arm", ["linux/arm/v6", "linux/arm"], "linux/arm/v7"),
        ("linux/arm/v6", ["linux/arm/v7", "linux/arm/v6"], "linux/arm/v6"),
        ("linux/arm/v7", ["linux/arm"], "linux/arm/v7"),
        ("linux/arm/7", ["linux/armhf"], "linux/arm/v7"),
        ("linux/armhf", ["linux/arm/v7"], "linux/arm/v7"),
        ("linux/armhf", ["linux/arm/v6"], "linux/arm/v6"),
        ("linux/armel", ["linux/arm/v7", "linux/arm/6"], "linux/arm/v6"),
        ("linux/amd64", ["unknown/unknown"], None),
        ("linux/amd64", ["windows/amd64"], None),
        ("linux/amd64", [""], None),
        ("linux/amd64", [], None),
        ("linux/s390x", ["linux/s390x"], "linux/s390x"),
    ],
)
def test_best_match(wanted: str, there: Sequence[str], taken: str | None) -> None:
    assert best(wanted, *there) == taken
    assert best(wanted, *reversed(there)) == taken


def test_first_of_equal_matches_is_selected() -> None:
    """As in containerd."""
    children = offered("windows/amd64", "linux/amd64", "windows/amd64")
    assert Platform("windows", "amd64").best(children) is children[0]


@pytest.mark.parametrize(
    ("wanted", "taken"),
    [
        ("", ["10.0.17763.6893", "10.0.20348.2849", "10.0.20348.3000", ""]),
        ("10.0.20348", ["10.0.20348.2849", "10.0.20348.3000", ""]),
        ("10.0.20348.2849", ["10.0.20348.2849", ""]),
        # It is a beginning in whole numbers, and what tells no version may have any.
        ("10.0.2034", [""]),
        ("11", [""]),
    ],
)
def test_all_versions_of_a_system_are_taken_that_begin_as_wanted(wanted: str, taken: list[str]) -> None:
    """As containerd's matcher for Windows takes them.

    Sources: Windows-Containers issues 317 and 334 (`no matching manifest for windows/amd64 10.0.17763`), rancher
    issue 46559 (`os.version` is missing in the list).
    """
    children = in_versions("10.0.17763.6893", "10.0.20348.2849", "10.0.20348.3000", "")
    windows = Platform("windows", "amd64", os_version=wanted)
    found, of = chosen(children, [windows])
    assert [one.os_version for one in found] == taken
    assert of == {windows}
    found, of = chosen(children, [windows, Platform("linux", "amd64", os_version=wanted)])
    assert (len(found), len(of)) == (len(taken) + 1, 2)


def test_missing_os_version_is_not_found() -> None:
    windows = Platform("windows", "amd64", os_version="10.0.26100")
    assert chosen(in_versions("10.0.17763.6893"), [windows]) == ((), frozenset())
    assert str(windows) == "windows(10.0.26100)/amd64"


@pytest.mark.parametrize(
    ("told", "spelled"),
    [
        ("10.0.17763.6893", "windows(10.0.17763.6893)/amd64"),
        ("", "windows/amd64"),
        (None, "windows/amd64"),
        (10, "windows(10)/amd64"),
        ("1)\n(,", "windows(1????)/amd64"),
        ("1" * 100, f"windows({'1' * 64})/amd64"),
    ],
)
def test_platform_with_os_version_is_one_word(told: object, spelled: str) -> None:
    platform = {"os": "windows", "architecture": "amd64", "os.version": told}
    value = {"mediaType": OCI_MANIFEST, "digest": Digest.of(b""), "size": 1, "platform": platform}
    one = Descriptor.parse(value)
    assert (one.platform, one.full_platform) == ("windows/amd64", spelled)


@pytest.mark.parametrize(
    ("wanted", "there", "taken", "lacking"),
    [
        ("linux/amd64", ["linux/amd64", "linux/arm64", "unknown/unknown"], ["linux/amd64"], []),
        ("linux/arm64,linux/amd64", ["linux/amd64", "linux/arm64"], ["linux/amd64", "linux/arm64"], []),
        ("linux/amd64,linux/arm64", ["linux/amd64"], ["linux/amd64"], ["linux/arm64"]),
        ("linux/s390x,windows/amd64", ["linux/amd64"], [], ["linux/s390x", "windows/amd64"]),
        ("linux/amd64,linux/amd64/v1", ["linux/amd64"], ["linux/amd64"], []),
        ("all", ["linux/amd64", "unknown/unknown", ""], ["linux/amd64", "unknown/unknown", ""], []),
        # A child without platform may be an index that contains the wanted one.
        ("linux/amd64", [""], [""], ["linux/amd64"]),
        ("linux/amd64", ["linux/arm64", ""], [""], ["linux/amd64"]),
        ("linux/amd64", ["", "linux/amd64"], ["", "linux/amd64"], []),
        ("linux/amd64", [], [], ["linux/amd64"]),
    ],
)
def test_selection_from_an_index(wanted: str, there: Sequence[str], taken: list[str], lacking: list[str]) -> None:
    assert choice(wanted, *there) == (taken, lacking)


@UNHURRIED
@given(st.lists(PLATFORMS, max_size=4), st.lists(PLATFORMS, max_size=4))
def test_selection_keeps_order(wanted: list[Platform], there: list[Platform]) -> None:
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
def test_machine_architecture_uses_go_names(monkeypatch: pytest.MonkeyPatch, kernel: str, name: str) -> None:
    monkeypatch.setattr(machine, "machine", lambda: kernel)
    assert machine_architecture() == name
    assert Platform.parse(f"{machine_os()}/{machine_architecture()}") == Platform("linux", name)


def test_platform_of_a_parsed_index() -> None:
    listed = make_index("platforms", platforms=["linux/arm/v7"])
    (child,) = Manifest.parse(listed.manifest.data, listed.manifest.media_type).children
    assert (child.platform, child.media_type) == (str(Platform("linux", "arm", "v7")), OCI_MANIFEST)
