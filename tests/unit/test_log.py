"""--log-level, applied to our own events and Twisted's."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
from twisted.logger import LogEvent, Logger, LogLevel, LogPublisher, textFileLogObserver
from twisted.python.log import LogPublisher as LegacyPublisher

from ociregistry.log import ALWAYS, LevelFilter, ShortNamespaces
from ociregistry.settings import LOG_LEVELS
from tests.unit.support.common import RecordingObserver

ORDER = (LogLevel.debug, LogLevel.info, LogLevel.warn, LogLevel.error, LogLevel.critical)
LEAST = {"trace": 0, "debug": 0, "info": 1, "warn": 2, "error": 3}


def passes(level: str, **event: Any) -> bool:
    """Return whether an event passes at a level."""
    return passes_now(LevelFilter(level), event)


def passes_now(levels: LevelFilter, event: LogEvent) -> bool:
    """Return whether an event passes a filter."""
    observer = RecordingObserver()
    levels.before(observer)(event)
    return observer.events == [event]


def test_levels_match_the_settings() -> None:
    assert set(LEAST) == set(LOG_LEVELS)


@pytest.mark.parametrize("level", LOG_LEVELS)
@pytest.mark.parametrize("namespace", ["ociregistry", "ociregistry.store"])
def test_own_events_pass_from_their_level_on(level: str, namespace: str) -> None:
    passed = [passes(level, log_level=event_level, log_namespace=namespace) for event_level in ORDER]
    assert passed == [False] * LEAST[level] + [True] * (5 - LEAST[level])


@pytest.mark.parametrize("level", LOG_LEVELS)
def test_banner_always_passes(level: str) -> None:
    for event_level in ORDER:
        assert passes(level, log_level=event_level, log_namespace="ociregistry", **ALWAYS)


def test_twisted_debug_events_need_trace() -> None:
    for namespace in ("twisted.internet", "treq", "log_legacy"):
        event: LogEvent = {"log_level": LogLevel.debug, "log_namespace": namespace}
        assert [level for level in LOG_LEVELS if passes(level, **event)] == ["trace"]


def test_upstream_connection_events_need_trace() -> None:
    event: LogEvent = {"log_level": LogLevel.info, "log_namespace": "twisted.web.client._HTTP11ClientFactory"}
    assert [level for level in LOG_LEVELS if passes(level, **event)] == ["trace"]
    assert passes("error", **{**event, "log_level": LogLevel.error})


def test_other_twisted_events_use_our_levels() -> None:
    event: LogEvent = {"log_level": LogLevel.info, "log_namespace": "twisted.scripts._twistd_unix.UnixAppLogger"}
    assert [level for level in LOG_LEVELS if passes(level, **event)] == ["trace", "debug", "info"]


def legacy_passes(level: str, log: Callable[[LegacyPublisher], None]) -> bool:
    """Return whether an event of twisted.python.log passes at a level."""
    observer = RecordingObserver()
    log(LegacyPublisher(publishPublisher=LogPublisher(LevelFilter(level).before(observer))))
    return bool(observer.events)


def test_legacy_event_is_info_and_legacy_failure_is_error() -> None:
    assert [level for level in LOG_LEVELS if legacy_passes(level, lambda log: log.msg("text"))] == [
        "trace",
        "debug",
        "info",
    ]
    assert all(legacy_passes(level, lambda log: log.msg("failed", isError=1)) for level in LOG_LEVELS)


@pytest.mark.parametrize("level", LOG_LEVELS)
@pytest.mark.parametrize("before", LOG_LEVELS)
def test_level_can_be_changed_later(before: str, level: str) -> None:
    changed, at_once = LevelFilter(before), LevelFilter(level)
    changed.reconfigure(level)
    for event_level in ORDER:
        for namespace in ("ociregistry.web", "twisted.internet", "twisted.web.client"):
            event: LogEvent = {"log_level": event_level, "log_namespace": namespace}
            assert passes_now(changed, event) is passes_now(at_once, event)


def test_filter_wraps_an_observer() -> None:
    out = io.StringIO()
    observer = LevelFilter("warn").before(textFileLogObserver(out))
    log = Logger(namespace="ociregistry", observer=observer)
    log.info("requests")
    log.info("the banner", **ALWAYS)
    log.warn("links")
    log.error("failures")
    assert [line.partition("] ")[2] for line in out.getvalue().splitlines()] == ["the banner", "links", "failures"]


@pytest.mark.parametrize(
    ("namespace", "short"),
    [
        ("ociregistry", "daemon"),
        ("ociregistry.web", "web"),
        ("twisted.internet.tcp.Port", "twisted"),
        ("treq", "treq"),
        ("log_legacy", "twisted"),
    ],
)
def test_text_has_short_namespaces(namespace: str, short: str) -> None:
    output = io.StringIO()
    event: LogEvent = {
        "log_namespace": namespace,
        "log_level": LogLevel.warn,
        "log_format": "a link is down",
        "log_time": 0.0,
    }
    ShortNamespaces(textFileLogObserver(output, timeFormat=""))(event)
    assert output.getvalue().endswith(f" [{short}#warn] a link is down\n")
    assert event["log_namespace"] == namespace
    assert "log_system" not in event


def test_text_of_a_former_event_has_a_short_namespace() -> None:
    """Twisted's own lines, such as those of ports, come from its former log."""
    output = io.StringIO()
    observer = LegacyPublisher(publishPublisher=LogPublisher(ShortNamespaces(textFileLogObserver(output))))
    observer.msg("Site starting on 8080", system="-")
    assert output.getvalue().endswith(" [twisted#info] Site starting on 8080\n")
