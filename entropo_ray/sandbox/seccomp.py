"""The system call filter of a sandbox: calls that reach deep into the kernel fail with EPERM, all others are allowed.

What it takes away nobody needs to build and test software: namespaces and mounts, tracing of other processes, BPF, key
rings, io_uring, file handles, modules, and typing into the terminal. clone3 answers ENOSYS, for its flags lie in memory
where a filter cannot look; every C library falls back to clone. Standard library only.
"""

from __future__ import annotations

import errno
import platform
import struct
from collections.abc import Mapping

_DENIED: Mapping[str, tuple[int | None, int | None]] = {  # numbers on x86_64 and aarch64; None: no such call there
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "setns": (308, 268),
    "unshare": (272, 97),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "keyctl": (250, 219),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "pidfd_getfd": (438, 438),
    "kcmp": (312, 272),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "acct": (163, 89),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "reboot": (169, 142),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    "open_by_handle_at": (304, 265),
    "name_to_handle_at": (303, 264),
    "fanotify_init": (300, 262),
    "syslog": (103, 116),
    "personality": (135, 92),
    "iopl": (172, None),
    "ioperm": (173, None),
}
_CLONE, _CLONE3, _IOCTL = (56, 220), (435, 435), (16, 29)
_AUDIT = (0xC000003E, 0xC00000B7)  # names of the architectures in a filter's input
_MACHINES = ("x86_64", "aarch64")
_X32 = 0x40000000  # x86_64's second set of numbers
_CLONE_NEWUSER, _TIOCSTI = 0x10000000, 0x5412

# classic BPF
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _ARCHITECTURE, _FIRST, _SECOND = 0, 4, 16, 24  # where they lie; of arguments the lower halves
_ALLOW, _KILL = 0x7FFF0000, 0x80000000
_EPERM, _ENOSYS = 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS

Step = tuple[int, int, int, int]  # code, steps to skip if true, if false, operand


def denied(machine: str = "") -> dict[str, int]:
    """The calls that fail whatever their arguments, with their numbers."""
    column = _MACHINES.index(machine or platform.machine())
    return {name: number for name, numbers in _DENIED.items() if (number := numbers[column]) is not None}


def program(machine: str = "") -> bytes:
    """The filter as bubblewrap's --seccomp takes it; empty on an architecture that it does not know."""
    machine = machine or platform.machine()
    if machine not in _MACHINES:
        return b""
    column = _MACHINES.index(machine)
    steps: list[Step] = [(_LOAD, 0, 0, _ARCHITECTURE), (_EQUAL, 1, 0, _AUDIT[column]), (_RETURN, 0, 0, _KILL)]
    steps.append((_LOAD, 0, 0, _NUMBER))
    if machine == "x86_64":
        steps += _when(_AT_LEAST, _X32, _ENOSYS)
    for number in denied(machine).values():
        steps += _when(_EQUAL, number, _EPERM)
    steps += _when(_EQUAL, _CLONE3[column], _ENOSYS)
    steps += _argument(_CLONE[column], _FIRST, _ANY_BIT, _CLONE_NEWUSER)
    steps += _argument(_IOCTL[column], _SECOND, _EQUAL, _TIOCSTI)
    steps.append((_RETURN, 0, 0, _ALLOW))
    return b"".join(struct.pack("=HBBI", *step) for step in steps)


def _when(test: int, operand: int, answer: int) -> list[Step]:
    return [(test, 0, 1, operand), (_RETURN, 0, 0, answer)]


def _argument(number: int, where: int, test: int, operand: int) -> list[Step]:
    """EPERM for one call with such an argument, anything else of that call allowed."""
    return [
        (_EQUAL, 0, 4, number),
        (_LOAD, 0, 0, where),
        (test, 0, 1, operand),
        (_RETURN, 0, 0, _EPERM),
        (_RETURN, 0, 0, _ALLOW),
    ]
