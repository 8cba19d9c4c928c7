"""The daemon runs from the image as Kubernetes would run it: without privileges, with a read-only root."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import datetime
from pathlib import Path

import pytest

from tests.client import connect, fetch
from tests.image.conftest import USER
from tests.image.podman import Container, Podman
from tests.images import make_image
from tests.peers import DockerRegistry, skopeo_copy
from tests.processes import wait_until

_START = 3.0
_STARTED = re.compile(r"ociregistry \S+ started at (\S+), listening")
_SOON = 30.0


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., str]:
    """Write a configuration with this upstream; return the option that puts its folder in the container."""

    def write(registry: DockerRegistry) -> str:
        folder = tmp_path / "etc"
        folder.mkdir(exist_ok=True)
        settings = {"default_ns": registry.host, "registries": [{"name": registry.host, "scheme": "http"}]}
        (folder / "ociregistry.yaml").write_text(json.dumps(settings))  # JSON is valid YAML.
        return f"--volume={folder}:/etc/ociregistry:ro"

    return write


def _mounted(store: Path) -> str:
    return f"--volume={store}:/var/lib/ociregistry"


def test_image_is_pulled_through_the_container(
    podman: Podman,
    loaded: str,
    registry: DockerRegistry,
    store: Path,
    config: Callable[..., str],
    tmp_path: Path,
) -> None:
    """From the upstream at first, and without it after a restart; the configuration is found where it always is."""
    registry.push("team/app", make_image("container"), "1")
    upstream = config(registry)
    with Container(podman, loaded, _mounted(store), upstream) as container:
        skopeo_copy(f"{container.host}/team/app:1", f"dir:{tmp_path / 'first'}")
        assert f"{registry.host}/team/app:1" in container.exec("ociregistry", "list")
        assert container.stop() == 0
    registry.kill()
    with Container(podman, loaded, _mounted(store), upstream) as container:
        skopeo_copy(f"{container.host}/team/app:1", f"dir:{tmp_path / 'second'}")
    assert (tmp_path / "first/manifest.json").read_bytes() == (tmp_path / "second/manifest.json").read_bytes()
    assert {path.stat().st_uid for path in store.rglob("*")} == {USER}


def test_new_volume_belongs_to_the_user(podman: Podman, loaded: str) -> None:
    """Without a mount podman makes a volume, with the owner that the folder has in the image."""
    with Container(podman, loaded) as container:
        assert fetch(f"{container.url}/v2/").status == 200
        assert "error" not in container.log


def test_user_of_another_number_may_run_it(podman: Podman, loaded: str, tmp_path: Path) -> None:
    """As OpenShift does, with a number that /etc/passwd does not have: it needs a writable volume only."""
    folder = tmp_path / "store"
    folder.mkdir()
    folder.chmod(0o777)
    with Container(podman, loaded, _mounted(folder), "--user=1000680000:0") as container:
        assert fetch(f"{container.url}/v2/").status == 200


def test_starts_quickly(podman: Podman, loaded: str, store: Path) -> None:
    """The best of several starts, since other programs use this machine too."""
    starts = []
    for _ in range(3):
        with Container(podman, loaded, _mounted(store)) as container:
            wait_until(lambda: _STARTED.search(container.log), _SOON, "the line that it has started")
            found = _STARTED.search(container.log)
            assert found is not None
            # The log has whole seconds.
            starts.append((datetime.fromisoformat(found[1]) - container.started).total_seconds())
            assert "plugin cache" not in container.log
    assert min(starts) < _START


def test_request_in_flight_ends_before_the_daemon(
    podman: Podman, loaded: str, registry: DockerRegistry, store: Path, config: Callable[..., str]
) -> None:
    """SIGTERM waits for a client that has begun to read, and the exit status is 0."""
    image = make_image("draining", layer_size=40_000_000)
    registry.push("team/app", image, "1")
    blob = image.layers[0]
    upstream = config(registry)
    with Container(podman, loaded, _mounted(store), upstream) as container, ThreadPoolExecutor(1) as threads:
        url = f"/v2/team/app/blobs/{blob.digest}?ns={registry.host}"
        assert fetch(f"{container.url}/v2/team/app/manifests/1?ns={registry.host}").status == 200
        with closing(connect(container.url)) as connection:
            connection.request("GET", url)
            answer = connection.getresponse()
            received = hashlib.sha256(answer.read(1000))
            stopped = threads.submit(container.stop)
            wait_until(lambda: "SIGTERM" in container.log, _SOON, "the signal arrived")
            received.update(answer.read())
        assert f"sha256:{received.hexdigest()}" == blob.digest
        assert stopped.result(_SOON) == 0


@pytest.mark.parametrize(
    "expression",
    [
        # What bandwidth windows read.
        "__import__('datetime').datetime(2026, 7, 1, 12).astimezone().utcoffset().total_seconds() == 2 * 3600",
        "len(__import__('ssl').create_default_context().get_ca_certs()) > 100",
        "'zürich'.encode() == __import__('os').fsencode('zürich')",
    ],
    ids=["time-zones", "public-authorities", "utf-8"],
)
def test_python_finds(podman: Podman, loaded: str, expression: str) -> None:
    limits = ("--ulimit=nofile=1024:1024", "--ulimit=nproc=1024:1024")
    command = ("--entrypoint=/usr/bin/python3", loaded, "-c", f"print({expression})")
    assert podman("run", "--rm", "--network=none", *limits, "--env=TZ=Europe/Berlin", *command) == "True"
