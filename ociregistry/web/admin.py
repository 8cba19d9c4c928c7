"""The admin listener (the page, `/metrics`, `/status`), apart from what clients reach; and the control socket."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.resources import files
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any

from twisted.internet.address import IPv4Address, IPv6Address
from twisted.internet.defer import Deferred, DeferredLock
from twisted.internet.interfaces import IAddress, IProtocolFactory, IReactorTime
from twisted.logger import Logger
from twisted.web.resource import IResource, Resource
from twisted.web.server import Request, Site
from twisted.web.template import Tag, flattenString

from ociregistry.admin.images import Selected, select
from ociregistry.admin.status import Status, document
from ociregistry.context import Context
from ociregistry.errors import Denied, NotFound, TooManyRequests
from ociregistry.log import ALWAYS
from ociregistry.names import Digest
from ociregistry.settings import AdminListen
from ociregistry.store.listing import Listing
from ociregistry.web import page
from ociregistry.web.channel import host_of
from ociregistry.web.exchange import InMemory
from ociregistry.web.listeners import Listeners, ListenFailed
from ociregistry.web.requests import Query, parse_selection
from ociregistry.web.resource import Answer, Handler, json_answer
from ociregistry.web.site import HandlerSite

if TYPE_CHECKING:
    from ociregistry.admin.metrics import Metrics

_log = Logger(namespace="ociregistry.web")

_PATIENCE = 60.0
"""Seconds; all content is in memory."""
_MOST_WAITING = 20
"""Pages that wait to be rendered: a third of a second's worth, with 10,000 images."""
_NOT_STORED = {"Cache-Control": "no-store"}
_MEDIA_TYPES = {"css": "text/css; charset=utf-8", "js": "text/javascript; charset=utf-8", "svg": "image/svg+xml"}
_PAGE_HEADERS = {
    **_NOT_STORED,
    "Content-Type": "text/html; charset=utf-8",
    # Names of images and texts of errors come from outside. The template escapes them; this holds if it did not.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
}


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """What the page tells of the images."""

    list: Callable[[], Deferred[Listing]]
    missing: Callable[[], Mapping[Digest, int]]
    """The bytes that images lack."""


def refuse_foreign_names(request: Request) -> None:
    """Refuse a request that came over loopback for a host with a name other than `localhost`.

    A browser sends such a request for a page whose own name leads to this machine now (DNS rebinding).

    Raises:
        Denied: it is one.
    """
    local = request.getHost()
    if not isinstance(local, IPv4Address | IPv6Address) or not ip_address(host_of(local)).is_loopback:
        return
    host = request.getRequestHostname().decode("latin-1").strip("[]")
    try:
        ip_address(host)
    except ValueError:
        if host.lower() != "localhost":
            raise Denied(
                f"over loopback, by an address or as localhost only: {host[:100]!r} is another name"
            ) from None


