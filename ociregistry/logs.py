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


@implementer(ILogFilterPredicate)
class AtLeast:
    """Lets events of one level and above pass; below `trace`, what Twisted says for its own debugging stays out."""

    def __init__(self, level: str) -> None:
        self._least = _LEAST[level]
        self._everything = level == "trace"

    def __call__(self, event: LogEvent) -> object:
        if event.get("log_always"):
            return PredicateResult.yes
        level = event.get("log_level", LogLevel.info)
        passes = level >= self._least
        if level == LogLevel.debug and not self._everything:
            passes = passes and event.get("log_namespace", "").startswith("ociregistry")
        return PredicateResult.yes if passes else PredicateResult.no
