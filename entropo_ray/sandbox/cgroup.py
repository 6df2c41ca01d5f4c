"""Limits of memory, processes and processors by control groups, version 1 or 2, written directly.

One parent `entropo` below our own group, one directory per launcher (its label), one per sandbox. Where they may not be
written, the launcher falls back to resource limits of single processes. Standard library only.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

_PARENT = "entropo"
_PERIOD_US = 100_000  # in which a sandbox may use its processors' time


def label(pid: int) -> str:
    """Names a process for ever: its pid namespace, pid and start time."""
    return f"{Path('/proc/self/ns/pid').stat().st_ino}-{pid}-{_start(pid)}"


def _start(pid: int) -> str:
    """Start time in clock ticks (field 22 of stat; the name before it may hold spaces); "" for no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def alive(name: str) -> bool:
    """True while the process of this label lives; another pid namespace's label is never judged dead."""
    namespace, _, rest = name.partition("-")
    pid, _, start = rest.partition("-")
    if not (pid.isdigit() and start) or namespace != label(os.getpid()).partition("-")[0]:
        return True
    return _start(int(pid)) == start


@dataclass(frozen=True)
class Groups:
    """Where our groups live: directory of each controller ("" where not writable)."""

    memory: str
    pids: str
    unified: bool  # version 2: all are one directory
    cpu: str = ""

    @property
    def roots(self) -> list[str]:
        return list(dict.fromkeys(root for root in (self.memory, self.pids, self.cpu) if root))


def find() -> Groups:
    """The groups of this machine, made if need be."""
    own = {}
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        for controller in controllers.split(","):
            own[controller] = path
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    first = {c: m[1] for m in reversed(mounts) if m[2] == "cgroup" for c in m[3].split(",") if c in _V1}
    if first.keys() & {"memory", "pids"}:
        found = {c: _usable(first[c], own.get(c, "/"), probe) for c, probe in _V1.items() if c in first}
        return Groups(**{c: found.get(c, "") for c in _V1}, unified=False)
    second = next((m[1] for m in mounts if m[2] == "cgroup2"), "")
    both = _usable(second, own.get("", "/"), "memory.max", enable=True) if second else ""
    there = {c: both if both and Path(both, f"{c}.max").exists() else "" for c in ("pids", "cpu")}
    return Groups(both, **there, unified=True)


_V1 = {"memory": "memory.limit_in_bytes", "pids": "pids.max", "cpu": "cpu.cfs_quota_us"}


def _usable(mount: str, own: str, probe: str, *, enable: bool = False) -> str:
    """Our parent directory below our own group (in a container the path may not exist: then below the mount), or ""."""
    base = Path(mount, own.lstrip("/"))
    if not base.is_dir():
        base = Path(mount)
    parent = base / _PARENT
    trial = parent / f"{label(os.getpid())}-trial"
    try:
        _make(trial)
        if enable:
            for group in (base, parent):  # refused where processes live in the group itself
                _enable(group)
        usable = os.access(trial / probe, os.W_OK)
        trial.rmdir()
    except OSError:
        return ""
    return str(parent) if usable else ""


class Group:
    """The limits of one sandbox over all its commands."""

    def __init__(self, groups: Groups, name: str, *, memory_mb: int, pids: int, cpu: float = 0.0) -> None:
        if cpu and not groups.cpu:
            raise OSError("no cpu control group can be written here; set rollout.sandbox.cpu=0")
        self._groups = groups
        roots = [root for root in groups.roots if root != groups.cpu or cpu or groups.unified]
        self._paths = [Path(root, name) for root in roots]
        for path in self._paths:
            path.mkdir()
        if groups.memory:
            memory = Path(groups.memory, name)
            size = str(memory_mb << 20)
            (memory / ("memory.max" if groups.unified else "memory.limit_in_bytes")).write_text(size)
            _no_swap(memory, groups.unified, size)
        if groups.pids:
            Path(groups.pids, name, "pids.max").write_text(str(pids))
        if cpu:
            _share(Path(groups.cpu, name), groups.unified, round(cpu * _PERIOD_US))

    def join(self) -> None:
        """The calling process and all it will start."""
        for path in self._paths:
            (path / "cgroup.procs").write_text("0")

    def oom_kills(self) -> int:
        """Processes killed so far for want of memory."""
        if not self._groups.memory:
            return 0
        events = self._paths[0] / ("memory.events" if self._groups.unified else "memory.oom_control")
        counts = dict(line.split() for line in events.read_text().splitlines())
        return int(counts.get("oom_kill", 0))

    def remove(self) -> None:
        for path in self._paths:
            _remove(path)


