"""What a run that is killed leaves, and what the next one removes."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.kubernetes.cluster import Cluster
from tests.kubernetes.marks import hierarchies, make_groups, own_name, remove_leftovers
from tests.processes import ROOT, wait_until

_PATIENCE = 300
_RUN = """
import sys
from pathlib import Path
from tests.kubernetes.cluster import Cluster
with Cluster(sys.argv[1], Path(sys.argv[2])) as cluster:
    print(cluster.layout.group, flush=True)
    sys.stdin.read()
"""


def _processes(group: str) -> list[int]:
    files = (file for hierarchy in hierarchies() for file in (hierarchy / group).rglob("cgroup.procs"))
    return [int(pid) for file in files for pid in file.read_text().split()]


def test_killed_run_ends_with_its_processes_and_the_next_removes_its_files(cluster: Cluster, tmp_path: Path) -> None:
    """A second cluster beside the first, which stays as it is."""
    argv = [sys.executable, "-c", _RUN, cluster.programs, str(tmp_path)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, text=True) as killed:
        assert killed.stdout is not None
        group = killed.stdout.readline().strip()
        folder = Path(tempfile.gettempdir(), group)
        try:
            assert folder.is_dir(), group
            assert _processes(group)
        finally:
            killed.kill()
    # The kernel ends the node; nobody has to know its processes.
    wait_until(lambda: not _processes(group), _PATIENCE, "the node ends with the run")
    remove_leftovers(folder.parent)
    assert not folder.exists()
    assert not [hierarchy / group for hierarchy in hierarchies() if (hierarchy / group).exists()]
    assert cluster.layout.folder.is_dir()
    assert _processes(cluster.layout.group)


def test_process_that_is_left_in_a_group_is_ended(tmp_path: Path) -> None:
    name = f"{own_name().rpartition('-')[0]}-0"
    groups = make_groups(name)
    (tmp_path / name).mkdir()
    with subprocess.Popen(["sleep", "infinity"]) as left:
        try:
            for group in groups:
                (group / "cgroup.procs").write_text(str(left.pid))
            remove_leftovers(tmp_path)
            assert left.wait(_PATIENCE) < 0
        finally:
            left.kill()
    assert not list(tmp_path.iterdir())
    assert not [group for group in groups if group.exists()]


def test_name_that_is_taken_is_refused(cluster: Cluster) -> None:
    with pytest.raises(FileExistsError):
        make_groups(cluster.layout.group)


def test_groups_of_others_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "ociregistry-kubernetes").mkdir()
    (tmp_path / own_name()).mkdir()
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"ociregistry-kubernetes", own_name()}
