"""Sandboxes of a Docker engine: containers without network, rights or writable disk.

An image is a reference that the engine knows. Its working directory (of the spec, /testbed unless told otherwise) holds
the repository with `.git`, whose HEAD is the base; it brings bash, GNU tar, coreutils and findutils, git, and a
`python` or `python3` with pytest. Its start-up command, health check and volumes are not used.

Everything runs as the agent, a user who owns nothing of the image. The root is read-only; what can be written is a
tmpfs, bounded and counted as memory: the working directory (filled with a copy of the image's, which is not counted),
/tmp, /home/agent and /dev/shm share `disk_mb` as 4 : 2 : 1 : 1. The first process sleeps until the sandbox's life is
over, as a user whom the agent cannot reach, so a container ends even if everyone here is dead.

Engines are reached by a Unix socket or plain TCP (DOCKER_HOST), as their root's equals: never let an agent see one.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import math
import mmap
import os
import socket
import tarfile
import tempfile
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

from entropo_ray.sandbox import (
    BackendDown,
    CapacityError,
    ExecResult,
    ImageMissing,
    Limits,
    Patch,
    Sandbox,
    SandboxError,
    SandboxLost,
    SandboxSpec,
    cgroup,
    patch,
)
from entropo_ray.sandbox.attached import GATE, Attached, Sink, Source
from entropo_ray.sandbox.output import Capture
from entropo_ray.sandbox.stage import AGENT, INODES
from entropo_ray.sandbox.words import unspeakable

T = TypeVar("T")

_KEEPER = AGENT + 1  # user of the first process
_ANSWER_S = 60.0  # one request to the engine
_START_S = 60.0  # from there until a command begins
_FILL_S = 300.0
_GRACE_S = 20.0  # for the end of what was killed
_LATE_S = 60  # past its deadline, a container is anyone's to remove
_SEEDS = 8  # work trees kept in temporary files
_OPEN_FILES = 4096
_WORD_BYTES, _WORDS_BYTES = (128 << 10) - 1, 1 << 20  # the kernel's bounds of one argument, and (half) of all
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_NAMES = "/opt/entropo"  # holds `python` where the image has only python3
_ENV = {
    "HOME": "/home/agent",
    "USER": "agent",
    "LANG": "C.UTF-8",
    "TZ": "UTC",
    "TERM": "dumb",
    "PAGER": "cat",
    "GIT_PAGER": "cat",
    "GIT_AUTHOR_NAME": "agent",
    "GIT_AUTHOR_EMAIL": "agent@localhost",
    "GIT_COMMITTER_NAME": "agent",
    "GIT_COMMITTER_EMAIL": "agent@localhost",
    "PYTHONHASHSEED": "0",
    "PYTHONDONTWRITEBYTECODE": "1",
}

# an ignored SIGCHLD outlives exec: the kernel then buries whom nobody waits for, and no fork is needed to stay alive
_KEEP = f"""
command -v python >/dev/null || ln -s "$(command -v python3)" {_NAMES}/python
trap '' CHLD
exec sleep "$1"
"""
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
_FILL = f"""{GATE}
exec tar -xpf - -C "$1" 2>&1
"""
_READ = f"""{GATE}
[ ! -e "$1" ] || [ -f "$1" ] || {{ [ -d "$1" ] && echo ': Is a directory' || echo ': Invalid argument'; exit 1; }}
[ -f "$1" ] && size=$(stat -L -c %s -- "$1") && [ "$size" -gt "$2" ] && echo "$size" && exit 3
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


@dataclass(frozen=True)
class Seed:
    """The work directory of an image, as a tar in a nameless file."""

    tar: mmap.mmap
    size: int  # bytes that it takes of a tmpfs
    inodes: int


@dataclass(frozen=True)
class Image:
    id: str
    path: str  # its PATH, and ours after it
    volumes: tuple[str, ...]


