"""Remove what killed owners of sandboxes left behind, and nothing else.

python -m entropo_ray.sandbox reap [BACKEND]         # bwrap, docker or kubernetes; all where none is named
python -m entropo_ray.sandbox watch PID [BACKEND]    # wait for the end of a process that owns sandboxes, then reap
python -m entropo_ray.sandbox watch [BACKEND]        # reap now and once a minute, until it is ended

kubernetes/NAME names a namespace other than that of the default configuration.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import time
from collections.abc import Sequence

from entropo_ray import config, sandbox
from entropo_ray.sandbox import SandboxError

BACKENDS = ("bwrap", "docker", "kubernetes")
_PASSES, _PAUSE_S = 10, 0.5  # an owner's own helpers need a moment to follow it
_MINUTE_S = 60.0


def watch(pid: int, backends: Sequence[str] = BACKENDS) -> int:
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
        found += reap(backends)
    return found


def patrol(backends: Sequence[str] = BACKENDS, every_s: float = _MINUTE_S) -> None:
    """For nodes where an owner and its witness may be killed together. Never returns."""
    while True:
        reap(backends)
        time.sleep(every_s)


def reap(backends: Sequence[str] = BACKENDS) -> int:
    """The number of sandboxes concerned; a backend that is not here has none."""
    found = 0
    for backend in backends:
        with contextlib.suppress(SandboxError):
            name, _, namespace = backend.partition("/")
            found += sandbox.reap(name, config.Kubernetes(namespace=namespace) if namespace else None)
    return found


def known(backends: Sequence[str]) -> bool:
    return all(backend in BACKENDS or backend.startswith("kubernetes/") for backend in backends)


def main(words: list[str]) -> int:
    match words:
        case ["reap", *backends] if known(backends):
            print(f"reaped {reap(backends or BACKENDS)}")  # noqa: T201
        case ["watch", pid, *backends] if pid.isdigit() and known(backends):
            watch(int(pid), backends or BACKENDS)
        case ["watch", *backends] if known(backends):
            patrol(backends or BACKENDS)
        case _:
            print(__doc__, file=sys.stderr)  # noqa: T201
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
