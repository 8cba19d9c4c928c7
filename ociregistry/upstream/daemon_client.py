"""Asks the daemon that runs on the same store, over its control socket: it downloads for all processes."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import urlencode

from twisted.internet.endpoints import UNIXClientEndpoint
from twisted.internet.interfaces import IStreamClientEndpoint
from twisted.web.client import URI, Agent, HTTPConnectionPool
from twisted.web.iweb import IAgentEndpointFactory
from zope.interface import implementer

from ociregistry.errors import BlobUnknown, Denied, ManifestUnknown, RegistryError, Unavailable
from ociregistry.manifests import LARGEST_MANIFEST, Manifest, ManifestInvalid
from ociregistry.names import Digest, ImageReference, Repository
from ociregistry.upstream.bandwidth import Bandwidth
from ociregistry.upstream.body import Body
from ociregistry.upstream.breaker import CircuitBreakers
from ociregistry.upstream.http import HttpClient, RequestOptions, Response
from ociregistry.via import Via

_LARGEST_ERROR = 64 * 1024
_OPTIONS = RequestOptions(insist=True)


@implementer(IAgentEndpointFactory)
class _Socket:
    def __init__(self, path: str, reactor: Any) -> None:
        self._path = path
        self._reactor = reactor

    def endpointForURI(self, uri: URI) -> IStreamClientEndpoint:
        return UNIXClientEndpoint(self._reactor, self._path)


class DaemonClient:
    """What the daemon gives. All methods raise `Unavailable` and `Denied` with its own words."""

    def __init__(self, socket: str, instance: str, reactor: Any) -> None:
        """`socket` is the path of its socket; `instance` is what this process calls itself."""
        # As for another cache, it completes nothing by itself of what is asked for here.
        self._via = Via().through(instance)
        pool = HTTPConnectionPool(reactor)
        agent = Agent.usingEndpointFactory(reactor, _Socket(socket, reactor), pool)
        unlimited = Bandwidth(None, (), reactor)
        self._pool = pool
        self._http = HttpClient("the daemon", agent, CircuitBreakers(reactor), unlimited, lambda: None, reactor)

    async def stop(self) -> None:
        """Closes the connections."""
        await self._pool.closeCachedConnections()

    async def manifest(self, image: ImageReference) -> Manifest:
        """The manifest that `image` means; raises `ManifestUnknown`."""
        response = await self._get(image.repository, f"manifests/{image.reference}", ManifestUnknown)
        return await _manifest(response, str(image))

    async def referrers(self, repository: Repository, digest: Digest) -> Manifest:
        """The index of what refers to the manifest `digest`; raises `ManifestUnknown` where there is none."""
        response = await self._get(repository, f"referrers/{digest}", ManifestUnknown)
        return await _manifest(response, f"{repository}@{digest}")

    async def blob(self, repository: Repository, digest: Digest, start: int) -> Body:
        """The blob from the byte `start`, as it comes; raises `BlobUnknown`."""
        headers = {"Range": f"bytes={start}-"} if start else {}
        response = await self._get(repository, f"blobs/{digest}", BlobUnknown, headers)
        return response.body

    async def _get(
        self, repository: Repository, path: str, unknown: type[RegistryError], headers: dict[str, str] | None = None
    ) -> Response:
        query = urlencode({"ns": repository.upstream.name})
        url = f"http://localhost/v2/{repository.path}/{path}?{query}"
        headers = {**(headers or {}), "Via": self._via}
        response = await self._http.send("GET", url, headers, options=_OPTIONS)
        if response.status in (200, 206):
            return response
        why = _message(await response.collect(_LARGEST_ERROR)) or f"the daemon answered {response.status}"
        if response.status == 404:
            raise unknown(why)
        raise Denied(why) if response.status == 403 else Unavailable(why)


async def _manifest(response: Response, what: str) -> Manifest:
    data = await response.collect(LARGEST_MANIFEST)
    try:
        return Manifest.parse(data, response.header("content-type"))
    except ManifestInvalid as error:
        raise Unavailable(f"{what}: the daemon sent no valid manifest: {error}") from None


def _message(body: bytes) -> str:
    """What an error's body says (distribution-spec, "Error Codes")."""
    try:
        return str(json.loads(body)["errors"][0]["message"])
    except (ValueError, LookupError, TypeError, RecursionError):
        return ""
