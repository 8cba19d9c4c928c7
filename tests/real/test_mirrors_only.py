"""A registry that cannot be resolved, and is never asked: its mirrors alone stand for it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.client import Response, fetch
from tests.images import make_image
from tests.processes import Daemon
from tests.upstream import ScriptedRegistry
from tests.upstream_rules import Reply

IMAGE = make_image("mirrors only")
ORIGIN = "registry.invalid"
"""A name that no resolver knows (RFC 6761, section 6.4)."""

StartDaemon = Callable[..., Daemon]


@dataclass(frozen=True)
class Site:
    """A daemon with two mirrors, of which the second has the image."""

    daemon: Daemon
    one: ScriptedRegistry
    two: ScriptedRegistry

    def ask(self, path: str) -> Response:
        """Request content of the origin."""
        return fetch(f"{self.daemon.url}/v2/team/app/{path}?ns={ORIGIN}")

    def told(self, path: str) -> tuple[int, str]:
        """Request what must fail; return the status and the message."""
        answer = self.ask(path)
        return answer.status, json.loads(answer.body)["errors"][0]["message"]


@contextmanager
def site_in(folder: Path, **settings: object) -> Iterator[Site]:
    """Run a site until the block ends; `settings` are those of the origin."""
    with ScriptedRegistry() as one, ScriptedRegistry() as two:
        two.add("team/app", IMAGE, "1")
        entry = {"mirrors": [one.url, two.url], **settings}
        with Daemon(folder, {ORIGIN: entry}, "--log-level", "debug") as daemon:
            yield Site(daemon, one, two)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    """Return a site whose origin is never asked."""
    with site_in(tmp_path, mirrors_only=True) as site:
        yield site
        assert f"{ORIGIN} could not be" not in site.daemon.log
        assert "cannot be resolved" not in site.daemon.log


def test_image_is_pulled_from_the_mirror_that_has_it(site: Site) -> None:
    assert site.ask("manifests/1").body == IMAGE.manifest.data
    for blob in IMAGE.blobs:
        assert site.ask(f"blobs/{blob.digest}").body == blob.data
    assert f"{ORIGIN}/team/app/manifests/1: mirror {site.one.url}: it answered 404; mirror {site.two.url}: " in (
        site.daemon.log
    )


@pytest.mark.parametrize("path", ["manifests/absent", f"blobs/sha256:{'0' * 64}", "tags/list"])
def test_what_no_mirror_has_is_404(site: Site, path: str) -> None:
    site.two.script("*/tags/list", Reply(404))
    status, message = site.told(path)
    assert status == 404
    assert f"mirror {site.one.url}: it answered 404; mirror {site.two.url}: it answered 404" in message


@pytest.mark.parametrize("first", [True, False])
def test_what_a_mirror_that_is_down_may_have_is_503(site: Site, first: bool) -> None:
    down = site.one if first else site.two
    down.script("*", Reply(500))
    status, message = site.told("manifests/absent")
    assert status == 503
    assert f"mirror {down.url}: it answered 500" in message
    assert (site.ask("manifests/1").status == 200) == first


def test_without_mirrors_only_the_origin_is_named(tmp_path: Path) -> None:
    with site_in(tmp_path) as site:
        status, message = site.told("manifests/absent")
        assert status == 503
        assert message.startswith(f"mirror {site.one.url}: it answered 404; mirror {site.two.url}: it answered 404; ")
        assert f"registry {ORIGIN}: host name cannot be resolved" in message
