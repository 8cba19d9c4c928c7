"""The cluster, and the upstream outside."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import pytest

from tests.images import Image, Index
from tests.kubernetes.cluster import PROGRAMS, Cluster
from tests.kubernetes.upstream import PrivateUpstream, busybox, busybox_index, missing_programs
from tests.processes import ROOT


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A cluster whose node has no image at all."""
    if packages := missing_programs():
        pytest.fail(f"a program is missing: apt-get install {' '.join(packages)}", pytrace=False)
    if os.geteuid() != 0:
        pytest.fail("a node needs root", pytrace=False)
    programs = os.environ.get("CLUSTER", "")
    if missing := [name for name in PROGRAMS if shutil.which(name, path=programs) is None]:
        pytest.fail(f"{', '.join(missing)} not in CLUSTER={programs}: run make test-kubernetes", pytrace=False)
    with Cluster(programs, ROOT / "build" / "kubernetes-logs") as cluster:
        yield cluster


@pytest.fixture(scope="session")
def upstream(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateUpstream]:
    """The upstream, with an image for each purpose."""
    images: dict[str, Image | Index] = {"team/pulled:1": busybox("pulled")}
    images.update((f"{name}:1", busybox_index(name)) for name in ("pause", "team/system", "team/carried"))
    with PrivateUpstream(cluster, tmp_path_factory.mktemp("upstream"), images) as upstream:
        yield upstream
