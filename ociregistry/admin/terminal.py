"""The status for a terminal: lines that fit its width, in which no text from outside has an effect on it.

The facts are those of the JSON document, so that a command shows what a daemon of any version tells.
"""

from __future__ import annotations

import textwrap
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from math import floor
from typing import Any

from ociregistry.config.values import count_text, local_time, rate_text, size_text, span_text

_STATES = {"ok": "well", "degraded": "degraded", "stopped": "no daemon runs; the files say"}
_NARROWEST = 40
"""Columns; on a narrower terminal, lines are cut off."""
_BAR = 20
_LINKS = 10
"""Links that are up, at most, and as many that are down."""
_ERRORS = 5
_INDENT = 10


class Paper:
    """Lays out text of any origin on lines of `width` columns; without `unicode`, in ASCII alone."""

    def __init__(self, width: int, *, unicode: bool) -> None:
        self.width = width
        self._unicode = unicode

    def plain(self, text: str) -> str:
        """Escape what could move the cursor, has no width of its own, or cannot be shown."""
        if not self._unicode:
            text = text.replace("…", "...")
        return "".join(
            char if self._is_plain(char) else char.encode("unicode_escape").decode("ascii") for char in text
        )

    def _is_plain(self, char: str) -> bool:
        if char.isascii():
            return char.isprintable()
        return self._unicode and char.isprintable() and unicodedata.category(char) not in ("Mn", "Me")

    def cut(self, text: str, width: int) -> str:
        """Shorten plain text at its end."""
        return text if columns(text) <= width else _head(f"{_head(text, width - 3)}...", width)

    def middle(self, text: str, width: int) -> str:
        """Shorten plain text in its middle, as the beginning and the end of a name tell most."""
        if columns(text) <= width:
            return text
        end = (width - 3) // 2
        return f"{_head(text, width - 3 - end)}...{_tail(text, end)}"

    def name(self, text: str, width: int) -> str:
        """Return a name from outside, shortened in its middle."""
        return self.middle(self.plain(text), max(10, width))

    def wrapped(self, text: str, first: str, indent: str) -> list[str]:
        """Return plain text on as many lines as it takes, `first` before it and `indent` before all further lines."""
        return textwrap.wrap(text, self.width, initial_indent=first, subsequent_indent=indent) or [first.rstrip()]


def columns(text: str) -> int:
    """Return how many columns plain text takes."""
    return len(text) + sum(unicodedata.east_asian_width(char) in "WF" for char in text if not char.isascii())


def _head(text: str, width: int) -> str:
    text = text[: max(0, width)]
    while text and columns(text) > width:
        text = text[:-1]
    return text


def _tail(text: str, width: int) -> str:
    return _head(text[::-1], width)[::-1]


def lines(document: Mapping[str, Any], now: datetime, width: int, *, unicode: bool) -> list[str]:
    """Return the lines that show a status at the time `now`; none has more than `width` columns.

    Raises:
        LookupError, TypeError, ValueError, AttributeError: the document is that of another version.
    """
    paper = Paper(max(width, _NARROWEST), unicode=unicode)
    shown = [*_state(document, paper), *_store(document, paper), *_work(document, paper, now)]
    shown += [*_links(document, paper, now), *_downloads(document, paper), *_errors(document, paper)]
    return [paper.cut(line, width) for line in shown]


def sentence(text: str, width: int, *, unicode: bool) -> list[str]:
    """Return a text of any origin on lines of at most `width` columns."""
    paper = Paper(max(width, _NARROWEST), unicode=unicode)
    return [paper.cut(line, width) for line in paper.wrapped(paper.plain(text), "", "")]


