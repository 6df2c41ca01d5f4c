"""One running container, seen from threads: commands of the agent, and scripts of ours.

A command runs below a shell that kills all else of its user when the command ends, so that its output ends too; since
the agent could have killed that shell, a second exec does the same again and tells of memory and disks.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Generic, Protocol, TypeVar

from entropo_ray.sandbox import BackendDown, ExecResult, SandboxError, SandboxLost
from entropo_ray.sandbox.attached import GATE, Connection, Sink, Source
from entropo_ray.sandbox.output import Capture

C = TypeVar("C", bound=Connection)

_START_S = 60.0  # from a request until its command begins
_GRACE_S = 20.0  # for the end of what was killed

_RUN = f"""{GATE}
exec 2>&1
cd -- "$1" || exit 126
shift
exec 3>&1 >/dev/null 2>&1  # of a shell that tells how its child was killed, nothing is wanted
(exec >&3 2>&1 3>&-; exec -- "$@")
code=$?
kill -9 -1
exit $code
"""
_SETTLE = f"""{GATE}
kill -9 -1
cat /sys/fs/cgroup/memory/memory.oom_control /sys/fs/cgroup/memory.events 2>/dev/null
stat -f -c 'free %f %d' "$@"
echo settled
"""
_SETTLED = b"settled\n"


class Engine(Protocol[C]):
    """What runs containers; its methods block, and raise SandboxError."""

    def begin(
        self, name: str, words: Sequence[str], env: Mapping[str, str], source: Source, sink: Sink, cut: threading.Event
    ) -> C:
        """Start a command as the agent."""

    def exit_code(self, name: str, attached: C) -> int | None:
        """128 + n where signal n ended it; None as long as the command runs."""

    def fate(self, name: str) -> str:
        """Why the container is no more; empty as long as it runs."""

    def kill_all(self, name: str) -> None:
        """Have the first process kill all others."""

    def remove(self, name: str) -> None:
        """Idempotent, never raises."""


class Machine(Generic[C]):
    """One running container; its methods block."""

    def __init__(self, engine: Engine[C], name: str, places: Sequence[str], life_s: float) -> None:
        self._engine, self._name, self._places = engine, name, places
        self._until = time.monotonic() + life_s
        self._kills = 0

    def remove(self) -> None:
        self._engine.remove(self._name)

    def script(
        self, text: str, *words: str, timeout_s: float, source: Source = b"", output_bytes: int = 1 << 16
    ) -> tuple[int | None, Capture]:
        """Exit code and output of one of our scripts, which nothing of it outlives; no exit code: it took too long."""
        kept = Capture(output_bytes)
        return self.stream(text, *words, timeout_s=timeout_s, source=source, sink=kept.feed), kept

    def stream(self, text: str, *words: str, timeout_s: float, sink: Sink, source: Source = b"") -> int | None:
        with self._attached(["bash", "-c", text, "bash", *words], {"LC_ALL": "C"}, source, sink) as attached:
            if self._ended(attached, timeout_s):
                return self._exit_code(attached)
            self._settle()
            return None

    def command(
        self,
        argv: Sequence[str],
        *,
        cwd: str,
        env: Mapping[str, str],
        stdin: bytes,
        timeout_s: float,
        output_bytes: int,
        cut: threading.Event,
    ) -> ExecResult:
        """A command of the agent; every process that it started is gone afterwards."""
        kept = Capture(output_bytes)
        with self._attached(["bash", "-c", _RUN, "bash", cwd, *argv], env, stdin, kept.feed, cut) as attached:
            ended = self._ended(attached, timeout_s)
            seconds = time.monotonic() - attached.began
            oom, full = self._settle()
            if not ended:  # what it had printed is still on its way
                cut.clear()
                self._ended(attached, time.monotonic() - attached.began + _GRACE_S)
            code = self._exit_code(attached) if ended else None
        return ExecResult(code, kept.text(), kept.total, kept.truncated, code is None, oom, full, seconds)

    @contextlib.contextmanager
    def _attached(
        self,
        words: Sequence[str],
        env: Mapping[str, str],
        source: Source,
        sink: Sink,
        cut: threading.Event | None = None,
    ) -> Iterator[C]:
        """A started command."""
        try:
            attached = self._engine.begin(self._name, words, env, source, sink, cut or threading.Event())
        except SandboxError as error:
            raise self._explained(error) from error
        try:
            yield attached
        finally:
            attached.close()

    def _ended(self, attached: C, timeout_s: float) -> bool:
        try:
            ended = attached.ended(timeout_s, start_s=_START_S)
        except TimeoutError as error:
            raise BackendDown(f"{self._name}: {error}") from error
        if not attached.began:
            said = attached.complaint.decode(errors="replace").strip()
            raise self._explained(SandboxError(f"{self._name}: the engine started no command: {said or 'no reason'}"))
        return ended

    def _exit_code(self, attached: C) -> int:
        """128 + n where signal n ended it."""
        deadline = time.monotonic() + _GRACE_S
        while (code := self._engine.exit_code(self._name, attached)) is None:
            if time.monotonic() > deadline:
                raise BackendDown(f"{self._name}: no exit code {_GRACE_S:.0f} s after the end of a command")
            time.sleep(0.005)
        return code

    def _settle(self) -> tuple[bool, bool]:
        """Kill every process of the agent; whether memory ran out since the last time, and whether a disk is full.

        A swarm can leave no process for this one, and one that kills whatever appears can defend itself; the first
        process, which they cannot reach, then does it. What still cannot be settled is destroyed.
        """
        deadline = time.monotonic() + _GRACE_S
        words = ["bash", "-c", _SETTLE, "bash", *self._places]
        while not (facts := self._facts(words, deadline - time.monotonic())):
            if time.monotonic() > deadline:
                self.remove()
                raise SandboxLost(f"{self._name}: its processes could not be killed in {_GRACE_S:.0f} s")
            try:
                self._engine.kill_all(self._name)
            except SandboxError as error:
                raise self._explained(error) from error
        kills = sum(int(words[1]) for words in facts if words[0] == b"oom_kill")
        oom, self._kills = kills > self._kills, kills
        return oom, any(b"0" in words[1:] for words in facts if words[0] == b"free")

    def _facts(self, words: Sequence[str], timeout_s: float) -> list[list[bytes]]:
        """What settling says, word by word; nothing if it did not come to its end."""
        said, enough = bytearray(), threading.Event()

        def listen(data: bytes) -> None:
            said.extend(data)
            if said.endswith(_SETTLED):
                enough.set()  # the engine tells of no end while a killed command's output is unread

        try:
            with self._attached(words, {}, b"", listen, enough) as attached:
                self._ended(attached, max(1.0, timeout_s))
        except (SandboxLost, BackendDown):
            raise
        except SandboxError:
            return []
        return [bytes(line).split() for line in said.splitlines() if line] if enough.is_set() else []

    def _explained(self, error: SandboxError) -> SandboxError:
        """What is wrong, if it is that the container is no more."""
        if isinstance(error, BackendDown):
            return error
        if time.monotonic() > self._until:
            return SandboxLost(f"{self._name}: its life is over")
        if fate := self._engine.fate(self._name):
            return SandboxLost(f"{self._name}: {fate}")
        return SandboxLost(f"{self._name}: it has ended") if isinstance(error, SandboxLost) else error
