"""The command of a container, and what its agent finds in the environment."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from entropo_ray.sandbox.words import PLAIN

OPEN_FILES = 4096
NAMES = "/opt/entropo"  # holds `python` where the image has only python3
ENV = PLAIN | {
    "GIT_AUTHOR_NAME": "agent",
    "GIT_AUTHOR_EMAIL": "agent@localhost",
    "GIT_COMMITTER_NAME": "agent",
    "GIT_COMMITTER_EMAIL": "agent@localhost",
}
SUPERVISOR = Path(__file__).with_name("supervisor.py")
SETTLED = b"settled"  # the last line of an answer, with the word that was asked with

_FIRST_S = 300  # until the first line, and from then until the tree has come
_KEEP = f"""
read -r -t {_FIRST_S} _ word || exit 1
command -v python >/dev/null || ln -s "$(command -v python3)" {NAMES}/python
exec 5<&0 6>&1 4<<<0
if [ "$1" ]; then exec 4< <(timeout {_FIRST_S} head -c "$2" <&5 | tar -xpf - -C "$1" >&6 2>&1; echo $?); fi
exec "$(command -v python3 || command -v python)" -I -S /dev/fd/3 "$word" 4 "${{@:4}}" 3<<<"$3" 5<&- 6>&-
"""


def words(life_s: float, places: Iterable[str], *, fill: str = "", size: int = 0) -> list[str]:
    """The command of a container that lives so long, and tells how full these places are.

    It waits for a line, as the supervisor does, and then for a tar of `size` bytes to `fill` a place with, if there is
    one.
    """
    source = SUPERVISOR.read_text()
    return ["bash", "-c", _KEEP, "bash", fill, str(size), source, f"{life_s:.3f}", *places]
