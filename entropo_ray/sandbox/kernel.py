"""The system calls that Python 3.11 does not offer: mounts, namespaces, opening below a root.

Standard library only: the launcher (a bare interpreter) imports this. Every function raises OSError
naming what it tried.
"""

from __future__ import annotations

import ctypes
import os
import signal
from ctypes import c_char_p, c_int, c_long, c_uint64, c_ulong
from pathlib import Path

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT, MS_BIND, MS_REC = 1, 2, 4, 32, 4096, 16384
MS_PRIVATE, MS_SLAVE = 1 << 18, 1 << 19
CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000

# numbers of calls younger than 2019 are the same on every architecture
_OPEN_TREE, _MOVE_MOUNT, _OPENAT2, _MOUNT_SETATTR = 428, 429, 437, 442
_AT_FDCWD, _AT_EMPTY_PATH = -100, 0x1000
_OPEN_TREE_CLONE, _MOVE_MOUNT_F_EMPTY_PATH, _MOUNT_ATTR_IDMAP = 1, 4, 0x00100000
_RESOLVE_NO_MAGICLINKS, _RESOLVE_IN_ROOT = 0x02, 0x10
_PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 36, 38

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = (c_char_p, c_char_p, c_char_p, c_ulong, c_char_p)
_libc.syscall.restype = c_long


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def mount(source: str, target: str, kind: str = "", flags: int = 0, data: str = "") -> None:
    words = (source.encode(), target.encode(), kind.encode() or None, flags, data.encode() or None)
    _check(_libc.mount(*words), f"mount {kind or 'bind'} {source} on {target}")


def bind(source: str, target: str, flags: int = 0) -> None:
    """`source` also at `target`; `flags` (MS_RDONLY ...) hold there alone."""
    mount(source, target, flags=MS_BIND | MS_REC)
    if flags:
        mount("none", target, flags=MS_BIND | MS_REMOUNT | flags)


def unshare(flags: int) -> None:
    _check(_libc.unshare(c_int(flags)), "unshare")


def setns(fd: int, kind: int) -> None:
    _check(_libc.setns(c_int(fd), c_int(kind)), "setns")


def no_new_privileges() -> None:
    _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, c_ulong(1), c_ulong(0), c_ulong(0), c_ulong(0)), "no_new_privs")


def adopt_orphans() -> None:
    """From now on, processes whose parent ends below us become our children, not those of the first process."""
    _check(_libc.prctl(_PR_SET_CHILD_SUBREAPER, c_ulong(1), c_ulong(0), c_ulong(0), c_ulong(0)), "child_subreaper")


class _OpenHow(ctypes.Structure):
    _fields_ = (("flags", c_uint64), ("mode", c_uint64), ("resolve", c_uint64))


def open_below(root: int, path: str, flags: int, mode: int = 0) -> int:
    """Open `path` as if the directory `root` were `/`: no link and no `..` leads out of it."""
    how = _OpenHow(flags | os.O_CLOEXEC, mode, _RESOLVE_IN_ROOT | _RESOLVE_NO_MAGICLINKS)
    name = c_char_p(os.fsencode(path))
    fd = _libc.syscall(c_long(_OPENAT2), c_int(root), name, ctypes.byref(how), ctypes.c_size_t(ctypes.sizeof(how)))
    if fd < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), path)
    return int(fd)


class _MountAttr(ctypes.Structure):
    _fields_ = (("attr_set", c_uint64), ("attr_clr", c_uint64), ("propagation", c_uint64), ("userns_fd", c_uint64))


def bind_idmapped(source: str, target: str, users: int) -> None:
    """`source` also at `target`, its owners changed as the user namespace `users` says."""
    name = c_char_p(os.fsencode(source))
    tree = _check(
        _libc.syscall(c_long(_OPEN_TREE), c_int(_AT_FDCWD), name, c_int(_OPEN_TREE_CLONE | os.O_CLOEXEC)),
        f"open_tree {source}",
    )
    try:
        attr = _MountAttr(_MOUNT_ATTR_IDMAP | MS_RDONLY, 0, 0, users)
        size = ctypes.c_size_t(ctypes.sizeof(attr))
        call = (c_long(_MOUNT_SETATTR), c_int(tree), c_char_p(b""), c_int(_AT_EMPTY_PATH), ctypes.byref(attr), size)
        _check(_libc.syscall(*call), f"mount_setattr idmap {source}")
        place = c_char_p(os.fsencode(target))
        call_move = (c_long(_MOVE_MOUNT), c_int(tree), c_char_p(b""), c_int(_AT_FDCWD), place)
        _check(_libc.syscall(*call_move, c_int(_MOVE_MOUNT_F_EMPTY_PATH)), f"move_mount {target}")
    finally:
        os.close(tree)


def swapped(first: int, second: int) -> str:
    """An id map in which two ids change places and every other stays."""
    low, high = sorted((first, second))
    if low == high:
        return "0 0 4294967295\n"
    ranges = ((0, 0, low), (low, high, 1), (low + 1, low + 1, high - low - 1), (high, low, 1))
    rest = (high + 1, high + 1, 4294967295 - high - 1)
    return "".join(f"{inner} {outer} {count}\n" for inner, outer, count in (*ranges, rest) if count)


def user_namespace(uid_map: str, gid_map: str) -> int:
    """Descriptor of a user namespace with these maps; needs root. A waiting child carries it until it is open."""
    ready, wake = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            unshare(CLONE_NEWUSER)
            os.write(wake, b"1")
            signal.pause()
        finally:
            os._exit(1)
    os.close(wake)
    try:
        if os.read(ready, 1) != b"1":
            raise PermissionError("user namespaces are not allowed here")
        Path(f"/proc/{pid}/uid_map").write_text(uid_map)
        Path(f"/proc/{pid}/gid_map").write_text(gid_map)
        return os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(ready)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
