"""Bad input: one clear line, the exit status, no request to the upstream, and an unchanged store."""

from __future__ import annotations

import gzip
import io
import json
import re
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.images import Image, Manifest, make_image
from tests.real.shells import Ended, Shell, assert_one_line, files_in, shell_in, succeeded
from tests.upstream import ScriptedRegistry

KEPT = make_image("kept")
NEW = make_image("new", layers=3, layer_size=20_000)
NAME = "docker.io/library/new:1"


@dataclass(frozen=True)
class LoadedStore:
    """A store with one image, its upstream, and the state of both before a mistake is made."""

    shell: Shell
    upstream: ScriptedRegistry

    def rejected(self, *arguments: str) -> Ended:
        """Run a command that must neither contact the upstream nor change the store."""
        before, asked = files_in(self.shell.store), len(self.upstream.requests)
        done = self.shell.run(*arguments)
        assert files_in(self.shell.store) == before
        assert len(self.upstream.requests) == asked
        assert {path.name for path in self.shell.folder.iterdir()} >= {"images", "ociregistry.yaml", "kept"}
        assert not list(self.shell.folder.rglob("twistd.*"))
        return done


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoadedStore]:
    """One store for all tests: no test may change it."""
    folder = tmp_path_factory.mktemp("bad") / "deep" / "place"
    folder.mkdir(parents=True)
    with ScriptedRegistry() as upstream:
        shell = shell_in(folder, [{"name": upstream.host, "scheme": "http"}], default_ns=upstream.host)
        upstream.add("team/kept", KEPT, "v1")
        upstream.add("team/new", NEW, "v1")
        (folder / "kept").write_text(f"{upstream.host}/team/kept:v1\n")
        succeeded(shell.run("load", str(folder / "kept")))
        yield LoadedStore(shell, upstream)


# Lists


@pytest.mark.parametrize("spelled", ["load", "--load-images"])
@pytest.mark.parametrize("text", ["", "\n\n", "# nothing\n   # but comments\n", "\ufeff"])
def test_empty_list_is_rejected(loaded: LoadedStore, tmp_path: Path, text: str, spelled: str) -> None:
    path = tmp_path / "imagelist"
    path.write_text(text)
    done = loaded.rejected(spelled, str(path))
    assert_one_line(done, 2, f"{path}: names no image")
    assert done.stdout == ""


WRONG = [
    "UPPER.example/Case:v1",
    "team/new:v1 team/kept:v1",
    "team/new:",
    "team/new:-v1",
    "team/new@sha256:abc",
    "team/new@md5:d41d8cd98f00b204e9800998ecf8427e",
    "https://registry.example/team/new:v1",
    "../../etc/passwd",
    "team//new",
    "/team/new",
    "team/new:v1\t\u00e4",
    "team/" + "x" * 300,
    "-",
    "\x1b[31mred",
]


@pytest.mark.parametrize(("line", "spelled"), [*((line, "load") for line in WRONG), (WRONG[0], "--load-images")])
def test_malformed_reference_in_a_list_is_rejected(
    loaded: LoadedStore, tmp_path: Path, line: str, spelled: str
) -> None:
    """The message names file and line; the correct lines of the list are not loaded either."""
    path = tmp_path / "imagelist"
    good = f"{loaded.upstream.host}/team/new:v1"
    path.write_text(f"# a list\n{good}\n\n{line}\n{good}\n")
    done = loaded.rejected(spelled, str(path))
    assert_one_line(done, 2, f"{path}:4: ")
    assert done.stdout == ""
    assert done.stderr.removesuffix("\n").isprintable()


def test_every_malformed_reference_is_reported(loaded: LoadedStore, tmp_path: Path) -> None:
    """Errors of several lists are all reported; a correct list is not loaded."""
    right, wrong, other = (tmp_path / name for name in ("right", "wrong", "other"))
    right.write_text(f"{loaded.upstream.host}/team/new:v1\n")
    wrong.write_text("A\nB\n")
    other.write_text("\nC\n")
    done = loaded.rejected("load", str(right), str(wrong), str(other))
    assert done.returncode == 2
    starts = [f"ociregistry: {wrong}:1: ", f"ociregistry: {wrong}:2: ", f"ociregistry: {other}:2: "]
    lines = done.stderr.splitlines()
    assert len(lines) == 3
    assert all(line.startswith(start) for line, start in zip(lines, starts, strict=True))


