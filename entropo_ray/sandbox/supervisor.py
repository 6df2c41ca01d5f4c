"""The first process of a container. The image's own Python runs it, 3.6 or newer; of us, it has this file alone.

    python -I -S THIS WORD FD SECONDS [PLACE ...]

It begins when 0, an exit code, has come through FD, and ends with its input or after so many seconds. It obeys these
lines, some with so many bytes after them:

    settle WORD             kill everyone else, and tell what it found (it does so once unasked, with WORD)
    run ID SIZE COUNT       start a command: NUL-ended words, COUNT variables before them
    give ID SIZE            a piece of its input; without bytes, the end of it

and these it says:

    out ID SIZE             a piece of output
    more ID                 the input that was given has been taken
    end ID CODE             nothing of the command runs any more; 128 + n where signal n ended it
    fail ID WHY             it cannot be started
    +
    oom_kill N              so far, for want of memory
    free BLOCKS FILES       one line for each place
    settled WORD

Nobody of its own user can read or trace it (it is not dumpable) or kill it (it is the first), and nobody else holds its
input or output. It needs no fork to stay alive or to kill: no swarm can keep it from that. They can set its limits and
priority, which commands inherit: it ends then. Who is not of its user (an operator in the container) it cannot kill,
and waits for.
"""

import _signal as signal  # type: ignore[import-not-found]  # the public one imports enum: 9 of our 30 ms
import ctypes
import os
import resource
import select
import sys
import time

CHUNK = 1 << 16
OF_THE_SHELL = (b"_", b"OLDPWD", b"PWD", b"SHLVL")  # in the environment, by the one that started us
PR_SET_DUMPABLE = 4


class Command:
    def __init__(self, number: bytes, pid: int, feeding: int, output: int) -> None:
        self.number, self.pid = number, pid
        self.feeding, self.output = feeding, output  # -1: closed
        self.input, self.whole = bytearray(), False
        self.code = -1

    def close_input(self) -> None:
        if self.feeding >= 0:
            os.close(self.feeding)
        self.feeding = -1

    def close_output(self) -> None:
        if self.output >= 0:
            os.close(self.output)
        self.output = -1


