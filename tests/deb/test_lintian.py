"""lintian, Debian's checker of packages."""

from __future__ import annotations

from tests.processes import ROOT, run


def test_lintian_finds_nothing_wrong() -> None:
    (changes,) = (ROOT / "build").glob("ociregistry_*.changes")
    run(["lintian", "--fail-on", "error,warning", "--display-info", "--pedantic", str(changes)])
