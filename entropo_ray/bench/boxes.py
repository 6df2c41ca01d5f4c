"""Sandboxes: time of each operation, sandboxes a second, and many held at once, beside a plain `docker run`."""

from __future__ import annotations

import asyncio
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from entropo_ray.sandbox import Limits, Sandbox, SandboxError, SandboxSpec, make_sandbox, probe
from entropo_ray.sandbox.pool import Bounds, Pool

_NEW = "touch new && echo changed >> file && git status --short"
_PLAIN = "docker run"


@dataclass(frozen=True)
class Boxes:
    """`jobs/bench.py sandbox`: on a repository of two files."""

    repeats: int = 100  # of each operation, one after another
    workers: list[int] = field(default_factory=lambda: [1, 2, 4, 8])
    seconds: float = 5.0  # of each throughput
    live: int = 1000  # leases of a pool of bubblewrap's held at once; 0: none
    # a reference whose /testbed holds a repository; empty: bubblewrap alone. Where no engine runs:
    # python tests/engine.py python jobs/bench.py sandbox docker_image=IMAGE
    docker_image: str = ""
    docker_repeats: int = 20
    docker_live: int = 20


def run(cfg: Boxes) -> dict[str, Any]:
    """Everything measured, by backend; the tables are printed on the way."""
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as home:
        for backend, image, repeats, live in _backends(cfg, Path(home)):
            if missing := probe(backend):
                sys.stdout.write("\n".join(missing) + "\n")
            spec = SandboxSpec(image, limits=Limits(memory_mb=256, disk_mb=64))
            found = asyncio.run(_operations(backend, spec, repeats))
            _print(backend, found)
            rates = {n: asyncio.run(_rate(backend, spec, n, cfg.seconds)) for n in cfg.workers}
            sys.stdout.write("".join(f"  {n} workers: {rate:.1f} sandboxes/s\n" for n, rate in rates.items()))
            result[backend] = {"ms": found, "per_s": rates}
            if live:
                result[backend]["live"] = held = asyncio.run(_many(backend, spec, live))
                sys.stdout.write("  " + "  ".join(f"{name} {value:.3g}" for name, value in held.items()) + "\n")
            sys.stdout.flush()
    if cfg.docker_image:
        plain = result["docker"]["ms"][_PLAIN]["p50"]
        for backend in ("bwrap", "docker"):
            ratio = result[backend]["over_plain"] = plain / result[backend]["ms"]["all"]["p50"]
            sys.stdout.write(f"{_PLAIN} takes {ratio:.2f} x the time of {backend}\n")
    return result


def _backends(cfg: Boxes, home: Path) -> list[tuple[str, str, int, int]]:
    """(backend, image, repeats, held at once)."""
    (home / "file").write_text("as it was\n")
    (home / "test_one.py").write_text("def test_one():\n    assert True\n")
    identity = ["-c", "user.name=bench", "-c", "user.email=bench@localhost"]
    for words in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "base"]):
        subprocess.run(["git", *words], cwd=home, check=True)
    docker = [("docker", cfg.docker_image, cfg.docker_repeats, cfg.docker_live)] if cfg.docker_image else []
    return [("bwrap", str(home), cfg.repeats, cfg.live), *docker]


