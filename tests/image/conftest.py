"""The image as `make image` built it, and programs that take it."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from ociregistry import __version__
from tests.image.layout import Layout
from tests.image.podman import Podman
from tests.peers import Containerd, DockerRegistry
from tests.processes import ROOT

ARCHITECTURE = {"x86_64": "amd64", "aarch64": "arm64"}[platform.machine()]
USER = 65532
BUILT = ROOT / "build" / f"ociregistry-{__version__}-{ARCHITECTURE}"


@pytest.fixture(scope="session")
def layout() -> Layout:
    """The image as a layout in an archive."""
    return Layout(BUILT.with_name(f"{BUILT.name}.oci.tar"))


@pytest.fixture(scope="session")
def bill() -> Path:
    """Its bill of materials."""
    return BUILT.with_name(f"{BUILT.name}.spdx.json")


@pytest.fixture(scope="session")
def root(layout: Layout, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The files of the image, in a folder."""
    folder = tmp_path_factory.mktemp("root")
    layout.unpack(folder)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def podman(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Podman]:
    """podman without images."""
    with Podman(tmp_path_factory.mktemp("podman")) as podman:
        yield podman


@pytest.fixture(scope="session")
def loaded(podman: Podman, layout: Layout) -> str:
    """The name of the image in podman, loaded from the archive."""
    said = podman("load", "--input", str(layout.path))
    return said.rpartition("Loaded image: ")[2]


@pytest.fixture(scope="session")
def containerd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Containerd]:
    """containerd without images."""
    with Containerd(tmp_path_factory.mktemp("containerd")) as containerd:
        yield containerd


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[DockerRegistry]:
    """An empty registry."""
    with DockerRegistry(tmp_path / "registry") as registry:
        yield registry


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A folder for the store, of the user of the image."""
    folder = tmp_path / "store"
    folder.mkdir(mode=0o700)
    os.chown(folder, USER, USER)
    return folder
