"""`prune`: removes images, and files that no image needs, from the store."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path

from twisted.python import usage

from ociregistry.commands.options import Command, check_store, print_lines, print_unreadable
from ociregistry.commands.running import become_owner
from ociregistry.config.values import Patterns, count_text, parse_duration, parse_local_time, size_text
from ociregistry.settings import Settings
from ociregistry.store.files import Files
from ociregistry.store.orphans import find_orphans, remove_orphans
from ociregistry.store.prune import Choose, Criteria, Plan, PruneSet, choose_nothing, planned, prune
from ociregistry.store.scan import collection_paused
from ociregistry.store.snapshot import Snapshot

_USUAL_AGE = timedelta(days=1)


class Prune(Command):
    """The options of `prune`."""

    examples = ("prune --unused-for 30d --dry-run", "prune --pattern curl,cilium")
    longdesc = (
        "Removes images from the store, with the blobs that no other image needs. With several conditions, "
        "an image has to meet all of them."
    )
    optParameters = [
        [
            "pattern",
            None,
            None,
            "Images whose URL contains a match of one of these regular expressions (separated by commas).",
        ],
        ["before", None, None, "Images stored before this local time, YYYY-MM-DDTHH:MM:SS."],
        ["unused-for", None, None, "Images not pulled for this duration, such as 30d or 12h."],
        ["older-than", None, None, "Minimum age of the files that --orphans removes [1d]."],
    ]
    optFlags = [
        ["orphans", None, "Remove blobs that no image needs, and abandoned partial downloads."],
        ["dry-run", None, "Print what would be removed, and change nothing."],
    ]

    def postOptions(self) -> None:
        """Parse the values of the options.

        Raises:
            usage.UsageError: a value is invalid, or nothing is selected.
        """
        self.patterns = self.value("pattern", Patterns.parse)
        self.before = self.value("before", parse_local_time)
        self.unused_for = self.value("unused-for", parse_duration)
        age = self.value("older-than", parse_duration)
        if age is not None and not self["orphans"]:
            raise usage.UsageError("--older-than goes with --orphans")
        self.age = age or _USUAL_AGE
        self.selects = not (self.patterns is None and self.before is None and self.unused_for is None)
        if not self.selects and not self["orphans"]:
            raise usage.UsageError("prune needs --pattern, --before, --unused-for or --orphans")

    def run(self, settings: Settings) -> int:
        """Prune the selected images, then the orphans; with --dry-run only print them.

        Raises:
            CommandFailed: this process cannot become the owner of the store.
            OSError: the store cannot be used.
        """
        root, now = settings.image_path, datetime.now(UTC)
        check_store(root)
        if not self["dry-run"]:
            become_owner(root)
        would = bool(self["dry-run"])
        with collection_paused(for_good=True):
            # Also before orphans are removed: what a killed prune left needs its blobs until it is finished.
            plan = self._prune(root, now)
            if self.selects or plan.records or plan.rows:
                print_lines(_of_images(plan, would=would))
            if self["orphans"]:
                print_lines(_of_orphans(self._orphans(root, now - self.age), root, would=would))
        return 0

    def _prune(self, root: Path, now: datetime) -> Plan:
        selection: Choose = choose_nothing
        if self.selects:
            selection = Criteria(
                matches=self.patterns.match if self.patterns else None,
                created_before=self.before,
                pulled_before=now - self.unused_for if self.unused_for else None,
            )

        def choose(snapshot: Snapshot) -> PruneSet:
            print_unreadable(snapshot.unreadable)
            return selection(snapshot)

        if self["dry-run"]:
            return planned(root, choose)
        return prune(root, choose, Files())

    def _orphans(self, root: Path, unchanged_since: datetime) -> Mapping[Path, int]:
        if self["dry-run"]:
            return find_orphans(root, unchanged_since)
        return remove_orphans(root, unchanged_since, Files())


def _of_images(plan: Plan, *, would: bool) -> Iterator[str]:
    counted = set()
    for row in plan.rows:
        digest = row.stored.manifest.digest
        free = plan.bytes_of.get(digest, 0) if digest not in counted else 0
        counted.add(digest)
        kind = "list" if row.stored.manifest.is_list else "image"
        yield f"{'would prune' if would else 'pruned'} {row.url} {kind} {count_text(free, 'byte')} of blobs"
    yield (
        f"{count_text(len(plan.rows), 'image URL')}, {count_text(len(plan.records), 'record')} and "
        f"{count_text(len(plan.blobs), 'blob')} "
        f"{'would be removed' if would else 'removed'}, {count_text(plan.bytes, 'byte')} ({size_text(plan.bytes)}) "
        f"{'would become free' if would else 'are free again'}"
    )


def _of_orphans(found: Mapping[Path, int], root: Path, *, would: bool) -> Iterator[str]:
    for path, size in found.items():
        yield f"{'would reclaim' if would else 'reclaimed'} {path.relative_to(root)} {count_text(size, 'byte')}"
    size = sum(found.values())
    yield (
        f"{count_text(len(found), 'orphan')} {'would be removed' if would else 'removed'}, "
        f"{count_text(size, 'byte')} ({size_text(size)}) {'would become free' if would else 'are free again'}"
    )
