"""The README's first pull, run literally, prints what the README shows."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.images import make_index
from tests.peers import DockerRegistry
from tests.processes import ROOT, Daemon, wait_until

_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_UPSTREAM = "registry.k8s.io"


@pytest.fixture
def blocks() -> list[str]:
    """The code blocks of the README's section on a first pull."""
    section = (ROOT / "README.md").read_text().partition("## A first pull\n")[2].partition("\n## ")[0]
    return [text for _language, text in _BLOCK.findall(section)]


def test_first_pull_prints_what_the_readme_shows(
    registry: DockerRegistry, start_daemon: Callable[..., Daemon], tmp_path: Path, blocks: list[str]
) -> None:
    """Run with a local registry in place of the one on the Internet."""
    commands, shown, again = blocks
    registry.push("kube-scheduler", make_index("readme"), "v1.29.1")
    daemon = start_daemon({registry.host: "http"})

    def run(script: str) -> str:
        here = script.replace("localhost:8080", daemon.host).replace(_UPSTREAM, registry.host)
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", here], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return re.sub(r"\b[0-9a-f]{64}\b", "<hex>", done.stdout.replace(registry.host, _UPSTREAM))

    assert run(commands) == shown
    assert _outcomes(daemon, "v1.29.1") == ["miss"]
    run(commands.splitlines()[0] + "\n" + again)
    wait_until(lambda: len(_outcomes(daemon, "v1.29.1")) == 2, 10, "the second request")
    assert _outcomes(daemon, "v1.29.1") == ["miss", "hit"]


def _outcomes(daemon: Daemon, reference: str) -> list[str]:
    return re.findall(rf"GET /v2/\S+/{re.escape(reference)} ns=\S+ 200 .* (hit|miss)$", daemon.log, re.MULTILINE)