def _state(document: Mapping[str, Any], paper: Paper) -> Iterator[str]:
    state = "stopping" if document.get("stopping") else _STATES[document["status"]]
    up = f", up {span_text(document['uptime_seconds'])}" if "uptime_seconds" in document else ""
    air_gapped = ", air-gapped" if document.get("air_gapped") else ""
    yield f"ociregistry {paper.plain(document['version'])}: {state}{air_gapped}{up}"
    for reason in document["reasons"]:
        yield from paper.wrapped(paper.plain(reason), "! ", "  ")
    if document.get("listeners"):
        yield from _row("at", [paper.plain(", ".join(document["listeners"]))], paper)


def _row(name: str, facts: Iterable[str], paper: Paper) -> list[str]:
    """Return facts that belong together, behind their name."""
    return paper.wrapped(", ".join(facts), name.ljust(_INDENT), " " * _INDENT)


def _store(document: Mapping[str, Any], paper: Paper) -> Iterator[str]:
    store, disk, incomplete = document["store"], document["disk"], document["incomplete"]
    yield f"{'store'.ljust(_INDENT)}{paper.name(store['path'], paper.width - _INDENT)}"
    records = [count_text(store["lists"], "list"), count_text(store["images"], "image")]
    used = [] if store["bytes"] is None else [f"{size_text(store['bytes'])} in {count_text(store['blobs'], 'blob')}"]
    yield from _row("", [*records, *used], paper)
    facts = [f"{size_text(disk['free'])} of {size_text(disk['size'])} free"]
    facts += [f"{size_text(disk['reserve'])} kept in reserve"] if disk.get("reserve") else []
    facts += ["full"] if disk.get("full") else []
    yield from _row("disk", facts, paper)
    yield from _row("missing", _missing(incomplete), paper)


def _missing(incomplete: Mapping[str, Any]) -> list[str]:
    facts = []
    if incomplete["images"]:
        facts.append(f"{size_text(incomplete['bytes'])} of {count_text(incomplete['images'], 'image')}")
    if incomplete["pending"]:
        facts.append(f"{incomplete['pending']} of them undecided")
    if incomplete.get("indexes"):
        facts.append(f"metadata of {count_text(incomplete['indexes'], 'list')}")
    if facts and incomplete.get("seconds_left") is not None:
        facts.append(f"here in {span_text(incomplete['seconds_left'])}")
    return facts or ["nothing"]


def _work(document: Mapping[str, Any], paper: Paper, now: datetime) -> Iterator[str]:
    """Yield what the daemon did, and what it does by itself."""
    if "requests" not in document:
        return
    yield from _row("answers", _answers(document), paper)
    preload = document["preload"]
    if preload is not None:
        facts = [f"{preload['loaded']} of {count_text(preload['images'], 'image')}", f"{preload['failed']} failed"]
        yield from _row("preload", facts, paper)
    maintenance = document["maintenance"]
    facts = list(_times("prune", maintenance, now))
    if maintenance["last_prune"] is not None:
        facts.append(f"{count_text(maintenance['pruned_image_urls'], 'image URL')} pruned")
        facts.append(f"{size_text(maintenance['pruned_bytes'])} freed")
    if maintenance["prune_refused"]:
        facts.append(paper.plain(f"refused by age: {maintenance['prune_refused']}"))
    yield from _row("prune", facts, paper) if facts else ()
    facts = list(_times("verify", maintenance, now))
    if facts:
        facts += [f"{maintenance['damaged']} damaged", f"{maintenance['repaired']} repaired"]
        yield from _row("verify", facts, paper)


def _times(what: str, maintenance: Mapping[str, Any], now: datetime) -> Iterator[str]:
    last, following = maintenance[f"last_{what}"], maintenance[f"next_{what}"]
    if last is not None:
        yield f"last {local_time(datetime.fromisoformat(last))}"
    if following is not None:
        yield f"next in {span_text((datetime.fromisoformat(following) - now).total_seconds())}"


