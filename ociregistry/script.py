"""The console script `ociregistry`: runs the daemon in the foreground, or a command, through twistd."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from ociregistry.process import let_interrupts_end_the_process

CONFIG = Path("/etc/ociregistry/ociregistry.yaml")
"""Configuration of the installed daemon; commands use it too, so that they work on the daemon's store."""


def main() -> None:
    """Run `twistd --nodaemon --pidfile= ociregistry …`, with `CONFIG` unless another file is given."""
    # Before the imports that take long.
    let_interrupts_end_the_process()
    from twisted.scripts import twistd

    # The file may hold passwords and be unreadable for this user, who then uses a store of their own.
    config = ["--config-path", str(CONFIG)] if os.access(CONFIG, os.R_OK) else []
    sys.argv[1:1] = ["--nodaemon", "--pidfile=", "ociregistry", *config]
    twistd.run()
