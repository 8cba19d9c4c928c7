"""Maintenance of the store by the daemon: prune images, verify records and blobs, repair damage."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from twisted.application.service import Service
from twisted.internet.defer import CancelledError, Deferred, succeed
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import deferLater
from twisted.logger import Logger
from twisted.python.failure import Failure

from ociregistry.config.file import PruneSettings, VerifySettings
from ociregistry.config.values import count_text
from ociregistry.errors import RegistryError
from ociregistry.names import Digest, ImageReference
from ociregistry.pullthrough.cache import PullThrough
from ociregistry.pullthrough.fetchers import Fetcher
from ociregistry.pullthrough.imageblobs import MOST_REFUSED
from ociregistry.store.prune import EvictionPolicy, Plan, Withheld
from ociregistry.store.store import Store
from ociregistry.store.verify import Damaged, DamagedOutcome

_log = Logger(namespace="ociregistry.pullthrough")

NOT_NEEDED = "no image needs it"


class Repairer:
    """Fetches again, by `fetcher`, records and blobs that the store has lost."""

    def __init__(self, store: Store, fetcher: Fetcher) -> None:
        self._store = store
        self._fetcher = fetcher

    async def repair(self, damaged: Damaged) -> str:
        """Fetch a damaged file again; return why it failed, or the empty string."""
        if damaged.outcome is DamagedOutcome.IN_PLACE:
            return "it is still in its place: remove it, and repeat this"
        return await _or_why_not_stored(self._blob(damaged.digest) if damaged.is_blob else self._record(damaged))

    async def complete(self, missing: Mapping[Digest, int]) -> str:
        """Fetch the missing blobs of an image, given with their sizes in bytes; after a few failures, not the rest.

        Returns:
            The reason of the first failure; the empty string if all blobs are in the store.
        """
        failures: list[str] = []
        for blob, size in missing.items():
            if len(failures) >= MOST_REFUSED:
                break
            if await self._store.holds(blob, size):
                # The blob may have been fetched for another image meanwhile.
                continue
            why = await _or_why_not_stored(self._blob(blob))
            failures += [why] if why else []
        return failures[0] if failures else ""

    async def _blob(self, digest: Digest) -> str:
        why = NOT_NEEDED
        for repository, size in self._store.uses(digest).items():
            try:
                await self._fetcher.blob(repository, digest, size, lambda count: None)
            except RegistryError as error:
                why = error.message
            else:
                return ""
        return why

    async def _record(self, damaged: Damaged) -> str:
        why = "the image that it belonged to is unknown: pull or load it again"
        noted = [image.repository for image, _ in damaged.images]
        indexes = self._store.indexes(damaged.digest)
        listed = {repository for index in indexes for repository in self._store.repositories(index)}
        for repository in dict.fromkeys([*noted, *sorted(listed)]):
            fetched = ImageReference(repository, damaged.digest)
            try:
                found = await self._fetcher.manifest(fetched)
            except RegistryError as error:
                why = error.message
                continue
            if damaged.images:
                # With the old dates: a tag that has moved to another manifest since then must not come back.
                await self._store.restore(found.manifest, dict(damaged.images), fetched, damaged.wanted)
            return ""
        return why


async def _or_why_not_stored(repairing: Coroutine[Deferred[Any], Any, str]) -> str:
    """Return the result of `repairing`, or why the disk failed meanwhile."""
    try:
        return await repairing
    except OSError as error:
        return f"cannot be stored: {error.strerror or error}"


_BEING_PULLED = timedelta(minutes=10)
"""Time since its manifest was requested for which an image may still be being pulled by a client."""

_FOR_EVER = datetime.max.replace(tzinfo=UTC)
_STEADY = timedelta(minutes=1)
"""Difference, at most, between what the wall clock has advanced and the time that has passed."""

Work = Coroutine[Deferred[Any], Any, None]


@dataclass(frozen=True, slots=True)
class MaintenanceState:
    """What maintenance has done since the start of this process, and what is next; None where nothing is."""

    last_prune: datetime | None = None
    next_prune: datetime | None = None
    pruned_image_urls: int = 0
    pruned_blobs: int = 0
    pruned_bytes: int = 0
    prune_refused: str | None = None
    """Why the last prune left images that are old enough: their number suggests that the clock is wrong."""
    last_verify: datetime | None = None
    """Also of an earlier process."""
    next_verify: datetime | None = None
    verified_records: int = 0
    """Of the last verification of this process, as the four below."""
    verified_blobs: int = 0
    verified_bytes: int = 0
    damaged: int = 0
    repaired: int = 0
    """Damaged files that were fetched again."""
    damaged_in_all: int = 0
    """Damaged files that all verifications since the start have found."""


class Maintenance(Service):
    """Prunes and verifies the store on the configured schedules."""

    def __init__(
        self,
        store: Store,
        cache: PullThrough,
        repairer: Repairer,
        clock: IReactorTime,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._store = store
        self._cache = cache
        self._repairer = repairer
        self._clock = clock
        self._now = now
        self._clocks_compared = clock.seconds(), now()
        self._withheld: Withheld | None = None
        """What was last logged about images that were not pruned by age."""
        self.state = MaintenanceState()
        self._prune_settings: PruneSettings | None = None
        self._verify_settings: VerifySettings | None = None
        self._pruning: Deferred[None] = succeed(None)
        self._verifying: Deferred[None] = succeed(None)

    def reconfigure(self, prune: PruneSettings | None, verify: VerifySettings | None) -> None:
        """Apply new settings; schedules that did not change keep running. None stops a schedule."""
        if prune != self._prune_settings:
            self._pruning.cancel()
            self._prune_settings = prune
            self.state = replace(self.state, next_prune=None)
            if prune is not None:
                self._pruning = self._begin(self._prune_regularly(prune))
        if verify != self._verify_settings:
            self._verifying.cancel()
            self._verify_settings = verify
            self.state = replace(self.state, next_verify=None)
            if verify is not None:
                self._verifying = self._begin(self._verify_regularly(verify))

    def stopService(self) -> None:
        """Cancel all schedules."""
        super().stopService()
        self._pruning.cancel()
        self._verifying.cancel()

    def _begin(self, work: Work) -> Deferred[None]:
        return Deferred.fromCoroutine(work).addErrback(self._failed)

    def _failed(self, failure: Failure) -> None:
        if not failure.check(CancelledError):
            _log.failure("a defect in the maintenance of the store", failure)

    async def _prune_regularly(self, settings: PruneSettings) -> None:
        while True:
            self.state = replace(self.state, next_prune=self._now() + settings.every)
            await deferLater(self._clock, settings.every.total_seconds())
            try:
                await self._prune(settings)
            except OSError as error:
                _log.error("cannot prune the store: {why}", why=error)
            except CancelledError:
                raise
            except Exception:
                _log.failure("a defect in pruning the store")

    async def _prune(self, settings: PruneSettings) -> None:
        jumped = self._clock_jumped()
        steady = abs(jumped) <= _STEADY
        now = self._now()
        if settings.unused_for is not None and not steady:
            _log.warn(
                "pruning by age skipped: the clock jumped by {seconds:.0f} s",
                seconds=jumped.total_seconds(),
            )
        policy = EvictionPolicy(
            pulled_before=now - settings.unused_for if settings.unused_for is not None and steady else None,
            max_size=settings.max_size,
            keeps=settings.keep.match,
            busy=self._busy(),
            keep_pulled_since=now - _BEING_PULLED,
            # After the clock was set back, images with later dates may be being pulled right now.
            ignore_pulled_after=now + _STEADY if steady else _FOR_EVER,
            max_share=settings.max_share,
        )
        plan = await self._store.prune(policy)
        self.state = replace(
            self.state,
            last_prune=now,
            pruned_image_urls=self.state.pruned_image_urls + len(plan.rows),
            pruned_blobs=self.state.pruned_blobs + len(plan.blobs),
            pruned_bytes=self.state.pruned_bytes + plan.bytes,
            prune_refused=_refusal(plan.withheld) if plan.withheld is not None else None,
        )
        self._log_withheld(plan.withheld)
        _log_pruned(plan)

    def _clock_jumped(self) -> timedelta:
        """Return by how much the wall clock has jumped since the last call, beyond the time that has passed."""
        before, then = self._clocks_compared
        self._clocks_compared = passed, now = self._clock.seconds(), self._now()
        return now - then - timedelta(seconds=passed - before)

    def _log_withheld(self, withheld: Withheld | None) -> None:
        """Log that images were not pruned by age; log it again only when it changes."""
        if withheld is not None and withheld != self._withheld:
            _log.warn(
                "pruning by age refused: {why}: if the clock is right, run prune --unused-for",
                why=_refusal(withheld),
                unused=withheld.unused,
                images=withheld.images,
            )
        self._withheld = withheld

    def _busy(self) -> frozenset[Digest]:
        """Return the manifests that are being pulled or completed."""
        in_flight = {manifest for blob in self._cache.in_flight for manifest in self._store.naming(blob)}
        return frozenset(in_flight | self._store.pending.keys() | self._store.undecided.keys())

    async def _verify_regularly(self, settings: VerifySettings) -> None:
        while True:
            try:
                now = self._now()
                last = await self._store.last_verified(now)
                wait = last + settings.every - now
                self.state = replace(self.state, last_verify=last, next_verify=now + max(wait, timedelta()))
                await deferLater(self._clock, max(0.0, wait.total_seconds()))
                await self._verify(settings)
            except CancelledError:
                raise
            except Exception as error:
                if isinstance(error, OSError):
                    _log.error("cannot verify the store: {why}", why=error)
                else:
                    _log.failure("a defect in verifying the store")
                await deferLater(self._clock, settings.every.total_seconds())

    async def _verify(self, settings: VerifySettings) -> None:
        repaired = 0

        async def repair(damaged: Damaged) -> None:
            nonlocal repaired
            repaired += await self._repair(damaged)

        findings = await self._store.verify(settings.max_rate, lambda done, total: None, repair)
        self.state = replace(
            self.state,
            last_verify=self._now(),
            verified_records=findings.records,
            verified_blobs=findings.blobs,
            verified_bytes=findings.bytes,
            damaged=len(findings.damaged),
            repaired=repaired,
            damaged_in_all=self.state.damaged_in_all + len(findings.damaged),
        )
        _log.info(
            "verified {what}, damaged: {damaged}",
            what=f"{count_text(findings.records, 'record')} and {count_text(findings.blobs, 'blob')}",
            records=findings.records,
            blobs=findings.blobs,
            damaged=len(findings.damaged),
        )

    async def _repair(self, damaged: Damaged) -> bool:
        """Fetch a damaged file again; tell whether it is in the store again."""
        _log.error("{outcome}: {file}: {why}", outcome=damaged.outcome.value, file=damaged.path, why=damaged.why)
        why = await self._repairer.repair(damaged)
        if why:
            _log.error("cannot fetch {digest} again: {why}", digest=damaged.digest, why=why)
            self._store.faults.note_lost(damaged)
        return not why


def _log_pruned(plan: Plan) -> None:
    for row in plan.rows:
        _log.info("pruned {image}, last pulled {pulled}", image=row.url, pulled=row.stored.pulled.isoformat())
    if plan.records:
        _log.warn(
            "pruned {what} freed",
            what=f"{count_text(len(plan.rows), 'image URL')} with {count_text(len(plan.blobs), 'blob')}, "
            f"{count_text(plan.bytes, 'byte')}",
            images=len(plan.rows),
            blobs=len(plan.blobs),
            bytes=plan.bytes,
        )


def _refusal(withheld: Withheld) -> str:
    return f"{withheld.unused} of {count_text(withheld.images, 'image')} would be removed, {withheld.why}"
