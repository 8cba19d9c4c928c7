"""Tokens that expire during a download: each new connection carries a valid one."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.processes import Daemon
from tests.real.caches import Cache, plain_image
from tests.upstream import ScriptedRegistry
from tests.upstream_auth import Tokens
from tests.upstream_rules import Cut, Drip

LIFE = 3.0
SIZE = 600_000
RATE = 60_000
CUT = 200_000
USER, PASSWORD = "puller", "p4ssw0rd"


@pytest.fixture
def cache(tmp_path: Path, upstream: ScriptedRegistry) -> Iterator[Cache]:
    """A daemon that may pull."""
    entry: dict[str, object] = {"scheme": "http", "auth": {"user": USER, "password": PASSWORD}}
    with Daemon(tmp_path, {upstream.host: entry}) as daemon:
        yield Cache(daemon, upstream)


# A token believed valid for too long is refused once per connection, and a cut applies to the first refusal.
@pytest.mark.parametrize(("expires_in", "cuts"), [(3, 2), (300, 3)], ids=["honest", "lying"])
def test_slow_download_cut_twice_renews_its_token(
    cache: Cache, upstream: ScriptedRegistry, expires_in: int, cuts: int
) -> None:
    image = plain_image("short-lived", SIZE)
    layer = image.layers[0]
    upstream.add("team/app", image, "1")
    upstream.script(f"*{layer.digest}", Drip(RATE))
    tokens = Tokens(
        f"{upstream.url}/token", users={USER: PASSWORD}, lifetime=LIFE, expires_in=expires_in, clock=time.monotonic
    )
    upstream.script(f"*{layer.digest}", Cut(CUT), times=cuts)
    upstream.script("*", tokens)
    assert cache.ask("team/app/manifests/1").status == 200
    began = time.monotonic()
    assert cache.ask(f"team/app/blobs/{layer.digest}").body == layer.data
    assert time.monotonic() - began > 2 * LIFE
    assert upstream.bytes_sent(layer.digest) <= SIZE * 1.02
    good = [request for request in upstream.requests if request.path.endswith(layer.digest) and request.status != 401]
    assert [request.header("Range") for request in good] == [None, f"bytes={CUT}-", f"bytes={2 * CUT}-"]
    # A new token each time: the previous one had expired.
    assert len({request.header("Authorization") for request in good}) == 3
