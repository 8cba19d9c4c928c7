"""What the kernel tells of a running process."""

from __future__ import annotations

import os
import re
from pathlib import Path


def memory(pid: int) -> int:
    """The memory that it holds now, in bytes."""
    return _figure(pid, "status", "VmRSS") * 1024


def peak_memory(pid: int) -> int:
    """The most memory that it has held at once so far, in bytes."""
    return _figure(pid, "status", "VmHWM") * 1024


def threads(pid: int) -> int:
    """How many threads it has."""
    return _figure(pid, "status", "Threads")


def written(pid: int) -> int:
    """How many bytes it has handed to write() so far: to files, not to sockets."""
    return _figure(pid, "io", "wchar")


def descriptors(pid: int) -> list[str]:
    """What its open file descriptors lead to, such as `/tmp/file` or `socket:[4711]`."""
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
    """How many seconds of processor time it has used so far."""
    # What stands before the last parenthesis is the name, which may hold anything.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def connections_to(pid: int, port: int) -> int:
    """How many IPv4 connections it has to this port."""
    own = set(descriptors(pid))
    lines = [line.split() for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]]
    return sum(line[2].endswith(f":{port:04X}") and f"socket:[{line[9]}]" in own for line in lines)
