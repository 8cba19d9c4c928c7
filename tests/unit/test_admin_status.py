"""The status: what makes it degraded, which image a blob is for, and how it is told as JSON."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import timedelta

import pytest

from ociregistry.admin.status import document, image_of, reasons
from ociregistry.manifests import Manifest
from ociregistry.names import Digest
from ociregistry.pullthrough.completion import Incomplete
from ociregistry.store.records import Dates
from ociregistry.store.store import Store
from ociregistry.upstream.bandwidth import BandwidthLimit
from ociregistry.upstream.breaker import LinkState
from tests.unit.support.common import image, on_reactor
from tests.unit.support.statuses import PULLED, STARTED, STATUS
from tests.unit.support.stores import day, list_of
from tests.unit.support.stores import image_of as image_with

UP = LinkState("reg.example:443", True, True, 9.0, "", None)
DOWN = replace(UP, up=False, why="no route", next_probe=2.0)
WANTED = replace(DOWN, wanted=True)
MADE_UP = replace(WANTED, host="made-up.example:443", named=False)
NOTHING, SOMETHING = Incomplete(0, 0), Incomplete(1, 100)
TOLD = ["reg.example:443 cannot be reached, and something from it is wanted: no route"]
MADE_UP_TOLD = ["made-up.example:443 cannot be reached, and something from it is wanted: no route"]


@pytest.mark.parametrize(
    ("links", "incomplete", "told"),
    [
        ((), NOTHING, []),
        ((UP, DOWN), SOMETHING, []),
        ((UP, WANTED), NOTHING, TOLD),
        ((MADE_UP,), NOTHING, []),
        ((MADE_UP, WANTED), SOMETHING, TOLD + MADE_UP_TOLD),
    ],
)
def test_link_counts_while_something_is_wanted(
    links: tuple[LinkState, ...], incomplete: Incomplete, told: list[str]
) -> None:
    """A host that never answered, as clients may make up any, counts only if bytes are missing."""
    assert list(reasons([], links, incomplete)) == told


def test_made_up_hosts_are_told_in_short_and_last() -> None:
    links = [*(replace(MADE_UP, host=f"{number}.example:443") for number in range(1000)), WANTED]
    told = list(reasons([], links, SOMETHING))
    assert told[:1] == TOLD
    assert len(told) == 11
    assert told[-1] == "991 other hosts cannot be reached, and something is wanted from there"


def test_faults_of_the_store_come_first() -> None:
    assert list(reasons(["the disk is full"], [WANTED], NOTHING)) == ["the disk is full", *TOLD]


def test_failed_reload_comes_last() -> None:
    (*others, last) = reasons(["the disk is full"], [WANTED], NOTHING, "a.yaml:3: port: no number")
    assert others == ["the disk is full", *TOLD]
    assert last == "the earlier settings are in force, as the reload failed: a.yaml:3: port: no number"


CONFIG, LAYER, BASE = b"config", b"layer", b"base"
IMAGE = image_with(CONFIG, LAYER, BASE)
INDEX = list_of(IMAGE)
APP = image("reg.example/app:1").repository


async def keep(store: Store, manifest: Manifest, url: str, at: int) -> None:
    """Keep a record that was confirmed on that day."""
    await store.keep(manifest, image(url), Dates(day(at), day(at)))


@on_reactor
async def test_image_of_a_blob_is_the_newest_tag_of_its_repository(store: Store) -> None:
    layer = Digest.of(LAYER)
    assert image_of(store, APP, layer) is None
    await keep(store, IMAGE, f"reg.example/app@{IMAGE.digest}", 9)
    assert image_of(store, APP, layer) == f"reg.example/app@{IMAGE.digest}"
    await keep(store, INDEX, "reg.example/app:1", 1)
    await keep(store, INDEX, "reg.example/app:2", 2)
    await keep(store, INDEX, "reg.example/application:3", 3)
    assert image_of(store, APP, layer) == "reg.example/app:2"
    assert image_of(store, image("other.example/app:1").repository, layer) is None


@on_reactor
async def test_blob_of_many_images_is_for_none(store: Store) -> None:
    for number in range(11):
        await keep(store, image_with(str(number).encode(), BASE), f"reg.example/app:{number}", number)
    assert image_of(store, APP, Digest.of(BASE)) is None
    assert image_of(store, APP, Digest.of(b"7")) == "reg.example/app:7"


def test_document_is_json() -> None:
    told = json.loads(json.dumps(document(STATUS, STARTED + timedelta(seconds=90))))
    assert (told["status"], told["uptime_seconds"]) == ("ok", 90)
    assert told["store"] == {"path": "/srv/images", "lists": 2, "images": 3, "bytes": 1234, "blobs": 8}
    assert told["incomplete"] == {"images": 4, "bytes": 5, "pending": 1, "indexes": 6, "seconds_left": None}
    assert told["bandwidth"] == {"limit": 1000.0, "window": None}
    assert told["downloads"][0]["started"] == "2026-03-01T22:17:30+00:00"
    assert told["maintenance"]["last_prune"] == "2026-03-01T22:17:30+00:00"


def test_what_is_not_known_is_null() -> None:
    told = document(replace(STATUS, usage=None, bandwidth=BandwidthLimit(), downloads=(PULLED,)), STARTED)
    assert told["store"] == {"path": "/srv/images", "lists": 2, "images": 3, "bytes": None, "blobs": None}
    assert told["bandwidth"] == {"limit": None, "window": None}
    assert [told["downloads"][0][key] for key in ("rate", "seconds_left", "image")] == [None, None, None]  # type: ignore[index]  # a list of mappings


def test_degraded_is_decided_by_the_reasons() -> None:
    told = document(replace(STATUS, reasons=("the disk is full",)), STARTED)
    assert (told["status"], told["reasons"]) == ("degraded", ["the disk is full"])
