"""Repairing: what was found to be damaged is fetched anew."""

from __future__ import annotations

from ociregistry.errors import RegistryError
from ociregistry.names import ImageReference
from ociregistry.pullthrough.suppliers import Supplier
from ociregistry.store.store import Store
from ociregistry.store.verifying import Damaged


class Repairer:
    """Fetches from `supplier` what `store` has lost."""

    def __init__(self, store: Store, supplier: Supplier) -> None:
        self._store = store
        self._supplier = supplier

    async def repair(self, damaged: Damaged) -> str:
        """Why it could not be fetched anew; the empty string if it was."""
        try:
            return await (self._blob(damaged) if damaged.is_blob else self._record(damaged))
        except OSError as error:
            return f"cannot be stored: {error.strerror or error}"

    async def _blob(self, damaged: Damaged) -> str:
        why = "no image needs it"
        for repository, size in self._store.uses(damaged.digest).items():
            try:
                await self._supplier.blob(repository, damaged.digest, size, lambda count: None)
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
            await self._store.restore(found.manifest, dict(damaged.images), fetched)
            return ""
        return why
