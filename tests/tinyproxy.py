"""Debian's tinyproxy, a forward proxy, with an /etc/hosts of its own. It needs root."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.peers import missing_package
from tests.processes import Server, free_port

_REQUEST = re.compile(r"Request \(file descriptor \d+\): (\S+ \S+) HTTP/1\.[01]")
_SCRIPT = """
mount --bind "$1" /etc/hosts
shift
exec "$@"
"""


class Tinyproxy(Server):
    """A tinyproxy on 127.0.0.1 that knows the names `hosts`, as its own address, which nobody else does.

    With `login`, a user and a password, it serves nobody else. After `kill`, `start` brings it back on the same port.
    """

    def __init__(self, folder: Path, hosts: Iterable[str], login: tuple[str, str] | None = None) -> None:
        programs = ("tinyproxy", "unshare", "mount")
        if missing := [package for program in programs if (package := missing_package(program))]:
            pytest.fail(f"a peer is missing: apt-get install {' '.join(missing)}", pytrace=False)
        if os.geteuid() != 0:
            pytest.fail("mount namespaces need root", pytrace=False)
        self.port = free_port()
        self.host = f"127.0.0.1:{self.port}"
        self.url = f"http://{self.host}"
        folder.mkdir(parents=True, exist_ok=True)
        own_hosts = folder / "hosts"
        own_hosts.write_text("".join(f"127.0.0.1 {host}\n" for host in ("localhost", *hosts)))
        config = folder / "tinyproxy.conf"
        config.write_text(
            f"Port {self.port}\nListen 127.0.0.1\nTimeout 60\nMaxClients 100\nLogLevel Connect\n"
            + (f"BasicAuth {login[0]} {login[1]}\n" if login else "")
        )
        unshared = ["unshare", "--mount", "--propagation", "private", "sh", "-euc", _SCRIPT, "sh", str(own_hosts)]
        super().__init__([*unshared, "tinyproxy", "-d", "-c", str(config)], folder / "tinyproxy.log")

    def ready(self) -> bool:
        """It accepts connections."""
        try:
            socket.create_connection(("127.0.0.1", self.port), timeout=5).close()
        except OSError:
            return False
        return True

    @property
    def requests(self) -> list[str]:
        """The method and the target of each request so far, over all starts."""
        return _REQUEST.findall(self.log)