async def _operations(backend: str, spec: SandboxSpec, repeats: int) -> dict[str, dict[str, float]]:
    """Milliseconds by operation; `all` is a whole life: create, one command, destroy.

    A plain `docker run` takes turns with it, so that what else the machine does is the same for both.
    """
    times: dict[str, list[float]] = {name: [] for name in ("all", "exec", "pytest", "patch", "reset")}
    for _ in range(repeats):
        times["all"].append(await _timed(lambda: _life(backend, spec)))
        if backend == "docker":
            times.setdefault(_PLAIN, []).append(await _timed(lambda: asyncio.to_thread(_plain_docker, spec.image)))
    async with make_sandbox(spec, backend=backend) as box:
        work: dict[str, Callable[[], Awaitable[Any]]] = {
            "exec": lambda: _good(box, ["true"]),
            "pytest": lambda: _good(box, "python -m pytest -q -p no:cacheprovider"),
            "patch": box.extract_patch,
            "reset": box.reset,
        }
        for name, operation in work.items():
            for _ in range(repeats if name == "exec" else max(10, repeats // 5)):
                if name in ("patch", "reset"):
                    await _good(box, _NEW)
                times[name].append(await _timed(operation))
    return {name: _spread(values) for name, values in times.items()}


async def _life(backend: str, spec: SandboxSpec) -> None:
    async with make_sandbox(spec, backend=backend) as box:
        await _good(box, ["true"])


async def _good(box: Sandbox, words: str | Sequence[str]) -> None:
    result = await box.exec(words)
    assert result.exit_code == 0, result.output


async def _timed(operation: Callable[[], Awaitable[Any]]) -> float:
    began = time.perf_counter()
    await operation()
    return 1e3 * (time.perf_counter() - began)


def _spread(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    high = ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]
    return {"min": ordered[0], "p50": statistics.median(ordered), "p95": high, "max": ordered[-1]}


async def _rate(backend: str, spec: SandboxSpec, workers: int, seconds: float) -> float:
    """Whole lives a second, by so many at once."""
    began = time.perf_counter()
    done = 0

    async def work() -> None:
        nonlocal done
        while time.perf_counter() - began < seconds:
            await _life(backend, spec)
            done += 1

    await asyncio.gather(*(work() for _ in range(workers)))
    return done / (time.perf_counter() - began)


async def _many(backend: str, spec: SandboxSpec, count: int) -> dict[str, float]:
    """So many leases of one pool at once: seconds to get them, to run a command in each, and to give them back."""
    pool = Pool(Bounds(live=count, creates=4, execs=8, lease_s=600), backend)
    few = [await pool.acquire(spec) for _ in range(min(10, count))]
    rate_few = await _each(pool, few * (count // len(few)))
    free = _available()
    began = time.perf_counter()
    leases = few + await asyncio.gather(*(pool.acquire(spec) for _ in range(count - len(few))))
    made = time.perf_counter() - began
    used = (free - _available()) / count
    rate = await _each(pool, leases)
    counts = await pool.stats()
    assert counts.lent == count, counts
    began = time.perf_counter()
    await asyncio.gather(*(pool.release(lease) for lease in leases))
    given_back = time.perf_counter() - began
    await pool.drain()
    return {
        "leases": float(counts.lent),
        "acquire_s": made,
        "exec_per_s": rate,
        f"exec_per_s_at_{len(few)}": rate_few,
        "release_s": given_back,
        "mib_each": used / 2**20,
    }


async def _each(pool: Pool, leases: Sequence[Any]) -> float:
    """Commands a second, one for each lease."""
    began = time.perf_counter()
    results = await asyncio.gather(*(pool.exec(lease, ["true"]) for lease in leases))
    if bad := [result for result in results if result.exit_code != 0]:
        raise SandboxError(f"{len(bad)} of {len(results)} commands failed, the first with {bad[0]}")
    return len(results) / (time.perf_counter() - began)


def _available() -> int:
    """Bytes that the machine could still give."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))


def _plain_docker(image: str) -> None:
    """The same life by the command line program, without any of our limits."""
    subprocess.run(["docker", "run", "--rm", "--network=none", image, "true"], check=True, timeout=120)


def _print(title: str, found: dict[str, dict[str, float]]) -> None:
    names = ("min", "p50", "p95", "max")
    sys.stdout.write(f"{title + ', ms':<16}" + "".join(f"{name:>10}" for name in names) + "\n")
    for operation, values in found.items():
        sys.stdout.write(f"  {operation:<14}" + "".join(f"{values[name]:>10.1f}" for name in names) + "\n")
