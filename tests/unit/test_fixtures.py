"""The generated images are valid, and the scripted registry conforms to the specification."""

from __future__ import annotations

import gzip
import http.client
import io
import json
import ssl
import tarfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from tests.certificates import Authority
from tests.client import Response, ask, connect, fetch
from tests.images import DOCKER_LIST, digest_of, make_artifact, make_image, make_index
from tests.processes import wait_until
from tests.upstream import ScriptedRegistry
from tests.upstream_rules import (
    Cut,
)

IMAGE = make_image("fixtures", layer_size=100_000)
LAYER = IMAGE.layers[0]
PATH = f"/v2/team/app/blobs/{LAYER.digest}"


@pytest.fixture
def registry(upstream: ScriptedRegistry) -> ScriptedRegistry:
    """Return a registry with one image and two tags."""
    upstream.add("team/app", IMAGE, "1", "latest")
    return upstream


def get(registry: ScriptedRegistry, path: str = PATH, method: str = "GET", **headers: str) -> Response:
    """Request the layer, or another path."""
    return fetch(registry.url + path, method=method, headers=headers, timeout=10)


def test_image_is_deterministic_and_config_lists_diff_ids() -> None:
    again = make_image("fixtures", layer_size=100_000)
    assert again == IMAGE
    assert make_image("other").layers[0] != make_image("fixtures").layers[0]
    unpacked = [gzip.decompress(layer.data) for layer in IMAGE.layers]
    assert json.loads(IMAGE.config.data)["rootfs"]["diff_ids"] == [digest_of(data) for data in unpacked]
    with tarfile.open(fileobj=io.BytesIO(unpacked[0])) as archive:
        assert [member.size for member in archive] == [100_000]


def test_images_share_layers_of_their_base() -> None:
    upper = make_image("upper", base=IMAGE, layers=1)
    assert upper.layers[:2] == IMAGE.layers
    assert len(json.loads(upper.config.data)["rootfs"]["diff_ids"]) == len(upper.layers) == 3


def test_index_lists_its_images_by_platform() -> None:
    index = make_index("index", docker=True, platforms=("linux/amd64", "linux/arm/v7"))
    body = json.loads(index.manifest.data)
    assert body["mediaType"] == index.manifest.media_type == DOCKER_LIST
    named = [entry["digest"] for entry in body["manifests"]]
    assert named == [image.manifest.digest for image in index.images]
    assert body["manifests"][1]["platform"] == {"os": "linux", "architecture": "arm", "variant": "v7"}


@pytest.mark.parametrize("reference", ["latest", IMAGE.manifest.digest])
def test_manifests_by_tag_and_by_digest(registry: ScriptedRegistry, reference: str) -> None:
    path = f"/v2/team/app/manifests/{reference}"
    whole, head = get(registry, path), get(registry, path, "HEAD")
    assert whole.body == IMAGE.manifest.data
    assert head.body == b""
    for answer in (whole, head):
        assert answer.status == 200
        assert answer.headers["Content-Type"] == IMAGE.manifest.media_type
        assert answer.headers["Content-Length"] == str(len(IMAGE.manifest.data))
        assert answer.headers["Docker-Content-Digest"] == IMAGE.manifest.digest


def test_tag_moves(registry: ScriptedRegistry) -> None:
    other = make_image("other")
    registry.move("team/app", "latest", other.manifest)
    assert get(registry, "/v2/team/app/manifests/latest").body == other.manifest.data
    assert get(registry, "/v2/team/app/manifests/1").body == IMAGE.manifest.data


def test_blobs_belong_to_a_repository(registry: ScriptedRegistry) -> None:
    assert get(registry).body == LAYER.data
    registry.add("other", make_image("other"))
    answer = get(registry, f"/v2/other/blobs/{LAYER.digest}")
    assert answer.status == 404
    assert json.loads(answer.body)["errors"][0]["code"] == "BLOB_UNKNOWN"
    assert get(registry, "/v2/nothing/manifests/1").status == 404
    assert get(registry, "/v2/").status == 200
    assert get(registry, method="POST").status == 405


@pytest.mark.parametrize(
    ("asked", "first", "last"),
    [("0-", 0, -1), ("10-19", 10, 19), ("99-", 99, -1), ("-7", -7, -1), ("5-999999999", 5, -1)],
)
def test_range_is_answered_with_206(registry: ScriptedRegistry, asked: str, first: int, last: int) -> None:
    size = len(LAYER.data)
    answer = get(registry, Range=f"bytes={asked}")
    assert answer.status == 206
    assert answer.headers["Content-Range"] == f"bytes {first % size}-{last % size}/{size}"
    assert answer.body == LAYER.data[first % size : last % size + 1]


