"""The sandboxes of one node, lent: at most so many at once, and those that come next made before they are asked for.

A lease is kept by renewing it, which every use does as well; a borrower that is silent for `lease_s`, or is a process
of this node that died, loses its sandbox. Nothing here knows of Ray: rollout/lending.py makes an actor of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import secrets
import statistics
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from entropo_ray.sandbox import (
    CapacityError,
    ExecResult,
    Patch,
    Sandbox,
    SandboxError,
    SandboxLost,
    SandboxSpec,
    cgroup,
    make_sandbox,
)

T = TypeVar("T")
Call = Callable[..., Coroutine[Any, Any, Any]]  # (name of a method, its words) -> what it returns

_TICK_S = 1.0  # between looks at leases, borrowers and what comes next
_CLOSING = "the pool of sandboxes is being closed"
_ALIVE_S = 10.0  # for a sandbox that was made before, to show that it lives
_KEPT = 1000  # times of the last so many creations


@dataclass(frozen=True)
class Bounds:
    """What one node gives."""

    live: int = 64  # sandboxes at once: lent, made ahead and being made
    ahead: int = 0  # made before they are asked for, within `live`
    creates: int = 4  # being made at once
    execs: int = 8  # commands at once, over all sandboxes
    lease_s: float = 60.0
    wait_s: float = 600.0  # for a free place; CapacityError afterwards
    create_s: float = 120.0  # for one creation; it is still ours, and closed, when it ends after that


@dataclass(frozen=True)
class Lease:
    """The right to use one sandbox of a pool."""

    id: str
    token: str  # kept by the borrower
    lease_s: float  # renew before it has passed


@dataclass
class _Held:
    """A sandbox that lives."""

    box: Sandbox
    kind: str
    life_s: float
    exit: contextlib.AsyncExitStack
    token: str = ""  # "": not lent
    owner: str = ""
    born: float = field(default_factory=time.monotonic)
    expires: float = 0.0
    busy: int = 0


@dataclass
class Counts:
    """Since the pool began, and now. acquired = released + expired + orphaned + lent, whatever happened."""

    acquired: int = 0
    released: int = 0
    expired: int = 0  # leases that nobody renewed
    orphaned: int = 0  # leases of borrowers that died
    ahead: int = 0  # of those acquired, made before they were asked for
    lost: int = 0  # made ahead, and found dead
    late: int = 0  # creations that took more than create_s
    lent: int = 0
    waiting: int = 0
    live: int = 0
    create_ms: float = 0.0  # median


class Pool:
    """See the module; all methods must be called in one event loop."""

    def __init__(self, bounds: Bounds, backend: str, tick_s: float = _TICK_S) -> None:
        self._bounds, self._backend, self._tick_s = bounds, backend, tick_s
        self._places = asyncio.Semaphore(bounds.live)
        self._creating = asyncio.Semaphore(bounds.creates)
        self._executing = asyncio.Semaphore(bounds.execs)
        self._lent: dict[str, _Held] = {}
        self._ahead: list[_Held] = []
        self._coming: deque[SandboxSpec] = deque()
        self._counts = Counts()
        self._taken = 0  # places
        self._creation_s: deque[float] = deque(maxlen=_KEPT)
        self._background: set[asyncio.Task[Any]] = set()
        self._filling = self._draining = False
        self._empty = asyncio.Event()
        self._empty.set()
        self._watch: asyncio.Task[None] | None = None

    # Leases

    async def acquire(self, spec: SandboxSpec, owner: str = "") -> Lease:
        """A sandbox of this kind, in the image's state. `owner`: cgroup.label of a process of this node, if any.

        Raises CapacityError when no place came free, or the creation took too long; SandboxError as open_sandbox does.
        """
        self._begin()
        kind = _kind(spec)
        self._arrived(kind)
        held = await self._made_ahead(kind)
        ahead = held is not None
        if held is None:
            await self._place()
            held = await self._create(spec)
        if self._draining:
            await self._end(held)
            raise CapacityError(_CLOSING)
        self._counts.ahead += ahead
        held.token, held.owner = secrets.token_hex(16), owner
        held.expires = time.monotonic() + self._bounds.lease_s
        name = secrets.token_hex(8)
        self._lent[name] = held
        self._counts.acquired += 1
        return Lease(name, held.token, self._bounds.lease_s)

    async def renew(self, lease: Lease) -> None:
        """SandboxLost if it is no longer held."""
        self._held(lease).expires = time.monotonic() + self._bounds.lease_s

    async def release(self, lease: Lease) -> None:
        """Idempotent, never raises."""
        with contextlib.suppress(SandboxLost):
            self._held(lease)
            self._counts.released += 1
            await self._end(self._lent.pop(lease.id))

    # What a borrower does

    async def exec(self, lease: Lease, cmd: str | Sequence[str], **options: Any) -> ExecResult:
        async with self._used(lease) as box, self._executing:
            return await box.exec(cmd, **options)

    async def read(self, lease: Lease, path: str, limit: int = 1 << 20) -> bytes:
        async with self._used(lease) as box:
            return await box.read(path, limit)

    async def write(self, lease: Lease, path: str, data: bytes, mode: int = 0o644) -> None:
        async with self._used(lease) as box:
            await box.write(path, data, mode)

    async def extract_patch(self, lease: Lease) -> Patch:
        async with self._used(lease) as box, self._executing:
            return await box.extract_patch()

    async def reset(self, lease: Lease) -> None:
        async with self._used(lease) as box:
            await box.reset()

    # The pool itself

    async def schedule(self, coming: Sequence[SandboxSpec]) -> None:
        """What will be asked for, in about this order; replaces what was said before."""
        self._begin()
        self._coming = deque(coming)

    async def stats(self) -> Counts:
        now = {"lent": len(self._lent), "live": self._taken}
        middle = 1e3 * statistics.median(self._creation_s) if self._creation_s else 0.0
        return dataclasses.replace(self._counts, create_ms=middle, **now)

    async def drain(self, wait_s: float = 60.0) -> None:
        """Close everything and lend nothing more. TimeoutError if something of ours does not end in time."""
        self._draining = True
        if self._watch:
            self._watch.cancel()
        ahead, self._ahead = self._ahead, []
        lent, self._lent = list(self._lent.values()), {}
        self._counts.expired += len(lent)
        try:
            async with asyncio.timeout(wait_s):
                ends = (self._end(held) for held in (*ahead, *lent))
                await asyncio.gather(*ends, *self._background, return_exceptions=True)
                await self._empty.wait()  # creations that somebody waits for
        except TimeoutError:
            raise TimeoutError(f"sandboxes: {self._taken} had not ended {wait_s:.0f} s after the pool was") from None

    def _begin(self) -> None:
        if self._draining:
            raise CapacityError(_CLOSING)
        if self._watch is None:
            self._watch = asyncio.get_running_loop().create_task(self._look())

    def _closing(self) -> bool:
        return self._draining

    def _held(self, lease: Lease) -> _Held:
        held = self._lent.get(lease.id)
        if held is None or not secrets.compare_digest(held.token, lease.token):
            raise SandboxLost("the lease of this sandbox is over")
        return held

    @contextlib.asynccontextmanager
    async def _used(self, lease: Lease) -> AsyncIterator[Sandbox]:
        held = self._held(lease)
        held.busy += 1
        try:
            yield held.box
        finally:
            held.busy -= 1
            held.expires = time.monotonic() + self._bounds.lease_s

    async def _place(self) -> None:
        """Wait for a place; what was made ahead for others gives way."""
        if self._places.locked() and self._ahead:
            await self._end(self._ahead.pop())
        self._counts.waiting += 1
        try:
            async with asyncio.timeout(self._bounds.wait_s):
                await self._places.acquire()
        except TimeoutError:
            raise CapacityError(
                f"no place for another sandbox in {self._bounds.wait_s:.0f} s: all {self._bounds.live} are taken"
            ) from None
        finally:
            self._counts.waiting -= 1
        self._taken += 1
        self._empty.clear()

    def _leave(self) -> None:
        self._taken -= 1
        if not self._taken:
            self._empty.set()
        self._places.release()

    async def _create(self, spec: SandboxSpec) -> _Held:
        """A sandbox for a place that is taken; given back on failure, if late when it has ended."""
        making = self._task(self._made(spec))
        try:
            done, _ = await asyncio.wait({making}, timeout=self._bounds.create_s)
        except asyncio.CancelledError:
            self._task(self._abandon(making))
            raise
        if not done:
            self._counts.late += 1
            self._task(self._abandon(making))
            raise CapacityError(f"a sandbox of {spec.image} was not there after {self._bounds.create_s:.0f} s")
        return await making

    async def _made(self, spec: SandboxSpec) -> _Held:
        leave = contextlib.AsyncExitStack()
        try:
            async with self._creating:
                began = time.monotonic()
                box = await leave.enter_async_context(make_sandbox(spec, backend=self._backend))
                self._creation_s.append(time.monotonic() - began)
        except BaseException:
            self._leave()
            raise
        return _Held(box, _kind(spec), spec.limits.life_s, leave)

    async def _abandon(self, making: asyncio.Task[_Held]) -> None:
        with contextlib.suppress(SandboxError):
            await self._end(await making)

    async def _end(self, held: _Held) -> None:
        try:
            await held.exit.aclose()
        finally:
            self._leave()

    def _task(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run it to its end, whoever waits for it."""
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task

    # Made before they are asked for

    def _arrived(self, kind: str) -> None:
        """Take it off what comes; what stood long before it was asked for elsewhere."""
        place = next((place for place, spec in enumerate(self._coming) if _kind(spec) == kind), None)
        if place is not None:
            del self._coming[place]
            for _ in range(place - self._bounds.live):
                self._coming.popleft()

    async def _made_ahead(self, kind: str) -> _Held | None:
        """One that was made for this kind, lives, and has its whole life before it."""
        while found := next((held for held in self._ahead if held.kind == kind), None):
            self._ahead.remove(found)
            try:
                young = time.monotonic() - found.born < found.life_s / 2
                if young and (await found.box.exec(["true"], timeout=_ALIVE_S)).exit_code == 0:
                    return found
            except SandboxError:
                pass
            except asyncio.CancelledError:
                self._task(self._end(found))
                raise
            self._counts.lost += 1
            await self._end(found)
        return None

    async def _fill(self) -> None:
        """Make what comes next, as long as there are free places."""
        wanted = Counter(_kind(spec) for spec in list(self._coming)[: self._bounds.ahead])
        wanted.subtract(held.kind for held in self._ahead)
        for spec in list(self._coming)[: self._bounds.ahead]:
            full = self._places.locked() or len(self._ahead) >= self._bounds.ahead
            if full or self._counts.waiting or self._closing():
                return
            kind = _kind(spec)
            if wanted[kind] > 0:
                wanted[kind] -= 1
                await self._place()
                held = await self._create(_longer(spec))
                held.kind = kind
                self._ahead.append(held)
                if self._closing():
                    await self._end(self._ahead.pop())

    # Its watch

    def tend(self) -> None:
        """Called at each look; for who keeps more than sandboxes."""

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(self._tick_s)
            self.tend()
            now = time.monotonic()
            for name, held in list(self._lent.items()):
                orphan = bool(held.owner) and not cgroup.alive(held.owner)
                if orphan or (held.expires < now and not held.busy):
                    self._counts.orphaned += orphan
                    self._counts.expired += not orphan
                    del self._lent[name]
                    self._task(self._end(held))
            if self._bounds.ahead and not self._filling:
                self._filling = True
                self._task(self._filled())

    async def _filled(self) -> None:
        try:
            await self._fill()
        except SandboxError:
            pass  # whoever asks for it is told
        finally:
            self._filling = False


