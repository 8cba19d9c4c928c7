"""Answers: what a handler gives, before it becomes bytes on the wire."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from twisted.internet.defer import Deferred, succeed

from ociregistry.errors import RegistryError
from ociregistry.pullthrough.content import Content


class InMemory:
    """Content that is already here."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self._data)

    def more_than(self, offset: int) -> Deferred[int]:
        """Fires with the size."""
        return succeed(self.size)

    def read(self, offset: int, count: int) -> Deferred[bytes]:
        """Fires with the bytes at `offset`."""
        return succeed(self._data[offset : offset + count])

    def close(self) -> None:
        """Nothing is held."""


class SizeOnly(InMemory):
    """Content of which only the size is known: the answer to a HEAD."""

    def __init__(self, size: int) -> None:
        super().__init__(b"")
        self._size = size

    @property
    def size(self) -> int:
        """Bytes of what a GET would give."""
        return self._size


@dataclass(frozen=True, slots=True)
class Answer:
    """A status with headers and content.

    `ranged` content may be asked for in part. `hit` is None where there is nothing to find in a cache.
    """

    status: int
    content: Content
    headers: Mapping[str, str] = field(default_factory=dict)
    ranged: bool = False
    hit: bool | None = None


def json_answer(
    status: int,
    document: object,
    headers: Mapping[str, str] | None = None,
    *,
    media_type: str = "application/json",
    hit: bool | None = None,
) -> Answer:
    """An answer with `document` as JSON."""
    body = json.dumps(document).encode()
    return Answer(status, InMemory(body), {"Content-Type": media_type, **(headers or {})}, hit=hit)


def error_answer(error: RegistryError) -> Answer:
    """The answer that tells a client of `error`, with the body of the specification's "Error Codes"."""
    document = {"errors": [{"code": error.code, "message": error.message, "detail": None}]}
    return json_answer(error.status, document, error.headers())