def test_binary_list_is_rejected(loaded: LoadedStore, tmp_path: Path) -> None:
    path = tmp_path / "imagelist"
    path.write_bytes(b"\xff\xfe\x00team")
    assert_one_line(loaded.rejected("load", str(path)), 2, f"{path}: is neither a text file nor an image archive")


def test_missing_list_is_rejected(loaded: LoadedStore, tmp_path: Path) -> None:
    path = tmp_path / "imagelist"
    assert_one_line(loaded.rejected("load", str(path)), 1, str(path), "No such file or directory")


# Patterns, dates, options

INVALID = ["[", "(", "*", "+", "a**", "(?P<n>a", "x\\", "[z-a]", "a,[", ",", "a,,b", ""]
GO_ONLY = ["[[:alpha:]]", "team\\z", "\\Qteam\\E", "\\pN", "\\P{Greek}", "\\C", "(?U)a+", "kept,[[:digit:]]"]
COMMANDS: list[Callable[[str], list[str]]] = [
    lambda pattern: [f"--prune={pattern}"],
    lambda pattern: ["prune", f"--pattern={pattern}"],
    lambda pattern: ["prune", f"--pattern={pattern}", "--dry-run"],
    lambda pattern: ["list", f"--pattern={pattern}"],
    lambda pattern: ["export", f"--pattern={pattern}", "-o", "/nowhere/images.tar"],
]


@pytest.mark.parametrize(
    ("pattern", "command"),
    [
        *((pattern, COMMANDS[0]) for pattern in INVALID + GO_ONLY),
        *((pattern, command) for pattern in (INVALID[0], GO_ONLY[0]) for command in COMMANDS[1:]),
    ],
)
def test_invalid_pattern_is_rejected(loaded: LoadedStore, pattern: str, command: Callable[[str], list[str]]) -> None:
    done = loaded.rejected(*command(pattern))
    assert_one_line(done, 2, "--pattern")
    assert done.stdout == ""
    if pattern in GO_ONLY:
        assert "Go syntax" in done.stderr


DATES = ["2024-02-30T00:00:00", "2023-02-29T12:00:00", "2024-13-01T00:00:00", "2024-03-01T24:00:00"]
DATES += ["2024-03-01", "2024-03-01 22:17:30", "2024-03-01T22:17:30Z", "yesterday", "", "0000-01-01T00:00:00"]


@pytest.mark.parametrize(
    ("spelled", "date"),
    [
        *(("--prune-before", date) for date in DATES),
        ("prune --before", DATES[0]),
        ("--prune kept --prune-before", DATES[0]),
    ],
)
def test_invalid_date_is_rejected(loaded: LoadedStore, date: str, spelled: str) -> None:
    done = loaded.rejected(*spelled.split(), date)
    assert_one_line(done, 2, "--before", repr(date), "a local date and time such as 2024-03-01T22:17:30 is expected")


ALONE = [
    ("--dry-run", "--dry-run"),
    ("--dry-run --list-cache", "--dry-run"),
    ("--dry-run --version-of-no-kind", "--version-of-no-kind"),
    ("--dry-run load imagelist", "--dry-run"),
    ("serve --dry-run", "--dry-run"),
    ("prune --dry-run", "--pattern"),
    ("prune --older-than 2d", "--orphans"),
    ("prune --pattern kept --older-than 2d", "--orphans"),
    ("prune --unused-for soon", "--unused-for"),
    ("--prune kept --list-cache", "one thing at a time"),
    ("--prune kept --load-images imagelist", "one thing at a time"),
    ("--prune kept list", "one thing at a time"),
    ("--prune kept serve", "one thing at a time"),
    ("--concurrent 0 list", "--concurrent"),
    ("--pull-timeout 1s list", "--pull-timeout"),
    ("--arch arm/v7 list", "--arch"),
    ("--platform linux list", "--platform"),
]


@pytest.mark.parametrize(("arguments", "named"), ALONE)
def test_conflicting_options_are_rejected(loaded: LoadedStore, arguments: str, named: str) -> None:
    assert_one_line(loaded.rejected(*arguments.split()), 2, named)


# Archives


def layout(image: Image = NEW, blobs: Mapping[str, bytes] | None = None) -> dict[str, bytes]:
    """Return the files of an OCI layout with this image, some with other content."""
    of: Manifest = image.manifest
    entry = {"mediaType": of.media_type, "digest": of.digest, "size": len(of.data)}
    entry["annotations"] = {"org.opencontainers.image.ref.name": NAME}
    parts = {of.digest: of.data, **{blob.digest: blob.data for blob in image.blobs}, **(blobs or {})}
    return {
        "oci-layout": b'{"imageLayoutVersion": "1.0.0"}',
        "index.json": json.dumps({"schemaVersion": 2, "manifests": [entry]}).encode(),
        **{f"blobs/{digest.replace(':', '/')}": data for digest, data in parts.items()},
    }


