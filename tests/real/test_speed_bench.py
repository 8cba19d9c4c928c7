"""The benchmark of speed: a short run, and it measures no server that fails."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from bench.speed import table
from bench.speed_client import CheckedReader, Readers, Wrk
from bench.speed_rows import ROWS
from bench.speed_servers import BEFORE, DOCKER_REGISTRY, DRAYAGE, NGINX, OURS, REPOSITORY, Part, Upstream
from tests.peers import missing_package
from tests.processes import ROOT, answers, wait_until
from tests.procfs import family

ENDS_WITHIN = 60
"""Seconds."""

SIZE = 300_000


@pytest.fixture
def upstream(tmp_path: Path) -> Iterator[Upstream]:
    """The benchmark's upstream, with a small blob."""
    lacking = {missing_package(program) for program in ("docker-registry", "nginx", "wrk")} - {None}
    if lacking:
        pytest.fail(f"a peer is missing: apt-get install {' '.join(sorted(map(str, lacking)))}", pytrace=False)
    with Upstream(tmp_path / "upstream", SIZE) as upstream:
        yield upstream


def test_speed_benchmark_runs(upstream: Upstream) -> None:
    del upstream  # Its programs are there.
    options = ["--rounds", "1", "--seconds", "1", "--blob-size", str(SIZE)]
    servers = [OURS, DOCKER_REGISTRY, NGINX, BEFORE]
    rows = "manifest-tag,one-reader,memory,tls-cold-*"
    chosen = ["--servers", ",".join(servers), "--before", str(ROOT), "--rows", rows]
    command = [sys.executable, "-m", "bench.speed", *options, *chosen]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=ENDS_WITHIN, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")]
    titles, *found = lines
    assert titles == [*servers, *(f"{OURS} ÷ {name}" for name in (NGINX, DOCKER_REGISTRY, BEFORE))]
    assert [row[0] for row in found] == [
        "hot manifest by tag, /s",
        "hot 0.3 MB blob, one reader, GB/s",
        "peak memory, MiB",
        "TLS: cold 0.3 MB blob: first byte, s",
        "TLS: cold 0.3 MB blob: all, s",
    ]
    assert {len(row) for row in found} == {8}
    assert all(float(cell.replace(",", "")) >= 0 for row in found for cell in row[1:])


def test_table_has_medians_of_figures_and_of_ratios_and_says_what_is_missing() -> None:
    row = ROWS[0]
    figures = {(row.key, OURS): [100.0, 200.0, 1000.0], (row.key, NGINX): [200.0, 2000.0, 100.0]}
    assert table(figures, [row], {DRAYAGE: "not installed"}, SIZE) == [
        "| | ociregistry | nginx | drayage | ociregistry ÷ nginx |",
        "|---|---|---|---|---|",
        f"| {row.title} | 200 (100 to 1,000) | 200 (100 to 2,000) | **missing** | 0.500 (0.100 to 10.000) |",
    ]


def test_killed_nginx_leaves_no_worker(upstream: Upstream) -> None:
    workers = family(upstream.process.pid)[1:]
    assert workers
    upstream.kill()
    wait_until(lambda: not answers(f"{upstream.url}/ready"), 30, "all have ended")


@pytest.mark.parametrize("fault", ["status", "size", "digest"])
def test_wrong_answer_is_no_figure(upstream: Upstream, tmp_path: Path, fault: str) -> None:
    big = upstream.content.big
    changes = {
        "status": replace(big, path=f"{big.path}0"),
        "size": replace(big, size=big.size - 1),
        "digest": replace(big, digest=upstream.content.small.digest),
    }
    expected = changes[fault]

    def url(part: Part) -> str:
        return f"{upstream.url}/v2/{REPOSITORY}/{part.path}"

    reader, wrk = CheckedReader(big.size), Wrk(tmp_path, 1)
    with Readers(0.1) as readers:
        assert reader.read(url(big), big, None).all > 0
        with pytest.raises(RuntimeError, match="wrong bytes" if fault == "digest" else "was expected"):
            reader.read(url(expected), expected, None)
        if fault != "digest":  # Compared once, by the other reader.
            with pytest.raises(RuntimeError, match="was expected"):
                readers.read(url(expected), expected, None, 2)
        if fault == "status":
            with pytest.raises(RuntimeError, match="not every answer was right"):
                wrk.rate(url(expected), expected, 2)
