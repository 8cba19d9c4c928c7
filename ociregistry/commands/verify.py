"""`verify`: hashes every blob and record in the store again, and repairs them if asked to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AsyncExitStack, contextmanager
from typing import Any

from ociregistry.commands.fetching import open_fetcher, opened_store
from ociregistry.commands.options import Command, check_store, print_lines, print_unreadable
from ociregistry.commands.progress import bar, on_terminal
from ociregistry.commands.running import become_owner, run_on_reactor
from ociregistry.config.values import count_text, size_text
from ociregistry.names import Digest
from ociregistry.pullthrough.maintenance import NOT_NEEDED, Repairer
from ociregistry.settings import Settings
from ociregistry.store.verify import Damaged, DamagedOutcome, Findings

Advance = Callable[[int, int], object]


class Verify(Command):
    """The options of `verify`."""

    examples = ("verify", "verify --repair")
    longdesc = "Hashes every blob and record in the store. Damaged files are quarantined, and never served again."
    optFlags = [["repair", None, "Fetch damaged and missing blobs from their upstreams."]]

    def run(self, settings: Settings) -> int:
        """Verify the store.

        Returns:
            Exit status 1 if something is damaged or missing; with --repair, if content that is needed could not be
            fetched.

        Raises:
            CommandFailed: the command was interrupted, or cannot become the owner of the store.
            OSError: the store cannot be used.
        """
        check_store(settings.image_path)
        become_owner(settings.image_path)
        return 0 if run_on_reactor(lambda reactor: self._verify(settings, reactor), settings) else 1

    async def _verify(self, settings: Settings, reactor: Any) -> bool:
        """Verify, and repair with --repair; return whether the store is intact in the end."""
        async with opened_store(settings, reactor, adopts=False) as store, AsyncExitStack() as opened:
            repairs = None
            if self["repair"]:
                fetcher = await opened.enter_async_context(open_fetcher(store, settings, reactor))
                repairs = _Repairs(Repairer(store, fetcher))
            with _progress() as advance:
                findings = await store.verify(None, advance, repairs.repair if repairs else _print_damaged)
            missing = {**findings.missing, **(findings.missing_metadata if settings.complete_metadata else {})}
            print_lines(_report(findings, missing, repairs=repairs is not None))
            print_unreadable(findings.foreign)
            if repairs is None:
                return not findings.damaged and not missing
            await repairs.complete(missing)
            return not repairs.failed


async def _print_damaged(damaged: Damaged) -> None:
    moved = f"; moved to {damaged.place.parent}" if damaged.place else ""
    print_lines([f"damaged: {damaged.path}: {damaged.why}{moved}"])
    if damaged.outcome is DamagedOutcome.REMOVED:
        print_lines([f"{damaged.outcome.value}: {damaged.path}"])


class _Repairs:
    """Repairs each damaged file as it is found, so that an interrupt loses nothing, and prints the results."""

    def __init__(self, repairer: Repairer) -> None:
        self._repairer = repairer
        self.failed = False
        """Whether some content that is needed could not be fetched."""

    async def repair(self, damaged: Damaged) -> None:
        """Fetch a damaged file again."""
        await _print_damaged(damaged)
        why = await self._repairer.repair(damaged)
        self.failed = self.failed or why not in ("", NOT_NEEDED)
        print_lines([f"not repaired: {damaged.path}: {why}" if why else f"repaired: {damaged.path}"])

    async def complete(self, images: Mapping[Digest, Mapping[Digest, int]]) -> None:
        """Fetch the blobs that images lack."""
        for image, missing in images.items():
            size = count_text(sum(missing.values()), "byte")
            lacked = f"the image {image} lacked {count_text(len(missing), 'blob')}, {size}"
            why = await self._repairer.complete(missing)
            self.failed = self.failed or why not in ("", NOT_NEEDED)
            print_lines([f"not completed: {lacked}: {why}" if why else f"completed: {lacked}"])


@contextmanager
def _progress() -> Iterator[Advance]:
    if not on_terminal():
        yield lambda done, total: None
        return
    with bar("verifying") as shown:

        def advance(done: int, total: int) -> None:
            shown.total = total
            shown.update(done - shown.n)

        yield advance


def _report(findings: Findings, missing: Mapping[Digest, Mapping[Digest, int]], *, repairs: bool) -> Iterator[str]:
    if missing:
        size = sum(sum(blobs.values()) for blobs in missing.values())
        fetched = "" if repairs else "; verify --repair fetches them"
        yield f"not complete: {count_text(len(missing), 'image')}, missing: {count_text(size, 'byte')}{fetched}"
    yield (
        f"{count_text(findings.records, 'record')} and {count_text(findings.blobs, 'blob')} "
        f"with {count_text(findings.bytes, 'byte')} "
        f"({size_text(findings.bytes)}) verified, {len(findings.damaged)} damaged"
    )
