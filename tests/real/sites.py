"""Stores on separate machines, and archives that carry images between them."""

from __future__ import annotations

import json
import subprocess
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from tests.images import Image, Index
from tests.peers import Containerd, hosts_dir
from tests.processes import ROOT, Daemon, run, twistd


@dataclass(frozen=True)
class Site:
    """A folder with a store, `images`, and a configuration file that allows `upstreams` over plain HTTP."""

    folder: Path
    upstreams: tuple[str, ...] = ()

    @property
    def images(self) -> Path:
        """The store."""
        return self.folder / "images"

    def command(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run a command on the store to its end, with any exit status."""
        self.folder.mkdir(exist_ok=True)
        config = self.folder / "ociregistry.yaml"
        config.write_text(yaml.safe_dump([{"name": name, "scheme": "http"} for name in self.upstreams]))
        options = ["--image-path", str(self.images), "--config-path", str(config)]
        return run(twistd(*options, *words), check=False, environment={"PYTHONPATH": str(ROOT)})

    def succeed(self, *words: str) -> list[str]:
        """Return the lines that a command prints; it must succeed, and write no error."""
        done = self.command(*words)
        assert (done.returncode, done.stderr) == (0, ""), done
        return done.stdout.splitlines()

    def fail(self, *words: str) -> tuple[list[str], list[str]]:
        """Return the lines of stdout and of stderr; the command must exit with 1, and without a traceback."""
        done = self.command(*words)
        assert done.returncode == 1, done
        assert "Traceback" not in done.stderr, done
        return done.stdout.splitlines(), done.stderr.splitlines()

    def load(self, *images: str, options: Sequence[str] = ()) -> None:
        """Load these images from their upstreams."""
        wanted = self.folder.with_suffix(".txt")
        wanted.write_text("".join(f"{image}\n" for image in images))
        self.succeed("load", str(wanted), *options)

    @property
    def digests(self) -> dict[str, str]:
        """The image URLs that `list` prints, with their digests."""
        return {row["url"]: row["digest"] for row in json.loads("\n".join(self.succeed("list", "--json")))}

    @property
    def long_list(self) -> list[list[str]]:
        """The columns of `list --long`, without the time of the last pull."""
        rows = [line.split(" ") for line in self.succeed("list", "--long")]
        return [[*columns[:3], *columns[4:]] for columns in rows]

    def stored(self, folder: str) -> dict[str, bytes]:
        """Return the files in one of the store's folders, with their content."""
        return {path.name: path.read_bytes() for path in (self.images / folder).iterdir()}

    @property
    def leftovers(self) -> set[str]:
        """The files in the store, except the locks of processes."""
        files = {str(path.relative_to(self.images)) for path in self.images.rglob("*") if path.is_file()}
        return {name for name in files if not name.endswith("/lock")}

    def daemon(self, *options: str) -> Daemon:
        """Make a daemon on the store, not yet started; it fetches only what is requested."""
        self.folder.mkdir(exist_ok=True)
        registries = dict.fromkeys(self.upstreams, "http")
        return Daemon(self.folder, registries, "--no-complete-images", *options, image_path=self.images)


def pull_offline(daemon: Daemon, containerd: Containerd, ref: str) -> frozenset[str]:
    """Pull and unpack an image by containerd from the daemon alone; return the fetched digests.

    The image is removed again. The daemon must not have asked an upstream.
    """
    before, logged = containerd.content, len(daemon.log)
    done = containerd.pull(ref, hosts_dir(daemon.config_path.parent / "certs.d", daemon.url, "_default"))
    assert done.returncode == 0, f"{done.stderr}\n{daemon.log[logged:]}"
    assert containerd.unpacked(ref)
    fetched = containerd.content - before
    containerd.remove(ref)
    assert "from upstream" not in daemon.log[logged:]
    return fetched


def parts_of(what: Image | Index, platform: str = "linux/amd64") -> set[str]:
    """Return the digests that a client of this platform fetches: manifests, config and layers."""
    images = what.images if isinstance(what, Index) else (what,)
    (image,) = (image for image in images if image.platform == platform)
    return {what.manifest.digest, image.manifest.digest, *blobs_of(image)}


def with_metadata(what: Index, platform: str = "linux/amd64") -> set[str]:
    """Return the digests that `load` stores for this platform, with the other platforms' manifests and configs."""
    others = what.without(platform)
    return parts_of(what, platform) | {part.digest for one in others for part in (one.manifest, one.config)}


def blobs_of(what: Image | Index) -> set[str]:
    """Return the digests of its configs and layers."""
    return {blob.digest for blob in what.blobs}


def in_archive(path: Path) -> set[str]:
    """Return the digests of the files in an OCI layout archive."""
    with tarfile.open(path) as archive:
        names = archive.getnames()
    assert len(names) == len(set(names))
    return {name.removeprefix("blobs/").replace("/", ":") for name in names if name.startswith("blobs/")}
