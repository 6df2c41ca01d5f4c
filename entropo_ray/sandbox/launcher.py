"""The small single-threaded process that starts every bubblewrap of one host process.

Forking inside a threaded actor leaks descriptors and ties `--die-with-parent` to a thread that may end; so the actor
talks to this process instead. One request is one datagram with descriptors: a memfd holding JSON, a socket for the
answer (one JSON datagram, perhaps with a descriptor), and what the operation needs. Closing the answer socket cancels.

    open   make a sandbox                      exec   run a command; the answer comes when nothing of it lives any more
    file   descriptor of a file inside         reset  the image's state again
    close  end it

It ends with its owner: when the request socket closes or the owner's process dies, and everything inside with it.
Standard library only; started with a bare interpreter.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import resource
import selectors
import signal
import socket
import sys
import time
from collections.abc import Callable

from entropo_ray.sandbox import cgroup, kernel, seccomp
from entropo_ray.sandbox.command import Command
from entropo_ray.sandbox.files import agent_rights, open_file
from entropo_ray.sandbox.stage import Box, Runner, Stage
from entropo_ray.sandbox.wire import Lost, Request, close_all, finished, guarded, receive, reply


class Cell:
    """One sandbox as the launcher knows it."""

    def __init__(self, launcher: Launcher, name: str, spec: Request) -> None:
        self._launcher, self.name, self.spec = launcher, name, spec
        bounds = {name: spec[name] for name in ("memory_mb", "pids", "cpu")}
        self.group = cgroup.Group(launcher.groups, f"{launcher.label}/{name}", **bounds)
        try:
            self.box = self._box()
        except OSError:
            self.group.remove()
            raise
        self.command: Command | None = None
        self._after: list[Callable[[], None]] = []

    def _box(self) -> Box:
        spec = self.spec
        return Box(self._launcher.stage, spec["image"], spec["workdir"], spec["disk_mb"], site=spec["site"])

    def idle(self, then: Callable[[], None]) -> None:
        """Call `then` when no command runs; a running one is killed."""
        self._after.append(then)
        if self.command:
            self.command.kill()
        else:
            self.settle()

    def settle(self) -> None:
        while self._after and self.command is None:
            self._after.pop(0)()

    def reset(self, answer: socket.socket) -> None:
        """Answers as soon as the new box is there: the fuller the old one is, the longer it takes to vanish."""
        old, self.box = self.box, self._box()
        reply(answer, {})
        old.close()

    def close(self) -> None:
        self._launcher.cells.pop(self.name, None)
        self._launcher.at(self)
        self.box.close()
        self.group.remove()


class Launcher:
    """The event loop: requests, ends of commands, deadlines."""

    def __init__(self, requests: socket.socket, owner: int, runner: Runner, bwrap: str) -> None:
        self.label, self.bwrap = cgroup.label(os.getpid()), bwrap
        self._selector = selectors.DefaultSelector()
        self._timers: dict[object, tuple[float, Callable[[], None]]] = {}
        self.cells: dict[str, Cell] = {}
        self._requests, self._running = requests, True
        self._children: dict[int, int | None] = {}  # pid of each command -> wait status, once it has ended
        kernel.adopt_orphans()
        self.filter = seccomp.program()
        self.groups = cgroup.find()
        cgroup.reap(self.groups)
        cgroup.claim(self.groups, self.label)
        self.stage = Stage(runner)
        self._owner = os.pidfd_open(owner)  # a fork of the owner may hold the request socket open
        self.watch(requests.fileno(), self._request)
        self.watch(self._owner, self._stop)

    def watch(self, fd: int, call: Callable[[], None]) -> None:
        self._selector.register(fd, selectors.EVENT_READ, call)

    def unwatch(self, fd: int) -> None:
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(fd)

    def at(self, whose: object, moment: float = 0.0, call: Callable[[], None] | None = None) -> None:
        """Set the one timer of `whose` (on the monotonic clock), or without a call take it back."""
        self._timers.pop(whose, None)
        if call:
            self._timers[whose] = (moment, call)

    def expect(self, pid: int) -> None:
        """A child of ours whose status will be asked for."""
        self._children[pid] = None

    def ended(self, pid: int) -> int:
        """Exit code of an expected child that has ended."""
        self.bury()
        status = self._children.pop(pid)
        assert status is not None, "a command was asked for its end before that"
        return os.waitstatus_to_exitcode(status)

    def bury(self) -> None:
        """Wait for every child that has ended.

        A first process inside that outlives its bubblewrap comes to us. Left to the machine's first process, which may
        look once a second, it would count as one of its sandbox's processes until then.
        """
        with contextlib.suppress(ChildProcessError):
            while (found := os.waitpid(-1, os.WNOHANG))[0]:
                if found[0] in self._children:
                    self._children[found[0]] = found[1]

    def _stop(self) -> None:
        self._running = False

    def run(self) -> None:
        try:
            while self._running:
                due = min((moment for moment, _ in self._timers.values()), default=None)
                wait = None if due is None else max(0.0, due - time.monotonic())
                for key, _ in self._selector.select(wait):
                    if self._selector.get_map().get(key.fd) is key:  # an earlier call of this round may have dropped it
                        key.data()
                now = time.monotonic()
                for whose, (moment, call) in list(self._timers.items()):
                    if moment <= now:
                        self.at(whose)
                        call()
        finally:
            self._end()

    def _end(self) -> None:
        """Everything inside dies and no group stays; mounts go with our descriptors."""
        for cell in list(self.cells.values()):
            if cell.command:
                cell.command.kill()
        cgroup.remove_owner(self.groups, self.label)
        cgroup.leave(self.groups)

    def _request(self) -> None:
        message, fds = receive(self._requests)
        if not message:
            self._stop()
            return
        body, answer_fd, *rest = fds
        request = json.loads(os.pread(body, os.fstat(body).st_size, 0))
        os.close(body)
        answer = socket.socket(fileno=answer_fd)
        operations = {"hello": self._hello, "open": self._open, "exec": self._exec, "file": self._file}
        operations |= {"reset": self._reset, "close": self._close}
        guarded(answer, lambda: operations[request["do"]](request, answer, rest))

    def _cell(self, request: Request) -> Cell:
        name = request["name"]
        if name not in self.cells:
            raise Lost("the sandbox was closed or its life is over")
        return self.cells[name]

    def _hello(self, request: Request, answer: socket.socket, fds: list[int]) -> None:
        groups, stage = self.groups, self.stage
        facts = {"memory": bool(groups.memory), "pids": bool(groups.pids), "privileged": stage.privileged}
        facts["filter"] = bool(self.filter)
        reply(answer, facts | {"copies": stage.copies, "pid": os.getpid()})

    def _open(self, request: Request, answer: socket.socket, fds: list[int]) -> None:
        cell = Cell(self, request["name"], request)
        self.cells[cell.name] = cell
        self.at(cell, time.monotonic() + request["life_s"], lambda: self._end_of_life(cell))
        reply(answer, {})

    def _end_of_life(self, cell: Cell) -> None:
        del self.cells[cell.name]  # no further request finds it
        cell.idle(cell.close)

    def _exec(self, request: Request, answer: socket.socket, fds: list[int]) -> None:
        try:
            cell = self._cell(request)
        except Lost:
            close_all(fds)
            raise

        def start() -> None:
            try:
                with agent_rights(self.stage.privileged):
                    os.close(kernel.open_below(cell.box.root, request["cwd"] + "/.", os.O_PATH | os.O_DIRECTORY))
            except OSError as error:
                os.write(fds[0], f"bash: cd: {request['cwd']}: {error.strerror}\n".encode())
                flags = {"timed_out": False, "oom": False, "disk_full": cell.box.full()}
                reply(answer, {"exit_code": 126, "seconds": 0.0, **flags})
            else:
                cell.command = Command(self, cell, request, answer, fds)
            finally:
                close_all(fds)

        cell.idle(lambda: guarded(answer, start))

    def _reset(self, request: Request, answer: socket.socket, fds: list[int]) -> None:
        cell = self._cell(request)
        cell.idle(lambda: guarded(answer, lambda: cell.reset(answer)))

    def _close(self, request: Request, answer: socket.socket, fds: list[int]) -> None:
        cell = self._cell(request)
        cell.idle(lambda: finished(answer, cell.close))

    def _file(self, request: Request, answer: socket.socket, fds: list[int]) -> None:
        cell = self._cell(request)
        try:
            with agent_rights(self.stage.privileged):
                fd = open_file(cell.box.root, request["path"], request["mode"])
        except OSError as error:
            reply(answer, {"error": str(error), "errno": error.errno, "file": request["path"]})
            return
        try:
            reply(answer, {}, [fd])
        finally:
            os.close(fd)


def main() -> None:
    """argv: request socket, owner's pid, JSON of Runner and bwrap."""
    requests = socket.socket(fileno=int(sys.argv[1]))
    requests.set_inheritable(False)  # whoever holds it commands this process
    facts = json.loads(sys.argv[3])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the owner decides
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    bwrap = facts.pop("bwrap")
    try:
        launcher = Launcher(requests, int(sys.argv[2]), Runner(**facts), bwrap)
    except OSError as error:
        _refuse(requests, f"no mount namespace of our own: {error}")
        return
    gc.freeze()
    gc.disable()  # a fork then shares these pages
    launcher.run()


def _refuse(requests: socket.socket, why: str) -> None:
    """Tell every asker until the owner gives up."""
    while True:
        message, fds = receive(requests)
        if not message:
            return
        answer = socket.socket(fileno=fds[1])
        reply(answer, {"error": why, "down": True})
        close_all([fds[0], *fds[2:]])
