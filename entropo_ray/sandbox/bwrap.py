"""Sandboxes of bubblewrap on this machine: no network, own processes, copy-on-write files, limits.

This side speaks to the launcher (launcher.py), one per process, started with the first sandbox. The kernel is shared:
what the system call filter (seccomp.py) leaves open of it is within the agent's reach.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from entropo_ray.sandbox import (
    BackendDown,
    CapacityError,
    ExecResult,
    ImageMissing,
    Patch,
    Sandbox,
    SandboxError,
    SandboxLost,
    SandboxSpec,
    patch,
)
from entropo_ray.sandbox.output import Drain
from entropo_ray.sandbox.words import PLAIN, unspeakable

_RUNNER = ("pytest", "pluggy", "iniconfig", "packaging", "pygments")
_ANSWER_S = 60.0  # beyond what the operation itself may take
_INSTALL = "bubblewrap (the program bwrap) is not installed; on Debian or Ubuntu: apt-get install bubblewrap"
_ENV = {
    **PLAIN,
    "PATH": "/opt/runner/bin:/usr/bin:/usr/sbin:/bin:/sbin",
    "PYTHONPATH": "/opt/runner/site",
}
_SITE = {"PYTHONPATH": f"{_ENV['PYTHONPATH']}:/opt/site"}
# the package is named by hand: its __init__ would load more than a process that forks all day should carry
_BOOT = """
import sys, types
for name, path in (("entropo_ray", sys.argv[4]), ("entropo_ray.sandbox", sys.argv[4] + "/sandbox")):
    module = sys.modules[name] = types.ModuleType(name)
    module.__path__ = [path]
from entropo_ray.sandbox.launcher import main
main()
"""
_names = itertools.count()


class Client:
    """The launcher of this process, seen from any of its threads and event loops."""

    def __init__(self, bwrap: str) -> None:
        self.owner = os.getpid()
        self._requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._requests.settimeout(_ANSWER_S)
        words = [sys.executable, "-I", "-S", "-X", "utf8", "-c", _BOOT, str(theirs.fileno()), str(self.owner)]
        words += [json.dumps(_runner() | {"bwrap": bwrap}), str(Path(__file__).parents[1])]
        with theirs:
            self._process = subprocess.Popen(
                words, pass_fds=(theirs.fileno(),), stdin=subprocess.DEVNULL, cwd="/", start_new_session=True
            )
        self.pid = self._process.pid
        self._ended = False  # seen at the sockets, which is sooner than its exit status

    def alive(self) -> bool:
        return not self._ended and self._process.poll() is None

    def stop(self) -> None:
        """End the launcher and with it every sandbox of this process."""
        self._ended = True
        self._requests.close()
        self._process.wait(_ANSWER_S)

    def send(self, request: Mapping[str, Any], fds: Sequence[int] = ()) -> socket.socket:
        """Hand over one request (never waits); the answer comes through the socket, closing it cancels."""
        mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs, _in_memory(json.dumps(request).encode()) as body:
            try:
                socket.send_fds(self._requests, [b"."], [body, theirs.fileno(), *fds])
            except OSError as error:
                mine.close()
                self._ended = not isinstance(error, TimeoutError)
                raise SandboxLost(f"the launcher of sandboxes is gone: {error}") from error
        return mine

    async def answer(self, mine: socket.socket, what: str, timeout_s: float = 0.0) -> tuple[dict[str, Any], list[int]]:
        """What the launcher says to a request that may itself take `timeout_s`."""
        with mine:
            mine.setblocking(False)
            wait_s = timeout_s + _ANSWER_S
            try:
                await asyncio.wait_for(_readable(mine.fileno()), wait_s)
                message, fds, _, _ = socket.recv_fds(mine, 65536, 1)
            except TimeoutError:
                raise BackendDown(f"the launcher of sandboxes did not answer {what} in {wait_s:.0f} s") from None
            except ConnectionResetError:
                message, fds = b"", []
        if not message:
            self._ended = True
            raise SandboxLost(f"the launcher of sandboxes ended during {what}")
        reply = json.loads(message)
        if "error" in reply:
            _raise(reply)
        return reply, fds

    async def ask(self, request: Mapping[str, Any]) -> tuple[dict[str, Any], list[int]]:
        return await self.answer(self.send(request), request["do"])


_clients: list[Client] = []
_starting = threading.Lock()


def client() -> Client:
    """The launcher of this process, started if need be. BackendDown names bubblewrap when it is missing."""
    with _starting:
        if _clients and _clients[0].owner == os.getpid() and _clients[0].alive():
            return _clients[0]
        bwrap = shutil.which("bwrap")
        if bwrap is None:
            raise BackendDown(_INSTALL)
        _clients[:] = [Client(bwrap)]
        return _clients[0]


def _runner() -> dict[str, Any]:
    """What launcher.Runner needs: interpreter, its packages to hide, files of pytest's distributions."""
    prefix = os.path.realpath(sys.base_prefix)
    executable = Path(prefix, "bin", f"python{sys.version_info.major}.{sys.version_info.minor}")
    scheme = sysconfig.get_paths("posix_prefix", vars={"base": prefix, "platbase": prefix})
    hidden = {scheme["purelib"], scheme["platlib"], f"{prefix}/lib/python3/dist-packages"}
    packages = set()
    for name in _RUNNER:
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            raise BackendDown(f"{name} is not installed beside us, so sandboxes could not run tests") from None
        entries = {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}
        packages |= {str(distribution.locate_file(entry)) for entry in entries}
    return {
        "prefix": prefix,
        "executable": os.path.realpath(executable),
        "hidden": sorted(hidden),
        "packages": sorted(packages),
    }


