"""Measure misses for hosts that are lost: how long a client waits for each of several in a row.

`python -m bench.lost_hosts [--misses N]`, as root, in about six minutes; all clients ask at the same time.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from tests.lost_hosts import PAUSES, lost_hosts


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--misses", type=int, default=12)
    parser.add_argument("--pauses", nargs="*", default=list(PAUSES), choices=PAUSES)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, lost_hosts(Path(folder)) as lost:
        found = lost.all_misses(options.misses, options.pauses)
        unhandled = "Traceback" in lost.daemon.log
    print(f"| host | client asks | {' | '.join(map(str, range(1, options.misses + 1)))} |")
    print(f"|---|---|{'---|' * options.misses}")
    for misses in found:
        print(f"| {misses.kind} | {misses.pause} | {' | '.join(f'{one:.2f}' for one in misses.seconds)} |")
    if unhandled or any(status != 503 for misses in found for status in misses.statuses):
        raise SystemExit("not every answer was 503, or the daemon's log has a traceback")
    print(f"the longest after the first: {max(one for misses in found for one in misses.seconds[1:]):.2f} s")


if __name__ == "__main__":
    main()
