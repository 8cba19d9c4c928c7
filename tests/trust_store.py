"""The operating system's trust store with a test's authority in it, for one daemon alone. Requires root."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.peers import missing_package
from tests.processes import Daemon

# As an operator would, but in a mount namespace. The machine's hooks are skipped: they update Java's store and
# others.
_SCRIPT = """
mount --bind "$1/certificates" /usr/local/share/ca-certificates
mount -t tmpfs tmpfs /etc/ssl/certs
update-ca-certificates --fresh --hooksdir "$1/hooks"
shift
exec "$@"
"""


class TrustingDaemon(Daemon):
    """Our daemon on a machine whose administrator added these certificates to the trust store."""

    def __init__(self, folder: Path, trusted: tuple[Path, ...], *arguments: Any, **keywords: Any) -> None:
        if missing := [
            package
            for program in ("unshare", "mount", "update-ca-certificates")
            if (package := missing_package(program))
        ]:
            pytest.fail(f"a peer is missing: apt-get install {' '.join(missing)}", pytrace=False)
        if os.geteuid() != 0:
            pytest.fail("mount namespaces need root", pytrace=False)
        super().__init__(folder, *arguments, **keywords)
        store = folder / f"trust-store-{self.port}"
        for name in ("certificates", "hooks"):
            (store / name).mkdir(parents=True)
        for certificate in trusted:
            shutil.copy(certificate, store / "certificates")
        unshared = ["unshare", "--mount", "--propagation", "private"]
        self.argv = [*unshared, "sh", "-euc", _SCRIPT, "sh", str(store), *self.argv]
