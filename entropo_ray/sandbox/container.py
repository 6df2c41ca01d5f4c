"""A sandbox of containers as the contract wants it: what blocks runs in threads; trees cross from one to another."""

from __future__ import annotations

import asyncio
import errno
import functools
import mmap
import os
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, Protocol, TypeVar

from entropo_ray.sandbox import ExecResult, Patch, SandboxLost, SandboxSpec, patch
from entropo_ray.sandbox.attached import GATE, Exchange
from entropo_ray.sandbox.machine import Machine
from entropo_ray.sandbox.output import Capture
from entropo_ray.sandbox.words import unspeakable

T = TypeVar("T")
C = TypeVar("C", bound=Exchange)

_WORD_BYTES, _WORDS_BYTES = (128 << 10) - 1, 1 << 20  # the kernel's bounds of one argument, and (half) of all
_TREE = "/tmp/tree"  # in a clean container
_OVER_LIMIT = 3
_READ = f"""{GATE}
[ ! -e "$1" ] || [ -f "$1" ] || {{ [ -d "$1" ] && echo ': Is a directory' || echo ': Invalid argument'; exit 1; }}
[ -f "$1" ] && size=$(stat -L -c %s -- "$1") && [ "$size" -gt "$2" ] && echo "$size" && exit {_OVER_LIMIT}
exec cat -- "$1" 2>&1
"""
_WRITE = f"""{GATE}
exec 2>&1
[ ! -e "$1" ] || [ -f "$1" ] || {{ [ -d "$1" ] && echo ': Is a directory' || echo ': Invalid argument'; exit 1; }}
mkdir -p -- "${{1%/*}}/" && cat > "$1" && chmod -- "$2" "$1"
"""
# names of what the agent may not read itself, then everything else; nothing runs meanwhile
_PACK = f"""{GATE}
cd -- "$1" || exit 1
find . -path ./.git -prune -o ! -type l \\( ! -readable -o -type d ! -executable \\) -printf '%y%p\\0'
printf '\\0'
tar -cf - --format=posix --sparse --ignore-failed-read --anchored --exclude=./.git .
[ $? -le 1 ]
"""
_UNPACK = (
    GATE
    + r"""
closed=()
while IFS= read -r -d '' name && [ "$name" ]; do closed+=("$name"); done
mkdir "$1.part" && cd "$1.part" || exit 1
for name in "${closed[@]}"; do
    path=${name:1}
    if [ "${name:0:1}" = d ]; then mkdir -p -- "$path"; else mkdir -p -- "${path%/*}" && : > "$path"; fi
    chmod 0 -- "$path" || exit 1
done
tar -xpf - && mv "$1.part" "$1"
"""
)


@functools.cache
def _threads(process: int) -> ThreadPoolExecutor:
    """Of one process, for a fork has none of them; each mostly waits for one command."""
    return ThreadPoolExecutor(256, thread_name_prefix=f"sandbox-{process}")


async def threaded(work: Callable[[], T], cut: threading.Event | None = None) -> T:
    """What blocks, in a thread of its own; whoever is cancelled waits until it is over, so that nothing is left."""
    future = asyncio.get_running_loop().run_in_executor(_threads(os.getpid()), work)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        if cut is not None:
            cut.set()
        await asyncio.wait([future])
        if not future.cancelled():
            future.exception()  # nobody is left to hear it
        raise


class Maker(Protocol[C]):
    """What makes containers; its methods block, as long as `cut` is not set, and raise SandboxError."""

    def agents(self, spec: SandboxSpec, life_s: float, cut: threading.Event) -> Machine[C]:
        """A container with the image's work directory in it, the agent's to change."""

    def clean(self, spec: SandboxSpec, cut: threading.Event) -> Machine[C]:
        """A container with room for a copy of a work tree and the objects of its changes."""


