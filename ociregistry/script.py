"""The console script `ociregistry`: the daemon in the foreground, or one of its commands, without typing twistd."""

from __future__ import annotations

import sys

from twisted.scripts import twistd


def main() -> None:
    """Does what `twistd --nodaemon --pidfile= ociregistry …` does."""
    sys.argv[1:1] = ["--nodaemon", "--pidfile=", "ociregistry"]
    twistd.run()
