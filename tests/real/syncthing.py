"""Two stores that Syncthing replicates: one on each of two machines, which know each other's address and no more."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.request import Request, urlopen
from xml.etree import ElementTree

from tests.processes import Server, wait_until
from tests.real.two_machines import Machine, Pair, machines, pair_on

_PORT = 22000
_GUI = "127.0.0.1:8384"
_KEY = "only-within-the-namespace"
_PATIENCE = 60

IGNORED = "/pulls\n"
"""The content of .stignore that docs/several-machines.md asks for."""
ORDER = "alphabetic"
"""The order that it asks for: blobs/ before fat/ and img/."""

# Neither announcements, nor relays, nor upgrades, nor reports: it talks to the other machine alone.
_OPTIONS = {
    "listenAddress": f"tcp://0.0.0.0:{_PORT}",
    "globalAnnounceEnabled": "false",
    "localAnnounceEnabled": "false",
    "relaysEnabled": "false",
    "natEnabled": "false",
    "stunServer": "",
    "urAccepted": "-1",
    "crashReportingEnabled": "false",
    "autoUpgradeIntervalH": "0",
    "startBrowser": "false",
    "reconnectionIntervalS": "5",
}
_FOLDER = {"type": "sendreceive", "rescanIntervalS": "60", "fsWatcherEnabled": "true", "fsWatcherDelayS": "1"}


class Syncthing(Server):
    """Syncthing of one machine, with its configuration in `home`."""

    def __init__(self, machine: Machine, images: Path) -> None:
        self._machine = machine
        self.images = images
        self._home = machine.folder / "syncthing"
        generate = ["syncthing", "generate", f"--home={self._home}", "--no-default-folder", "--skip-port-probing"]
        machine.run(*generate)
        self._config = self._home / "config.xml"
        self.device = ElementTree.parse(self._config).find("device").get("id")  # type: ignore[union-attr]  # it has one
        serve = ["syncthing", "serve", f"--home={self._home}", "--no-browser", "--no-restart", "--no-upgrade"]
        # It believes that its monitor started it: there is one process, which ends when it is killed.
        environment = {"HOME": str(machine.folder), "STNOUPGRADE": "1", "STMONITORED": "yes"}
        super().__init__(machine.inside(serve), machine.folder / "syncthing.log", environment)

    def configure(self, all_of_them: Sequence[Syncthing]) -> None:
        """Write the configuration: one folder, shared with the others."""
        tree = ElementTree.parse(self._config)
        root = tree.getroot()
        for device in root.findall("device"):
            root.remove(device)
        attributes = {"id": "store", "path": str(self.images), **_FOLDER}
        folder = ElementTree.SubElement(root, "folder", attributes)
        for one in all_of_them:
            device = ElementTree.SubElement(root, "device", id=str(one.device), name=str(one.device))
            ElementTree.SubElement(device, "address").text = f"tcp://{one._machine.address}:{_PORT}"
            ElementTree.SubElement(folder, "device", id=str(one.device))
        options, gui = root.find("options"), root.find("gui")
        assert options is not None
        assert gui is not None
        for name, value in _OPTIONS.items():
            for entry in options.findall(name):
                entry.text = value
        for name, value in {"address": _GUI, "apikey": _KEY}.items():
            for entry in gui.findall(name):
                entry.text = value
        tree.write(self._config)
        self.images.mkdir()
        (self.images / ".stignore").write_text(IGNORED)

    def get(self, path: str) -> str:
        """Return what its REST interface answers."""
        request = Request(f"http://{_GUI}/rest/{path}", headers={"X-API-Key": _KEY})

        def ask() -> str:
            with urlopen(request, timeout=5) as answer:
                return str(answer.read().decode())

        return self._machine.namespace.call(ask)

    @property
    def idle(self) -> bool:
        """Whether it has found no difference that is left."""
        status = json.loads(self.get("db/status?folder=store"))
        return bool(status["state"] == "idle" and status["needTotalItems"] == 0)

    def ready(self) -> bool:
        """Whether it answers."""
        try:
            return "pong" in self.get("system/ping")
        except OSError:
            return False


@contextmanager
def syncthing_pair(folder: Path) -> Iterator[Pair]:
    """Run two daemons on stores that Syncthing replicates until the block ends."""
    with machines(folder, {}) as (network, *both), ExitStack() as stack:
        peers = [Syncthing(machine, machine.folder / "images") for machine in both]
        for peer in peers:
            peer.configure(peers)
        for peer in peers:
            stack.enter_context(peer)
        for peer in peers:
            wait_until(
                lambda peer=peer: '"connected": true' in peer.get("system/connections"),  # type: ignore[misc]  # mypy infers no type for a default
                _PATIENCE,
                "they are connected",
            )
        one, two = ((machine, peer.images) for machine, peer in zip(both, peers, strict=True))
        with pair_on(network, one, two, lambda: all(peer.idle for peer in peers)) as pair:
            yield pair
