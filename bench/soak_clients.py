"""The clients of the soak: each requests things in sequence, and compares the answers with what is correct."""

from __future__ import annotations

import http.client
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from urllib.parse import quote

from tests.images import Blob, Image, Manifest, digest_of
from tests.processes import Daemon

HEADERS_WITHIN = 30.0
"""Seconds after which containerd gives up."""

ENDLESS = "soak/endless"
"""A repository whose blobs never end."""

_HANGS = 120.0
_PIECE = 64 * 1024


@dataclass(frozen=True)
class Published:
    """An image at the upstream, with the tag 1; with `spoiled` the upstream may send wrong bytes."""

    repository: str
    image: Image
    spoiled: bool

    @property
    def blobs(self) -> tuple[Blob, ...]:
        """Return its blobs."""
        return self.image.blobs


@dataclass
class Tally:
    """Counts of outcomes, and violations."""

    outcomes: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)
    received: int = 0
    slowest_headers: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, outcome: str, received: int = 0) -> None:
        """Count an outcome, and the bytes of its body."""
        with self.lock:
            self.outcomes[outcome] += 1
            self.received += received

    def headers_took(self, seconds: float) -> None:
        """Record how long a client waited for headers."""
        with self.lock:
            self.slowest_headers = max(self.slowest_headers, seconds)

    def violation(self, what: str) -> None:
        """Record a violation."""
        with self.lock:
            self.violations.append(what)


class Life:
    """Whether the daemon runs: `changes` grows before it is killed, and when it serves again."""

    def __init__(self) -> None:
        self.changes = 0

    def undisturbed(self, since: int) -> bool:
        """Whether the daemon has run without interruption since `changes` had that value."""
        return since % 2 == 0 and since == self.changes


