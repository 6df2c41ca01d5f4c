"""The reference pass: log-probs and entropies of action tokens under the reference, once a round, as a Ray Data stage.

The same scorer, precision and attention as in training, so that a policy that equals its reference has margin 0.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray.data
import torch

from entropo_ray import config, store
from entropo_ray.records import Policy, Reference
from entropo_ray.train import rows
from entropo_ray.train.batch import Key, pack
from entropo_ray.train.logprob import Scorer
from entropo_ray.train.model import load

_SOURCE = "source.json"


def score(policy: Policy, trajectories: Path, keys: Sequence[Key], cfg: config.Fit, *, to: Path) -> None:
    """A Reference row at `to` for each key.

    What an earlier start left there is kept if it was made by the same policy in the same precision, and has all keys
    or is still growing.
    """
    source = json.dumps({"reference": str(policy.path), "precision": cfg.precision})
    whole = store.done(to)
    if whole and _same(to, source) and store.keys(to) >= set(keys):
        return
    if to.exists() and (whole or not _same(to, source)):
        shutil.rmtree(to)
    to.mkdir(parents=True, exist_ok=True)
    (to / _SOURCE).write_text(source)
    scored = store.keys(to)
    missing = [key for key in keys if key not in scored]
    if missing:
        _map(policy, trajectories, missing, cfg, to)
    store.seal(to, Reference)


def _same(to: Path, source: str) -> bool:
    return (to / _SOURCE).is_file() and (to / _SOURCE).read_text() == source


def _map(policy: Policy, trajectories: Path, keys: Sequence[Key], cfg: config.Fit, to: Path) -> None:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    items = ray.data.from_items([{"task_id": task_id, "sample": sample} for task_id, sample in keys])
    scored = items.map_batches(
        ReferenceScorer,
        fn_constructor_args=(policy, trajectories, cfg, to),
        batch_size=2 * cfg.micro_batch,
        concurrency=cfg.workers,
        num_cpus=0.5,
        num_gpus=cfg.worker_gpus,
    )
    count = sum(row["rows"] for row in scored.iter_rows())
    assert count == len(keys), f"{to}: {count} of {len(keys)} trajectories were scored"


class ReferenceScorer:
    """Scores batches of keys. Rows are durable before a batch is reported."""

    def __init__(self, policy: Policy, trajectories: Path, cfg: config.Fit, to: Path) -> None:
        self.trajectories, self.to = trajectories, to
        self.device = "cuda" if cfg.worker_gpus else "cpu"
        if not cfg.worker_gpus:
            torch.set_num_threads(cfg.worker_threads or max(1, len(os.sched_getaffinity(0)) // cfg.workers))
        self.scorer = Scorer(load(policy, cfg)).eval().to(self.device)

    @torch.no_grad()
    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        keys = list(zip(batch["task_id"].tolist(), batch["sample"].tolist(), strict=True))
        found = rows.read(self.trajectories, keys)
        packed = pack([found[key] for key in keys])
        scores = self.scorer(packed.to(self.device))
        split = [values.cpu().split(list(packed.actions)) for values in (scores.logp, scores.entropy)]
        for key, logp, entropy in zip(keys, *split, strict=True):
            record = Reference(
                task_id=key[0], sample=key[1], ref_logp=tuple(logp.tolist()), ref_entropy=tuple(entropy.tolist())
            )
            # a part for each key: an actor of a killed start that is still at work cannot leave a row twice
            store.append(self.to, Reference, [record], key=key)
        return {"rows": [len(keys)]}
