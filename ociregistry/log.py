"""The log filter: applies `--log-level` to the events of this program and of Twisted."""

from __future__ import annotations

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

_NAMESPACES = ("", "ociregistry", "twisted.web.client")
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
        for namespace, lowest in zip(_NAMESPACES, _LEVELS[level], strict=True):
            self._levels.setLogLevelForNamespace(namespace, lowest)

    def before(self, observer: ILogObserver) -> FilteringLogObserver:
        """Return an observer that hands on to `observer` what passes."""
        return FilteringLogObserver(observer, [_passes_always, self._levels])


@implementer(ILogFilterPredicate)
def _passes_always(event: LogEvent) -> object:
    return PredicateResult.yes if event.get("log_always") else PredicateResult.maybe
