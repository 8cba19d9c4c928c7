"""Arbitrary requests over a real socket: no 500, no traceback, no hang, and no path outside the store."""

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

from tests.namespaces import Namespace, NamespacedDaemon
from tests.processes import ROOT, Daemon, wait_until
from tests.real.caches import SOON
from tests.real.fuzz_seeds import (
    DIGESTS,
    FIELDS,
    IMAGE,
    LAYER,
    METHODS,
    NAMES,
    QUERIES,
    RANGES,
    TAGS,
    UPSTREAMS,
    VALUES,
    mutated,
    ranges,
)
from tests.real.fuzz_wire import (
    Header,
    Wire,
    assert_log_is_clean,
    assert_paths_are_allowed,
    assert_store_is_clean,
    assert_valid,
)
from tests.upstream import ScriptedRegistry

BUDGET = {
    "names": 2500,
    "references": 2000,
    "upstreams": 1500,
    "ranges": 1500,
    "headers": 1500,
    "raw": 500,
    "isolated": 500,
}

ANSWERS = frozenset({200, 206, 400, 403, 404, 405, 416})
UNREACHABLE = frozenset({503})
"""Only where there is no network: the scripted upstream always answers."""


def cases(name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Configure the number of cases, with the same cases at every run and no deadline, since a case may be slow.

    The cases are small already, and shrinking one that hangs would take hours.
    """
    return settings(
        max_examples=BUDGET[name],
        deadline=None,
        derandomize=True,
        database=None,
        phases=(Phase.explicit, Phase.generate),
        # Two processes on a busy machine are slow now and then, which says nothing about the data.
        suppress_health_check=[HealthCheck.too_slow],
    )


@dataclass
class Target:
    """A daemon, and a connection to it."""

    daemon: Daemon
    wire: Wire
    cases: int = 0

    def ask(self, method: bytes, target: bytes, headers: tuple[Header, ...] = (), body: bytes = b"") -> None:
        """Send one case."""
        self.cases += 1
        assert_valid(self.wire.ask(method, target, (HOST, *headers), body), ANSWERS, method)


HOST = (b"Host", b"fuzz")


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    """A daemon under strace, whose default and only allowed upstream is a scripted registry."""
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
        assert_log_is_clean(daemon)
        assert_store_is_clean(daemon.image_path)
        assert outside(folder, daemon) == before
        end = re.compile(rf"^{daemon.process.pid} +\+\+\+ ", re.MULTILINE)
        wait_until(lambda: end.search(trace.read_text(errors="replace")), SOON, "strace has written all")
        imported = {
            f"{Path(path).absolute()}/" for path in (sys.prefix, sys.base_prefix, str(ROOT), *sys.path) if path
        }
        assert assert_paths_are_allowed(trace, daemon, sorted(imported - {"/"})) > 1000


def outside(folder: Path, daemon: Daemon) -> set[Path]:
    """Return the files beside the store."""
    return {path for path in folder.rglob("*") if daemon.image_path not in (path, *path.parents)}


@pytest.fixture(scope="module")
def isolated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    """A daemon that may use every upstream, in a network without any."""
    folder = tmp_path_factory.mktemp("isolated")
    with Namespace("isolated") as namespace, NamespacedDaemon(namespace, folder) as daemon:
        address = "127.0.0.1", daemon.port
        wire = Wire(lambda: namespace.call(lambda: socket.create_connection(address)))
        yield Target(daemon, wire)
        wire.close()
        assert_log_is_clean(daemon)
        assert_store_is_clean(daemon.image_path)


@pytest.fixture(autouse=True)
def all_cases(request: pytest.FixtureRequest) -> Iterator[None]:
    """Count the cases of all tests."""
    name = request.node.originalname.removeprefix("test_")
    if name not in BUDGET:
        yield
        return
    target = request.getfixturevalue("isolated" if name == "isolated" else "traced")
    before = target.cases
    yield
    assert target.cases - before >= BUDGET[name]


def test_number_of_cases() -> None:
    """All tests together run 10,000 cases."""
    assert sum(BUDGET.values()) == 10_000


@cases("names")
@given(
    METHODS, mutated(NAMES), st.sampled_from((b"manifests/1", b"blobs/" + DIGESTS[0], b"tags/list")), mutated(QUERIES)
)
def test_fuzz_names(traced: Target, method: bytes, name: bytes, rest: bytes, query: bytes) -> None:
    traced.ask(method, b"/v2/" + name + b"/" + rest + query)


@cases("references")
@given(METHODS, st.sampled_from((b"manifests", b"blobs", b"referrers")), mutated(TAGS) | mutated(DIGESTS))
def test_fuzz_references(traced: Target, method: bytes, kind: bytes, reference: bytes) -> None:
    traced.ask(method, b"/v2/team/app/" + kind + b"/" + reference)


@cases("upstreams")
@given(METHODS, st.sampled_from((b"manifests/1", b"blobs/" + DIGESTS[0], b"tags/list")), mutated(UPSTREAMS))
def test_fuzz_upstreams(traced: Target, method: bytes, rest: bytes, ns: bytes) -> None:
    """Requested by `ns`, which the daemon refuses unless it is the allowed upstream."""
    traced.ask(method, b"/v2/team/app/" + rest + b"?ns=" + ns)


@cases("ranges")
@given(METHODS, st.sampled_from((b"manifests/1", b"blobs/" + DIGESTS[0])), ranges() | mutated(RANGES))
@example(b"GET", b"blobs/" + DIGESTS[0], b"\xff")
def test_fuzz_ranges(traced: Target, method: bytes, rest: bytes, value: bytes) -> None:
    """A part has the bytes of its Content-Range, and is the requested one."""
    traced.cases += 1
    whole = LAYER.data if rest.startswith(b"blobs") else IMAGE.manifest.data
    answer = traced.wire.ask(method, b"/v2/team/app/" + rest, (HOST, (b"Range", value)))
    assert_valid(answer, ANSWERS, method)
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


@cases("headers")
@given(
    st.sampled_from((b"GET", b"HEAD", b"PUT", b"POST", b"OPTIONS", b"BREW")),
    st.sampled_from((b"/v2/", b"/v2/team/app/manifests/1", b"/v2/team/app/blobs/" + DIGESTS[0], b"/health", b"/")),
    st.lists(st.tuples(st.sampled_from(FIELDS) | mutated(FIELDS, 1), mutated(VALUES)), max_size=4),
    st.binary(max_size=20),
)
@example(b"GET", b"/v2/team/app/manifests/1", [(b"Range", b"bytes=0-"), (b"If-Range", b"\xff")], b"")
def test_fuzz_headers(traced: Target, method: bytes, target: bytes, headers: list[Header], body: bytes) -> None:
    traced.ask(method, target, tuple(headers), body if method in (b"PUT", b"POST") else b"")


@cases("raw")
@given(
    mutated((b"GET", b"HEAD", b"PUT", b"get")), st.binary(max_size=200) | mutated((b"/v2/", b"*", b"http://h/v2/"))
)
def test_fuzz_raw_requests(traced: Target, method: bytes, target: bytes) -> None:
    """Malformed requests end the connection at most, and no other connection."""
    traced.cases += 1
    line = (method + b" " + target + b" HTTP/1.1").replace(b"\r\n", b"\n")
    answer = traced.wire.say(line + b"\r\nHost: fuzz\r\nConnection: close\r\n\r\n")
    assert_valid(answer, ANSWERS, b"HEAD" if line.startswith(b"HEAD ") else b"GET")
    healthy = traced.wire.ask(b"GET", b"/v2/", (HOST,))
    assert healthy is not None
    assert healthy.status == 200


@cases("isolated")
@given(METHODS, mutated(NAMES), st.none() | mutated(UPSTREAMS), st.sampled_from((b"manifests/1", b"tags/list")))
@example(b"GET", b"[::1]:5000/x", None, b"manifests/1")
@example(b"GET", b"x", b"ab--cd.example", b"manifests/1")
@example(b"GET", b"x", b"xn--a.example", b"tags/list")
@example(b"GET", b"x", b"a" * 64 + b".example", b"manifests/1")
def test_fuzz_without_a_reachable_upstream(
    isolated: Target, method: bytes, name: bytes, ns: bytes | None, rest: bytes
) -> None:
    """No upstream can be reached, and every one is tried."""
    isolated.cases += 1
    target = b"/v2/" + name + b"/" + rest + (b"" if ns is None else b"?ns=" + ns)
    assert_valid(isolated.wire.ask(method, target, (HOST,)), ANSWERS | UNREACHABLE, method)
