"""Archives exported and loaded while daemons run, and exports of what is not an image by tag."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.client import Response, fetch
from tests.images import Image, make_artifact, make_image
from tests.peers import Containerd
from tests.processes import Daemon, wait_until
from tests.real.carrying import Place, blobs_of, in_archive, parts_of, pull_offline
from tests.real.scripted import SEEN, SOON, plain_image
from tests.upstream import ScriptedRegistry
from tests.upstream_rules import Hold

WHOLE, COMING = make_image("live/whole"), plain_image("live/coming", 100_000)


@pytest.fixture
def here(tmp_path: Path, upstream: ScriptedRegistry) -> Place:
    """A site with a registry."""
    return Place(tmp_path / "here", (upstream.host,))


@pytest.fixture
def there(tmp_path: Path, upstream: ScriptedRegistry) -> Place:
    """Another site, with a new store; it may know the registry by name."""
    return Place(tmp_path / "there", (upstream.host,))


@pytest.fixture
def running() -> Iterator[ExitStack]:
    """A stack of what runs until the test ends."""
    with ExitStack() as stack:
        yield stack


def ask(daemon: Daemon, path: str, ns: str) -> Response:
    """Request what is below /v2/ at this upstream from the daemon."""
    return fetch(f"{daemon.url}/v2/{path}?ns={ns}")


def pull_all(daemon: Daemon, ns: str, repository: str, image: Image) -> None:
    """Fetch every part of an image that is tagged v1."""
    assert ask(daemon, f"{repository}/manifests/v1", ns).body == image.manifest.data
    for blob in image.blobs:
        assert ask(daemon, f"{repository}/blobs/{blob.digest}", ns).body == blob.data


def wait_stored(place: Place, image: Image) -> None:
    """Return when all of it is stored, which is slightly later than when clients have their bytes."""
    blobs = [place.images / "blobs" / blob.digest.partition(":")[2] for blob in image.blobs]
    wait_until(lambda: all(blob.exists() for blob in blobs), SOON, "all blobs are in the store")


class Puller(threading.Thread):
    """A client that fetches an image repeatedly until it is stopped, and compares the content."""

    def __init__(self, daemon: Daemon, ns: str, repository: str, image: Image) -> None:
        super().__init__()
        self._arguments = (daemon, ns, repository, image)
        self._enough = threading.Event()
        self.rounds = 0
        self.problem: BaseException | None = None

    def run(self) -> None:
        """Fetch repeatedly."""
        try:
            while not self._enough.is_set():
                pull_all(*self._arguments)
                self.rounds += 1
        except BaseException as problem:
            self.problem = problem

    def __enter__(self) -> Puller:
        """Start it."""
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop it; every answer must have been correct."""
        self._enough.set()
        self.join()
        if self.problem is not None:
            raise self.problem


def test_exported_while_the_daemon_serves_and_fetches(
    upstream: ScriptedRegistry, here: Place, there: Place, containerd: Containerd, tmp_path: Path, running: ExitStack
) -> None:
    """Complete images are exported while clients pull them; an incomplete one is left out until it is complete."""
    ns = upstream.host
    upstream.add("team/whole", WHOLE, "v1")
    upstream.add("team/coming", COMING, "v1")
    hold = Hold(after=50_000)
    running.callback(hold.release.set)
    running.callback(upstream.script(f"/v2/team/coming/blobs/{COMING.layers[0].digest}", hold))
    archive = tmp_path / "live.tar"
    with here.daemon() as daemon:
        pull_all(daemon, ns, "team/whole", WHOLE)
        wait_stored(here, WHOLE)
        fetching = threading.Thread(target=pull_all, args=(daemon, ns, "team/coming", COMING))
        fetching.start()
        assert hold.reached.wait(SOON)
        with Puller(daemon, ns, "team/whole", WHOLE) as puller:
            wait_until(lambda: puller.rounds, SOON, "one round")
            printed, complaints = here.failed("export", "--pattern", ".", "-o", str(archive))
            begun = puller.rounds
            wait_until(lambda: puller.rounds > begun + 1 or puller.problem, SOON, "a round after that")
        assert printed[0].startswith("1 images exported")
        assert [line.partition(": the store lacks")[0] for line in complaints] == [
            f"ociregistry: left out: {ns}/team/coming:v1"
        ]
        assert in_archive(archive) == parts_of(WHOLE)
        hold.release.set()
        fetching.join()
        wait_stored(here, COMING)
        here.done("export", "--pattern", ".", "-o", str(archive))
        assert daemon.running
    upstream.close()
    there.done("load", str(archive))
    assert there.meanings == here.meanings
    assert blobs_of(COMING) <= in_archive(archive)
    with there.daemon() as daemon:
        assert pull_offline(daemon, containerd, f"{ns}/team/whole:v1") == parts_of(WHOLE)


