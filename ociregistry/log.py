"""The log: `--log-level` and `--log-format` for the events of this program and of Twisted.

Text names the part of the program that an event comes from. JSON has all named fields of the event beside that.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from datetime import UTC, datetime

from twisted.internet.interfaces import IReactorTime
from twisted.logger import (
    FileLogObserver,
    FilteringLogObserver,
    ILogFilterPredicate,
    ILogObserver,
    LogEvent,
    LogLevel,
    LogLevelFilterPredicate,
    PredicateResult,
    formatEvent,
)
from twisted.python.failure import Failure
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
        """Whether requests are logged; otherwise their lines are not even made."""
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


def writes(file: FileLogObserver, log_format: str) -> ILogObserver:
    """Return an observer that writes to the file of `file` in one of `settings.LOG_FORMATS`."""
    if log_format == "text":
        format_event = file.formatEvent
        file.formatEvent = lambda event: _encodable(format_event(event) or "")
        return ShortNamespaces(file)
    file.formatEvent = json_line
    return file


def _encodable(text: str) -> str:
    """Escape surrogates, as in a path that is not UTF-8: neither a file in UTF-8 nor JSON can hold them."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


_EXACT = 2**63
"""Whole numbers from here on are written as text: readers of JSON would round them, or refuse them."""
_FORMER = frozenset(("message", "time", "system", "isError", "format", "failure", "logLevel", "why"))
"""Keys with which an event of Twisted's former log describes itself."""


def json_line(event: LogEvent) -> str:
    """Format an event as a JSON object on one line, also one whose parts cannot be formatted."""
    try:
        document = _document(event)
        line = json.dumps(document)
    except Exception as error:
        line = json.dumps(
            {
                "time": _rfc_3339(time.time()),
                "level": "error",
                "namespace": _OURS,
                "message": f"an event cannot be written: {type(error).__name__}",
            }
        )
    # Only ASCII, and every control character escaped: no reader takes a part of the text for the end of the line.
    return f"{line}\n"


def _document(event: LogEvent) -> dict[str, object]:
    namespace = str(event.get("log_namespace", ""))
    is_former = namespace == "log_legacy"
    failure = event.get("log_failure", event.get("failure") if is_former else None)
    message = _encodable(formatEvent(event))
    if isinstance(failure, Failure) and is_former:
        # Their text has the traceback in it.
        message = _encodable(str(event.get("why") or "Unhandled Error"))
    document: dict[str, object] = {
        "time": _rfc_3339(event.get("log_time", time.time())),
        "level": event.get("log_level", LogLevel.info).name,
        "namespace": "twisted" if is_former else namespace,
        "message": message,
    }
    if isinstance(failure, Failure):
        document["exception"] = _name(failure.type)
        document["traceback"] = _traceback(failure)
    for name, value in _fields(event, is_former=is_former):
        # A field never takes the place of one of those above.
        document[f"{name}_" if name in _RESERVED else name] = value
    return document


_RESERVED = frozenset(("time", "level", "namespace", "message", "exception", "traceback"))


def _fields(event: LogEvent, *, is_former: bool) -> Iterator[tuple[str, object]]:
    for name, value in event.items():
        if not (name.startswith("log_") or (is_former and name in _FORMER)):
            yield name, _plain(value)


def _plain(value: object) -> object:
    """Return a value as it is written: a number, a boolean and null as they are, all others as text."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int) and abs(value) < _EXACT:
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    try:
        return _encodable(str(value))
    except Exception:
        return f"an instance of {_name(type(value))} that has no text"


def _traceback(failure: Failure) -> str:
    try:
        return _encodable(str(failure.getTraceback()))
    except Exception as error:
        return f"no traceback: {type(error).__name__}"


def _name(kind: object) -> str:
    """Return the name of a class, with its module where it is not one of Python's own exceptions."""
    module, name = getattr(kind, "__module__", ""), getattr(kind, "__qualname__", str(kind))
    return name if module in ("", "builtins") else f"{module}.{name}"


def _rfc_3339(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC).replace(tzinfo=None).isoformat(timespec='milliseconds')}Z"


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