class Container(Generic[C]):
    """One sandbox; see Sandbox for what its methods promise."""

    def __init__(self, maker: Maker[C], spec: SandboxSpec) -> None:
        self._maker, self._spec = maker, spec
        self._until = time.monotonic() + spec.limits.life_s
        self._turn = asyncio.Lock()
        self._machine: Machine[C] | None = None
        self._closed = False

    async def open(self) -> None:
        cut = threading.Event()
        await threaded(functools.partial(self._open, cut), cut)

    def _open(self, cut: threading.Event) -> None:
        before, self._machine = self._machine, self._maker.agents(self._spec, self._until - time.monotonic(), cut)
        if before is not None:
            before.remove()
        if self._closed:  # by someone who did not wait
            self._machine.remove()

    def _running(self) -> Machine[C]:
        if self._machine is None or self._closed:
            raise SandboxLost("the sandbox was closed")
        return self._machine

    async def exec(
        self,
        cmd: str | Sequence[str],
        *,
        timeout: float | None = None,  # noqa: ASYNC109 (kills the command, which cancelling the wait does not report)
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        stdin: bytes | None = None,
        output_bytes: int | None = None,
    ) -> ExecResult:
        argv = ["bash", "-c", cmd] if isinstance(cmd, str) else list(cmd)
        bounds, variables = self._spec.limits, dict(env or {})
        place = self._path(cwd or ".")
        if complaint := _unfit([place, *argv, *variables, *variables.values()]):
            return ExecResult(126, complaint, len(complaint), False, False, False, False, 0.0)
        cut = threading.Event()
        async with self._turn:
            run = functools.partial(
                self._running().command,
                argv,
                cwd=place,
                env=variables,
                stdin=stdin or b"",
                timeout_s=bounds.exec_s if timeout is None else timeout,
                output_bytes=bounds.output_bytes if output_bytes is None else output_bytes,
                cut=cut,
            )
            return await threaded(run, cut)

    def _path(self, path: str) -> str:
        return os.path.join(self._spec.workdir, path)  # noqa: PTH118 (a path inside, perhaps with ..)

    async def read(self, path: str, limit: int = 1 << 20) -> bytes:
        code, kept = await self._file(_READ, path, str(limit), output_bytes=limit + (1 << 16))
        if code == _OVER_LIMIT:
            raise ValueError(f"{path}: {int(kept.text())} bytes, more than the limit of {limit}")
        if code != 0:
            raise _os_error(kept.text(), path)
        return kept.text()

    async def write(self, path: str, data: bytes, mode: int = 0o644) -> None:
        code, kept = await self._file(_WRITE, path, f"{mode:o}", source=data)
        if code != 0:
            raise _os_error(kept.text(), path)

    async def _file(
        self, script: str, path: str, word: str, *, source: bytes = b"", output_bytes: int = 1 << 16
    ) -> tuple[int | None, Capture]:
        whole = self._path(path)
        if unspeakable([path]):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        async with self._turn:
            run = functools.partial(self._running().script, script, whole, word, timeout_s=self._spec.limits.exec_s)
            return await threaded(functools.partial(run, source=source, output_bytes=output_bytes))

    async def extract_patch(self) -> Patch:
        """In a container of its own, made of the image: nothing of ours runs git where the agent was."""
        async with self._turn:
            cut = threading.Event()
            clean = await threaded(functools.partial(self._maker.clean, self._spec, cut), cut)
            try:
                await threaded(functools.partial(self._copy_tree, self._running(), clean))
                return await patch.extract(functools.partial(self._run_clean, clean))
            finally:
                await asyncio.shield(threaded(clean.remove))

    def _copy_tree(self, machine: Machine[C], clean: Machine[C]) -> None:
        """A tree that cannot be copied is not there, and so unreadable."""
        wait_s = self._spec.limits.exec_s
        with tempfile.TemporaryFile() as file:
            if machine.stream(_PACK, self._spec.workdir, timeout_s=wait_s, sink=file.write) == 0:
                file.flush()
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as tree:
                    clean.script(_UNPACK, _TREE, timeout_s=wait_s, source=tree)

    async def _run_clean(self, clean: Machine[C], script: str, stdin: bytes, output_bytes: int) -> ExecResult:
        scratch = f"/tmp/{uuid.uuid4().hex}"
        env = {"TREE": _TREE, "IMAGE": self._spec.workdir, "SCRATCH": scratch, "HOME": "/nonexistent"}
        run = functools.partial(
            clean.command,
            ["bash", "-c", f'mkdir "$SCRATCH"\n{script}'],
            cwd="/",
            env=env,
            stdin=stdin,
            timeout_s=self._spec.limits.exec_s,
            output_bytes=output_bytes,
            cut=threading.Event(),
        )
        return await threaded(run)

    async def reset(self) -> None:
        async with self._turn:
            self._running()
            await self.open()

    async def close(self) -> None:
        if not self._closed:
            self._closed = True
            if self._machine is not None:
                await threaded(self._machine.remove)


def _unfit(words: Sequence[str]) -> bytes:
    """What a shell would say of words that no program can be given; empty if one can."""
    if complaint := unspeakable(words):
        return complaint
    sizes = [len(os.fsencode(word)) for word in words]
    return b"bash: Argument list too long\n" if max(sizes) > _WORD_BYTES or sum(sizes) > _WORDS_BYTES else b""


_NUMBERS = {os.strerror(number): number for number in errno.errorcode}


def _os_error(said: bytes, path: str) -> OSError:
    """The error that a tool told in the C locale's words."""
    words = said.decode(errors="replace").strip().rpartition(": ")[2]
    number = _NUMBERS.get(words, errno.EIO)
    return OSError(number, os.strerror(number), path)
