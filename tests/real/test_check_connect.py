"""`check --connect` asks every upstream and mirror once, and the daemon says whose access was refused by whom."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from tests.certificates import Authority
from tests.client import fetch
from tests.forward_proxy import ForwardProxy
from tests.images import make_image
from tests.processes import Daemon, free_port
from tests.real.completions import log_lines
from tests.real.shells import Ended, shell_in, succeeded
from tests.upstream import ScriptedRegistry
from tests.upstream_auth import Basic, Tokens
from tests.upstream_rules import Reply

StartDaemon = Callable[..., Daemon]

SECRET = "Xy7-s3cr3t"
IMAGE = make_image("check connect")
PAGE = (("Content-Type", "text/html; charset=utf-8"),)
WRONG = {"auth": {"user": "puller", "password": SECRET}}


@pytest.fixture
def upstream() -> Iterator[ScriptedRegistry]:
    """Return a registry with an image."""
    with ScriptedRegistry() as upstream:
        upstream.add("team/app", IMAGE, "1")
        yield upstream


def checked(
    folder: Path,
    registries: Mapping[str, Mapping[str, object]],
    *options: str,
    environment: Mapping[str, str] | None = None,
    **settings: object,
) -> Ended:
    """Run `check --connect` with these entries."""
    shell = shell_in(folder, [{"name": name, **entry} for name, entry in registries.items()], **settings)
    done = shell.run("check", "--connect", *options, environment=environment)
    assert SECRET not in done.stdout + done.stderr
    return done


def failed(done: Ended) -> str:
    """Return the only line of output, of a check that found a fault."""
    assert done.returncode == 1
    (line,) = done.stdout.splitlines()
    return line


def test_registry_without_login(upstream: ScriptedRegistry, tmp_path: Path) -> None:
    done = checked(tmp_path, {upstream.host: {}})
    assert succeeded(done) == f"{upstream.host}: ok: http, anonymous\n"
    assert [request.path for request in upstream.requests] == ["/v2/"]


@pytest.mark.parametrize("way", ["basic", "token"])
def test_registry_with_login(upstream: ScriptedRegistry, tmp_path: Path, way: str) -> None:
    users = {"puller": SECRET}
    upstream.script("*", Basic(users) if way == "basic" else Tokens(f"{upstream.url}/token", users=users))
    done = checked(tmp_path, {upstream.host: {"scheme": "http", **WRONG}})
    assert succeeded(done) == f"{upstream.host}: ok: http, as the user puller\n"


def test_login_that_is_not_asked_for(upstream: ScriptedRegistry, tmp_path: Path) -> None:
    done = checked(tmp_path, {upstream.host: {"scheme": "http", **WRONG}})
    assert succeeded(done) == f"{upstream.host}: ok: http, anonymous (it did not ask for credentials)\n"


@pytest.mark.parametrize("way", ["basic", "token"])
def test_wrong_login_is_told_apart_from_a_missing_one(upstream: ScriptedRegistry, tmp_path: Path, way: str) -> None:
    users = {"puller": "another"}
    upstream.script("*", Basic(users) if way == "basic" else Tokens(f"{upstream.url}/token", users=users))
    answered = "it answered 401" if way == "basic" else "its token service answered 401"
    line = failed(checked(tmp_path, {upstream.host: {"scheme": "http", **WRONG}}))
    assert line == f"{upstream.host}: FAILED: {answered}: 127.0.0.1 refused the user puller"
    line = failed(checked(tmp_path, {upstream.host: {"scheme": "http"}}))
    assert line == (
        f"{upstream.host}: FAILED: {answered}: 127.0.0.1 refused anonymous access (private, or absent); "
        "no credentials are configured for it"
    )


def test_each_mirror_is_asked_with_its_own_login(upstream: ScriptedRegistry, tmp_path: Path) -> None:
    with ScriptedRegistry() as one, ScriptedRegistry() as two:
        one.script("*", Basic({"puller": SECRET}))
        two.script("*", Reply(503))
        entries: dict[str, dict[str, object]] = {
            upstream.host: {"scheme": "http", "mirrors": [f"{one.url}/dockerhub", two.url]},
            one.host: {"scheme": "http", **WRONG},
            "registry.invalid": {"mirrors": [one.url], "mirrors_only": True},
        }
        done = checked(tmp_path, entries)
        assert done.returncode == 1
        assert done.stdout.splitlines() == [
            f"{upstream.host}, mirror {one.url}/dockerhub: ok: http, as the user puller",
            f"{upstream.host}, mirror {two.url}: FAILED: it answered 503",
            f"{upstream.host}: ok: http, anonymous",
            f"{one.host}: ok: http, as the user puller",
            f"registry.invalid, mirror {one.url}: ok: http, as the user puller",
        ]
        assert {request.path for request in one.requests} == {"/v2/"}


def test_name_connection_and_certificate_are_told_apart(tmp_path: Path) -> None:
    authority, port = Authority(tmp_path), free_port()
    with (
        ScriptedRegistry(tls=authority.server_context("127.0.0.1")) as secure,
        socket.create_server(("127.0.0.1", 0)) as silent,
    ):
        closing = f"127.0.0.1:{silent.getsockname()[1]}"
        silent.close()
        known = {"scheme": "https", "tls": {"ca": str(authority.ca)}}
        entries = {
            "registry.invalid": {},
            f"127.0.0.1:{port}": {"scheme": "https"},
            closing: {"scheme": "http"},
            secure.host: {"scheme": "https"},
        }
        done = checked(tmp_path, entries)
        assert done.returncode == 1
        unknown, refused, plain, untrusted = done.stdout.splitlines()
        assert unknown == "registry.invalid: FAILED: host name cannot be resolved"
        assert refused == f"127.0.0.1:{port}: FAILED: the connection was refused"
        assert plain == f"{closing}: FAILED: the connection was refused"
        assert untrusted.startswith(f"{secure.host}: FAILED: TLS failed: the certificate of ")
        assert succeeded(checked(tmp_path, {secure.host: known})) == f"{secure.host}: ok: https, anonymous\n"


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (
            Reply(200, b"<!DOCTYPE html><p>log in", PAGE),
            "it sent an HTML page, ",
        ),
        (Reply(404, b"not here"), "it answered 404 at http://{host}/v2/: there is no registry, or its path "),
        (
            Reply(302, b"", (("Location", "http://login.invalid/"),)),
            "host name cannot be resolved, at login.invalid, to which it redirects",
        ),
    ],
)
def test_host_that_is_no_registry(upstream: ScriptedRegistry, tmp_path: Path, answer: Reply, told: str) -> None:
    upstream.script("*", answer)
    line = failed(checked(tmp_path, {upstream.host: {"scheme": "http"}}))
    assert line.startswith(f"{upstream.host}: FAILED: {told.format(host=upstream.host)}")


def test_registry_that_calls_its_answer_a_page(upstream: ScriptedRegistry, tmp_path: Path) -> None:
    upstream.script("*", Reply(200, b"true", PAGE))
    done = checked(tmp_path, {upstream.host: {"scheme": "http"}})
    assert succeeded(done) == f"{upstream.host}: ok: http, anonymous\n"


def test_proxy_is_used_and_named(upstream: ScriptedRegistry, tmp_path: Path) -> None:
    name = "registry.invalid:5000"
    with ForwardProxy({name: ("127.0.0.1", int(upstream.host.rpartition(":")[2]))}) as proxy:
        entry = {"scheme": "http", "proxy": proxy.url}
        assert succeeded(checked(tmp_path, {name: entry})) == (
            f"{name}: ok: http, anonymous, through the proxy {proxy.url}\n"
        )
        assert len(proxy.lines) == 1
    line = failed(checked(tmp_path, {name: entry}))
    assert line == f"{name}: FAILED: proxy {proxy.url}: the connection was refused"


def test_what_is_not_asked_is_said(upstream: ScriptedRegistry, tmp_path: Path) -> None:
    entries = {upstream.host: {"scheme": "http"}}
    assert succeeded(checked(tmp_path, entries, "--air-gapped")) == (
        "every upstream: not asked: the daemon is air-gapped\n"
    )
    assert succeeded(checked(tmp_path, {})) == "no upstream is configured: none was asked\n"
    assert succeeded(checked(tmp_path, entries, "--allow-upstreams", "quay.io")) == (
        f"{upstream.host}: not asked: NOT ALLOWED by allow_upstreams\n"
    )
    assert not upstream.requests


@pytest.mark.parametrize("way", ["basic", "token"])
def test_daemon_says_that_the_user_was_refused(
    upstream: ScriptedRegistry, start_daemon: StartDaemon, way: str
) -> None:
    """The client gets 404, and the log has one line at level error for all its requests."""
    users = {"puller": "another"}
    upstream.script("*", Basic(users) if way == "basic" else Tokens(f"{upstream.url}/token", users=users))
    daemon = start_daemon({upstream.host: {"scheme": "http", **WRONG}})
    for _ in range(3):
        answer = fetch(f"{daemon.url}/v2/team/app/manifests/1?ns={upstream.host}")
        assert answer.status == 404
        assert b"127.0.0.1 refused the user puller" in answer.body
    (line,) = log_lines(daemon, "error")
    assert line.endswith(f"{upstream.host}: 127.0.0.1 refused the user puller (401)")
    assert SECRET not in daemon.log


def test_daemon_tells_refused_anonymous_access_apart(upstream: ScriptedRegistry, start_daemon: StartDaemon) -> None:
    upstream.script("*", Basic({"puller": "another"}))
    daemon = start_daemon({upstream.host: {"scheme": "http"}})
    answer = fetch(f"{daemon.url}/v2/team/app/manifests/1?ns={upstream.host}")
    assert answer.status == 404
    assert b"the upstream answered 401: 127.0.0.1 refused anonymous access (private, or absent)" in answer.body
    assert log_lines(daemon, "error") == []
