"""How many images a load fetches at once, and its time-out, with the Go server's options."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.images import make_image
from tests.real.caches import scripted
from tests.real.shells import Shell, blobs_in, digests, shell_in, succeeded
from tests.upstream import ScriptedRegistry
from tests.upstream_http import Answer, Handler, Request, Rule
from tests.upstream_rules import Hold

_PATIENCE = 60
IMAGES = {f"v{number}": make_image(f"concurrent/{number}", layers=1) for number in range(50)}


@dataclass
class ConcurrentRequests(Rule):
    """Holds answers until `number` requests wait together, and records the maximum."""

    parties: int
    most: int = 0
    _asking: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        """Set up a barrier, which fails the test when not enough requests arrive."""
        self._barrier = threading.Barrier(self.parties, timeout=_PATIENCE)

    def __call__(self, request: Request, handler: Handler) -> Answer:
        """Delay the handler's answer."""
        with self._lock:
            self._asking += 1
            self.most = max(self.most, self._asking)
        self._barrier.wait()
        with self._lock:
            self._asking -= 1
        return handler(request)


@pytest.fixture
def shell(upstream: ScriptedRegistry, tmp_path: Path) -> Shell:
    """A shell with a list of fifty images."""
    for tag, image in IMAGES.items():
        upstream.add("team/app", image, tag)
    (tmp_path / "imagelist").write_text("".join(f"{upstream.host}/team/app:{tag}\n" for tag in IMAGES))
    return shell_in(tmp_path, [{"name": upstream.host, "scheme": "http"}])


@pytest.mark.parametrize(
    ("option", "together"), [("", 1), ("--concurrent=5", 5), ("--concurrent 50", 50), ("--concurrent=1000", 50)]
)
def test_concurrent_limits_the_images_loaded_at_once(
    upstream: ScriptedRegistry, shell: Shell, option: str, together: int
) -> None:
    """Exactly that many at once, by default one."""
    rule = ConcurrentRequests(together)
    with scripted(upstream, "/v2/team/app/manifests/*", rule):
        done = succeeded(shell.piped(f"--load-images $PWD/imagelist --arch amd64 --os linux {option}"))
    assert done.splitlines()[-1] == "50 loaded, 0 already there, 0 failed"
    assert rule.most == together
    assert blobs_in(shell.store) == digests(*IMAGES.values())
    # Each object crossed the link once.
    paths = [request.path for request in upstream.requests if request.path != "/v2/"]
    assert len(paths) == len(set(paths)) == sum(1 + len(image.blobs) for image in IMAGES.values())


def test_pull_timeout_fails_one_image_and_loads_the_others(upstream: ScriptedRegistry, shell: Shell) -> None:
    """The time-out counts milliseconds without progress; the received bytes are kept for the next run."""
    stuck = IMAGES["v7"].layers[0]
    with scripted(upstream, f"/v2/team/app/blobs/{stuck.digest}", Hold(500)):
        done = shell.piped("--load-images $PWD/imagelist --pull-timeout 1500 --concurrent=8 --arch amd64 --os linux")
    assert done.returncode == 1
    failed = [line for line in done.stdout.splitlines() if line.startswith("failed: ")]
    assert len(failed) == 1
    assert failed[0].startswith(f"failed: {upstream.host}/team/app:v7: ")
    assert "no byte came for 1.5 s" in failed[0]
    assert done.stdout.splitlines()[-1] == "49 loaded, 0 already there, 1 failed"
    done = shell.piped("--load-images $PWD/imagelist --arch amd64 --os linux")
    assert succeeded(done).splitlines()[-1] == "1 loaded, 49 already there, 0 failed"
    assert upstream.bytes_sent(stuck.digest) == len(stuck.data)