@contextlib.contextmanager
def _asking(what: str, *, missing: type[SandboxError] = SandboxLost) -> Iterator[None]:
    """Trouble of the engine as trouble of ours."""
    from docker import errors

    try:
        yield
    except errors.NotFound as error:
        raise missing(f"{what}: {error.explanation}") from error
    except errors.APIError as error:
        text = f"{what}: {error.explanation or error}"
        if error.status_code == 409:
            raise SandboxLost(text) from error
        room = ("no space left", "cannot allocate memory", "resource temporarily unavailable", "too many open files")
        raise (CapacityError if any(words in text.lower() for words in room) else SandboxError)(text) from error
    except (errors.DockerException, OSError) as error:
        raise BackendDown(f"{what}: the Docker engine does not answer: {error}") from error


class Engine:
    """One engine, and what this process knows of its images. From any thread."""

    def __init__(self) -> None:
        import docker

        self.owner = os.getpid()
        with _asking("looking for a Docker engine (DOCKER_HOST names it, else the default socket)"):
            self.client = docker.from_env(timeout=int(_ANSWER_S), max_pool_size=64)
            self.client.ping()
        address = self.client.api.base_url
        if not address.startswith(("http+docker://localhost", "http://")):
            raise BackendDown(f"DOCKER_HOST={address}: give a Unix socket or plain TCP; input cannot end through this")
        self._seeds: OrderedDict[tuple[str, str], Seed] = OrderedDict()
        self._seeding = threading.Lock()
        with contextlib.suppress(SandboxError):
            self.reap()

    def image(self, spec: SandboxSpec) -> Image:
        with _asking(f"image {spec.image}", missing=ImageMissing):
            facts = self._found(spec.image).attrs
        configured = facts.get("Config") or {}
        variables = dict(word.partition("=")[::2] for word in configured.get("Env") or ())
        path = f"{variables.get('PATH') or _PATH}:{_NAMES}"
        return Image(facts["Id"], path, tuple(configured.get("Volumes") or ()))

    def _found(self, reference: str) -> Any:
        from docker import errors

        try:
            return self.client.images.get(reference)
        except errors.APIError as error:
            if error.status_code in (400, 404):  # no such image, or no reference at all
                raise ImageMissing(f"{reference}: no such repository layer (a Docker image of this engine)") from error
            raise

    def seed(self, image: Image, spec: SandboxSpec) -> Seed:
        """The work directory of an image. ImageMissing if it holds no repository."""
        key = (image.id, spec.workdir)
        with self._seeding:
            if key not in self._seeds:
                self._seeds[key] = self._fetch(image, spec)
            self._seeds.move_to_end(key)
            if len(self._seeds) > _SEEDS:
                self._seeds.popitem(last=False)
            return self._seeds[key]

    def _fetch(self, image: Image, spec: SandboxSpec) -> Seed:
        from docker import errors

        labels = _labels(spec, "seed", _FILL_S)
        with _asking(f"work directory of image {spec.image}"), tempfile.TemporaryFile() as file:
            source = self.client.containers.create(image.id, command=["true"], network_mode="none", labels=labels)
            try:
                stream, _ = self.client.api.get_archive(source.id, f"{spec.workdir}/.")
                for chunk in stream:
                    file.write(chunk)
            except errors.NotFound:
                stream = None
            finally:
                source.remove(force=True, v=True)
            seed = _measured(file) if stream is not None else None
        if seed is None:
            raise ImageMissing(f"{spec.image}: no such repository layer (an image whose {spec.workdir} holds .git)")
        return seed

    def create(self, name: str, **settings: Any) -> None:
        """Make a container and start it; one that fails half-way is removed, or left to the reaper."""
        with _asking(f"creating {name}", missing=ImageMissing):
            try:
                self.client.containers.create(name=name, **settings)
                self.client.api.start(name)
            except BaseException:
                self.remove(name)
                raise

    def remove(self, name: str) -> None:
        """Idempotent, never raises: what stays is labelled, and its deadline passes."""
        with contextlib.suppress(SandboxError), _asking(f"removing {name}"):
            self.client.api.remove_container(name, force=True, v=True)

    def reap(self) -> int:
        """Remove containers of ours whose owner is dead or whose deadline is past; their number."""
        with _asking("looking for left containers"):
            found = self.client.api.containers(all=True, filters={"label": "entropo.owner"})
        left = [container["Id"] for container in found if not _in_use(container["Labels"])]
        for name in left:
            self.remove(name)
        return len(left)


