"""A secret appears nowhere: not in logs, errors, metrics, pages, output of commands, process table, or the store."""

from __future__ import annotations

import base64
import os
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, quote_plus

import pytest

from tests.client import Response, fetch
from tests.images import make_image
from tests.processes import ROOT, Daemon, free_port, run, twistd
from tests.upstream import ScriptedRegistry
from tests.upstream_auth import Basic, Tokens
from tests.upstream_http import Answer, Handler, Request, Rule, error
from tests.upstream_rules import Redirect, Reply

IMAGE = make_image("secrets")
HELPER = """\
#!/bin/sh
read -r server
cat "/proc/$$/cmdline" > "{folder}/helper-command-line"
printf '{{"ServerURL": "%s", "Username": "helped", "Secret": "{secret}"}}' "$server"
"""


@dataclass(frozen=True)
class Oauth(Rule):
    """A token service that accepts an identity token by POST, and issues this access token."""

    identity: str
    token: str
    forms: list[str]

    def __call__(self, request: Request, handler: Handler) -> Answer:
        """Return 405 for GET, as some services do."""
        if request.method != "POST":
            return error(405, "UNSUPPORTED")
        return Answer(200, (("Content-Type", "application/json"),), b'{"access_token": "%b"}' % self.token.encode())


@dataclass(frozen=True)
class TokenRequired(Rule):
    """A registry that accepts one token."""

    realm: str
    token: str

    def __call__(self, request: Request, handler: Handler) -> Answer:
        """Return 401 without the token."""
        if request.header("Authorization") == f"Bearer {self.token}":
            return handler(request)
        challenge = f'Bearer realm="{self.realm}",service="s",scope="repository:team/app:pull"'
        return error(401, "UNAUTHORIZED").with_header("WWW-Authenticate", challenge)