class Bwrap:
    """One sandbox; see Sandbox for what its methods promise."""

    def __init__(self, launcher: Client, spec: SandboxSpec) -> None:
        self._launcher, self._spec = launcher, spec
        self._name = str(next(_names))
        self._turn = asyncio.Lock()
        self._closed = False

    async def open(self) -> None:
        bounds = self._spec.limits
        request = {"image": str(Path.cwd() / self._spec.image), "workdir": self._spec.workdir, "life_s": bounds.life_s}
        request["site"] = str(Path.cwd() / self._spec.site) if self._spec.site else ""
        request |= {name: getattr(bounds, name) for name in ("memory_mb", "pids", "cpu", "disk_mb")}
        await self._ask({"do": "open", **request})

    async def _ask(self, request: Mapping[str, Any]) -> tuple[dict[str, Any], list[int]]:
        return await self._launcher.ask({**request, "name": self._name})

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
        # a program that is not there must be the command's failure (127), not bubblewrap's
        argv = ["bash", "-c", cmd] if isinstance(cmd, str) else ["bash", "-c", 'exec -- "$@"', "bash", *cmd]
        bounds = self._spec.limits
        request = {
            "argv": argv,
            "cwd": self._path(cwd or "."),
            "env": {**_ENV, **(_SITE if self._spec.site else {}), **self._spec.env, **(env or {})},
            "timeout": bounds.exec_s if timeout is None else timeout,
            "trusted": False,
        }
        return await self._run(request, stdin, bounds.output_bytes if output_bytes is None else output_bytes)

    async def _run(self, request: dict[str, Any], stdin: bytes | None, output_bytes: int) -> ExecResult:
        if complaint := unspeakable([*request["argv"], request["cwd"], *request["env"], *request["env"].values()]):
            return ExecResult(126, complaint, len(complaint), False, False, False, False, 0.0)
        async with self._turn:
            reading, writing = os.pipe()
            drain = Drain(reading, output_bytes)
            try:
                try:
                    with _in_memory(stdin or b"") as given:
                        answer = self._launcher.send({"do": "exec", "name": self._name, **request}, (writing, given))
                finally:
                    os.close(writing)
                reply, _ = await self._launcher.answer(answer, "exec", request["timeout"])
                await drain.end(_ANSWER_S)
            finally:
                drain.close()
        kept = drain.capture
        facts = {name: reply[name] for name in ("exit_code", "timed_out", "oom", "disk_full", "seconds")}
        return ExecResult(output=kept.text(), total_bytes=kept.total, truncated=kept.truncated, **facts)

    def _path(self, path: str) -> str:
        return os.path.join(self._spec.workdir, path)  # noqa: PTH118 (a path inside, perhaps with ..)

    async def read(self, path: str, limit: int = 1 << 20) -> bytes:
        with await self._file(path, None) as file:
            size = os.fstat(file.fileno()).st_size
            if size > limit:
                raise ValueError(f"{path}: {size} bytes, more than the limit of {limit}")
            return file.read()  # type: ignore[no-any-return]

    async def write(self, path: str, data: bytes, mode: int = 0o644) -> None:
        with await self._file(path, mode) as file:
            file.write(data)

    async def _file(self, path: str, mode: int | None) -> Any:
        request = {"do": "file", "path": self._path(path), "mode": mode}
        if unspeakable([path]):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        async with self._turn:
            _, (fd,) = await self._ask(request)
        return os.fdopen(fd, "rb" if mode is None else "wb")

    async def extract_patch(self) -> Patch:
        async def run(script: str, stdin: bytes, output_bytes: int) -> ExecResult:
            env = {**_ENV, "HOME": "/nonexistent", "PATH": "/usr/bin:/bin"}
            env |= {"TREE": self._spec.workdir, "IMAGE": "/opt/image", "SCRATCH": "/tmp"}
            request = {"argv": ["bash", "-c", script], "cwd": "/", "env": env, "trusted": True}
            return await self._run(request | {"timeout": self._spec.limits.exec_s}, stdin, output_bytes)

        return await patch.extract(run)

    async def reset(self) -> None:
        async with self._turn:
            await self._ask({"do": "reset"})

    async def close(self) -> None:
        if not self._closed:
            self._closed = True
            with contextlib.suppress(SandboxError):  # already gone, which is what was asked for
                await self._ask({"do": "close"})


