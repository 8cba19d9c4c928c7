"""The rules of the scripted registry."""

from __future__ import annotations

import base64
import http.client
import json
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest

from tests.client import Response, connect, fetch
from tests.images import make_image
from tests.upstream import ScriptedRegistry
from tests.upstream_auth import Basic, Tokens
from tests.upstream_http import Answer, Handler, Request, Rule
from tests.upstream_rules import (
    ContentRange,
    Cut,
    Declare,
    Drip,
    Flip,
    Header,
    Hold,
    IgnoreRange,
    NoLength,
    Redirect,
    Reply,
    Resize,
)

IMAGE = make_image("rules", layer_size=100_000)
LAYER = IMAGE.layers[0]
PATH = f"/v2/team/app/blobs/{LAYER.digest}"


@pytest.fixture
def registry(upstream: ScriptedRegistry) -> ScriptedRegistry:
    """Return a registry with one image."""
    upstream.add("team/app", IMAGE)
    return upstream


def get(registry: ScriptedRegistry, path: str = PATH, method: str = "GET", **headers: str) -> Response:
    """Request the layer, or another path."""
    return fetch(registry.url + path, method=method, headers=headers, timeout=10)


@pytest.mark.parametrize("after", [None, 0, 5000])
def test_hold_waits_for_release(registry: ScriptedRegistry, after: int | None) -> None:
    hold = Hold(after)
    registry.script(PATH, hold)
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(get, registry)
        assert hold.reached.wait(10)
        assert registry.requests[0].sent == (after or 0)
        assert not registry.requests[0].done
        assert not answer.done()
        hold.release.set()
        assert answer.result(10).body == LAYER.data


def test_close_ends_held_and_dripping_responses() -> None:
    with ThreadPoolExecutor() as pool, ScriptedRegistry() as registry:
        registry.add("team/app", IMAGE)
        hold = Hold(5000)
        registry.script(PATH, hold, times=1)
        held = pool.submit(get, registry)
        assert hold.reached.wait(10)
        registry.script(PATH, Drip(1))
        dripping = pool.submit(get, registry)
        begin = time.monotonic()
        registry.close()
        assert time.monotonic() - begin < 2
        for answer in (held, dripping):
            with pytest.raises((OSError, http.client.HTTPException)):
                answer.result(10)


@pytest.mark.parametrize("after", [0, 5000, 70_000])
@pytest.mark.parametrize("reset", [False, True])
def test_cut_after_exact_byte_count(registry: ScriptedRegistry, after: int, reset: bool) -> None:
    registry.script(PATH, Cut(after, reset=reset), times=1)
    received = bytearray()
    with closing(connect(registry.url)) as connection:
        connection.request("GET", PATH)
        answer = connection.getresponse()
        with pytest.raises(ConnectionResetError if reset else (EOFError, http.client.IncompleteRead)):
            read_all(answer, received)
        answer.close()
    assert received == LAYER.data[:after]
    assert registry.bytes_sent(LAYER.digest) == after
    assert get(registry, Range=f"bytes={after}-").body == LAYER.data[after:]


def read_all(answer: http.client.HTTPResponse, received: bytearray) -> None:
    """Read the response into `received` as it arrives.

    Raises:
        EOFError: at the end.
    """
    while piece := answer.read1(1000):
        received += piece
    raise EOFError


@pytest.mark.parametrize("reset", [False, True])
def test_cut_before_headers(registry: ScriptedRegistry, reset: bool) -> None:
    registry.script("*", Cut(None, reset=reset))
    for method in ("GET", "HEAD"):
        with pytest.raises(ConnectionResetError if reset else http.client.RemoteDisconnected):
            get(registry, method=method)


def test_head_does_not_consume_a_body_rule(registry: ScriptedRegistry) -> None:
    registry.script(PATH, Cut(10), times=1)
    assert get(registry, method="HEAD").status == 200
    with pytest.raises(http.client.IncompleteRead):
        get(registry)
    assert get(registry).status == 200


def test_rule_can_be_removed(registry: ScriptedRegistry) -> None:
    remove = registry.script("/v2/team/*", Reply(503, b"later", (("Retry-After", "7"),)))
    answer = get(registry)
    assert (answer.status, answer.body, answer.headers["Retry-After"]) == (503, b"later", "7")
    assert get(registry, "/v2/").status == 200
    remove()
    assert get(registry).status == 200


def test_flipped_byte_appears_in_ranges_that_include_it(registry: ScriptedRegistry) -> None:
    registry.script(PATH, Flip(5000))
    right, wrong = LAYER.data, get(registry).body
    assert [place for place in range(len(right)) if right[place] != wrong[place]] == [5000]
    assert get(registry, Range="bytes=4990-").body == wrong[4990:]
    assert get(registry, Range="bytes=5001-").body == right[5001:]


def test_registry_without_range_support(registry: ScriptedRegistry) -> None:
    registry.script(PATH, IgnoreRange())
    answer = get(registry, Range="bytes=10-")
    assert (answer.status, answer.body) == (200, LAYER.data)
    assert registry.requests[0].header("range") == "bytes=10-"


@pytest.mark.parametrize("value", [None, "bytes 0-9/10"])
def test_wrong_content_range(registry: ScriptedRegistry, value: str | None) -> None:
    registry.script(PATH, ContentRange(value))
    answer = get(registry, Range="bytes=10-")
    assert (answer.status, answer.headers["Content-Range"]) == (206, value)
    assert "Content-Range" not in get(registry).headers


