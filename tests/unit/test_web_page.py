"""The page for the operator as HTML: what it says of a status, and that all text is escaped."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from datetime import timedelta
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from twisted.web.template import Tag, flattenString

import ociregistry.web
from ociregistry.admin.errors import LoggedError
from ociregistry.admin.images import ROWS, Selected, Selection, select
from ociregistry.admin.requests import Kind, Outcome, Requests
from ociregistry.admin.status import DownloadState, IncompleteImage, IncompleteState, Status
from ociregistry.names import Digest
from ociregistry.pullthrough.loader import PreloadProgress
from ociregistry.pullthrough.maintenance import MaintenanceState
from ociregistry.store.listing import ListedImage, Listing, Order
from ociregistry.store.lookups import Counts
from ociregistry.store.space import Room
from ociregistry.upstream.bandwidth import BandwidthLimit
from ociregistry.upstream.breaker import LinkState
from ociregistry.web.page import image_list, live, page
from tests.unit.support.statuses import STARTED, STATUS

NOW = STARTED + timedelta(hours=26)
IMAGE = Digest.of(b"image")
HOSTILE = "<script>alert('1')</script>\"&amp;"
STATIC = {"icon.svg": "icon.svg?1", "page.css": "page.css?2", "page.js": "page.js?3"}
ALL = Selection()
_VOID = frozenset({"meta", "link", "input", "br"})


class Parsed(HTMLParser):
    """Parses HTML strictly: each element is closed in turn, and no id is there twice."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, Mapping[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []
        ids = [attributes["id"] for _, attributes in self.elements if "id" in attributes]
        assert len(ids) == len(set(ids))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in _VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in _VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        """All text, with single spaces."""
        return " ".join(" ".join(self.words).split())

    def all(self, name: str) -> list[Mapping[str, str | None]]:
        """Return the attributes of all elements with this name."""
        return [attributes for tag, attributes in self.elements if tag == name]


def html(tag: Tag) -> Parsed:
    """Return what the tag is as HTML."""
    done: list[bytes] = []
    flattenString(None, tag).addCallback(done.append)
    return Parsed(done[0].decode())


def shown(**changes: Any) -> Parsed:
    """Return the changing part for the status with these changes."""
    return html(live(replace(STATUS, **changes), NOW))


def chosen(*images: ListedImage, selection: Selection = ALL) -> Selected:
    """Return the page of these images that is selected."""
    return select(Listing({order: sorted(images, key=lambda one: one.url) for order in Order}), selection)


def stored(url: str, **changes: Any) -> ListedImage:
    """Return a stored image."""
    pulled = NOW - timedelta(minutes=5)
    return replace(ListedImage(url, False, 12_300_000, STARTED, pulled, (IMAGE,)), **changes)


def whole(status: Status = STATUS, selected: Selected | None = None) -> Parsed:
    """Return the whole page."""
    return html(page(status, NOW, selected or chosen(stored("reg.example/app:1")), {}, STATIC))


def test_state_in_one_line() -> None:
    assert "well 1 of 2 links down, 3 downloads, 4 images lack 5 B" in shown().text
    up = tuple(link for link in STATUS.links if link.up)
    fine = shown(links=up, downloads=(), incomplete=IncompleteState(0, 0))
    assert "well 1 link up, nothing is missing" in fine.text
    assert "4 images lack 5 B, air-gapped" in shown(air_gapped=True).text
    bad = shown(reasons=("the disk is full", "a link is down"))
    assert "degraded 1 of 2" in bad.text
    assert "the disk is full" in bad.text
    assert "stopping 1 of 2" in shown(stopping=True).text
    assert bad.all("div")[0]["data-title"] == "degraded · ociregistry"


def test_figures() -> None:
    requests = Requests()
    for outcome, count in ((Outcome.HIT, 3), (Outcome.MISS, 1), (Outcome.SERVER_ERROR, 2)):
        for _ in range(count):
            requests.tally(Kind.BLOB, outcome).count_at_once(1_000_000, 0.1)
    requests.tally(Kind.OTHER, Outcome.NONE).count_at_once(0, 0.1)
    text = shown(
        requests=requests, disk=Room(10_000_000, 2_500_000, 100, full=False), bandwidth=BandwidthLimit(250_000.0)
    ).text
    assert "75% hits 3 hits, 1 miss, 2 failed" in text
    assert "Disk free 2.5 MB 7.5 MB of 10.0 MB used 100 B kept free" in text
    assert "Store 1.2 kB 3 images, 2 lists" in text
    assert "Received 12 B 6.0 MB sent to clients" in text
    assert "250.0 kB/s at all times" in text
    assert "Up for 26 h 0 min 3 requests in flight" in text
    assert "Store 1.2 kB 1 image, 1000 lists" in shown(records=Counts(lists=1000, images=1)).text
    text = shown(usage=None, disk=Room(500, 160, 100, full=True), bandwidth=BandwidthLimit(None, "08:00-18:00")).text
    assert "full: 60 B beside the reserve" in text
    assert "Store measuring" in text
    assert "no limit 08:00-18:00" in text
    assert "no pulls yet" in text


