"""The metrics and the status of a real daemon tell exactly what its clients did."""

from __future__ import annotations

import json
import socket
import struct
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.client import ask, connect, fetch
from tests.namespaces import Namespace, NamespacedDaemon
from tests.peers import Prometheus, missing_package
from tests.processes import Daemon, free_port, wait_until
from tests.real.caches import SOON, Cache, daemon_in, plain_image, short_body
from tests.upstream import ScriptedRegistry
from tests.upstream_rules import Flip, Hold, Reply

SIZE = 300_000
WHOLE, FAULTY, LEFT = "metrics/whole", "metrics/faulty", "metrics/left"
REQUESTS = "ociregistry_requests_total"
SENT = "ociregistry_sent_bytes_total"
CUT = "ociregistry_answers_cut_total"
RECEIVED = "ociregistry_received_bytes_total"

Counted = dict[tuple[str, ...], float]


class Operator:
    """Reads the admin listener of a daemon."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"

    def scrape(self) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
        """Return all samples: name -> labels -> value."""
        answer = fetch(f"{self.url}/metrics")
        assert answer.status == 200
        found: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
        for family in text_string_to_metric_families(answer.body.decode()):
            for sample in family.samples:
                found.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value
        return found

    def counted(self, name: str) -> Counted:
        """Return the samples of a metric that are not 0, by the values of their labels, by the order of names."""
        return {tuple(value for _, value in labels): count for labels, count in self.scrape()[name].items() if count}

    def status(self) -> dict[str, Any]:
        """Return the status."""
        document: dict[str, Any] = json.loads(fetch(f"{self.url}/status").body)
        return document


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[tuple[Cache, Operator]]:
    """A cache that does not complete images, and its operator."""
    port = free_port()
    with (
        ScriptedRegistry() as upstream,
        daemon_in(tmp_path, upstream, "--admin-listen", f"tcp:{port}:interface=127.0.0.1") as daemon,
    ):
        yield Cache(daemon, upstream), Operator(port)


@contextmanager
def scraping(folder: Path, operator: Operator) -> Iterator[Prometheus]:
    """Run a Prometheus that has scraped the daemon once at least."""
    if package := missing_package("prometheus"):
        pytest.fail(f"a peer is missing: apt-get install {package}", pytrace=False)
    target = operator.url.removeprefix("http://")
    with Prometheus(folder, {"job_name": "ociregistry", "static_configs": [{"targets": [target]}]}) as prometheus:
        wait_until(lambda: prometheus.query("up == 1"), SOON, "a scrape")
        yield prometheus


def recorded(prometheus: Prometheus, name: str) -> Counted:
    """Return what `Operator.counted` does, as the API of Prometheus has it."""
    own = ("__name__", "instance", "job")
    found = prometheus.query(f"{name} != 0")
    return {tuple(value for label, value in labels if label not in own): count for labels, count in found.items()}


def leave_early(cache: Cache, path: str, size: int) -> None:
    """Request a path, read so many bytes of the content, and reset the connection."""
    with socket.create_connection(("127.0.0.1", cache.daemon.port), timeout=SOON) as client:
        target = cache.url(path).removeprefix(cache.daemon.url)
        client.sendall(f"GET {target} HTTP/1.1\r\nHost: cache\r\n\r\n".encode())
        received = b""
        while len(received.partition(b"\r\n\r\n")[2]) < size:
            received += client.recv(65536)
        assert len(received.partition(b"\r\n\r\n")[2]) == size
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def test_counters_tell_what_clients_did(watched: tuple[Cache, Operator], tmp_path: Path) -> None:
    """Misses, hits by both ways, HEAD, parts, errors, an answer that the daemon cuts, one that its client cuts.

    So a scrape says, and so does a Prometheus that has scraped.
    """
    cache, operator = watched
    image, faulty, left = (plain_image(f"metrics {name}", SIZE) for name in ("whole", "faulty", "left"))
    for repository, what in ((WHOLE, image), (FAULTY, faulty), (LEFT, left)):
        cache.upstream.add(repository, what, "1")
    # The looks whether the daemon is ready count too.
    looks, looked = operator.counted(REQUESTS), operator.counted(SENT)
    assert set(looks) == set(looked) == {("other", "none")}
    answers: Counter[tuple[str, str]] = Counter()
    sent: Counter[tuple[str, str]] = Counter()

    def answered(kind: str, outcome: str, size: int) -> None:
        answers[kind, outcome] += 1
        sent[kind, outcome] += size

    for outcome in ("miss", "hit", "hit", "hit"):
        assert cache.ask(f"{WHOLE}/manifests/1").body == image.manifest.data
        answered("manifest", outcome, len(image.manifest.data))
    for blob in image.blobs:
        for outcome in ("miss", "hit", "hit", "hit"):
            assert cache.ask(f"{WHOLE}/blobs/{blob.digest}").body == blob.data
            cache.wait_stored(blob.digest)
            answered("blob", outcome, len(blob.data))
    layer = f"{WHOLE}/blobs/{image.layers[0].digest}"
    for path, kind in ((f"{WHOLE}/manifests/{image.manifest.digest}", "manifest"), (layer, "blob")):
        for _ in range(3):
            assert cache.ask(path, "HEAD").status == 200
            answered(kind, "hit", 0)
    assert cache.ask(layer, headers={"Range": "bytes=100-199"}).status == 206
    answered("blob", "hit", 100)

    refused = {
        ("blob", "4xx"): (
            (416, cache.ask(layer, headers={"Range": f"bytes={SIZE}-"})),
            (404, cache.ask(f"{WHOLE}/blobs/sha256:{'0' * 64}")),
        ),
        ("manifest", "4xx"): (
            (404, cache.ask(f"{WHOLE}/manifests/2")),
            (405, cache.ask(f"{WHOLE}/manifests/1", "PUT")),
        ),
        ("other", "none"): ((200, fetch(f"{cache.daemon.url}/v2/")),),
    }
    with cache.scripted("*/manifests/3", Reply(500, b"broken")):
        refused["manifest", "5xx"] = ((503, cache.ask(f"{WHOLE}/manifests/3")),)
    for (kind, outcome), found in refused.items():
        for status, answer in found:
            assert answer.status == status
            answered(kind, outcome, len(answer.body))

    for repository in (FAULTY, LEFT):
        answered("manifest", "miss", len(cache.ask(f"{repository}/manifests/1").body))
    wrong = faulty.layers[0].digest
    with cache.scripted(f"*{wrong}", Flip(1000)), cache.opened(f"{FAULTY}/blobs/{wrong}") as opened:
        answered("blob", "miss", len(short_body(opened)))
    held = left.layers[0].digest
    with cache.scripted(f"*{held}", Hold(100_000)):
        # The last byte that is here is not held back: it is not the last one of the blob.
        leave_early(cache, f"{LEFT}/blobs/{held}", 100_000)
        answered("blob", "miss", 100_000)
        cut = {("client", "blob"): 1, ("server", "blob"): 1}
        wait_until(lambda: operator.counted(CUT) == cut, SOON, "the answers that were cut are counted")
    # It goes on without its client.
    cache.wait_stored(held)

    counts, sizes = operator.counted(REQUESTS), operator.counted(SENT)
    assert counts == answers + Counter(looks)
    assert sizes == sent + Counter(looked)
    timed = {key: count for key, count in counts.items() if key[1] in ("hit", "miss")}
    times = [f"ociregistry_{name}_seconds_count" for name in ("first_byte", "request_duration")]
    for name in times:
        assert operator.counted(name) == timed
    arrived = sum(request.sent for request in cache.upstream.requests)
    assert operator.counted(RECEIVED) == {(cache.upstream.host,): arrived}
    with scraping(tmp_path / "prometheus", operator) as prometheus:
        for name in (REQUESTS, SENT, CUT, RECEIVED, *times):
            assert recorded(prometheus, name) == operator.counted(name)
    told = operator.status()
    assert {(row["kind"], row["outcome"]): row["answers"] for row in told["requests"] if row["answers"]} == counts
    assert told["received_bytes"] == {"docker.io": 0, "other": 0, cache.upstream.host: arrived}
    assert told["store"]["images"] == operator.scrape()["ociregistry_records"][("kind", "image"),] == 3


def test_names_that_clients_make_up_leave_few_labels(tmp_path: Path) -> None:
    """Each of them is that of a registry which delivers a manifest. (10,000 of them take minutes: same result.)"""
    names = 200
    images = [plain_image(f"labels {number}", 10) for number in range(20)]
    with Namespace("labels") as namespace, ExitStack() as stack:
        namespace.ip("route", "add", "local", "10.80.0.0/16", "dev", "lo")
        upstream = stack.enter_context(namespace.call(lambda: ScriptedRegistry(address="0.0.0.0")))
        for number, image in enumerate(images):
            upstream.add(f"labels/{number}", image, "1")
        endpoint = "tcp:8081:interface=127.0.0.1"
        daemon = stack.enter_context(
            NamespacedDaemon(namespace, tmp_path, None, "--no-complete-images", "--admin-listen", endpoint)
        )

        def ask_all() -> None:
            with closing(connect(daemon.url)) as connection:
                for number in range(names):
                    ns = f"10.80.{number // 250}.{number % 250 + 1}:{upstream.port}"
                    url = f"{daemon.url}/v2/labels/{number % len(images)}/manifests/1?ns={ns}"
                    assert ask(connection, url).body == images[number % len(images)].manifest.data

        namespace.call(ask_all)
        found = namespace.call(Operator(8081).scrape)
    values: dict[str, set[str]] = {}
    for samples in found.values():
        for labels in samples:
            for label, value in labels:
                values.setdefault(label, set()).add(value)
    assert max(map(len, values.values())) <= 60
    assert len(values["upstream"]) == len({"docker.io", "other"}) + 50
    assert len(values["host"]) == 50
    assert sum(found[RECEIVED].values()) == sum(request.sent for request in upstream.requests)


def test_second_daemon_at_the_default_address_goes_on(tmp_path: Path) -> None:
    with Namespace("admin") as namespace, ExitStack() as stack:
        daemons = [
            NamespacedDaemon(namespace, tmp_path, image_path=tmp_path / str(number), port=port)
            for number, port in enumerate((5001, 5002))
        ]
        for daemon in daemons:
            at = daemon.argv.index("--admin-listen")
            del daemon.argv[at : at + 2]
            stack.enter_context(daemon)
        told = [line for line in daemons[1].log.splitlines() if "cannot listen" in line]
        assert len(told) == 1
        assert "cannot listen on tcp:8081:interface=127.0.0.1: Address already in use" in told[0]
        assert "cannot listen" not in daemons[0].log
        status = namespace.call(lambda: Operator(8081).status())
        assert status["store"]["path"] == str(tmp_path / "0")


def test_given_address_in_use_is_an_error(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        endpoint = f"tcp:{taken.getsockname()[1]}:interface=127.0.0.1"
        daemon = Daemon(tmp_path, None, "--admin-listen", endpoint)
        with suppress(RuntimeError), daemon:
            pass
    assert daemon.process.returncode == 1
    assert f"cannot listen on {endpoint}: Address already in use" in daemon.log
