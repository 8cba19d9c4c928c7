"""The sources of an upstream's content: its mirrors in their order, and then the registry itself.

Whether a body is bad shows only when it has been read: then its reader reports that to the source, and requests pass
over that mirror for a while. Where the registry itself cannot be asked, its mirrors alone stand for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import NamedTuple

from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from ociregistry.concurrency import Backoff
from ociregistry.context import Priority, Via, Wanted
from ociregistry.errors import Denied, RegistryError, Unavailable
from ociregistry.manifests import canonical_media_type
from ociregistry.names import Repository
from ociregistry.upstream.auth import AccessRefused
from ociregistry.upstream.breaker import LinkDown
from ociregistry.upstream.client import Client, Headers
from ociregistry.upstream.http import DEFAULT_OPTIONS, RequestOptions, Response
from ociregistry.upstream.referrers import NO_API

_log = Logger(namespace="ociregistry.upstream")

_MIRROR_TIMEOUT = 15.0
"""Seconds that a mirror has for its headers, short enough that the registry itself can still be asked in time."""
_LOOKING = RequestOptions(timeout=_MIRROR_TIMEOUT, priority=Priority.METADATA)
_TEMPORARY = frozenset({408, 425, 429})
"""Statuses below 500 by which a mirror does not say whether it has the content."""
_BACKOFF = Backoff(first=10.0, longest=3600.0)
"""The seconds for which a mirror is not asked after a bad body."""


class Source:
    """The registry itself, as the source of a response."""

    is_mirror = False

    def __init__(self, kind: str, url: str, client: Client, mirrors: Sequence[MirrorClient] = ()) -> None:
        """Set up the source; `kind` and `url`, or a host alone, are used in messages."""
        self.name = f"{kind} {url}"
        self._host = url.rpartition("://")[2].partition("/")[0]
        self.client = client
        self._mirrors = mirrors

    def told(self, error: RegistryError) -> str:
        """Return the source's name and why it could not be asked, as text for messages."""
        return f"{self.name}: {error.message.removeprefix(f'{self._host}: ')}"

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

    def __init__(self, url: str, client: Client, clock: IReactorTime) -> None:
        """Set up the mirror; `url` is used in messages."""
        super().__init__("mirror", url, client)
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
            _log.warn("{mirror} is not asked for {seconds:.0f} s: {why}", mirror=self.name, seconds=seconds, why=why)
        return True

    @property
    def pause(self) -> int:
        """The seconds until the mirror is asked again, at least 1."""
        return max(1, ceil(self._paused_until - self._clock.seconds()))

    @property
    def paused(self) -> str | None:
        """Why the mirror is not asked at present, as text for messages; None where it is."""
        seconds = self._paused_until - self._clock.seconds()
        return f"not asked for {seconds:.0f} s: {self._why}" if seconds > 0 else None


@dataclass(frozen=True, slots=True)
class _PassedOver:
    """A mirror that was not the source of the content."""

    told: str
    """Its name and what it answered, as text for messages."""
    response: Response | None = None
    """The response by which it does not have the content, or does not show it; its body is unread."""
    refused: bool = False
    """Whether its token service refused access, which means the same."""
    retry_after: int = 5
    """The seconds until it may be asked again."""
    down: LinkDown | None = None
    """Why its host counts as down; None where it does not."""

    @property
    def answered(self) -> bool:
        """Whether the mirror answered that it does not have the content, or does not show it."""
        return self.response is not None or self.refused


class SourceAnswer(NamedTuple):
    """The response of a source, and what the sources that were passed over answered before."""

    response: Response
    source: Source
    passed_over: tuple[str, ...] = ()

    def told(self, alone: str) -> str:
        """Return what each source answered, as text for messages; a registry without mirrors is called `alone`."""
        if not self.passed_over and not self.source.is_mirror:
            return f"{alone} answered {self.response.outcome}"
        return "; ".join([*self.passed_over, f"{self.source.name}: it answered {self.response.outcome}"])


