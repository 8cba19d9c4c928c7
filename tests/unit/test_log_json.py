"""--log-format json: one object on each line, with the named fields of each event."""

from __future__ import annotations

import io
import json
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from twisted.logger import LogEvent, Logger, LogLevel, LogPublisher, textFileLogObserver
from twisted.python.failure import Failure
from twisted.python.log import LogPublisher as LegacyPublisher
from twisted.python.logfile import LogFile

from ociregistry.errors import Unavailable
from ociregistry.log import ALWAYS, LevelFilter, json_line, writes
from ociregistry.names import Digest
from tests.unit.support.common import RecordingObserver

DIGEST = Digest(f"sha256:{'1' * 64}")


class Broken:
    """A value that has no text."""

    def __str__(self) -> str:
        raise ZeroDivisionError

    __repr__ = __str__


def written(event: LogEvent) -> Any:
    """Return the object that is written for an event, on one line."""
    line = json_line(event)
    assert line.isascii()
    assert line.splitlines() == [line.removesuffix("\n")]
    return json.loads(line)


def logged(text: str, level: LogLevel = LogLevel.info, **fields: object) -> Any:
    """Return the object that is written for an event of `ociregistry.web`."""
    events = RecordingObserver()
    Logger(namespace="ociregistry.web", observer=events).emit(level, text, **fields)
    (event,) = events.events
    return written(event)


def test_an_event_has_its_fields_beside_time_level_namespace_and_message() -> None:
    before = datetime.now(UTC)
    told = logged(
        "{method} {path}: {status}", LogLevel.warn, method="GET", path="/v2/a", status=404, hidden="x", **ALWAYS
    )
    time = told.pop("time")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", time)
    assert abs(datetime.fromisoformat(time) - before).total_seconds() < 10
    assert list(told.items()) == [
        ("level", "warn"),
        ("namespace", "ociregistry.web"),
        ("message", "GET /v2/a: 404"),
        ("method", "GET"),
        ("path", "/v2/a"),
        ("status", 404),
        ("hidden", "x"),
    ]


@pytest.mark.parametrize(
    ("value", "as_json"),
    [
        (7, 7),
        (-1.5, -1.5),
        (True, True),
        (False, False),
        (None, None),
        ("text", "text"),
        (2**62, 2**62),
        (2**64, str(2**64)),
        (float("nan"), "nan"),
        (float("inf"), "inf"),
        (Path("/srv/images"), "/srv/images"),
        (DIGEST, str(DIGEST)),
        (Unavailable("it is down"), "it is down"),
        ([1, "a"], "[1, 'a']"),
        (LogLevel.info, str(LogLevel.info)),
    ],
)
def test_numbers_booleans_and_null_are_themselves_and_all_else_is_text(value: object, as_json: object) -> None:
    told = logged("{it}", it=value)
    assert (told["it"], type(told["it"])) == (as_json, type(as_json))


def test_a_field_does_not_replace_the_keys_of_the_event() -> None:
    keys = ("time", "level", "namespace", "message", "exception", "traceback")
    own = {"log_format": "text", "log_level": LogLevel.warn, "log_namespace": "ociregistry.web", "log_time": 0.0}
    told = written({**own, **dict(zip(keys, range(6), strict=True))})
    assert [told.get(key) for key in keys] == [
        "1970-01-01T00:00:00.000Z",
        "warn",
        "ociregistry.web",
        "text",
        None,
        None,
    ]
    assert [told[f"{key}_"] for key in keys] == [*range(6)]


@pytest.mark.parametrize("end", ["\n", "\r", "\r\n", "\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\u2029", "\0"])
def test_nothing_in_a_text_ends_the_line(end: str) -> None:
    text = f"one{end}two"
    told = logged(text, name=text)
    assert (told["message"], told["name"]) == (text, text)


def test_a_path_that_is_not_utf_8_is_escaped() -> None:
    """Many readers of JSON refuse a lone surrogate."""
    path = Path("/store/\udcff")
    told = logged("{path}: {why}", path=path, why=OSError(5, "why", path), log_failure=fail(ValueError(str(path))))
    assert told["message"] == "/store/\\udcff: [Errno 5] why: PosixPath('/store/\\udcff')"
    assert told["path"] == "/store/\\udcff"
    assert told["traceback"].endswith("/store/\\udcff\n")


def fail(error: Exception) -> Failure:
    """Return a failure with a traceback."""
    try:
        raise error
    except Exception:
        return Failure()


