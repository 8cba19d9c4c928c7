"""A client that pulls an image as containerd does, and retries where kubelet would."""

from __future__ import annotations

import hashlib
import http.client
import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from tests.images import DOCKER_LIST, DOCKER_MANIFEST, OCI_INDEX, OCI_MANIFEST

HEADERS_WITHIN = 30.0
"""Seconds after which containerd 2.3 gives up waiting for headers or for a connection."""

_STALLED = 300.0
"""Seconds without a byte after which the CRI plugin gives up."""
_AT_ONCE = 3
_AGAIN = 1.0
_PIECE = 64 * 1024
_ACCEPT = ", ".join((DOCKER_MANIFEST, DOCKER_LIST, OCI_MANIFEST, OCI_INDEX, "*/*"))


@dataclass
class Part:
    """The received bytes of a blob."""

    digest: str
    size: int
    got: int = 0
    hasher: hashlib._Hash = field(default_factory=hashlib.sha256)

    @property
    def right(self) -> bool:
        """Whether the blob is complete and correct."""
        return self.got == self.size and f"sha256:{self.hasher.hexdigest()}" == self.digest

    def add(self, data: bytes) -> None:
        """Append received bytes."""
        self.hasher.update(data)
        self.got += len(data)

    def restart(self) -> None:
        """Discard the received bytes."""
        self.hasher, self.got = hashlib.sha256(), 0


@dataclass(frozen=True)
class Trouble:
    """A failure of a request, and how long after sending it occurred."""

    what: str
    after: float


class Left(Exception):
    """The client has given up."""


class Failed(Exception):
    """A request failed, or its answer was wrong."""

    def __init__(self, what: str, wait: float = _AGAIN) -> None:
        super().__init__(what)
        self.what = what
        self.wait = wait


class Pull:
    """One client's pull of `digest` by `tag`; `url` gives the URL of a path below /v2/.

    The client fetches three blobs at once, continues by Range after a body that ended short, and retries after any
    error, in a second or when the server says, for at most `limit` seconds. `met` is called when the manifest has
    arrived.
    """

    def __init__(
        self,
        url: Callable[[str], str],
        repository: str,
        tag: str,
        digest: str,
        limit: float,
        met: Callable[[], None] = lambda: None,
    ) -> None:
        self._url = url
        self._repository = repository
        self._tag = tag
        self._digest = digest
        self._deadline = time.monotonic() + limit
        self._met = met
        self._left = threading.Event()
        self._lock = threading.Lock()
        self._sockets: set[socket.socket] = set()
        self._manifest: bytes | None = None
        self._parts: list[Part] = []
        self.troubles: list[Trouble] = []
        self.slowest_headers = 0.0

    @property
    def received(self) -> int:
        """How many bytes of blobs have arrived."""
        return sum(part.got for part in self._parts)

    @property
    def right(self) -> bool:
        """Whether the whole image has arrived, correctly."""
        return self._manifest is not None and all(part.right for part in self._parts)

    def summary(self) -> str:
        """Describe what went wrong, and how often."""
        return ", ".join(f"{n} {what}" for what, n in Counter(one.what for one in self.troubles).most_common())

    def run(self) -> bool:
        """Pull, or continue an earlier pull; return whether everything is correct in the end."""
        self._left.clear()
        with suppress(Left):
            if self._manifest is None:
                self._again(self._resolve)
                self._met()
            with ThreadPoolExecutor(_AT_ONCE) as pool:
                # The config comes first.
                for done in [pool.submit(self._blob, part) for part in self._parts]:
                    with suppress(Left):
                        done.result()
        return self.right

    def leave(self) -> None:
        """Give up: close all connections."""
        self._left.set()
        with self._lock:
            for one in self._sockets:
                with suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)

    # Retries

    def _again(self, task: Callable[[], None]) -> None:
        while True:
            began = time.monotonic()
            try:
                return task()
            except Failed as failed:
                what, wait = failed.what, failed.wait
            except TimeoutError:
                what, wait = "time-out", _AGAIN
            except ConnectionRefusedError:
                what, wait = "refused", _AGAIN
            except OSError:
                what, wait = "reset", _AGAIN
            except http.client.HTTPException:
                what, wait = "no answer", _AGAIN
            if not self._left.is_set():
                self.troubles.append(Trouble(what, time.monotonic() - began))
            if self._left.wait(min(wait, max(0.0, self._remaining))) or not self._remaining:
                raise Left

    @property
    def _remaining(self) -> float:
        return max(0.0, self._deadline - time.monotonic())

    def _resolve(self) -> None:
        with closing(self._connection("")) as connection:
            answer = self._ask(connection, f"manifests/{self._tag}", "HEAD", {"Accept": _ACCEPT})
            digest = answer.headers["Docker-Content-Digest"]
            answer.read()
        if digest != self._digest:
            raise Failed(f"HEAD says {digest}")
        with closing(self._connection("")) as connection:
            data = self._ask(connection, f"manifests/{digest}", "GET", {"Accept": _ACCEPT}).read()
        if f"sha256:{hashlib.sha256(data).hexdigest()}" != digest:
            raise Failed("wrong manifest")
        body = json.loads(data)
        self._parts = [Part(one["digest"], one["size"]) for one in (body["config"], *body["layers"])]
        self._manifest = data

    def _blob(self, part: Part) -> None:
        self._again(lambda: self._rest_of(part))

    def _rest_of(self, part: Part) -> None:
        if part.right:
            return
        headers = {"Range": f"bytes={part.got}-"} if part.got else {}
        before = part.got
        with closing(self._connection("")) as connection:
            answer = self._ask(connection, f"blobs/{part.digest}", "GET", headers)
            # An answer of 200 to a Range has the whole blob: discard the received part.
            useless = part.got if answer.status == 200 else 0
            if answer.status == 206 and not (answer.headers["Content-Range"] or "").startswith(f"bytes {part.got}-"):
                raise Failed("wrong range")
            while part.got < part.size and (data := answer.read1(_PIECE)):
                part.add(data[useless:])
                useless = max(0, useless - len(data))
        if part.got < part.size:
            # containerd continues at once, unless the body brought nothing.
            raise Failed("short body", 0.0 if part.got > before else _AGAIN)
        if not part.right:
            part.restart()
            raise Failed("WRONG BYTES")

    # Single requests

    def _connection(self, path: str) -> http.client.HTTPConnection:
        if self._left.is_set() or not self._remaining:
            raise Left
        return http.client.HTTPConnection(
            urlsplit(self._url(path)).netloc, timeout=min(HEADERS_WITHIN, self._remaining)
        )

    def _ask(
        self, connection: http.client.HTTPConnection, path: str, method: str, headers: dict[str, str]
    ) -> http.client.HTTPResponse:
        connection.connect()
        one: socket.socket = connection.sock
        with self._lock:
            self._sockets = {other for other in self._sockets if other.fileno() >= 0} | {one}
        url = urlsplit(self._url(f"{self._repository}/{path}"))
        connection.request(method, f"{url.path}?{url.query}" if url.query else url.path, headers=headers)
        began = time.monotonic()
        answer = connection.getresponse()
        self.slowest_headers = max(self.slowest_headers, time.monotonic() - began)
        if answer.status not in (200, 206):
            told = answer.headers["Retry-After"] or ""
            raise Failed(str(answer.status), float(told) if told.isdigit() else _AGAIN)
        one.settimeout(max(0.1, min(_STALLED, self._remaining)))
        return answer
