"""What is logged: `--log-level` over our own lines and twistd's."""

from __future__ import annotations

from twisted.logger import ILogFilterPredicate, LogEvent, LogLevel, PredicateResult
from zope.interface import implementer

ALWAYS = {"log_always": True}
"""Fields of an event that is logged at every level: the banner."""

_LEAST = {
    "trace": LogLevel.debug,
    "debug": LogLevel.debug,
    "info": LogLevel.info,
    "warn": LogLevel.warn,
    "error": LogLevel.error,
}


_CHATTER = "twisted.web.client"
"""It tells of every connection to an upstream that it is opened, and again that it is closed."""


@implementer(ILogFilterPredicate)
class AtLeast:
    """Lets events of one level and above pass; what Twisted says for its own debugging only at `trace`."""

    def __init__(self, level: str) -> None:
        self.reconfigure(level)

    def reconfigure(self, level: str) -> None:
        """From now on it is this level."""
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
