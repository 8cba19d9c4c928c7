"""`list`: prints the images in the store, one line for each image URL."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Set
from datetime import datetime
from functools import cached_property
from typing import Any

from twisted.python import usage

from ociregistry.commands.options import Command, check_store, print_lines, print_unreadable
from ociregistry.config.values import Patterns, local_time
from ociregistry.manifests import Manifest
from ociregistry.names import Digest
from ociregistry.settings import Settings
from ociregistry.store.scan import collection_paused
from ociregistry.store.snapshot import Row, Snapshot
from ociregistry.store.workdir import undecided_images


class List(Command):
    """The options of `list`."""

    examples = ("list --long --sort size", "list --pattern ^quay.io/ --json")
    longdesc = (
        "Prints three columns for each image in the store: URL, kind (`list` or `image`), and the local time "
        "since which it is stored. A list of which the store has no image is marked as `no-image`."
    )
    optParameters = [
        [
            "pattern",
            None,
            None,
            "Only images whose URL contains a match of one of these regular expressions (separated by commas).",
        ],
        ["sort", None, "url", "Sort by url, created, pulled (oldest first) or size (largest first)."],
    ]
    optFlags = [
        ["long", None, "Also print the time of the last pull, size, platform, and whether the image is complete."],
        ["json", None, "Print all facts as JSON."],
    ]

    def postOptions(self) -> None:
        """Parse the values of the options.

        Raises:
            usage.UsageError: a value is invalid, or --long and --json are both given.
        """
        self.patterns = self.value("pattern", Patterns.parse)
        if self["sort"] not in _ORDERS:
            raise usage.UsageError(f"--sort {self['sort']!r}: one of {', '.join(_ORDERS)} is expected")
        if self["long"] and self["json"]:
            raise usage.UsageError("--long and --json exclude each other: JSON has all of it")

    def run(self, settings: Settings) -> int:
        """Print the images to stdout, and warnings about unreadable records to stderr.

        Raises:
            OSError: the store cannot be used.
        """
        check_store(settings.image_path)
        with collection_paused(for_good=True):
            snapshot = Snapshot.read(settings.image_path)
            print_unreadable(snapshot.unreadable)
            listed = snapshot.all_rows if self["long"] else snapshot.rows
            rows = [row for row in listed if self.patterns is None or self.patterns.match(row.url)]
            pending = undecided_images(settings.image_path)
            lines = [Line(row, snapshot, pending) for row in rows]
            lines.sort(key=_ORDERS[self["sort"]])
            print_lines(self._printed(lines))
        return 0

    def _printed(self, lines: list[Line]) -> Iterator[str]:
        if self["json"]:
            yield json.dumps([line.document for line in lines], indent=2)
            return
        for line in lines:
            yield " ".join(line.columns + (line.more_columns if self["long"] else line.marks))


_NO_IMAGE = "no-image"


class Line:
    """The facts about one image URL that are printed."""

    def __init__(self, row: Row, snapshot: Snapshot, pending: Set[Digest]) -> None:
        """Describe `row`; `pending` are the images that may turn out to be wanted or not."""
        self._snapshot = snapshot
        self._pending = pending
        self._manifest = row.stored.manifest
        self.row = row

    @cached_property
    def pulled(self) -> datetime:
        """The time of the last pull."""
        return self._snapshot.pulled(self._manifest.digest)

    @cached_property
    def _descendants(self) -> list[Manifest]:
        """The image itself, or the images of an index."""
        if not self._manifest.is_list:
            return [self._manifest]
        below = self._snapshot.index.descendants(self._manifest.digest)
        manifests = (self._snapshot.records[digest].manifest for digest in below)
        return [manifest for manifest in manifests if not manifest.is_list]

    @property
    def is_metadata(self) -> bool:
        """Whether this is an image whose layers are not wanted in the store, such as other platforms of an index."""
        return not self._manifest.is_list and not self._snapshot.is_wanted(self._manifest.digest)

    @cached_property
    def _images(self) -> list[Manifest]:
        """The images that count for size and completeness: wanted ones, and an image that no index refers to."""
        return [image for image in self._descendants if not self._snapshot.is_metadata(image.digest)]

    @property
    def size(self) -> int:
        """Size in bytes of the blobs, each counted once, without foreign layers that are missing."""
        sizes = {digest: size for image in self._images for digest, size in image.blob_sizes.items()}
        return sum(sizes.values()) - self.missing_foreign

    @property
    def kind(self) -> str:
        """`list` for an index, or `image`."""
        return "list" if self._manifest.is_list else "image"

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that are always printed."""
        return self.row.url, self.kind, local_time(self.row.dates.created)

    @property
    def marks(self) -> tuple[str, ...]:
        """What is to be said about the image where --long does not: that nothing of an index can be pulled."""
        return (_NO_IMAGE,) if self._manifest.is_list and self._why_not_complete == _NO_IMAGE else ()

    @property
    def more_columns(self) -> tuple[str, ...]:
        """The columns that --long adds."""
        return local_time(self.pulled), str(self.size), ",".join(self.platforms) or "-", self._completeness

    @property
    def _why_not_complete(self) -> str:
        """Why it is not to be complete now, whichever blobs are there; empty if it is."""
        if any(image.digest in self._pending for image in self._descendants):
            return "pending"
        if self.is_metadata:
            return "metadata"
        return "" if self._images else _NO_IMAGE

    @property
    def _completeness(self) -> str:
        if self._why_not_complete:
            return self._why_not_complete
        if self.missing:
            return f"{self.missing}-missing"
        return "without-foreign-layers" if self.missing_foreign else "complete"

    @property
    def missing(self) -> int:
        """Bytes that the images lack, without those of foreign layers."""
        missing = (self._snapshot.missing(image.digest).items() for image in self._images)
        return sum({digest: size for found in missing for digest, size in found}.values())

    @cached_property
    def missing_foreign(self) -> int:
        """Bytes of foreign layers that the images lack."""
        missing = (self._snapshot.missing_foreign(image.digest).items() for image in self._images)
        return sum({digest: size for found in missing for digest, size in found}.values())

    @property
    def platforms(self) -> list[str]:
        """The platforms of the images that are stored, sorted."""
        found = set()
        for image in self._descendants if self.is_metadata else self._images:
            for index in self._snapshot.index.parents(image.digest):
                children = self._snapshot.records[index].manifest.children
                found |= {one.full_platform for one in children if one.digest == image.digest and one.platform}
        return sorted(found)

    @property
    def document(self) -> dict[str, Any]:
        """The JSON object for --json."""
        return {
            "url": self.row.url,
            "kind": self.kind,
            "digest": self._manifest.digest,
            "mediaType": self._manifest.media_type,
            "created": self.row.dates.created.isoformat(),
            "confirmed": self.row.dates.confirmed.isoformat(),
            "pulled": self.pulled.isoformat(),
            "size": self.size,
            "platforms": self.platforms,
            "images": len(self._images),
            "missing": self.missing,
            "missingForeign": self.missing_foreign,
        }


_ORDERS: dict[str, Callable[[Line], Any]] = {
    "url": lambda line: line.row.url,
    "created": lambda line: (line.row.dates.created, line.row.url),
    "pulled": lambda line: (line.pulled, line.row.url),
    "size": lambda line: (-line.size, line.row.url),
}
