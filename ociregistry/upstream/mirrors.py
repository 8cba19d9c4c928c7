"""The sources of an upstream's content: its mirrors in their order, and then the registry itself.

Whether a body is bad shows only when it has been read: then its reader reports that to the source, and requests pass
over that mirror for a while.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from ociregistry.concurrency import Backoff
from ociregistry.context import Priority, Via, Wanted
from ociregistry.errors import Denied, Unavailable
from ociregistry.manifests import canonical_media_type
from ociregistry.names import Repository
from ociregistry.upstream.auth import AccessRefused
from ociregistry.upstream.breaker import LinkDown
from ociregistry.upstream.client import Client, Headers
from ociregistry.upstream.http import DEFAULT_OPTIONS, RequestOptions, Response

_MIRROR_TIMEOUT = 15.0
"""Seconds that a mirror has for its headers, short enough that the registry itself can still be asked in time."""
_LOOKING = RequestOptions(timeout=_MIRROR_TIMEOUT, priority=Priority.METADATA)
_BACKOFF = Backoff(first=10.0, longest=3600.0)
"""The seconds for which a mirror is not asked after a bad body."""


class Source:
    """The registry itself, as the source of a response."""

    is_mirror = False

    def __init__(self, client: Client, mirrors: Sequence[MirrorClient] = ()) -> None:
        self.client = client
        self._mirrors = mirrors

    @property
    def distrusts_mirrors(self) -> bool:
        """Whether one of the registry's mirrors is not asked after a bad body, so that its other bytes may be bad."""
        return any(mirror.paused for mirror in self._mirrors)

    def failed(self, why: str) -> bool:
        """Report that the body of a response was bad.

        Returns:
            Whether to send the request again, as another source will be asked. There is none after the registry.
        """
        return False


class MirrorClient(Source):
    """A mirror, which is not asked for a while after a bad body."""

    is_mirror = True
    log = Logger(namespace="ociregistry.upstream")

    def __init__(self, name: str, client: Client, clock: IReactorTime) -> None:
        """Set up the mirror; `name` is used in messages."""
        super().__init__(client)
        self.name = name
        self._clock = clock
        self._failures = 0
        self._paused_until = 0.0
        self._why = ""

    def failed(self, why: str) -> bool:
        """Report that the body of a response was bad; the mirror is not asked for 10 s, then twice as long each time.

        Bad bodies of requests that were sent before the pause count as one failure. An hour without a failure after
        the end of a pause ends the doubling.
        """
        now = self._clock.seconds()
        if now >= self._paused_until:
            self._failures = self._failures + 1 if now - self._paused_until < _BACKOFF.longest else 1
            seconds = _BACKOFF.interval(self._failures)
            self._paused_until, self._why = now + seconds, why
            self.log.warn(
                "mirror {mirror} is not asked for {seconds:.0f} s: {why}", mirror=self.name, seconds=seconds, why=why
            )
        return True

    @property
    def paused(self) -> str | None:
        """Why the mirror is not asked at present, as text for messages; None where it is."""
        seconds = self._paused_until - self._clock.seconds()
        return f"{self.name}: not asked for {seconds:.0f} s: {self._why}" if seconds > 0 else None


class Sources:
    """The mirrors of a registry in the order in which they are asked, and then the registry itself."""

    log = Logger(namespace="ociregistry.upstream")

    def __init__(self, mirrors: Sequence[MirrorClient], own: Client) -> None:
        self._mirrors = mirrors
        self._registry = Source(own, mirrors)

    async def lead_to(self, repository: Repository, path: str, headers: Headers, via: Via) -> bool:
        """Ask each mirror, by HEAD, whether it is, or leads to, a cache that `via` names."""
        for mirror in self._mirrors:
            if await _leads_to(mirror, repository, path, headers, via):
                return True
        return False

    async def request(
        self,
        method: str,
        repository: Repository,
        path: str,
        headers: Headers,
        options: RequestOptions = DEFAULT_OPTIONS,
    ) -> tuple[Response, Source]:
        """Return the first good response of a mirror, or else the registry's own, of any status; and its source.

        Raises:
            Unavailable: the registry itself cannot be asked; the message also says why each mirror was passed over.
            AccessRefused: the registry's token service refuses access.
            Denied: the registry, or a redirect of it, leads to an address that is not allowed.
        """
        missed: list[str] = []
        # A silent mirror is passed over, so nothing waits for a late response.
        quick = replace(options, timeout=min(options.timeout, _MIRROR_TIMEOUT), wanted=None)
        for mirror in self._mirrors:
            why = mirror.paused
            if why is None:
                try:
                    response = await mirror.client.request(method, repository, path, headers, quick)
                    why = await _passed_over(mirror, path, response)
                    if why is None:
                        return response, mirror
                except (Unavailable, Denied) as error:
                    why = error.message
            self.log.debug("mirror skipped: {missed}", missed=why)
            missed.append(why)
        wanted = options.wanted
        if missed and wanted is not None:
            told = Wanted(lambda error: wanted.link_down(_with_missed(error, missed)), wanted.again)
            options = replace(options, wanted=told)
        try:
            return await self._registry.client.request(method, repository, path, headers, options), self._registry
        except AccessRefused:
            raise
        except Unavailable as error:
            if not missed:
                raise
            raise _with_missed(error, missed) from None


def _with_missed(error: Unavailable, missed: Sequence[str]) -> Unavailable:
    """Return the error of the registry, with the reasons why its mirrors were passed over."""
    message = f"{error.message} ({'; '.join(missed)})"
    return error.with_message(message) if isinstance(error, LinkDown) else Unavailable(message, error.retry_after)


async def _leads_to(mirror: MirrorClient, repository: Repository, path: str, headers: Headers, via: Via) -> bool:
    """Return whether a mirror refuses a request because it is, or leads to, a cache that `via` names."""
    try:
        response = await mirror.client.request("HEAD", repository, path, headers, _LOOKING)
    except (Unavailable, Denied):
        return False
    await response.discard()
    passed = Via.parse(response.header("via")).instances
    return response.status == 403 and any(passed.count(name) > 1 for name in via.instances)


async def _passed_over(mirror: MirrorClient, path: str, response: Response) -> str | None:
    """Return why a mirror's response is not used, after discarding its body; None where it is used."""
    good = 200 <= response.status < 300
    if good and canonical_media_type(response.header("content-type")) != "text/html":
        return None
    await response.discard()
    if not good:
        return f"{mirror.name}: it answered {response.outcome}"
    why = "it sent an HTML page, as login pages and captive portals are"
    # Registries without the referrers API may answer its path with a page of their website.
    if not path.startswith("referrers/"):
        mirror.failed(why)
    return f"{mirror.name}: {why}"
