"""The store of a daemon, running or not: commands on it, and its contents before and after."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tests.client import fetch
from tests.images import Image, Index, digest_of
from tests.processes import ROOT, Daemon, run, twistd

ENVIRONMENT = {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
PATIENCE = 120.0
"""Seconds that a command may take on a busy machine."""


def command_line(daemon: Daemon, *arguments: str) -> list[str]:
    """Return the command line of a command on the daemon's store, with its configuration."""
    common = ["--image-path", str(daemon.image_path), "--config-path", str(daemon.config_path)]
    return twistd(*common, *arguments, options=())


def command(
    daemon: Daemon, *arguments: str, status: int | None = 0, timeout: float = PATIENCE
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, which must have this exit status, and no traceback."""
    done = run(command_line(daemon, *arguments), check=False, timeout=timeout, environment=ENVIRONMENT)
    assert "Traceback" not in done.stderr, done.stderr
    assert status in (None, done.returncode), f"{arguments} gave {done.returncode}:\n{done.stdout}{done.stderr}"
    return done


def assert_verify_finds_no_damage(daemon: Daemon) -> None:
    """Run `verify`, which must find nothing damaged, and exit with 1 where something is missing."""
    done = command(daemon, "verify", status=None)
    assert ", 0 damaged" in done.stdout
    assert done.returncode == (1 if "not complete: " in done.stdout else 0), done


@contextmanager
def running_command(argv: list[str], folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command until the block ends; its output is in the files stdout and stderr in `folder`."""
    environment = {**os.environ, **ENVIRONMENT}
    with (folder / "stdout").open("wb") as stdout, (folder / "stderr").open("wb") as stderr:
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, env=environment)
    with process:
        try:
            yield process
        finally:
            process.kill()


def image_list(path: Path, images: Iterable[str]) -> str:
    """Write a list of these images for `load`; return its path."""
    path.write_text("".join(f"{image}\n" for image in images))
    return str(path)


@dataclass(frozen=True)
class StoredRecord:
    """A record."""

    images: Mapping[str, str]
    """Image URL -> the time since which it is noted."""
    needs: frozenset[str]
    """The blobs that it names."""
    there: frozenset[str]
    """Those of them that are complete, by their size."""

    def is_still(self, after: StoredRecord) -> bool:
        """Whether the record was never removed in between: one that was recreated has new dates."""
        return any(after.images.get(url) == created for url, created in self.images.items())


Contents = Mapping[str, StoredRecord]
"""Records by the digest of the manifest, in hexadecimal."""


def contents(root: Path) -> Contents:
    """Return the records of the store at `root`, also while it changes."""
    found: dict[str, StoredRecord] = {}
    for path in (*(root / "fat").iterdir(), *(root / "img").iterdir()):
        with suppress(FileNotFoundError):
            record = json.loads(path.read_text())
            manifest = json.loads(record["manifest"])
            entries = [*manifest.get("layers", ()), *([manifest["config"]] if "config" in manifest else [])]
            sizes = {entry["digest"]: entry["size"] for entry in entries}
            there = frozenset(digest for digest, size in sizes.items() if _size(root, digest) == size)
            images = {url: dates["created"] for url, dates in record["images"].items()}
            found[path.name] = StoredRecord(images, frozenset(sizes), there)
    return found


def _size(root: Path, digest: str) -> int:
    with suppress(FileNotFoundError):
        return (root / "blobs" / digest.partition(":")[2]).stat().st_size
    return -1


def lost_blobs(before: Contents, after: Contents) -> dict[str, frozenset[str]]:
    """Return the blobs lost by records that stayed."""
    return {
        digest: kept.there - after[digest].there
        for digest, kept in before.items()
        if digest in after and kept.is_still(after[digest]) and kept.there - after[digest].there
    }


def hex_of(digest: str) -> str:
    """Return the digest's file name in the store."""
    return digest.partition(":")[2]


def has_all_of(root: Path, what: Image | Index) -> bool:
    """Whether the store has all its records and blobs."""
    found = contents(root)
    records = [found.get(hex_of(manifest.digest)) for manifest in what.manifests]
    return all(kept is not None and kept.there == kept.needs for kept in records)


def assert_blobs_match_their_digests(root: Path) -> None:
    """Assert that every blob has the digest that its name says."""
    for path in (root / "blobs").iterdir():
        with suppress(FileNotFoundError):
            assert hex_of(digest_of(path.read_bytes())) == path.name


def assert_all_served(daemon: Daemon, host: str, repository: str, reference: str, what: Image | Index) -> None:
    """Assert that the daemon serves all its bytes."""
    base, ns = f"{daemon.url}/v2/{repository}", f"?ns={host}"
    expected = {f"manifests/{reference}": what.manifest.data}
    expected |= {f"manifests/{manifest.digest}": manifest.data for manifest in what.manifests}
    expected |= {f"blobs/{blob.digest}": blob.data for blob in what.blobs}
    for path, data in expected.items():
        answer = fetch(f"{base}/{path}{ns}")
        assert (answer.status, answer.body == data) == (200, True), f"{path}: {answer.status}\n{daemon.log}"
