"""The machine's clock is set while the daemon runs: ahead, and back."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from pathlib import Path

import pytest

from tests.clocks import FakeClock
from tests.processes import run, wait_until
from tests.real.caches import SOON, Cache, daemon_in, plain_image, pull, record, wait_scanned_twice
from tests.real.stores import assert_all_served, contents
from tests.upstream import ScriptedRegistry

DAY = 86_400.0
TEN_YEARS = timedelta(days=3650)
JUMPED = "pruning by age skipped: the clock jumped by "


def test_clock_jump_prunes_nothing(tmp_path: Path) -> None:
    clock = FakeClock(tmp_path)
    images = [plain_image(f"clock/{number}", 10_000) for number in range(8)]
    settings = {"prune": {"unused_for": "30d", "every": "1s"}}
    with (
        ScriptedRegistry() as upstream,
        daemon_in(tmp_path, upstream, settings=settings, environment=clock.environment) as daemon,
    ):
        cache = Cache(daemon, upstream)
        for number, image in enumerate(images):
            upstream.add(f"team/{number}", image, "1")
            pull(cache, f"team/{number}", image)

        clock.set(TEN_YEARS)
        wait_until(lambda: daemon.log.count(JUMPED) == 1, SOON, "the jump is seen")
        # The clock is steady now, and wrong, which the times of the last pulls cannot show.
        pull(cache, "team/0", images[0])
        told = "pruning by age refused: 7 of 8 images would be removed, which is more than max_share"
        wait_until(lambda: told in daemon.log, SOON, "most of them are spared")
        assert record(cache, images[0].manifest).stat().st_mtime > time.time() + 3600 * DAY

        clock.set(timedelta(0))
        wait_until(lambda: daemon.log.count(JUMPED) == 2, SOON, "the jump back is seen")
        # Maintenance that was due during those years runs now.
        wait_scanned_twice(cache)
        assert len(contents(daemon.image_path)) == len(images)
        for number, image in enumerate(images):
            assert_all_served(daemon, upstream.host, f"team/{number}", "1", image)
        then = time.time() - 31 * DAY
        os.utime(record(cache, images[1].manifest), (then, then))
        wait_until(lambda: not record(cache, images[1].manifest).exists(), SOON, "the image is pruned by age")
        assert len(contents(daemon.image_path)) == len(images) - 1


VERIFIED = "verified 1 record"


@pytest.mark.parametrize("jump", [TEN_YEARS, timedelta(days=-365)], ids=["ahead", "behind"])
def test_clock_jump_does_not_put_off_verifying(tmp_path: Path, jump: timedelta) -> None:
    clock, image = FakeClock(tmp_path), plain_image("clock/verified", 1000)
    settings = {"verify": {"every": "1s"}, "log_level": "info"}
    with (
        ScriptedRegistry() as upstream,
        daemon_in(tmp_path, upstream, settings=settings, environment=clock.environment) as daemon,
    ):
        upstream.add("team/app", image, "1")
        pull(Cache(daemon, upstream), "team/app", image)

        def verifies() -> None:
            """Wait until the daemon has verified the store twice more."""
            before = daemon.log.count(VERIFIED)
            wait_until(lambda: daemon.log.count(VERIFIED) >= before + 2, SOON, "it verifies")

        for ahead in (timedelta(0), jump, timedelta(0)):
            clock.set(ahead)
            verifies()
            # And in a process that has seen no other time.
            daemon.terminate()
            clock.set(timedelta(0))
            daemon.start()
            verifies()


V1, V2 = plain_image("clock/v1", 1000), plain_image("clock/v2", 1000)
LATEST = "team/app/manifests/latest"


def latest(cache: Cache) -> str | None:
    """Return the digest of the tag latest at the daemon."""
    return cache.ask(LATEST).headers["Docker-Content-Digest"]


@pytest.mark.parametrize(
    ("wrong", "right"),
    [(TEN_YEARS, timedelta(0)), (timedelta(hours=1), timedelta(0)), (timedelta(0), -TEN_YEARS)],
    ids=["ten years ahead", "an hour ahead", "then ten years behind"],
)
def test_tag_of_a_wrong_clock_gives_way_to_what_the_upstream_says(
    tmp_path: Path, wrong: timedelta, right: timedelta
) -> None:
    """Also in an outage, after a restart, when that time has come, and when the old record is copied again."""
    clock = FakeClock(tmp_path)
    clock.set(wrong)
    with (
        ScriptedRegistry() as upstream,
        daemon_in(tmp_path, upstream, "--always-pull-latest", environment=clock.environment) as daemon,
    ):
        cache = Cache(daemon, upstream)
        upstream.add("team/app", V1, "latest")
        assert latest(cache) == V1.manifest.digest
        run(["cp", "-a", f"{daemon.image_path}/img", f"{tmp_path}/replica"])

        clock.set(right)
        upstream.add("team/app", V2, "latest")
        assert latest(cache) == V2.manifest.digest
        upstream.close()
        assert latest(cache) == V2.manifest.digest
        if right < wrong:
            run(["rsync", "--archive", f"{tmp_path}/replica/", f"{daemon.image_path}/img/"])
            wait_scanned_twice(cache)
            assert latest(cache) == V2.manifest.digest
        assert cache.ask(f"team/app/manifests/{V1.manifest.digest}").body == V1.manifest.data
        upstream.open()
        wait_until(lambda: cache.ask(LATEST).headers["Warning"] is None, SOON, "the upstream is asked again")
        upstream.close()
        daemon.terminate()
        clock.set(max(wrong, right) + timedelta(days=1))
        daemon.start()
        assert latest(cache) == V2.manifest.digest
