"""`list`: three columns, more with --long or --json; the store is never changed."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path

import pytest

from ociregistry.manifests import OCI_INDEX, Manifest
from ociregistry.names import Digest
from tests.images import make_index
from tests.unit.support.command_lines import file_contents, run, usage_error
from tests.unit.support.common import manifest
from tests.unit.support.irregular import IRREGULAR, put_irregular
from tests.unit.support.stores import StoreDir, day, image_of, list_of

SMALL, LARGE = (b"config a", b"layer a"), (b"config b", b"layer" * 100)


pytestmark = pytest.mark.usefixtures("utc_plus_one")


@pytest.fixture
def store_dir(root: Path) -> StoreDir:
    """Return an empty store."""
    return StoreDir(root)


@pytest.fixture
def listed(store_dir: StoreDir, capfd: pytest.CaptureFixture[str]) -> Listed:
    """Return a function that lists the store."""
    return Listed(store_dir, capfd)


class Listed:
    """Run `list`; check that it writes to stdout only and changes nothing."""

    def __init__(self, store_dir: StoreDir, capfd: pytest.CaptureFixture[str]) -> None:
        self._store_dir = store_dir
        self._capfd = capfd

    def __call__(self, *options: str) -> list[str]:
        """Return the lines of the output."""
        before = file_contents(self._store_dir.root)
        result = run(self._capfd, "--image-path", self._store_dir.root, "list", *options)
        assert (result.status, result.err) == (0, "")
        assert file_contents(self._store_dir.root) == before
        return result.lines

    def urls(self, *options: str) -> list[str]:
        """Return the first column, without the host."""
        return [line.split()[0].removeprefix("reg.example/") for line in self(*options)]


def test_empty_store(listed: Listed) -> None:
    assert listed() == listed("--long") == []
    assert listed("--json") == ["[]"]


def test_columns_are_url_kind_and_created(store_dir: StoreDir, listed: Listed) -> None:
    image = store_dir.image(SMALL, "b:2", created=day(59), confirmed=day(90), pulled=day(91))
    store_dir.put(list_of(image), "a/b:1", created=day(1.5))
    assert listed() == [
        "reg.example/a/b:1 list 2026-01-02T13:00:00",
        "reg.example/b:2 image 2026-03-01T01:00:00",
    ]


def test_index_without_images_is_marked(store_dir: StoreDir, listed: Listed) -> None:
    """Its manifest was requested, or a load of its images failed."""
    store_dir.put(list_of(image_of(*SMALL)), "a:1")
    store_dir.put(list_of(store_dir.image(LARGE, "b@"), image_of(*SMALL)), "b:1")
    assert listed()[0] == "reg.example/a:1 list 2026-01-01T01:00:00 no-image"
    assert listed()[1] == "reg.example/b:1 list 2026-01-01T01:00:00"


def test_one_line_per_image_url(store_dir: StoreDir, listed: Listed) -> None:
    image = store_dir.image(SMALL, "b:2", "a:1", "c@")
    assert listed() == [
        f"reg.example/{name} image 2026-01-01T01:00:00" for name in ("a:1", "b:2", f"c@{image.digest}")
    ]


def test_pattern_filters_image_urls(store_dir: StoreDir, listed: Listed) -> None:
    store_dir.image(SMALL, "team/app:1.25", "team/app:1.26", "other/app:1")
    store_dir.image(LARGE, "base:9")
    assert listed.urls("--pattern", "team") == ["team/app:1.25", "team/app:1.26"]
    assert listed.urls("--pattern", r":1\.25$,^reg\.example/base") == ["base:9", "team/app:1.25"]
    assert listed.urls("--pattern", "^app") == []
    assert listed("--pattern", "^app", "--json") == ["[]"]


def test_long_form_columns(store_dir: StoreDir, listed: Listed) -> None:
    store_dir.image(SMALL, "whole:1", pulled=day(2))
    store_dir.image(LARGE, "lacking:1", pulled=day(3))
    store_dir.blob(LARGE[1]).unlink()
    assert listed("--long") == [
        "reg.example/lacking:1 image 2026-01-01T01:00:00 2026-01-04T01:00:00 508 - 500-missing",
        "reg.example/whole:1 image 2026-01-01T01:00:00 2026-01-03T01:00:00 15 - complete",
    ]
    # A partly copied blob counts as missing.
    store_dir.blob(SMALL[1]).write_bytes(b"la")
    assert listed("--long", "--pattern", "whole")[0].endswith(" 15 - 7-missing")


def test_index_shows_its_present_images(store_dir: StoreDir, listed: Listed) -> None:
    index = make_index("list", platforms=("linux/amd64", "linux/arm/v7", "linux/s390x"))
    store_dir.put(manifest(index), "app:1", pulled=day(1))
    assert listed("--long") == ["reg.example/app:1 list 2026-01-01T01:00:00 2026-01-02T01:00:00 0 - no-image"]
    for image in index.images[:2]:
        store_dir.put(manifest(image), "app@", pulled=day(9))
        store_dir.blobs(*(blob.data for blob in image.blobs))
    size = sum(len(blob.data) for image in index.images[:2] for blob in image.blobs)
    assert listed("--long", "--pattern", ":1$") == [
        f"reg.example/app:1 list 2026-01-01T01:00:00 2026-01-10T01:00:00 {size} linux/amd64,linux/arm/v7 complete"
    ]
    layer = index.images[1].layers[0].data
    store_dir.blob(layer).unlink()
    assert listed("--long", "--pattern", ":1$")[0].endswith(f" linux/amd64,linux/arm/v7 {len(layer)}-missing")
    by_digest = {line.split()[0]: line.split()[5:] for line in listed("--long", "--pattern", "@")}
    assert by_digest == {
        f"reg.example/app@{index.images[0].manifest.digest}": ["linux/amd64", "complete"],
        f"reg.example/app@{index.images[1].manifest.digest}": ["linux/arm/v7", f"{len(layer)}-missing"],
    }


def test_json_has_all_columns(store_dir: StoreDir, listed: Listed) -> None:
    image = store_dir.image(SMALL, "app:1", created=day(1), confirmed=day(2), pulled=day(3))
    above = store_dir.put(list_of(image), "app:2", created=day(0))
    store_dir.blob(SMALL[1]).unlink()
    documents = json.loads("\n".join(listed("--json", "--sort", "created")))
    assert [document["url"] for document in documents] == ["reg.example/app:2", "reg.example/app:1"]
    assert documents[1] == {
        "url": "reg.example/app:1",
        "kind": "image",
        "digest": image.digest,
        "mediaType": image.media_type,
        "created": day(1).isoformat(),
        "confirmed": day(2).isoformat(),
        "pulled": day(3).isoformat(),
        "size": 15,
        "platforms": [],
        "images": 1,
        "missing": 7,
        "missingForeign": 0,
    }
    assert (documents[0]["kind"], documents[0]["digest"], documents[0]["missing"]) == ("list", above.digest, 7)


def test_sort_orders(store_dir: StoreDir, listed: Listed) -> None:
    store_dir.image(SMALL, "b:1", created=day(3), pulled=day(4))
    store_dir.image(LARGE, "c:1", created=day(1), pulled=day(9))
    store_dir.image([b"config d"], "a:1", created=day(2), pulled=day(8))
    assert listed.urls() == listed.urls("--sort", "url") == ["a:1", "b:1", "c:1"]
    assert listed.urls("--sort", "created") == ["c:1", "a:1", "b:1"]
    assert listed.urls("--sort", "pulled") == ["b:1", "a:1", "c:1"]
    assert listed.urls("--sort=size", "--long") == ["c:1", "b:1", "a:1"]


def test_ties_are_sorted_by_url(store_dir: StoreDir, listed: Listed) -> None:
    store_dir.image(SMALL, "b:1", "a:1", "c:1")
    for order in ("url", "created", "pulled", "size"):
        assert listed.urls("--sort", order) == ["a:1", "b:1", "c:1"]


def test_moved_tag_belongs_to_newer_image_older_is_listed_by_digest(store_dir: StoreDir, listed: Listed) -> None:
    old = store_dir.image(SMALL, "app:latest", created=day(1), confirmed=day(5))
    store_dir.image(LARGE, "app:latest", created=day(4), confirmed=day(6))
    store_dir.put(old, "app:1", created=day(2))
    assert listed() == [
        "reg.example/app:1 image 2026-01-03T01:00:00",
        "reg.example/app:latest image 2026-01-05T01:00:00",
        f"reg.example/app@{old.digest} image 2026-01-02T01:00:00",
    ]
    # A newer confirmation moves the tag back.
    store_dir.put(old, "app:latest", created=day(1), confirmed=day(7))
    assert "reg.example/app:latest image 2026-01-02T01:00:00" in listed()


def test_unreadable_record_is_a_warning(store_dir: StoreDir, capfd: pytest.CaptureFixture[str]) -> None:
    store_dir.image(SMALL, "a:1")
    cut = store_dir.path(store_dir.image(LARGE, "b:1"))
    cut.write_bytes(cut.read_bytes()[:100])
    foreign = store_dir.root / "fat" / Digest.of(b"x").hex
    foreign.write_text('{"imageUrl": "docker.io/library/nginx:1.25"}')
    (store_dir.root / "img" / ".syncthing.tmp").write_text("ignored")
    before = file_contents(store_dir.root)
    result = run(capfd, "list", "--image-path", store_dir.root)
    assert (result.status, result.lines) == (0, ["reg.example/a:1 image 2026-01-01T01:00:00"])
    warnings = sorted(result.err.splitlines())
    prefix = "ociregistry: warning: ignored, not a record that can be served: "
    assert all(line.startswith(prefix) for line in warnings)
    assert f"{foreign}: " in warnings[0]
    assert f"{cut}: not JSON, or cut off: " in warnings[1]
    assert file_contents(store_dir.root) == before


def test_many_foreign_files_are_one_warning(store_dir: StoreDir, capfd: pytest.CaptureFixture[str]) -> None:
    store_dir.image(SMALL, "a:1")
    for number in range(50):
        (store_dir.root / "fat" / f"{number:064x}").write_text("not ours")
    result = run(capfd, "list", "--image-path", store_dir.root)
    assert (result.status, len(result.lines)) == (0, 1)
    (line,) = result.err.splitlines()
    assert f"warning: ignored, 50 files in {store_dir.root}/fat are no records that can be served, the first" in line


@pytest.mark.parametrize("kind", IRREGULAR)
def test_what_is_no_regular_file_is_a_warning(
    store_dir: StoreDir, capfd: pytest.CaptureFixture[str], kind: str
) -> None:
    store_dir.image(SMALL, "a:1")
    bad = store_dir.path(store_dir.image(LARGE, "b:1"))
    put_irregular(bad, kind)
    put_irregular(store_dir.blob(SMALL[-1]), kind)
    result = run(capfd, "list", "--long", "--image-path", store_dir.root)
    assert result.status == 0
    assert [line.split()[0] for line in result.lines] == ["reg.example/a:1"]
    assert result.lines[0].endswith(f" {len(SMALL[-1])}-missing")
    warning = f"ociregistry: warning: ignored, not a record that can be served: {bad}: {IRREGULAR[kind]}"
    assert result.err.splitlines() == [warning]


def test_missing_store_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    for path, why in ((tmp_path / "none", "No such file or directory"), (tmp_path / "file", "Not a directory")):
        result = run(capfd, "--image-path", path, "--list-cache")
        assert (result.status, result.out) == (1, "")
        (line,) = result.err.splitlines()
        assert line.startswith(f"ociregistry: cannot use the store {path}: {why}")
        assert not (tmp_path / "none").exists()


def test_partly_copied_store_is_listed(store_dir: StoreDir, listed: Listed) -> None:
    store_dir.image(SMALL, "a:1")
    for folder in ("blobs", "pulls", "fat"):
        for path in (store_dir.root / folder).iterdir():
            path.unlink()
        (store_dir.root / folder).rmdir()
    assert listed("--long") == [
        "reg.example/a:1 image 2026-01-01T01:00:00 2026-01-01T01:00:00 15 - 15-missing",
    ]


@pytest.mark.parametrize(
    ("argv", "why"),
    [
        (["--sort", "name"], "--sort 'name': one of url, created, pulled, size is expected"),
        (["--sort", ""], "--sort '': one of "),
        (["--long", "--json"], "--long and --json exclude each other"),
        (["--pattern", "("], "--pattern '(': the pattern '(' is not a regular expression: "),
        (["--pattern", "[[:alpha:]]"], "which is Go syntax"),
        (["--pattern", ""], "an empty pattern matches every image URL"),
        (["curl"], "only options are expected here"),
        (["--nonsense"], "--nonsense"),
    ],
)
def test_usage_error_is_one_line(capfd: pytest.CaptureFixture[str], argv: list[str], why: str) -> None:
    assert why in usage_error(capfd, "list", *argv)


@pytest.mark.parametrize("os", ["linux\nreg.example/forged:1 image", "linux \x1b[2J", "two words"])
def test_control_characters_in_platform_are_escaped(store_dir: StoreDir, listed: Listed, os: str) -> None:
    image = store_dir.image(SMALL, "app@", pulled=day(0) + timedelta(days=1))
    entry = {"mediaType": image.media_type, "digest": image.digest, "size": image.size}
    document = {"schemaVersion": 2, "manifests": [{**entry, "platform": {"os": os, "architecture": "amd64"}}]}
    store_dir.put(Manifest.parse(json.dumps(document).encode(), OCI_INDEX), "app:1")
    lines = listed("--long")
    assert [len(line.split()) for line in lines] == [7, 7]
    assert all(line.isprintable() for line in lines)


def test_record_without_image_urls_has_no_line(store_dir: StoreDir, listed: Listed) -> None:
    store_dir.put(image_of(*SMALL))
    assert listed() == []