def _measured(file: IO[bytes]) -> Seed | None:
    """The archive in `file`; None if no repository is in it."""
    file.flush()
    file.seek(0)
    size = inodes = 0
    repository = False
    with tarfile.open(fileobj=file, mode="r:") as archive:
        for member in archive:
            inodes += 1
            size += -(-member.size // mmap.PAGESIZE) * mmap.PAGESIZE if member.isreg() else 0
            repository |= member.isdir() and os.path.normpath(member.name) == ".git"
    return Seed(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), size, inodes) if repository else None


def _host() -> str:
    """Names a boot of a machine: owners are judged only where they could be seen."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _labels(spec: SandboxSpec, role: str, life_s: float) -> dict[str, str]:
    """What a container is known by from the moment of its creation."""
    given = {f"entropo.{key}": value for key, value in spec.labels.items()}
    ours = {"entropo.owner": cgroup.label(os.getpid()), "entropo.host": _host()}
    ours["entropo.deadline"] = str(math.ceil(time.time() + life_s) + _LATE_S)
    return {"entropo.role": role, **given, **ours}


def _in_use(labels: Mapping[str, str]) -> bool:
    deadline = labels.get("entropo.deadline", "")
    if deadline.isdigit() and int(deadline) < time.time():
        return False
    return labels.get("entropo.host") != _host() or cgroup.alive(labels["entropo.owner"])


_engines: list[Engine] = []
_starting = threading.Lock()


def engine() -> Engine:
    """The engine of this process. BackendDown says what was looked for when there is none."""
    with _starting:
        if not (_engines and _engines[0].owner == os.getpid()):
            _engines[:] = [Engine()]
        return _engines[0]


class Machine:
    """One running container; its methods block."""

    def __init__(self, engine: Engine, name: str, places: Sequence[str], life_s: float) -> None:
        self._engine, self._name, self._places = engine, name, places
        self._until = time.monotonic() + life_s
        self._kills = 0

    def remove(self) -> None:
        self._engine.remove(self._name)

    def script(
        self, text: str, *words: str, timeout_s: float, source: Source = b"", output_bytes: int = 1 << 16
    ) -> tuple[int, Capture]:
        """One of our scripts to its end, which nothing of it outlives. SandboxError if it takes too long."""
        kept = Capture(output_bytes)
        return self.stream(text, *words, timeout_s=timeout_s, source=source, sink=kept.feed), kept

    def stream(self, text: str, *words: str, timeout_s: float, sink: Sink, source: Source = b"") -> int:
        with self._attached(["bash", "-c", text, "bash", *words], {"LC_ALL": "C"}, source, sink) as (attached, key):
            if not self._ended(attached, timeout_s):
                self._settle()
                raise SandboxError(f"{self._name}: a script of ours took more than {timeout_s:.0f} s")
            return self._exit_code(key)

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
        with self._attached(["bash", "-c", _RUN, "bash", cwd, *argv], env, stdin, kept.feed, cut) as (attached, key):
            ended = self._ended(attached, timeout_s)
            oom, full = self._settle()
            if not ended:
                cut.clear()
                self._ended(attached, time.monotonic() - attached.began + _GRACE_S)
            code = self._exit_code(key) if ended else None
            seconds = time.monotonic() - attached.began
        return ExecResult(code, kept.text(), kept.total, kept.truncated, code is None, oom, full, seconds)

    @contextlib.contextmanager
    def _attached(
        self,
        words: Sequence[str],
        env: Mapping[str, str],
        source: Source,
        sink: Sink,
        cut: threading.Event | None = None,
    ) -> Iterator[tuple[Attached, str]]:
        """A started command and its key."""
        api, user = self._engine.client.api, f"{AGENT}:{AGENT}"
        try:
            with _asking(self._name):
                key = api.exec_create(
                    self._name, list(words), stdin=True, stderr=False, user=user, environment=dict(env), workdir="/"
                )["Id"]
                stream = api.exec_start(key, socket=True)
        except SandboxError as error:
            raise self._explained(error) from error
        attached = Attached(socket.socket(fileno=os.dup(stream.fileno())), source, sink, cut or threading.Event())
        try:
            yield attached, key
        finally:
            attached.close()
            stream.close()

    def _ended(self, attached: Attached, timeout_s: float) -> bool:
        try:
            ended = attached.ended(timeout_s, start_s=_START_S)
        except TimeoutError as error:
            raise BackendDown(f"{self._name}: {error}") from error
        if not attached.began:
            said = attached.complaint.decode(errors="replace").strip()
            raise self._explained(SandboxError(f"{self._name}: the engine started no command: {said or 'no reason'}"))
        return ended

    def _exit_code(self, key: str) -> int:
        """128 + n where signal n ended it."""
        deadline = time.monotonic() + _GRACE_S
        with _asking(self._name):
            while (facts := self._engine.client.api.exec_inspect(key))["Running"] or facts["ExitCode"] is None:
                if time.monotonic() > deadline:
                    raise BackendDown(f"{self._name}: no exit code {_GRACE_S:.0f} s after the end of a command")
                time.sleep(0.005)
        return int(facts["ExitCode"])

    def _settle(self) -> tuple[bool, bool]:
        """Kill every process of the agent; whether memory ran out since the last time, and whether a disk is full.

        A swarm of processes can leave none for this one, for a while. What cannot be settled is destroyed.
        """
        deadline = time.monotonic() + _GRACE_S
        words = ["bash", "-c", _SETTLE, "bash", *self._places]
        while not (facts := self._facts(words, deadline - time.monotonic())):
            if time.monotonic() > deadline:
                self.remove()
                raise SandboxLost(f"{self._name}: its processes could not be killed in {_GRACE_S:.0f} s")
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
            with self._attached(words, {}, b"", listen, enough) as (attached, _):
                self._ended(attached, max(1.0, timeout_s))
        except (SandboxLost, BackendDown):
            raise
        except SandboxError:
            return []
        return [line.split() for line in said.splitlines()] if enough.is_set() else []

    def _explained(self, error: SandboxError) -> SandboxError:
        """What is wrong, if it is that the container is no more."""
        if isinstance(error, BackendDown):
            return error
        if time.monotonic() > self._until:
            return SandboxLost(f"{self._name}: its life is over")
        try:
            with _asking(self._name):
                running = self._engine.client.api.inspect_container(self._name)["State"]["Running"]
        except SandboxError as found:
            return found
        return error if running and not isinstance(error, SandboxLost) else SandboxLost(f"{self._name}: it has ended")


_threads = ThreadPoolExecutor(256, thread_name_prefix="docker")  # each mostly waits for one command


async def _threaded(work: Callable[[], T], cut: threading.Event | None = None) -> T:
    """What blocks, in a thread of its own; whoever is cancelled waits until it is over, so that nothing is left."""
    future = asyncio.get_running_loop().run_in_executor(_threads, work)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        if cut is not None:
            cut.set()
        await asyncio.wait([future])
        if not future.cancelled():
            future.exception()  # nobody is left to hear it
        raise


class Docker:
    """One sandbox; see Sandbox for what its methods promise."""

    def __init__(self, spec: SandboxSpec) -> None:
        self._spec = spec
        self._until = time.monotonic() + spec.limits.life_s
        self._turn = asyncio.Lock()
        self._machine: Machine | None = None
        self._closed = False

    async def open(self) -> None:
        await _threaded(self._open)

    def _open(self) -> None:
        before, self._machine = self._machine, _agents(engine(), self._spec, self._until - time.monotonic())
        if before is not None:
            before.remove()

    def _running(self) -> Machine:
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
            return await _threaded(run, cut)

    def _path(self, path: str) -> str:
        return os.path.join(self._spec.workdir, path)  # noqa: PTH118 (a path inside, perhaps with ..)

    async def read(self, path: str, limit: int = 1 << 20) -> bytes:
        code, kept = await self._file(_READ, path, str(limit), output_bytes=limit + (1 << 16))
        if code == 3:
            raise ValueError(f"{path}: {int(kept.text())} bytes, more than the limit of {limit}")
        if code:
            raise _os_error(kept.text(), path)
        return kept.text()

    async def write(self, path: str, data: bytes, mode: int = 0o644) -> None:
        code, kept = await self._file(_WRITE, path, f"{mode:o}", source=data)
        if code:
            raise _os_error(kept.text(), path)

    async def _file(
        self, script: str, path: str, word: str, *, source: bytes = b"", output_bytes: int = 1 << 16
    ) -> tuple[int, Capture]:
        whole = self._path(path)
        if unspeakable([path]):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        async with self._turn:
            run = functools.partial(self._running().script, script, whole, word, timeout_s=self._spec.limits.exec_s)
            return await _threaded(functools.partial(run, source=source, output_bytes=output_bytes))

    async def extract_patch(self) -> Patch:
        """In a container of its own, made of the image: nothing of ours runs git where the agent was."""
        async with self._turn:
            clean = await _threaded(functools.partial(_clean, engine(), self._spec))
            try:
                await _threaded(functools.partial(self._copy_tree, self._running(), clean))
                return await patch.extract(functools.partial(self._run_clean, clean))
            finally:
                await asyncio.shield(_threaded(clean.remove))

    def _copy_tree(self, machine: Machine, clean: Machine) -> None:
        """A tree that cannot be copied is not there, and so unreadable."""
        wait_s = self._spec.limits.exec_s
        with tempfile.TemporaryFile() as file:
            if machine.stream(_PACK, self._spec.workdir, timeout_s=wait_s, sink=file.write) == 0:
                file.flush()
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as tree:
                    clean.script(_UNPACK, _TREE, timeout_s=wait_s, source=tree)

    async def _run_clean(self, clean: Machine, script: str, stdin: bytes, output_bytes: int) -> ExecResult:
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
        return await _threaded(run)

    async def reset(self) -> None:
        async with self._turn:
            self._running()
            await _threaded(self._open)

    async def close(self) -> None:
        if not self._closed:
            self._closed = True
            if self._machine is not None:
                await _threaded(self._machine.remove)


_TREE = "/tmp/tree"


def _agents(engine: Engine, spec: SandboxSpec, life_s: float) -> Machine:
    """A container with the image's work directory in it, the agent's to change."""
    image = engine.image(spec)
    seed = engine.seed(image, spec)
    eighth = (spec.limits.disk_mb << 20) // 8
    places = {spec.workdir: 4 * eighth + seed.size, "/tmp": 2 * eighth, "/home/agent": eighth}
    machine = _start(engine, spec, image, "rollout", places, life_s=life_s, more=seed)
    try:
        code, said = machine.script(_FILL, spec.workdir, timeout_s=_FILL_S, source=seed.tar)
        if code:
            raise SandboxError(f"{spec.image}: {spec.workdir} cannot be copied: {said.text().decode(errors='replace')}")
    except BaseException:
        machine.remove()
        raise
    return machine


def _clean(engine: Engine, spec: SandboxSpec) -> Machine:
    """A container with room for a copy of a work tree and the objects of its changes."""
    image = engine.image(spec)
    seed = engine.seed(image, spec)
    room = Seed(seed.tar, 2 * seed.size + (4 * spec.limits.disk_mb << 20), 2 * (seed.inodes + INODES))
    return _start(
        engine, spec, image, "extract", {"/tmp": room.size}, life_s=4 * spec.limits.exec_s + _FILL_S, more=room
    )


def _start(
    engine: Engine,
    spec: SandboxSpec,
    image: Image,
    role: str,
    places: Mapping[str, int],
    *,
    life_s: float,
    more: Seed,
) -> Machine:
    """A container that lives for `life_s`, with these writable places and `more` memory and files than the limits."""
    name = f"entropo-{uuid.uuid4().hex[:16]}"
    bounds = spec.limits
    if life_s <= 0:
        raise SandboxLost(f"{name}: its life is over")
    labels = _labels(spec, role, life_s)
    if role == "extract":
        labels["entropo.role"] = role
    small = dict.fromkeys(image.volumes, 1 << 20)
    engine.create(
        name,
        image=image.id,
        entrypoint=["bash", "-c", _KEEP, "bash", f"{life_s:.3f}"],
        labels=labels,
        user=f"{_KEEPER}:{_KEEPER}",
        working_dir="/",
        hostname="sandbox",
        environment={**_ENV, **spec.env, "PATH": image.path},
        tmpfs={place: _tmpfs(size, AGENT, INODES + more.inodes) for place, size in {**small, **places}.items()}
        | {_NAMES: _tmpfs(1 << 12, _KEEPER, 8)},
        shm_size=(bounds.disk_mb << 20) // 8,
        **_walls(bounds, bounds.memory_mb + (more.size >> 20) + 1),
    )
    return Machine(engine, name, [*places, "/dev/shm"], life_s)


def _tmpfs(size: int, owner: int, inodes: int) -> str:
    return f"rw,exec,nosuid,nodev,size={-(-size // 1024)}k,nr_inodes={inodes},uid={owner},gid={owner},mode=755"


def _walls(bounds: Limits, memory_mb: int) -> dict[str, Any]:
    """What keeps an agent in."""
    from docker.types import LogConfig, Ulimit

    file_bytes = bounds.disk_mb << 20
    return {
        "network_mode": "none",
        "read_only": True,
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges"],
        "mem_limit": f"{memory_mb}m",
        "memswap_limit": f"{memory_mb}m",
        "pids_limit": bounds.pids,
        "ulimits": [
            Ulimit(name="core", soft=0, hard=0),
            Ulimit(name="fsize", soft=file_bytes, hard=file_bytes),
            Ulimit(name="nofile", soft=_OPEN_FILES, hard=_OPEN_FILES),
        ],
        "oom_score_adj": 500,  # when the whole machine runs short, sandboxes die first
        "auto_remove": True,
        "stop_signal": "SIGKILL",
        "healthcheck": {"test": ["NONE"]},
        "log_config": LogConfig(type="none"),
    }


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


@contextlib.asynccontextmanager
async def open_docker(spec: SandboxSpec) -> AsyncIterator[Sandbox]:
    sandbox = Docker(spec)
    try:
        await sandbox.open()
        yield sandbox
    finally:
        await asyncio.shield(sandbox.close())


def reap() -> int:
    """Remove what dead owners left in the engine, and what is past its deadline; the number of containers."""
    return engine().reap()


def probe() -> list[str]:
    """What this engine lacks, one sentence each."""
    try:
        with _asking("facts of the engine"):
            facts = engine().client.info()
    except SandboxError as error:
        return [f"docker: {error}"]
    security = " ".join(facts.get("SecurityOptions") or ())
    missing = [
        (facts.get("MemoryLimit"), "the engine cannot limit memory, and so not the disk either, which lies in memory"),
        (facts.get("SwapLimit"), "the engine cannot limit swap: a sandbox may use more than its memory"),
        (facts.get("PidsLimit"), "the engine cannot limit processes"),
        ("seccomp" in security, "the engine filters no system calls"),
        (
            facts.get("Driver") != "vfs",
            "storage driver vfs copies the whole image for every sandbox; start the engine with overlay2",
        ),
    ]
    return [f"docker: {sentence}" for holds, sentence in missing if not holds]