def _answers(document: Mapping[str, Any]) -> Iterator[str]:
    counts: dict[str, int] = {}
    for row in document["requests"]:
        counts[row["outcome"]] = counts.get(row["outcome"], 0) + row["answers"]
    yield count_text(counts.get("hit", 0), "hit")
    yield count_text(counts.get("miss", 0), "miss", "misses")
    yield count_text(counts.get("4xx", 0) + counts.get("5xx", 0), "error")
    yield f"{size_text(sum(row['bytes'] for row in document['requests']))} sent"
    yield f"{size_text(sum(document['received_bytes'].values()))} received"


def _links(document: Mapping[str, Any], paper: Paper, now: datetime) -> Iterator[str]:
    links: Sequence[Mapping[str, Any]] = document.get("links", ())
    # First those that something waits for; clients may have asked for any number of hosts that do not exist.
    down = sorted((link for link in links if not link["up"]), key=lambda link: not link["wanted"])
    up = [link for link in links if link["up"]]
    if links:
        yield ""
        yield f"links: {len(up)} up, {len(down)} down"
    for state, some in (("down", down), ("up", up)):
        for link in some[:_LINKS]:
            yield from _link(link, state, paper, now)
        if len(some) > _LINKS:
            yield f"  {state:5} {len(some) - _LINKS} more"


def _link(link: Mapping[str, Any], state: str, paper: Paper, now: datetime) -> Iterator[str]:
    age, probe = now - datetime.fromisoformat(link["since"]), link["next_probe_seconds"]
    facts = f"for {span_text(age.total_seconds())}"
    facts += f", next probe in {span_text(probe)}" if probe is not None and link["wanted"] else ""
    yield f"  {state:5} {paper.name(link['host'], paper.width - len(facts) - 9)} {facts}"
    if link["why"]:
        yield from paper.wrapped(paper.plain(link["why"]), " " * 8, " " * 8)


def _downloads(document: Mapping[str, Any], paper: Paper) -> Iterator[str]:
    downloads: Sequence[Mapping[str, Any]] = document.get("downloads", ())
    limit = document.get("bandwidth", {}).get("limit")
    if not downloads and limit is None:
        return
    facts = [rate_text(sum(download["rate"] or 0 for download in downloads))] if downloads else []
    if limit is not None:
        window = document["bandwidth"]["window"]
        when = f" from {paper.plain(window.replace('-', ' to '))}" if window else ""
        facts.append(f"at most {rate_text(limit)}{when}")
    yield ""
    yield f"downloads: {', '.join([str(len(downloads)), *facts])}"
    for download in downloads:
        yield from _download(download, paper)


def _download(download: Mapping[str, Any], paper: Paper) -> Iterator[str]:
    here, size, rate, left = (download[key] for key in ("bytes", "size", "rate", "seconds_left"))
    # Not rounded: 100 % is what is complete.
    share = min(1.0, here / size) if size else 0.0
    bar = ("#" * floor(share * _BAR)).ljust(_BAR, "-")
    facts = [f"{size_text(here)} of {size_text(size) if size is not None else 'unknown size'}"]
    facts += [rate_text(rate)] if rate is not None else []
    facts += [f"{span_text(left)} left"] if left is not None else []
    yield f"  [{bar}] {floor(share * 100):3}% {', '.join(facts)}"
    clients = count_text(download["clients"], "client") if download["clients"] else "background"
    what = download["image"] or f"{download['repository']}@{download['blob']}"
    yield f"  {paper.name(what, paper.width - 18)}, {clients}"


def _errors(document: Mapping[str, Any], paper: Paper) -> Iterator[str]:
    errors: Sequence[Mapping[str, Any]] = document.get("errors", ())
    if errors:
        yield ""
        yield "last errors:" if len(errors) <= _ERRORS else f"last {_ERRORS} of {len(errors)} errors:"
    for error in errors[-_ERRORS:]:
        told = f"{local_time(datetime.fromisoformat(error['time']))} {error['text']}"
        yield from paper.wrapped(paper.plain(told), "  ", "    ")
