"""A limit of processes, as containers have: threads that run do the work of those that cannot be started."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests import procfs
from tests.disk_faults import drop
from tests.images import Image
from tests.processes import Daemon
from tests.real.caches import Cache, blob_file, plain_image
from tests.real.shells import need_root, open_folder
from tests.upstream import ScriptedRegistry

USER = 1_000_000 + os.getpid()
"""Has no other process: the limit is for all of a user, and root has none."""
AT_START = 8
"""Threads of a daemon at first."""


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder of that user."""
    need_root()
    with open_folder() as folder:
        os.chown(folder, USER, USER)
        yield folder


def limited(folder: Path, upstream: ScriptedRegistry, threads: int) -> Daemon:
    """Make a daemon that may have this number of threads; it is not started."""
    daemon = Daemon(folder, {upstream.host: "http"}, "--no-complete-images")
    daemon.argv = ["prlimit", f"--nproc={threads}", "setpriv", f"--reuid={USER}", "--clear-groups", *daemon.argv]
    return daemon


def pull(cache: Cache, name: str, image: Image) -> list[int]:
    """Pull the image; return the statuses of whole answers."""
    answers = {f"{name}/manifests/1": image.manifest.data}
    answers |= {f"{name}/blobs/{blob.digest}": blob.data for blob in image.blobs}
    return [answer.status for path, data in answers.items() if (answer := cache.ask(path)).body == data]


def test_all_is_served_by_the_threads_that_run(folder: Path) -> None:
    with ScriptedRegistry() as upstream, limited(folder, upstream, AT_START + 1) as daemon:
        cache = Cache(daemon, upstream)
        images = {f"team/{number}": plain_image(f"image {number}", 200_000) for number in range(40)}
        for name, image in images.items():
            upstream.add(name, image, "1")
        with ThreadPoolExecutor(20) as clients:
            for _ in range(3):
                pulled = list(clients.map(lambda one: pull(cache, *one), images.items()))
                assert pulled == [[200] * 3] * len(images)
                # The next time the disk is needed.
                for image in images.values():
                    cache.wait_stored(image.layers[0].digest)
                    drop(blob_file(daemon, image.layers[0].digest))
        assert procfs.threads(daemon.process.pid) == AT_START + 1
        daemon.terminate(30)
        assert "no further thread can be started, " in daemon.log
        assert "Traceback" not in daemon.log
        assert "#error" not in daemon.log


def test_daemon_without_enough_threads_for_the_start_says_so(folder: Path) -> None:
    with ScriptedRegistry() as upstream:
        daemon = limited(folder, upstream, 3)
        with pytest.raises(RuntimeError, match=" ended with 1:\n"):
            daemon.start()
        assert "can't start new thread: the limit of processes is reached" in daemon.log
        assert "Traceback" not in daemon.log
