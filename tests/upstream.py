"""The scripted registry: a correct upstream on a real socket, with scripted faults."""

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
    """A rule for the paths that match a glob; `times` is how often it still applies, None: always."""

    pattern: str
    rule: Rule
    method: str | None
    times: int | None

    def applies(self, request: Request) -> bool:
        """Whether the rule applies to this request."""
        return (
            self.times != 0
            and self.method in (None, request.method)
            and self.rule.concerns(request.method)
            and fnmatchcase(request.path, self.pattern)
        )


class ScriptedRegistry:
    """A registry on 127.0.0.1 or another `address`, over http or (with a server's `tls` context) https.

    `with ScriptedRegistry() as registry:` serves until the block ends. It records every request. Each request passes
    the rules of `script`, the newest first.
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
        """Return the registry, which already serves."""
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
        """Refuse connections from now on; end every answer and thread, also those held back.

        Raises:
            RuntimeError: a rule failed, or a connection did not end.
        """
        self._server.close()

    def disconnect(self) -> None:
        """Drop every connection, idle or not."""
        self._server.disconnect()

    def add(self, repository: str, what: Image | Index, *tags: str) -> None:
        """Publish an image or an index with all its blobs in this repository, by these tags and by digest."""
        self._content.add(repository, what, *tags)

    def move(self, repository: str, tag: str, manifest: Manifest) -> None:
        """Move a tag to this manifest."""
        self._content.move(repository, tag, manifest)

    def script(
        self, path: str, rule: Rule, *, method: str | None = None, times: int | None = None
    ) -> Callable[[], None]:
        """Apply a rule to the paths that match this glob, always or for the next `times` requests.

        Returns:
            A function that removes the rule.
        """
        script = _Script(path, rule, method, times)
        with self._lock:
            self._scripts.append(script)
        return partial(self._unscript, script)

    @property
    def requests(self) -> tuple[Request, ...]:
        """Return all requests in order of arrival, also those still being answered."""
        with self._lock:
            return tuple(self._requests)

    @property
    def connections(self) -> int:
        """How many connections were accepted so far."""
        with self._lock:
            return self._connections

    def count(self, method: str | None = None, path: str = "") -> int:
        """Count the requests with this method (None: any) for paths with this prefix."""
        return sum(method in (None, request.method) and request.path.startswith(path) for request in self.requests)

    def bytes_sent(self, digest: str) -> int:
        """Return the bytes sent for a blob or manifest so far, over all requests for this digest."""
        return sum(request.sent for request in self.requests if request.path.endswith(f"/{digest}"))

    def connected(self) -> int:
        """Return the number of a new connection, counted from 1. Called by the server."""
        with self._lock:
            self._connections += 1
            return self._connections

    def answer(self, request: Request, connection: socket.socket, closing: threading.Event) -> bool:
        """Record and answer a request; return whether the connection can continue. Called by the server."""
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
    """Listens until `close`, runs a thread for each connection, and tracks all, so that it can end them."""

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
        """Stop listening, and end all connections and threads."""
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
        """Wake every thread that reads or writes, without a TLS close."""
        with self._changed:
            for connection in self._alive:
                with suppress(OSError):  # It ended by itself.
                    socket.socket.shutdown(connection, socket.SHUT_RDWR)

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept a connection; its thread does the TLS handshake."""
        connection, address = super().get_request()
        if self._tls is not None:
            connection = self._tls.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
        with self._changed:
            self._alive[connection] = self.registry.connected()
        return connection, address

    def number(self, connection: socket.socket) -> int:
        """Return the registry's number for this connection."""
        with self._changed:
            return self._alive[connection]

    def shutdown_request(self, request: Any) -> None:
        """End a connection when its thread ends."""
        super().shutdown_request(request)
        with self._changed:
            del self._alive[request]
            self._changed.notify_all()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore broken connections, which are expected; record any other error as a mistake in a rule."""
        problem = sys.exception()
        if problem is not None and not isinstance(problem, OSError):
            self._errors.append(problem)


class _Connection(BaseHTTPRequestHandler):
    """Serves the requests of one connection in sequence."""

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
        """Pass the request to the registry."""
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
        """Log nothing; the registry records requests itself."""
