"""The process itself: the memory that it keeps."""

from __future__ import annotations

import subprocess
import sys

import pytest

FAULTS = """
import resource
import ociregistry.process

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def use():
    pieces = [b"x" * 2**20 for _ in range(4)]

{keep}
use()
before = faults()
for _ in range(10):
    use()
print(faults() - before)
"""


@pytest.mark.parametrize("keep", ["", "ociregistry.process.keep_freed_memory()"], ids=["as usual", "kept"])
def test_memory_of_pieces_is_kept(keep: str) -> None:
    """The kernel fills pages with zeros only once; usually it does so for each of the 256 pages of a MiB."""
    said = subprocess.run(
        [sys.executable, "-c", FAULTS.format(keep=keep)], capture_output=True, text=True, check=True
    )
    faults = int(said.stdout)
    assert faults < 1000 if keep else faults > 5000