class Client(threading.Thread):
    """Sends requests until `stop` is set."""

    def __init__(
        self,
        number: int,
        seed: int,
        daemon: Daemon,
        ns: str,
        published: Sequence[Published],
        tally: Tally,
        life: Life,
    ) -> None:
        super().__init__(name=f"client-{number}")
        self._random = random.Random(f"{seed}/client/{number}")
        self._daemon = daemon
        self._query = f"?ns={quote(ns, safe='')}"
        self._published = published
        self._tally = tally
        self._life = life
        self.stop = threading.Event()

    def run(self) -> None:
        """Send requests."""
        tasks = [
            (self._blob, 45),
            (self._part, 20),
            (self._gone, 10),
            (self._manifest, 20),
            (self._unknown, 5),
            (self._slow, 0.2),
            (self._endless, 0.05),
        ]
        while not self.stop.is_set():
            (task,) = self._random.choices([task for task, _ in tasks], [weight for _, weight in tasks])
            self.guarded(task, self._random.choice(self._published))

    def guarded(self, task: Callable[[Published], None], one: Published) -> None:
        """Run a task; an error is a violation, unless the daemon was killed meanwhile."""
        since = self._life.changes
        try:
            task(one)
        except TimeoutError as problem:
            self._tally.violation(f"{self.name}: no answer: {problem}")
        except (OSError, http.client.HTTPException) as problem:
            if self._life.undisturbed(since):
                self._tally.violation(f"{self.name}: {type(problem).__name__} from a running daemon: {problem}")
            else:
                self._tally.count("the daemon was killed")
                self.stop.wait(0.1)
        except Exception as problem:
            self._tally.violation(f"{self.name}: {type(problem).__name__}: {problem}")

    # Requests

    def whole(self, one: Published) -> None:
        """Pull an image; only the complete image is correct."""
        for manifest in one.image.manifests:
            self._expect(one, f"manifests/{manifest.digest}", manifest.data, complete=True)
        for blob in one.blobs:
            self._expect(one, f"blobs/{blob.digest}", blob.data, complete=True)

    def blobs(self, one: Published) -> None:
        """Ask for each blob of an image."""
        for blob in one.blobs:
            self._expect(one, f"blobs/{blob.digest}", blob.data)

    def _blob(self, one: Published) -> None:
        blob = self._random.choice(one.blobs)
        self._expect(one, f"blobs/{blob.digest}", blob.data)

    def _part(self, one: Published) -> None:
        data = self._random.choice(one.blobs).data
        digest = digest_of(data)
        start = self._random.randrange(len(data))
        stop = self._random.randrange(start, len(data)) + 1
        suffix = self._random.randrange(1, len(data) + 1)
        asked, first, end = self._random.choice(
            [
                (f"{start}-", start, len(data)),
                (f"{start}-{stop - 1}", start, stop),
                (f"-{suffix}", len(data) - suffix, len(data)),
            ]
        )
        told = f"bytes {first}-{end - 1}/{len(data)}"
        self._expect(one, f"blobs/{digest}", data[first:end], asked=f"bytes={asked}", told=told)

    def _gone(self, one: Published) -> None:
        """Disconnect in the middle of an answer."""
        blob = self._random.choice(one.blobs)
        self._expect(one, f"blobs/{blob.digest}", blob.data, leave_after=self._random.randrange(len(blob.data)))

    def _manifest(self, one: Published) -> None:
        manifest: Manifest = one.image.manifest
        reference = self._random.choice(("1", manifest.digest))
        method = self._random.choice(("GET", "HEAD"))
        self._expect(one, f"manifests/{reference}", manifest.data, method=method)

    def _unknown(self, one: Published) -> None:
        digest = digest_of(self._random.randbytes(8))
        self._expect(one, f"blobs/{digest}", None)

    def _slow(self, one: Published) -> None:
        """Read a few kB a second, or nothing, and disconnect after a while."""
        blob = max(one.blobs, key=lambda blob: len(blob.data))
        piece = self._random.choice((0, 2_000))
        with closing(socket.socket()) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.settimeout(_HANGS)
            connection.connect(("127.0.0.1", self._daemon.port))
            path = f"/v2/{one.repository}/blobs/{blob.digest}{self._query}"
            connection.sendall(f"GET {path} HTTP/1.1\r\nHost: soak\r\n\r\n".encode())
            for _ in range(self._random.randrange(10, 40)):
                self.stop.wait(0.5)
                if piece and not connection.recv(piece):
                    break
        self._tally.count("read slowly" if piece else "not read")

    def _endless(self, one: Published) -> None:
        """Ask for a blob that never ends; its size is not known, so that no answer can begin."""
        digest = digest_of(self._random.randbytes(8))
        with closing(http.client.HTTPConnection("127.0.0.1", self._daemon.port, timeout=_HANGS)) as connection:
            connection.request("GET", f"/v2/{ENDLESS}/blobs/{digest}{self._query}")
            answer = connection.getresponse()
            if answer.status != 503 or not answer.headers["Retry-After"]:
                raise AssertionError(f"{self.name}: a blob that never ends gave {answer.status}")
        self._tally.count("never ends")

    def _expect(
        self,
        one: Published,
        path: str,
        data: bytes | None,
        *,
        method: str = "GET",
        asked: str = "",
        told: str = "",
        leave_after: int | None = None,
        complete: bool = False,
    ) -> None:
        """Send a request and check its answer.

        `data` is the correct content, None for content that does not exist; with `complete` a short answer is a
        violation.
        """
        what = f"{self.name}: {method} {one.repository}/{path} {asked}"
        with closing(http.client.HTTPConnection("127.0.0.1", self._daemon.port, timeout=_HANGS)) as connection:
            began = time.monotonic()
            target = f"/v2/{one.repository}/{path}{self._query}"
            connection.request(method, target, headers={"Range": asked} if asked else {})
            answer = connection.getresponse()
            took = time.monotonic() - began
            self._tally.headers_took(took)
            if took > HEADERS_WITHIN:
                self._tally.violation(f"{what}: headers after {took:.1f} s")
            if answer.status == 503 and not complete:
                self._tally.count("503")
                if not answer.headers["Retry-After"]:
                    self._tally.violation(f"{what}: 503 without Retry-After")
                return
            if answer.status != (404 if data is None else 206 if asked else 200):
                raise AssertionError(f"{what} gave {answer.status} {answer.read(500)!r}")
            if data is None:
                self._tally.count("404")
                return
            length = answer.headers["Content-Length"]
            if length != str(len(data)) or (answer.headers["Content-Range"] or "") != told:
                raise AssertionError(f"{what}: {answer.headers.items()}")
            if method == "HEAD":
                self._tally.count("HEAD")
                return
            body = self._read(answer, len(data) if leave_after is None else leave_after)
        to_the_end = not told or told.endswith(f"-{_size(told) - 1}/{_size(told)}")
        self._compare(what, one, body, data, left=leave_after is not None, to_the_end=to_the_end, complete=complete)

    @staticmethod
    def _read(answer: http.client.HTTPResponse, most: int) -> bytes:
        body = bytearray()
        while len(body) < most and (piece := answer.read1(min(_PIECE, most - len(body)))):
            body += piece
        return bytes(body)

    def _compare(
        self, what: str, one: Published, body: bytes, data: bytes, *, left: bool, to_the_end: bool, complete: bool
    ) -> None:
        ends_short = len(body) < len(data)
        outcome = "left by the client" if left else "short" if ends_short else "right"
        # Before its last byte, wrong content of a blob cannot be detected.
        unknowable = one.spoiled and (ends_short or not to_the_end) and not complete
        wrong = (complete and ends_short) or not (unknowable or data.startswith(body))
        if wrong:
            differ = [at for at, (got, right) in enumerate(zip(body, data, strict=False)) if got != right]
            first = differ[0] if differ else len(body)
            self._tally.violation(
                f"{what}: wrong, {len(body)} of {len(data)} bytes, {len(differ)} of them, from byte {first} on"
            )
        self._tally.count(outcome, len(body))


def _size(told: str) -> int:
    return int(told.rpartition("/")[2])
