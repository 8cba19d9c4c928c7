"""Images carried to another store in files that `export` writes and `load` reads."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tests.images import Image, Index, make_image, make_index
from tests.peers import Containerd, DockerRegistry
from tests.real.sites import Site, blobs_of, in_archive, parts_of, pull_offline, with_metadata

INDEX = make_index("carried/index")
DOCKER = make_index("carried/docker", docker=True)
PLAIN, BY_DIGEST = make_image("carried/plain"), make_image("carried/digest")
V1 = make_image("carried/v1", layers=3)
V2 = make_image("carried/v2", layers=1, base=V1)
V3 = make_image("carried/v3", layers=1, base=V2)
OTHER = make_image("carried/other")


@pytest.fixture
def site(tmp_path: Path, registry: DockerRegistry) -> Site:
    """A site with a registry."""
    return Site(tmp_path / "site", (registry.host,))


@pytest.fixture
def other_site(tmp_path: Path, registry: DockerRegistry) -> Site:
    """Another site, with a new store; it may know the registry by name."""
    return Site(tmp_path / "other_site", (registry.host,))


def versions(site: Site, registry: DockerRegistry, folder: Path, *images: Image) -> list[Path]:
    """Load the images as v1, v2 and so on, and after each export what the previous export lacks."""
    exports: list[Path] = []
    for number, image in enumerate(images, 1):
        registry.push("team/app", image, f"v{number}")
        site.load(f"{registry.host}/team/app:v{number}")
        exports.append(folder / f"{number}.tar")
        since = ["--since", str(exports[-2])] if number > 1 else []
        site.succeed("export", "--pattern", f"team/app:v{number}$", *since, "-o", str(exports[-1]))
    return exports


def spread_dates(place: Site, *, within_lists: bool = False) -> None:
    """Rewrite the records: each repository gets a different day, and with `within_lists` each image."""
    days: dict[str, datetime] = {}
    for path in sorted([*(place.images / "fat").iterdir(), *(place.images / "img").iterdir()]):
        record = json.loads(path.read_bytes())
        for url, dates in record["images"].items():
            which = url if within_lists else url.partition("@")[0].removesuffix(":v1")
            created = days.setdefault(which, datetime(2024, 3, 1, 22, 17, 30, tzinfo=UTC) + timedelta(days=len(days)))
            dates |= {"created": created.isoformat(), "confirmed": (created + timedelta(hours=1)).isoformat()}
        path.write_text(json.dumps(record))


def test_export_is_identical_in_an_empty_store(
    registry: DockerRegistry, site: Site, other_site: Site, containerd: Containerd, tmp_path: Path
) -> None:
    """Indexes, one of them incomplete, and images by tag and by digest: same list, digests, blobs and pulls."""
    pushed: dict[str, Image | Index] = {
        f"{registry.host}/team/index:v1": INDEX,
        f"{registry.host}/team/docker:v1": DOCKER,
        f"{registry.host}/team/plain:v1": PLAIN,
        f"{registry.host}/team/digest@{BY_DIGEST.manifest.digest}": BY_DIGEST,
    }
    for ref, what in pushed.items():
        registry.push(ref.partition("/")[2].partition("@")[0].removesuffix(":v1"), what, "v1")
    site.load(*pushed, options=["--platform", "linux/amd64"])
    site.load(f"{registry.host}/team/docker:v1", options=["--platform", "all"])
    registry.kill()
    spread_dates(site)

    archive = tmp_path / "all.tar"
    site.succeed("export", "--pattern", ".", "-o", str(archive))
    assert other_site.succeed("load", str(archive))[-1].startswith(
        f"{len(site.digests)} loaded, 0 already there, 0 failed"
    )
    assert other_site.digests == site.digests
    assert {ref: what.manifest.digest for ref, what in pushed.items()}.items() <= other_site.digests.items()
    assert other_site.stored("blobs") == site.stored("blobs")
    assert other_site.succeed("list") == site.succeed("list")
    assert other_site.long_list == site.long_list
    with other_site.daemon() as daemon:
        for ref, what in pushed.items():
            assert pull_offline(daemon, containerd, ref) == parts_of(what)


def test_images_of_an_index_keep_their_dates(
    registry: DockerRegistry, site: Site, other_site: Site, tmp_path: Path
) -> None:
    """A platform was pulled days after the index."""
    registry.push("team/index", INDEX, "v1")
    site.load(f"{registry.host}/team/index:v1", options=["--platform", "all"])
    spread_dates(site, within_lists=True)
    archive = tmp_path / "all.tar"
    site.succeed("export", "--pattern", ".", "-o", str(archive))
    other_site.succeed("load", str(archive))
    assert other_site.succeed("list") == site.succeed("list")


def test_pattern_for_an_index_exports_its_stored_images(
    registry: DockerRegistry, site: Site, other_site: Site, containerd: Containerd, tmp_path: Path
) -> None:
    """Its images and metadata are exported although the pattern does not match them; other images are not."""
    registry.push("team/index", INDEX, "v1")
    registry.push("team/other", OTHER, "v1")
    site.load(f"{registry.host}/team/index:v1", f"{registry.host}/team/other:v1")
    registry.kill()
    archive = tmp_path / "some.tar"
    site.succeed("export", "--pattern", "index:v1$", "-o", str(archive))
    assert in_archive(archive) == with_metadata(INDEX)
    other_site.succeed("load", str(archive))
    with other_site.daemon() as daemon:
        assert pull_offline(daemon, containerd, f"{registry.host}/team/index:v1") == parts_of(INDEX)


def test_loading_again_changes_nothing(
    registry: DockerRegistry, site: Site, other_site: Site, tmp_path: Path
) -> None:
    """Loading again changes nothing; after one blob was lost, loading restores it."""
    (archive,) = versions(site, registry, tmp_path, V1)
    other_site.succeed("load", str(archive))
    before = other_site.succeed("list"), other_site.stored("blobs"), other_site.stored("img")
    url = f"{registry.host}/team/app:v1"
    assert other_site.succeed("load", str(archive)) == [
        f"already there: {url}",
        "0 loaded, 1 already there, 0 failed",
    ]
    assert (other_site.succeed("list"), other_site.stored("blobs"), other_site.stored("img")) == before
    lost = other_site.images / "blobs" / V1.layers[0].digest.partition(":")[2]
    size = lost.stat().st_size
    lost.unlink()
    assert other_site.succeed("load", str(archive))[0] == f"loaded: {url}: 1 blob, {size} bytes"
    assert (other_site.succeed("list"), other_site.stored("blobs"), other_site.stored("img")) == before


def test_export_since_has_only_new_blobs(
    registry: DockerRegistry, site: Site, other_site: Site, containerd: Containerd, tmp_path: Path
) -> None:
    """The update has the manifests and what v1 lacks; loaded where v1 is, v2 is complete."""
    first, update = versions(site, registry, tmp_path, V1, V2)
    registry.kill()
    assert in_archive(first) == parts_of(V1)
    assert in_archive(update) == {V2.manifest.digest} | (blobs_of(V2) - blobs_of(V1))
    other_site.succeed("load", str(first))
    other_site.succeed("load", str(update))
    assert (other_site.digests, other_site.succeed("list")) == (site.digests, site.succeed("list"))
    assert other_site.stored("blobs") == site.stored("blobs")
    with other_site.daemon() as daemon:
        assert pull_offline(daemon, containerd, f"{registry.host}/team/app:v1") == parts_of(V1)
        assert pull_offline(daemon, containerd, f"{registry.host}/team/app:v2") == parts_of(V2)


def test_export_since_an_update_excludes_earlier_blobs(
    registry: DockerRegistry, site: Site, other_site: Site, containerd: Containerd, tmp_path: Path
) -> None:
    """v1's blobs are absent although the previous update lacks them too; one command loads all three."""
    exports = versions(site, registry, tmp_path, V1, V2, V3)
    registry.kill()
    assert in_archive(exports[2]) == {V3.manifest.digest} | (blobs_of(V3) - blobs_of(V2))
    other_site.succeed("load", *map(str, exports))
    assert (other_site.digests, other_site.succeed("list")) == (site.digests, site.succeed("list"))
    with other_site.daemon() as daemon:
        assert pull_offline(daemon, containerd, f"{registry.host}/team/app:v3") == parts_of(V3)


