"""What an update learns from, and what it leaves: everything about it that does not depend on who runs its ranks."""

from __future__ import annotations

import json
import shutil
import uuid
from dataclasses import replace
from pathlib import Path

from entropo_ray import config, store
from entropo_ray.records import Policy
from entropo_ray.train import objective, rows
from entropo_ray.train import reference as passes
from entropo_ray.train.step import STEPS, Job, Start
from entropo_ray.train.units import (
    entropy_of,
    fresh,
    health,
    keys_of,
    kl_of,
    length_of,
    lost_share,
    mismatch,
    narrowed,
    start_of,
    swap,
    unit,
    units_of,
)

UPDATE = "update.json"  # beside the weights: what an update leaves for the next one
_SUMS = ("rows", "tokens", "action_tokens")


def imitation(
    policy: Policy, examples: Path, cfg: config.Fit, *, seed: int, to: Path, read_epochs: int = 0
) -> tuple[Job, dict[str, float]]:
    """A job for the Example product `examples`, and how many examples have no action token and are left out.

    ValueError for an example longer than `max_tokens`, for two with one key, and where none is left.
    """
    found = rows.sizes(examples)
    units = [unit([key], found) for key in sorted(found) if found[key].actions]
    job = Job("example", policy, examples, tuple(units), cfg, seed, to, read_epochs=read_epochs)
    _check(job)
    return job, {"dropped_rows": float(len(found) - len(units))}


def preferred(
    policy: Policy,
    reference: Policy,
    out: store.Round,
    cfg: config.Train,
    *,
    seed: int,
    to: Path,
    through: passes.Through,
) -> tuple[Job, dict[str, float]]:
    """A job for the round's preferences, and the numbers of the round before the first step.

    `out.preferences` names trajectories of `out.trajectories` by key; their reference log-probs are made first and kept
    in `out.reference`. Raises ValueError for a key without a trajectory, a trajectory longer than `max_tokens` (never
    cut, unless train.variant is released) or without action tokens, and where there is nothing to learn from.
    """
    cut = cfg.max_tokens if cfg.variant == "released" else None
    found = rows.sizes(out.trajectories, cut)
    units = units_of(out, cfg, found)
    job = Job(cfg.kind, policy, out.trajectories, tuple(units), cfg, seed, to, cut=cut)
    _check(job)
    if job.kind == "example":
        return job, {}
    keys = sorted(key for key in found if found[key].actions) if cfg.entropy_target else keys_of(units)
    passes.score(reference, out.trajectories, keys, cfg, to=out.reference, cut=cut, through=through)
    moved = policy.path != reference.path
    if moved:
        passes.measure(policy, reference, out.trajectories, keys, cfg, to=out.current, cut=cut, through=through)
    start = start_of(out, keys, moved=moved, cut=cut)
    own = (out.current, "logp") if moved else (out.reference, "ref_logp")
    drawn = rows.drawn(out.trajectories, keys, policy.round, cut)
    between = mismatch(drawn, rows.per_token(*own, drawn.keys()), cfg.mismatch_max)
    cfg = replace(cfg, entropy=_entropy_weight(policy, start, cfg))
    units, numbers = fresh(units, start, rows.behaviour(out.trajectories, keys_of(units), cut), cfg)
    numbers |= between
    numbers |= {"entropy_start": entropy_of(start), "kl_start": kl_of(start), "entropy_weight": cfg.entropy}
    numbers["lost_share"] = lost_share(keys_of(units), found)
    if cfg.turns == "all":
        start = narrowed(start, keys_of(units))
    else:
        start = start_of(out, keys_of(units), moved=moved, turns=cfg, cut=cut)
    length = length_of(cfg, start)
    numbers |= health(units, start, cfg, length)
    job = replace(job, units=tuple(units), cfg=cfg, reference=out.reference, start=start, length=length)
    job = _with_baseline(job, reference, out, through)
    _check(job)
    return job, numbers


def _entropy_weight(policy: Policy, start: Start, cfg: config.Train) -> float:
    """lambda of this round: as configured, or what dual ascent makes of the last round's."""
    if cfg.entropy_target is None:
        return cfg.entropy
    before = policy.path / UPDATE
    later = policy.round > 0 and before.is_file()  # a first policy may come from another run
    last = json.loads(before.read_text())["entropy"] if later else cfg.entropy
    return objective.dual(
        last,
        entropy_of(start),
        cfg.entropy_target,
        step=cfg.entropy_step,
        low=cfg.entropy_min,
        high=cfg.entropy_max,
    )


def _with_baseline(job: Job, reference: Policy, out: store.Round, through: passes.Through) -> Job:
    """What kto's reference point needs beside the trajectories: the reference as a model, or swapped answers."""
    cfg = job.cfg
    assert isinstance(cfg, config.Train)
    if cfg.loss != "kto":
        return job
    if cfg.z0 == "exact":
        return replace(job, anchor=reference)
    if cfg.z0 in ("kto", "released"):
        keys = sorted(swap(out, job.units, seed=job.seed, cut=job.cut))
        passes.score(reference, out.swapped, keys, cfg, to=out.swapped_reference, through=through)
        return replace(job, swapped=out.swapped, swapped_reference=out.swapped_reference)
    return job


def _check(job: Job) -> None:
    """Refuse what cannot be learnt from, before any machine is asked for."""
    if not job.units:
        raise ValueError(f"{job.trajectories}: no {job.kind} to learn from")
    for one in job.units:
        if one.longest > job.cfg.max_tokens:
            raise ValueError(
                f"one of {list(one.keys)} has {one.longest} tokens, more than max_tokens={job.cfg.max_tokens}: "
                "raise it, drop such trajectories (preference.max_tokens), or sample shorter episodes; none is cut"
            )
        if not one.shortest:
            raise ValueError(f"one of {list(one.keys)} has no action token: there is nothing in it to prefer")


def apart(to: Path) -> Path:
    """An empty directory of this start alone: ranks of a killed driver live on for seconds, and may still write."""
    for stale in to.parent.glob(f".{to.name}.*.partial"):
        shutil.rmtree(stale, ignore_errors=True)
    partial = to.with_name(f".{to.name}.{uuid.uuid4().hex[:8]}.partial")
    partial.mkdir(parents=True)
    return partial


def publish(job: Job, partial: Path, to: Path) -> dict[str, float]:
    """Make what rank 0 wrote into `partial` the product at `to`; the numbers of its steps."""
    cfg = job.cfg
    if isinstance(cfg, config.Train):
        (partial / UPDATE).write_text(json.dumps({"loss": cfg.loss, "beta": cfg.beta, "entropy": cfg.entropy}) + "\n")
    numbers = _numbers(partial / STEPS)
    store.publish(partial, to, policy=str(job.policy.path), seed=job.seed)
    return numbers


def _numbers(log: Path) -> dict[str, float]:
    """Means over steps; rows and tokens are summed, memory is the peak."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    numbers: dict[str, float] = {"steps": float(len(lines))}
    for name in lines[0].keys() - {"step", "lr", "seconds", "pid", "weights"}:
        values = [line[name] for line in lines]
        total = sum(values)
        numbers[name] = total if name in _SUMS else max(values) if name == "peak_gib" else total / len(values)
    return numbers | {"loss_first": lines[0]["loss"], "loss_last": lines[-1]["loss"]}
