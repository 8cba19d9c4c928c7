"""The Go server's options with `twistd -n ociregistry` in front: loading, listing, pruning."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest

from ociregistry import __version__
from tests.images import Image, Index, make_image, make_index
from tests.peers import DockerRegistry, missing_package
from tests.real.shells import (
    Ended,
    Shell,
    blobs_in,
    digests,
    files_in,
    metadata,
    records_in,
    shell_in,
    succeeded,
)

TYPHA = "docker.io/calico/typha:v3.27.0"
DASHBOARD = "docker.io/kubernetesui/dashboard:v2.7.0"
SCRAPER = "docker.io/kubernetesui/metrics-scraper:v1.0.8"
CURL = "docker.io/curlimages/curl:8.6.0"
CILIUM = "quay.io/cilium/cilium:v1.15.1"
PAUSE = "registry.k8s.io/pause:3.8"

IMAGES: Mapping[str, Image | Index] = {
    TYPHA: make_index("typha"),
    DASHBOARD: make_index("dashboard", docker=True),
    SCRAPER: make_index("scraper"),
    CURL: make_image("curl", docker=True),  # not a list
    CILIUM: make_index("cilium"),
    PAUSE: make_index("pause"),
}
LIST = f"""
# as people write them
{TYPHA}
{DASHBOARD}   # with a comment

kubernetesui/metrics-scraper:v1.0.8
{CURL}
\t{CILIUM}
{PAUSE}
"""
HERE = {"TZ": "America/New_York"}
AGES = {TYPHA: "2024-03-01T22:17:30", DASHBOARD: "2024-03-01T22:17:31", CILIUM: "2023-12-24T18:00:00"}


@dataclass(frozen=True)
class Loaded:
    """The result of a load with the Go server's options."""

    shell: Shell
    registry: DockerRegistry
    done: Ended


def platform_of(url: str, platform: str = "linux/amd64") -> Image:
    """Return the image of a platform."""
    what = IMAGES[url]
    return what if isinstance(what, Image) else next(one for one in what.images if one.platform == platform)


def stored(*urls: str) -> tuple[set[str], set[str]]:
    """Return the digests of the records and of the blobs in a store that was loaded for one platform."""
    records, configs = metadata((IMAGES[url] for url in urls), "linux/amd64")
    records |= {what.manifest.digest for url in urls for what in (IMAGES[url], platform_of(url))}
    return records, configs | digests(*map(platform_of, urls))


def rows_of(*urls: str) -> dict[str, str]:
    """Return the image URLs and kinds that `list` prints for these."""
    rows = {}
    for url in urls:
        what = IMAGES[url]
        rows[url] = "list" if isinstance(what, Index) else "image"
        if isinstance(what, Index):
            rows[f"{url.rpartition(':')[0]}@{platform_of(url).manifest.digest}"] = "image"
    return rows


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loaded]:
    """A store loaded as the Go server's documentation says, by local mirrors."""
    if missing_package("docker-registry"):
        pytest.fail("a peer is missing: apt-get install docker-registry", pytrace=False)
    folder = tmp_path_factory.mktemp("seed")
    with DockerRegistry(folder / "registry") as registry:
        for url, what in IMAGES.items():
            name, _, tag = url.partition("/")[2].rpartition(":")
            registry.push(name, what, tag)
        hosts = sorted({url.partition("/")[0] for url in IMAGES})
        shell = shell_in(folder, [{"name": host, "mirrors": [registry.url]} for host in hosts])
        (folder / "imagelist").write_text(LIST)
        done = shell.piped(
            "--load-images $PWD/imagelist --arch amd64 --os linux --pull-timeout 60000 --concurrent=50 "
            "--log-level info"
        )
        yield Loaded(shell, registry, done)


@pytest.fixture
def shell(loaded: Loaded, tmp_path: Path) -> Shell:
    """A shell on a copy of that store; three of its images are older."""
    store = tmp_path / "images"
    shutil.copytree(loaded.shell.store, store)
    for url, age in AGES.items():
        created = datetime.fromisoformat(age).replace(tzinfo=ZoneInfo(HERE["TZ"])).isoformat()
        for manifest in (IMAGES[url].manifest, platform_of(url).manifest):
            (path,) = store.glob(f"*/{manifest.digest.removeprefix('sha256:')}")
            record = json.loads(path.read_text())
            for dates in record["images"].values():
                dates["created"] = created
            path.write_text(json.dumps(record))
    return replace(loaded.shell, store=store)


# Loading


def test_load_images_loads_indexes_and_images_of_the_platform(loaded: Loaded) -> None:
    """The other platforms' manifests and configs are stored too; `list` omits them."""
    assert loaded.done.returncode == 0, loaded.done
    lines = loaded.done.stdout.splitlines()
    assert lines[-1] == "6 loaded, 0 already there, 0 failed"
    assert {line.split(": ")[1] for line in lines[:-1]} == set(IMAGES)
    assert all(line.startswith("loaded: ") for line in lines[:-1])
    assert (records_in(loaded.shell.store), blobs_in(loaded.shell.store)) == stored(*IMAGES)
    assert {url: kind for url, (kind, _) in loaded.shell.listed().items()} == rows_of(*IMAGES)


def test_load_images_of_stored_images_sends_no_request(loaded: Loaded) -> None:
    asked = len(loaded.registry.requests)
    before = files_in(loaded.shell.store)
    done = loaded.shell.piped("--load-images=$PWD/imagelist --arch=amd64 --os=linux --concurrent 1")
    assert succeeded(done).splitlines()[-1] == "0 loaded, 6 already there, 0 failed"
    assert len(loaded.registry.requests) == asked
    assert files_in(loaded.shell.store) == before


