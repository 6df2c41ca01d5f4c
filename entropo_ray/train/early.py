"""Reference log-probs of trajectories while others are still being sampled.

Where updates have machines of their own, those are idle while engines sample. Scorers take what is free once the first
trajectory has landed, that is, beside running engines, and are given back when sampling ends; an engine that restarts
meanwhile may have to wait for one of them, so this is for clusters with room for both. What could not be scored, the
update's own pass scores: an error here is said and costs nothing else.
"""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import ray

from entropo_ray import config, preference, store
from entropo_ray.records import Outcome, Policy
from entropo_ray.train import rows
from entropo_ray.train.batch import Key, Row
from entropo_ray.train.reference import ReferenceScorer, claim, claimed, source_of

log = logging.getLogger("entropo_ray")
_EVERY_S = 2.0  # a look at what has landed
_START_S = 300.0  # for scorers to load; what is not there by then gives back its place
_LAST_S = 600.0  # for batches that are being scored when sampling ends


@contextmanager
def early(reference: Policy, out: store.Round, cfg: config.Run) -> Iterator[None]:
    """While it lasts, what lands in `out.trajectories` is scored into `out.reference`, if train.reference_early."""
    if not cfg.train.reference_early or cfg.train.kind == "example":
        yield
        return
    watch = Watch(reference, out, cfg)
    thread = threading.Thread(target=watch.run, name="early references", daemon=True)
    thread.start()
    try:
        yield
    except BaseException:
        watch.failed = True  # a stop is waiting: nothing is finished
        raise
    finally:
        watch.over.set()
        thread.join(timeout=_LAST_S + _START_S)
    watch.adopt()


class Watch:
    """Feeds scorers with what has landed."""

    def __init__(self, reference: Policy, out: store.Round, cfg: config.Run) -> None:
        self.policy, self.out, self.cfg, self.preference = reference, out, cfg.train, cfg.preference
        self.cut = self.cfg.max_tokens if self.cfg.variant == "released" else None
        self.over = threading.Event()
        self.failed = False  # sampling or scoring: nothing that was scored is of use to this start
        self.names: set[str] = set()  # of parts that were looked at
        self.outcomes: defaultdict[str, list[Outcome]] = defaultdict(list)
        self.told: set[Key] = set()

    def run(self) -> None:
        """Until `over` is set and the last batches are scored."""
        pool: list[Any] = []
        try:
            self._begin()
            while not self.over.wait(_EVERY_S) and not self._look():
                pass
            pool = self._pool()
            self._feed(pool)
        except Exception as error:  # whatever it is, the update's own pass does it all again
            self.failed = True
            log.warning("train.reference_early: %s; references are scored when sampling has ended", error)
        finally:
            for actor in pool:
                ray.kill(actor)

    def adopt(self) -> None:
        """What was scored is of the product that is whole now, but for attempts that were played once more since."""
        if self.failed or not store.done(self.out.trajectories):
            return
        parts = sorted(self.out.reference.glob("part-*.parquet"))
        told = {(facts["task_id"], int(facts["sample"])): facts["of"] for facts in map(store.facts_of, parts)}
        now = rows.digests(self.out.trajectories, told)
        for key in (key for key, digest in told.items() if now.get(key) != digest):
            store.part_of(self.out.reference, key).unlink()
        claim(self.out.reference, source_of(self.policy, None, self.out.trajectories, self.cfg, self.cut))

    def _begin(self) -> None:
        """Keep an earlier start's scores if they are of the trajectories that lie here."""
        source = source_of(self.policy, None, self.out.trajectories, self.cfg, self.cut, growing=True)
        if not (claimed(self.out.reference, source) and store.keys(self.out.reference) <= self._keys()):
            shutil.rmtree(self.out.reference, ignore_errors=True)
        claim(self.out.reference, source)
        self.told = store.keys(self.out.reference)

    def _keys(self) -> set[Key]:
        return store.keys(self.out.trajectories)

    def _pool(self) -> list[Any]:
        """As many scorers as have room now, at most one for each worker of the update."""
        free = ray.available_resources()
        each = {"CPU": 0.5} | ({"GPU": float(self.cfg.worker_gpus)} if self.cfg.worker_gpus else {})
        count = min(self.cfg.workers, *(int(free.get(name, 0.0) / size) for name, size in each.items()))
        if count < self.cfg.workers and not self.over.is_set():
            log.info("train.reference_early: room for %d of %d scorers beside sampling", count, self.cfg.workers)
        made = ray.remote(num_cpus=0.5, num_gpus=self.cfg.worker_gpus)(Landed)
        words = (self.cfg, self.out.reference, self.policy, None, self.out.trajectories, self.cut)
        return [made.remote(*words) for _ in range(0 if self.over.is_set() else count)]

    def _feed(self, pool: list[Any]) -> None:
        """Hand out batches until sampling ends, then wait for those that are being scored."""
        work = {actor.__ray_ready__.remote(): actor for actor in pool}
        loading, started = set(work), time.monotonic()
        idle: list[Any] = []
        while pool and not self.over.wait(_EVERY_S):
            idle += _free(work, 0)
            if time.monotonic() - started > _START_S:
                for ref in loading & work.keys():
                    ray.kill(work.pop(ref))
            self._look()
            while idle and (batch := self._batch()):
                actor = idle.pop()
                work[actor.score.remote(batch)] = actor
        work = {ref: actor for ref, actor in work.items() if ref not in loading}
        deadline = time.monotonic() + _LAST_S
        while work and not self.failed:
            _free(work, 1.0)
            if time.monotonic() > deadline:
                raise TimeoutError(f"{len(work)} batches took more than {_LAST_S:.0f} s")

    def _look(self) -> bool:
        """Take in what has landed since; whether anything has, ever."""
        for one in store.landed(self.out.trajectories, Outcome, self.names):
            self.outcomes[one.task_id].append(one)
        return bool(self.names)

    def _batch(self) -> list[Key]:
        """The next keys to score: of attempts that teach, and where pairs are learnt from, of tasks with both sides."""
        found: list[Key] = []
        for mine in self.outcomes.values():
            kept = [one for one in preference.teaching(mine, self.preference)[0] if self._fits(one)]
            if self.cfg.kind == "label" or len({one.resolved for one in kept}) == 2:
                found += [(one.task_id, one.sample) for one in kept]
        batch = [key for key in found if key not in self.told][: 2 * self.cfg.micro_batch]
        self.told |= set(batch)
        return batch

    def _fits(self, one: Outcome) -> bool:
        return one.num_actions > 0 and (self.cut is not None or one.num_tokens <= self.cfg.max_tokens)


def _free(work: dict[Any, Any], seconds: float) -> list[Any]:
    """Actors that are through with their work within so many seconds; it is taken out. RayError if it failed."""
    done, _ = ray.wait(list(work), num_returns=len(work), timeout=seconds) if work else ([], [])
    ray.get(done)
    return [work.pop(ref) for ref in done]


class Landed(ReferenceScorer):
    """Scores rows of a product that still grows."""

    def score(self, keys: Sequence[Key]) -> None:
        """Their rows are durable on return."""
        self({"task_id": np.array([task for task, _ in keys]), "sample": np.array([sample for _, sample in keys])})

    def _rows(self, keys: Sequence[Key]) -> dict[Key, Row]:
        return rows.landed(self.trajectories, keys)
