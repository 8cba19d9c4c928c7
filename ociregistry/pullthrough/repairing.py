"""Repairing: what was found to be damaged is fetched anew."""

from __future__ import annotations

from collections.abc import Mapping

from ociregistry.errors import RegistryError
from ociregistry.names import Digest, ImageReference
from ociregistry.pullthrough.suppliers import Supplier
from ociregistry.store.store import Store
from ociregistry.store.verifying import Damaged

NOT_NEEDED = "no image needs it"


class Repairer:
    """Fetches from `supplier` what `store` has lost."""

    def __init__(self, store: Store, supplier: Supplier) -> None:
        self._store = store
        self._supplier = supplier

    async def repair(self, damaged: Damaged) -> str:
        """Why it could not be fetched anew; the empty string if it was."""
        try:
            return await (self._blob(damaged.digest) if damaged.is_blob else self._record(damaged))
        except OSError as error:
            return f"cannot be stored: {error.strerror or error}"

    async def complete(self, missing: Mapping[Digest, int]) -> str:
        """Fetch blobs, of these sizes in bytes, that an image lacks.

        Returns why some could not be fetched, the empty string if all are here.
        """
        failed = ""
        for blob, size in missing.items():
            if await self._store.holds(blob, size):
                # Another image lacked it too.
                continue
            try:
                why = await self._blob(blob)
            except OSError as error:
                why = f"cannot be stored: {error.strerror or error}"
            failed = failed or why
        return failed

    async def _blob(self, digest: Digest) -> str:
        why = NOT_NEEDED
        for repository, size in self._store.uses(digest).items():
            try:
                await self._supplier.blob(repository, digest, size, lambda count: None)
            except RegistryError as error:
                why = error.message
            else:
                return ""
        return why

    async def _record(self, damaged: Damaged) -> str:
        why = "of which image it was cannot be made out any more"
        for repository in dict.fromkeys(image.repository for image, _ in damaged.images):
            fetched = ImageReference(repository, damaged.digest)
            try:
                found = await self._supplier.manifest(fetched)
            except RegistryError as error:
                why = error.message
                continue
            # With the dates of before: a tag that means another manifest since then must not come back.
            await self._store.restore(found.manifest, dict(damaged.images), fetched, damaged.wanted)
            return ""
        return why