def tar(files: Mapping[str, bytes], *, packed: bool = False) -> bytes:
    """Return a tar of these files."""
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w") as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return gzip.compress(written.getvalue()) if packed else written.getvalue()


def flipped(data: bytes) -> bytes:
    """Return the data with one byte changed."""
    return data[:-1] + bytes([data[-1] ^ 1])


LAST, MANIFEST = NEW.layers[-1], NEW.manifest
WHOLE = tar(layout())
LYING = "it does not have the digest"
ARCHIVES: dict[str, tuple[bytes, str]] = {
    "cut off in a layer": (WHOLE[: len(WHOLE) * 2 // 3], "cut off"),
    "cut off at a header": (WHOLE[:1024], "cut off"),
    "cut off at the end": (WHOLE.rstrip(b"\0")[:-700], "cut off"),
    "cut off and compressed": (tar(layout(), packed=True)[:-2000], "cut off"),
    "damaged and compressed": (flipped(tar(layout(), packed=True)), "damaged"),
    "lying layer": (tar(layout(blobs={LAST.digest: flipped(LAST.data)})), LYING),
    "lying layer, compressed": (tar(layout(blobs={LAST.digest: flipped(LAST.data)}), packed=True), LYING),
    "lying config": (tar(layout(blobs={NEW.config.digest: flipped(NEW.config.data)})), LYING),
    "lying manifest": (tar(layout(blobs={MANIFEST.digest: MANIFEST.data[:-1] + b" "})), MANIFEST.digest[7:]),
    "layer too short": (tar(layout(blobs={LAST.digest: LAST.data[:-1]})), "bytes, not"),
    "a way up": (tar({**layout(), "../x": b"out"}), "leads outside: ../x"),
    "a way up, inside": (tar({**layout(), "blobs/../../x": b"out"}), "leads outside: blobs/../../x"),
    "a way from the root": (tar({"/x": b"out", **layout()}), "leads outside: /x"),
    "something else": (tar({"README": b"text"}), "not an image archive"),
    "no tar, but compressed": (b"\x1f\x8b\x08" + bytes(100), ""),
    "nothing in it": (tar({}), "not an image archive"),
}


@pytest.mark.parametrize(("kind", "spelled"), [*((kind, "load") for kind in ARCHIVES), ("a way up", "--load-images")])
def test_damaged_or_malicious_archive_is_rejected(
    loaded: LoadedStore, tmp_path: Path, kind: str, spelled: str
) -> None:
    """Nothing is written, in the store or elsewhere; the last test shows that the archive is otherwise correct."""
    data, why = ARCHIVES[kind]
    path = tmp_path / "deep" / "images.tar"
    path.parent.mkdir()
    path.write_bytes(data)
    done = loaded.rejected(spelled, str(path))
    assert_one_line(done, 1, f"{path}: ", why)
    assert done.stdout == ""
    assert [one for one in tmp_path.rglob("*") if one.is_file()] == [path]
    assert not (loaded.shell.folder / "x").exists()
    assert not (loaded.shell.folder.parent / "x").exists()


def test_malicious_archive_does_not_stop_another(tmp_path: Path) -> None:
    bad, good = tmp_path / "bad.tar", tmp_path / "good.tar"
    bad.write_bytes(tar({**layout(), "../x": b"out"}))
    good.write_bytes(tar(layout()))
    shell = shell_in(tmp_path)
    done = shell.run("load", str(bad), str(good))
    assert (done.returncode, done.stdout.splitlines()[0].partition(": ")[0]) == (1, "loaded")
    assert done.stderr.startswith(f"ociregistry: {bad}: ")
    assert list(shell.listed()) == [NAME]


@pytest.mark.parametrize("packed", [False, True])
def test_correct_archive_is_loaded(tmp_path: Path, packed: bool) -> None:
    path = tmp_path / "images.tar"
    path.write_bytes(tar(layout(), packed=packed))
    shell = shell_in(tmp_path)
    done = succeeded(shell.run("load", str(path)))
    assert re.match(rf"loaded: {re.escape(NAME)}: 4 blobs, ", done)
    assert list(shell.listed()) == [NAME]