class Sources:
    """The mirrors of a registry in the order in which they are asked, and then the registry itself, if at all."""

    def __init__(self, name: str, mirrors: Sequence[MirrorClient], own: Client | None) -> None:
        """Set up the sources of the registry `name`; with None as `own`, the registry itself is never asked."""
        self._name = name
        self._mirrors = mirrors
        self._registry = Source("registry", name, own, mirrors) if own is not None else None

    async def way_back(self, repository: Repository, path: str, headers: Headers, via: Via) -> Via | None:
        """Ask each mirror, by HEAD, whether it is, or leads to, a cache that `via` names.

        Returns:
            The caches that the request of one came through, with that cache twice; None where no mirror leads back.
        """
        for mirror in self._mirrors:
            way = await _way_back(mirror, repository, path, headers, via)
            if way is not None:
                return way
        return None

    async def request(
        self,
        method: str,
        repository: Repository,
        path: str,
        headers: Headers,
        options: RequestOptions = DEFAULT_OPTIONS,
    ) -> SourceAnswer:
        """Return the first good response of a mirror, or else the registry's own, of any status.

        Without the registry, the last mirror's response stands for it where every mirror answered that it does not
        have the content, or does not show it.

        Raises:
            Unavailable: the registry itself, or one of the mirrors that stand for it, cannot be asked; the message
                says what each source answered.
            AccessRefused: the registry's token service refuses access.
            Denied: the registry, or a redirect of it, leads to an address that is not allowed.
        """
        passed_over: list[_PassedOver] = []
        # A silent mirror is passed over, so nothing waits for a late response.
        quick = replace(options, timeout=min(options.timeout, _MIRROR_TIMEOUT), wanted=None)
        for mirror in self._mirrors:
            is_last = self._registry is None and mirror is self._mirrors[-1]
            found = await _ask_mirror(mirror, method, repository, path, headers, options if is_last else quick)
            told = tuple(one.told for one in passed_over)
            if isinstance(found, Response):
                return self._answered(SourceAnswer(found, mirror, told), repository, path)
            passed_over.append(found)
            if found.response is None:
                continue
            if is_last and all(one.answered for one in passed_over):
                return self._answered(SourceAnswer(found.response, mirror, told), repository, path)
            await found.response.discard()
        told = tuple(one.told for one in passed_over)
        if self._registry is None:
            raise _by_mirrors_alone(self._name, passed_over)
        registry, wanted = self._registry, options.wanted
        if told and wanted is not None:
            down = Wanted(lambda error: wanted.link_down(_after(told, registry, error)), wanted.again)
            options = replace(options, wanted=down)
        try:
            response = await self._registry.client.request(method, repository, path, headers, options)
        except Unavailable as error:
            if not told:
                raise
            raise _after(told, registry, error) from None
        return self._answered(SourceAnswer(response, self._registry, told), repository, path)

    def _answered(self, answer: SourceAnswer, repository: Repository, path: str) -> SourceAnswer:
        if self._mirrors:
            _log.debug("{repository}/{endpoint}: {why}", repository=repository, endpoint=path, why=answer.told("it"))
        return answer


def _by_mirrors_alone(name: str, passed_over: Sequence[_PassedOver]) -> Unavailable:
    """Return the error of a request for which all mirrors were passed over, and the registry itself is not asked."""
    what = f"{name}, by its mirrors alone: {'; '.join(one.told for one in passed_over)}"
    silent = [one for one in passed_over if not one.answered]
    if not silent:
        return AccessRefused(what)
    soonest = min(silent, key=lambda one: one.retry_after)
    if soonest.down is not None and all(one.down for one in silent):
        return soonest.down.with_message(what)
    return Unavailable(what, soonest.retry_after)


def _after(told: Sequence[str], registry: Source, error: Unavailable) -> Unavailable:
    """Return an error of the registry, with what its mirrors answered before in its message."""
    message = "; ".join([*told, registry.told(error)])
    if isinstance(error, LinkDown):
        return error.with_message(message)
    kind = AccessRefused if isinstance(error, AccessRefused) else Unavailable
    return kind(message, error.retry_after)


async def _way_back(
    mirror: MirrorClient, repository: Repository, path: str, headers: Headers, via: Via
) -> Via | None:
    """Return the way that a mirror refuses because it is, or leads to, a cache that `via` names."""
    try:
        response = await mirror.client.request("HEAD", repository, path, headers, _LOOKING)
    except (Unavailable, Denied):
        return None
    await response.discard()
    way = Via.parse(response.header("via"))
    leads_back = any(way.instances.count(name) > 1 for name in via.instances)
    return way if response.status == 403 and leads_back else None


async def _ask_mirror(
    mirror: MirrorClient, method: str, repository: Repository, path: str, headers: Headers, options: RequestOptions
) -> Response | _PassedOver:
    """Return a mirror's response, or why the mirror is passed over."""
    why = mirror.paused
    if why is not None:
        return _PassedOver(f"{mirror.name}: {why}", retry_after=mirror.pause)
    try:
        response = await mirror.client.request(method, repository, path, headers, options)
    except Denied as error:
        return _PassedOver(mirror.told(error))
    except LinkDown as error:
        return _PassedOver(mirror.told(error), retry_after=error.retry_after, down=error)
    except Unavailable as error:
        return _PassedOver(mirror.told(error), None, isinstance(error, AccessRefused), error.retry_after)
    if not 200 <= response.status < 300:
        told = f"{mirror.name}: it answered {response.outcome}"
    elif canonical_media_type(response.header("content-type")) != "text/html":
        return response
    else:
        why = "it sent an HTML page, as login pages and captive portals are"
        told = f"{mirror.name}: {why}"
        # Registries without the referrers API may answer its path with a page of their website.
        if not path.startswith("referrers/"):
            await response.discard()
            mirror.failed(why)
            return _PassedOver(told, retry_after=mirror.pause)
    if response.status in _TEMPORARY or (response.status >= 500 and response.status not in NO_API):
        await response.discard()
        return _PassedOver(told, retry_after=response.retry_after)
    return _PassedOver(told, response)