@pytest.mark.parametrize("by", [-10, 10])
def test_body_of_another_size(registry: ScriptedRegistry, by: int) -> None:
    registry.script(PATH, Resize(by))
    body = get(registry).body
    assert len(body) == len(LAYER.data) + by
    assert body[:1000] == LAYER.data[:1000]


def test_false_content_length(registry: ScriptedRegistry) -> None:
    remove = registry.script(PATH, Declare(10))
    with pytest.raises(http.client.IncompleteRead):
        get(registry)
    remove()
    registry.script(PATH, Declare(-10))
    assert get(registry).body == LAYER.data[:-10]
    assert registry.requests[-1].sent == len(LAYER.data)


@pytest.mark.parametrize("rule", [NoLength("chunked"), NoLength("close")])
def test_body_without_content_length(registry: ScriptedRegistry, rule: NoLength) -> None:
    registry.script(PATH, rule)
    for method in ("HEAD", "GET"):
        answer = get(registry, method=method)
        assert "Content-Length" not in answer.headers
        assert answer.body == (LAYER.data if method == "GET" else b"")
    assert registry.bytes_sent(LAYER.digest) == len(LAYER.data)


def test_chunked_body_can_be_cut(registry: ScriptedRegistry) -> None:
    registry.script(PATH, NoLength("chunked"))
    registry.script(PATH, Cut(5000))
    with pytest.raises(http.client.IncompleteRead):
        get(registry)


def test_body_drips(registry: ScriptedRegistry) -> None:
    registry.script(PATH, Drip(200_000))
    begin = time.monotonic()
    assert get(registry).body == LAYER.data
    assert 0.4 < time.monotonic() - begin < 5


def test_header_is_changed(registry: ScriptedRegistry) -> None:
    registry.script(PATH, Header("Docker-Content-Digest", None))
    registry.script(PATH, Header("Content-Type", "text/plain"))
    headers = get(registry).headers
    assert "Docker-Content-Digest" not in headers
    assert headers.get_all("Content-Type") == ["text/plain"]


def test_blobs_are_redirected_to_another_host(registry: ScriptedRegistry) -> None:
    with ScriptedRegistry() as storage:
        storage.add("team/app", IMAGE)
        registry.script("/v2/*/blobs/*", Redirect(storage.url))
        answer = get(registry)
        assert answer.status == 307
        assert fetch(answer.headers["Location"]).body == LAYER.data
        assert storage.bytes_sent(LAYER.digest) == len(LAYER.data)


def test_basic_credentials(registry: ScriptedRegistry) -> None:
    registry.script("/v2/*", Basic({"u": "p"}))
    refused = get(registry)
    assert (refused.status, refused.headers["WWW-Authenticate"]) == (401, 'Basic realm="scripted"')
    assert get(registry, Authorization=basic("u", "wrong")).status == 401
    assert get(registry, Authorization=basic("u", "p")).status == 200


def basic(user: str, password: str) -> str:
    """Return the value of an Authorization header."""
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


def test_token_challenge_and_issue(registry: ScriptedRegistry) -> None:
    tokens = Tokens(f"{registry.url}/token", service="s", key="access_token", users={"u": "p"}, expires_in=60)
    registry.script("*", tokens)
    scope = "repository:team/app:pull"
    challenge = f'Bearer realm="{registry.url}/token",service="s"'
    assert get(registry, "/v2/").headers["WWW-Authenticate"] == challenge
    assert get(registry).headers["WWW-Authenticate"] == f'{challenge},scope="{scope}"'

    asked = f"/token?service=s&scope={scope}"
    assert get(registry, asked).status == 401
    answer = json.loads(get(registry, asked, Authorization=basic("u", "p")).body)
    assert answer["expires_in"] == 60
    bearer = f"Bearer {answer['access_token']}"
    assert get(registry, Authorization=bearer).body == LAYER.data
    other = get(registry, "/v2/other/manifests/1", Authorization=bearer)
    assert other.headers["WWW-Authenticate"].endswith('error="insufficient_scope"')

    tokens.revoke()
    assert get(registry, Authorization=bearer).status == 401


def test_tokens_expire_and_scopes_are_denied(registry: ScriptedRegistry) -> None:
    now = [0.0]
    denied = "repository:secret:pull"
    tokens = Tokens("unused", lifetime=100, expires_in=None, denied=(denied,), clock=lambda: now[0])
    registry.script("*", tokens)
    scopes = f"scope=repository:team/app:pull&scope={denied}"
    answer = json.loads(get(registry, f"/token?service=scripted-registry&{scopes}").body)
    assert set(answer) == {"token"}
    bearer = f"Bearer {answer['token']}"
    assert get(registry, "/v2/secret/manifests/1", Authorization=bearer).status == 401
    now[0] = 99
    assert get(registry, Authorization=bearer).status == 200
    now[0] = 100
    assert get(registry, Authorization=bearer).status == 401


def test_defect_in_a_rule_is_reported() -> None:
    class Mistake(Rule):
        def __call__(self, request: Request, handler: Handler) -> Answer:
            raise ValueError("oops")

    registry = ScriptedRegistry()
    registry.script("*", Mistake())
    with pytest.raises(http.client.RemoteDisconnected):
        get(registry, "/v2/")
    with pytest.raises(RuntimeError, match="a rule"):
        registry.close()
