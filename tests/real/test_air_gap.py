"""`--air-gapped`: no request contacts an upstream, verified by strace, and cached content is served."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.client import Response, fetch
from tests.images import Image, make_artifact
from tests.namespaces import Namespace, NamespacedDaemon
from tests.processes import wait_until
from tests.real.caches import SOON, assert_error, plain_image
from tests.real.completions import log_lines
from tests.upstream import ScriptedRegistry
from tests.upstream_rules import Reply

NAME = "registry.example"
ABSENT = f"sha256:{'0' * 64}"
IMAGE, HALF = plain_image("air gap", 5000), plain_image("air gap/half", 5000)
SIGNATURE = make_artifact("signature", IMAGE.manifest)

NOT_CACHED = (
    ("team/app/manifests/2", "MANIFEST_UNKNOWN"),
    ("team/other/manifests/latest", "MANIFEST_UNKNOWN"),
    (f"team/app/manifests/{ABSENT}", "MANIFEST_UNKNOWN"),
    (f"team/app/blobs/{ABSENT}", "BLOB_UNKNOWN"),
    (f"team/half/blobs/{HALF.layers[0].digest}", "BLOB_UNKNOWN"),
    ("team/other/tags/list", "NAME_UNKNOWN"),
    (f"team/app/referrers/{ABSENT}", "MANIFEST_UNKNOWN"),
)


class TracedNetwork:
    """A namespace with an upstream, and a daemon whose every connection is traced."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        if shutil.which("strace") is None:
            pytest.fail("strace is missing: apt-get install strace", pytrace=False)
        self._folder = folder
        self._stack = stack
        self._namespace = stack.enter_context(Namespace("air"))
        self.upstream = self._namespace.call(ScriptedRegistry)
        stack.enter_context(self.upstream)
        self.ns = f"{NAME}:{self.upstream.port}"
        (folder / "hosts").write_text(f"127.0.0.1 localhost {NAME}\n")
        (folder / "resolv.conf").write_text("nameserver 127.0.0.1\noptions timeout:1 attempts:1\n")
        self._number = 0

    def start(self, *options: str) -> NamespacedDaemon:
        """Start a daemon for the upstream, and end the previous one."""
        self._number += 1
        images = self._folder / "images"
        daemon = NamespacedDaemon(self._namespace, self._folder, {self.ns: "http"}, *options, image_path=images)
        mounts = "; ".join(f"mount --bind {self._folder}/{name} /etc/{name}" for name in ("resolv.conf", "hosts"))
        strace = ["strace", "-D", "-f", "-q", "-e", "trace=connect,sendto,sendmmsg", "-o", str(self._trace)]
        start = len(self._namespace.argv([]))
        daemon.argv[start:start] = ["sh", "-euc", f'{mounts}; exec "$@"', "sh", *strace]
        return self._stack.enter_context(daemon)

    @property
    def _trace(self) -> Path:
        return self._folder / f"trace-{self._number}"

    def called(self, daemon: NamespacedDaemon) -> list[str]:
        """End the daemon; return its connections to others than its clients."""
        daemon.terminate()
        end = re.compile(rf"^{daemon.process.pid} +\+\+\+ ", re.MULTILINE)
        wait_until(lambda: end.search(self._trace.read_text(errors="replace")), SOON, "strace has written all")
        calls = self._trace.read_text(errors="replace").splitlines()
        return [call for call in calls if " connect(" in call or "sin_addr" in call or "sin6_addr" in call]

    def ask(self, daemon: NamespacedDaemon, path: str, method: str = "GET", ns: str = "") -> Response:
        """Send a request to the daemon."""
        url = f"{daemon.url}/v2/{path}?ns={ns or self.ns}"
        return self._namespace.call(lambda: fetch(url, method=method))

    def pull(self, daemon: NamespacedDaemon, image: Image, *tags: str) -> None:
        """Pull everything of an image."""
        for reference in (*tags, image.manifest.digest):
            answer = self.ask(daemon, f"team/app/manifests/{reference}")
            assert (answer.body, answer.headers["Warning"]) == (image.manifest.data, None)
            assert self.ask(daemon, f"team/app/manifests/{reference}", "HEAD").status == 200
        for blob in image.blobs:
            assert self.ask(daemon, f"team/app/blobs/{blob.digest}").body == blob.data
            assert self.ask(daemon, f"team/app/blobs/{blob.digest}", "HEAD").status == 200


@pytest.fixture
def network(tmp_path: Path) -> Iterator[TracedNetwork]:
    """A store with an image by two tags, its referrers, and an image without any of its blobs."""
    with ExitStack() as stack:
        network = TracedNetwork(tmp_path, stack)
        network.upstream.add("team/app", IMAGE, "1", "latest")
        network.upstream.add("team/app", SIGNATURE)
        network.upstream.add("team/half", HALF, "1")
        network.upstream.script("/v2/team/half/blobs/*", Reply(503))
        daemon = network.start()
        network.pull(daemon, IMAGE, "1", "latest")
        assert SIGNATURE.manifest.digest.encode() in network.ask(daemon, referrers()).body
        assert network.ask(daemon, "team/half/manifests/1").status == 200
        wait_until(lambda: "is not complete yet" in daemon.log, SOON, "completion was tried")
        calls = network.called(daemon)
        assert any(f"htons({network.upstream.port})" in call for call in calls), "strace sees no connection"
        yield network


def referrers() -> str:
    """Return the path of the image's referrers."""
    return f"team/app/referrers/{IMAGE.manifest.digest}"


@pytest.mark.parametrize("options", [(), ("--always-pull-latest",)], ids=["alone", "with_always_pull_latest"])
def test_air_gapped_daemon_contacts_no_upstream(network: TracedNetwork, options: tuple[str, ...]) -> None:
    """Check cached content, uncached content, and background work."""
    asked = len(network.upstream.requests)
    daemon = network.start("--air-gapped", *options)
    network.pull(daemon, IMAGE, "1", "latest")
    tags = json.loads(network.ask(daemon, "team/app/tags/list").body)
    assert tags == {"name": "team/app", "tags": ["1", "latest"]}
    listed = json.loads(network.ask(daemon, referrers()).body)["manifests"]
    assert [entry["digest"] for entry in listed] == [SIGNATURE.manifest.digest]
    for path, code in NOT_CACHED:
        for method in ("GET", "HEAD"):
            for ns in ("", "elsewhere.example", "192.0.2.1:5000", "docker.io"):
                answer = network.ask(daemon, path, method, ns)
                assert_error(answer, 404, code, method)
                assert method == "HEAD" or b"air-gapped" in answer.body
    assert network.ask(daemon, "team/half/manifests/1").body == HALF.manifest.data
    assert network.called(daemon) == []
    assert len(network.upstream.requests) == asked
    assert log_lines(daemon, "warn", "reached") == []


def test_pending_image_is_completed_without_air_gap(network: TracedNetwork) -> None:
    """A pending image of the time before is completed."""
    daemon = network.start("--air-gapped")
    assert network.ask(daemon, f"team/half/blobs/{HALF.layers[0].digest}").status == 404
    daemon.terminate()
    assert list(daemon.image_path.glob("pulls/*/*.wish"))