def test_load_images_of_another_architecture_adds_only_its_images(loaded: Loaded, shell: Shell) -> None:
    (shell.folder / "arms").write_text(f"{TYPHA}\n{DASHBOARD}\n")
    asked = len(loaded.registry.requests)
    done = shell.piped("--load-images $PWD/arms --arch arm64 --os linux")
    assert succeeded(done).splitlines()[-1] == "2 loaded, 0 already there, 0 failed"
    arms = [platform_of(url, "linux/arm64") for url in (TYPHA, DASHBOARD)]
    records, blobs = stored(*IMAGES)
    assert (records_in(shell.store), blobs_in(shell.store)) == (records, blobs | digests(*arms))
    # The indexes were stored, and the manifests and configs of all their children.
    assert len(loaded.registry.requests) == asked + sum(len(arm.layers) for arm in arms)


def test_load_images_of_a_missing_platform_names_the_available_ones(loaded: Loaded, shell: Shell) -> None:
    (shell.folder / "one").write_text(f"{TYPHA}\n{PAUSE}\n")
    done = shell.piped("--load-images $PWD/one --arch s390x --os linux")
    assert done.returncode == 1
    for line in done.stdout.splitlines()[:-1]:
        assert re.fullmatch(r"failed: \S+: no image for linux/s390x; available: linux/amd64, linux/arm64", line)
    assert done.stderr == "ociregistry: 2 of 2 images could not be loaded\n"


# Listing


@pytest.mark.parametrize("blanks", ["", "-b "], ids=["blanks_count", "blanks_do_not"])
def test_list_cache_through_column_and_sort(shell: Shell, blanks: str) -> None:
    """The newest come first; where sort counts blanks, as in the locale C, within each kind."""
    pipe = f"| column -t | sort {blanks}-k3 -r"
    lines = succeeded(shell.piped("--list-cache", pipe, {**HERE, "LC_ALL": "C"})).splitlines()
    rows = [line.split() for line in lines]
    assert {url: kind for url, kind, _ in rows} == rows_of(*IMAGES)
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", created) for _, _, created in rows)
    aged = [(kind, created) for _, kind, created in rows if created in AGES.values()]
    if blanks:
        assert [created for _, created in aged] == sorted([*AGES.values(), *AGES.values()], reverse=True)
        assert [created for _, _, created in rows[-len(aged) :]] == [created for _, created in aged]
    for kind in ("list", "image"):
        assert [created for one, created in aged if one == kind] == sorted(AGES.values(), reverse=True)
    # column aligns: the second column begins at the same position in every line.
    assert {line.index(f" {kind} ") for line, (_, kind, _) in zip(lines, rows, strict=True)} == {
        max(len(url) for url, _, _ in rows) + 1
    }


def test_list_cache_through_grep(shell: Shell) -> None:
    found = succeeded(shell.piped("--list-cache", "| grep calico/typha:v3.27.0", HERE))
    assert found == f"{TYPHA} list 2024-03-01T22:17:30\n"
    assert shell.piped("--list-cache", "| grep no-such-image").stdout == ""


def test_list_cache_into_a_closed_pipe_is_silent(shell: Shell) -> None:
    done = shell.piped("--list-cache", "| true")
    assert done.stderr == ""


# Pruning

PRUNED = [
    ("--prune kubernetesui/dashboard:v2.7.0", (DASHBOARD,)),
    ("--prune curl,cilium", (CURL, CILIUM)),
    ("--prune docker.io", (TYPHA, DASHBOARD, SCRAPER, CURL)),
    ("--prune-before 2024-03-01T22:17:31", (TYPHA, CILIUM)),
    ("--prune calico/typha:v3.27.0", (TYPHA,)),
    ("--prune docker.io --prune-before=2024-03-01T22:17:31", (TYPHA,)),
]


@pytest.mark.parametrize(("spelled", "gone"), PRUNED)
def test_prune_matches_its_dry_run(shell: Shell, spelled: str, gone: tuple[str, ...]) -> None:
    """The matching URLs, the images of pruned indexes, and the blobs that no other image has: no more."""
    before = files_in(shell.store)
    would = succeeded(shell.piped(f"{spelled} --dry-run", environment=HERE))
    assert files_in(shell.store) == before
    told = dict(line.split()[2:4] for line in would.splitlines()[:-1])
    assert told == rows_of(*gone)
    did = succeeded(shell.piped(spelled, environment=HERE))
    for was, now in (
        ("would prune", "pruned"),
        ("would be removed", "removed"),
        ("would become free", "are free again"),
    ):
        would = would.replace(was, now)
    assert did == would
    stay = [url for url in IMAGES if url not in gone]
    assert {url: kind for url, (kind, _) in shell.listed().items()} == rows_of(*stay)
    assert (records_in(shell.store), blobs_in(shell.store)) == stored(*stay)
    freed = sum(len(data) for _, _, data in before.values()) - sum(
        len(data) for _, _, data in files_in(shell.store).values()
    )
    assert f", {freed} bytes (" in did
    assert succeeded(shell.run("verify")).endswith(" 0 damaged\n")


def test_prune_without_a_match_changes_nothing(shell: Shell) -> None:
    before = files_in(shell.store)
    done = succeeded(shell.piped("--prune no-such-image"))
    assert done == "0 image URLs, 0 records and 0 blobs removed, 0 bytes (0 B) are free again\n"
    assert {path: of for path, of in files_in(shell.store).items() if not path.startswith("pulls")} == {
        path: of for path, of in before.items() if not path.startswith("pulls")
    }


def test_version(shell: Shell) -> None:
    assert succeeded(shell.piped("--version")) == f"ociregistry {__version__}\n"
