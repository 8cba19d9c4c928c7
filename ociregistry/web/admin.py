"""The admin listener, for `/metrics` and `/status` apart from what clients reach, and the control socket's server."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any

from twisted.internet.address import IPv4Address, IPv6Address
from twisted.internet.interfaces import IAddress, IProtocolFactory, IReactorTime
from twisted.logger import Logger
from twisted.web.resource import IResource, Resource
from twisted.web.server import Request, Site

from ociregistry.admin.status import Status, document
from ociregistry.context import Context
from ociregistry.errors import Denied, NotFound
from ociregistry.log import ALWAYS
from ociregistry.settings import AdminListen
from ociregistry.web.channel import host_of
from ociregistry.web.exchange import InMemory
from ociregistry.web.listeners import Listeners, ListenFailed
from ociregistry.web.requests import Query
from ociregistry.web.resource import Answer, Handler, json_answer
from ociregistry.web.site import HandlerSite

if TYPE_CHECKING:
    from ociregistry.admin.metrics import Metrics

_log = Logger(namespace="ociregistry.web")

_PATIENCE = 60.0
"""Seconds; all content is in memory."""
_NOT_STORED = {"Cache-Control": "no-store"}


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

    def __init__(self, read: Callable[[], Status], probes: Mapping[str, Handler], clock: IReactorTime) -> None:
        """Answer by the status that `read` returns, and by `probes`, whose paths are the same for clients.

        There is no access log: a scrape comes every few seconds.
        """
        super().__init__(probes, self._answer, _PATIENCE, clock, lambda: False, refuse_foreign_names)
        self._read = read
        self._metrics: Metrics | None = None

    async def _answer(self, method: str, path: bytes, query: Query, context: Context) -> Answer:
        match path:
            case b"/metrics":
                metrics = self._metrics = self._metrics or _metrics(self._read)
                return Answer(200, InMemory(metrics.text()), {"Content-Type": metrics.content_type, **_NOT_STORED})
            case b"/status":
                return json_answer(200, document(self._read(), datetime.now(UTC)), _NOT_STORED)
        raise NotFound(f"no such path: {path[:300].decode('latin-1')!r}; there are /metrics and /status")


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
