"""What the kernel reports of a running process."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path


def memory(pid: int) -> int:
    """Return its current memory, in bytes."""
    return _figure(pid, "status", "VmRSS") * 1024


def peak_memory(pid: int) -> int:
    """Return its peak memory so far, in bytes."""
    return _figure(pid, "status", "VmHWM") * 1024


def threads(pid: int) -> int:
    """Return its number of threads."""
    return _figure(pid, "status", "Threads")


def written(pid: int) -> int:
    """Return how many bytes it has passed to write() so far: to files, not to sockets."""
    return _figure(pid, "io", "wchar")


def descriptors(pid: int) -> list[str]:
    """Return the targets of its file descriptors, such as `/tmp/file` or `socket:[4711]`."""
    found = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            found.append(os.readlink(entry))
        except FileNotFoundError:  # closed meanwhile
            continue
    return sorted(found)


def _figure(pid: int, file: str, name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+)", Path(f"/proc/{pid}/{file}").read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"process {pid} has ended")
    return int(found[1])


def processor_time(pid: int) -> float:
    """Return its processor time so far, in seconds."""
    # The name precedes the last parenthesis, and may contain anything.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def connections_to(pid: int, port: int) -> int:
    """Count its IPv4 connections to this port."""
    own = set(descriptors(pid))
    lines = [line.split() for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]]
    return sum(line[2].endswith(f":{port:04X}") and f"socket:[{line[9]}]" in own for line in lines)


def family(pid: int) -> list[int]:
    """Return this process and all its descendants that run now."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(FileNotFoundError, ProcessLookupError):  # ended meanwhile
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            parents.setdefault(parent, []).append(int(entry.name))
    found = [pid]
    for one in found:
        found += parents.get(one, [])
    return found
