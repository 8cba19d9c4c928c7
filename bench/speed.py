"""Measure hits and cold pulls of the daemon beside docker-registry, nginx and drayage as caches of one upstream.

`python -m bench.speed [--rounds N] [--rows PATTERNS] [--servers NAMES]`. In each round every server is measured once,
in turn, with an empty cache: a cold pull, then hits; then the same over TLS. The upstream is an nginx on loopback
with static files. Small answers are requested by wrk; readers of the big blob receive it without copying. Every
answer is checked: its status and length, and once its digest. `--before CHECKOUT` adds the daemon of another commit.
"""

from __future__ import annotations

import argparse
import os
import platform
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path
from statistics import median

import twisted
from bench.badlink_caches import drayage_program
from bench.speed_client import CheckedReader, Readers, Wrk
from bench.speed_rows import ROWS, TLS, Clients, Row, Visit
from bench.speed_servers import (
    ADDRESS,
    BEFORE,
    DOCKER_REGISTRY,
    NGINX,
    OURS,
    SERVERS,
    WITHOUT_TLS,
    Place,
    Upstream,
    missing_server,
)
from tests.certificates import Authority
from tests.peers import missing_package
from tests.secure_peers import ServerTls

REFERENCES = (NGINX, DOCKER_REGISTRY, BEFORE)
"""The servers that ours is compared with."""

_SMALL, _LARGE = 3, 0
"""Decimal places of ratios below 10, and of others."""

Figures = Mapping[tuple[str, str], Sequence[float]]
"""For the key of a row and a server, one figure a round."""


@dataclass(frozen=True)
class Bench:
    """What is measured, where, by which clients."""

    root: Path
    servers: Sequence[str]
    rows: Sequence[Row]
    upstream: Upstream
    clients: Clients
    drayage: Path
    before: Path | None

    def rounds(self, count: int) -> Figures:
        """Measure every server in each round; each round begins with another one."""
        authority = Authority(self.root / "authority")
        tls = ServerTls(*authority.issue(ADDRESS))
        found: dict[tuple[str, str], list[float]] = {}
        for number in range(count):
            first = number % len(self.servers)
            for name in [*self.servers[first:], *self.servers[:first]]:
                print(f"round {number + 1} of {count}: {name}", file=sys.stderr)
                figures = dict(self._visit(name, "", None, None))
                if name not in WITHOUT_TLS:
                    figures |= self._visit(name, TLS, tls, authority.ca)
                for key, value in figures.items():
                    found.setdefault((key, name), []).append(value)
        return found

    def _visit(self, name: str, prefix: str, tls: ServerTls | None, ca: Path | None) -> Mapping[str, float]:
        keys = [row.key for row in self.rows if row.key.startswith(TLS) == bool(prefix)]
        if not keys:
            return {}
        with tempfile.TemporaryDirectory(dir=self.root) as folder:
            cache = SERVERS[name](Place(Path(folder), self.upstream, tls, self.drayage, self.before))
            # What others wrote is not to be written to the disk during the cold pull.
            os.sync()
            with cache.server:
                visit = Visit(cache, self.upstream, self.clients, ca)
                found = visit.measure([key.removeprefix(prefix) for key in keys])
        return {prefix + key: value for key, value in found.items()}


def table(found: Figures, rows: Sequence[Row], missing: Mapping[str, str], big: int) -> list[str]:
    """Format medians, with minimum and maximum in brackets; ratios compare figures of the same round."""
    names = [name for name in SERVERS if name in missing or any(server == name for _, server in found)]
    references = [name for name in REFERENCES if name in names]
    titles = [*names, *(f"{OURS} ÷ {name}" for name in references)]
    lines = [f"| | {' | '.join(titles)} |", f"|---{'|---' * len(titles)}|"]
    for row in rows:
        figures = {name: found.get((row.key, name), ()) for name in SERVERS}
        cells = ["**missing**" if name in missing else _spread(figures[name], row.places) for name in names]
        for name in references:
            ratios = _ratios(figures[OURS], figures[name])
            cells.append(_spread(ratios, _LARGE if ratios and median(ratios) >= 10 else _SMALL))
        lines.append(f"| {row.title.format(big=f'{big / 1e6:g} MB')} | {' | '.join(cells)} |")
    return lines


def _ratios(own: Sequence[float], other: Sequence[float]) -> list[float]:
    """Compare round by round; without figures of both there are none."""
    return [one / another for one, another in zip(own, other, strict=bool(own and other))]


def _spread(values: Sequence[float], places: int) -> str:
    if not values:
        return "-"
    middle, *ends = (f"{value:,.{places}f}" for value in (median(values), min(values), max(values)))
    return f"{middle} ({' to '.join(ends)})" if len(values) > 1 else middle


def _chosen(parser: argparse.ArgumentParser, patterns: str, known: Sequence[str]) -> list[str]:
    """Return the known names that match one of the patterns; each must match one."""
    for pattern in patterns.split(","):
        if not any(fnmatchcase(name, pattern) for name in known):
            parser.error(f"nothing is called {pattern}; there are: {', '.join(known)}")
    return [name for name in known if any(fnmatchcase(name, pattern) for pattern in patterns.split(","))]


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="[%(default)s]")
    parser.add_argument("--seconds", type=int, default=3, help="of each row of hits in each round [%(default)s]")
    parser.add_argument("--blob-size", type=int, default=256_000_000, help="bytes of the big layer [%(default)s]")
    parser.add_argument("--rows", default="*", help="keys or patterns, such as one-reader,cold-*,tls-* [all]")
    parser.add_argument("--servers", default="*", help=f"some of {','.join(SERVERS)} [all]")
    parser.add_argument("--before", type=Path, metavar="CHECKOUT", help="of an earlier commit of the daemon [none]")
    parser.add_argument("--drayage", type=Path, help="drayage's program [installed by pip for the time of the run]")
    options = parser.parse_args()
    keys = _chosen(parser, options.rows, [row.key for row in ROWS])
    rows = [row for row in ROWS if row.key in keys]
    servers = _chosen(parser, options.servers, [name for name in SERVERS if name != BEFORE or options.before])
    # The upstream is an nginx.
    lacking = {package for program in ("nginx", "wrk") if (package := missing_package(program))}
    if lacking:
        parser.error(f"missing: apt-get install {' '.join(sorted(lacking))}")
    # So that the servers end too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="bench-speed-") as folder:
        root = Path(folder)
        missing = {name: why for name in servers if (why := missing_server(name, root, options.drayage))}
        with Readers(options.seconds) as readers, Upstream(root / "upstream", options.blob_size) as upstream:
            clients = Clients(Wrk(root, options.seconds), CheckedReader(upstream.content.big.size), readers)
            there = [name for name in servers if name not in missing]
            program = options.drayage or drayage_program(root)
            before = options.before and options.before.resolve()
            found = Bench(root, there, rows, upstream, clients, program, before).rounds(options.rounds)
    print(
        f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC: {options.rounds} rounds; hits for {options.seconds} s each; "
        f"{os.cpu_count()} cores, load {os.getloadavg()[1]:.1f}, Python {platform.python_version()}, "
        f"Twisted {twisted.__version__}\n"
    )
    for name, why in missing.items():
        print(f"**{name} is missing**: {why}\n")
    print("\n".join(table(found, rows, missing, options.blob_size)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
