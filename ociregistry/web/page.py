"""The page for the operator, at `/` of the admin listener: the status and the images, for a browser.

`twisted.web.template` escapes all text. `page` makes the whole of it, `live` the part that its script replaces every
second, and `image_list` the list of images.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlencode

from twisted.web.template import Tag, tags

from ociregistry.admin.images import Selected, Selection
from ociregistry.admin.requests import Kind, Outcome
from ociregistry.admin.status import DownloadState, Status
from ociregistry.config.values import count_text, rate_text, size_text, span_text
from ociregistry.names import Digest
from ociregistry.store.listing import ListedImage, Order
from ociregistry.upstream.breaker import LinkState

Content = str | Tag | list[Any]

_RELOADED_EVERY = 3
"""Seconds, without scripts."""
_MOST_ROWS = 50
"""Links, downloads or errors that are shown."""
_FEW = 10
"""Errors that are shown at first."""


def page(
    status: Status, now: datetime, selected: Selected, missing: Mapping[Digest, int], static: Mapping[str, str]
) -> Tag:
    """Make the whole page.

    `missing` are the bytes that images lack; `static` is where the files are that the page needs.
    """
    selection = selected.selection
    # A reload would lose what is typed into the search, and the position in the list of images.
    reload = tags.meta(**{"http-equiv": "refresh", "content": str(_RELOADED_EVERY)})
    return tags.html(lang="en")(
        tags.head(
            tags.meta(charset="utf-8"),
            tags.meta(name="viewport", content="width=device-width, initial-scale=1"),
            tags.meta(name="color-scheme", content="light dark"),
            tags.title(_title(status)),
            tags.link(rel="icon", href=static["icon.svg"], type="image/svg+xml"),
            tags.link(rel="stylesheet", href=static["page.css"]),
            tags.noscript(reload) if selection == Selection() else "",
            tags.script(src=static["page.js"], defer="defer"),
        ),
        tags.body(
            tags.header(
                tags.h1("ociregistry"),
                tags.nav(**{"aria-label": "On this page"})(
                    tags.a(text, href=f"#{name}") for name, text in _SECTIONS.items()
                ),
            ),
            Tag("main")(
                tags.p(id="lost", role="alert", hidden="hidden")(
                    "The daemon has not answered since ", tags.time(), ". What is below is as it was then."
                ),
                live(status, now),
                _images(selected, missing, now),
            ),
            tags.footer(
                f"ociregistry {status.version}. Times are in UTC. The same facts are at ",
                tags.a("status", href="status"),
                " as JSON and at ",
                tags.a("metrics", href="metrics"),
                " for Prometheus.",
            ),
        ),
    )


def live(status: Status, now: datetime) -> Tag:
    """Make the part of the page that changes every second."""
    return tags.div(id="live", **{"data-title": _title(status)})(
        _state(status),
        _figures(status, now),
        _links(status.links, now),
        _downloads(status.downloads),
        _incomplete(status),
        _errors(status, now),
        _maintenance(status, now),
    )


def image_list(selected: Selected, missing: Mapping[Digest, int], now: datetime) -> Tag:
    """Make the list of images."""
    selection = selected.selection
    here = f", page {selection.page} of {selected.pages}" if selected.pages > 1 else ""
    found = f"{selected.found} of {selected.stored}" if selection.search else f"{selected.stored}"
    return tags.div(id="list")(
        tags.p(f"Image URLs: {found}{here}", id="found"),
        tags.div(id="table")(
            _table(
                "Images",
                {text: _sorted_by(selection, order, text) for order, text in _COLUMNS.items()},
                [_image_row(image, missing, now) for image in selected.rows],
                "No image URL contains this." if selection.search else "No image is stored yet.",
            )
        ),
        tags.nav(id="pages", **{"aria-label": "Pages"})(list(_pages(selected))),
    )


_SECTIONS = {
    "links": "Links",
    "downloads": "Downloads",
    "incomplete": "Incomplete images",
    "errors": "Errors",
    "maintenance": "Maintenance",
    "images": "Images",
}
_COLUMNS = {Order.URL: "Image", Order.SIZE: "Size", Order.CREATED: "Created", Order.PULLED: "Last pulled"}


# State


def _title(status: Status) -> str:
    return f"{_word(status)} · ociregistry"


def _word(status: Status) -> str:
    return "stopping" if status.stopping else "degraded" if status.reasons else "well"


def _state(status: Status) -> Tag:
    """Make the line that sums up the status, and the reasons why the daemon is degraded."""
    down = [link for link in status.links if not link.up]
    lacking = status.incomplete
    said = []
    if status.links:
        said.append(
            f"{len(down)} of {count_text(len(status.links), 'link')} down"
            if down
            else f"{count_text(len(status.links), 'link')} up"
        )
    if status.downloads:
        said.append(f"{count_text(len(status.downloads), 'download')}")
    if lacking.images:
        verb = "lacks" if lacking.images == 1 else "lack"
        said.append(f"{count_text(lacking.images, 'image')} {verb} {size_text(lacking.bytes)}")
    else:
        said.append("nothing is missing")
    if status.air_gapped:
        said.append("air-gapped")
    return tags.section(id="state")(
        tags.p(class_=f"state {_word(status)}")(tags.strong(_word(status)), " ", ", ".join(said)),
        [tags.p(reason, class_="reason") for reason in status.reasons],
    )


def _figures(status: Status, now: datetime) -> Tag:
    disk, requests = status.disk, status.requests
    pulls = (Kind.MANIFEST, Kind.BLOB)
    hits = sum(requests.tally(kind, Outcome.HIT).answers for kind in pulls)
    misses = sum(requests.tally(kind, Outcome.MISS).answers for kind in pulls)
    errors = (Outcome.CLIENT_ERROR, Outcome.SERVER_ERROR)
    failed = sum(requests.tally(kind, outcome).answers for kind in pulls for outcome in errors)
    pulled = f"{count_text(hits, 'hit')}, {count_text(misses, 'miss', 'misses')}, {failed} failed"
    share = f"{100 * hits // (hits + misses)}% hits" if hits + misses else "no pulls yet"
    sent = sum(tally.bytes for _, _, tally in requests.tallies())
    received = sum(status.received.values())
    limit, window = status.bandwidth.limit, status.bandwidth.window
    stored = f"{count_text(status.records.images, 'image')}, {count_text(status.records.lists, 'list')}"
    room = f"full: {size_text(disk.left)} beside the reserve" if disk.full else f"{size_text(disk.reserve)} kept free"
    used = f"{size_text(disk.size - disk.free)} of {size_text(disk.size)} used"
    return tags.section(id="figures")(
        tags.h2("At a glance", class_="hidden"),
        tags.dl(
            _figure("Store", "measuring" if status.usage is None else size_text(status.usage.bytes), stored),
            _figure("Disk free", size_text(disk.free), room, _bar(disk.size - disk.free, disk.size, used)),
            _figure("Pulls", share, pulled),
            _figure("Received", size_text(received), f"{size_text(sent)} sent to clients"),
            _figure("Bandwidth", "no limit" if limit is None else rate_text(limit), window or "at all times"),
            _figure(
                "Up for",
                span_text((now - status.started).total_seconds()),
                f"{count_text(status.in_flight, 'request')} in flight",
            ),
        ),
    )


def _figure(name: str, value: str, more: str, bar: str | Tag = "") -> Tag:
    return tags.div(tags.dt(name), tags.dd(tags.strong(value), bar, tags.span(more)))


# Links, downloads, errors


def _links(links: Sequence[LinkState], now: datetime) -> Tag:
    shown = sorted(links, key=lambda link: (link.up, link.host))[:_MOST_ROWS]
    rows: list[list[Content]] = [
        [
            tags.span(link.host),
            tags.span("up" if link.up else "down", class_="up" if link.up else "down"),
            _time(span_text(link.for_seconds), now - timedelta(seconds=link.for_seconds)),
            _next_probe(link),
            link.why,
        ]
        for link in shown
    ]
    empty = "No upstream was asked yet."
    return _section(
        "links",
        _table("Links", _columns("Host", "State", "For", "Next probe", "Why"), rows, empty),
        _more(len(links) - len(shown), "link"),
    )


def _next_probe(link: LinkState) -> str:
    if link.next_probe is None:
        return ""
    if not link.wanted:
        return "when it is wanted"
    return f"in {span_text(link.next_probe)}" if link.next_probe >= 1 else "now"


def _downloads(downloads: Sequence[DownloadState]) -> Tag:
    shown = downloads[:_MOST_ROWS]
    rows: list[list[Content]] = [
        [
            [tags.span(one.image or one.repository), " ", tags.code(one.blob[:_SHORT], title=one.blob)],
            _progress(one.bytes, one.size, _of(one.bytes, one.size)),
            "" if one.rate is None else rate_text(one.rate),
            "" if one.seconds_left is None else span_text(one.seconds_left),
            count_text(one.clients, "client") if one.clients else "background",
        ]
        for one in shown
    ]
    columns = _columns("Blob", "Progress", "Rate", "Left", "For")
    table = _table("Downloads", columns, rows, "Nothing is being downloaded.")
    return _section("downloads", table, _more(len(downloads) - len(shown), "download"))


_SHORT = len("sha256:") + 12
"""Characters of a digest."""


def _of(here: int, size: int | None) -> str:
    return size_text(here) if size is None else f"{size_text(here)} of {size_text(size)}"


def _progress(done: int, of: int | None, text: str) -> Content:
    """Make a bar with its text; without a size, the text alone."""
    if not of:
        return text
    return [_bar(done, of, text), tags.span(text)]


def _bar(done: int, of: int, text: str) -> Tag:
    return tags.progress(text, value=str(done), max=str(of), **{"aria-label": text})


def _incomplete(status: Status) -> Tag:
    lacking, shown = status.incomplete, status.incomplete_images
    said = []
    if lacking.bytes:
        left = lacking.seconds_left
        when = f", at the present rate here in {span_text(left)}" if left is not None else ""
        said.append(f"{size_text(lacking.bytes)} in all{when}.")
    if lacking.pending:
        said.append(f"Of {count_text(lacking.pending, 'image')} it is still open whether they are wanted.")
    if lacking.indexes:
        said.append(f"{count_text(lacking.indexes, 'list')} without all manifests or configs of other platforms.")
    rows: list[list[Content]] = [
        [[tags.span(one.image), " ", tags.code(one.digest[:_SHORT], title=one.digest)], size_text(one.bytes)]
        for one in shown
    ]
    none = "Every image that was pulled is complete." if not said else " ".join(said)
    total = tags.p(" ".join(said)) if said and rows else ""
    more = _more(lacking.images - len(shown), "image") if rows else ""
    return _section("incomplete", total, _table("Incomplete images", _columns("Image", "Lacks"), rows, none), more)


def _errors(status: Status, now: datetime) -> Tag:
    latest = [
        tags.li(
            _ago(error.time, now),
            " ",
            tags.span(error.text),
        )
        for error in reversed(status.errors)
    ]
    shown = tags.p("None since the start.", class_="none")
    if latest:
        shown = tags.ul(latest[:_FEW], class_="errors")
    older = latest[_FEW:]
    more = tags.details(id="older")(tags.summary(f"{len(older)} older"), tags.ul(older, class_="errors"))
    return _section("errors", shown, more if older else "")


def _maintenance(status: Status, now: datetime) -> Tag:
    done, preload = status.maintenance, status.preload
    rows: list[Tag] = []
    if preload is not None:
        failed = f", {preload.failed} failed" if preload.failed else ""
        text = f"{preload.loaded} of {count_text(preload.images, 'image')}{failed}"
        rows.append(_fact("Preloading", _progress(preload.loaded + preload.failed, preload.images, text)))
    if done.last_prune or done.next_prune:
        urls = count_text(done.pruned_image_urls, "image URL")
        freed = f"{urls} and {size_text(done.pruned_bytes)} pruned since the start"
        refused = [tags.p(done.prune_refused, class_="reason")] if done.prune_refused else []
        rows.append(_fact("Pruning", [*_last_and_next(done.last_prune, done.next_prune, now), freed, *refused]))
    if done.last_verify or done.next_verify:
        of = f"{count_text(done.verified_blobs, 'blob')} and {count_text(done.verified_records, 'record')}"
        found = f"{done.damaged} of {of} damaged, {done.repaired} repaired"
        rows.append(_fact("Verifying", [*_last_and_next(done.last_verify, done.next_verify, now), found]))
    none = tags.p("Nothing is scheduled.", class_="none")
    return _section("maintenance", tags.dl(rows, class_="facts") if rows else none)


def _fact(name: str, value: Content) -> Tag:
    return tags.div(tags.dt(name), tags.dd(value))


def _last_and_next(last: datetime | None, following: datetime | None, now: datetime) -> Iterable[Content]:
    if last is not None:
        yield from ("last ", _ago(last, now), ", ")
    if following is not None:
        yield f"next in {span_text((following - now).total_seconds())}; "


# Images


def _images(selected: Selected, missing: Mapping[Digest, int], now: datetime) -> Tag:
    selection = selected.selection
    return _section(
        "images",
        tags.form(method="get", action="", role="search")(
            tags.label("Search ", **{"for": "search"}),
            tags.input(
                type="search",
                id="search",
                name="search",
                value=selection.search,
                placeholder="words of an image URL",
                autocomplete="off",
            ),
            tags.input(type="hidden", name="sort", value=selection.sort),
            tags.button("Search", type="submit"),
        ),
        tags.noscript(
            tags.p(
                f"Without scripts this page reloads every {_RELOADED_EVERY} s. ",
                tags.a("Look through the images without that.", href=_query(selection.by(Order.PULLED))),
            )
            if selection == Selection()
            else tags.p(tags.a("Back to the page that reloads itself.", href="?"))
        ),
        image_list(selected, missing, now),
    )


def _image_row(image: ListedImage, missing: Mapping[Digest, int], now: datetime) -> list[Content]:
    lacking = sum(missing.get(one, 0) for one in image.images)
    size = size_text(image.size) if image.images else "no image"
    return [
        tags.span(image.url),
        [size, " ", tags.span(f"lacks {size_text(lacking)}", class_="lacking")] if lacking else size,
        _ago(image.created, now),
        _ago(image.pulled, now),
    ]


def _sorted_by(selection: Selection, order: Order, text: str) -> Tag:
    link = tags.a(text, href=_query(selection.by(order)), id=f"by-{order.value}")
    if order is not selection.order:
        return tags.th(link, scope="col")
    return tags.th(scope="col", **{"aria-sort": "descending" if selection.descending else "ascending"})(link)


def _pages(selected: Selected) -> Iterable[Tag]:
    selection = selected.selection
    if selection.page > 1:
        yield tags.a("Previous", href=_query(selection.on(selection.page - 1)), id="previous", rel="prev")
    if selection.page < selected.pages:
        yield tags.a("Next", href=_query(selection.on(selection.page + 1)), id="next", rel="next")


def _query(selection: Selection) -> str:
    fields = {"search": selection.search, "sort": selection.sort, "page": selection.page}
    return "?" + urlencode({key: value for key, value in fields.items() if value})


# Parts of HTML


def _section(name: str, *content: str | Tag) -> Tag:
    heading = tags.h2(_SECTIONS[name], id=f"{name}-heading")
    return tags.section(heading, *content, id=name, **{"aria-labelledby": f"{name}-heading"})


def _table(caption: str, columns: Mapping[str, Tag], rows: Sequence[Sequence[Content]], empty: str) -> Tag:
    """Make a table; the first cell is the head of its row.

    On a narrow screen each row becomes a block, in which every cell has the name of its column.
    """
    if not rows:
        return tags.p(empty, class_="none")
    names = list(columns)[1:]
    return tags.table(
        tags.caption(caption, class_="hidden"),
        tags.thead(tags.tr(list(columns.values()))),
        tags.tbody(
            tags.tr(
                tags.th(head, scope="row"),
                [tags.td(cell, **{"data-name": name}) for name, cell in zip(names, cells, strict=True)],
            )
            for head, *cells in rows
        ),
    )


def _columns(*names: str) -> Mapping[str, Tag]:
    return {name: tags.th(name, scope="col") for name in names}


def _more(count: int, noun: str) -> str | Tag:
    return tags.p(f"and {count_text(count, f'other {noun}')}") if count > 0 else ""


def _ago(moment: datetime, now: datetime) -> Tag:
    return _time(f"{span_text((now - moment).total_seconds())} ago", moment)


def _time(text: str, moment: datetime) -> Tag:
    told = moment.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    return tags.time(text, datetime=moment.isoformat(timespec="seconds"), title=told)