def test_links_that_are_down_come_first() -> None:
    links = (
        LinkState("a.example:443", True, True, 5.0, "", None),
        LinkState("b.example:443", True, False, 3725.0, "no route", 12.4, wanted=True),
        LinkState("c.example:443", True, False, 5.0, "refused", 0.2, wanted=True),
        LinkState("d.example:443", False, False, 5.0, "silent", 30.0),
    )
    text = shown(links=links).text
    assert "b.example:443 down 62 min in 12 s no route c.example:443 down 5 s now refused" in text
    assert "d.example:443 down 5 s when it is wanted silent a.example:443 up 5 s" in text
    many = tuple(LinkState(f"{number}.example:443", False, True, 1.0, "", None) for number in range(60))
    assert "and 10 other links" in shown(links=many).text


def test_downloads_have_bars_rates_and_time_left() -> None:
    known = DownloadState(str(IMAGE), "r.example/a", "r.example", 25, 100, 2, STARTED, 5.0, 15, "r.example/a:1")
    unknown = DownloadState("sha256:00", "r.example/b", "r.example", 7, None, 0, STARTED)
    found = shown(downloads=(known, unknown))
    _, *bars = found.all("progress")
    assert bars[0] == {"value": "25", "max": "100", "aria-label": "25 B of 100 B"}
    assert f"r.example/a:1 {str(IMAGE)[:19]} 25 B of 100 B 25 B of 100 B 5 B/s 15 s 2 clients" in found.text
    assert "r.example/b sha256:00 7 B background" in found.text


def test_incomplete_images() -> None:
    incomplete = IncompleteState(images=3, bytes=3_000_000, pending=1, indexes=2, seconds_left=95)
    images = (IncompleteImage("r.example/a:1", str(IMAGE), 2_000_000),)
    text = shown(incomplete=incomplete, incomplete_images=images).text
    assert "3.0 MB in all, at the present rate here in 95 s." in text
    assert "Of 1 image it is still open whether they are wanted." in text
    assert f"r.example/a:1 {str(IMAGE)[:19]} 2.0 MB and 2 other images" in text
    text = shown(incomplete=IncompleteState(0, 0), incomplete_images=()).text
    assert "Every image that was pulled is complete." in text


def test_newest_errors_come_first() -> None:
    errors = tuple(
        LoggedError(NOW - timedelta(seconds=60 - at), "ociregistry.web", f"fault {at}.") for at in range(15)
    )
    found = shown(errors=errors)
    assert "46 s ago fault 14. 47 s ago fault 13." in found.text
    assert "fault 5. 5 older 56 s ago fault 4." in found.text
    assert [one["id"] for one in found.all("details")] == ["older"]
    assert "None since the start." in shown(errors=()).text


def test_maintenance() -> None:
    maintenance = MaintenanceState(
        last_prune=NOW - timedelta(hours=3),
        next_prune=NOW + timedelta(hours=21),
        pruned_image_urls=3,
        pruned_bytes=5_000_000,
        prune_refused="the clock is wrong",
        next_verify=NOW + timedelta(days=6),
        verified_blobs=8,
        verified_records=1,
        damaged=2,
        repaired=1,
    )
    found = shown(maintenance=maintenance, preload=PreloadProgress(images=9, loaded=5, failed=1))
    assert (
        "last 3 h 0 min ago , next in 21 h 0 min; 3 image URLs and 5.0 MB pruned since the start the clock"
        in found.text
    )
    assert "next in 6 d 0 h; 2 of 8 blobs and 1 record damaged, 1 repaired" in found.text
    assert [one["value"] for one in found.all("progress") if one["max"] == "9"] == ["6"]
    assert "5 of 9 images, 1 failed" in found.text
    assert "Nothing is scheduled." in shown(maintenance=MaintenanceState(), preload=None).text


def test_images_have_their_facts() -> None:
    found = html(image_list(chosen(stored("reg.example/app:1")), {IMAGE: 2_000_000}, NOW))
    assert "Image URLs: 1 " in found.text
    assert "reg.example/app:1 12.3 MB lacks 2.0 MB 26 h 0 min ago 5 min ago" in found.text
    assert [one["data-name"] for one in found.all("td")] == ["Size", "Created", "Last pulled"]
    assert {"scope": "row"} in found.all("th")
    assert [one["title"] for one in found.all("time")] == ["2026-03-01 22:17:30 UTC", "2026-03-03 00:12:30 UTC"]
    assert "no image" in html(image_list(chosen(stored("a:1", images=())), {}, NOW)).text
    assert "No image is stored yet." in html(image_list(chosen(), {}, NOW)).text
    searched = chosen(stored("a:1"), selection=Selection("b"))
    assert "Image URLs: 0 of 1 No image URL contains this." in html(image_list(searched, {}, NOW)).text


