"""One running container, seen from threads: commands of the agent, and scripts of ours.

A command runs below a shell that kills all else of its user when the command ends, so that its output ends too; since
the agent could have killed that shell, the first process then does the same again and tells of memory and disks.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Generic, Protocol, TypeVar

from entropo_ray.sandbox import BackendDown, ExecResult, SandboxError, SandboxLost
from entropo_ray.sandbox.attached import GATE, READY, Exchange, Sink, Source
from entropo_ray.sandbox.keeper import SETTLED
from entropo_ray.sandbox.output import Capture

C = TypeVar("C", bound=Exchange)
C_co = TypeVar("C_co", bound=Exchange, covariant=True)

_START_S = 60.0  # from a request until its command begins
_FILL_S = 300.0
_AGAIN_S = 30.0  # for a command that the engine could not start
_GRACE_S = 20.0  # for the end of what was killed
_ASK_S = 5.0  # an answer may be lost where a connection is cut

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


class Engine(Protocol[C_co]):
    """What runs containers; its methods block, and raise SandboxError."""

    def begin(
        self, name: str, words: Sequence[str], env: Mapping[str, str], source: Source, sink: Sink, cut: threading.Event
    ) -> C_co:
        """Start a command as the agent."""

    def fate(self, name: str) -> str:
        """Why the container is no more; empty as long as it runs."""

    def ask(self, name: str, word: str, tree: Source, sink: Sink, cut: threading.Event) -> C_co:
        """Say a word, and then a tree, to the first process, which answers as soon as nobody else runs."""

    def remove(self, name: str) -> None:
        """Idempotent, never raises."""


class Machine(Generic[C]):
    """One running container; its methods block."""

    def __init__(self, engine: Engine[C], name: str, life_s: float) -> None:
        self._engine, self._name = engine, name
        self._until = time.monotonic() + life_s
        self._kills = 0

    def fill(self, tree: Source = b"") -> None:
        """Before anything else: the first process takes the tree that it waits for, and gets out of reach."""
        self._asked(_FILL_S, tree)

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
        """A command that has begun."""
        attached = self._begun(words, env, source, sink, cut or threading.Event())
        try:
            yield attached
        finally:
            attached.close()

    def _begun(
        self, words: Sequence[str], env: Mapping[str, str], source: Source, sink: Sink, cut: threading.Event
    ) -> C:
        """Asked for again where the engine could not start it: without READY, nothing of it has run."""
        until = time.monotonic() + _AGAIN_S
        while True:
            try:
                attached = self._engine.begin(self._name, words, env, source, sink, cut)
            except SandboxError as error:
                raise self._explained(error) from error
            try:
                self._ended(attached, 0)
            finally:
                if not attached.began:
                    attached.close()
            if attached.began:
                return attached
            why = attached.complaint.decode(errors="replace").strip() or "its connection was cut"
            failed = self._explained(SandboxError(f"{self._name}: the engine started no command: {why}"))
            if isinstance(failed, SandboxLost) or attached.code is not None or cut.is_set():
                raise failed
            if time.monotonic() > until:
                raise SandboxLost(str(failed))
            time.sleep(random.uniform(0.2, 0.4))

    def _ended(self, attached: C, timeout_s: float) -> bool:
        try:
            return attached.ended(timeout_s, start_s=_START_S)
        except TimeoutError as error:
            raise BackendDown(f"{self._name}: {error}") from error

    def _exit_code(self, attached: C) -> int:
        """SandboxLost if it is not known: the command may still run."""
        if attached.code is None:
            why = self._engine.fate(self._name) or attached.complaint.decode(errors="replace")
            self.remove()
            raise SandboxLost(f"{self._name}: no exit code of a command: {why or 'its connection was cut'}")
        return attached.code

    def _settle(self) -> tuple[bool, bool]:
        """Kill every process of the agent; whether memory ran out since the last time, and whether a disk is full.

        A swarm could leave no process for another command, and one that kills whatever appears could keep it from its
        work; the first process they cannot reach. What cannot be settled is destroyed.
        """
        facts = [line.split() for line in self._asked(_GRACE_S).splitlines() if line]
        kills = sum(int(words[1]) for words in facts if words[0] == b"oom_kill")
        oom, self._kills = kills > self._kills, kills
        return oom, any(b"0" in words[1:] for words in facts if words[0] == b"free")

    def _asked(self, within_s: float, tree: Source = b"") -> bytes:
        """What the first process says once it has killed all others."""
        deadline = time.monotonic() + within_s
        while (said := self._answer(within_s if tree else _ASK_S, tree)) is None:
            if tree or time.monotonic() > deadline:
                self.remove()
                raise SandboxLost(f"{self._name}: its processes were not settled within {within_s:.0f} s")
        return said

    def _answer(self, patience_s: float, tree: Source) -> bytes | None:
        """None: nothing was heard, and it may be asked again."""
        word = uuid.uuid4().hex
        said, told = bytearray(), threading.Event()

        def listen(data: bytes) -> None:
            said.extend(data)
            if said.endswith(b"%s %s\n" % (SETTLED, word.encode())):
                told.set()

        try:
            asked = self._engine.ask(self._name, word, tree, listen, told)
        except SandboxError as error:
            raise self._explained(error) from error
        with contextlib.closing(asked), contextlib.suppress(TimeoutError):
            over = asked.ended(patience_s, start_s=patience_s)
            if told.is_set():
                return bytes(said).rpartition(READY)[2]  # before it may be an answer that was waited for in vain
            if over and tree and asked.complaint:
                what = asked.complaint.decode(errors="replace").strip()
                raise SandboxError(f"{self._name}: the work directory cannot be copied: {what}")
            if over and (fate := self._engine.fate(self._name)):
                raise self._explained(SandboxLost(f"{self._name}: {fate}"))
        return None

    def _explained(self, error: SandboxError) -> SandboxError:
        """What is wrong, if it is that the container is no more."""
        if isinstance(error, BackendDown):
            return error
        if time.monotonic() > self._until:
            return SandboxLost(f"{self._name}: its life is over")
        if fate := self._engine.fate(self._name):
            return SandboxLost(f"{self._name}: {fate}")
        return SandboxLost(f"{self._name}: it has ended") if isinstance(error, SandboxLost) else error