class SecretUpstreams:
    """Upstreams of every kind, and everything that must stay secret."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.secrets: dict[str, str] = {
            name: f"{name}-{secrets.token_hex(8)}&=+ %/"
            for name in ("password", "from-file", "from-environment", "helped", "identity", "wrong")
        }
        self.secrets["access"] = f"access-{secrets.token_hex(8)}"
        self.secrets["signature"] = secrets.token_hex(16)
        self.registries: dict[str, dict[str, object]] = {}

    def spellings(self) -> Iterator[tuple[str, bytes]]:
        """Return the ways in which each secret could appear."""
        for name, secret in self.secrets.items():
            raw = secret.encode()
            for spelled in (raw, quote(secret, safe="").encode(), quote_plus(secret).encode(), repr(secret).encode()):
                yield name, spelled.strip(b"'")
            for user in ("user", "helped"):
                pair = f"{user}:{secret}".encode()
                # At each offset in a longer text: base64 encodes groups of three bytes.
                for shift in range(3):
                    yield name, base64.b64encode(pair[shift : shift + (len(pair) - shift) // 3 * 3])
                    yield name, base64.b64encode(raw[shift : shift + (len(raw) - shift) // 3 * 3])

    def found_in(self, text: bytes) -> set[str]:
        """Return the secrets that are in the text."""
        return {name for name, spelled in self.spellings() if spelled in text}


@pytest.fixture
def setup(tmp_path: Path) -> SecretUpstreams:
    """The upstreams before any request."""
    return SecretUpstreams(tmp_path)


def every_kind(setup: SecretUpstreams, tokens: Tokens, upstreams: list[ScriptedRegistry]) -> list[str]:
    """Script the upstreams; return the host of each, the one that refuses us last."""
    by_password, by_file, by_environment, by_helper, by_identity, signed, refusing = upstreams
    known = setup.secrets
    by_password.script("*", Basic({"user": known["password"]}))
    by_file.script("*", tokens)
    by_environment.script("*", Basic({"user": known["from-environment"]}))
    by_helper.script("*", Basic({"helped": known["helped"]}))
    by_identity.script("/v2/*", TokenRequired(f"{by_identity.url}/oauth", known["access"]))
    by_identity.script("/oauth", Oauth(known["identity"], known["access"], []))
    signed.script("/v2/*/blobs/*", Redirect(f"{signed.url}/storage?X-Signature={known['signature']}&path="))
    signed.script("/storage", Reply(500, b"no"))
    refusing.script("*", Basic({"user": "another"}))
    (setup.folder / "password").write_text(known["from-file"] + "\n")
    auths: dict[ScriptedRegistry, dict[str, str]] = {
        by_password: {"user": "user", "password": known["password"]},
        by_file: {"user": "user", "password_file": "password"},
        by_environment: {"user": "user", "password_env": "UPSTREAM_PASSWORD"},
        by_helper: {"credential_helper": "test"},
        by_identity: {"identity_token": known["identity"]},
        signed: {"user": "user", "password": known["password"]},
        refusing: {"user": "user", "password": known["wrong"]},
    }
    for upstream, auth in auths.items():
        upstream.add("team/app", IMAGE, "1")
        setup.registries[upstream.host] = {"scheme": "http", "auth": auth}
    return [upstream.host for upstream in upstreams]


@pytest.fixture
def upstreams() -> Iterator[list[ScriptedRegistry]]:
    """Seven scripted registries."""
    opened = [ScriptedRegistry() for _ in range(7)]
    yield opened
    for upstream in opened:
        upstream.close()


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_no_secret_appears_anywhere(
    setup: SecretUpstreams, upstreams: list[ScriptedRegistry], start_daemon: Callable[..., Daemon], log_format: str
) -> None:
    tokens = Tokens(f"{upstreams[1].url}/token", users={"user": setup.secrets["from-file"]})
    hosts = every_kind(setup, tokens, upstreams)
    helper = setup.folder / "docker-credential-test"
    helper.write_text(HELPER.format(folder=setup.folder, secret=setup.secrets["helped"].replace("%", "%%")))
    helper.chmod(0o755)
    environment = {
        "PATH": f"{setup.folder}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "UPSTREAM_PASSWORD": setup.secrets["from-environment"],
    }
    admin = free_port()
    logs = ("--log-level", "trace", "--log-format", log_format)
    options = ("--no-complete-images", *logs, "--admin-listen", f"tcp:{admin}:interface=127.0.0.1")
    daemon = start_daemon(setup.registries, *options, environment=environment)

    def ask(host: str, path: str) -> Response:
        return fetch(f"{daemon.url}/v2/team/app/{path}?ns={quote(host, safe='')}")

    answers = {host: ask(host, "manifests/1") for host in hosts}
    blob = f"blobs/{IMAGE.layers[0].digest}"
    answers |= {f"{host} blob": ask(host, blob) for host in [hosts[5], hosts[6]]}
    assert [answer.status for answer in answers.values()] == [200] * 6 + [404, 503, 404]
    # The secrets were really used.
    sent = [request.header("Authorization") or "" for upstream in upstreams for request in upstream.requests]
    assert sum(header.startswith("Basic ") for header in sent) >= 6
    assert any(setup.secrets["access"] in header for header in sent)
    (form,) = [request for request in upstreams[4].requests if request.method == "POST"]
    assert form.status == 200
    assert "X-Signature" in upstreams[5].requests[-1].query

    issued = {token: token for token in tokens._issued}
    assert issued
    setup.secrets.update(issued)
    check = run(twistd("--config-path", str(daemon.config_path), "check"), environment=environment)
    assert check.stdout.count("127.0.0.1:") >= 7
    printed: dict[str, bytes] = {}
    here = ("--config-path", str(daemon.config_path), "--image-path", str(daemon.image_path))
    for words in (("status",), ("status", "--json")):
        done = run(twistd(*here, *words), environment=environment, check=False)
        assert all(host in done.stdout for host in hosts), done
        printed[" ".join(words)] = (done.stdout + done.stderr).encode()
    places = {
        **printed,
        "the log": daemon.log.encode(),
        "check": (check.stdout + check.stderr).encode(),
        "the command line": Path(f"/proc/{daemon.process.pid}/cmdline").read_bytes(),
        "the helper's command line": (setup.folder / "helper-command-line").read_bytes(),
    }
    told = {path: fetch(f"http://127.0.0.1:{admin}{path}") for path in ("/metrics", "/status", "/", "/nothing")}
    assert [answer.status for answer in told.values()] == [200, 200, 200, 404]
    # The links to all of them are told, and why some are down.
    for path in ("/metrics", "/status", "/"):
        assert all(host.encode() in told[path].body for host in hosts)
    places |= {path: answer.body + bytes(answer.headers) for path, answer in told.items()}
    places |= {f"the answer for {what}": answer.body + bytes(answer.headers) for what, answer in answers.items()}
    places |= {str(path): path.read_bytes() for path in daemon.image_path.rglob("*") if path.is_file()}
    assert {place: found for place, text in places.items() if (found := setup.found_in(text))} == {}
    assert len([place for place in places if place.startswith(str(daemon.image_path))]) >= 2


def test_search_finds_secrets_in_every_spelling(setup: SecretUpstreams) -> None:
    """In every spelling, within other text."""
    for name, secret in setup.secrets.items():
        pair = base64.b64encode(f"user:{secret}".encode())
        inside = base64.b64encode(f"x{secret}".encode())
        for text in (secret.encode(), quote(secret, safe="").encode(), pair, inside):
            assert name in setup.found_in(b"before " + text + b" after"), text
    assert setup.found_in(b"nothing") == set()
