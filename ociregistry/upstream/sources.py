"""Where an upstream's content can be had: from its mirrors, in their order, and then from itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from twisted.logger import Logger

from ociregistry.errors import Denied, Unavailable
from ociregistry.names import Repository
from ociregistry.upstream.client import Client, Headers
from ociregistry.upstream.exchange import Response
from ociregistry.upstream.manner import NORMALLY, Manner
from ociregistry.upstream.tokens import AccessRefused

_WITHIN = 15.0
"""Seconds that a mirror has for its headers; the registry itself must still have its chance."""


@dataclass(frozen=True, slots=True)
class MirrorClient:
    """Asks the mirror `name`."""

    name: str
    client: Client


class Sources:
    """Asks the mirrors first; the registry itself has the last word, whatever it says."""

    log = Logger(namespace="ociregistry.upstream")

    def __init__(self, mirrors: Sequence[MirrorClient], own: Client) -> None:
        self._mirrors = mirrors
        self._own = own

    async def request(
        self, method: str, repository: Repository, path: str, headers: Headers, manner: Manner = NORMALLY
    ) -> Response:
        """The first good answer, or the registry's own. Raises as `Client.request` does."""
        missed: list[str] = []
        quick = replace(manner, within=min(manner.within, _WITHIN))
        for mirror in self._mirrors:
            try:
                response = await mirror.client.request(method, repository, path, headers, quick)
            except (Unavailable, Denied) as error:
                missed.append(error.message)
            else:
                if _is_good(method, response):
                    return response
                await response.discard()
                missed.append(f"{mirror.name}: it answered {response.status}")
            self.log.debug("passed over the mirror {missed}", missed=missed[-1])
        try:
            return await self._own.request(method, repository, path, headers, manner)
        except AccessRefused:
            raise
        except Unavailable as error:
            if not missed:
                raise
            raise Unavailable(f"{error.message} ({'; '.join(missed)})", error.retry_after) from None


def _is_good(method: str, response: Response) -> bool:
    if "text/html" in response.header("content-type"):
        # What stands between us and the mirror, and wants to be logged in to.
        return False
    return 200 <= response.status < 300 or response.refuses_head(method)


class AirGap:
    """In the place of `Sources` where nobody is to be asked."""

    async def request(
        self, method: str, repository: Repository, path: str, headers: Headers, manner: Manner = NORMALLY
    ) -> Response:
        """Raises `AccessRefused`."""
        raise AccessRefused("it is not in the cache, and this server is air-gapped")
