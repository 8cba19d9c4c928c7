"""Rules of the scripted registry for authentication."""

from __future__ import annotations

import base64
import json
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from tests.upstream_http import Answer, Handler, Request, Rule, error

_REPOSITORY = re.compile(r"/v2/(.+)/(?:manifests|blobs|tags|referrers)/[^/]+")


@dataclass(frozen=True)
class Basic(Rule):
    """Demand the name and password of one of these users."""

    users: Mapping[str, str]
    realm: str = "scripted"

    def __call__(self, request: Request, handler: Handler) -> Answer:
        """Return 401 without the credentials of a known user."""
        if known_user(request, self.users) is None:
            return error(401, "UNAUTHORIZED").with_header("WWW-Authenticate", f'Basic realm="{self.realm}"')
        return handler(request)


@dataclass(frozen=True)
class Tokens(Rule):
    """Demand Bearer tokens under /v2/ and issue them at /token; one instance does both.

    `registry.script("*", Tokens(registry.url + "/token"))`. For a token server on another host, script the same
    instance there. Scopes in `denied` are left out of a token silently, as token servers do. A token is valid for
    `lifetime` seconds by `clock`; `expires_in` is the value in the answer, None: none. With `users` a token is issued
    to them alone: by GET with user and password, by POST with a password as the refresh token. `scope` is how a
    challenge states the scope: not at all, or by an empty one, as some registries do.
    """

    realm: str
    service: str = "scripted-registry"
    key: Literal["token", "access_token"] = "token"
    users: Mapping[str, str] = field(default_factory=dict)
    denied: Iterable[str] = ()
    scope: Literal["told", "missing", "empty"] = "told"
    lifetime: float = 300
    expires_in: int | None = 300
    clock: Callable[[], float] = time.monotonic
    _issued: dict[str, tuple[frozenset[str], float]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self, request: Request, handler: Handler) -> Answer:
        """Return a token, a challenge, or the handler's answer to a request with a valid token."""
        if request.path == "/token":
            return self._issue(request)
        if not request.path.startswith("/v2/"):
            return handler(request)
        repository = _REPOSITORY.fullmatch(request.path)
        needed = f"repository:{repository[1]}:pull" if repository else None
        granted = self._granted(request)
        if granted is None:
            return self._challenge(needed, "")
        if needed is not None and needed not in granted:
            return self._challenge(needed, "insufficient_scope")
        return handler(request)

    def revoke(self) -> None:
        """Invalidate all tokens issued so far."""
        with self._lock:
            self._issued.clear()

    def _granted(self, request: Request) -> frozenset[str] | None:
        kind, _, token = (request.header("Authorization") or "").partition(" ")
        with self._lock:
            scopes, end = self._issued.get(token, (frozenset(), 0.0))
            known = kind == "Bearer" and token in self._issued and self.clock() < end
        return scopes if known else None

    def _issue(self, request: Request) -> Answer:
        asking = request if request.method == "GET" else replace(request, query=request.body.decode())
        posted = set(asking.parameters("refresh_token")) & set(self.users.values())
        if self.users and known_user(request, self.users) is None and not posted:
            return error(401, "UNAUTHORIZED", "wrong user or password")
        if asking.parameters("service") != (self.service,):
            return error(400, "UNSUPPORTED", f"not my service: {asking.query}")
        asked = {scope for value in asking.parameters("scope") for scope in value.split()}
        token = secrets.token_hex(16)
        with self._lock:
            self._issued[token] = (frozenset(asked.difference(self.denied)), self.clock() + self.lifetime)
        body = {self.key: token} | ({} if self.expires_in is None else {"expires_in": self.expires_in})
        return Answer(200, (("Content-Type", "application/json"),), json.dumps(body).encode())

    def _challenge(self, scope: str | None, reason: str) -> Answer:
        told = {"told": scope, "missing": None, "empty": ""}[self.scope]
        parts = {"realm": self.realm, "service": self.service, "scope": told, "error": reason or None}
        challenge = ",".join(f'{name}="{value}"' for name, value in parts.items() if value is not None)
        return error(401, "UNAUTHORIZED").with_header("WWW-Authenticate", f"Bearer {challenge}")


def known_user(request: Request, users: Mapping[str, str]) -> str | None:
    """Return the known user whose Basic credentials the request carries."""
    offered = request.header("Authorization")
    for name, password in users.items():
        if offered == "Basic " + base64.b64encode(f"{name}:{password}".encode()).decode():
            return name
    return None