class Supervisor:
    def __init__(self, env: "dict[bytes, bytes]", life_s: float, places: "list[str]") -> None:
        self.env = env
        self.end = time.monotonic() + life_s
        self.groups = []
        for name in "memory/memory.oom_control", "memory.events":  # open, for someone could leave us no descriptor
            try:  # noqa: SIM105 (contextlib would be another import)
                self.groups.append(os.open("/sys/fs/cgroup/" + name, os.O_RDONLY))
            except OSError:
                pass
        self.born = condition()
        self.places = [os.open(place, os.O_PATH) for place in places]  # while nobody has locked their parents
        self.heard = bytearray()
        self.command: Command | None = None
        self.woken, waking = os.pipe()
        os.set_blocking(waking, False)
        signal.set_wakeup_fd(waking)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # else anyone's could end it
        signal.signal(signal.SIGCHLD, self.bury)
        signal.signal(signal.SIGALRM, self.expire)
        signal.setitimer(signal.ITIMER_REAL, max(life_s, 0.001))

    def expire(self, *_: object) -> None:
        """Whatever it waits for. Anyone could send this signal."""
        left = self.end - time.monotonic()
        if left <= 0:
            os._exit(0)
        signal.setitimer(signal.ITIMER_REAL, left)

    def bury(self, *_: object) -> None:
        """At once, for the dead count among the processes that an agent may have."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if self.command is not None and pid == self.command.pid and self.command.code < 0:
                self.command.code = 128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)

    def serve(self) -> None:
        while True:
            readers, writers = [0, self.woken], []
            command = self.command
            if command is not None and command.output >= 0:
                readers.append(command.output)
            if command is not None and command.feeding >= 0 and command.input:
                writers.append(command.feeding)
            ready, free, _ = select.select(readers, writers, [])
            if self.woken in ready:
                os.read(self.woken, CHUNK)
            if command is not None:
                self.attend(command, heard=command.output in ready, hungry=command.feeding in free)
            if 0 in ready:
                self.hear()

    def hear(self) -> None:
        data = os.read(0, CHUNK)
        if not data:
            os._exit(0)
        self.heard += data
        while True:
            end = self.heard.find(b"\n") + 1
            line = bytes(self.heard[:end]).split()
            size = int(line[2]) if len(line) > 2 else 0
            if not end or len(self.heard) < end + size:
                return
            payload = bytes(self.heard[end : end + size])
            del self.heard[: end + size]
            if line[0] == b"settle":
                self.settle(line[1])
            elif line[0] == b"run":
                self.run(line[1], payload, int(line[3]))
            elif self.command is not None and self.command.number == line[1]:
                self.give(self.command, payload)

    def run(self, number: bytes, payload: bytes, count: int) -> None:
        while self.command is not None:  # one that nobody waits for
            self.kill()
            self.attend(self.command, heard=False, hungry=False)
        words = payload.split(b"\0")[:-1]
        env = dict(self.env)
        for word in words[:count]:
            key, _, env[key] = word.partition(b"=")
        ours = []  # descriptors
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])  # until we know whose death it would tell
        try:
            reading, feeding = os.pipe()
            ours += [reading, feeding]
            output, telling = os.pipe()
            ours += [output, telling]
            pid = os.fork()
            if pid == 0:
                become(words[count:], env, reading, telling)
            for fd in feeding, output:  # the agent can read its own output, so that none is left for us
                os.set_blocking(fd, False)
                ours.remove(fd)
            self.command = Command(number, pid, feeding, output)
        except OSError as error:
            self.say(b"fail %s %s\n" % (number, str(error).encode()))
        finally:
            for fd in ours:
                os.close(fd)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])

    def give(self, command: Command, piece: bytes) -> None:
        command.input += piece
        command.whole |= not piece
        if command.whole and not command.input:
            command.close_input()

    def attend(self, command: Command, *, heard: bool, hungry: bool) -> None:
        """Pass on what it says, and what it is given; kill all that it leaves."""
        if hungry:
            self.feed(command)
        if command.code >= 0:
            self.kill()
            while self.heed(command):  # all there is: nobody writes any more
                pass
            command.close_input()
            command.close_output()
            self.command = None
            self.say(b"end %s %d\n" % (command.number, command.code))
        elif heard:
            self.heed(command)

    def heed(self, command: Command) -> bool:
        """Pass on a piece of its output; whether there was one."""
        if command.output < 0:
            return False
        try:
            data = os.read(command.output, CHUNK)
        except BlockingIOError:
            return False
        if data:
            self.say(b"out %s %d\n" % (command.number, len(data)) + data)
        else:
            command.close_output()
        return bool(data)

    def feed(self, command: Command) -> None:
        try:
            del command.input[: os.write(command.feeding, command.input)]
        except BlockingIOError:
            return
        except OSError:  # it reads no more
            command.close_input()
            return
        if not command.input and command.whole:
            command.close_input()
        elif not command.input:
            self.say(b"more %s\n" % command.number)

    def kill(self) -> None:
        """Everyone else."""
        try:
            while True:
                self.bury()  # the dead can be killed, too, and nobody tells of those that died before we listened
                os.kill(-1, signal.SIGKILL)
                time.sleep(0.001)
        except ProcessLookupError:
            pass

    def settle(self, word: bytes) -> None:
        self.kill()
        if condition() != self.born:
            os._exit(1)
        lines = [b"+"]
        for group in self.groups:
            lines += [line for line in os.pread(group, CHUNK, 0).splitlines() if line.startswith(b"oom_kill ")]
        for place in self.places:
            space = os.fstatvfs(place)
            lines.append(b"free %d %d" % (space.f_bfree, space.f_ffree))
        self.say(b"\n".join([*lines, b"settled " + word, b""]))

    def say(self, data: bytes) -> None:
        while data:
            data = data[os.write(1, data) :]


def condition() -> "list[object]":
    """What commands inherit, and others of our user could change."""
    kinds = [value for name, value in sorted(vars(resource).items()) if name.startswith("RLIMIT_")]
    limits = [resource.getrlimit(kind) for kind in kinds]
    return [limits, os.getpriority(os.PRIO_PROCESS, 0), os.sched_getscheduler(0)]


def become(words: "list[bytes]", env: "dict[bytes, bytes]", reading: int, telling: int) -> None:
    """In the child: never returns. Nothing of ours is left open or set for the command."""
    try:
        os.setsid()
        for fd, ours in enumerate((reading, telling, os.open(os.devnull, os.O_WRONLY))):
            os.dup2(ours, fd)
        os.closerange(3, CHUNK)
        for number in signal.SIGCHLD, signal.SIGINT, signal.SIGPIPE, signal.SIGXFSZ:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        os.execvpe(words[0], words, env)
    finally:
        os._exit(127)


if __name__ == "__main__":
    if os.getpid() != 1:  # it would kill everyone that it may
        sys.exit("only as the first process of a container")
    if os.read(int(sys.argv[2]), CHUNK) != b"0\n":  # of what fills the work directory, and has said why it cannot
        sys.exit(1)
    with open("/proc/self/environ", "rb") as file:  # noqa: PTH123 (an import); os.environ has words of Python's own
        pairs = [entry.partition(b"=") for entry in file.read().split(b"\0") if entry]
    given = {key: value for key, _, value in pairs if key not in OF_THE_SHELL}
    if ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) == 0:
        supervisor = Supervisor(given, float(sys.argv[3]), sys.argv[4:])
        supervisor.settle(os.fsencode(sys.argv[1]))
        supervisor.serve()