def test_update_without_its_base_loads_nothing(
    registry: DockerRegistry, site: Site, other_site: Site, tmp_path: Path
) -> None:
    """A line for the image says what is missing; a complete image in the same archive is loaded."""
    _, update = versions(site, registry, tmp_path, V1, V2)
    lacking = blobs_of(V2) & blobs_of(V1)
    size = sum(len(blob.data) for blob in V2.blobs if blob.digest in lacking)
    why = (
        f"failed: {registry.host}/team/app:v2: neither in the archive nor in the store: "
        f"{len(lacking)} blobs, {size} bytes; if it was made with --since, load the earlier export first"
    )
    printed, complaints = other_site.fail("load", str(update))
    assert printed == [why, "0 loaded, 0 already there, 1 failed"]
    assert complaints == ["ociregistry: 1 of 1 image could not be loaded"]
    assert other_site.leftovers == set()
    assert other_site.succeed("list") == []

    registry.push("team/other", OTHER, "v1")
    site.load(f"{registry.host}/team/other:v1")
    site.succeed("export", "--pattern", "v2$,other", "--since", str(tmp_path / "1.tar"), "-o", str(update), "--force")
    printed, _ = other_site.fail("load", str(update))
    assert why in printed
    assert printed[-1] == "1 loaded, 0 already there, 1 failed"
    assert set(other_site.digests) == {f"{registry.host}/team/other:v1"}
    assert other_site.stored("blobs").keys() == {digest.partition(":")[2] for digest in blobs_of(OTHER)}