def _longer(spec: SandboxSpec) -> SandboxSpec:
    """Twice the life: half of it may pass before it is lent."""
    return dataclasses.replace(spec, limits=dataclasses.replace(spec.limits, life_s=2 * spec.limits.life_s))


def _kind(spec: SandboxSpec) -> str:
    """What two sandboxes must share to stand for each other: all but labels."""
    facts: Mapping[str, Any] = dataclasses.asdict(dataclasses.replace(spec, labels={}))
    return json.dumps(facts, sort_keys=True, default=dict)


@dataclass
class Borrowed:
    """A sandbox of a pool, for who has its lease. `call(name, lease, *words, **options)` asks the pool."""

    lease: Lease
    call: Call

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
        options = {"timeout": timeout, "cwd": cwd, "env": env, "stdin": stdin, "output_bytes": output_bytes}
        found: ExecResult = await self.call("exec", self.lease, cmd, **options)
        return found

    async def read(self, path: str, limit: int = 1 << 20) -> bytes:
        data: bytes = await self.call("read", self.lease, path, limit)
        return data

    async def write(self, path: str, data: bytes, mode: int = 0o644) -> None:
        await self.call("write", self.lease, path, data, mode)

    async def extract_patch(self) -> Patch:
        found: Patch = await self.call("extract_patch", self.lease)
        return found

    async def reset(self) -> None:
        await self.call("reset", self.lease)

    async def close(self) -> None:
        with contextlib.suppress(SandboxError):
            await self.call("release", self.lease)


@contextlib.asynccontextmanager
async def borrow(call: Call, spec: SandboxSpec, owner: str = "") -> AsyncIterator[Sandbox]:
    """A sandbox of the pool behind `call` that goes back when the block ends; its lease is renewed meanwhile."""
    lease: Lease = await call("acquire", spec, owner)
    box = Borrowed(lease, call)
    heart = asyncio.get_running_loop().create_task(_beat(call, lease))
    try:
        yield box
    finally:
        heart.cancel()
        await asyncio.shield(box.close())


async def _beat(call: Call, lease: Lease) -> None:
    with contextlib.suppress(SandboxError):  # lost: the next use says so
        while True:
            await asyncio.sleep(lease.lease_s / 4)
            await call("renew", lease)
