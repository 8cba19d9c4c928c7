"""Compile the modules and list the plugins, reproducibly: run by the Python of the image, inside its root.

What Debian's maintainer scripts made of both depends on the time and on the order of files in folders.
"""

from __future__ import annotations

import compileall
import pickle
import sys
from pathlib import Path
from py_compile import PycInvalidationMode

from twisted.plugin import getCache

from twisted import plugins

MODULES = (f"/usr/lib/python{sys.version_info.major}.{sys.version_info.minor}", "/usr/lib/python3/dist-packages")


def main() -> None:
    """Write the compiled modules, which are not compared with their sources, and Twisted's list of plugins.

    Raises:
        SystemExit: a module of the image cannot be compiled.
    """
    for folder in MODULES:
        if not compileall.compile_dir(
            folder, quiet=1, force=True, workers=1, invalidation_mode=PycInvalidationMode.UNCHECKED_HASH
        ):
            raise SystemExit(f"{folder}: not every module can be compiled")
    for path in filter(Path.is_dir, map(Path, plugins.__path__)):
        listed = sorted(module.stem for module in path.glob("*.py"))
        cache = path / "dropin.cache"
        cache.unlink(missing_ok=True)
        found = getCache(plugins)
        cache.write_bytes(pickle.dumps({name: found[name] for name in listed if name in found}, protocol=4))


if __name__ == "__main__":
    main()
