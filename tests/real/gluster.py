"""A replicated volume of GlusterFS: a brick on each of two machines, each of which mounts the volume by FUSE."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tests.processes import wait_until
from tests.real.two_machines import Machine, Pair, machines, pair_on

_VOLUME = "store"
_PATIENCE = 90
# What glusterd writes is in the folder of the machine; it looks for nothing else of the real one.
_MOUNTS = """
mkdir {0}/state {0}/log
mount --bind {0}/state /var/lib/glusterd
mount --bind {0}/log /var/log/glusterfs
mount -t tmpfs tmpfs /run
mkdir /run/gluster
"""

OPTIONS: Mapping[str, str] = {
    "features.cache-invalidation": "on",
    "performance.cache-invalidation": "on",
    "cluster.favorite-child-policy": "mtime",
    "cluster.heal-timeout": "30",
    "network.ping-timeout": "5",
}
"""The options of the volume that docs/several-machines.md asks for."""
MOUNT_OPTIONS = "attribute-timeout=0,entry-timeout=0"
"""The options of the mounts that it asks for."""


@contextmanager
def gluster_pair(
    folder: Path, options: Mapping[str, str] = OPTIONS, mount_options: str = MOUNT_OPTIONS
) -> Iterator[Pair]:
    """Run two daemons on one volume until the block ends."""
    names = ("one", "two")
    with machines(folder, {name: _MOUNTS.format(folder / name) for name in names}) as (network, *both):
        _make_volume(both, options)
        for machine in both:
            (machine.folder / "mount").mkdir()
            mount = ["mount", "-t", "glusterfs", "-o", mount_options, f"{machine.address}:/{_VOLUME}"]
            machine.run(*mount, str(machine.folder / "mount"))
        one, two = ((machine, machine.folder / "mount" / "images") for machine in both)
        with pair_on(network, one, two, lambda: _healed(both[0])) as pair:
            yield pair


def _make_volume(both: list[Machine], options: Mapping[str, str]) -> None:
    one, two = both
    for machine in both:
        (machine.folder / "brick").mkdir()
        machine.run("glusterd")
    for machine in both:
        wait_until(lambda machine=machine: "Number of Peers: 0" in _peers(machine), _PATIENCE, "glusterd answers")  # type: ignore[misc]  # mypy infers no type for a default
    one.run("gluster", "peer", "probe", two.address)
    for machine in both:
        wait_until(lambda machine=machine: "(Connected)" in _peers(machine), _PATIENCE, "they know each other")  # type: ignore[misc]  # mypy infers no type for a default
    bricks = [f"{machine.address}:{machine.folder}/brick" for machine in both]
    for words in (
        ("create", _VOLUME, "replica", "2", *bricks, "force"),
        *(("set", _VOLUME, key, value) for key, value in options.items()),
        ("start", _VOLUME),
    ):
        one.run("gluster", "--mode=script", "volume", *words, timeout=_PATIENCE)


def _healed(machine: Machine) -> bool:
    """Whether both bricks are there, and hold the same."""
    return machine.run("gluster", "volume", "heal", _VOLUME, "info").count("Number of entries: 0\n") == 2


def _peers(machine: Machine) -> str:
    return machine.run("gluster", "peer", "status")
