"""The log filter: applies `--log-level` to the events of this program and of Twisted."""

from __future__ import annotations

from twisted.logger import ILogFilterPredicate, LogEvent, LogLevel, PredicateResult
from zope.interface import implementer

ALWAYS = {"log_always": True}
"""Fields of an event that is logged at every level, such as the banner at the start."""

_LEAST = {
    "trace": LogLevel.debug,
    "debug": LogLevel.debug,
    "info": LogLevel.info,
    "warn": LogLevel.warn,
    "error": LogLevel.error,
}


_CHATTER = "twisted.web.client"
"""Namespace that logs every connection to an upstream twice at level info: opened and closed."""


@implementer(ILogFilterPredicate)
class AtLeast:
    """Passes events of one level and above; passes debug events and connection events of Twisted only at `trace`."""

    def __init__(self, level: str) -> None:
        self.reconfigure(level)

    def reconfigure(self, level: str) -> None:
        """Change the level, one of `settings.LOG_LEVELS`."""
        self._least = _LEAST[level]
        self._everything = level == "trace"

    def __call__(self, event: LogEvent) -> object:
        level = event.get("log_level", LogLevel.info)
        passes = level >= self._least and (self._everything or not _is_chatter(level, event))
        return PredicateResult.yes if passes or event.get("log_always") else PredicateResult.no


def _is_chatter(level: object, event: LogEvent) -> bool:
    namespace: str = event.get("log_namespace", "")
    if level == LogLevel.debug:
        return not namespace.startswith("ociregistry")
    return level == LogLevel.info and namespace.startswith(_CHATTER)
