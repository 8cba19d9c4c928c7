"""A minimal HTTP client: one request, one connection, no redirects, no proxies, no retries."""

from __future__ import annotations

import http.client
import ssl
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field
from email.message import Message
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Response:
    """A complete response."""

    status: int
    headers: Message
    body: bytes = field(repr=False)


def fetch(
    url: str,
    *,
    method: str = "GET",
    headers: Mapping[str, str] | None = None,
    body: bytes | None = None,
    tls: ssl.SSLContext | None = None,
    timeout: float = 60,
) -> Response:
    """Send one request.

    Raises:
        http.client.IncompleteRead, OSError: the response ended early.
    """
    with closing(connect(url, tls=tls, timeout=timeout)) as connection:
        return ask(connection, url, method=method, headers=headers, body=body)


def connect(url: str, *, tls: ssl.SSLContext | None = None, timeout: float = 60) -> http.client.HTTPConnection:
    """Connect to the server of a URL, for `ask`."""
    parts = urlsplit(url)
    if parts.scheme == "https":
        return http.client.HTTPSConnection(parts.netloc, context=tls, timeout=timeout)
    return http.client.HTTPConnection(parts.netloc, timeout=timeout)


def ask(
    connection: http.client.HTTPConnection,
    url: str,
    *,
    method: str = "GET",
    headers: Mapping[str, str] | None = None,
    body: bytes | None = None,
) -> Response:
    """Send one request over a connection that can carry several in sequence."""
    parts = urlsplit(url)
    path = f"{parts.path}?{parts.query}" if parts.query else parts.path
    connection.request(method, path, body=body, headers=dict(headers or {}))
    with connection.getresponse() as answer:
        return Response(answer.status, answer.headers, answer.read())
