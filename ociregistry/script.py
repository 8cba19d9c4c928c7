"""The console script `ociregistry`: the daemon in the foreground, or one of its commands, without typing twistd."""

from __future__ import annotations

import sys
from pathlib import Path

from twisted.scripts import twistd

CONFIG = Path("/etc/ociregistry/ociregistry.yaml")
"""The configuration of a daemon that is installed on this machine; where it is, commands work on what it works on."""


def main() -> None:
    """Does what `twistd --nodaemon --pidfile= ociregistry …` does, with `CONFIG` unless another file is given."""
    config = ["--config-path", str(CONFIG)] if CONFIG.exists() else []
    sys.argv[1:1] = ["--nodaemon", "--pidfile=", "ociregistry", *config]
    twistd.run()
