"""The status on a terminal: every fact is there, no line is too wide, and nothing from outside has an effect."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ociregistry.admin.errors import LoggedError
from ociregistry.admin.requests import Kind, Outcome, Requests
from ociregistry.admin.status import Status, document
from ociregistry.admin.terminal import Paper, columns, lines, sentence
from ociregistry.pullthrough.maintenance import MaintenanceState
from ociregistry.upstream.bandwidth import BandwidthLimit
from ociregistry.upstream.breaker import LinkState
from tests.unit.support.statuses import PULLED, STARTED, STATUS

NOW = STARTED + timedelta(hours=3, minutes=5)
pytestmark = pytest.mark.usefixtures("utc_plus_one")


def told(status: Status = STATUS) -> dict[str, Any]:
    """Return the status as JSON."""
    found: dict[str, Any] = json.loads(json.dumps(document(status, NOW)))
    return found


def shown(width: int = 80, **changes: Any) -> list[str]:
    """Return the lines for the status with these changes."""
    return lines(told(replace(STATUS, **changes)), NOW, width, unicode=True)


def test_state_is_one_line() -> None:
    assert shown()[0] == "ociregistry 1.2.3: well, up 3 h 5 min"
    assert shown(air_gapped=True)[0] == "ociregistry 1.2.3: well, air-gapped, up 3 h 5 min"
    assert shown(stopping=True)[0] == "ociregistry 1.2.3: stopping, up 3 h 5 min"
    assert shown(reasons=("the disk is full",))[:2] == [
        "ociregistry 1.2.3: degraded, up 3 h 5 min",
        "! the disk is full",
    ]


def test_store_and_disk() -> None:
    assert shown()[1:6] == [
        "at        127.0.0.1:8080",
        "store     /srv/images",
        "          2 lists, 3 images, 1.2 kB in 8 blobs",
        "disk      10 B of 100 B free, 7 B kept in reserve",
        "missing   5 B of 4 images, 1 of them undecided, metadata of 6 lists",
    ]
    assert "          2 lists, 3 images" in shown(usage=None)
    assert "disk      1 B of 100 B free, 7 B kept in reserve, full" in shown(
        disk=replace(STATUS.disk, free=1, full=True)
    )
    nothing = replace(STATUS.incomplete, images=0, bytes=0, pending=0, indexes=0)
    assert "missing   nothing" in shown(incomplete=nothing)
    assert "missing   metadata of 1 list" in shown(incomplete=replace(nothing, indexes=1))
    complete_soon = replace(nothing, images=1, bytes=2000, seconds_left=600)
    assert "missing   2.0 kB of 1 image, here in 10 min" in shown(incomplete=complete_soon)


def test_answers() -> None:
    requests = Requests()
    for outcome, times in ((Outcome.HIT, 3), (Outcome.MISS, 1), (Outcome.CLIENT_ERROR, 1), (Outcome.SERVER_ERROR, 1)):
        for _ in range(times):
            requests.tally(Kind.BLOB, outcome).count(1000, 0.0, 0.0)
    assert "answers   3 hits, 1 miss, 2 errors, 6.0 kB sent, 12 B received" in shown(requests=requests)
    assert "answers   0 hits, 0 misses, 0 errors, 0 B sent, 12 B received" in shown()


def test_what_the_daemon_does_by_itself() -> None:
    assert "preload   5 of 9 images, 1 failed" in shown()
    assert not [line for line in shown(preload=None) if line.startswith("preload")]
    state = MaintenanceState(
        last_prune=STARTED,
        next_prune=NOW + timedelta(hours=50),
        pruned_image_urls=1,
        pruned_bytes=2000,
        next_verify=NOW + timedelta(minutes=2),
        damaged=2,
        repaired=1,
    )
    found = shown(maintenance=state)
    assert "prune     last 2026-03-01T23:17:30, next in 2 d 2 h, 1 image URL pruned, 2.0 kB" in found
    assert "          freed" in found
    assert "verify    next in 2 min, 2 damaged, 1 repaired" in found
    refused = shown(maintenance=MaintenanceState(prune_refused="9 of 10 images would be removed, which is too much"))
    assert "prune     refused by age: 9 of 10 images would be removed, which is too much" in refused
    assert not [line for line in shown(maintenance=MaintenanceState()) if line.startswith(("prune", "verify"))]


UP = LinkState("reg.example:443", True, True, 9.0, "", None)
DOWN = LinkState("down.example:443", True, False, 7.5, "no route to the host", 2.0, wanted=True)


def test_links_that_are_down_come_first() -> None:
    found = shown(links=(UP, DOWN, replace(DOWN, host="idle.example:443", wanted=False, why="")))
    assert found[found.index("links: 1 up, 2 down") :][:5] == [
        "links: 1 up, 2 down",
        "  down  down.example:443 for 8 s, next probe in 2 s",
        "        no route to the host",
        "  down  idle.example:443 for 8 s",
        "  up    reg.example:443 for 9 s",
    ]


def test_of_many_links_some_are_shown() -> None:
    """Those that are wanted among them."""
    many = tuple(replace(UP, host=f"reg{number}.example:443") for number in range(1000))
    lost = tuple(replace(DOWN, host=f"made-up{number}.example:443", wanted=False, why="") for number in range(1000))
    found = shown(links=(*many, *lost, DOWN))
    assert (
        found[found.index("links: 1000 up, 1001 down") :][1] == "  down  down.example:443 for 8 s, next probe in 2 s"
    )
    assert [sum(line.startswith(f"  {state} ") for line in found) for state in ("up", "down")] == [11, 11]
    assert {"  down  991 more", "  up    990 more"} <= set(found)


def test_no_link_and_no_download_take_no_line() -> None:
    assert not [line for line in shown(links=(), downloads=(), bandwidth=BandwidthLimit()) if ":" in line[:11]][1:]


def test_downloads() -> None:
    fast = replace(
        PULLED, bytes=52_000_000, size=100_000_000, rate=4_000_000.0, seconds_left=12, image="reg.example/app:1"
    )
    late = replace(PULLED, blob="sha256:00", size=None, clients=0)
    found = shown(downloads=(fast, late), bandwidth=BandwidthLimit(5_000_000.0, "08:00-18:00"))
    assert found[found.index("") :][:1] == [""]
    assert "downloads: 2, 4.0 MB/s, at most 5.0 MB/s from 08:00 to 18:00" in found
    at = found.index("  [##########----------]  52% 52.0 MB of 100.0 MB, 4.0 MB/s, 12 s left")
    assert found[at + 1 : at + 4] == [
        "  reg.example/app:1, 2 clients",
        "  [--------------------]   0% 30 B of unknown size",
        "  reg.example/app@sha256:00, background",
    ]


def test_bar_is_full_only_when_all_is_here() -> None:
    def bar(here: int) -> str:
        (line,) = [line for line in shown(downloads=(replace(PULLED, bytes=here),)) if "%" in line]
        return line.partition("%")[0]

    assert bar(99) == "  [###################-]  99"
    assert bar(100) == "  [####################] 100"


def test_last_errors() -> None:
    errors = tuple(LoggedError(STARTED, "ociregistry.web", f"failure {number}") for number in range(9))
    found = shown(errors=errors)
    assert found[found.index("last 5 of 9 errors:") :] == [
        "last 5 of 9 errors:",
        *(f"  2026-03-01T23:17:30 failure {number}" for number in range(4, 9)),
    ]
    assert "last errors:" in shown(errors=errors[:1])


def test_what_the_files_tell_is_enough() -> None:
    stopped = {
        "status": "stopped",
        "reasons": [],
        "version": "1.2.3",
        "store": {"path": "/srv/images", "lists": 1, "images": 2, "bytes": 1000, "blobs": 3},
        "disk": {"size": 9000, "free": 2000},
        "incomplete": {"images": 0, "bytes": 0, "pending": 0},
    }
    assert lines(stopped, NOW, 80, unicode=False) == [
        "ociregistry 1.2.3: no daemon runs; the files say",
        "store     /srv/images",
        "          1 list, 2 images, 1.0 kB in 3 blobs",
        "disk      2.0 kB of 9.0 kB free",
        "missing   nothing",
    ]


def test_long_names_are_shortened_in_the_middle() -> None:
    found = shown(store=f"/begin/{'x' * 200}/end")
    (line,) = [line for line in found if line.startswith("store")]
    assert len(line) == 80
    assert line.startswith("store     /begin/xxx")
    assert line.endswith("xxx/end")
    assert "..." in line


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("a\x1b[2Jb", r"a\x1b[2Jb"),
        ("a\nb\r\tc", r"a\nb\r\tc"),
        ("\x9b31m\x07\x7f", r"\x9b31m\x07\x7f"),
        ("right\u202eleft\u200b\u2066", r"right\u202eleft\u200b\u2066"),
        ("e\u0301\u20dd", r"e\u0301\u20dd"),
        ("\ud800\ue000\U000e0041", r"\ud800\ue000\U000e0041"),
        ("Geräte, 画像 …", "Geräte, 画像 …"),
    ],
)
def test_text_from_outside_has_no_effect(text: str, plain: str) -> None:
    assert Paper(80, unicode=True).plain(text) == plain


def test_terminal_without_unicode_gets_ascii() -> None:
    assert Paper(80, unicode=False).plain("Geräte, 画像 … \x1b") == r"Ger\xe4te, \u753b\u50cf ... \x1b"


def test_wide_characters_take_two_columns() -> None:
    assert (columns("画像"), columns("ä"), columns("ab")) == (4, 1, 2)
    shortened = Paper(80, unicode=True).middle("画" * 50, 21)
    assert columns(shortened) <= 21
    assert shortened.startswith("画画")
    assert shortened.endswith("画画")


def test_sentence_fits() -> None:
    found = sentence("the daemon on /x\n runs, but is silent", 30, unicode=False)
    assert found[0].startswith("the daemon on /x\\n runs")
    assert all(len(line) <= 30 for line in found)


def replaced(value: Any, text: Callable[[], str], key: str = "") -> Any:
    """Return a document in which each string that may come from outside is another one."""
    if isinstance(value, dict):
        return {one: replaced(inside, text, one) for one, inside in value.items()}
    if isinstance(value, list):
        return [replaced(inside, text, key) for inside in value]
    own = {"status", "outcome", "kind", "by", "since", "time", "started", "last_prune", "next_prune", "last_verify"}
    return text() if isinstance(value, str) and key not in own else value


FULL = replace(
    STATUS,
    reasons=("one", "another"),
    downloads=(replace(PULLED, image="x", rate=12.0, seconds_left=9), replace(PULLED, size=None)),
    links=(UP, DOWN),
    maintenance=MaintenanceState(prune_refused="x", last_verify=STARTED),
    bandwidth=BandwidthLimit(1.0, "08:00-18:00"),
    errors=(LoggedError(STARTED, "x", "y"),),
)


@given(st.data(), st.integers(1, 200), st.booleans())
def test_no_line_is_wider_or_has_an_effect(data: st.DataObject, width: int, unicode: bool) -> None:
    anything = st.text(max_size=300) | st.text("\x1b[2J\n\r\t\x9b …ä画", max_size=300)
    document = replaced(told(FULL), lambda: data.draw(anything))
    for line in lines(document, NOW, width, unicode=unicode):
        assert columns(line) <= width
        assert all(unicodedata.category(char) not in ("Cc", "Cf", "Cs", "Co", "Mn", "Me") for char in line)
        assert unicode or line.isascii()
