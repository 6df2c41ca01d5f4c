"""Scoring passes over finished trajectories, keyed by task and sample; on a cluster, each is a Ray Data stage.

`score` leaves the reference's log-probs and entropies, once a round; `measure` leaves a policy's own, and its exact KL
to another policy. The same scorer, precision and attention as in training, so that a policy that equals its reference
has margin 0 and KL 0.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from entropo_ray import config, store
from entropo_ray.records import Measure, Policy, Reference
from entropo_ray.train import rows
from entropo_ray.train.batch import Key, Row, pack
from entropo_ray.train.logprob import Scorer
from entropo_ray.train.model import load

_SOURCE = "source.json"


class Through(Protocol):
    """Who scores: makes a ReferenceScorer(cfg, to, *source) wherever it wants and feeds it all of `keys`."""

    def __call__(self, keys: Sequence[Key], cfg: config.Fit, to: Path, *source: Any) -> None: ...


def by_ray_data(keys: Sequence[Key], cfg: config.Fit, to: Path, *source: Any) -> None:
    """On a Ray cluster, streamed over as many actors as the update has workers."""
    import ray.data  # here: the same passes run on hosts without Ray

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    items = ray.data.from_items([{"task_id": task_id, "sample": sample} for task_id, sample in keys])
    scored = items.map_batches(
        ReferenceScorer,
        fn_constructor_args=(cfg, to, *source),
        batch_size=2 * cfg.micro_batch,
        concurrency=cfg.workers,
        num_cpus=0.5,
        num_gpus=cfg.worker_gpus,
    )
    count = sum(row["rows"] for row in scored.iter_rows())
    assert count == len(keys), f"{to}: {count} of {len(keys)} trajectories were scored"


def score(
    policy: Policy,
    trajectories: Path,
    keys: Sequence[Key] | None,
    cfg: config.Fit,
    *,
    to: Path,
    cut: int | None = None,
    through: Through = by_ray_data,
) -> dict[str, float]:
    """A Reference row at `to` for each key, of the first `cut` tokens of its trajectory; how many.

    No keys: every trajectory that has an action token.

    What an earlier start left there is kept if it was made by the same policy in the same precision, and has all keys
    or is still growing.
    """
    return _pass(policy, None, trajectories, keys, cfg, to, cut, through)


def measure(
    policy: Policy,
    other: Policy,
    trajectories: Path,
    keys: Sequence[Key] | None,
    cfg: config.Fit,
    *,
    to: Path,
    cut: int | None = None,
    through: Through = by_ray_data,
) -> dict[str, float]:
    """A Measure row at `to` for each key: `policy`'s log-probs and entropies, and its KL to `other`. Kept as above."""
    return _pass(policy, other, trajectories, keys, cfg, to, cut, through)


def same_vocabulary(policy: Policy, other: Policy) -> None:
    """ValueError where both are here and speak of different token ids: there is no KL between them."""
    files = [one.path / "config.json" for one in (policy, other)]
    if all(file.is_file() for file in files):
        mine, its = (json.loads(file.read_text()).get("vocab_size") for file in files)
        if mine != its:
            raise ValueError(
                f"{policy.path} has {mine} token ids and {other.path} has {its}, so there is no KL between them: "
                "give evaluate.measure=false"
            )


def _pass(
    policy: Policy,
    other: Policy | None,
    trajectories: Path,
    keys: Sequence[Key] | None,
    cfg: config.Fit,
    to: Path,
    cut: int | None,
    through: Through,
) -> dict[str, float]:
    if keys is None:
        keys = sorted(key for key, size in rows.sizes(trajectories, cut).items() if size.actions)
    source = source_of(policy, other, trajectories, cfg, cut)
    whole = store.done(to)
    if whole and claimed(to, source) and store.keys(to) >= set(keys):
        return {"scored": 0.0}
    if to.exists() and (whole or not claimed(to, source)):
        shutil.rmtree(to)
    claim(to, source)
    scored = store.keys(to)
    missing = [key for key in keys if key not in scored]
    if missing:
        through(missing, cfg, to, policy, other, trajectories, cut)
    store.seal(to, Measure if other else Reference)
    return {"scored": float(len(missing))}


def source_of(
    policy: Policy, other: Policy | None, trajectories: Path, cfg: config.Fit, cut: int | None, *, growing: bool = False
) -> str:
    """What scores were made from; `growing`: from trajectories that are still being sampled."""
    return json.dumps(
        {
            "policy": str(policy.path),
            "other": other and str(other.path),
            "of": str(trajectories),
            "made": None if growing else (trajectories / "done").stat().st_mtime_ns,
            "precision": cfg.precision,
            "cut": cut,
        }
    )


def claim(to: Path, source: str) -> None:
    """Say what the scores at `to` are made from."""
    to.mkdir(parents=True, exist_ok=True)
    store.save(to / _SOURCE, source)


def claimed(to: Path, source: str) -> bool:
    """Whether the scores at `to` are made from that."""
    return (to / _SOURCE).is_file() and (to / _SOURCE).read_text() == source


class ReferenceScorer:
    """Scores batches of keys. Rows are durable before a batch is reported."""

    def __init__(
        self, cfg: config.Fit, to: Path, policy: Policy, other: Policy | None, trajectories: Path, cut: int | None
    ) -> None:
        self.trajectories, self.to, self.cut, self.share = trajectories, to, cut, cfg.share_prefix
        self.device = "cuda" if cfg.worker_gpus else "cpu"
        if not cfg.worker_gpus:
            torch.set_num_threads(cfg.worker_threads or max(1, len(os.sched_getaffinity(0)) // cfg.workers))
        self.scorer = Scorer(load(policy, cfg), floats=cfg.logits).eval().to(self.device)
        self.other = Scorer(load(other, cfg), floats=cfg.logits).eval().to(self.device) if other else None

    @torch.no_grad()
    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        keys = list(zip(batch["task_id"].tolist(), batch["sample"].tolist(), strict=True))
        found = self._rows(keys)
        packed = pack([found[key].head(self.cut) for key in keys], share=self.share).to(self.device)
        scores = self.scorer(packed, self.other.anchor(packed) if self.other else None)
        columns = [scores.logp, scores.entropy, *([] if scores.kl is None else [scores.kl])]
        split = [values.cpu().split(list(packed.actions)) for values in columns]
        for key, *values in zip(packed.keys, *split, strict=True):
            # a part for each key: an actor of a killed start that is still at work cannot leave a row twice
            self._append(found[key], *(tuple(column.tolist()) for column in values))
        return {"rows": [len(keys)]}

    def _rows(self, keys: Sequence[Key]) -> dict[Key, Row]:
        return rows.read(self.trajectories, keys)

    def _append(self, row: Row, logp: tuple[float, ...], entropy: tuple[float, ...], *kl: tuple[float, ...]) -> None:
        task_id, sample = key = row.key
        if kl:
            measured = Measure(task_id=task_id, sample=sample, logp=logp, entropy=entropy, kl=kl[0])
            store.append(self.to, Measure, [measured], key=key, of=rows.digest(row))
        else:
            record = Reference(task_id=task_id, sample=sample, ref_logp=logp, ref_entropy=entropy)
            store.append(self.to, Reference, [record], key=key, of=rows.digest(row))
