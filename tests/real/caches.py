"""Caches: our daemon between a client on a real socket and a scripted upstream."""

from __future__ import annotations

import hashlib
import http.client
import json
import re
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from tests.client import Response, connect, fetch
from tests.images import OCI_CONFIG, OCI_LAYER, OCI_MANIFEST, Blob, Image, Index, Manifest, digest_of, random_bytes
from tests.processes import Daemon, wait_until
from tests.upstream import ScriptedRegistry
from tests.upstream_http import Rule
from tests.upstream_rules import Hold

SOON = 10.0
"""Seconds within which everything happens that does not wait for an upstream."""
SEEN = 5.0
"""Seconds within which the daemon must notice changes in its store; the documented limit is one."""


_OF_A_FAILURE = re.compile(r"#(?:error|critical)\]|\[web#info\] [A-Z]+ \S+: 4\d\d [A-Z_]+: ")
"""What a client asks for in vain is logged at level info."""


@dataclass(frozen=True)
class Cache:
    """A daemon, and the upstream from which tests pull by `ns`; each test uses separate repositories."""

    daemon: Daemon
    upstream: ScriptedRegistry

    def url(self, path: str, query: str = "") -> str:
        """Return the URL of `path` below /v2/, with the upstream as `ns`."""
        ns = quote(self.upstream.host, safe="")
        return f"{self.daemon.url}/v2/{path}?ns={ns}{query and '&'}{query}"

    def ask(self, path: str, method: str = "GET", headers: Mapping[str, str] | None = None) -> Response:
        """Request `path` below /v2/; return the complete answer."""
        return fetch(self.url(path), method=method, headers=headers)

    def refused(self, path: str, status: int, code: str, method: str = "GET", query: str = "") -> Response:
        """Send a request that must be answered by this error, and logged in one line that names the upstream."""
        since = self.log_size
        answer = fetch(self.url(path, query), method=method)
        assert_error(answer, status, code, method)
        assert self.upstream.host in self.one_error(since).partition(f": {status} {code}: ")[2]
        return answer

    def opened(
        self, path: str, headers: Mapping[str, str] | None = None
    ) -> AbstractContextManager[http.client.HTTPResponse]:
        """Request `path`, and read only the headers of the answer."""
        return open_answer(self.url(path), headers)

    def scripted(self, path: str, *rules: Rule) -> AbstractContextManager[None]:
        """Apply rules to the upstream's paths that match this glob until the block ends; then release holds."""
        return scripted(self.upstream, path, *rules)

    def sent(self, path: str, method: str | None = None) -> int:
        """Count the upstream's requests for `path` below /v2/."""
        return self.upstream.count(method, f"/v2/{path}")

    def stored(self, digest: str) -> bool:
        """Whether the store has a file for this blob."""
        return blob_file(self.daemon, digest).exists()

    def wait_stored(self, digest: str) -> None:
        """Return when the blob is stored."""
        wait_until(lambda: self.stored(digest), SOON, f"{digest} in the store")

    @property
    def partials(self) -> set[str]:
        """The files of unfinished downloads."""
        kept = self.daemon.image_path / "pulls" / "0"
        return {str(path.relative_to(kept)) for path in kept.rglob("*") if path.is_file()} - {"lock"}

    @property
    def files(self) -> set[str]:
        """All files in the store, as soon as no record is being written, as the daemon also does by itself."""
        root = self.daemon.image_path
        wait_until(lambda: not any(root.glob("pulls/*/*.record")), SOON, "all records are written")
        return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}

    def settled(self) -> set[str]:
        """All files in the store, as soon as two looks are the same: what was answered may still be being noted."""
        looks = [self.files]

        def same() -> bool:
            time.sleep(0.2)
            looks.append(self.files)
            return looks[-1] == looks[-2]

        wait_until(same, SOON, "no file is added")
        return looks[-1]

    @property
    def log_size(self) -> int:
        """The size of the daemon's log, for `errors`."""
        return len(self.daemon.log)

    def errors(self, since: int) -> list[str]:
        """Return the lines of errors and of failed requests that were logged after the log had this size."""
        return error_lines(self.daemon, since)

    def one_error(self, since: int) -> str:
        """Return the only such line; fail when there is none, or several."""
        lines = self.errors(since)
        assert len(lines) == 1, lines
        return lines[0]


def error_lines(daemon: Daemon, since: int) -> list[str]:
    """Return the lines of errors and of failed requests that were logged after the log had this size."""
    return [line for line in daemon.log[since:].splitlines() if _OF_A_FAILURE.search(line)]


@contextmanager
def cache_in(folder: Path, *others_and_options: ScriptedRegistry | str, named: Iterable[str] = ()) -> Iterator[Cache]:
    """Run a daemon and its scripted upstream until the block ends, with further upstreams, by object or by name."""
    with ScriptedRegistry() as upstream, daemon_in(folder, upstream, *others_and_options, named=named) as daemon:
        yield Cache(daemon, upstream)


