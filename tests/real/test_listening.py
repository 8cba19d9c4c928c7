"""`--port` listens by IPv6 and IPv4, whatever the system's default, and by IPv4 alone where there is no IPv6."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import pytest

from tests.client import fetch
from tests.namespaces import Namespace, NamespacedDaemon
from tests.processes import ROOT, Daemon

CLIENT = re.compile(r"GET /v2/ ns=- 200 .* (\S+):\d+ -$", re.MULTILINE)
SYSTEMS: dict[str, Mapping[str, str]] = {
    "usual": {"bindv6only": "0"},
    "bindv6only": {"bindv6only": "1"},
    "disable_ipv6": {"conf/all/disable_ipv6": "1", "conf/lo/disable_ipv6": "1"},
}
# As a kernel that was booted with ipv6.disable=1.
WITHOUT_IPV6 = """
import socket
class Without(socket.socket):
    def __init__(self, family=-1, *arguments, **keywords):
        if family == socket.AF_INET6:
            raise OSError(97, "Address family not supported by protocol")
        super().__init__(family, *arguments, **keywords)
socket.socket = Without
"""


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    """A network of its own."""
    with Namespace("listen") as namespace:
        yield namespace


def clients(daemon: Daemon) -> list[str]:
    """Return the addresses of the clients in the log."""
    return CLIENT.findall(daemon.log)


@pytest.mark.parametrize("system", SYSTEMS)
def test_port_is_for_both_protocols(namespace: Namespace, tmp_path: Path, system: str) -> None:
    def configure() -> None:
        for name, value in SYSTEMS[system].items():
            Path("/proc/sys/net/ipv6", name).write_text(value)

    namespace.call(configure)
    with NamespacedDaemon(namespace, tmp_path) as daemon:
        assert namespace.call(lambda: fetch(f"{daemon.url}/v2/")).status == 200
        assert clients(daemon) == ["127.0.0.1"]
        by_ipv6 = f"http://[::1]:{daemon.port}/v2/"
        if system == "disable_ipv6":
            with pytest.raises(OSError, match="Errno"):
                namespace.call(lambda: fetch(by_ipv6))
        else:
            assert namespace.call(lambda: fetch(by_ipv6)).status == 200
            assert clients(daemon) == ["127.0.0.1", "[::1]"]
        assert "::ffff:" not in daemon.log
        assert f"listening on [::]:{daemon.port}," in daemon.log


def test_system_without_ipv6(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(WITHOUT_IPV6)
    with Daemon(tmp_path, environment={"PYTHONPATH": f"{ROOT}:{tmp_path}"}) as daemon:
        assert fetch(f"{daemon.url}/v2/").status == 200
        assert f"listening on 0.0.0.0:{daemon.port}," in daemon.log
        with pytest.raises(ConnectionRefusedError):
            fetch(f"http://[::1]:{daemon.port}/v2/")


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "::"])
def test_port_in_use_is_an_error(tmp_path: Path, host: str) -> None:
    """Also when the other program uses one of the protocols alone."""
    with socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as taken:
        daemon = Daemon(tmp_path, port=taken.getsockname()[1])
        with suppress(RuntimeError), daemon:
            pass
        assert not daemon.running
        assert f"cannot listen on port {daemon.port}: Address already in use" in daemon.log


def test_listen_takes_twisteds_endpoints_as_before(tmp_path: Path) -> None:
    daemon = Daemon(tmp_path)
    daemon.argv += ["--listen", f"tcp:{daemon.port}:interface=127.0.0.1"]
    with daemon:
        assert f"listening on 127.0.0.1:{daemon.port}," in daemon.log
        with pytest.raises(ConnectionRefusedError):
            fetch(f"http://[::1]:{daemon.port}/v2/")
