"""The same commit gives the same image, in another folder and at another time."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.image.conftest import BUILT
from tests.image.layout import Layout
from tests.processes import ROOT, run

pytestmark = pytest.mark.long


def test_twice_the_same(layout: Layout, bill: Path, tmp_path: Path) -> None:
    """Also if files are changed since the commit: they are copied, and links as links."""
    checkout = tmp_path / "another-folder" / "checkout"
    run(["git", "clone", "--quiet", "--no-hardlinks", str(ROOT), str(checkout)])
    for name in run(["git", "-C", str(ROOT), "ls-files", "-z"]).stdout.rstrip("\0").split("\0"):
        (checkout / name).unlink(missing_ok=True)
        shutil.copy(ROOT / name, checkout / name, follow_symlinks=False)
    run(["make", "-C", str(checkout), "image"], timeout=1200)
    again = checkout / "build"
    assert Layout(again / f"{BUILT.name}.oci.tar").digest == layout.digest
    assert (again / f"{BUILT.name}.oci.tar").read_bytes() == layout.path.read_bytes()
    assert (again / bill.name).read_bytes() == bill.read_bytes()
    shutil.rmtree(checkout)
