"""Which images of an index are wanted: by a requested layer, as the only platform, or for this machine's platform."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import pytest
from twisted.internet.task import Clock
from twisted.logger import LogEvent, LogLevel

from ociregistry.manifests import Manifest
from ociregistry.names import Digest, Repository
from ociregistry.platforms import Platform
from ociregistry.store.store import Store
from ociregistry.store.workdir import PendingFiles
from tests.unit.support.common import image, on_reactor, texts, until
from tests.unit.support.demands import AMD64, APP, ARM64, ATTESTATION, INDEX, S390X, SHARED, Demands, names
from tests.unit.support.loads import image_of, index_of, settle

OWN_AMD64, OWN_ARM64, OWN_S390X, IN_TOTO = b"layer of amd64", b"layer of arm64", b"layer of s390x", b"in-toto"
OWN = {OWN_AMD64: AMD64, OWN_ARM64: ARM64, OWN_S390X: S390X, IN_TOTO: ATTESTATION}
ALL = (AMD64, ARM64, S390X, ATTESTATION)
FOUR = ["linux/amd64", "linux/arm64", "linux/s390x", "unknown/unknown"]


@pytest.fixture
def demands(root: Path, store: Store, clock: Clock) -> Iterator[Demands]:
    """Return a demand on a linux/amd64 machine."""
    demands = Demands(root, store, clock)
    yield demands
    demands.stop()


@pytest.fixture
def demands_on(root: Path, store: Store, clock: Clock) -> Iterator[Callable[[str], Demands]]:
    """Return a factory of demands on machines of a given platform."""
    made: list[Demands] = []

    def make(machine: str) -> Demands:
        made.append(Demands(root, store, clock, Platform.parse(machine)))
        return made[-1]

    yield make
    for demands in made:
        demands.stop()


# Images without an index


@on_reactor
async def test_image_requested_by_tag_is_wanted_immediately(demands: Demands) -> None:
    await demands.get(AMD64, tag="1")
    assert (demands.completing, demands.pending, demands.wanted(AMD64)) == ([], [], [True])
    # Its client is about to request the blobs itself.
    await demands.wait(0.875)
    assert demands.completing == []
    await demands.wait(0.125)
    assert (demands.completing, demands.pending) == (["linux/amd64"], [])


@on_reactor
async def test_image_that_its_client_pulls_whole_is_never_pending(
    demands: Demands, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted: list[Digest] = []
    monkeypatch.setattr(PendingFiles, "write", lambda files, pending: noted.append(pending.image))
    await demands.get(AMD64, tag="1")
    await demands.wait(0.5)
    for blob in (b"config of amd64", SHARED, OWN_AMD64):
        (root / "blobs" / Digest.of(blob).hex).write_bytes(blob)
    await demands.wait(0.5)
    assert (demands.completing, noted) == ([], [])


@on_reactor
async def test_stop_while_the_client_is_still_pulling(demands: Demands, store: Store) -> None:
    await demands.get(AMD64, tag="1")
    demands.stop()
    await demands.wait(1)
    assert (demands.completing, demands.wanted(AMD64)) == ([], [True])
    # The record says what is to be completed after the next start.
    again = Demands(demands.root, store, demands.clock)
    await settle(store)
    assert again.completing == ["linux/amd64"]
    again.stop()


@on_reactor
async def test_image_without_index_requested_by_digest_is_wanted_immediately(demands: Demands) -> None:
    await demands.get(AMD64)
    await demands.wait(1)
    assert (demands.completing, demands.pending, demands.wanted(AMD64)) == (["linux/amd64"], [], [True])


@on_reactor
async def test_image_of_index_with_its_own_tag_is_wanted_immediately(demands: Demands) -> None:
    await demands.get(INDEX, tag="1")
    await demands.get(AMD64, ARM64)
    await demands.get(ARM64, tag="1-arm64")
    await demands.wait(1)
    assert (demands.completing, demands.pending) == (["linux/arm64"], ["linux/amd64"])
    assert demands.wanted(ARM64) == [True]


@on_reactor
async def test_metadata_image_requested_by_tag_is_wanted_immediately(demands: Demands, store: Store) -> None:
    await demands.get(INDEX, tag="1")
    await store.keep(ARM64, image(f"{APP}:1-arm64"), wanted=False)
    await demands.get(ARM64, tag="1-arm64", hit=True)
    assert (demands.completing, demands.pending, demands.wanted(ARM64)) == (["linux/arm64"], [], [True])


@on_reactor
async def test_image_of_referrers_list_is_wanted_immediately(demands: Demands) -> None:
    await demands.get(INDEX, tag=f"sha256-{AMD64.digest.hex}")
    await demands.get(ATTESTATION, AMD64)
    await demands.wait(1)
    assert (demands.completing, demands.pending) == (["linux/amd64", "unknown/unknown"], [])


@on_reactor
async def test_index_alone_makes_nothing_wanted(demands: Demands) -> None:
    await demands.get(INDEX, tag="1")
    await demands.wait()
    assert (demands.completing, demands.pending) == ([], [])


# Without a requested layer


@on_reactor
async def test_only_requested_platform_is_wanted_after_30_seconds(demands: Demands) -> None:
    await demands.get(INDEX, tag="1")
    await demands.get(ARM64)
    assert (demands.completing, demands.pending, demands.wanted(ARM64)) == ([], ["linux/arm64"], [False])
    assert demands.completion.incomplete.pending == demands.completion.incomplete.images == 1
    await demands.wait(29.875)
    assert (demands.completing, demands.pending) == ([], ["linux/arm64"])
    await demands.wait(0.125)
    assert (demands.completing, demands.pending, demands.wanted(ARM64)) == (["linux/arm64"], [], [True])
    assert demands.completion.incomplete.pending == 0


@on_reactor
async def test_complete_image_is_no_longer_pending(demands: Demands, root: Path) -> None:
    await demands.get(INDEX, tag="1")
    await demands.get(ARM64)
    for blob in ARM64.blobs:
        (root / "blobs" / blob.digest.hex).write_bytes(b"x" * blob.size)
    await demands.wait()
    assert (demands.completing, demands.pending, demands.wanted(ARM64)) == ([], [], [True])


@on_reactor
async def test_machine_platform_is_wanted_of_several_requested(demands: Demands) -> None:
    await demands.get(INDEX, tag="1")
    await demands.get(*ALL)
    assert (demands.completing, demands.pending) == ([], FOUR)
    await demands.wait()
    assert (demands.completing, demands.pending) == (["linux/amd64"], [])
    assert demands.wanted(*ALL) == [True, False, False, False]


@on_reactor
async def test_none_is_wanted_without_the_machine_platform(demands: Demands) -> None:
    await demands.get(INDEX, tag="1")
    await demands.get(ARM64, S390X)
    await demands.wait()
    assert (demands.completing, demands.pending, demands.wanted(ARM64, S390X)) == ([], [], [False, False])


@pytest.mark.parametrize(
    ("machine", "platforms", "wanted"),
    [
        ("linux/arm64", ["linux/arm64/v8", "linux/amd64"], "linux/arm64/v8"),
        ("linux/arm", ["linux/arm/v6", "linux/arm/v7"], "linux/arm/v7"),
        ("linux/arm/v6", ["linux/arm/v7", "linux/arm/v6"], "linux/arm/v6"),
        ("linux/amd64", ["windows/amd64", "linux/arm64"], ""),
    ],
)
@on_reactor
async def test_machine_platform_is_matched_by_variant(
    demands_on: Callable[[str], Demands], machine: str, platforms: list[str], wanted: str
) -> None:
    demands = demands_on(machine)
    images = {platform: image_of(platform.encode(), platform.encode() * 2) for platform in platforms}
    await demands.get(index_of(*((one, platform) for platform, one in images.items())), tag="1")
    await demands.get(*images.values())
    await demands.wait()
    assert demands.completing == ([images[wanted].digest] if wanted else [])
    assert demands.pending == []


@on_reactor
async def test_best_requested_variant_is_wanted(demands_on: Callable[[str], Demands]) -> None:
    demands = demands_on("linux/arm")
    v6 = image_of(b"config of v6", b"layer of v6")
    v7 = image_of(b"config of v7", b"layer of v7")
    await demands.get(index_of((v7, "linux/arm/v7"), (v6, "linux/arm/v6"), (S390X, "linux/s390x")), tag="1")
    await demands.get(v6, S390X)
    await demands.wait()
    assert demands.completing == [v6.digest]


@on_reactor
async def test_two_images_of_one_platform_count_as_one_platform(demands: Demands) -> None:
    other = image_of(b"another config of arm64", b"another layer of arm64")
    await demands.get(index_of((ARM64, "linux/arm64"), (other, "linux/arm64"), (AMD64, "linux/amd64")), tag="1")
    await demands.get(ARM64, other)
    await demands.wait()
    assert demands.completing == sorted([other.digest, "linux/arm64"])


@pytest.mark.parametrize(("asked", "wanted"), [([ARM64], ["linux/arm64"]), ([ARM64, AMD64], [])])
@on_reactor
async def test_images_without_platform_count_separately(
    demands: Demands, asked: list[Manifest], wanted: list[str]
) -> None:
    await demands.get(index_of((AMD64, ""), (ARM64, "")), tag="1")
    await demands.get(*asked)
    await demands.wait()
    assert (demands.completing, demands.pending) == (wanted, [])


@on_reactor
async def test_attestation_counts_as_no_platform(demands: Demands) -> None:
    await demands.get(INDEX, tag="1")
    await demands.get(ARM64, ATTESTATION)
    await demands.wait()
    assert (demands.completing, demands.pending) == (["linux/arm64"], [])
    await demands.get(ATTESTATION)
    assert demands.pending == ["unknown/unknown"]
    await demands.wait()
    assert (demands.completing, demands.pending) == (["linux/arm64"], [])


@on_reactor
async def test_each_request_for_index_or_image_restarts_the_timer(demands: Demands) -> None:
    await demands.get(INDEX, tag="1")
    await demands.get(AMD64)
    for again in (INDEX, ARM64, AMD64, INDEX):
        await demands.wait(20)
        assert demands.completing == []
        await demands.get(again, tag="1" if again is INDEX else "", hit=True)
    await demands.wait(29.875)
    assert (demands.completing, demands.pending) == ([], ["linux/amd64", "linux/arm64"])
    await demands.wait(0.125)
    assert (demands.completing, demands.pending) == (["linux/amd64"], [])


@on_reactor
async def test_wanted_image_counts_as_requested_platform(demands: Demands) -> None:
    await demands.get(INDEX, tag="1")
    await demands.get(S390X)
    await demands.wait()
    assert demands.completing == ["linux/s390x"]
    await demands.get(S390X, ARM64)
    await demands.wait()
    assert (demands.completing, demands.pending, demands.wanted(ARM64)) == (["linux/s390x"], [], [False])
    # Requested alone, it is the only platform.
    await demands.get(ARM64)
    await demands.wait()
    assert demands.completing == ["linux/arm64", "linux/s390x"]


@on_reactor
async def test_cache_hit_counts_as_request(demands: Demands, store: Store) -> None:
    for one in (INDEX, AMD64, ARM64):
        await store.keep(one, image(f"{APP}@{one.digest}"), wanted=None if one.is_list else False)
    await demands.get(INDEX, ARM64, hit=True)
    assert demands.pending == ["linux/arm64"]
    await demands.wait()
    assert demands.completing == ["linux/arm64"]


@on_reactor
async def test_wanted_image_requested_again_is_checked_for_missing_blobs(demands: Demands, store: Store) -> None:
    await demands.get(INDEX, tag="1")
    await demands.get(ARM64)
    await demands.get_layers(OWN_ARM64)
    await demands.completion.drop(ARM64.digest)
    await demands.get(ARM64, hit=True)
    assert (demands.completing, demands.pending) == (["linux/arm64"], [])


# With a requested layer


@on_reactor
async def test_layer_unique_to_an_image_decides_immediately(demands: Demands) -> None:
    await demands.get(INDEX, tag="1")
    await demands.get(*ALL)
    await demands.get_layers(OWN_ARM64)
    assert (demands.completing, demands.pending) == (["linux/arm64"], [])
    assert demands.wanted(*ALL) == [False, True, False, False]
    await demands.wait()
    assert demands.completing == ["linux/arm64"]
    assert demands.wanted(*ALL) == [False, True, False, False]


@on_reactor
async def test_shared_layer_does_not_decide(demands: Demands) -> None:
    await demands.get(INDEX, tag="1")
    await demands.get(*ALL)
    await demands.get_layers(SHARED)
    assert (demands.completing, demands.pending) == ([], FOUR)
    await demands.wait()
    assert demands.completing == ["linux/amd64"]


@on_reactor
async def test_config_does_not_decide(demands: Demands) -> None:
    await demands.get(INDEX, tag="1")
    await demands.get(*ALL)
    await demands.get_layers(b"config of arm64", b"config of s390x")
    assert (demands.completing, demands.pending) == ([], FOUR)


@on_reactor
async def test_layer_requested_before_other_manifests(demands: Demands) -> None:
    await demands.get(INDEX, tag="1")
    await demands.get(ARM64)
    await demands.get_layers(OWN_ARM64)
    await demands.get(AMD64, S390X, ATTESTATION)
    assert (demands.completing, demands.pending) == (["linux/arm64"], [])
    await demands.wait()
    assert (demands.completing, demands.wanted(AMD64, S390X)) == (["linux/arm64"], [False, False])


@on_reactor
async def test_every_image_with_a_requested_layer_is_wanted(demands: Demands) -> None:
    await demands.get(INDEX, tag="1")
    await demands.get(*ALL)
    # All layers are requested at once, while the first image is still being recorded.
    await demands.get_layers(OWN_S390X, OWN_ARM64, SHARED, OWN_AMD64, IN_TOTO)
    assert (demands.completing, demands.pending, demands.wanted(*ALL)) == (FOUR, [], [True] * 4)


@on_reactor
async def test_layer_requested_while_another_image_is_dropped(
    demands: Demands, monkeypatch: pytest.MonkeyPatch
) -> None:
    drop, begun, ended = demands.completion.drop, list[Digest](), list[Digest]()

    async def drop_slowly(digest: Digest) -> None:
        begun.append(digest)
        if len(begun) == 1:
            others = {one.digest: layer for layer, one in OWN.items() if one.digest != digest}
            demands.ask_for_layers(*others.values())
            await until(lambda: set(demands.store.pending) == others.keys())
        await drop(digest)
        ended.append(digest)

    await demands.get(INDEX, tag="1")
    await demands.get(*ALL)
    monkeypatch.setattr(demands.completion, "drop", drop_slowly)
    demands.ask_for_layers(OWN_ARM64)
    await until(lambda: begun and begun[0] in ended)
    await settle(demands.store)
    assert (demands.pending, demands.completing) == ([], sorted(set(FOUR) - set(names(begun[:1]))))


@pytest.mark.parametrize("platform", ["linux/amd64", "linux/arm64"])
@on_reactor
async def test_layer_requested_while_images_are_decided(
    demands: Demands, monkeypatch: pytest.MonkeyPatch, platform: str
) -> None:
    """The other image may or may not have the wanted platform."""
    other = image_of(b"another config", b"another layer")
    complete, begun, ended = demands.completion.complete, list[Digest](), list[Digest]()

    async def complete_slowly(digest: Digest, repository: Repository, *, hit: bool = True) -> None:
        begun.append(digest)
        if len(begun) == 1:
            demands.ask_for_layers(b"another layer" if digest == AMD64.digest else OWN_AMD64)
            await until(lambda: demands.store.pending)
        await complete(digest, repository, hit=hit)
        ended.append(digest)

    await demands.get(index_of((AMD64, "linux/amd64"), (other, platform)), tag="1")
    await demands.get(AMD64, other)
    monkeypatch.setattr(demands.completion, "complete", complete_slowly)
    await demands.wait()
    await until(lambda: begun and begun[0] in ended)
    await settle(demands.store)
    assert (set(demands.store.pending), demands.pending) == ({AMD64.digest, other.digest}, [])
    assert len(begun) == 2


@on_reactor
async def test_layer_of_attestation_makes_only_it_wanted(demands: Demands) -> None:
    await demands.get(INDEX, tag="1")
    await demands.get(*ALL)
    await demands.get_layers(IN_TOTO)
    assert (demands.completing, demands.pending) == (["unknown/unknown"], FOUR[:3])
    await demands.wait()
    assert demands.completing == ["linux/amd64", "unknown/unknown"]


@on_reactor
async def test_later_requested_layer_makes_its_image_wanted(demands: Demands) -> None:
    await demands.get(INDEX, tag="1")
    await demands.get(*ALL)
    await demands.wait()
    assert demands.completing == ["linux/amd64"]
    await demands.get_layers(OWN_S390X)
    assert demands.completing == ["linux/amd64", "linux/s390x"]


@on_reactor
async def test_layer_of_wanted_image_drops_pending_others(demands: Demands) -> None:
    await demands.get(INDEX, tag="1")
    await demands.get(ARM64)
    await demands.wait()
    await demands.get(*ALL)
    assert demands.pending == ["linux/amd64", "linux/s390x", "unknown/unknown"]
    await demands.get_layers(OWN_ARM64)
    assert (demands.completing, demands.pending) == (["linux/arm64"], [])
    await demands.wait()
    assert demands.completing == ["linux/arm64"]


# Full disk


@on_reactor
async def test_full_disk_is_one_log_line_and_decision_is_made(
    demands: Demands, store: Store, events: list[LogEvent], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    await demands.get(INDEX, tag="1")
    with monkeypatch.context() as patch:
        patch.setattr(PendingFiles, "write", fail)
        await demands.get(ARM64)
    assert texts(events, LogLevel.error) == [
        f"cannot record that {ARM64.digest} is pending: No space left on device",
    ]
    assert set(store.undecided) == {ARM64.digest}
    await demands.wait()
    assert demands.completing == ["linux/arm64"]


@on_reactor
async def test_blob_of_no_image_is_ignored(demands: Demands, store: Store) -> None:
    await demands.get(INDEX, tag="1")
    await demands.get_layers(b"unknown")
    demands.demand.blob_requested(image(f"{APP}:1").repository, Digest.of(b"unknown too"))
    await settle(store)
    assert (demands.completing, demands.pending) == ([], [])


@on_reactor
async def test_layer_shared_by_many_images_needs_few_lookups(
    demands: Demands, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hit on a base layer must not look at every image built on that base."""
    await demands.get(INDEX, tag="1")
    await demands.get(AMD64)
    for number in range(200):
        await store.keep(image_of(b"%d" % number, OWN_AMD64), image(f"{APP}/{number}:1"), wanted=False)
    await settle(store)
    lookups = list[Digest]()
    entry = store.entry

    def recorded_entry(digest: Digest) -> object:
        lookups.append(digest)
        return entry(digest)

    monkeypatch.setattr(store, "entry", recorded_entry)
    demands.ask_for_layers(OWN_AMD64)
    assert len(lookups) < 50
    await settle(store)
    assert demands.completing == ["linux/amd64"]