@contextmanager
def daemon_in(
    folder: Path, *upstreams_and_options: ScriptedRegistry | str, named: Iterable[str] = (), **more: Any
) -> Iterator[Daemon]:
    """Run a daemon for these upstreams until the block ends; it must not log an unhandled failure.

    It does not complete images, because tests count requests.
    """
    hosts = [one.host for one in upstreams_and_options if isinstance(one, ScriptedRegistry)]
    registries = dict.fromkeys([*hosts, *named], "http")
    options = ["--no-complete-images", *(one for one in upstreams_and_options if isinstance(one, str))]
    with Daemon(folder, registries, *options, **more) as daemon:
        yield daemon
        assert daemon.running, daemon.log
    assert "Traceback (most recent call last)" not in daemon.log
    assert "unhandled error" not in daemon.log.lower()


@contextmanager
def scripted(upstream: ScriptedRegistry, path: str, *rules: Rule) -> Iterator[None]:
    """Apply rules to `upstream`'s paths that match this glob until the block ends; then release what they hold."""
    with ExitStack() as stack:
        for rule in rules:
            if isinstance(rule, Hold):
                stack.callback(rule.release.set)
            stack.callback(upstream.script(path, rule))
        yield


@contextmanager
def open_answer(url: str, headers: Mapping[str, str] | None = None) -> Iterator[http.client.HTTPResponse]:
    """Send a GET and read only the headers of the answer; the unread body is discarded."""
    with closing(connect(url)) as connection:
        target = url[len(f"http://{connection.host}:{connection.port}") :]
        connection.request("GET", target, headers=dict(headers or {}))
        with connection.getresponse() as answer:
            yield answer


def blob_file(daemon: Daemon, digest: str) -> Path:
    """Return the store's path of this blob."""
    return daemon.image_path / "blobs" / digest.partition(":")[2]


def short_body(answer: http.client.HTTPResponse) -> bytes:
    """Return the body of an answer that ends early, by FIN and not by RST; else raise."""
    with pytest.raises(http.client.IncompleteRead) as ended:
        answer.read()
    return ended.value.partial


def repository_for(test: str) -> str:
    """Return a repository that only the test with this name uses."""
    return f"team/{hashlib.sha256(test.encode()).hexdigest()[:12]}"


def plain_image(seed: object, size: int, **more: object) -> Image:
    """Make an image with one layer of exactly `size` bytes, and `more` keys in its manifest."""
    settings = json.dumps({"config": {"Labels": {"seed": str(seed)}}}).encode()
    config = Blob(digest_of(settings), settings, OCI_CONFIG)
    data = b"".join(random_bytes(seed, size))
    layer = Blob(digest_of(data), data, OCI_LAYER)
    body = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": _named(config),
        "layers": [_named(layer)],
        **more,
    }
    return Image(manifest_of(body), (config, layer), "")


def manifest_of(body: Mapping[str, object], media_type: str = OCI_MANIFEST) -> Manifest:
    """Make a manifest with this content."""
    data = json.dumps(body).encode()
    return Manifest(digest_of(data), data, media_type)


def assert_error(answer: Response, status: int, code: str, method: str = "GET") -> None:
    """Assert that the answer is this error as specified, without a challenge; a 503 has Retry-After."""
    assert answer.status == status
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.headers["WWW-Authenticate"] is None
    if method != "HEAD":
        assert answer.headers["Content-Length"] == str(len(answer.body))
        (error,) = json.loads(answer.body)["errors"]
        assert error.keys() == {"code", "message", "detail"}
        assert (error["code"], bool(error["message"])) == (code, True)
    assert (answer.headers["Retry-After"] or "").isdigit() == (status == 503)


def record(cache: Cache, manifest: Manifest) -> Path:
    """Return the store's path of a manifest's record."""
    folder = "img" if manifest.media_type == OCI_MANIFEST else "fat"
    return cache.daemon.image_path / folder / manifest.digest.removeprefix("sha256:")


def manifest_paths(repository: str, what: Image | Index) -> dict[str, bytes]:
    """Return the paths of its manifests, with their content."""
    tag = "1" if isinstance(what, Image) else "list"
    by_digest = {f"{repository}/manifests/{one.digest}": one.data for one in what.manifests}
    return {f"{repository}/manifests/{tag}": what.manifest.data, **by_digest}


def blob_paths(repository: str, what: Image | Index) -> dict[str, bytes]:
    """Return the paths of its blobs, with their content."""
    return {f"{repository}/blobs/{blob.digest}": blob.data for blob in what.blobs}


def pull(cache: Cache, repository: str, what: Image | Index) -> None:
    """Fetch all of it through the daemon, and wait until it is stored."""
    for path, data in (manifest_paths(repository, what) | blob_paths(repository, what)).items():
        assert cache.ask(path).body == data
    for blob in what.blobs:
        cache.wait_stored(blob.digest)


def counts(daemon: Daemon) -> tuple[int, int]:
    """Return how many indexes and images the daemon counts."""
    health = json.loads(fetch(f"{daemon.url}/health").body)
    return health["lists"], health["images"]


def wait_scanned_twice(cache: Cache) -> None:
    """Return after the daemon has scanned its store twice more: its present state, and once again."""
    _look(cache)
    _look(cache)


def _look(cache: Cache) -> None:
    strange = cache.daemon.image_path / "img" / secrets.token_hex(32)
    strange.touch()
    wait_until(lambda: f"{strange}: " in cache.daemon.log, SEEN, "an unknown file is logged")
    strange.unlink()


def _named(blob: Blob) -> dict[str, object]:
    return {"mediaType": blob.media_type, "digest": blob.digest, "size": len(blob.data)}
