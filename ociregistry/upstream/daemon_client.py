"""A client of the daemon that runs on the same store, which downloads for all processes, over its control socket."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlencode

from twisted.internet.endpoints import UNIXClientEndpoint
from twisted.internet.interfaces import IStreamClientEndpoint
from twisted.web.client import URI, Agent, HTTPConnectionPool
from twisted.web.iweb import IAgentEndpointFactory
from zope.interface import implementer

from ociregistry.context import Priority, Via
from ociregistry.errors import BlobUnknown, Denied, ManifestUnknown, RegistryError, Unavailable
from ociregistry.manifests import LARGEST_MANIFEST, Manifest, ManifestInvalid
from ociregistry.names import Digest, ImageReference, Repository
from ociregistry.strictjson import parse_json
from ociregistry.upstream.bandwidth import Bandwidth
from ociregistry.upstream.body import Body
from ociregistry.upstream.breaker import CircuitBreakers
from ociregistry.upstream.http import HttpClient, RequestOptions, Response

_LARGEST_ERROR = 64 * 1024
"""Bytes."""
_OPTIONS = RequestOptions(priority=Priority.URGENT)


@implementer(IAgentEndpointFactory)
class _Socket:
    def __init__(self, path: str, reactor: Any) -> None:
        self._path = path
        self._reactor = reactor

    def endpointForURI(self, uri: URI) -> IStreamClientEndpoint:
        return UNIXClientEndpoint(self._reactor, self._path)


class DaemonClient:
    """Fetches manifests and blobs through the daemon.

    Every method that sends a request also raises, with the daemon's own message:
        Unavailable: the daemon or its upstream cannot be asked.
        Denied: the daemon does not allow the request.
    """

    def __init__(self, socket: str, instance: str, reactor: Any) -> None:
        """Use the control socket at the path `socket`; `instance` names this process in Via headers."""
        # The daemon does not complete images by itself for requests with a Via header: the caller asks for all parts.
        self._via = Via().through(instance)
        pool = HTTPConnectionPool(reactor)
        agent = Agent.usingEndpointFactory(reactor, _Socket(socket, reactor), pool)
        unlimited = Bandwidth(None, (), reactor)
        self._pool = pool
        # The daemon is silent while it waits for an upstream.
        breakers = CircuitBreakers(reactor, watches=False)
        self._http = HttpClient("the daemon", agent, breakers, unlimited, lambda: None, reactor)

    async def stop(self) -> None:
        """Close the connections."""
        await self._pool.closeCachedConnections()

    async def manifest(self, image: ImageReference) -> Manifest:
        """Return the manifest of `image`.

        Raises:
            ManifestUnknown: the daemon cannot find it.
        """
        response = await self._get(image.repository, f"manifests/{image.reference}", ManifestUnknown)
        return await _manifest(response, str(image))

    async def referrers(self, repository: Repository, digest: Digest) -> Manifest:
        """Return the index of the referrers of the manifest `digest`.

        Raises:
            ManifestUnknown: the daemon has no such index.
        """
        response = await self._get(repository, f"referrers/{digest}", ManifestUnknown)
        return await _manifest(response, f"{repository}@{digest}")

    async def blob(self, repository: Repository, digest: Digest, start: int) -> Body:
        """Return the body of a blob from the byte `start` on, while the daemon may still be downloading it.

        Raises:
            BlobUnknown: the daemon cannot find the blob.
        """
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
    """Return the message in the body of an error (distribution-spec, "Error Codes"), or the empty string."""
    try:
        return str(parse_json(body)["errors"][0]["message"])
    except (ValueError, LookupError, TypeError):
        return ""