@contextlib.asynccontextmanager
async def open_bwrap(spec: SandboxSpec) -> AsyncIterator[Sandbox]:
    if not Path(spec.image, ".git").is_dir():  # noqa: ASYNC240 (one stat)
        raise ImageMissing(f"{spec.image}: no such repository layer (a directory that holds .git)")
    if spec.site and not Path(spec.site).is_dir():  # noqa: ASYNC240
        raise ImageMissing(f"{spec.site}: no such directory of packages")
    sandbox = Bwrap(await asyncio.to_thread(client), spec)
    try:
        await sandbox.open()
        yield sandbox
    finally:
        await asyncio.shield(sandbox.close())


def probe() -> list[str]:
    """What bubblewrap lacks on this machine, one sentence each."""
    try:
        launcher = client()
    except SandboxError as error:
        return [str(error)]
    return asyncio.run(_shortcomings(launcher))


async def _shortcomings(launcher: Client) -> list[str]:
    try:
        facts, _ = await launcher.ask({"do": "hello"})
        trouble = await _trial()
    except SandboxError as error:
        return [f"bwrap: sandboxes do not start here: {error}"]
    missing = [
        (facts["memory"], "no memory control group can be written: memory is limited per process, not per sandbox"),
        (facts["pids"], "no pids control group can be written: processes are limited per command by RLIMIT_NPROC"),
        (facts["filter"], "no system call filter for this architecture"),
    ]
    return [f"bwrap: {sentence}" for holds, sentence in missing if not holds] + trouble


async def _trial() -> list[str]:
    """Open a sandbox on a repository made for it."""
    import tempfile

    with tempfile.TemporaryDirectory() as directory:
        Path(directory, ".git").mkdir()  # noqa: ASYNC240 (one directory)
        async with open_bwrap(SandboxSpec(directory)) as sandbox:
            result = await sandbox.exec("python -m pytest --version && git --version")
    if result.exit_code == 0:
        return []
    return [f"bwrap: python, pytest or git does not run inside: {result.output.decode(errors='replace').strip()}"]


def _raise(reply: Mapping[str, Any]) -> None:
    number, text = reply.get("errno"), reply["error"]
    if reply.get("file"):
        raise OSError(number, os.strerror(number or errno.EIO), reply["file"])
    if reply.get("lost"):
        raise SandboxLost(text)
    if reply.get("down"):
        raise BackendDown(text)
    if number in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC, errno.EAGAIN):
        raise CapacityError(text)
    raise SandboxError(text)


async def _readable(fd: int) -> None:
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()
    loop.add_reader(fd, lambda: None if ready.done() else ready.set_result(None))
    try:
        await ready
    finally:
        loop.remove_reader(fd)


@contextlib.contextmanager
def _in_memory(data: bytes) -> Any:
    """Descriptor of an anonymous file with this content for ever, open inside the block."""
    fd = os.memfd_create("entropo", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        os.lseek(fd, 0, os.SEEK_SET)
        fcntl.fcntl(
            fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
        )
        yield fd
    finally:
        os.close(fd)
