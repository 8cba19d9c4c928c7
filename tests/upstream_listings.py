"""How products list tags, otherwise than the specification's example: rules for the scripted registry."""

from __future__ import annotations

import base64
import json
import secrets
from dataclasses import dataclass, replace

from tests.upstream_http import Answer, Handler, Request, Rule, error


@dataclass(frozen=True)
class OpaquePages(Rule):
    """List tags in pages of `size` that are named by a token of the registry's own, in the parameter `key`.

    No two tokens are the same, as they are encrypted. What is no token is ignored, or with `strict` refused. With
    `stuck` the tokens are ignored too.
    """

    key: str
    size: int = 2
    strict: bool = False
    stuck: bool = False

    def __call__(self, request: Request, handler: Handler) -> Answer:
        """The page of the token, the first one without."""
        whole = handler(replace(request, query=""))
        tags = json.loads(whole.body)["tags"]
        start = 0
        for token in request.parameters(self.key):
            try:
                start = int(base64.b64decode(token, validate=True).partition(b":")[0])
            except ValueError:
                if self.strict:
                    return error(400, "UNSUPPORTED", "invalid token")
        start = 0 if self.stuck else start
        page = json.dumps({"name": "x", "tags": tags[start : start + self.size]}).encode()
        answer = replace(whole, body=page)
        if start + self.size >= len(tags):
            return answer
        token = base64.b64encode(b"%d:%s" % (start + self.size, secrets.token_bytes(12))).decode()
        query = f"{self.key}={token.replace('+', '%2B').replace('=', '%3D')}&n={self.size}"
        return answer.with_header("Link", f'<{request.path}?{query}>; rel="next"')


QUAY = OpaquePages("next_page")
"""Quay up to 2024: `last` of a client is ignored, and the next page is named by `next_page` (go-containerregistry
issue 794, regclient issue 272, docker_registry2 issue 56)."""
ECR = OpaquePages("last", strict=True)
"""Amazon ECR: `last` is a token, and a tag is none (docker_registry2 issue 34)."""


@dataclass(frozen=True)
class NoReferrers(Rule):
    """Have no referrers API: answer with this `status`, or for 303 with a redirect to a page of HTML.

    404: Docker's registry up to 2.8, in plain text. 303: ghcr.io. A redirect to a login: registry.k8s.io (oras-go
    issue 633). oras-java issue 773 lists ghcr.io as one that needs the tag for referrers.
    """

    status: int = 404

    def __call__(self, request: Request, handler: Handler) -> Answer:
        """No index of referrers; everything else as ever."""
        if request.path == "/login":
            return Answer(200, (("Content-Type", "text/html; charset=utf-8"),), b"<!DOCTYPE html><html></html>")
        if "/referrers/" not in request.path:
            return handler(request)
        location = (("Location", "/login"),) if self.status == 303 else ()
        return Answer(self.status, (("Content-Type", "text/plain"), *location), b"404 page not found\n")
