"""Maintenance of a store on a clock, and images last pulled in the past."""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

from twisted.internet.task import Clock

from ociregistry.config.file import PruneSettings, VerifySettings
from ociregistry.config.values import Patterns
from ociregistry.names import Digest
from ociregistry.pullthrough.cache import PullThrough
from ociregistry.pullthrough.maintenance import Maintenance, Repairer
from ociregistry.store.store import Store
from tests.images import Image, Index
from tests.unit.support.common import image, manifest
from tests.unit.support.loads import MemoryFetcher, settle

DAY = 86_400.0


def pruning(
    *,
    every: float = 3600,
    unused_for: float | None = 30 * DAY,
    max_size: int | None = None,
    keep: str = "",
    max_share: int = 100,
) -> PruneSettings:
    """Return settings in seconds and bytes."""
    return PruneSettings(
        timedelta(seconds=unused_for) if unused_for is not None else None,
        max_size,
        Patterns.parse(keep) if keep else Patterns(()),
        timedelta(seconds=every),
        max_share,
    )


def verifying(*, every: float = 7 * DAY, max_rate: int | None = None) -> VerifySettings:
    """Return settings in seconds and bytes per second."""
    return VerifySettings(timedelta(seconds=every), max_rate)


class MaintenanceHarness:
    """Maintenance whose clock the test advances."""

    def __init__(self, store: Store, cache: PullThrough, fetcher: MemoryFetcher, root: Path, clock: Clock) -> None:
        self.store = store
        self.root = root
        self._began = datetime.now(UTC) - timedelta(seconds=clock.seconds())
        self._clock = clock
        self.clock_error = timedelta(0)
        """How far the system clock is ahead."""
        self._parts = (store, cache, Repairer(store, fetcher), clock, self.now)
        self.maintenance = Maintenance(*self._parts)

    def now(self) -> datetime:
        """Return the time of the system clock."""
        return self._began + timedelta(seconds=self._clock.seconds()) + self.clock_error

    def restart(self) -> Maintenance:
        """Restart maintenance, as with the process."""
        self.maintenance.stopService()
        self.maintenance = Maintenance(*self._parts)
        return self.maintenance

    async def advance(self, seconds: float) -> None:
        """Advance the clock; wait for file operations before and after."""
        await settle(self.store)
        self._clock.pump([seconds])
        await settle(self.store)

    async def add(self, url: str, built: Image | Index, ago: float = 0) -> None:
        """Store an image with its blobs, last pulled `ago` seconds ago."""
        images = built.images if isinstance(built, Index) else ()
        repository = image(url).repository
        await self.store.keep(manifest(built), image(url))
        for one in images:
            await self.store.keep(manifest(one), image(f"{repository}@{one.manifest.digest}"))
        for blob in built.blobs:
            (self.root / "blobs" / Digest(blob.digest).hex).write_bytes(blob.data)
        for recorded in built.manifests:
            path = self.record(Digest(recorded.digest))
            moment = self.now().timestamp() - ago
            os.utime(path, (moment, moment))

    def record(self, digest: Digest) -> Path:
        """Return the path of a record."""
        found = [self.root / folder / digest.hex for folder in ("img", "fat")]
        return next((path for path in found if path.exists()), found[0])

    def here(self, *built: Image | Index) -> list[bool]:
        """Return for each image whether its record exists."""
        return [self.record(Digest(one.manifest.digest)).exists() for one in built]

    def verified(self, ago: float) -> None:
        """Note that the store was verified `ago` seconds ago."""
        moment = self.now().timestamp() - ago
        (self.root / "pulls" / "verified").touch()
        os.utime(self.root / "pulls" / "verified", (moment, moment))
