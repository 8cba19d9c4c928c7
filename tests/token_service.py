"""A token service whose tokens a real docker-registry verifies: JSON Web Tokens, signed by ES256."""

from __future__ import annotations

import base64
import json
import secrets
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from tests.certificates import Authority
from tests.upstream import ScriptedRegistry
from tests.upstream_auth import known_user
from tests.upstream_http import Answer, Handler, Request, Rule, error

_ISSUER = "token service of the tests"
_SERVICE = "registry.test"
_COORDINATE = 32


class TokenService(ScriptedRegistry):
    """Issues tokens at `realm` to `users`, or to everyone without users; `script` may change its answers.

    A token is valid for `life` seconds.
    """

    def __init__(
        self,
        authority: Authority,
        users: Mapping[str, str],
        *,
        tls: ssl.SSLContext | None = None,
        address: str = "127.0.0.1",
        port: int = 0,
        life: int = 300,
    ) -> None:
        super().__init__(tls=tls, address=address, port=port)
        self.realm = f"{self.url}/token"
        self._root = authority.ca
        self.script("/token", JwtTokens(*authority.issue("token service"), users, life))

    @property
    def settings(self) -> Mapping[str, str]:
        """The `auth: token` section of a docker-registry that accepts its tokens."""
        return {
            "realm": self.realm,
            "service": _SERVICE,
            "issuer": _ISSUER,
            "rootcertbundle": str(self._root),
        }

    @property
    def offered(self) -> tuple[str | None, ...]:
        """Return the `user:password` of each request so far, None for a request without."""
        return tuple(_credentials(request) for request in self.requests)


@dataclass(frozen=True)
class JwtTokens(Rule):
    """Issues tokens signed with the key of this certificate.

    With a negative `life` tokens have expired already, although the answer says otherwise.
    """

    certificate: Path
    key: Path
    users: Mapping[str, str] = field(default_factory=dict)
    life: int = 300

    def __call__(self, request: Request, handler: Handler) -> Answer:
        """Return a token for the requested scope, or 401."""
        user = known_user(request, self.users)
        if self.users and user is None:
            return error(401, "UNAUTHORIZED", "wrong user or password")
        if request.parameters("service") != (_SERVICE,):
            return error(400, "UNSUPPORTED", f"not my service: {request.query}")
        scopes = [scope for value in request.parameters("scope") for scope in value.split()]
        body = {"token": self._token(user or "", scopes), "expires_in": abs(self.life)}
        return Answer(200, (("Content-Type", "application/json"),), json.dumps(body).encode())

    def _token(self, user: str, scopes: list[str]) -> str:
        certificate = x509.load_pem_x509_certificate(self.certificate.read_bytes())
        der = certificate.public_bytes(serialization.Encoding.DER)
        header = {"typ": "JWT", "alg": "ES256", "x5c": [base64.b64encode(der).decode()]}
        now = int(time.time())
        claims = {
            "iss": _ISSUER,
            "sub": user,
            "aud": _SERVICE,
            "iat": now,
            "exp": now + self.life,
            "jti": secrets.token_hex(8),
            "access": [_access(scope) for scope in scopes],
        }
        signed = f"{_base64url(_json(header))}.{_base64url(_json(claims))}"
        key = serialization.load_pem_private_key(self.key.read_bytes(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        parts = decode_dss_signature(key.sign(signed.encode(), ec.ECDSA(hashes.SHA256())))
        return f"{signed}.{_base64url(b''.join(part.to_bytes(_COORDINATE, 'big') for part in parts))}"


def _access(scope: str) -> dict[str, object]:
    kind, name, actions = scope.split(":")
    return {"type": kind, "name": name, "actions": actions.split(",")}


def _credentials(request: Request) -> str | None:
    kind, _, encoded = (request.header("Authorization") or "").partition(" ")
    return base64.b64decode(encoded).decode() if kind == "Basic" else None


def _json(value: object) -> bytes:
    return json.dumps(value).encode()


def _base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
