"""Updates without Ray: as one process, or as the ranks that torchrun started, on any host with PyTorch.

Rank 0 drives, as the driver on a cluster does; the other ranks take orders from it until it is done. An update that is
killed goes on from its last checkpoint when the same command is given again (or torchrun starts its ranks again).
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore
from torch.distributed.rendezvous import rendezvous

from entropo_ray import config, store
from entropo_ray.records import Policy
from entropo_ray.train.batch import Key
from entropo_ray.train.reference import ReferenceScorer
from entropo_ray.train.step import Job
from entropo_ray.train.update import preferred, publish
from entropo_ray.train.worker import Fitting

_WAIT = timedelta(hours=6)  # for an order: rank 0 may be reading a round, others have nothing to do meanwhile
_KEPT = 2  # checkpoints
_WHOSE = "whose"  # the digest of the update that a partial directory belongs to


@contextmanager
def ranks(*, gpus: bool) -> Iterator[bool]:
    """The process group of this start; whether this rank drives. The others have served all orders when it returns."""
    meeting, rank, count = _meeting()
    local = os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists on it
    if gpus:
        torch.cuda.set_device(int(local))
    dist.init_process_group("nccl" if gpus else "gloo", store=meeting, rank=rank, world_size=count, timeout=_WAIT)
    if dist.get_rank():
        while (order := _told(None)) is not None:
            order()
        yield False
    else:
        try:
            yield True
        except BaseException:
            if not _Busy.now:  # the others wait for an order; amid one they would take this for another collective
                _told(None)
            raise
        _told(None)
    dist.destroy_process_group()  # not after an error: it would wait for ranks that are in the middle of something


def _meeting() -> tuple[Any, int, int]:
    """Where the ranks meet, this one's number, and how many there are."""
    if "WORLD_SIZE" not in os.environ:  # not started by torchrun: this process is all there is, and needs no port
        return HashStore(), 0, 1
    meeting, rank, count = next(rendezvous("env://"))
    # torchrun starts lost ranks again with the store of the first ones, where their addresses still are
    return PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", meeting), rank, count


def fit(
    policy: Policy, reference: Policy, out: store.Round, cfg: config.Train, *, seed: int, to: Path
) -> dict[str, float]:
    """The EntroPO update of one round as entropo_ray.train.fit.fit does it; called by the rank that drives.

    ValueError where train.workers is not the number of ranks, and as of update.preferred.
    """
    count = dist.get_world_size()
    if cfg.workers != count:
        raise ValueError(f"train.workers={cfg.workers}: {count} ranks were started; give train.workers={count}")
    job, numbers = preferred(policy, reference, out, cfg, seed=seed, to=to, through=by_ranks)
    started = time.perf_counter()
    partial = _partial(job, to, count)
    _all(Train(replace(job, to=partial)))
    shutil.rmtree(partial / Folder.NAME, ignore_errors=True)
    (partial / _WHOSE).unlink()
    return numbers | publish(job, partial, to) | {"seconds": time.perf_counter() - started}


def _partial(job: Job, to: Path, count: int) -> Path:
    """The same directory at each start, whose checkpoints are gone on from, if it belongs to this very update."""
    partial = to.with_name(f".{to.name}.alone.partial")
    mine = hashlib.sha256(repr((replace(job, to=to), count)).encode()).hexdigest()
    for other in to.parent.glob(f".{to.name}.*.partial"):
        told = other / _WHOSE
        if other != partial or not told.is_file() or told.read_text() != mine:
            shutil.rmtree(other)
    partial.mkdir(parents=True, exist_ok=True)
    store.save(partial / _WHOSE, mine)
    return partial


def by_ranks(keys: Sequence[Key], cfg: config.Fit, to: Path, *source: Any) -> None:
    """A scoring pass over all ranks; rank r scores every so-manieth key from the r-th on."""
    _all(Score(tuple(keys), cfg, to, source))


@dataclass(frozen=True)
class Train:
    """The order to fit."""

    job: Job

    def __call__(self) -> None:
        Fitting(self.job, Folder(self.job.to / Folder.NAME)).run()


@dataclass(frozen=True)
class Score:
    """The order to score."""

    keys: tuple[Key, ...]
    cfg: config.Fit
    to: Path
    source: tuple[Any, ...]

    def __call__(self) -> None:
        mine = self.keys[dist.get_rank() :: dist.get_world_size()]
        scorer = ReferenceScorer(self.cfg, self.to, *self.source) if mine else None
        for start in range(0, len(mine), 2 * self.cfg.micro_batch):
            batch = mine[start : start + 2 * self.cfg.micro_batch]
            assert scorer is not None
            scorer({"task_id": np.array([t for t, _ in batch]), "sample": np.array([s for _, s in batch])})
        dist.barrier()


def _all(order: Callable[[], None]) -> None:
    """Have every rank do it; called by rank 0."""
    _told(order)
    _Busy.now = True
    order()
    _Busy.now = False


class _Busy:
    """Whether an order is carried out."""

    now = False


def _told(order: Callable[[], None] | None) -> Callable[[], None] | None:
    """What rank 0 said last; None: there is no more to do."""
    said = [order]
    dist.broadcast_object_list(said, src=0)
    return said[0]


class Folder:
    """Checkpoints in a directory that all ranks see."""

    NAME = "checkpoints"

    def __init__(self, home: Path) -> None:
        self.home = home

    def restore(self, load: Callable[[Path], None]) -> None:
        """Hand the last whole checkpoint's folder to `load`, if there is one."""
        latest = self.home / "latest"
        if latest.is_file():
            load(self.home / latest.read_text())

    def keep(self, step: int, save: Callable[[Path], None]) -> None:
        """What `save` writes becomes the checkpoint before `step`; its name is written last."""
        name = f"step_{step:06d}"
        save(self.home / name)
        dist.barrier()
        if dist.get_rank() == 0:
            store.save(self.home / "latest", name)
            for old in sorted(self.home.glob("step_*"))[:-_KEPT]:
                shutil.rmtree(old)
        dist.barrier()
