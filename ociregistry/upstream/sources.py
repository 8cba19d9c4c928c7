"""Where an upstream's content can be had: from its mirrors, in their order, and then from itself."""

from __future__ import annotations

from collections.abc import Sequence

from twisted.internet import defer
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from ociregistry.errors import Denied, Unavailable
from ociregistry.names import Repository
from ociregistry.upstream.client import Client, Headers
from ociregistry.upstream.exchange import Response
from ociregistry.upstream.tokens import AccessRefused

_WITHIN = 8.0
"""Seconds that a mirror has for its headers; the registry itself must still have its chance."""
_RESTS = 30.0
"""Seconds for which a mirror that could not be reached is passed over."""


class MirrorClient:
    """A mirror, and until when it is passed over."""

    def __init__(self, name: str, client: Client) -> None:
        self.name = name
        self.client = client
        self.rests_until = 0.0


class Sources:
    """Asks the mirrors first; the registry itself has the last word, whatever it says."""

    log = Logger(namespace="ociregistry.upstream")

    def __init__(self, mirrors: Sequence[MirrorClient], own: Client, clock: IReactorTime) -> None:
        self._mirrors = mirrors
        self._own = own
        self._clock = clock

    async def request(self, method: str, repository: Repository, path: str, headers: Headers) -> Response:
        """The first good answer, or the registry's own. Raises as `Client.request` does."""
        missed: list[str] = []
        for mirror in self._mirrors:
            if self._clock.seconds() < mirror.rests_until:
                missed.append(f"{mirror.name}: it could not be reached a moment ago")
                continue
            try:
                asked = Deferred.fromCoroutine(mirror.client.request(method, repository, path, headers))
                response = await asked.addTimeout(_WITHIN, self._clock)
            except (AccessRefused, Denied) as error:
                missed.append(error.message)
            except (defer.TimeoutError, Unavailable) as error:
                mirror.rests_until = self._clock.seconds() + _RESTS
                missed.append(str(error) if isinstance(error, Unavailable) else f"{mirror.name}: no answer in time")
                self.log.warn(
                    "{mirror} is passed over for {seconds:.0f} s: {why}",
                    mirror=mirror.name,
                    seconds=_RESTS,
                    why=missed[-1],
                )
            else:
                if 200 <= response.status < 300:
                    return response
                await response.discard()
                missed.append(f"{mirror.name}: it answered {response.status}")
                self.log.debug("{missed}", missed=missed[-1])
        try:
            return await self._own.request(method, repository, path, headers)
        except Unavailable as error:
            if not missed or isinstance(error, AccessRefused):
                raise
            raise Unavailable(f"{error.message} ({'; '.join(missed)})", error.retry_after) from None
