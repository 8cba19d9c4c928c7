"""The last failures that were logged, so that the status can show them."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from twisted.logger import ILogObserver, LogEvent, LogLevel, formatEvent
from zope.interface import implementer

from ociregistry.config.values import printable

_MOST = 50
_LONGEST = 1000
"""Characters of a text."""
_LEVELS = (LogLevel.error, LogLevel.critical)


@dataclass(frozen=True, slots=True)
class LoggedError:
    """A line of the log at level error, without the traceback of a defect."""

    time: datetime
    namespace: str
    text: str


@implementer(ILogObserver)
class RecentErrors:
    """Keeps the last 50 events at level error or above, as text."""

    def __init__(self) -> None:
        self._errors: deque[LoggedError] = deque(maxlen=_MOST)

    def __call__(self, event: LogEvent) -> None:
        """Keep `event` if it is of a failure."""
        if event.get("log_level") in _LEVELS:
            time = datetime.fromtimestamp(event["log_time"], UTC)
            text = printable(formatEvent(event)[:_LONGEST])[:_LONGEST]
            self._errors.append(LoggedError(time, event.get("log_namespace", ""), text))

    @property
    def errors(self) -> Sequence[LoggedError]:
        """The failures, the oldest first."""
        return tuple(self._errors)