@pytest.mark.parametrize(
    ("error", "name"), [(KeyError("k"), "KeyError"), (Unavailable("down"), "ociregistry.errors.Unavailable")]
)
def test_a_failure_is_a_type_and_a_traceback_in_one_text(error: Exception, name: str) -> None:
    told = logged("a defect in {path}", LogLevel.critical, path="/v2/a", log_failure=fail(error))
    assert (told["message"], told["level"], told["path"]) == ("a defect in /v2/a", "critical", "/v2/a")
    assert told["exception"] == name
    lines = told["traceback"].splitlines()
    assert lines[0].startswith("Traceback")
    assert any("in fail" in line or ":fail" in line for line in lines)
    assert str(error) in lines[-1]


@pytest.mark.parametrize(
    ("text", "fields"),
    [("{absent}", {}), ("{it.nothing}", {"it": 1}), ("{", {}), ("{it}", {"it": Broken()}), ("{it:d}", {"it": "x"})],
)
def test_an_event_that_cannot_be_formatted_is_still_a_line(text: str, fields: dict[str, object]) -> None:
    told = logged(text, LogLevel.error, name="x", **fields)
    assert (told["level"], told["namespace"], told["name"]) == ("error", "ociregistry.web", "x")
    assert told["message"]


def test_a_value_without_a_text_is_named_by_its_class() -> None:
    assert logged("text", it=Broken())["it"] == f"an instance of {__name__}.Broken that has no text"


@pytest.mark.parametrize(
    "event", [{"log_level": "loud"}, {"log_time": float("nan")}, {"log_time": "now"}, {"log_time": 1e300}]
)
def test_an_event_that_cannot_be_written_is_still_a_line(event: LogEvent) -> None:
    told = written({"log_format": "text", **event})
    assert set(told) == {"time", "level", "namespace", "message"}
    assert told["message"].startswith("an event cannot be written: ")


def test_an_empty_event_is_a_line() -> None:
    told = written({})
    assert (told["level"], told["namespace"], told["message"]) == ("info", "", "")


def former(log: Any) -> Any:
    """Return the object that is written for an event of Twisted's former log."""
    out = io.StringIO()
    log(LegacyPublisher(publishPublisher=LogPublisher(writes(textFileLogObserver(out), "json"))))
    (line,) = out.getvalue().splitlines()
    return json.loads(line)


def test_an_event_of_the_former_log() -> None:
    told = former(lambda log: log.msg("Site starting", "on 8080", system="-", port=8080))
    told.pop("time")
    assert told == {"level": "info", "namespace": "twisted", "message": "Site starting on 8080", "port": 8080}


@pytest.mark.parametrize("why", [None, "it went wrong"])
def test_a_failure_of_the_former_log(why: str | None) -> None:
    told = former(lambda log: log.msg(failure=fail(KeyError("k")), why=why, isError=1))
    assert (told["level"], told["message"]) == ("critical", why or "Unhandled Error")
    assert told["exception"] == "KeyError"
    assert told["traceback"].startswith("Traceback")
    assert set(told) == {"time", "level", "namespace", "message", "exception", "traceback"}


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_the_file_of_the_log_is_kept(tmp_path: Path, log_format: str) -> None:
    """Also that of twistd's --logfile, which takes bytes and is rotated."""
    file = LogFile.fromFullPath(str(tmp_path / "the.log"))
    observer = LevelFilter("warn").before(writes(textFileLogObserver(file), log_format))
    log = Logger(namespace="ociregistry.store", observer=observer)
    log.info("requests")
    log.warn("the disk of {folder} is full", folder=Path("/srv/ü"))
    file.rotate()
    log.warn("links")
    file.close()
    texts = [(tmp_path / name).read_text(encoding="utf-8") for name in ("the.log.1", "the.log")]
    if log_format == "text":
        assert [text.partition("[")[2] for text in texts] == [
            "store#warn] the disk of /srv/ü is full\n",
            "store#warn] links\n",
        ]
    else:
        assert [json.loads(text)["message"] for text in texts] == ["the disk of /srv/ü is full", "links"]


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_a_line_with_a_path_that_is_not_utf_8_is_written(tmp_path: Path, log_format: str) -> None:
    path = tmp_path / "log"
    with path.open("w", encoding="utf-8") as file:
        observer = writes(textFileLogObserver(file), log_format)
        Logger(namespace="ociregistry.store", observer=observer).error("no {path}", path=Path("/store/\udcff"))
    assert "udcff" in path.read_text(encoding="utf-8")
