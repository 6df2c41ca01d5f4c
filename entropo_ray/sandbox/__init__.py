"""Where commands of a policy run: the contract, and the one way to open a sandbox.

A command's failure, time-out, out-of-memory or full disk is a *result*. Only infrastructure raises (SandboxError), and
is never a failed answer. Every command stands alone: its working directory and variables end with it, and so does every
process that it started. Seen from inside: the repository at /testbed (copy-on-write), HOME=/home/agent, no network,
`python` (the interpreter that runs us, with pytest and, where the spec has a site, what lies there), git, bash and the
host's /usr. In a Docker or Kubernetes sandbox, all but the first three are the image's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from entropo_ray import config


class SandboxError(Exception):
    """The sandbox, not what ran in it, failed: there is no result."""


class ImageMissing(SandboxError):
    """The repository layer is not there; asking again does not help."""


class CapacityError(SandboxError):
    """No room for another sandbox now; asking later may help."""


class SandboxLost(SandboxError):
    """This sandbox is gone; ask for another."""


class BackendDown(SandboxError):
    """No sandbox can be had here."""


@dataclass(frozen=True)
class Limits:
    """What one sandbox may use. Its files lie in memory and count as such: give it more memory than disk."""

    memory_mb: int = 4096
    pids: int = 256  # processes and threads at once
    cpu: float = 0.0  # processors kept busy; 0: no limit
    disk_mb: int = 2048  # repository changes, /tmp, home
    exec_s: float = 90.0  # one command, unless it says otherwise
    life_s: float = 3600.0  # the sandbox ends itself then
    output_bytes: int = 65_536  # kept of one command's output: first and last half


@dataclass(frozen=True)
class SandboxSpec:
    # directory of the repository layer, holding .git (docker, kubernetes: an image whose working directory does); never
    # written.
    # Its work tree is its HEAD
    image: str
    workdir: str = "/testbed"
    site: str = ""  # directory of packages, read-only at /opt/site and importable after the test runner; "": none
    env: Mapping[str, str] = field(default_factory=dict)
    limits: Limits = field(default_factory=Limits)
    labels: Mapping[str, str] = field(default_factory=dict)
    cluster: config.Kubernetes | None = None  # where backend kubernetes makes it; none: all its defaults


@dataclass(frozen=True)
class ExecResult:
    exit_code: int | None  # 128+n when signal n killed it; None: we did (timed_out)
    output: bytes  # stdout and stderr merged
    total_bytes: int  # of the whole output
    truncated: bool
    timed_out: bool
    oom: bool  # something inside was killed for want of memory, whatever the exit code
    disk_full: bool  # no free block or file left at the end
    seconds: float


@dataclass(frozen=True)
class Patch:
    text: str  # git's bytes exactly; every byte is UTF-8 (other files come as binary hunks)
    files: tuple[str, ...]
    dropped: tuple[str, ...]  # changed, but not in the text: caches, ignored or unreadable files, nested repositories
    lossy: bool  # something other than caches was dropped


class Sandbox(Protocol):
    """One attempt's machine. Relative paths start at the working directory."""

    async def exec(
        self,
        cmd: str | Sequence[str],
        *,
        timeout: float | None = None,  # noqa: ASYNC109 (it ends the command, not only the wait)
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        stdin: bytes | None = None,
        output_bytes: int | None = None,
    ) -> ExecResult:
        """A string runs in `bash -c`, a sequence without a shell; one at a time. `timeout` in seconds."""

    async def read(self, path: str, limit: int = 1 << 20) -> bytes:
        """A regular file; links resolve inside. OSError if it cannot be had, ValueError if over `limit` bytes."""

    async def write(self, path: str, data: bytes, mode: int = 0o644) -> None:
        """A regular file, its directories made if need be; links resolve inside. OSError if it cannot be had."""

    async def extract_patch(self) -> Patch:
        """Work tree against the image's HEAD, by a git that obeys nothing the agent wrote."""

    async def reset(self) -> None:
        """Back to the image's state."""

    async def close(self) -> None:
        """Idempotent, never raises."""


Lend = Callable[[SandboxSpec], AbstractAsyncContextManager[Sandbox]]
_lenders: dict[str, Lend] = {}


def borrow_from(lend: Lend, *, backend: str) -> None:
    """From now on this process borrows its sandboxes of that backend instead of making them."""
    _lenders[backend] = lend


def open_sandbox(spec: SandboxSpec, *, backend: str = "bwrap") -> AbstractAsyncContextManager[Sandbox]:
    """A sandbox that is gone when the block ends. Raises SandboxError when there can be none."""
    if backend in _lenders:
        return _lenders[backend](spec)
    return make_sandbox(spec, backend=backend)


def make_sandbox(spec: SandboxSpec, *, backend: str) -> AbstractAsyncContextManager[Sandbox]:
    """As open_sandbox, of this process's own."""
    if backend == "bwrap":
        from entropo_ray.sandbox import bwrap

        return bwrap.open_bwrap(spec)
    if backend == "docker":
        from entropo_ray.sandbox import docker

        return docker.open_docker(spec)
    if backend == "kubernetes":
        from entropo_ray.sandbox import kubernetes

        return kubernetes.open_kubernetes(spec)
    if backend == "plain":
        from entropo_ray.sandbox import plain

        return plain.open_plain(spec)
    raise ValueError(f"sandbox backend {backend!r}: unknown; use bwrap, docker or kubernetes")


def probe(backend: str, cluster: config.Kubernetes | None = None) -> list[str]:
    """One sentence for each thing that does not work on this machine, or in that cluster; empty: all is well."""
    if backend == "bwrap":
        from entropo_ray.sandbox import bwrap

        return bwrap.probe()
    if backend == "docker":
        from entropo_ray.sandbox import docker

        return docker.probe()
    if backend == "kubernetes":
        from entropo_ray.sandbox import kubernetes

        return kubernetes.probe(cluster)
    if backend == "plain":
        return ["plain: no isolation and no limits but time; for tests only"]
    raise ValueError(f"sandbox backend {backend!r}: unknown; use bwrap, docker or kubernetes")


def reap(backend: str = "bwrap", cluster: config.Kubernetes | None = None) -> int:
    """Remove what killed owners left behind (control groups, containers, pods); the number of sandboxes. Ours alone."""
    if backend == "docker":
        from entropo_ray.sandbox import docker

        return docker.reap()
    if backend == "kubernetes":
        from entropo_ray.sandbox import kubernetes

        return kubernetes.reap(cluster)
    from entropo_ray.sandbox import cgroup

    return cgroup.reap(cgroup.find())


def limits(cfg: config.Sandbox, *, exec_s: float, life_s: float | None = None) -> Limits:
    """Limits of a sandbox in which one command may take `exec_s`."""
    return Limits(
        memory_mb=cfg.memory_mb,
        pids=cfg.pids,
        cpu=cfg.cpu,
        disk_mb=cfg.disk_mb,
        exec_s=exec_s,
        life_s=cfg.life_s if life_s is None else life_s,
        output_bytes=cfg.output_kb << 10,
    )
