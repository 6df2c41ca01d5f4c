"""The bash that runs the hidden tests of a public data set: made where a row brings none, rewritten for a new base.

The markers and the order of the last lines are what a harness expects: it takes the exit code of the command that
stands directly before the end marker.
"""

from __future__ import annotations

import hashlib
import re
import shlex
from collections.abc import Sequence

from entropo_ray.tasks import diffs

START, END = ">>>>> Start Test Output", ">>>>> End Test Output"
_HEX = re.compile(r"(?<![0-9a-zA-Z])[0-9a-f]{7,64}(?![0-9a-zA-Z])")


def made(*, base: str, test_patch: str, command: str, workdir: str) -> str:
    """A script that puts the test files of `base` and of `test_patch` in place, whatever lies there, and tests them.

    Nothing is installed: a sandbox has no network, and the image is installed already. ValueError for no diff of git.
    """
    changes = diffs.changes(test_patch)
    old = [change.before for change in changes if change.before is not None]
    new = [change.after for change in changes if change.after is not None and change.after not in old]
    lines = [
        "#!/bin/bash",
        "set -uxo pipefail",
        "for home in /opt/miniconda3 /opt/conda; do",
        '  if [ -f "$home/bin/activate" ]; then source "$home/bin/activate" testbed; break; fi',
        "done",
        "git() { command git -c safe.directory='*' \"$@\"; }",  # the files may be another user's
        f"cd {workdir}",
    ]
    restore = [f"git checkout {base} -- {shlex.join(old)}"] if old else []
    restore += [f"rm -rf -- {shlex.join(new)}"] if new else []
    ending = f"EOF_{hashlib.blake2b(test_patch.encode(errors='surrogateescape'), digest_size=6).hexdigest()}"
    patch = [f"git apply --verbose - <<'{ending}'", test_patch.removesuffix("\n"), ending] if changes else []
    return "\n".join([*lines, *restore, *patch, f": '{START}'", command, f": '{END}'", *restore]) + "\n"


def test_files(test_patch: str) -> list[str]:
    """The Python files that a diff of tests leaves behind. ValueError for no diff of git."""
    return [change.after for change in diffs.changes(test_patch) if change.after and change.after.endswith(".py")]


def command(words: str, files: Sequence[str]) -> str:
    """A test command followed by the files to test."""
    return f"{words} {shlex.join(files)}" if files else words


def rewritten(script: str, old: str, new: str) -> str:
    """A script that names the commit `new` where it named `old`, in full or by seven letters or more of its id.

    After a scrub the old commit is gone, and scripts check test files out by it.
    """
    if not re.fullmatch(r"[0-9a-f]{40,64}", old):
        raise ValueError(f"{old!r} is no full commit id; give all of its 40 or 64 letters")
    return _HEX.sub(lambda found: new if old.startswith(found[0]) else found[0], script)