def test_unsatisfiable_and_multiple_ranges(registry: ScriptedRegistry) -> None:
    beyond = get(registry, Range="bytes=999999999-")
    assert (beyond.status, beyond.headers["Content-Range"]) == (416, f"bytes */{len(LAYER.data)}")
    assert get(registry, Range="bytes=0-1,5-6").status == 200


def test_tag_list_is_paged(registry: ScriptedRegistry) -> None:
    registry.add("team/app", IMAGE, "b", "a")
    first = get(registry, "/v2/team/app/tags/list?n=3")
    assert json.loads(first.body) == {"name": "team/app", "tags": ["1", "a", "b"]}
    assert first.headers["Link"] == '</v2/team/app/tags/list?n=3&last=b>; rel="next"'
    rest = get(registry, "/v2/team/app/tags/list?n=3&last=b")
    assert json.loads(rest.body)["tags"] == ["latest"]
    assert "Link" not in rest.headers
    assert json.loads(get(registry, "/v2/team/app/tags/list?n=0").body)["tags"] == []


def test_referrers_are_listed_and_filtered(registry: ScriptedRegistry) -> None:
    kind = "application/vnd.example.signature"
    signature = make_artifact("signature", IMAGE.manifest, artifact_type=kind)
    registry.add("team/app", signature)
    path = f"/v2/team/app/referrers/{IMAGE.manifest.digest}"
    (entry,) = json.loads(get(registry, path).body)["manifests"]
    assert (entry["digest"], entry["artifactType"]) == (signature.manifest.digest, kind)
    filtered = get(registry, f"{path}?artifactType=application/other")
    assert json.loads(filtered.body)["manifests"] == []
    assert filtered.headers["OCI-Filters-Applied"] == "artifactType"


def test_every_request_is_recorded(registry: ScriptedRegistry) -> None:
    with closing(connect(registry.url)) as connection:
        ask(connection, "/v2/?ns=a%3A1", headers={"Accept": "x"})
        ask(connection, PATH)
    get(registry, Range="bytes=0-9")
    first, second, third = registry.requests
    assert (first.method, first.path, first.query, first.status) == ("GET", "/v2/", "ns=a%3A1", 200)
    assert (first.values("accept"), first.parameters("ns")) == (("x",), ("a:1",))
    assert (second.sent, third.sent) == (len(LAYER.data), 10)
    wait_until(lambda: registry.requests[-1].done, 5, "the end of the answer is recorded")
    assert [request.connection for request in registry.requests] == [1, 1, 2]
    assert registry.connections == 2
    assert registry.bytes_sent(LAYER.digest) == len(LAYER.data) + 10
    assert registry.count("GET", "/v2/team/") == 2
    assert registry.count("HEAD") == 0


def test_reopens_on_the_same_port(registry: ScriptedRegistry) -> None:
    assert get(registry).status == 200
    registry.close()
    with pytest.raises(ConnectionRefusedError):
        get(registry)
    registry.open()
    assert get(registry).body == LAYER.data
    assert [request.connection for request in registry.requests] == [1, 2]


def test_tls(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    with ScriptedRegistry(tls=authority.server_context("127.0.0.1", "localhost")) as registry:
        registry.add("team/app", IMAGE)
        assert registry.url.startswith("https://")
        client = authority.client_context()
        assert fetch(registry.url + PATH, tls=client).body == LAYER.data
        with pytest.raises(ssl.SSLCertVerificationError):
            fetch(registry.url + PATH, tls=ssl.create_default_context())
        for reset in (False, True):
            registry.script(PATH, Cut(5000, reset=reset), times=1)
            with pytest.raises((OSError, http.client.IncompleteRead)):
                fetch(registry.url + PATH, tls=client)
        assert fetch(registry.url + PATH, tls=client).body == LAYER.data


def test_tls_with_client_certificate(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    with ScriptedRegistry(tls=authority.server_context("127.0.0.1", demand_client=True)) as registry:
        client = authority.client_context()
        # With TLS 1.3 the client learns of the refusal late: by an alert, or by the end of the connection.
        with pytest.raises(OSError, match=r"(?i)certificate required|reset|broken pipe|EOF"):
            fetch(f"{registry.url}/v2/", tls=client)
        assert registry.requests == ()
        client.load_cert_chain(*authority.issue("client"))
        assert fetch(f"{registry.url}/v2/", tls=client).status == 200


def test_plain_http_server_rejects_tls_immediately(registry: ScriptedRegistry) -> None:
    with pytest.raises(ssl.SSLError, match=r"(?i)wrong.version.number"):
        fetch(registry.url.replace("http:", "https:") + "/v2/", timeout=5)
    assert registry.requests == ()


def test_concurrent_requests_get_correct_bytes(registry: ScriptedRegistry) -> None:
    with ThreadPoolExecutor(32) as pool:
        bodies = list(pool.map(lambda _: get(registry).body, range(100)))
    assert set(bodies) == {LAYER.data}
    assert registry.bytes_sent(LAYER.digest) == 100 * len(LAYER.data)
