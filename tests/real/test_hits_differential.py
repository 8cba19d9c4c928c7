"""Hits by the short way: the answers are, byte for byte, those of the usual way."""

from __future__ import annotations

import random
import socket
import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import pytest

from tests.certificates import Authority
from tests.images import MIB, OCI_CONFIG, OCI_LAYER, OCI_MANIFEST, Blob, Image, digest_of, make_index, random_bytes
from tests.processes import Daemon, free_port
from tests.real.byte_clients import Answer, Client, Made, make_request, usual
from tests.real.caches import blob_paths, cache_in, daemon_in, manifest_of, manifest_paths

SEED = 20260716
REPOSITORY = "team/differential"
SIZES = [0, 1, 20_000, 65_535, 65_536, 65_537, MIB - 1, MIB, MIB + 1, 5 * MIB]
LARGE_PADDING = 70_000
"""Bytes that make a manifest too large to be remembered."""
FROM_CACHE = ("serving manifest from cache: ", "serving blob from cache: ")
"""What the usual way logs of a GET that is a hit, and the short way does not."""


def image_with(seed: object, sizes: list[int], padding: int = 0) -> Image:
    """Make an image with layers of these sizes in bytes, and `padding` bytes in its manifest."""
    blobs = [
        Blob(digest_of(data), data, OCI_CONFIG if number == 0 else OCI_LAYER)
        for number, data in enumerate(
            [f'{{"seed": "{seed}"}}'.encode(), *(b"".join(random_bytes((seed, n), n)) for n in sizes)]
        )
    ]
    named = [{"mediaType": blob.media_type, "digest": blob.digest, "size": len(blob.data)} for blob in blobs]
    body = {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": named[0]}
    return Image(manifest_of({**body, "layers": named[1:], "annotations": {"pad": "x" * padding}}), tuple(blobs), "")


SIZED = image_with("sizes", SIZES)
LONG = image_with("long", [10], 55_000)
LARGE = image_with("large", [11], LARGE_PADDING)
INDEX = make_index("differential")
PATHS = [
    *(f"{REPOSITORY}/manifests/{reference}" for reference in ("1", "list", SIZED.manifest.digest, "long", "large")),
    *(f"{REPOSITORY}/manifests/{one.digest}" for one in INDEX.manifests),
    *(f"{REPOSITORY}/blobs/{blob.digest}" for blob in SIZED.blobs[:6]),
    *(f"{REPOSITORY}/blobs/{blob.digest}" for blob in INDEX.blobs),
    f"elsewhere/app/blobs/{SIZED.blobs[1].digest}",
    f"elsewhere/app/manifests/{SIZED.manifest.digest}",
    *(f"{REPOSITORY}/manifests/{bad}" for bad in ("UPPER:x", "sha256:0", "-x")),
    f"{REPOSITORY}/blobs/sha256:{'g' * 64}",
    f"{REPOSITORY}/tags/list",
    "",
    "_catalog",
]


@dataclass(frozen=True)
class Site:
    """A daemon that holds all images and asks no upstream, and how to connect to it by each transport."""

    daemon: Daemon
    connect: Mapping[str, Callable[[], socket.socket]]
    host: str
    """The upstream of the images."""

    def target(self, path: str) -> str:
        """Return the target for a path below /v2/."""
        return f"/v2/{path}?ns={self.host}"

    def get(self, path: str, headers: str = "") -> bytes:
        """Return a request for a path below /v2/; each of the `headers` ends with CRLF."""
        return f"GET {self.target(path)} HTTP/1.1\r\nHost: cache\r\n{headers}\r\n".encode()

    @contextmanager
    def clients(self, transport: str = "tcp", count: int = 2) -> Iterator[list[Client]]:
        """Open connections."""
        with ExitStack() as stack:
            yield [stack.enter_context(closing(Client(self.connect[transport]))) for _ in range(count)]

    @property
    def by_the_usual_way(self) -> int:
        """How many hits have taken the usual way so far, without HEAD requests for blobs."""
        return sum(self.daemon.log.count(words) for words in FROM_CACHE)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A daemon with the images."""
    folder = tmp_path_factory.mktemp("differential")
    authority = Authority(folder / "authority")
    certificate, key = authority.issue("127.0.0.1")
    with cache_in(folder) as cache:
        for what, tag in ((SIZED, "1"), (LONG, "long"), (LARGE, "large"), (INDEX, "list")):
            cache.upstream.add(REPOSITORY, what, tag)
            assert cache.ask(f"{REPOSITORY}/manifests/{tag}").body == what.manifest.data
            for path, data in (manifest_paths(REPOSITORY, what) | blob_paths(REPOSITORY, what)).items():
                if "sha256" in path:
                    assert cache.ask(path).body == data
            for blob in what.blobs:
                cache.wait_stored(blob.digest)
        host = cache.upstream.host
    port, secure, own = free_port(), free_port(), folder / "socket"
    endpoints = (
        f"tcp:{port}:interface=127.0.0.1",
        f"ssl:{secure}:interface=127.0.0.1:privateKey={key}:certKey={certificate}",
        f"unix:{own}",
    )
    context = ssl.create_default_context(cafile=str(authority.ca))

    def unix() -> socket.socket:
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(str(own))
        return connection

    def tls() -> socket.socket:
        return context.wrap_socket(socket.create_connection(("127.0.0.1", secure)), server_hostname="127.0.0.1")

    options = [part for endpoint in endpoints for part in ("--listen", endpoint)]
    with daemon_in(folder, "--air-gapped", *options, named=[host], port=port) as daemon:
        tcp = partial(socket.create_connection, ("127.0.0.1", port))
        connect: dict[str, Callable[[], socket.socket]] = {"tcp": tcp, "tls": tls, "unix": unix}
        yield Site(daemon, connect, host)


def takes_the_usual_way(made: Made, answer: Answer) -> bool:
    """Tell whether the daemon would log that it serves this from the cache, unless it takes the short way."""
    found = b"\r\nDocker-Content-Digest: " in answer.head or answer.head[8:13] == b" 416 "
    return found and ("/manifests/" in made.path or not made.line.startswith(b"HEAD "))


def is_remembered(made: Made, answer: Answer) -> bool:
    """Tell whether the answer to a plain request is remembered."""
    large = made.path.endswith("/large") or (made.path.startswith("elsewhere/") and "/manifests/" in made.path)
    return made.plain and answer.head.startswith(b"HTTP/1.1 200 ") and not large


@pytest.mark.parametrize(("transport", "count"), [("tcp", 3000), ("tls", 300), ("unix", 300)])
def test_made_up_requests(site: Site, transport: str, count: int) -> None:
    chance = random.Random(SEED)
    remembered: set[bytes] = set()
    usually = shortly = 0
    before = site.by_the_usual_way
    with site.clients(transport) as (plain, other):
        for _ in range(count):
            made = make_request(chance, PATHS, site.host, transport)
            wanted = other.ask(made.data, as_sent=usual(made.data))
            counts = takes_the_usual_way(made, wanted)
            usually += counts
            for _ in range(2):
                assert plain.ask(made.data) == wanted, made
                short = made.plain and made.line in remembered and transport != "unix"
                usually, shortly = usually + (counts and not short), shortly + (counts and short)
                if is_remembered(made, wanted):
                    remembered.add(made.line)
    logged = site.by_the_usual_way - before
    # After what was answered at once, such as an error, a connection takes the usual way, too.
    assert logged >= usually, "unusual requests took the short way"
    assert usually + shortly - logged > (-1 if transport == "unix" else count / 10), "the short way was not taken"


def remember(site: Site, client: Client, path: str) -> Answer:
    """Have the answer to a GET remembered, and return it."""
    answers = [client.ask(site.get(path)) for _ in range(3)]
    assert answers[0] == answers[1] == answers[2]
    return answers[0]


SPLIT = [
    (f"{REPOSITORY}/manifests/1", ""),
    (f"{REPOSITORY}/blobs/{SIZED.blobs[3].digest}", "Accept: */*\r\n"),
    (f"{REPOSITORY}/manifests/1", "Range: bytes=7-11\r\n"),
]


@pytest.mark.parametrize(("path", "headers"), SPLIT)
def test_split_at_every_byte(site: Site, path: str, headers: str) -> None:
    request = site.get(path, headers)
    with site.clients(count=len(request) + 1) as (probe, *clients):
        wanted = probe.ask(request, as_sent=usual(request))
        remember(site, probe, path)
        for at, client in enumerate(clients):
            client.send(request[:at])
        for _ in range(2):
            # The daemon has read the first parts before it answers this.
            probe.ask(b"GET /v2/ HTTP/1.1\r\nHost: cache\r\n\r\n")
        for at, client in enumerate(clients):
            client.send(request[at:])
        for client in clients:
            assert client.answer() == wanted
            # The connection is in order afterwards.
            assert client.ask(request) == wanted


@pytest.mark.parametrize("transport", ["tcp", "tls", "unix"])
def test_several_requests_in_one_segment(site: Site, transport: str) -> None:
    chance = random.Random(SEED)
    paths = [path for path in PATHS if path.startswith(REPOSITORY)]
    with site.clients(transport, 2) as (alone, together):
        for _ in range(40):
            requests: list[bytes] = []
            while len(requests) < chance.randrange(2, 7):
                made = make_request(chance, paths, site.host)
                if made.plain:
                    requests.append(made.data)
            wanted = [alone.ask(one) for one in requests for _ in range(3)][::3]
            together.send(b"".join(requests))
            heads = [one.startswith(b"HEAD ") for one in requests]
            assert [together.answer(head=head) for head in heads] == wanted
            # Cut anywhere, not where a request ends.
            stream = b"".join(requests)
            at = sorted(chance.sample(range(1, len(stream)), 3))
            for start, stop in pairwise([0, *at, len(stream)]):
                together.send(stream[start:stop])
            assert [together.answer(head=head) for head in heads] == wanted


@pytest.mark.parametrize("transport", ["tcp", "tls", "unix"])
@pytest.mark.parametrize("number", range(len(SIZES)), ids=map(str, SIZES))
def test_bodies_of_all_sizes(site: Site, transport: str, number: int) -> None:
    blob = SIZED.blobs[number + 1]
    path = f"{REPOSITORY}/blobs/{blob.digest}"
    with site.clients(transport) as (client, other):
        answer = remember(site, client, path)
        assert answer.body == blob.data
        assert other.ask(site.get(path), as_sent=usual(site.get(path))) == answer
        head = site.get(path).replace(b"GET", b"HEAD", 1)
        assert [client.ask(head) for _ in range(3)] == [other.ask(head, as_sent=usual(head))] * 3


def slow_client(site: Site, transport: str) -> Client:
    """Return a client with a small buffer."""

    def connect() -> socket.socket:
        if transport != "tcp":
            return site.connect[transport]()
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", site.daemon.port))
        return connection

    return Client(connect, piece=50_000)


@pytest.mark.parametrize("transport", ["tcp", "tls", "unix"])
def test_slow_reader_that_asks_for_more_meanwhile(site: Site, transport: str) -> None:
    """Its requests come whole or in parts while the answer before is still being sent."""
    paths = [
        *(f"{REPOSITORY}/blobs/{SIZED.blobs[number].digest}" for number in (10, 1, 9, 3, 6)),
        *(f"{REPOSITORY}/manifests/{tag}" for tag in ("long", "1", "large")),
    ]
    with site.clients(transport, 1) as (quick,), closing(slow_client(site, transport)) as slow:
        wanted = [remember(site, quick, path) for path in paths]
        slow.send(site.get(paths[0]))
        for number, answer in enumerate(wanted):
            following = site.get(paths[number + 1]) if number + 1 < len(paths) else b""
            parts = [following] if number % 2 else [following[:30], following[30:50], following[50:]]
            waits = iter([*parts, *[b""] * 10_000])

            def send_and_wait(waits: Iterator[bytes] = waits) -> None:
                part = next(waits)
                if part:
                    slow.send(part)
                time.sleep(0.001)

            assert slow.answer(pause=send_and_wait) == answer
            for part in waits:
                if not part:
                    break
                slow.send(part)
