"""Remove what killed owners of sandboxes left behind, and nothing else.

python -m entropo_ray.sandbox reap
python -m entropo_ray.sandbox watch PID     # wait for the end of a process that owns sandboxes, then reap
"""

from __future__ import annotations

import os
import select
import signal
import sys
import time

from entropo_ray import sandbox

_PASSES, _PAUSE_S = 10, 0.5  # an owner's own helpers need a moment to follow it


def watch(pid: int) -> int:
    """Reap for a few seconds after a process has ended; the number of sandboxes concerned."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # what ends the owner's group must not end its witness
    try:
        owner = os.pidfd_open(pid)
    except ProcessLookupError:
        pass
    else:
        select.select([owner], [], [])  # the life of the owner is the deadline
    found = 0
    for _ in range(_PASSES):
        time.sleep(_PAUSE_S)
        found += sandbox.reap()
    return found


def main(words: list[str]) -> int:
    match words:
        case ["reap"]:
            print(f"reaped {sandbox.reap()}")  # noqa: T201
        case ["watch", pid] if pid.isdigit():
            watch(int(pid))
        case _:
            print(__doc__, file=sys.stderr)  # noqa: T201
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