def claim(groups: Groups, owner: str) -> None:
    """Make the directory that the groups of one launcher lie in."""
    for root in groups.roots:
        path = Path(root, owner)
        _make(path)
        if groups.unified:
            for group in (path.parent, path):
                _enable(group)


def _enable(group: Path) -> None:
    """The controllers of version 2 for the groups below; the one for processors may not be ours to give on."""
    control = group / "cgroup.subtree_control"
    control.write_text("+memory +pids")
    with contextlib.suppress(OSError):
        control.write_text("+cpu")


def _make(path: Path, tries: int = 1000) -> None:
    """A directory in our parent, and that one where it is missing: a launcher that ends may remove it in between."""
    for left in reversed(range(tries)):
        try:
            for directory in (path.parent, path):
                with contextlib.suppress(FileExistsError):
                    directory.mkdir()  # exist_ok would look at it once more, when it may be gone
        except FileNotFoundError:
            if not left:
                raise
        else:
            return


def _no_swap(memory: Path, unified: bool, size: str) -> None:
    name, value = ("memory.swap.max", "0") if unified else ("memory.memsw.limit_in_bytes", size)
    with contextlib.suppress(FileNotFoundError):  # kernels without swap accounting have no such file
        (memory / name).write_text(value)


def _share(group: Path, unified: bool, quota_us: int) -> None:
    if unified:
        (group / "cpu.max").write_text(f"{quota_us} {_PERIOD_US}")
    else:
        (group / "cpu.cfs_period_us").write_text(str(_PERIOD_US))
        (group / "cpu.cfs_quota_us").write_text(str(quota_us))


def _remove(path: Path, patience_s: float = 2.0) -> None:
    """Kill what the group still holds, then the directory; the kernel needs a moment to notice that it is empty."""
    deadline = time.monotonic() + patience_s
    while path.is_dir():
        try:
            path.rmdir()
        except OSError:
            if time.monotonic() > deadline:
                raise
            with contextlib.suppress(OSError):  # gone, or on the way (ENODEV)
                for pid in (path / "cgroup.procs").read_text().split():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(int(pid), signal.SIGKILL)
            time.sleep(0.001)


def remove_owner(groups: Groups, owner: str) -> int:
    """Remove every group of one launcher; the number of sandboxes that were left."""
    left = 0
    for root in groups.roots:
        directory = Path(root, owner)
        with contextlib.suppress(FileNotFoundError):  # another reaper was here
            children = [path for path in directory.iterdir() if path.is_dir()]
            left = max(left, len(children))
            for path in [*children, directory]:
                _remove(path)
    return left


def reap(groups: Groups) -> int:
    """Remove the groups of launchers that are no more; the number of sandboxes that were left."""
    owners: set[str] = set()
    for root in groups.roots:
        with contextlib.suppress(FileNotFoundError):  # another reaper was here
            owners |= {path.name for path in Path(root).iterdir() if path.is_dir()}
    left = sum(remove_owner(groups, owner) for owner in sorted(owners) if not alive(owner.removesuffix("-trial")))
    leave(groups)
    return left


def leave(groups: Groups) -> None:
    """Remove our parent directories unless a launcher still has its own below."""
    for root in groups.roots:
        with contextlib.suppress(OSError):
            Path(root).rmdir()
