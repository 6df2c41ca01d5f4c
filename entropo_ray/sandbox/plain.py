"""A copy of the repository in a temporary directory: the contract of a sandbox for tests that need no walls.

Not covered: everything that keeps a policy in. No isolation of files, network or processes (a `setsid` child survives),
no limit but time and output. The working directory's name is replaced in commands, and back in what they print. No
configuration can name this backend.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path

from entropo_ray.sandbox import ExecResult, ImageMissing, Patch, Sandbox, SandboxLost, SandboxSpec, patch
from entropo_ray.sandbox.output import Drain


class Plain:
    """One temporary directory; see Sandbox for what its methods promise."""

    def __init__(self, directory: Path, spec: SandboxSpec) -> None:
        self._spec, self._directory = spec, directory
        self._tree, self._image = directory / "testbed", Path(spec.image).resolve()
        self._turn = asyncio.Lock()
        self._refill()

    def _refill(self) -> None:
        for name in ("testbed", "home", "scratch"):
            shutil.rmtree(self._directory / name, ignore_errors=True)
        shutil.copytree(self._image, self._tree, symlinks=True)
        (self._directory / "home").mkdir()

    def _env(self) -> dict[str, str]:
        path = f"{Path(sys.executable).parent}:{os.environ.get('PATH', '/usr/bin:/bin')}"
        names = {"GIT_AUTHOR_NAME": "agent", "GIT_AUTHOR_EMAIL": "agent@localhost"}
        names |= {key.replace("AUTHOR", "COMMITTER"): value for key, value in names.items()}
        names |= {"LANG": "C.UTF-8", "PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1"}
        names["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # in a real sandbox there are none
        if self._spec.site:
            names |= {"PYTHONPATH": str(Path(self._spec.site).resolve()), "TESTBED": str(self._tree)}
        return names | {"PATH": path, "HOME": str(self._directory / "home"), **self._spec.env}

    async def exec(
        self,
        cmd: str | Sequence[str],
        *,
        timeout: float | None = None,  # noqa: ASYNC109 (see Sandbox)
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        stdin: bytes | None = None,
        output_bytes: int | None = None,
    ) -> ExecResult:
        words = [self._outside(word) for word in (["bash", "-c", cmd] if isinstance(cmd, str) else cmd)]
        bounds = self._spec.limits
        return await self._run(
            words,
            self._path(cwd or "."),
            {**self._env(), **(env or {})},
            stdin or b"",
            bounds.exec_s if timeout is None else timeout,
            bounds.output_bytes if output_bytes is None else output_bytes,
        )

    async def _run(
        self, words: list[str], cwd: Path, env: dict[str, str], stdin: bytes, timeout_s: float, output_bytes: int
    ) -> ExecResult:
        if not self._tree.exists():
            raise SandboxLost("the sandbox was closed")
        async with self._turn:
            reading, writing = os.pipe()
            drain = Drain(reading, output_bytes)
            begin = time.monotonic()
            try:
                with tempfile.TemporaryFile() as given:
                    given.write(stdin)
                    given.seek(0)
                    try:
                        process = await asyncio.create_subprocess_exec(
                            *words,
                            cwd=cwd,
                            env=env,
                            stdin=given,
                            stdout=writing,
                            stderr=writing,
                            start_new_session=True,
                        )
                    except OSError as error:
                        text = f"{error.strerror}: {error.filename}\n".encode()
                        return ExecResult(126, text, len(text), False, False, False, False, 0.0)
                    finally:
                        os.close(writing)
                code = await _end(process, timeout_s)
                with contextlib.suppress(TimeoutError):  # a daemon may hold the pipe
                    await drain.end(1.0)
            finally:
                drain.close()
        kept = drain.capture
        text = kept.text().replace(bytes(self._tree), self._spec.workdir.encode())
        seconds = time.monotonic() - begin
        return ExecResult(code, text, kept.total, kept.truncated, code is None, False, False, seconds)

    def _outside(self, text: str) -> str:
        return text.replace(self._spec.workdir, str(self._tree))

    def _path(self, path: str) -> Path:
        """Where a path inside lies; links are followed, but not out of the working directory."""
        whole = (self._tree / self._outside(path)).resolve()
        if not whole.is_relative_to(self._tree):
            raise FileNotFoundError(f"{path}: outside the working directory, which is all that a plain sandbox has")
        return whole

    async def read(self, path: str, limit: int = 1 << 20) -> bytes:
        file = self._path(path)
        status = file.stat()
        if file.is_dir():
            raise IsADirectoryError(path)
        if not file.is_file():
            raise OSError(f"{path}: not a regular file")
        if status.st_size > limit:
            raise ValueError(f"{path}: {status.st_size} bytes, more than the limit of {limit}")
        return file.read_bytes()

    async def write(self, path: str, data: bytes, mode: int = 0o644) -> None:
        file = self._path(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
        file.chmod(mode)

    async def extract_patch(self) -> Patch:
        scratch = self._directory / "scratch"

        async def run(script: str, stdin: bytes, output_bytes: int) -> ExecResult:
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir()
            env = self._env() | {"TREE": str(self._tree), "IMAGE": str(self._image)}
            env["SCRATCH"] = str(scratch)
            words = ["bash", "-c", script]
            return await self._run(words, scratch, env, stdin, self._spec.limits.exec_s, output_bytes)

        return await patch.extract(run)

    async def reset(self) -> None:
        self._refill()

    async def close(self) -> None:
        shutil.rmtree(self._directory, ignore_errors=True)


async def _end(process: asyncio.subprocess.Process, timeout_s: float) -> int | None:
    """Exit status as a shell tells it; None when the time was up."""
    try:
        code = await asyncio.wait_for(process.wait(), timeout_s)
    except TimeoutError:
        code = None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
    return 128 - code if code is not None and code < 0 else code


@contextlib.asynccontextmanager
async def open_plain(spec: SandboxSpec) -> AsyncIterator[Sandbox]:
    if not Path(spec.image, ".git").is_dir():  # noqa: ASYNC240
        raise ImageMissing(f"{spec.image}: no such repository layer (a directory that holds .git)")
    if spec.site and not Path(spec.site).is_dir():  # noqa: ASYNC240
        raise ImageMissing(f"{spec.site}: no such directory of packages")
    directory = Path(tempfile.mkdtemp(prefix="entropo-plain-")).resolve()  # noqa: ASYNC240
    sandbox = Plain(directory, spec)
    try:
        yield sandbox
    finally:
        await sandbox.close()
