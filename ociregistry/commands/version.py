"""`version`: prints the version."""

from __future__ import annotations

from ociregistry import __version__
from ociregistry.commands.options import Command, print_lines
from ociregistry.settings import Settings


class Version(Command):
    """The options of `version`."""

    examples = ("version", "--version")
    longdesc = "Prints the version."

    def run(self, settings: Settings) -> int:
        """Print the version."""
        print_lines([f"ociregistry {__version__}"])
        return 0
