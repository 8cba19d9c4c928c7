"""What the store does with other images leaves the remembered answers of an image alone."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from twisted.internet.task import Clock

from ociregistry.names import Digest
from ociregistry.pullthrough.cache import PullThrough
from ociregistry.store.store import Store
from tests.images import make_image, make_index
from tests.unit.support.common import image, manifest, on_reactor, turn, until
from tests.unit.support.hits import BLOB, IMAGE, MANIFEST, TAG, Served, request
from tests.unit.support.stores import keep_pulled, looked

OTHERS = 20


@pytest.fixture
def served(root: Path, store: Store, cache: PullThrough, clock: Clock) -> Served:
    """Return a site over the empty store."""
    return Served(root, store, cache, clock)


@dataclass(frozen=True)
class Beside:
    """What happens beside an image whose answers are remembered."""

    store: Store
    root: Path
    clock: Clock
    served: Served

    async def seconds_pass(self, count: int) -> None:
        """Let the store scan its folders, and look at its open files, each second."""
        for _ in range(count):
            self.clock.advance(1)
            for _ in range(10):
                await turn()

    async def records_written(self) -> None:
        """By this process: in the repository of the image, and in others."""
        for number in range(OTHERS):
            other = manifest(make_image(f"other/{number}"))
            for repository in ("team/app", f"team/other{number}"):
                await self.store.keep(other, image(f"reg.example/{repository}:other{number}"), wanted=True)

    async def records_pulled(self) -> None:
        """Also that of the image itself: its date changes, its meaning does not."""
        await self.records_written()
        for digest in self.store.digests:
            self.store.pulled(digest)
        await self.seconds_pass(120)

    async def records_touched(self) -> None:
        """By another process, which notes pulls."""
        await self.records_written()
        for path in (self.root / "img").iterdir():
            os.utime(path, (1, 2))
        await self.seconds_pass(3)

    async def records_removed(self) -> None:
        """By another process."""
        await self.records_written()
        await self.seconds_pass(2)
        for path in (self.root / "img").iterdir():
            if path.name != IMAGE.digest.hex:
                path.unlink()
        await looked(self.clock, lambda: list(self.store.digests) == [IMAGE.digest])

    async def blobs_committed(self) -> None:
        """With their records, as a download does."""
        for number in range(OTHERS):
            data = os.urandom(1000)
            await keep_pulled(self.store, manifest(make_image(number)), image(f"reg.example/other:{number}"), data)
        await self.seconds_pass(15)

    async def indexes_written(self) -> None:
        """That name other images."""
        for number in range(OTHERS):
            index = manifest(make_index(f"index/{number}"))
            await self.store.keep(index, image(f"reg.example/team/app:index{number}"))

    async def others_requested(self) -> None:
        """As many blobs as are kept open beside those of the image."""
        for number in range(OTHERS):
            built = make_image(f"requested/{number}", layers=11)
            await self.store.keep(manifest(built), image(f"reg.example/requested:{number}"), wanted=True)
            for blob in built.blobs:
                digest = Digest(blob.digest)
                (self.root / "blobs" / digest.hex).write_bytes(blob.data)
                stored = await self.store.blob(digest)
                assert stored is not None
                stored.close()
        await self.seconds_pass(2)


HAPPENINGS: dict[str, Callable[[Beside], Awaitable[None]]] = {
    name: happening
    for name, happening in vars(Beside).items()
    if name.split("_")[0] in ("records", "blobs", "indexes", "others")
}


@pytest.mark.parametrize("happening", HAPPENINGS.values(), ids=HAPPENINGS)
@on_reactor
async def test_answers_of_an_untouched_image_stay(
    root: Path, store: Store, clock: Clock, served: Served, happening: Callable[[Beside], Awaitable[None]]
) -> None:
    await served.fill()
    await until(lambda: IMAGE.digest in store.digests)
    requests = {
        (target, method): await served.remember(target, method)
        for target in (TAG, MANIFEST, BLOB)
        for method in ("GET", "HEAD")
    }
    asked = served.v2.asked
    await happening(Beside(store, root, clock, served))
    for (target, method), answer in requests.items():
        assert await served.ask(request(target, method)) == answer
    assert served.v2.asked == asked
