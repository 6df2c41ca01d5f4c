"""The first process of a container, and what its agent finds in the environment."""

from __future__ import annotations

OPEN_FILES = 4096
NAMES = "/opt/entropo"  # holds `python` where the image has only python3
ENV = {
    "HOME": "/home/agent",
    "USER": "agent",
    "LANG": "C.UTF-8",
    "TZ": "UTC",
    "TERM": "dumb",
    "PAGER": "cat",
    "GIT_PAGER": "cat",
    "GIT_AUTHOR_NAME": "agent",
    "GIT_AUTHOR_EMAIL": "agent@localhost",
    "GIT_COMMITTER_NAME": "agent",
    "GIT_COMMITTER_EMAIL": "agent@localhost",
    "PYTHONHASHSEED": "0",
    "PYTHONDONTWRITEBYTECODE": "1",
}

# Nobody of its own user can read or trace it (it is not dumpable) or kill it (it is the first); it needs no fork to
# stay alive, or to kill everyone else, when told so from outside (by a signal, or by its input where that is open): no
# swarm can keep it from that.
_KEEPER = """
import ctypes, os, select, signal, sys, time

def kill_all(*_):
    try:
        os.kill(-1, signal.SIGKILL)
    except OSError:
        pass

signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel buries whom nobody waits for
signal.signal(signal.SIGUSR1, kill_all)
end, told = time.time() + float(sys.argv[1]), [0]
if ctypes.CDLL(None).prctl(4, 0, 0, 0, 0) == 0:  # PR_SET_DUMPABLE
    while time.time() < end:
        if select.select(told, [], [], max(0.0, end - time.time()))[0]:
            if os.read(0, 4096):
                kill_all()
            else:
                told = []
"""
_KEEP = f"""
command -v python >/dev/null || ln -s "$(command -v python3)" {NAMES}/python
exec "$(command -v python3 || command -v python)" -I -S -c "$2" "$1"
"""
# what a script begins with that must not run before the first process is out of reach
ALONE = "while [ -O /proc/1/environ ]; do sleep 0.01; done\n"


def words(life_s: float) -> list[str]:
    """The command of a container that lives so long."""
    return ["bash", "-c", _KEEP, "bash", f"{life_s:.3f}", _KEEPER]
