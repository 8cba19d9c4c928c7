"""Names that say which process made a folder or a control group: a later run removes what a killed one left."""

from __future__ import annotations

import os
import re
import shutil
import signal
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

from tests.processes import wait_until

_PREFIX = "ociregistry-kubernetes"
_NAME = re.compile(rf"{_PREFIX}-(\d+)-(\d+)")
_PATIENCE = 60


def own_name() -> str:
    """Return a name with the id and the start of this process."""
    return f"{_PREFIX}-{os.getpid()}-{_started(os.getpid())}"


def remove_leftovers(temporary: Path) -> None:
    """Remove what runs that have ended left: control groups, the processes in them, folders in `temporary`."""
    places = (temporary, *hierarchies())
    names = [name for place in places for path in place.iterdir() if (name := _NAME.fullmatch(path.name))]
    for name in names:
        if _started(int(name[1])) != name[2]:
            remove_groups(name[0])
            shutil.rmtree(temporary / name[0], ignore_errors=True)


def hierarchies() -> list[Path]:
    """Return the folders of control groups, of both versions: the kubelet makes groups in all of them."""
    lines = (line.split() for line in Path("/proc/self/mounts").read_text().splitlines())
    return [Path(folder) for _, folder, kind, *_ in lines if kind in ("cgroup", "cgroup2")]


def make_groups(name: str) -> list[Path]:
    """Make a control group, with one inside for the daemons, in each hierarchy of version 1, else in that of 2.

    Returns:
        those for the daemons.

    Raises:
        FileExistsError: the name is taken.
    """
    made = []
    first = [hierarchy for hierarchy in hierarchies() if not (hierarchy / "cgroup.controllers").exists()]
    for hierarchy in first or hierarchies():
        if (controllers := hierarchy / "cgroup.subtree_control").exists():
            _delegate(controllers)
        group = hierarchy / name
        group.mkdir()
        if (group / "cgroup.subtree_control").exists():
            _delegate(group / "cgroup.subtree_control")
        inner = group / "daemons"
        inner.mkdir()
        # Version 1 begins with none.
        for file in ("cpuset.cpus", "cpuset.mems"):
            for one in (group, inner):
                if (one / file).exists() and hierarchy.name.startswith("cpuset"):
                    (one / file).write_text((hierarchy / file).read_text())
        made.append(inner)
    return made


def remove_groups(name: str) -> None:
    """End the processes in the control groups of this name, and remove the groups."""
    for hierarchy in hierarchies():
        top = hierarchy / name
        wait_until(partial(_are_empty, top), _PATIENCE, f"no process in {top}")
        for folder, _, _ in os.walk(top, topdown=False):
            os.rmdir(folder)


def _are_empty(top: Path) -> bool:
    """Kill the processes in these control groups; tell whether there were none."""
    return not list(_kill_all(top))


def _kill_all(top: Path) -> Iterator[int]:
    """Kill each process in these control groups; yield their ids."""
    for file in top.rglob("cgroup.procs"):
        for pid in map(int, file.read_text().split()):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            yield pid


def _delegate(controllers: Path) -> None:
    """Give the groups below all controllers that there are."""
    available = controllers.with_name("cgroup.controllers").read_text().split()
    controllers.write_text(" ".join(f"+{name}" for name in available))


def _started(pid: int) -> str:
    """Return when a process started, in ticks since boot; empty where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except FileNotFoundError:
        return ""
