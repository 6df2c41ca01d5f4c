"""Sandboxes of a node lent by one actor there (rollout.sandbox.per_node): one cap, one queue, and one witness.

The driver makes them, and on a node that comes later who asks first there. When one dies, its sandboxes die with it or
are reaped by its witness, a process that waits for nothing but that; borrowers see SandboxLost and ask again, the next
one that Ray starts. What was to be made ahead is forgotten then.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from entropo_ray import config, sandbox
from entropo_ray.sandbox import Sandbox, SandboxLost, SandboxSpec, cgroup
from entropo_ray.sandbox.pool import Bounds, Pool, borrow

_DRAIN_S = 60.0
_PARENT_S = 1.0  # between two looks


class Keeper(Pool):
    """A pool, and the witness of its end."""

    def __init__(self, cfg: config.Sandbox) -> None:
        cores = len(os.sched_getaffinity(0))
        create_s = creation_s(cfg)
        execs = max(8, 4 * cores)
        bounds = Bounds(live=cfg.per_node, ahead=cfg.ahead, execs=execs, wait_s=cfg.wait_s, create_s=create_s)
        super().__init__(bounds, cfg.backend)
        end_with_parent()
        sandbox.reap(cfg.backend, cfg.kubernetes)
        self._where = f"kubernetes/{cfg.kubernetes.namespace}" if cfg.backend == "kubernetes" else cfg.backend
        self._witness: subprocess.Popen[bytes] | None = None
        self.tend()

    def tend(self) -> None:
        if self._witness is None or self._witness.poll() is not None:
            words = [sys.executable, "-m", "entropo_ray.sandbox", "watch", str(os.getpid()), self._where]
            null = subprocess.DEVNULL
            home = Path(sandbox.__file__).parents[2]
            self._witness = subprocess.Popen(
                words, stdin=null, stdout=null, stderr=null, cwd=home, start_new_session=True
            )


def end_with_parent() -> None:
    """Kill this process soon after its parent has ended.

    Ray's workers end when their raylet does; but while one waits for a controller that was killed, too, it lives on for
    a minute and more, and so would the sandboxes.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_PARENT_S)
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()


def keeper(cfg: config.Sandbox, node: str) -> Any:
    """The actor that lends on a node, made if need be; it ends with whoever made it."""
    # restarted by Ray: a name may lead to a dead actor for longer than a borrower tries
    options = {"name": f"sandboxes-{node}", "get_if_exists": True, "num_cpus": 0, "max_restarts": -1}
    place = NodeAffinitySchedulingStrategy(node, soft=False)
    calls = 1000 + 4 * cfg.per_node
    return ray.remote(Keeper).options(max_concurrency=calls, scheduling_strategy=place, **options).remote(cfg)


@contextmanager
def keepers(cfg: config.Sandbox, coming: Sequence[SandboxSpec]) -> Iterator[None]:
    """Let this process own the keepers of all nodes that there are now, which outlive borrowers so.

    `coming`: what will be asked for, in about this order, for what is made ahead.
    """
    nodes = [node for node in ray.nodes() if node["Alive"]] if cfg.per_node else []
    marked = [node for node in nodes if node["Resources"].get("sandbox")]
    made = [keeper(cfg, node["NodeID"]) for node in marked or nodes]
    for actor in made if cfg.ahead else []:
        actor.schedule.remote(list(coming))
    try:
        yield
    finally:
        if made:
            ray.wait([actor.drain.remote() for actor in made], num_returns=len(made), timeout=_DRAIN_S)
        for actor in made:
            ray.kill(actor)


class Lender:
    """The node's keeper, seen from an actor that borrows."""

    def __init__(self, cfg: config.Sandbox) -> None:
        self._cfg = cfg
        self._handle: Any = None
        self._owner = cgroup.label(os.getpid())

    def open(self, spec: SandboxSpec) -> AbstractAsyncContextManager[Sandbox]:
        """See sandbox.open_sandbox."""
        return borrow(self.call, spec, self._owner)

    async def call(self, name: str, *words: Any, **options: Any) -> Any:
        """What a method of the pool returns or raises; SandboxLost if the pool died."""
        if self._handle is None:
            self._handle = keeper(self._cfg, ray.get_runtime_context().get_node_id())
        try:
            return await getattr(self._handle, name).remote(*words, **options)
        except RayTaskError as error:
            raise error.cause from None
        except RayActorError as error:
            self._handle = None
            raise SandboxLost(f"the actor that lends sandboxes on this node is gone: {error}") from None


def borrow_here(cfg: config.Sandbox) -> None:
    """Let this process borrow from its node's keeper, if there is to be one."""
    if cfg.per_node:
        sandbox.borrow_from(Lender(cfg).open, backend=cfg.backend)


def creation_s(cfg: config.Sandbox) -> float:
    """How long a sandbox may take to be there; a pod's image may have to be fetched."""
    return 120.0 + (cfg.kubernetes.start_s if cfg.backend == "kubernetes" else 0.0)


def setup_s(cfg: config.Sandbox) -> float:
    """How long opening and closing a sandbox may take, and the answers of a lost one."""
    return creation_s(cfg) + (cfg.wait_s if cfg.per_node else 0.0)
