"""One store, two ways to its index: kept fresh by the daemon, and built from the files by a command."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.defer import Deferred, succeed
from twisted.internet.task import Clock

from ociregistry.manifests import Manifest
from ociregistry.names import Digest, ImageReference
from ociregistry.store.index import Index
from ociregistry.store.records import Dates, Record, read_record
from ociregistry.store.scan import IndexRefresh
from ociregistry.store.snapshot import Snapshot
from ociregistry.store.threads import Threads
from tests.unit.support.stores import StoreDir, day, image_of, list_of, url_of

ONE, TWO, THREE = image_of(b"config", b"base", b"1"), image_of(b"config", b"base", b"2"), image_of(b"3", b"3")
INNER = list_of(ONE, TWO)
MANIFESTS = (ONE, TWO, THREE, INNER, list_of(INNER, THREE), list_of(ONE, seed="referrers"))
BLOBS = tuple({blob.digest for manifest in MANIFESTS for blob in manifest.blobs})
TAGS = ("a:1", "a:2", "b:1", f"b:sha256-{'0' * 64}")
URLS = tuple(map(url_of, TAGS))
IMAGES = tuple(map(ImageReference.parse_whole, URLS))


class Inline(Threads):
    """Threads that run each job at once, in the caller."""

    def __init__(self) -> None:
        pass

    def read(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Deferred[Any]:
        """Run `function` and return its result."""
        return succeed(function(*args, **kwargs))


class Replica:
    """A store that other processes change, the index that a daemon keeps of it, and a command's snapshot."""

    def __init__(self, root: Path) -> None:
        self.store_dir = StoreDir(root)
        self.clock = Clock()
        self.index = Index()
        self.refresh = IndexRefresh(root, self.index, Inline(), self.clock)
        self.refresh.read()
        self.refresh.start()
        self.snapshot = self.store_dir.snapshot()
        self._mtime = 0

    def write(self, manifest: Manifest, images: dict[str, int], *, own: bool) -> None:
        """Write a record with these URLs and confirmation times, as another process or (own) as the daemon."""
        dates = {url: Dates(day(0), day(0) + timedelta(seconds=at)) for url, at in images.items()}
        record = Record(manifest, dates)
        self._write(manifest, record.render())
        if own:
            self.refresh.record_written(record)

    def confirm(self, manifest: Manifest, image: ImageReference, at: int) -> None:
        """Confirm an image URL, as the daemon."""
        path = self.store_dir.path(manifest)
        if path.exists() and path.read_bytes() != b"{":
            record = read_record(path).confirm(image, day(0) + timedelta(seconds=at))
            self._write(manifest, record.render())
            self.refresh.record_written(record)

    def damage(self, manifest: Manifest) -> None:
        """Truncate a record, as another process."""
        self._write(manifest, b"{")

    def remove(self, manifest: Manifest) -> None:
        """Remove a record, as another process."""
        self.store_dir.path(manifest).unlink(missing_ok=True)

    def pull(self, manifest: Manifest) -> None:
        """Note a pull."""
        path = self.store_dir.path(manifest)
        if path.exists():
            self._touch(path)

    def scan(self) -> None:
        """Run the daemon's next scan."""
        self.clock.advance(1)

    def _write(self, manifest: Manifest, data: bytes) -> None:
        path = self.store_dir.path(manifest)
        path.write_bytes(data)
        self._touch(path)

    def _touch(self, path: Path) -> None:
        # Of two writes within one tick of the kernel's clock, the second may leave the mtime as it is.
        self._mtime += 1
        os.utime(path, ns=(self._mtime, self._mtime))


def answers(index: Index) -> list[object]:
    """Return all answers of an index."""
    digests = [manifest.digest for manifest in MANIFESTS]
    known = [digest for digest in digests if index.get(digest) is not None]
    return [
        len(index),
        sorted(index.digests),
        index.counts(),
        [(entry.images, entry.blobs, entry.children) for digest in known if (entry := index.get(digest))],
        [index.resolve(image) for image in IMAGES],
        [index.resolve(ImageReference(IMAGES[0].repository, digest)) for digest in digests],
        [(index.meaning(url), dict(index.claims(url))) for url in URLS],
        [index.tags(image.repository) for image in IMAGES],
        set(index.blobs),
        [(dict(index.naming(blob)), index.sizes(blob), dict(index.uses(blob))) for blob in BLOBS],
        [index.sizes(blob, image.repository) for blob in BLOBS for image in IMAGES],
        [(set(index.parents(one)), index.ancestors(one), index.indexes(one)) for one in digests],
        [(index.children(one), index.descendants(one)) for one in known],
    ]


MANIFEST = st.sampled_from(MANIFESTS)
STEPS = st.one_of(
    st.builds(
        lambda manifest, images, own: lambda store: store.write(manifest, images, own=own),
        MANIFEST,
        st.dictionaries(st.sampled_from(URLS), st.integers(0, 3)),
        st.booleans(),
    ),
    st.builds(
        lambda manifest, image, at: lambda store: store.confirm(manifest, image, at),
        MANIFEST,
        st.sampled_from(IMAGES),
        st.integers(0, 5),
    ),
    st.builds(lambda manifest: lambda store: store.damage(manifest), MANIFEST),
    st.builds(lambda manifest: lambda store: store.remove(manifest), MANIFEST),
    st.builds(lambda manifest: lambda store: store.pull(manifest), MANIFEST),
    st.just(Replica.scan),
)


@given(st.lists(STEPS, max_size=15))
def test_index_of_the_daemon_and_of_a_command_agree(steps: list[Callable[[Replica], None]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = Replica(Path(folder))
        for step in steps:
            step(store)
            if step is Replica.scan:
                store.snapshot.refresh()
                assert answers(store.snapshot.index) == answers(store.index)
        store.scan()
        told = answers(store.index)
        assert answers(Snapshot.read(store.store_dir.root).index) == told
        store.snapshot.refresh()
        assert answers(store.snapshot.index) == told
        for url, image in zip(URLS, IMAGES, strict=True):
            assert store.index.resolve(image) == newest_of(store.store_dir.root, url)


def newest_of(root: Path, url: str) -> Digest | None:
    """Return the digest that a tag means, found among all records."""
    records = Snapshot.read(root).records
    claims = [
        (stored.record.images[url].confirmed, digest)
        for digest, stored in records.items()
        if url in stored.record.images
    ]
    return max(claims)[1] if claims else None