class AdminSite(HandlerSite):
    """The HTTP server for the operator; it only reads."""

    def __init__(
        self, read: Callable[[], Status], images: ImageFacts, probes: Mapping[str, Handler], clock: IReactorTime
    ) -> None:
        """Answer by the status that `read` returns, and by `probes`, whose paths are the same for clients.

        There is no access log: a scrape comes every few seconds.
        """
        super().__init__(probes, self._answer, _PATIENCE, clock, lambda: False, refuse_foreign_names)
        self._read = read
        self._images = images
        self._clock = clock
        self._rendering = DeferredLock()
        self._metrics: Metrics | None = None
        self._static = dict(_static_files())

    async def _answer(self, method: str, path: bytes, query: Query, context: Context) -> Answer:
        now = datetime.now(UTC)
        match path:
            case b"/metrics":
                metrics = self._metrics = self._metrics or _metrics(self._read)
                return Answer(200, InMemory(metrics.text()), {"Content-Type": metrics.content_type, **_NOT_STORED})
            case b"/status":
                return json_answer(200, document(self._read(), now), _NOT_STORED)
            case b"/live":
                return await self._html(lambda: page.live(self._read(), now))
            case b"/" | b"/images":
                selection, listing = parse_selection(query), await self._images.list()
                return await self._html(lambda: self._page(path, select(listing, selection), now))
        static_file = self._static.get(path[1:].decode("latin-1"))
        if static_file is not None:
            return static_file.answer
        told = path[:300].decode("latin-1")
        raise NotFound(f"no such path: {told!r}; there are the page at /, and /metrics and /status")

    def _page(self, path: bytes, selected: Selected, now: datetime) -> Tag:
        missing = self._images.missing()
        if path == b"/images":
            return page.image_list(selected, missing, now)
        static = {name: f"{name}?{one.version}" for name, one in self._static.items()}
        return page.page(self._read(), now, selected, missing, static)

    async def _html(self, make: Callable[[], Tag]) -> Answer:
        """Render a page: one in each turn of the reactor, so that clients have theirs in between.

        Raises:
            TooManyRequests: too many others wait.
        """
        if len(self._rendering.waiting) >= _MOST_WAITING:
            raise TooManyRequests("too many pages are asked for at once")
        await self._rendering.acquire()
        self._clock.callLater(0, self._rendering.release)
        content = await flattenString(None, make())
        return Answer(200, InMemory(b"<!DOCTYPE html>" + content), _PAGE_HEADERS)


@dataclass(frozen=True, slots=True)
class _StaticFile:
    """A file that the page needs; `version` is another one when its content is."""

    version: str
    answer: Answer


def _static_files() -> Iterator[tuple[str, _StaticFile]]:
    for file in files("ociregistry.web").joinpath("static").iterdir():
        media_type = _MEDIA_TYPES.get(file.name.rpartition(".")[2])
        if media_type is not None:
            content = file.read_bytes()
            headers = {"Content-Type": media_type, "Cache-Control": "max-age=31536000, immutable"}
            version = hashlib.sha256(content).hexdigest()[:12]
            yield file.name, _StaticFile(version, Answer(200, InMemory(content), headers))


def _metrics(read: Callable[[], Status]) -> Metrics:
    # Imported with the first scrape: it takes a seventh of the time that the daemon needs to start.
    from ociregistry.admin.metrics import Metrics

    return Metrics(read)


class ControlSite(Site):
    """The server at the control socket: that of clients, and the status as the operator gets it."""

    noisy = False

    def __init__(self, site: HandlerSite, admin: AdminSite) -> None:
        """Answer by `admin` at `/status`, and by `site` everywhere else."""
        super().__init__(Resource())
        self._site = site
        self._admin = admin

    def buildProtocol(self, addr: IAddress | None) -> Any:
        """Make the channel of a new connection."""
        channel = self._site.buildProtocol(addr)
        channel.site = self
        return channel

    def getResourceFor(self, request: Request) -> IResource:
        """Return what answers a request."""
        site: Site = self._admin if request.path == b"/status" else self._site
        found: IResource = site.getResourceFor(request)
        return found

    def log(self, request: object) -> None:
        """Do nothing: `web/exchange.py` writes the access log."""


class AdminListener(Listeners):
    """Listens for the operator, if at all. The daemon works without it where the default address cannot be used."""

    def __init__(self, listen: AdminListen, factory: IProtocolFactory, reactor: Any) -> None:
        super().__init__((listen.endpoint,) if listen.endpoint else (), factory, reactor)
        self._given = listen.given

    def privilegedStartService(self) -> None:
        """Listen, or warn that the default address cannot be used.

        Raises:
            ListenFailed: it cannot listen on an address that was given.
        """
        try:
            super().privilegedStartService()
        except ListenFailed as error:
            if self._given:
                raise
            _log.warn(
                "{why}: the daemon goes on without metrics and status (--admin-listen gives another address)",
                why=str(error),
                **ALWAYS,
            )
