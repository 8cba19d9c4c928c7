"""Debian 12 and 13, booted, with the package installed and an upstream with a private authority."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deb.installation import UPSTREAM, Installation
from tests.deb.machine import Machine
from tests.processes import ROOT

SUITES = ("bookworm", "trixie")
BUILD = ROOT / "build"


@pytest.fixture(scope="session")
def package() -> Path:
    """The package built by `make deb`."""
    (built,) = BUILD.glob("ociregistry_*_all.deb")
    return built


@pytest.fixture(scope="session", params=SUITES)
def machine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """A running Debian."""
    folder = tmp_path_factory.mktemp(request.param)
    with Machine(BUILD / f"{request.param}.tar", folder / request.param) as machine:
        yield machine


@pytest.fixture(scope="session")
def installation(machine: Machine, package: Path, tmp_path_factory: pytest.TempPathFactory) -> Installation:
    """The machine with an upstream beside it, and the package, fresh from its installation."""
    installation = Installation(machine, package, tmp_path_factory.mktemp(UPSTREAM))
    installation.set_up()
    return installation
