"""Where the daemon listens: its endpoints for clients, and the control socket for commands on the same store."""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, cast

from twisted.application.service import Service
from twisted.internet import tcp
from twisted.internet.address import IPv4Address, IPv6Address
from twisted.internet.defer import Deferred, gatherResults, maybeDeferred, succeed
from twisted.internet.endpoints import serverFromString
from twisted.internet.error import CannotListenError, ConnectionDone
from twisted.internet.interfaces import IAddress, IDelayedCall, IListeningPort, IProtocol, IProtocolFactory
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from ociregistry.log import Seldom
from ociregistry.process import descriptors_are_scarce
from ociregistry.store.store import Store
from ociregistry.store.workdir import ControlSocket
from ociregistry.web.channel import host_and_port

_log = Logger(namespace="ociregistry.web")


class ListenFailed(Exception):
    """The daemon cannot listen on an endpoint."""


_PAUSE = 1.0
"""Seconds from one look at whether descriptors are free to the next."""


@implementer(IProtocolFactory)
class _Accepting:
    """Calls `accepted` for each new connection."""

    def __init__(self, factory: IProtocolFactory, accepted: Callable[[], None]) -> None:
        self._factory = factory
        self._accepted = accepted
        self.doStart = factory.doStart
        self.doStop = factory.doStop

    def buildProtocol(self, addr: IAddress) -> IProtocol | None:
        """Make the protocol of a new connection."""
        self._accepted()
        return self._factory.buildProtocol(addr)


_BACKLOG = 1024
"""A starting node opens many connections at once. With Twisted's backlog of 50, some would be delayed by 1 s."""
_NO_IPV6 = frozenset({errno.EAFNOSUPPORT, errno.EPROTONOSUPPORT, errno.EADDRNOTAVAIL, errno.ENOPROTOOPT})


def _listen_on(port: int, factory: IProtocolFactory, reactor: Any) -> IListeningPort:
    """Listen on a TCP port by IPv6 and IPv4, or by IPv4 alone where the system has no IPv6.

    Raises:
        OSError, CannotListenError: the port cannot be used.
    """
    try:
        with _socket_for_both(port) as listening:
            return cast(IListeningPort, reactor.adoptStreamPort(listening.fileno(), socket.AF_INET6, factory))
    except OSError as error:
        if error.errno not in _NO_IPV6:
            raise
    return cast(IListeningPort, reactor.listenTCP(port, factory, backlog=_BACKLOG))


def _socket_for_both(port: int) -> socket.socket:
    with ExitStack() as stack:
        listening = stack.enter_context(socket.socket(socket.AF_INET6))
        listening.setblocking(False)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Twisted leaves this to the system's default.
        listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listening.bind(("::", port))
        listening.listen(_BACKLOG)
        stack.pop_all()
    return listening


class Listeners(Service):
    """Listens for clients on `endpoints`: TCP ports, and Twisted's descriptions such as `tcp:8080:interface=…`.

    While file descriptors are scarce, new connections wait in the kernel, so that descriptors are left for answers to
    the others. (With none left, Twisted would close new connections at once.)
    """

    def __init__(self, endpoints: Sequence[str | int], factory: IProtocolFactory, reactor: Any) -> None:
        self._endpoints = endpoints
        self._factory = _Accepting(factory, self._accepted)
        self._reactor = reactor
        self._ports: list[Any] = []  # IListeningPort cannot pause
        self._pause: IDelayedCall | None = None
        self._seldom = Seldom(reactor)

    @property
    def addresses(self) -> list[str]:
        """The addresses on which it listens, for messages."""
        return [_address(port) for port in self._ports]

    def privilegedStartService(self) -> None:
        """Listen on all endpoints, while the process may still use privileged ports.

        Raises:
            ListenFailed: it cannot listen on one of them.
        """
        super().privilegedStartService()
        for endpoint in self._endpoints:
            failures: list[Failure] = []
            try:
                listening = self._listen(endpoint)
                listening.addCallbacks(self._ports.append, failures.append)
            except Exception:
                failures.append(Failure())
            for failure in failures:
                error = failure.value
                where = f"port {endpoint}" if isinstance(endpoint, int) else endpoint
                raise ListenFailed(f"cannot listen on {where}: {_why(error)}") from error

    def _listen(self, endpoint: str | int) -> Deferred[IListeningPort]:
        if isinstance(endpoint, int):
            return succeed(_listen_on(endpoint, self._factory, self._reactor))
        listening: Deferred[IListeningPort] = serverFromString(self._reactor, endpoint).listen(self._factory)
        return listening

    def stopService(self) -> Deferred[Any]:
        """Accept no more connections; fire when the ports are closed."""
        super().stopService()
        if self._pause is not None:
            self._pause.cancel()
            self._pause = None
        ports, self._ports = self._ports, []
        return gatherResults([maybeDeferred(port.stopListening) for port in ports])

    def _accepted(self) -> None:
        if self._pause is not None or not descriptors_are_scarce():
            return
        if self._seldom.due():
            _log.warn("file descriptors are scarce: new connections wait until others are closed")
        for port in self._ports:
            port.stopReading()
        self._pause = self._reactor.callLater(_PAUSE, self._resume)

    def _resume(self) -> None:
        if descriptors_are_scarce():
            self._pause = self._reactor.callLater(_PAUSE, self._resume)
            return
        self._pause = None
        for port in self._ports:
            port.startReading()


class ControlListener(Service):
    """Listens on the control socket, so that commands on the same store download through this process.

    Where that is not possible the daemon works without it.
    """

    def __init__(self, store: Store, factory: IProtocolFactory, reactor: Any) -> None:
        self._store = store
        self._factory = factory
        self._reactor = reactor
        self._open: tuple[ControlSocket, tcp.Port] | None = None

    def startService(self) -> None:
        """Listen, or log why that is not possible."""
        super().startService()
        self._listen()
        self._store.on_new_pulls_folder = self._listen_anew

    def _listen(self) -> None:
        try:
            control_socket = self._store.control_socket()
        except OSError as error:
            self._failed(error)
            return
        try:
            self._open = control_socket, self._reactor.listenUNIX(control_socket.path, self._factory, mode=0o600)
        except CannotListenError as error:
            control_socket.close()
            self._failed(error.socketError)

    def _listen_anew(self) -> None:
        Deferred.fromCoroutine(self._stop()).addCallback(lambda _: self._listen() if self.running else None)

    def _failed(self, why: Exception) -> None:
        _log.error("control socket unavailable, commands cannot download through this daemon: {why}", why=why)

    def stopService(self) -> Deferred[None]:
        """Close and remove the socket."""
        super().stopService()
        self._store.on_new_pulls_folder = lambda: None
        return Deferred.fromCoroutine(self._stop())

    async def _stop(self) -> None:
        if self._open is not None:
            control_socket, port = self._open
            self._open = None
            try:
                await maybeDeferred(port.stopListening)
            except OSError:
                # Another program has removed the file; Twisted then leaves the socket open.
                tcp.Port.connectionLost(port, Failure(ConnectionDone()))
            control_socket.close()


def _why(error: BaseException | None) -> str:
    """Return why an endpoint cannot be used, for an operator."""
    if isinstance(error, LookupError):
        return "systemd has passed no such socket: start the socket unit"
    cause = getattr(error, "socketError", error)
    return str(getattr(cause, "strerror", None) or cause)


def _address(port: IListeningPort) -> str:
    address = port.getHost()
    return host_and_port(address) if isinstance(address, IPv4Address | IPv6Address) else str(address)
