"""The log: `--log-level` for the events of this program and of Twisted, and how text names where they come from."""

from __future__ import annotations

from twisted.internet.interfaces import IReactorTime
from twisted.logger import (
    FilteringLogObserver,
    ILogFilterPredicate,
    ILogObserver,
    LogEvent,
    LogLevel,
    LogLevelFilterPredicate,
    PredicateResult,
)
from zope.interface import implementer

ALWAYS = {"log_always": True}
"""Fields of an event that is logged at every level, such as the banner at the start."""

_OURS = "ociregistry"
_NAMESPACES = ("", _OURS, "twisted.web.client")
"""All; this program; the client of Twisted, which logs each opened and closed connection at level info."""
_LEVELS = {
    "trace": (LogLevel.debug, LogLevel.debug, LogLevel.debug),
    "debug": (LogLevel.info, LogLevel.debug, LogLevel.warn),
    "info": (LogLevel.info, LogLevel.info, LogLevel.warn),
    "warn": (LogLevel.warn, LogLevel.warn, LogLevel.warn),
    "error": (LogLevel.error, LogLevel.error, LogLevel.error),
}
"""For each `--log-level`, the lowest level that is logged of each namespace."""


class LevelFilter:
    """Passes events from a level on, and those with `ALWAYS` at every level."""

    def __init__(self, level: str) -> None:
        self._levels = LogLevelFilterPredicate()
        self.reconfigure(level)

    def reconfigure(self, level: str) -> None:
        """Change the level, one of `settings.LOG_LEVELS`."""
        self.logs_requests = _LEVELS[level][1] <= LogLevel.info
        """Whether requests are logged, so that a line that nobody reads costs nothing."""
        for namespace, lowest in zip(_NAMESPACES, _LEVELS[level], strict=True):
            self._levels.setLogLevelForNamespace(namespace, lowest)

    def before(self, observer: ILogObserver) -> FilteringLogObserver:
        """Return an observer that hands on to `observer` what passes."""
        return FilteringLogObserver(observer, [_passes_always, self._levels])


@implementer(ILogObserver)
class ShortNamespaces:
    """Hands on events to a writer of text, with a short name of their origin.

    The name is the part of this program, such as `store`, or the library, such as `twisted`. The namespaces stay.
    """

    def __init__(self, text: ILogObserver) -> None:
        self._text = text

    def __call__(self, event: LogEvent) -> None:
        """Hand on `event`."""
        level = event.get("log_level", LogLevel.info)
        self._text({**event, "log_system": f"{_short(event.get('log_namespace', ''))}#{level.name}"})


def _short(namespace: str) -> str:
    library, _, rest = namespace.partition(".")
    if library == _OURS:
        return rest.partition(".")[0] or "daemon"
    # Events of Twisted's former log have no other namespace than its name.
    return "twisted" if library in ("", "log_legacy") else library


_SELDOM = 60.0
"""Seconds."""


class Seldom:
    """Lets one of many similar lines a minute be logged."""

    def __init__(self, clock: IReactorTime) -> None:
        self._clock = clock
        self._next = clock.seconds()

    def due(self) -> bool:
        """Return whether the line is to be logged now."""
        now = self._clock.seconds()
        if now < self._next:
            return False
        self._next = now + _SELDOM
        return True


@implementer(ILogFilterPredicate)
def _passes_always(event: LogEvent) -> object:
    return PredicateResult.yes if event.get("log_always") else PredicateResult.maybe
