"""One command inside: a bubblewrap from its fork to the end of everything that it started.

Standard library only.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import signal
import socket
import time
from typing import TYPE_CHECKING

from entropo_ray.sandbox import kernel
from entropo_ray.sandbox.stage import AGENT, BOX, IMAGE, ROOT
from entropo_ray.sandbox.wire import Request, close_all, reply

if TYPE_CHECKING:
    from entropo_ray.sandbox.launcher import Cell, Launcher

_OPEN_FILES = 4096


class Command:
    """One bubblewrap and what is inside."""

    def __init__(self, launcher: Launcher, cell: Cell, request: Request, answer: socket.socket, fds: list[int]) -> None:
        self._launcher, self._cell, self._answer = launcher, cell, answer
        self._kills = cell.group.oom_kills()
        self._status, status = os.pipe()
        self._timed_out = False
        self._begin = time.monotonic()
        filtered = _memfd(launcher.filter) if launcher.filter else None
        arguments = _memfd("\0".join(_bubblewrap(request, cell.spec, status, filtered)).encode())
        handed = [fd for fd in (arguments, status, filtered) if fd is not None]
        self._pid = os.fork()
        if self._pid == 0:
            _become(launcher, cell, request, fds, handed)
        launcher.expect(self._pid)
        close_all(handed)
        os.set_blocking(self._status, False)
        self._process = os.pidfd_open(self._pid)
        self._init: int | None = None  # pidfd of the first process inside
        self._documents = b""
        self._code: int | None = None
        watch = launcher.watch
        watch(self._status, self._read_status)
        watch(self._process, self._ended)
        watch(answer.fileno(), self.kill)  # readable only when the asker hung up
        launcher.at(self, self._begin + request["timeout"], self._expire)

    def kill(self) -> None:
        """SIGKILL to the first process inside, and so to all; idempotent."""
        self._launcher.unwatch(self._answer.fileno())
        for pidfd in (self._init, self._process):
            if pidfd is not None:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)

    def _expire(self) -> None:
        self._timed_out = True
        self.kill()

    def _read_status(self) -> None:
        with contextlib.suppress(BlockingIOError):
            data = os.read(self._status, 65536)
            self._documents += data
            if not data:
                self._launcher.unwatch(self._status)
        if self._init is None and b"\n" in self._documents:
            pid = json.loads(self._documents.split(b"\n", 1)[0])["child-pid"]
            with contextlib.suppress(ProcessLookupError):
                self._init = os.pidfd_open(pid) if pid else None

    def _ended(self) -> None:
        """The outer bubblewrap is gone; wait for the first process inside, whose end is the end of every other."""
        self._read_status()
        self._launcher.unwatch(self._process)
        self._launcher.at(self)
        self._code = self._launcher.ended(self._pid)
        if self._init is None:
            self._finish()
        else:
            self.kill()
            self._launcher.watch(self._init, self._finish)

    def _finish(self) -> None:
        self._launcher.bury()
        documents = [json.loads(line) for line in self._documents.split(b"\n") if line]
        started = any("child-pid" in document for document in documents)
        codes = [document["exit-code"] for document in documents if "exit-code" in document]
        oom = self._cell.group.oom_kills() > self._kills
        code = codes[0] if codes else 137 if oom else None
        answer: Request = {"exit_code": None if self._timed_out else code, "timed_out": self._timed_out, "oom": oom}
        answer |= {"seconds": time.monotonic() - self._begin, "disk_full": self._cell.box.full()}
        if code is None and not self._timed_out:
            what = "ended with no status" if started else "did not start"
            answer |= {"error": f"bubblewrap {what} (status {self._code})", "lost": started}
        self._launcher.unwatch(self._answer.fileno())
        for fd in (self._status, self._process, self._init):
            if fd is not None:
                self._launcher.unwatch(fd)
                os.close(fd)
        self._cell.command = None
        reply(self._answer, answer)
        self._cell.settle()


def _bubblewrap(request: Request, spec: Request, status: int, filtered: int | None) -> list[str]:
    """Options of one run; they go through a descriptor, for the command line can be read inside."""
    workdir = spec["workdir"]
    words = ["--unshare-all", "--unshare-user", "--disable-userns", "--uid", str(AGENT), "--gid", str(AGENT)]
    words += ["--die-with-parent", "--new-session", "--cap-drop", "ALL", "--hostname", "sandbox", "--clearenv"]
    words += ["--json-status-fd", str(status), "--bind", ROOT, "/", "--proc", "/proc", "--dev", "/dev"]
    words += ["--bind", f"{BOX}/shm", "/dev/shm", "--remount-ro", "/dev"]
    if request["trusted"]:
        words += ["--ro-bind", f"{ROOT}{workdir}", workdir, "--tmpfs", "/tmp", "--tmpfs", "/home/agent"]
        words += ["--ro-bind", IMAGE, "/opt/image"]
    if filtered is not None:
        words += ["--seccomp", str(filtered)]
    for key, value in request["env"].items():
        words += ["--setenv", key, value]
    return [*words, "--chdir", request["cwd"]]


def _become(launcher: Launcher, cell: Cell, request: Request, fds: list[int], handed: list[int]) -> None:
    """The forked child: limits, namespace, rights, then bubblewrap, which gets `handed`. Never returns."""
    output, given = fds
    arguments, status = handed[:2]
    try:
        os.dup2(given, 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        for fd in handed:
            os.set_inheritable(fd, True)
        _hear_all()
        _limit(launcher, cell)
        kernel.setns(cell.box.namespace, kernel.CLONE_NEWNS)
        if launcher.stage.privileged:
            os.setgroups([])
            os.setresgid(AGENT, AGENT, AGENT)
            os.setresuid(AGENT, AGENT, AGENT)
        kernel.no_new_privileges()
        words = [launcher.bwrap, "--args", str(arguments), "--", *_wrapped(launcher, cell, request["argv"])]
        os.execve(launcher.bwrap, words, {})
    except OSError as error:
        if error.errno == errno.E2BIG:
            os.write(2, b"bash: Argument list too long\n")
            # as bubblewrap would say it: nothing is inside, the command failed
            os.write(status, b'{"child-pid": 0}\n{"exit-code": 126}\n')
        else:
            os.write(2, f"sandbox: {error}\n".encode())
    finally:
        os._exit(125)


def _hear_all() -> None:
    """No signal is ignored or blocked inside because Python, the launcher or whoever started us does so."""
    for number in signal.valid_signals():
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def _limit(launcher: Launcher, cell: Cell) -> None:
    cell.group.join()
    size = cell.spec["disk_mb"] << 20
    pairs = [(resource.RLIMIT_CORE, 0), (resource.RLIMIT_FSIZE, size), (resource.RLIMIT_NOFILE, _OPEN_FILES)]
    if not launcher.groups.memory:  # of each process, not of all: probe says so
        pairs.append((resource.RLIMIT_DATA, cell.spec["memory_mb"] << 20))
    for kind, value in pairs:
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:  # noqa: PTH123
        file.write("500")  # when the whole machine runs short, sandboxes die first


def _wrapped(launcher: Launcher, cell: Cell, argv: list[str]) -> list[str]:
    """Without a process controller the kernel counts per user namespace, so the limit is set inside of it."""
    if launcher.groups.pids:
        return argv
    return ["prlimit", f"--nproc={cell.spec['pids']}", "--", *argv]


def _memfd(data: bytes) -> int:
    fd = os.memfd_create("entropo")
    os.write(fd, data)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd
