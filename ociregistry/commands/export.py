"""`export`: writes images of the store into an archive."""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path

from twisted.python import usage

from ociregistry.archives.exporting import Exported, export_images
from ociregistry.archives.members import ArchiveFailure
from ociregistry.commands.options import Command, CommandFailed, check_store, print_lines, print_unreadable
from ociregistry.commands.progress import bar, on_terminal
from ociregistry.commands.running import handled_signals
from ociregistry.config.values import Patterns, count_text, size_text
from ociregistry.process import print_error
from ociregistry.settings import Settings
from ociregistry.store.snapshot import Row, Snapshot


class Export(Command):
    """The options of `export`."""

    examples = (
        "export --pattern cert-manager,pause: -o images-1.tar",
        "export --pattern . -o images-2.tar --since images-1.tar",
    )
    longdesc = (
        "Writes images into an OCI layout archive, which load, skopeo and containerd can read. With --since the "
        "archive omits the blobs of an earlier export, which has to be loaded first."
    )
    optParameters = [
        [
            "pattern",
            None,
            None,
            "Images whose URL contains a match of one of these regular expressions (separated by commas).",
        ],
        ["output", "o", None, "The archive to write, such as images.tar."],
        ["since", None, None, "Earlier export, whose blobs are omitted."],
        ["compress", None, None, "Compress the archive: zstd."],
    ]
    optFlags = [["force", "f", "Replace the archive if it exists."]]

    def postOptions(self) -> None:
        """Parse the values of the options.

        Raises:
            usage.UsageError: a value is invalid or missing, or -o is no file, or the same as --since.
        """
        patterns = self.value("pattern", Patterns.parse)
        if patterns is None or not self["output"]:
            raise usage.UsageError("export needs --pattern EXPR and -o FILE")
        if self["output"] == "-":
            raise usage.UsageError(
                "-o -: a file is expected, since an archive appears when it is whole, or not at all"
            )
        self.patterns = patterns
        self.target = Path(self["output"]).absolute()
        self.since = Path(self["since"]).absolute() if self["since"] else None
        if self["compress"] not in (None, "zstd"):
            raise usage.UsageError(f"--compress {self['compress']!r}: zstd is expected")
        if self.since is not None and self.since.resolve() == self.target.resolve():
            raise usage.UsageError("-o and --since are the same file: the earlier export would be lost")

    def run(self, settings: Settings) -> int:
        """Export the images; the exit status is 1 if some were left out.

        Raises:
            CommandFailed: no image matches, the earlier export is invalid, or the archive cannot be written, or
                exists and is not to be replaced.
            OSError: the store cannot be used.
        """
        check_store(settings.image_path)
        self._check_target()
        # All of them raise KeyboardInterrupt, on which the unfinished archive is removed.
        for number in handled_signals():
            signal.signal(number, signal.default_int_handler)
        snapshot = Snapshot.read(settings.image_path)
        print_unreadable(snapshot.unreadable)
        rows = [row for row in snapshot.rows if self.patterns.match(row.url)]
        if not rows:
            raise CommandFailed(
                f"{settings.image_path}: has no image whose URL matches --pattern {self['pattern']!r}"
            )
        try:
            exported = self._export(snapshot, rows)
        except ArchiveFailure as error:
            raise CommandFailed(str(error)) from None
        for left_out in exported.left_out:
            print_error(str(left_out))
        for note in exported.notes:
            print_error(f"warning: {note}")
        print_lines([_summary(exported, self.target)])
        return 1 if exported.left_out else 0

    def _check_target(self) -> None:
        if not os.path.lexists(self.target):
            return
        if self.target.is_symlink() or not self.target.is_file():
            raise CommandFailed(f"{self.target}: exists, and is no regular file: name another one")
        if not self["force"]:
            raise CommandFailed(f"{self.target}: exists: name another file, or replace it with --force")

    def _export(self, snapshot: Snapshot, rows: list[Row]) -> Exported:
        export = partial(export_images, snapshot, rows, self.target, since=self.since, zstd=bool(self["compress"]))
        if not on_terminal():
            return export()
        with bar("exporting") as shown:
            return export(advance=shown.update)


def _summary(exported: Exported, target: Path) -> str:
    if not exported.images:
        return "nothing was exported"
    had = f"; {_blobs(exported.had, exported.had_bytes)} in the earlier one" if exported.had else ""
    return (
        f"{count_text(exported.images, 'image')} exported to {target}, {_blobs(exported.blobs, exported.bytes)} "
        f"({size_text(exported.bytes)}){had}"
    )


def _blobs(number: int, size: int) -> str:
    return f"{count_text(number, 'blob')} with {count_text(size, 'byte')}"