def test_links_of_the_list_keep_what_is_selected() -> None:
    images = [stored(f"app{number}:1") for number in range(3 * ROWS)]
    selected = chosen(*images, selection=Selection("app :1", Order.SIZE, descending=True, page=2))
    found = html(image_list(selected, {}, NOW))
    links = {one["id"]: one["href"] for one in found.all("a")}
    assert links == {
        "by-url": "?search=app+%3A1&sort=url&page=1",
        "by-size": "?search=app+%3A1&sort=size&page=1",
        "by-created": "?search=app+%3A1&sort=-created&page=1",
        "by-pulled": "?search=app+%3A1&sort=-pulled&page=1",
        "previous": "?search=app+%3A1&sort=-size&page=1",
        "next": "?search=app+%3A1&sort=-size&page=3",
    }
    assert [one["aria-sort"] for one in found.all("th") if "aria-sort" in one] == ["descending"]
    assert "Image URLs: 300 of 300, page 2 of 3" in found.text


def test_whole_page() -> None:
    found = whole()
    assert found.all("html") == [{"lang": "en"}]
    assert [one for tag, one in found.elements if tag == "h1"] == [{}]
    ids = {one.get("id") for _, one in found.elements}
    assert {(link["href"] or "#").removeprefix("#") for link in found.all("a")[:6]} <= ids
    # Tables have a caption and heads; each form field has a label.
    assert len(found.all("caption")) == len(found.all("table")) == 4
    assert all(one.get("scope") in ("col", "row") for one in found.all("th"))
    assert [one["for"] for one in found.all("label")] == ["search"]
    assert found.all("p")[0]["hidden"] == "hidden"


@pytest.mark.parametrize("selection", [ALL, Selection("app"), Selection(page=2), Selection(descending=True)])
def test_page_reloads_itself_only_if_nothing_is_selected(selection: Selection) -> None:
    images = [stored(f"app{number}:1") for number in range(2 * ROWS)]
    reloads = [one for one in whole(selected=chosen(*images, selection=selection)).all("meta") if "http-equiv" in one]
    assert [one["content"] for one in reloads] == (["3"] if selection == ALL else [])


def test_nothing_comes_from_elsewhere() -> None:
    """No script or style is in the page itself, where its policy would forbid it."""
    found = whole()
    assert [one["src"] for one in found.all("script")] == ["page.js?3"]
    assert [one["href"] for one in found.all("link")] == ["icon.svg?1", "page.css?2"]
    assert not found.all("style")
    for _, attributes in found.elements:
        assert not [name for name in attributes if name.startswith("on") or name == "style"]
        for name in ("href", "src", "action"):
            assert "//" not in (attributes.get(name) or "")
    for path in (Path(ociregistry.web.__file__).parent / "static").iterdir():
        text = path.read_text(encoding="utf-8").replace('xmlns="http://www.w3.org/2000/svg"', "")
        assert not re.search(r"https?:|@import|url\(|\beval\b|innerHTML", text), path


def test_all_text_is_escaped() -> None:
    state = replace(
        STATUS,
        version=HOSTILE,
        reasons=(HOSTILE,),
        links=tuple(replace(link, host=HOSTILE, why=HOSTILE) for link in STATUS.links[:1]),
        downloads=(replace(STATUS.downloads[0], blob=HOSTILE, repository=HOSTILE, image=HOSTILE, upstream=HOSTILE),),
        incomplete_images=(IncompleteImage(HOSTILE, HOSTILE, 5),),
        bandwidth=BandwidthLimit(1.0, HOSTILE),
        maintenance=MaintenanceState(next_prune=NOW, prune_refused=HOSTILE),
        errors=tuple(LoggedError(NOW, HOSTILE, HOSTILE) for _ in range(20)),
    )
    selected = chosen(stored(HOSTILE), selection=Selection(HOSTILE))
    found = whole(state, replace(selected, rows=[stored(HOSTILE)]))
    assert len(found.all("script")) == 1
    assert found.text.count("<script>alert('1')</script>\"&amp;") >= 27
    (field,) = [one for one in found.all("input") if one["name"] == "search"]
    assert field["value"] == HOSTILE


def luminance(color: str) -> float:
    """Return the relative luminance of `#rgb` or `#rrggbb`, as WCAG 2 defines it."""
    digits = color.lstrip("#")
    digits = "".join(digit * 2 for digit in digits) if len(digits) == 3 else digits
    parts = [int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", [0, 1])
def test_text_has_contrast(scheme: int) -> None:
    """By day and by night, at least 4.5 to 1 (WCAG 2, level AA); a bar at least 3 to 1."""
    css = (Path(ociregistry.web.__file__).parent / "static" / "page.css").read_text(encoding="utf-8")
    blocks = re.findall(r":root \{([^}]*)\}", css)
    colors = dict(re.findall(r"--([a-z-]+): (#[0-9a-f]+);", blocks[scheme]))
    assert len(blocks) == 2

    def contrast(text: str, back: str) -> float:
        light, dark = sorted((luminance(colors[text]), luminance(colors[back])), reverse=True)
        return (light + 0.05) / (dark + 0.05)

    for text in ("text", "dim", "link"):
        for back in ("page", "card"):
            assert contrast(text, back) >= 4.5, (text, back)
    for name in ("good", "bad", "warn"):
        assert contrast(name, f"{name}-back") >= 4.5, name
    assert contrast("bar", "line") >= 3
