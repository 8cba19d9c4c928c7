"""--log-format json: each line of a daemon's log is an object, whatever happens."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.client import fetch
from tests.images import make_image
from tests.processes import ROOT, Daemon, free_port, run, twistd, wait_until
from tests.upstream import ScriptedRegistry

IMAGE = make_image("json")
ENVIRONMENT = {"PYTHONPATH": str(ROOT)}
AGENT = {"User-Agent": "a client"}
_SOON = 10


def events(log: str) -> list[dict[str, Any]]:
    """Return all objects of a log that has nothing else in it."""
    objects = [json.loads(line) for line in log.splitlines()]
    for one in objects:
        assert [*one][:4] == ["time", "level", "namespace", "message"]
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", one["time"])
        assert one["level"] in {"debug", "info", "warn", "error", "critical"}
    return objects


def test_every_line_is_an_object_with_its_fields(
    upstream: ScriptedRegistry, start_daemon: Callable[..., Daemon]
) -> None:
    """Misses and hits, of manifests and blobs, an upstream that is gone, the start, the stop, and Twisted's."""
    upstream.add("team/app", IMAGE, "1")
    gone = f"127.0.0.1:{free_port()}"
    options = ("--no-complete-images", "--log-format", "json", "--log-level", "trace")
    daemon = start_daemon({upstream.host: "http", gone: "http"}, *options)

    def ask(path: str, host: str = upstream.host, **headers: str) -> int:
        return fetch(f"{daemon.url}/v2/team/app/{path}?ns={host}", headers={**AGENT, **headers}).status

    def access() -> list[dict[str, Any]]:
        return [one for one in events(daemon.log) if "cache_status" in one and one["path"].startswith("/v2/")]

    (layer, *_) = IMAGE.layers
    paths = ["manifests/1", f"blobs/{layer.digest}"]
    stored = daemon.image_path / "blobs" / layer.digest.removeprefix("sha256:")
    # The last request for each takes the short way.
    assert [ask(paths[0]) for _ in range(3)] == [200] * 3
    assert ask(paths[1]) == 200
    # The last byte is sent before the blob is committed.
    wait_until(stored.exists, _SOON, "the blob")
    assert [ask(paths[1]) for _ in range(2)] == [200] * 2
    wait_until(lambda: len(access()) == 6, _SOON, "access lines")
    assert [ask("manifests/2"), ask("manifests/1", gone)] == [404, 503]
    assert fetch(f"{daemon.url}/livez").status == 200
    daemon.terminate()

    told = events(daemon.log)
    sizes = {"manifests/1": len(IMAGE.manifest.data), paths[1]: len(layer.data)}
    common = {"method": "GET", "ns": upstream.host, "user_agent": "a client"}
    lines = access()
    assert [one["cache_status"] for one in lines] == ["miss", "hit", "hit"] * 2
    for one, path in zip(lines, [path for path in paths for _ in range(3)], strict=True):
        expected = {**common, "path": f"/v2/team/app/{path}", "status": 200, "bytes": sizes[path], "level": "info"}
        assert {key: one[key] for key in expected} == expected
        assert one["client"].startswith("127.0.0.1:")
        assert type(one["milliseconds"]) is int
        words = (one["method"], one["path"], f"ns={one['ns']}", "200", one["bytes"], "bytes", one["milliseconds"])
        assert one["message"] == f"{' '.join(map(str, words))} ms {one['client']} {one['cache_status']}"

    absent, failed = [one for one in told if "code" in one]
    for one, fields in (
        (absent, {"level": "info", "status": 404, "code": "MANIFEST_UNKNOWN", "ns": upstream.host}),
        (failed, {"level": "error", "status": 503, "code": "UNAVAILABLE", "ns": gone}),
    ):
        expected = {**common, **fields, "uri": f"{one['path']}?ns={fields['ns']}", "namespace": "ociregistry.web"}
        assert {key: one[key] for key in expected} == expected
        assert one["message"].endswith(one["why"])
    assert gone in failed["why"]
    (down,) = [one for one in told if one.get("host") == gone]
    assert (down["level"], down["namespace"]) == ("warn", "ociregistry.upstream")
    (banner,) = [one for one in told if "addresses" in one]
    assert (banner["lists"], banner["images"], banner["store"]) == (0, 0, str(daemon.image_path))
    (probe,) = [one for one in told if one.get("path") == "/livez"]
    assert probe["level"] == "debug"
    assert {"twisted"} < {one["namespace"] for one in told}


def test_the_log_file_of_a_daemon_in_the_background(tmp_path: Path) -> None:
    options = ["--pidfile", str(tmp_path / "pid"), "--logfile", str(tmp_path / "log")]
    run(
        twistd(
            "--image-path", str(tmp_path / "images"), "--port", str(free_port()), "--log-format=json", options=options
        ),
        environment=ENVIRONMENT,
    )
    log = tmp_path / "log"
    wait_until(lambda: log.exists() and log.read_text(), _SOON, "the banner")
    run(["kill", (tmp_path / "pid").read_text()])
    wait_until(lambda: not (tmp_path / "pid").exists(), _SOON, "the end of the daemon")
    (banner,) = events(log.read_text())
    assert banner["namespace"] == "ociregistry"


def test_json_is_refused_for_syslog(tmp_path: Path) -> None:
    command = twistd("--image-path", str(tmp_path), "--log-format", "json", options=["-n", "--pidfile=", "--syslog"])
    done = run(command, check=False, environment=ENVIRONMENT)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("ociregistry: --log-format json: not with twistd's --syslog")


def test_a_command_prints_as_always_and_logs_objects(tmp_path: Path, upstream: ScriptedRegistry) -> None:
    """What it logs is among what it prints to the standard error."""
    config = tmp_path / "it.yaml"
    config.write_text(f"log_format: json\nlog_level: info\nregistries: [{{name: '{upstream.host}', scheme: http}}]\n")
    upstream.add("team/app", IMAGE, "1")
    common = ("--image-path", str(tmp_path / "images"), "--config-path", str(config))
    name = f"{upstream.host}/team/app"
    done = run(twistd(*common, "load", f"{name}:1", f"{name}:2"), check=False, environment=ENVIRONMENT)
    assert done.returncode == 1
    assert f"loaded: {name}:1" in done.stdout + done.stderr
    assert f"failed: {name}:2" in done.stdout + done.stderr
    assert not [line for line in done.stdout.splitlines() if line.startswith("{")]
    logged = [line for line in done.stderr.splitlines() if line.startswith("{")]
    assert events("\n".join(logged))
    assert "#info]" not in done.stderr
