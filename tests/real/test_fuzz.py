"""Anything at all, over a real socket: never a 500, a traceback, a hang, or a path outside the store."""

from __future__ import annotations

import re
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from tests.images import digest_of
from tests.namespaces import Namespace, NamespacedDaemon
from tests.processes import ROOT, Daemon, wait_until
from tests.real.fuzzing import Header, Wire, check, check_log, check_store, check_trace, mutated
from tests.real.scripted import SOON, plain_image
from tests.upstream import ScriptedRegistry

BUDGET = {
    "names": 2500,
    "references": 2000,
    "upstreams": 1500,
    "ranges": 1500,
    "headers": 1500,
    "raw": 500,
    "lonely": 500,
}

IMAGE = plain_image("fuzz", 2000)
LAYER = IMAGE.blobs[1]

ANSWERS = frozenset({200, 206, 400, 403, 404, 405, 416})
UNREACHABLE = frozenset({503})
"""Only where there is no network: the scripted upstream always answers."""


def cases(name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """So many cases, the same at every run. A case takes as long as the daemon does, hence no deadline.

    They are small as they are, and to make one that hangs smaller would take hours.
    """
    return settings(
        max_examples=BUDGET[name],
        deadline=None,
        derandomize=True,
        database=None,
        phases=(Phase.explicit, Phase.generate),
        # Two processes on a busy machine are slow now and then; that says nothing about the data.
        suppress_health_check=[HealthCheck.too_slow],
    )


@dataclass
class Target:
    """A daemon, and a connection to it."""

    daemon: Daemon
    wire: Wire
    cases: int = 0

    def ask(self, method: bytes, target: bytes, headers: tuple[Header, ...] = (), body: bytes = b"") -> None:
        """One case."""
        self.cases += 1
        check(self.wire.ask(method, target, (HOST, *headers), body), ANSWERS, method)


HOST = (b"Host", b"fuzz")


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    """A daemon whose default upstream is a scripted registry, the only one it may ask, under strace."""
    if shutil.which("strace") is None:
        pytest.fail("strace is missing: apt-get install strace", pytrace=False)
    folder = tmp_path_factory.mktemp("fuzz")
    with ExitStack() as stack:
        upstream = stack.enter_context(ScriptedRegistry())
        upstream.add("team/app", IMAGE, "1", "latest")
        options = ["--default-ns", upstream.host, "--allow-upstreams", upstream.host]
        daemon = Daemon(folder, {upstream.host: "http"}, *options)
        # As a grandchild, so that the process that we start and end is the daemon itself.
        trace = folder / "trace"
        strace = ["strace", "-D", "-f", "-q", "--seccomp-bpf", "-s", "4096", "-e", "trace=%file", "-o", str(trace)]
        daemon.argv = [*strace, *daemon.argv]
        stack.enter_context(daemon)
        before = outside(folder, daemon)
        wire = Wire(lambda: socket.create_connection(("127.0.0.1", daemon.port)))
        stack.callback(wire.close)
        yield Target(daemon, wire)
        daemon.terminate()
        check_log(daemon)
        check_store(daemon.image_path)
        assert outside(folder, daemon) == before
        end = re.compile(rf"^{daemon.process.pid} +\+\+\+ ", re.MULTILINE)
        wait_until(lambda: end.search(trace.read_text(errors="replace")), SOON, "strace has written all")
        imported = {
            f"{Path(path).absolute()}/" for path in (sys.prefix, sys.base_prefix, str(ROOT), *sys.path) if path
        }
        assert check_trace(trace, daemon, sorted(imported - {"/"})) > 1000


def outside(folder: Path, daemon: Daemon) -> set[Path]:
    """What is beside the store."""
    return {path for path in folder.rglob("*") if daemon.image_path not in (path, *path.parents)}


@pytest.fixture(scope="module")
def lonely(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    """A daemon that may ask every upstream, in a network where there is none."""
    folder = tmp_path_factory.mktemp("lonely")
    with Namespace("lonely") as namespace, NamespacedDaemon(namespace, folder) as daemon:
        address = "127.0.0.1", daemon.port
        wire = Wire(lambda: namespace.call(lambda: socket.create_connection(address)))
        yield Target(daemon, wire)
        wire.close()
        check_log(daemon)
        check_store(daemon.image_path)


@pytest.fixture(autouse=True)
def all_cases(request: pytest.FixtureRequest) -> Iterator[None]:
    """As many as were promised."""
    name = request.node.originalname.removeprefix("test_")
    if name not in BUDGET:
        yield
        return
    target = request.getfixturevalue("lonely" if name == "lonely" else "traced")
    before = target.cases
    yield
    assert target.cases - before >= BUDGET[name]


def test_the_budget() -> None:
    """The promise is one of 10,000."""
    assert sum(BUDGET.values()) == 10_000


HEX = LAYER.digest.removeprefix("sha256:").encode()
DIGESTS = (
    LAYER.digest.encode(),
    IMAGE.manifest.digest.encode(),
    b"sha256:" + b"0" * 64,
    b"sha512:" + b"0" * 128,
    digest_of(b"nobody has it").encode(),
)
TAGS = (b"1", b"latest", b"v1.29.1", b"A_b-c.d", b"sha256-" + HEX, b"1" * 128)
NAMES = (
    *(b"team/app", b"team/app/deep/er", b"app", b"a__b/c.d/e-f", b"library/nginx"),
    *(
        b"localhost/app",
        b"127.0.0.1:1/team/app",
        b"docker.io/library/nginx",
        b"registry.k8s.io/pause",
        b"[::1]:5000/x",
    ),
)
UPSTREAMS = (
    *(b"docker.io", b"index.docker.io", b"localhost", b"localhost:5000", b"127.0.0.1", b"127.0.0.1:1", b"[::1]:80"),
    *(b"169.254.169.254", b"metadata.google.internal", b"registry.k8s.io", b"user:password@host", b"http://host/x"),
    *(b"reg.io%3A5000", b"%5B::1%5D", b"0x7f000001", b"2130706433", b"xn--bcher-kva.example", b"host:65535"),
)
QUERIES = (b"", b"?n=10", b"?n=0&last=1", b"?n=999999999999", b"?last=1", b"?artifactType=a/b", b"?ns=", b"?a=%zz&&=")
RANGES = (
    *(b"bytes=0-", b"bytes=0-0", b"bytes=1999-", b"bytes=2000-", b"bytes=-1", b"bytes=-0", b"bytes=-99999"),
    *(
        b"bytes=5-4",
        b"bytes=0-1,3-4",
        b"bytes=, 0-1",
        b"Bytes = 7 - 9",
        b"bytes=0-18446744073709551616",
        b"lines=0-1",
    ),
    *(b"bytes=" + b"9" * 30 + b"-", b"bytes=--1", b"bytes", b"bytes=", b"", b"bytes=1e3-", b"bytes=0x10-"),
)
METHODS = st.sampled_from((b"GET", b"GET", b"GET", b"HEAD"))


@cases("names")
@given(
    METHODS, mutated(NAMES), st.sampled_from((b"manifests/1", b"blobs/" + DIGESTS[0], b"tags/list")), mutated(QUERIES)
)
def test_names(traced: Target, method: bytes, name: bytes, rest: bytes, query: bytes) -> None:
    traced.ask(method, b"/v2/" + name + b"/" + rest + query)


@cases("references")
@given(METHODS, st.sampled_from((b"manifests", b"blobs", b"referrers")), mutated(TAGS) | mutated(DIGESTS))
def test_references(traced: Target, method: bytes, kind: bytes, reference: bytes) -> None:
    traced.ask(method, b"/v2/team/app/" + kind + b"/" + reference)


@cases("upstreams")
@given(METHODS, st.sampled_from((b"manifests/1", b"blobs/" + DIGESTS[0], b"tags/list")), mutated(UPSTREAMS))
def test_upstreams(traced: Target, method: bytes, rest: bytes, ns: bytes) -> None:
    """Asked for by `ns`, which the daemon refuses unless it is the one that it may ask."""
    traced.ask(method, b"/v2/team/app/" + rest + b"?ns=" + ns)


@st.composite
def ranges(draw: st.DrawFn) -> bytes:
    """Near the ends of the blob, where mistakes are."""
    places = st.sampled_from((0, 1, 2, 999, 1998, 1999, 2000, 2001, 2**31, 2**63, 2**64)) | st.integers(0, 4000)
    first, last = draw(st.none() | places), draw(st.none() | places)
    return b"bytes=%s-%s" % tuple(b"" if place is None else b"%d" % place for place in (first, last))


@cases("ranges")
@given(METHODS, st.sampled_from((b"manifests/1", b"blobs/" + DIGESTS[0])), ranges() | mutated(RANGES))
@example(b"GET", b"blobs/" + DIGESTS[0], b"\xff")
def test_ranges(traced: Target, method: bytes, rest: bytes, value: bytes) -> None:
    """A part is the part that its Content-Range says, and the part that was asked for."""
    traced.cases += 1
    whole = LAYER.data if rest.startswith(b"blobs") else IMAGE.manifest.data
    answer = traced.wire.ask(method, b"/v2/team/app/" + rest, (HOST, (b"Range", value)))
    check(answer, ANSWERS, method)
    if answer is None or method == b"HEAD":
        return
    told = answer.headers.get("content-range", "")
    if answer.status == 206:
        match = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", told)
        assert match, told
        first, last, size = map(int, match.groups())
        assert size == len(whole)
        assert answer.body == whole[first : last + 1] != b""
        plain = re.fullmatch(rb"bytes=(\d*)-(\d*)", value)
        if plain and plain[1]:
            assert first == int(plain[1])
            assert last == min(int(plain[2] or size), size - 1)
        elif plain:
            assert (first, last) == (max(0, size - int(plain[2])), size - 1)
    elif answer.status == 416:
        assert told == f"bytes */{len(whole)}"
    elif answer.status == 200:
        assert answer.body == whole


FIELDS = (
    *(b"Accept", b"Accept-Encoding", b"Authorization", b"Connection", b"Cookie", b"Content-Type", b"Expect", b"Host"),
    *(b"If-Match", b"If-None-Match", b"If-Range", b"If-Modified-Since", b"Range", b"TE", b"Upgrade", b"User-Agent"),
    *(b"X-Forwarded-For", b"X-HTTP-Method-Override", b"Sec-WebSocket-Key", b"HTTP2-Settings", b"Origin", b"X"),
)
VALUES = (
    *(
        b"*/*",
        b"gzip",
        b"identity;q=0",
        b"Basic dTpw",
        b"Bearer x",
        b"close",
        b"keep-alive",
        b"upgrade, close",
        b"a=b",
    ),
    *(
        b"multipart/form-data; boundary=x",
        b"application/x-www-form-urlencoded",
        b"100-continue",
        b"h2c",
        b"websocket",
    ),
    *(
        b'"x"',
        b'W/"x"',
        b"*",
        b"Thu, 01 Jan 1970 00:00:00 GMT",
        b"trailers",
        b"DELETE",
        b"x" * 5000,
        b"",
        b"bytes=0-1",
    ),
)


@cases("headers")
@given(
    st.sampled_from((b"GET", b"HEAD", b"PUT", b"POST", b"OPTIONS", b"BREW")),
    st.sampled_from((b"/v2/", b"/v2/team/app/manifests/1", b"/v2/team/app/blobs/" + DIGESTS[0], b"/health", b"/")),
    st.lists(st.tuples(st.sampled_from(FIELDS) | mutated(FIELDS, 1), mutated(VALUES)), max_size=4),
    st.binary(max_size=20),
)
@example(b"GET", b"/v2/team/app/manifests/1", [(b"Range", b"bytes=0-"), (b"If-Range", b"\xff")], b"")
def test_headers(traced: Target, method: bytes, target: bytes, headers: list[Header], body: bytes) -> None:
    traced.ask(method, target, tuple(headers), body if method in (b"PUT", b"POST") else b"")


@cases("raw")
@given(
    mutated((b"GET", b"HEAD", b"PUT", b"get")), st.binary(max_size=200) | mutated((b"/v2/", b"*", b"http://h/v2/"))
)
def test_raw(traced: Target, method: bytes, target: bytes) -> None:
    """What is hardly a request: whatever comes of it, the connection ends, and no other is hurt."""
    traced.cases += 1
    line = (method + b" " + target + b" HTTP/1.1").replace(b"\r\n", b"\n")
    answer = traced.wire.say(line + b"\r\nHost: fuzz\r\nConnection: close\r\n\r\n")
    check(answer, ANSWERS, b"HEAD" if line.startswith(b"HEAD ") else b"GET")
    healthy = traced.wire.ask(b"GET", b"/v2/", (HOST,))
    assert healthy is not None
    assert healthy.status == 200


@cases("lonely")
@given(METHODS, mutated(NAMES), st.none() | mutated(UPSTREAMS), st.sampled_from((b"manifests/1", b"tags/list")))
@example(b"GET", b"[::1]:5000/x", None, b"manifests/1")
@example(b"GET", b"x", b"ab--cd.example", b"manifests/1")
@example(b"GET", b"x", b"xn--a.example", b"tags/list")
@example(b"GET", b"x", b"a" * 64 + b".example", b"manifests/1")
def test_lonely(lonely: Target, method: bytes, name: bytes, ns: bytes | None, rest: bytes) -> None:
    """No upstream can be reached, and every one is tried."""
    lonely.cases += 1
    target = b"/v2/" + name + b"/" + rest + (b"" if ns is None else b"?ns=" + ns)
    check(lonely.wire.ask(method, target, (HOST,)), ANSWERS | UNREACHABLE, method)
