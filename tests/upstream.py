"""The scripted registry: a correct upstream on a real socket that misbehaves exactly as a test tells it."""

from __future__ import annotations

import socket
import ssl
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self
from urllib.parse import unquote, urlsplit

from tests.images import Image, Index, Manifest
from tests.upstream_content import Content
from tests.upstream_http import POLL, Handler, Request, Rule, Wire

_PATIENCE = 10
_TLS_HANDSHAKE = b"\x16"


@dataclass(eq=False)
class _Script:
    """A rule at work for the paths that match a glob; `times` is how often it still applies, None: always."""

    pattern: str
    rule: Rule
    method: str | None
    times: int | None

    def applies(self, request: Request) -> bool:
        """Is this request one for the rule?"""
        return (
            self.times != 0
            and self.method in (None, request.method)
            and self.rule.concerns(request.method)
            and fnmatchcase(request.path, self.pattern)
        )


class ScriptedRegistry:
    """A registry on 127.0.0.1 or another `address`, for http or (with a server's `tls` context) https.

    `with ScriptedRegistry() as registry:` serves until the block ends. It keeps the record of every request.
    Each request passes the rules of `script`, those added last first.
    """

    def __init__(self, *, tls: ssl.SSLContext | None = None, address: str = "127.0.0.1", port: int = 0) -> None:
        self._content = Content()
        self._address = address
        self._lock = threading.Lock()
        self._scripts: list[_Script] = []
        self._requests: list[Request] = []
        self._connections = 0
        self._tls = tls
        self.port = port
        self.open()
        self.host = f"[{address}]:{self.port}" if ":" in address else f"{address}:{self.port}"
        self.url = f"{'https' if tls else 'http'}://{self.host}"

    def __enter__(self) -> Self:
        """It serves already."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        self.close()

    def open(self) -> None:
        """Serve again after `close`, on the same port, with the same content, rules and records."""
        self._server = _Server(self, (self._address, self.port), self._tls)
        self.port = self._server.server_address[1]

    def close(self) -> None:
        """Refuse connections from now on; end every answer and thread, held back or not.

        Raises what went wrong in a rule.
        """
        self._server.close()

    def disconnect(self) -> None:
        """Drop every connection, idle or not."""
        self._server.disconnect()

    def add(self, repository: str, what: Image | Index, *tags: str) -> None:
        """Publish an image or an index with all its blobs in this repository, by these tags and by digest."""
        self._content.add(repository, what, *tags)

    def move(self, repository: str, tag: str, manifest: Manifest) -> None:
        """Let a tag mean this manifest from now on."""
        self._content.move(repository, tag, manifest)

    def script(
        self, path: str, rule: Rule, *, method: str | None = None, times: int | None = None
    ) -> Callable[[], None]:
        """Apply a rule to the paths that match this glob, always or for the next `times` requests.

        Gives the function that takes the rule away again.
        """
        script = _Script(path, rule, method, times)
        with self._lock:
            self._scripts.append(script)
        return partial(self._unscript, script)

    @property
    def requests(self) -> tuple[Request, ...]:
        """All requests in the order they came, also those that are being answered."""
        with self._lock:
            return tuple(self._requests)

    @property
    def connections(self) -> int:
        """How many connections were accepted so far."""
        with self._lock:
            return self._connections

    def count(self, method: str | None = None, path: str = "") -> int:
        """How many requests came with this method (None: any) for a path that begins so."""
        return sum(method in (None, request.method) and request.path.startswith(path) for request in self.requests)

    def bytes_sent(self, digest: str) -> int:
        """How many bytes of bodies were sent for a blob or manifest, over all requests for this digest."""
        return sum(request.sent for request in self.requests if request.path.endswith(f"/{digest}"))

    def connected(self) -> int:
        """The number of a new connection, counted from 1. For the server alone."""
        with self._lock:
            self._connections += 1
            return self._connections

    def answer(self, request: Request, connection: socket.socket, closing: threading.Event) -> bool:
        """Record a request and answer it; true when the connection can go on. For the server alone."""
        with self._lock:
            number = len(self._requests)
            self._requests.append(request)
            handler: Handler = self._content.answer
            for script in self._scripts:
                if script.applies(request):
                    script.times = None if script.times is None else script.times - 1
                    handler = partial(script.rule, handler=handler)
        wire = Wire(connection, closing, partial(self._add_sent, number))
        try:
            answer = handler(request)
            self._update(number, status=answer.status)
            return wire.send(answer, headers_only=request.method == "HEAD")
        finally:
            self._update(number, done=True)

    def _add_sent(self, number: int, count: int) -> None:
        self._update(number, sent=self._requests[number].sent + count)

    def _update(self, number: int, **changes: Any) -> None:
        with self._lock:
            self._requests[number] = replace(self._requests[number], **changes)

    def _unscript(self, script: _Script) -> None:
        with self._lock:
            self._scripts.remove(script)


class _Server(ThreadingHTTPServer):
    """Listens until `close`, gives every connection a thread, and knows them all, so that it can end them."""

    request_queue_size = 128

    def __init__(self, registry: ScriptedRegistry, where: tuple[str, int], tls: ssl.SSLContext | None) -> None:
        self.registry = registry
        self.closing = threading.Event()
        self._tls = tls
        self._errors: list[BaseException] = []
        self._changed = threading.Condition()
        self._alive: dict[Any, int] = {}
        self.address_family = socket.AF_INET6 if ":" in where[0] else socket.AF_INET
        super().__init__(where, _Connection)
        self._thread = threading.Thread(target=self.serve_forever, args=(POLL,))
        self._thread.start()

    def close(self) -> None:
        """Stop listening and end what is alive."""
        self.closing.set()
        self.shutdown()
        self._thread.join()
        self.server_close()
        self.disconnect()
        with self._changed:
            if not self._changed.wait_for(lambda: not self._alive, _PATIENCE):
                raise RuntimeError(f"{len(self._alive)} connections of the scripted registry did not end")
        if self._errors:
            raise RuntimeError("a rule of the scripted registry failed") from self._errors[0]

    def disconnect(self) -> None:
        """Wake every thread that reads or writes, without a TLS goodbye."""
        with self._changed:
            for connection in self._alive:
                with suppress(OSError):  # it ended by itself
                    socket.socket.shutdown(connection, socket.SHUT_RDWR)

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept a connection; the TLS handshake is left to its thread."""
        connection, address = super().get_request()
        if self._tls is not None:
            connection = self._tls.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
        with self._changed:
            self._alive[connection] = self.registry.connected()
        return connection, address

    def number(self, connection: socket.socket) -> int:
        """Which connection of the registry this is."""
        with self._changed:
            return self._alive[connection]

    def shutdown_request(self, request: Any) -> None:
        """The connection's thread is at its end."""
        super().shutdown_request(request)
        with self._changed:
            del self._alive[request]
            self._changed.notify_all()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Connections break, that is what we are for; anything else is a mistake in a rule."""
        problem = sys.exception()
        if problem is not None and not isinstance(problem, OSError):
            self._errors.append(problem)


class _Connection(BaseHTTPRequestHandler):
    """The requests of one connection, one after the other."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def handle_one_request(self) -> None:
        """Refuse TLS at once where plain HTTP is spoken, as real servers do."""
        if self.rfile.peek(1)[:1] == _TLS_HANDSHAKE:  # type: ignore[attr-defined]  # it is a BufferedReader
            self.connection.sendall(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
            self.close_connection = True
        else:
            super().handle_one_request()

    def answer(self) -> None:
        """Hand the request over to the registry."""
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        url = urlsplit(self.path)
        request = Request(
            method=self.command,
            path=unquote(url.path),
            query=url.query,
            headers=tuple(self.headers.items()),
            connection=self.server.number(self.connection),
            body=body,
        )
        if not self.server.registry.answer(request, self.connection, self.server.closing):
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = answer

    def log_message(self, *args: Any) -> None:
        """The registry keeps its own records."""
