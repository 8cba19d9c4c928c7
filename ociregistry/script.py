"""The console script `ociregistry`: the daemon in the foreground, or one of its commands, without typing twistd."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from twisted.scripts import twistd

CONFIG = Path("/etc/ociregistry/ociregistry.yaml")
"""The configuration of a daemon that is installed on this machine; where it is, commands work on what it works on."""


def main() -> None:
    """Does what `twistd --nodaemon --pidfile= ociregistry …` does, with `CONFIG` unless another file is given."""
    # It may hold passwords: whoever may not read it works on a store of its own.
    config = ["--config-path", str(CONFIG)] if os.access(CONFIG, os.R_OK) else []
    sys.argv[1:1] = ["--nodaemon", "--pidfile=", "ociregistry", *config]
    twistd.run()
