"""A forward proxy on a real socket that does as a test tells it."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Mapping
from contextlib import closing, suppress
from socketserver import StreamRequestHandler, ThreadingTCPServer
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

Address = tuple[str, int]


class ForwardProxy:
    """A proxy on 127.0.0.1 that knows the names `hosts`, and no others; with a server's `tls` it speaks TLS itself.

    `refusal` is sent in place of what a request asks for; `requests` are the lines and headers of those that came.
    """

    def __init__(self, hosts: Mapping[str, Address], *, tls: ssl.SSLContext | None = None) -> None:
        self.hosts = hosts
        self.tls = tls
        self.refusal = b""
        self.requests: list[list[str]] = []
        self._server = _Server(self)
        self.port: int = self._server.server_address[1]
        self.host = f"127.0.0.1:{self.port}"
        self.url = f"{'https' if tls else 'http'}://{self.host}"

    @property
    def lines(self) -> list[str]:
        """The request lines so far, without the version."""
        return [request[0].removesuffix(" HTTP/1.1") for request in self.requests]

    def __enter__(self) -> Self:
        """Serve."""
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End, with all connections."""
        self._server.shutdown()
        self._thread.join()
        self._server.disconnect()
        self._server.server_close()


class _Server(ThreadingTCPServer):
    daemon_threads = False

    def __init__(self, proxy: ForwardProxy) -> None:
        self.proxy = proxy
        self._connections: list[socket.socket] = []
        super().__init__(("127.0.0.1", 0), _Connection)

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept a connection; the TLS handshake is left to its thread."""
        connection, address = super().get_request()
        if self.proxy.tls is not None:
            connection = self.proxy.tls.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
        self._connections.append(connection)
        return connection, address

    def disconnect(self) -> None:
        """Wake the threads."""
        for connection in self._connections:
            with suppress(OSError):
                socket.socket.shutdown(connection, socket.SHUT_RDWR)


class _Connection(StreamRequestHandler):
    """One request, and what follows on its connection."""

    server: _Server

    def handle(self) -> None:
        """Refuse it, or pass bytes on in both directions until one side ends."""
        try:
            head = [line.decode("latin-1").rstrip("\r\n") for line in iter(self.rfile.readline, b"\r\n") if line]
        except OSError:  # of TLS too
            return
        if not head:
            return
        proxy = self.server.proxy
        proxy.requests.append(head)
        method, target, _ = head[0].split()
        netloc = target if method == "CONNECT" else urlsplit(target).netloc
        if proxy.refusal or netloc not in proxy.hosts:
            self.wfile.write(proxy.refusal or b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n")
            return
        with closing(socket.create_connection(proxy.hosts[netloc], timeout=10)) as behind:
            if method == "CONNECT":
                self.wfile.write(b"HTTP/1.1 200 Connection established\r\nVia: 1.1 test\r\n\r\n")
            else:
                kept = [line for line in head[1:] if not line.lower().startswith(("proxy-", "connection:"))]
                asked = [f"{method} {target.partition(netloc)[2]} HTTP/1.1", *kept, "Connection: close", "", ""]
                behind.sendall("\r\n".join(asked).encode("latin-1"))
            back = threading.Thread(target=_pass_on, args=(behind, self.connection))
            back.start()
            _pass_on(self.connection, behind)
            back.join()


def _pass_on(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
    for end in (source, target):
        with suppress(OSError):
            socket.socket.shutdown(end, socket.SHUT_RDWR)
