"""Single files of a sandbox, opened by the launcher with the rights of the agent and never outside of its root.

Standard library only.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator

from entropo_ray.sandbox import kernel
from entropo_ray.sandbox.stage import AGENT


@contextlib.contextmanager
def agent_rights(privileged: bool) -> Iterator[None]:
    """What follows may do to files what the agent may."""
    if not privileged:
        yield
        return
    groups = os.getgroups()
    os.setgroups([])
    os.setegid(AGENT)
    os.seteuid(AGENT)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(groups)


def open_file(root: int, path: str, mode: int | None) -> int:
    """Descriptor of a regular file below `root`: to read, or, with a mode, emptied to write (parents are made)."""
    if mode is None:
        flags = os.O_RDONLY
    else:
        flags = os.O_WRONLY | os.O_CREAT
        _make_parents(root, path)
    fd = kernel.open_below(root, path, flags | os.O_NONBLOCK | os.O_NOCTTY, mode or 0)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EISDIR if stat.S_ISDIR(os.fstat(fd).st_mode) else errno.EINVAL, "not a regular file")
        if mode is not None:
            os.ftruncate(fd, 0)
            os.fchmod(fd, mode)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _make_parents(root: int, path: str) -> None:
    parts = [part for part in path.split("/")[:-1] if part]
    for depth in range(len(parts)):
        above = kernel.open_below(root, "/" + "/".join(parts[:depth]), os.O_PATH | os.O_DIRECTORY)
        try:
            with contextlib.suppress(FileExistsError):
                os.mkdir(parts[depth], 0o755, dir_fd=above)
        finally:
            os.close(above)
