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
from tests.real.caches import SEEN, SOON, plain_image
from tests.real.sites import Site, blobs_of, in_archive, parts_of, pull_offline
from tests.upstream import ScriptedRegistry
from tests.upstream_rules import Hold

WHOLE, COMING = make_image("live/whole"), plain_image("live/coming", 100_000)


@pytest.fixture
def site(tmp_path: Path, upstream: ScriptedRegistry) -> Site:
    """A site with a registry."""
    return Site(tmp_path / "site", (upstream.host,))


@pytest.fixture
def other_site(tmp_path: Path, upstream: ScriptedRegistry) -> Site:
    """Another site, with a new store; it may know the registry by name."""
    return Site(tmp_path / "other_site", (upstream.host,))


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


def wait_stored(place: Site, image: Image) -> None:
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


def test_export_while_the_daemon_serves_and_fetches(
    upstream: ScriptedRegistry,
    site: Site,
    other_site: Site,
    containerd: Containerd,
    tmp_path: Path,
    running: ExitStack,
) -> None:
    """Complete images are exported while clients pull them; an incomplete one is left out until it is complete."""
    ns = upstream.host
    upstream.add("team/whole", WHOLE, "v1")
    upstream.add("team/coming", COMING, "v1")
    hold = Hold(after=50_000)
    running.callback(hold.release.set)
    running.callback(upstream.script(f"/v2/team/coming/blobs/{COMING.layers[0].digest}", hold))
    archive = tmp_path / "live.tar"
    with site.daemon() as daemon:
        pull_all(daemon, ns, "team/whole", WHOLE)
        wait_stored(site, WHOLE)
        fetching = threading.Thread(target=pull_all, args=(daemon, ns, "team/coming", COMING))
        fetching.start()
        assert hold.reached.wait(SOON)
        with Puller(daemon, ns, "team/whole", WHOLE) as puller:
            wait_until(lambda: puller.rounds, SOON, "one round")
            printed, complaints = site.fail("export", "--pattern", ".", "-o", str(archive))
            begun = puller.rounds
            wait_until(lambda: puller.rounds > begun + 1 or puller.problem, SOON, "a round after that")
        assert printed[0].startswith("1 image exported")
        assert [line.partition(": the store lacks")[0] for line in complaints] == [
            f"ociregistry: left out: {ns}/team/coming:v1"
        ]
        assert in_archive(archive) == parts_of(WHOLE)
        hold.release.set()
        fetching.join()
        wait_stored(site, COMING)
        site.succeed("export", "--pattern", ".", "-o", str(archive), "--force")
        assert daemon.running
    upstream.close()
    other_site.succeed("load", str(archive))
    assert other_site.digests == site.digests
    assert blobs_of(COMING) <= in_archive(archive)
    with other_site.daemon() as daemon:
        assert pull_offline(daemon, containerd, f"{ns}/team/whole:v1") == parts_of(WHOLE)


def test_loaded_archive_is_served_by_a_running_daemon(
    upstream: ScriptedRegistry, site: Site, other_site: Site, containerd: Containerd, tmp_path: Path
) -> None:
    """The daemon on the store notices by itself what is loaded into it."""
    upstream.add("team/whole", WHOLE, "v1")
    site.load(f"{upstream.host}/team/whole:v1")
    archive = tmp_path / "live.tar"
    site.succeed("export", "--pattern", ".", "-o", str(archive))
    upstream.close()
    with other_site.daemon() as daemon:
        path = "team/whole/manifests/v1"
        assert ask(daemon, path, upstream.host).status == 503
        other_site.succeed("load", str(archive))
        wait_until(lambda: ask(daemon, path, upstream.host).status == 200, SEEN, "the tag is served")
        assert pull_offline(daemon, containerd, f"{upstream.host}/team/whole:v1") == parts_of(WHOLE)


def test_upstream_without_a_dot_keeps_its_name(upstream: ScriptedRegistry, tmp_path: Path) -> None:
    """Such as a host of the local network, which clients send as `ns`: it is not a repository of Docker Hub."""
    upstream.add("team/whole", WHOLE, "v1")
    site, other_site = Site(tmp_path / "site"), Site(tmp_path / "other_site")
    site.folder.mkdir()
    mirrored = {"storehouse": {"scheme": "http", "mirrors": [upstream.url]}}
    with Daemon(site.folder, mirrored, "--no-complete-images", image_path=site.images) as daemon:
        pull_all(daemon, "storehouse", "team/whole", WHOLE)
        wait_stored(site, WHOLE)
    assert site.digests == {"storehouse/team/whole:v1": WHOLE.manifest.digest}
    archive = tmp_path / "live.tar"
    site.succeed("export", "--pattern", ".", "-o", str(archive))
    other_site.succeed("load", str(archive))
    assert other_site.digests == site.digests


def test_loaded_signatures_are_exported(
    upstream: ScriptedRegistry, site: Site, other_site: Site, tmp_path: Path
) -> None:
    """Referrers of an image are listed at both sites without the upstream, and so are cosign's tags."""
    sbom = make_artifact("live/sbom", WHOLE.manifest)
    signature = make_image("live/signature")
    cosign = f"{WHOLE.manifest.digest.replace(':', '-')}.sig"
    upstream.add("team/whole", WHOLE, "v1")
    upstream.add("team/whole", sbom)
    upstream.add("team/whole", signature, cosign)
    site.load(f"{upstream.host}/team/whole:v1", options=["--with-signatures"])
    upstream.close()
    asked = [
        f"team/whole/referrers/{WHOLE.manifest.digest}",
        f"team/whole/manifests/{sbom.manifest.digest}",
        f"team/whole/blobs/{sbom.layers[0].digest}",
        f"team/whole/manifests/{cosign}",
        f"team/whole/blobs/{signature.layers[0].digest}",
    ]
    archive = tmp_path / "signed.tar"
    site.succeed("export", "--pattern", ".", "-o", str(archive))
    other_site.succeed("load", str(archive))
    answers = []
    for place in (site, other_site):
        with place.daemon() as daemon:
            found = [ask(daemon, path, upstream.host) for path in asked]
            assert [one.status for one in found] == [200] * len(asked)
            answers.append([one.body for one in found])
    assert answers[0] == answers[1]
    assert [one["digest"] for one in json.loads(answers[0][0])["manifests"]] == [sbom.manifest.digest]
    assert other_site.digests == site.digests
