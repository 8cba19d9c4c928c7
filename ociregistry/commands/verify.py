"""`verify`: everything in the store is hashed again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from typing import Any

from ociregistry.commands.options import Command, complain, print_lines
from ociregistry.commands.owner import become_owner
from ociregistry.commands.progress import bar, on_terminal
from ociregistry.commands.running import run_to_end
from ociregistry.commands.supplying import opened_store, supplier_for
from ociregistry.config.quantities import size_text
from ociregistry.pullthrough.repairing import Repairer
from ociregistry.settings import Settings
from ociregistry.store.verifying import Damaged, Findings

Came = Callable[[int, int], object]


class Verify(Command):
    """The options of `verify`."""

    longdesc = (
        "Hashes every blob and record in the store again. What is damaged is put aside, and never served again."
    )
    optFlags = [["repair", None, "Fetch anew what is damaged."]]

    def run(self, settings: Settings) -> int:
        """As `Command.run`."""
        settings.image_path.stat()
        become_owner(settings.image_path)
        findings = run_to_end(lambda reactor: self._verify(settings, reactor), settings.log_level)
        return 1 if findings.damaged else 0

    async def _verify(self, settings: Settings, reactor: Any) -> Findings:
        async with opened_store(settings, reactor, adopts=False) as store, AsyncExitStack() as opened:
            repairer = None
            if self["repair"]:
                supplier = await opened.enter_async_context(supplier_for(store, settings, reactor))
                repairer = Repairer(store, supplier)
            with _progress() as came:
                findings = await store.verify(None, came, lambda damaged: _tell(damaged, repairer))
        print_lines(_report(findings))
        for path, why in findings.foreign.items():
            complain(f"warning: left alone, it is not a record of this program: {path}: {why}")
        return findings


async def _tell(damaged: Damaged, repairer: Repairer | None) -> None:
    """Says what is damaged, and makes it good, as soon as it is found: nothing is forgotten by who interrupts it."""
    print_lines([f"damaged: {damaged.path}: {damaged.why}"])
    if not damaged.kept:
        print_lines([f"removed, as there is no space to put it aside: {damaged.path}"])
    if repairer is not None:
        why = await repairer.repair(damaged)
        print_lines([f"not repaired: {damaged.path}: {why}" if why else f"repaired: {damaged.path}"])


@contextmanager
def _progress() -> Iterator[Came]:
    if not on_terminal():
        yield lambda done, total: None
        return
    with bar("verifying") as shown:

        def came(done: int, total: int) -> None:
            shown.total = total
            shown.update(done - shown.n)

        yield came


def _report(findings: Findings) -> Iterator[str]:
    if findings.missing:
        missing = sum(findings.missing.values())
        yield f"{len(findings.missing)} images are not complete: {missing} bytes are missing"
    yield (
        f"{findings.records} records and {findings.blobs} blobs with {findings.bytes} bytes "
        f"({size_text(findings.bytes)}) verified, {len(findings.damaged)} damaged"
    )
