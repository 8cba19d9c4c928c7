"""Which proof of who we are goes with which request: to whom it is due, and to nobody else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ociregistry.config.registries import Password
from ociregistry.errors import Unavailable
from ociregistry.names import Repository
from ociregistry.upstream.challenges import (
    BasicChallenge,
    BearerChallenge,
    Challenge,
    best_challenge,
    lacks_scope,
)
from ociregistry.upstream.credentials import Credentials, basic
from ociregistry.upstream.manner import NORMALLY, Manner
from ociregistry.upstream.origins import Origin
from ociregistry.upstream.tokens import Tokens

_MOST_CHALLENGES = 1000
_MOST_REFUSALS = 3

Scope = tuple[Origin, Repository]


@dataclass(frozen=True, slots=True)
class Proof:
    """An `Authorization` header; whether it is an `old` one, from an earlier request, which may be out of date."""

    header: str = field(repr=False)
    old: bool


class Authorization:
    """What one upstream's requests carry. Credentials are for its own origin; a host that it redirects to gets at
    most an anonymous token, if it asks for one."""

    def __init__(self, credentials: Credentials, tokens: Tokens) -> None:
        self._credentials = credentials
        self._tokens = tokens
        self._challenges: dict[Scope, BearerChallenge] = {}
        self._wants_basic: Origin | None = None

    async def proof(self, scope: Scope, own: Origin, manner: Manner = NORMALLY) -> Proof | None:
        """What a request to `scope` carries, as far as is known; raises `Unavailable`."""
        challenge = self._challenges.get(scope)
        anonymous = scope[0] != own
        if challenge is not None:
            old = self._tokens.holds(challenge, anonymous=anonymous)
            try:
                return Proof(f"Bearer {await self._tokens.token(challenge, manner, anonymous=anonymous)}", old)
            except Unavailable:
                # The token service may have moved: what is asked next is asked without, and told the new place.
                self._challenges.pop(scope, None)
                raise
        if anonymous or self._wants_basic != own:
            return None
        old = self._credentials.from_helper
        credentials = await self._credentials.get()
        return Proof(basic(credentials), old) if isinstance(credentials, Password) else None

    def refused(
        self,
        scope: Scope,
        own: Origin,
        proofs: Sequence[Proof | None],
        challenges: Sequence[str],
        default_scope: str,
    ) -> bool:
        """Whether to ask `scope` again after a 401 with these `WWW-Authenticate` headers.

        `default_scope` is what a token is fetched for when the challenge does not tell, in the form
        `repository:NAME:pull`.
        `proofs` are those that it has refused during one request, the last one last: None is followed by one, an
        old one by a new one, a new one only by one of another kind or one that is for more.
        """
        proof = proofs[-1]
        known = self._challenges.get(scope)
        challenge = best_challenge(challenges)
        if isinstance(challenge, BearerChallenge):
            challenge = challenge.with_default_scope(default_scope)
        if proof is not None:
            self._forget(known, proof, scope, own)
        if len(proofs) > _MOST_REFUSALS or (proof is None and len(proofs) > 1):
            return False
        bearer = isinstance(challenge, BearerChallenge)
        if proof is not None and not proof.old and bearer == (known is not None):
            if known is None or not isinstance(challenge, BearerChallenge):
                return False
            challenge = known.widened(challenge)
            if not lacks_scope(challenges) or challenge.scope == known.scope:
                return False
        return self._take(challenge, scope, own)

    def _forget(self, known: BearerChallenge | None, proof: Proof, scope: Scope, own: Origin) -> None:
        if known is not None:
            self._tokens.forget(known, proof.header.removeprefix("Bearer "), anonymous=scope[0] != own)
        else:
            self._credentials.forget()

    def _take(self, challenge: Challenge | None, scope: Scope, own: Origin) -> bool:
        if challenge is None:
            return False
        if isinstance(challenge, BasicChallenge):
            self._challenges.pop(scope, None)
            self._wants_basic = own if scope[0] == own else self._wants_basic
            return scope[0] == own and self._credentials.any
        if len(self._challenges) >= _MOST_CHALLENGES:
            self._challenges.clear()
        self._challenges[scope] = challenge
        return True
