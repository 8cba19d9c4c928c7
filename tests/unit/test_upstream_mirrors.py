"""Bad bodies of mirrors: the next source is asked, the registry last, and the mirror is not asked for a while."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from twisted.internet.defer import Deferred
from twisted.logger import LogEvent, LogLevel

from ociregistry.errors import Unavailable
from ociregistry.manifests import OCI_INDEX
from ociregistry.names import Digest, Tag
from ociregistry.upstream.paging import TagPage
from tests.unit.support.bodies import ScriptedAnswer
from tests.unit.support.common import failed, fired, texts
from tests.unit.test_upstream_client import OK
from tests.unit.test_upstream_registry import APP, BY_DIGEST, GOOD, IMAGE, LAYER, TAGGED
from tests.unit.test_upstream_registry_mirrors import DOWN, ONE, OWN, TWO, MirroredRegistry

HTML: Mapping[str, Any] = {"data": b"<html>Please log in.</html>", "headers": {"Content-Type": "text/html"}}
DISGUISED: Mapping[str, Any] = {**GOOD, "data": HTML["data"]}
BAD: dict[str, Mapping[str, Any]] = {
    "nothing": {**GOOD, "data": b""},
    "other bytes": {**GOOD, "data": IMAGE.data + b" "},
    "part": {**GOOD, "data": IMAGE.data[:100]},
    "page": HTML,
    "page by another name": DISGUISED,
}


def manifest(mirrored: MirroredRegistry, asked: Any = TAGGED) -> Deferred[Any]:
    """Ask for a manifest."""
    return Deferred.fromCoroutine(mirrored.registry.manifest(asked))


def warnings(events: list[LogEvent]) -> list[str]:
    """Return the log lines at level warn."""
    return texts(events, LogLevel.warn)


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD.keys())
@pytest.mark.parametrize("asked", [TAGGED, BY_DIGEST])
def test_next_source_is_asked_after_bad_manifest(asked: Any, bad: Mapping[str, Any], events: list[LogEvent]) -> None:
    """containerd fails for ever with such a mirror (containerd/containerd#7400, #9552)."""
    mirrored = MirroredRegistry(bad, {"status": 404}, GOOD)
    assert fired(manifest(mirrored, asked)) == IMAGE
    assert set(mirrored.asked) == {"one", "two", "reg"}
    (line,) = warnings(events)
    assert line.startswith(f"mirror {ONE} is not asked for 10 s: ")


REFERRERS: Mapping[str, Any] = {
    "data": b'{"schemaVersion": 2, "manifests": []}',
    "headers": {"Content-Type": OCI_INDEX},
}


@pytest.mark.parametrize("data", [b"", b"{}", REFERRERS["data"][:-2]])
@pytest.mark.parametrize("before", [[], [{"status": 404}]], ids=["API", "tag"])
def test_next_source_is_asked_after_bad_list_of_referrers(
    before: list[ScriptedAnswer], data: bytes, events: list[LogEvent]
) -> None:
    first, *more = [*before, {**REFERRERS, "data": data}]
    mirrored = MirroredRegistry(first, {"status": 404}, None, *more)
    mirrored.http._script[OWN] = [*before, REFERRERS]
    found = fired(Deferred.fromCoroutine(mirrored.registry.referrers(APP, Digest(IMAGE.digest))))
    assert found.data == REFERRERS["data"]
    (line,) = warnings(events)
    assert line.startswith(f"mirror {ONE} is not asked for 10 s: ")


def test_next_source_may_be_a_mirror() -> None:
    mirrored = MirroredRegistry(DISGUISED, GOOD, DOWN)
    assert fired(manifest(mirrored)) == IMAGE
    assert "reg" not in mirrored.asked


def test_bad_manifest_of_registry_is_an_error(events: list[LogEvent]) -> None:
    mirrored = MirroredRegistry(DISGUISED, DISGUISED, DISGUISED)
    assert "no valid manifest" in failed(manifest(mirrored), Unavailable).message
    assert mirrored.asked.count("reg") == 1
    assert len(warnings(events)) == 2


def test_pause_of_mirror_doubles(events: list[LogEvent]) -> None:
    mirrored = MirroredRegistry(DISGUISED, {"status": 404}, GOOD)
    for number, seconds in enumerate([10, 20, 40, 80, 160, 320, 640, 1280, 2560, 3600, 3600], 1):
        for wait in (0, seconds - 0.5):
            mirrored.clock.advance(wait)
            fired(manifest(mirrored))
            assert mirrored.asked.count("one") == number
        assert len(warnings(events)) == number
        assert warnings(events)[-1].startswith(f"mirror {ONE} is not asked for {seconds} s: ")
        mirrored.clock.advance(0.5)


def test_pause_starts_again_after_an_hour_without_failure(events: list[LogEvent]) -> None:
    mirrored = MirroredRegistry(DISGUISED, {"status": 404}, GOOD)
    for wait in (0, 10, 20, 3600):
        mirrored.clock.advance(wait)
        fired(manifest(mirrored))
    told = [line.partition(": ")[0].removeprefix(f"mirror {ONE} is not asked for ") for line in warnings(events)]
    assert told == ["10 s", "20 s", "40 s", "80 s"]
    mirrored.clock.advance(80 + 3600)
    fired(manifest(mirrored))
    assert warnings(events)[-1].startswith(f"mirror {ONE} is not asked for 10 s: ")


def test_concurrent_responses_count_as_one_failure(events: list[LogEvent]) -> None:
    mirrored = MirroredRegistry(OK, OK, OK)
    streams = [fired(Deferred.fromCoroutine(mirrored.registry.blob(APP, LAYER))) for _ in range(3)]
    assert [stream.source.failed("wrong bytes") for stream in streams] == [True] * 3
    assert warnings(events) == [f"mirror {ONE} is not asked for 10 s: wrong bytes"]
    mirrored.clock.advance(10)
    fired(mirrored.ask())
    assert mirrored.asked == ["one"] * 4


def test_mirror_with_bad_blob_is_not_asked_for_manifests() -> None:
    mirrored = MirroredRegistry(OK, GOOD, OK)
    stream = fired(Deferred.fromCoroutine(mirrored.registry.blob(APP, LAYER)))
    assert stream.source.failed("wrong bytes")
    assert fired(manifest(mirrored)) == IMAGE
    assert mirrored.asked == ["one", "two"]


def test_registry_distrusts_mirrors_while_one_is_paused() -> None:
    mirrored = MirroredRegistry(OK, {"status": 404}, OK)
    mirror = fired(Deferred.fromCoroutine(mirrored.registry.blob(APP, LAYER))).source
    mirror.failed("wrong bytes")
    own = fired(Deferred.fromCoroutine(mirrored.registry.blob(APP, LAYER))).source
    assert mirrored.asked == ["one", "two", "reg"]
    assert (mirror.is_mirror, own.is_mirror) == (True, False)
    assert own.distrusts_mirrors
    mirrored.clock.advance(10)
    assert not own.distrusts_mirrors


def test_registry_is_never_paused(events: list[LogEvent]) -> None:
    mirrored = MirroredRegistry({"status": 404}, {"status": 404}, OK)
    for _ in range(2):
        stream = fired(Deferred.fromCoroutine(mirrored.registry.blob(APP, LAYER)))
        assert not stream.source.failed("wrong bytes")
    assert mirrored.asked == ["one", "two", "reg"] * 2
    assert warnings(events) == []


@pytest.mark.parametrize("path", ["blobs/x", "manifests/1", "tags/list"])
def test_html_page_pauses_mirror(path: str, events: list[LogEvent]) -> None:
    mirrored = MirroredRegistry(HTML, OK, OK)
    for _ in range(2):
        assert fired(mirrored.ask(path)).upstream == "reg.example"
    assert mirrored.asked == ["one", "two", "two"]
    assert len(warnings(events)) == 1


@pytest.mark.parametrize(("status", "path"), [(200, "referrers/x"), (404, "blobs/x"), (503, "blobs/x")])
def test_html_page_that_pauses_no_mirror(status: int, path: str, events: list[LogEvent]) -> None:
    """ghcr.io has no referrers API, and redirects to a page of its website; error pages are errors."""
    mirrored = MirroredRegistry({**HTML, "status": status}, OK, OK)
    for _ in range(2):
        fired(mirrored.ask(path))
    assert mirrored.asked == ["one", "two"] * 2
    assert warnings(events) == []


def test_error_names_paused_mirrors() -> None:
    mirrored = MirroredRegistry(DISGUISED, {"status": 404}, DOWN)
    message = failed(manifest(mirrored), Unavailable).message
    assert message.startswith(f"mirror {ONE}: not asked for 10 s: {TAGGED}: the upstream sent no valid ")
    assert message.endswith(f"; mirror {TWO}: it answered 404; registry reg.example: {DOWN.message}")


@pytest.mark.parametrize(
    "bad", [{"data": b""}, {"data": b"<html>"}, {"data": b'{"tags": ["one"'}, {"data": b'{"tags": [1]}'}]
)
def test_next_source_is_asked_after_bad_list_of_tags(bad: ScriptedAnswer) -> None:
    mirrored = MirroredRegistry(bad, {"status": 404}, {"data": b'{"tags": ["one"]}'})
    page = fired(Deferred.fromCoroutine(mirrored.registry.tags(APP)))
    assert page == TagPage((Tag("one"),))


def test_next_source_is_asked_after_bad_manifest_in_place_of_head() -> None:
    mirrored = MirroredRegistry({"status": 405}, {"status": 404}, {**GOOD, "data": b""}, DISGUISED)
    assert fired(Deferred.fromCoroutine(mirrored.registry.manifest_digest(TAGGED))) == IMAGE.digest