def test_archives_are_loaded_in_the_given_order(
    registry: DockerRegistry, site: Site, other_site: Site, tmp_path: Path
) -> None:
    """The update comes before its base: it fails, and the base is still loaded."""
    first, update = versions(site, registry, tmp_path, V1, V2)
    printed, _ = other_site.fail("load", str(update), str(first))
    assert printed[-1] == "1 loaded, 0 already there, 1 failed"
    assert set(other_site.digests) == {f"{registry.host}/team/app:v1"}


def test_old_export_does_not_move_a_tag_back(
    registry: DockerRegistry, site: Site, other_site: Site, tmp_path: Path, containerd: Containerd
) -> None:
    """A tag that has moved since stays, and `load` says so; the old image is available by its digest."""
    url = f"{registry.host}/team/app:stable"
    registry.push("team/app", V1, "stable")
    site.load(url)
    old, new = tmp_path / "old.tar", tmp_path / "new.tar"
    site.succeed("export", "--pattern", "stable", "-o", str(old))
    registry.push("team/app", V2, "stable")
    later = Site(tmp_path / "later", site.upstreams)
    later.load(url)
    later.succeed("export", "--pattern", "stable", "-o", str(new))
    registry.kill()

    other_site.succeed("load", str(new))
    assert other_site.digests == {url: V2.manifest.digest}
    printed = other_site.succeed("load", str(old))
    assert f"the name still means {V2.manifest.digest}, which was confirmed later" in printed[0]
    by_digest = {f"{registry.host}/team/app@{V1.manifest.digest}": V1.manifest.digest}
    assert other_site.digests == {url: V2.manifest.digest, **by_digest}
    with other_site.daemon() as daemon:
        assert pull_offline(daemon, containerd, url) == parts_of(V2)

    # In the other order the tag moves.
    site.succeed("load", str(new))
    assert site.digests == {url: V2.manifest.digest, **by_digest}
    again = tmp_path / "again.tar"
    site.succeed("export", "--pattern", ".", "-o", str(again))
    third = Site(tmp_path / "third")
    third.succeed("load", str(again))
    assert (third.digests, third.succeed("list")) == (site.digests, site.succeed("list"))


def test_incomplete_image_is_not_exported(
    registry: DockerRegistry, site: Site, other_site: Site, tmp_path: Path
) -> None:
    """The command reports it and exits with 1; the others are exported. Without any image no file is written."""
    registry.push("team/other", OTHER, "v1")
    site.load(f"{registry.host}/team/other:v1")
    versions(site, registry, tmp_path, V1)
    lost = V1.layers[1]
    (site.images / "blobs" / lost.digest.partition(":")[2]).unlink()
    archive = tmp_path / "some.tar"
    complaint = (
        f"ociregistry: left out: {registry.host}/team/app:v1: the store lacks 1 of its blobs, {len(lost.data)} bytes"
    )
    printed, complaints = site.fail("export", "--pattern", ".", "-o", str(archive))
    assert printed[0].startswith("1 image exported")
    assert complaints == [complaint]
    other_site.succeed("load", str(archive))
    assert set(other_site.digests) == {f"{registry.host}/team/other:v1"}

    nothing = tmp_path / "nothing.tar"
    assert site.fail("export", "--pattern", "app", "-o", str(nothing)) == (["nothing was exported"], [complaint])
    assert not list(tmp_path.glob("*nothing*"))
    printed, complaints = site.fail("export", "--pattern", "not/there", "-o", str(nothing))
    assert (printed, len(complaints)) == ([], 1)
    assert not list(tmp_path.glob("*nothing*"))


@pytest.mark.parametrize("existing", [b"", b"an older export"], ids=["new", "in place of an older one"])
def test_damaged_blob_fails_the_export(registry: DockerRegistry, site: Site, tmp_path: Path, existing: bytes) -> None:
    """One line names the blob; no file is written, and an existing one stays unchanged."""
    versions(site, registry, tmp_path, V1)
    damaged = V1.layers[1]
    file = site.images / "blobs" / damaged.digest.partition(":")[2]
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    folder = tmp_path / "stick"
    folder.mkdir()
    archive = folder / "out.tar"
    if existing:
        archive.write_bytes(existing)
    printed, complaints = site.fail("export", "--pattern", ".", "-o", str(archive), "--force")
    assert printed == []
    why = f"the store's blob {damaged.digest} is damaged: run verify --repair, or leave its images out by --pattern"
    assert complaints == [f"ociregistry: {archive}: {why}"]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == ({"out.tar": existing} if existing else {})