def test_loaded_beside_a_daemon_it_is_served_within_a_second(
    upstream: ScriptedRegistry, here: Place, there: Place, containerd: Containerd, tmp_path: Path
) -> None:
    """The daemon on the store notices by itself what is loaded into it."""
    upstream.add("team/whole", WHOLE, "v1")
    here.bring(f"{upstream.host}/team/whole:v1")
    archive = tmp_path / "live.tar"
    here.done("export", "--pattern", ".", "-o", str(archive))
    upstream.close()
    with there.daemon() as daemon:
        path = "team/whole/manifests/v1"
        assert ask(daemon, path, upstream.host).status == 503
        there.done("load", str(archive))
        wait_until(lambda: ask(daemon, path, upstream.host).status == 200, SEEN, "the tag is served")
        assert pull_offline(daemon, containerd, f"{upstream.host}/team/whole:v1") == parts_of(WHOLE)


def test_an_upstream_without_a_dot_keeps_its_name(upstream: ScriptedRegistry, tmp_path: Path) -> None:
    """Such as a host of the local network, which clients send as `ns`: it is not a repository of Docker Hub."""
    upstream.add("team/whole", WHOLE, "v1")
    here, there = Place(tmp_path / "here"), Place(tmp_path / "there")
    here.folder.mkdir()
    mirrored = {"storehouse": {"scheme": "http", "mirrors": [upstream.url]}}
    with Daemon(here.folder, mirrored, "--no-complete-images", image_path=here.images) as daemon:
        pull_all(daemon, "storehouse", "team/whole", WHOLE)
        wait_stored(here, WHOLE)
    assert here.meanings == {"storehouse/team/whole:v1": WHOLE.manifest.digest}
    archive = tmp_path / "live.tar"
    here.done("export", "--pattern", ".", "-o", str(archive))
    there.done("load", str(archive))
    assert there.meanings == here.meanings


def test_signatures_that_were_loaded_are_carried_too(
    upstream: ScriptedRegistry, here: Place, there: Place, tmp_path: Path
) -> None:
    """Referrers of an image are listed at both sites without the upstream, and so are cosign's tags."""
    sbom = make_artifact("live/sbom", WHOLE.manifest)
    signature = make_image("live/signature")
    cosign = f"{WHOLE.manifest.digest.replace(':', '-')}.sig"
    upstream.add("team/whole", WHOLE, "v1")
    upstream.add("team/whole", sbom)
    upstream.add("team/whole", signature, cosign)
    here.bring(f"{upstream.host}/team/whole:v1", options=["--with-signatures"])
    upstream.close()
    asked = [
        f"team/whole/referrers/{WHOLE.manifest.digest}",
        f"team/whole/manifests/{sbom.manifest.digest}",
        f"team/whole/blobs/{sbom.layers[0].digest}",
        f"team/whole/manifests/{cosign}",
        f"team/whole/blobs/{signature.layers[0].digest}",
    ]
    archive = tmp_path / "signed.tar"
    here.done("export", "--pattern", ".", "-o", str(archive))
    there.done("load", str(archive))
    answers = []
    for place in (here, there):
        with place.daemon() as daemon:
            found = [ask(daemon, path, upstream.host) for path in asked]
            assert [one.status for one in found] == [200] * len(asked)
            answers.append([one.body for one in found])
    assert answers[0] == answers[1]
    assert [one["digest"] for one in json.loads(answers[0][0])["manifests"]] == [sbom.manifest.digest]
    assert there.meanings == here.meanings
