"""Sandboxes of a Docker engine: containers without network, rights or writable disk.

An image is a reference that the engine knows. Its working directory (of the spec, /testbed unless told otherwise) holds
the repository with `.git`, whose HEAD is the base; it brings bash, GNU tar, coreutils and findutils, git, and a
`python` or `python3` with pytest. Its start-up command, health check and volumes are not used.

Everything runs as the agent, a user who owns nothing of the image. The root is read-only; what can be written is a
tmpfs, bounded and counted as memory: the working directory (filled with a copy of the image's, which is not counted),
/tmp, /home/agent and /dev/shm share `disk_mb` as 4 : 2 : 1 : 1. The first process starts commands, and kills what they
leave. It is told so over one connection: when that ends, as with its owner, or the sandbox's life, the container does.

Engines are reached by a Unix socket or plain TCP (DOCKER_HOST), as their root's equals: never let an agent see one.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import mmap
import os
import socket
import tarfile
import tempfile
import threading
import uuid
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import IO, Any

from entropo_ray.sandbox import (
    BackendDown,
    CapacityError,
    ImageMissing,
    Limits,
    Sandbox,
    SandboxError,
    SandboxLost,
    SandboxSpec,
    keeper,
    marks,
)
from entropo_ray.sandbox.attached import Sink, Source
from entropo_ray.sandbox.container import Container, threaded
from entropo_ray.sandbox.hosts import Hosts
from entropo_ray.sandbox.keeper import ENV, NAMES, OPEN_FILES
from entropo_ray.sandbox.line import Exchanged, Line
from entropo_ray.sandbox.machine import Machine
from entropo_ray.sandbox.stage import AGENT, INODES

_ANSWER_S = 60.0  # one request to the engine
_FILL_S = 300.0
_END_S = 5.0  # until a container is removed whose first process was left
_SEEDS = 8  # work trees kept in temporary files
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_NO_ROOM = ("no space left", "cannot allocate memory", "resource temporarily unavailable", "too many open files")


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
def asking(what: str, *, missing: type[SandboxError] = SandboxLost) -> Iterator[None]:
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
        raise (CapacityError if _no_room(text) else SandboxError)(text) from error
    except (errors.DockerException, OSError) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EMFILE, errno.ENOMEM):  # here, not there
            raise CapacityError(f"{what}: {error}") from error
        raise BackendDown(f"{what}: the Docker engine does not answer: {error}") from error


def _no_room(text: str) -> bool:
    return any(words in text.lower() for words in _NO_ROOM)


class Engine:
    """One engine, and what this process knows of its images. From any thread."""

    def __init__(self) -> None:
        import docker

        self.owner = os.getpid()
        with asking("looking for a Docker engine (DOCKER_HOST names it, else the default socket)"):
            self.client = docker.from_env(timeout=int(_ANSWER_S), max_pool_size=64)
            self.client.ping()
        address = self.client.api.base_url
        if not address.startswith(("http+docker://localhost", "http://")):
            raise BackendDown(f"DOCKER_HOST={address}: give a Unix socket or plain TCP")
        self._seeds: OrderedDict[tuple[str, str], Seed] = OrderedDict()
        self._seeding = threading.Lock()
        self._lines: dict[str, Line] = {}
        self._hosts = Hosts(self.client.api)
        with contextlib.suppress(SandboxError):
            self.reap()

    def image(self, spec: SandboxSpec) -> Image:
        with asking(f"image {spec.image}", missing=ImageMissing):
            facts = self._found(spec.image).attrs
        configured = facts.get("Config") or {}
        variables = dict(word.partition("=")[::2] for word in configured.get("Env") or ())
        path = f"{variables.get('PATH') or _PATH}:{NAMES}"
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

        labels = marks.labels(replace(spec, labels={**spec.labels, "role": "seed"}), _FILL_S)
        with asking(f"work directory of image {spec.image}"), tempfile.TemporaryFile() as file:
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

    def agents(self, spec: SandboxSpec, life_s: float, cut: threading.Event) -> Machine[Exchanged]:
        """A container with the image's work directory in it, the agent's to change."""
        image = self.image(spec)
        seed = self.seed(image, spec)
        eighth = (spec.limits.disk_mb << 20) // 8
        places = {spec.workdir: 4 * eighth + seed.size, "/tmp": 2 * eighth, "/home/agent": eighth}
        settings = _settings(spec, image, seed, places, life_s, hosts=self._file_of_hosts(image), fill=spec.workdir)
        return self._start(settings, life_s, seed.tar)

    def clean(self, spec: SandboxSpec, cut: threading.Event) -> Machine[Exchanged]:
        """A container with room for a copy of a work tree and the objects of its changes."""
        image = self.image(spec)
        seed = self.seed(image, spec)
        room = Seed(seed.tar, 2 * seed.size + (4 * spec.limits.disk_mb << 20), 2 * (seed.inodes + INODES))
        places, life_s = {"/tmp": room.size}, 4 * spec.limits.exec_s + _FILL_S
        own = replace(spec, labels={**spec.labels, "role": "extract"}, env={})
        return self._start(_settings(own, image, room, places, life_s, hosts=self._file_of_hosts(image)), life_s)

    def _file_of_hosts(self, image: Image) -> str:
        with asking("a file of hosts"):
            return self._hosts.path(image.id)

    def _start(self, settings: dict[str, Any], life_s: float, tree: Source = b"") -> Machine[Exchanged]:
        """One that fails half-way is removed, or left to the reaper: it was labelled when it was made."""
        name = f"entropo-{uuid.uuid4().hex[:16]}"
        if life_s <= 0:
            raise SandboxLost(f"{name}: its life is over")
        try:
            with asking(f"creating {name}", missing=ImageMissing):
                self.client.containers.create(name=name, **settings)
                attached = self.client.api.attach_socket(name, params={"stdin": 1, "stdout": 1, "stream": 1})
                line = Line(_taken(attached))
                self.client.api.start(name)
            self._lines[name] = line
            machine = Machine(self, name, life_s)
            machine.fill(tree)
        except BaseException as error:
            self._hosts.missed(str(error))
            self.remove(name)
            raise
        return machine

    def begin(
        self, name: str, words: Sequence[str], env: Mapping[str, str], source: Source, sink: Sink, cut: threading.Event
    ) -> Exchanged:
        """Start a command as the agent."""
        return self._line(name).run(words, env, source, sink, cut)

    def ask(self, name: str, word: str, tree: Source, sink: Sink, cut: threading.Event) -> Exchanged:
        """Say a word, and then a tree, to the first process, which answers as soon as nobody else runs."""
        return self._line(name).ask(word, tree, sink, cut)

    def _line(self, name: str) -> Line:
        if (line := self._lines.get(name)) is None:
            raise SandboxLost(f"{name}: it was removed")
        return line

    def fate(self, name: str) -> str:
        """Why the container is no more; empty as long as it runs."""
        try:
            with asking(name):
                return "" if self.client.api.inspect_container(name)["State"]["Running"] else "it has ended"
        except SandboxLost:
            return "it has ended"

    def remove(self, name: str) -> None:
        """Idempotent, never raises: what stays is labelled, and its deadline passes."""
        if line := self._lines.pop(name, None):
            line.hang_up()
            with contextlib.suppress(SandboxError), asking(f"removing {name}"):
                self.client.api.wait(name, timeout=_END_S, condition="removed")
                return
        with contextlib.suppress(SandboxError), asking(f"removing {name}"):
            self.client.api.remove_container(name, force=True, v=True)

    def reap(self) -> int:
        """Remove containers of ours whose owner is dead or whose deadline is past; their number."""
        with asking("looking for left containers"):
            found = self.client.api.containers(all=True, filters={"label": "entropo.owner"})
            self._hosts.reap()
        left = [container["Id"] for container in found if not marks.in_use(container["Labels"])]
        for name in left:
            self.remove(name)
        return len(left)


def _taken(stream: Any) -> socket.socket:
    """A connection of ours alone."""
    connection = socket.socket(fileno=os.dup(stream.fileno()))
    stream.close()
    return connection


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


_engines: list[Engine] = []
_starting = threading.Lock()


def engine() -> Engine:
    """The engine of this process. BackendDown says what was looked for when there is none."""
    with _starting:
        if not (_engines and _engines[0].owner == os.getpid()):
            _engines[:] = [Engine()]
        return _engines[0]


def _settings(
    spec: SandboxSpec,
    image: Image,
    more: Seed,
    places: Mapping[str, int],
    life_s: float,
    *,
    hosts: str,
    fill: str = "",
) -> dict[str, Any]:
    """A container that lives for `life_s`, with these writable places and `more` room and files than the limits.

    It waits for the tar of `more` to `fill` a place with, if there is one.
    """
    from docker.types import Mount

    inodes = INODES + more.inodes
    wide = {**dict.fromkeys(image.volumes, 1 << 20), **places}  # a volume would be a disk without bounds
    return {
        "image": image.id,
        "entrypoint": keeper.words(life_s, [*places, "/dev/shm"], fill=fill, size=len(more.tar)),
        "stdin_open": True,
        "labels": marks.labels(spec, life_s),
        "user": f"{AGENT}:{AGENT}",
        "working_dir": "/",
        "hostname": "sandbox",
        "environment": {**ENV, **spec.env, "PATH": image.path},
        "tmpfs": {place: _tmpfs(size, inodes) for place, size in wide.items()} | {NAMES: _tmpfs(1 << 12, 8)},
        "shm_size": (spec.limits.disk_mb << 20) // 8,
        # the engine's own empty network takes it half of the time of a start; without, it mounts no file of hosts
        "network_disabled": True,
        "mounts": [Mount("/etc/hosts", hosts, type="bind", read_only=True)],
        **_walls(spec.limits, more),
    }


def _tmpfs(size: int, inodes: int) -> str:
    return f"rw,exec,nosuid,nodev,size={-(-size // 1024)}k,nr_inodes={inodes},uid={AGENT},gid={AGENT},mode=755"


def _walls(bounds: Limits, more: Seed) -> dict[str, Any]:
    """What keeps an agent in."""
    from docker.types import LogConfig, Ulimit

    memory_mb = bounds.memory_mb + (more.size >> 20) + 1
    file_bytes = (bounds.disk_mb << 20) + more.size
    return {
        "network_mode": "none",
        "read_only": True,
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges"],
        "mem_limit": f"{memory_mb}m",
        "memswap_limit": f"{memory_mb}m",
        "pids_limit": bounds.pids,
        "nano_cpus": int(bounds.cpu * 1e9),  # 0: no limit
        "ulimits": [
            Ulimit(name="core", soft=0, hard=0),
            Ulimit(name="fsize", soft=file_bytes, hard=file_bytes),
            Ulimit(name="nofile", soft=OPEN_FILES, hard=OPEN_FILES),
        ],
        "oom_score_adj": 500,  # when the whole machine runs short, sandboxes die first
        "auto_remove": True,
        "stop_signal": "SIGKILL",
        "healthcheck": {"test": ["NONE"]},
        "log_config": LogConfig(type="none"),
    }


@contextlib.asynccontextmanager
async def open_docker(spec: SandboxSpec) -> AsyncIterator[Sandbox]:
    if spec.site:  # a directory of this machine; the engine may be on another
        raise ImageMissing(f"{spec.site}: a Docker image brings its packages itself; give backend=bwrap")
    sandbox = Container(await threaded(engine), spec)
    try:
        await sandbox.open()
        yield sandbox
    finally:
        await asyncio.shield(sandbox.close())


def reap() -> int:
    """Remove what dead owners left in the engine, and what is past its deadline; the number of containers.

    An engine that does not answer keeps what it has.
    """
    try:
        return engine().reap()
    except BackendDown:
        return 0


def probe() -> list[str]:
    """What this engine lacks, one sentence each."""
    try:
        with asking("facts of the engine"):
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
