"""The first process of a container, and what its agent finds in the environment."""

from __future__ import annotations

from collections.abc import Iterable

from entropo_ray.sandbox.words import PLAIN

OPEN_FILES = 4096
NAMES = "/opt/entropo"  # holds `python` where the image has only python3
ENV = PLAIN | {
    "GIT_AUTHOR_NAME": "agent",
    "GIT_AUTHOR_EMAIL": "agent@localhost",
    "GIT_COMMITTER_NAME": "agent",
    "GIT_COMMITTER_EMAIL": "agent@localhost",
}

_FIRST_S = 300  # until the first line, and from then until the tree has come
SETTLED = b"settled"  # the first process's last line each time, with the word that it was asked with

# Nobody of its own user can read or trace it (it is not dumpable) or kill it (it is the first); it needs no fork to
# stay alive, or to kill everyone else and tell what it found, when a line comes through its input: no swarm can keep it
# from that, and nobody else can speak into its output.
_KEEPER = f"""
import ctypes, os, select, signal, sys, time

def settle(word):
    try:
        while True:
            os.kill(-1, signal.SIGKILL)
            time.sleep(0.001)
    except ProcessLookupError:
        lines = ["+"]
    for name in "memory/memory.oom_control", "memory.events":
        try:
            with open(f"/sys/fs/cgroup/{{name}}") as file:
                lines += [line for line in file.read().splitlines() if line.startswith("oom_kill ")]
        except OSError:
            pass
    for place in places:
        space = os.fstatvfs(place)
        lines.append(f"free {{space.f_bfree}} {{space.f_ffree}}")
    lines.append(f"{SETTLED.decode()} {{word}}")
    os.write(1, "".join(f"{{line}}\\n" for line in lines).encode())

signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel buries whom nobody waits for
signal.signal(signal.SIGINT, signal.SIG_IGN)  # else anyone's could end it
word, end, told = sys.argv[1], time.time() + float(sys.argv[2]), [0]
places = [os.open(place, os.O_PATH) for place in sys.argv[3:]]  # for later, when anyone may have locked their parents
if ctypes.CDLL(None).prctl(4, 0, 0, 0, 0) == 0:  # PR_SET_DUMPABLE
    settle(word)
    while time.time() < end:
        if select.select(told, [], [], max(0.0, end - time.time()))[0]:
            if asked := os.read(0, 4096).split():
                settle(asked[-1].decode())
            else:
                told = []
"""
_KEEP = f"""
read -r -t {_FIRST_S} word || exit 1
command -v python >/dev/null || ln -s "$(command -v python3)" {NAMES}/python
if [ "$1" ]; then timeout {_FIRST_S} head -c "$2" | tar -xpf - -C "$1" 2>&1 || exit 1; fi
exec "$(command -v python3 || command -v python)" -I -S -c "$3" "$word" "${{@:4}}"
"""


def words(life_s: float, places: Iterable[str], *, fill: str = "", size: int = 0) -> list[str]:
    """The command of a container that lives so long, and tells how full these places are.

    It waits for a line, and then for a tar of `size` bytes to `fill` a place with, if there is one.
    """
    return ["bash", "-c", _KEEP, "bash", fill, str(size), _KEEPER, f"{life_s:.3f}", *places]
