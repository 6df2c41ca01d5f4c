"""The driver of a fitting stage: what is learnt from, by whom, and when the new policy is whole."""

from __future__ import annotations

import json
import os
import shutil
import time
import uuid
from dataclasses import replace
from pathlib import Path

from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from entropo_ray import config, store
from entropo_ray.records import Policy
from entropo_ray.train import objective, rows
from entropo_ray.train import reference as reference_pass
from entropo_ray.train.step import STEPS, Job, Start
from entropo_ray.train.units import (
    entropy_of,
    fresh,
    health,
    keys_of,
    kl_of,
    length_of,
    lost_share,
    narrowed,
    start_of,
    swap,
    unit,
    units_of,
)

UPDATE = "update.json"  # beside the weights: what an update leaves for the next one
_RESTARTS = 3
# glibc gives blocks of this size back to the kernel and faults them in again for every tensor of a step; a CPU rank
# that keeps them read 13 % more tokens a second (0.98M parameters, packs of 8 rows)
_KEEP_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),  # the most that glibc takes
    "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
    "MALLOC_TOP_PAD_": str(64 << 20),
}
_SUMS = ("rows", "tokens", "action_tokens")


def imitate(
    policy: Policy, examples: Path, cfg: config.Fit, *, seed: int, to: Path, read_epochs: int = 0
) -> dict[str, float]:
    """Whole Hugging Face weights at `to`, fitted to the action tokens of the Example product `examples`.

    The first `read_epochs` of the epochs fit all tokens: a model that knows no language learns it from what it reads.
    Examples without action tokens are left out and counted (`dropped_rows`). Raises ValueError for an example longer
    than `max_tokens`, for two with one key, and where none is left.
    """
    found = rows.sizes(examples)
    units = [unit([key], found) for key in sorted(found) if found[key].actions]
    job = Job("example", policy, examples, tuple(units), cfg, seed, to, read_epochs=read_epochs)
    return _run(job, to) | {"dropped_rows": float(len(found) - len(units))}


def fit(
    policy: Policy, reference: Policy, out: store.Round, cfg: config.Train, *, seed: int, to: Path
) -> dict[str, float]:
    """The EntroPO update of one round: whole Hugging Face weights at `to`.

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
        return _run(job, to)
    keys = sorted(key for key in found if found[key].actions) if cfg.entropy_target else keys_of(units)
    reference_pass.score(reference, out.trajectories, keys, cfg, to=out.reference, cut=cut)
    moved = policy.path != reference.path
    if moved:
        reference_pass.measure(policy, reference, out.trajectories, keys, cfg, to=out.current, cut=cut)
    start = start_of(out, keys, moved=moved, cut=cut)
    cfg = replace(cfg, entropy=_entropy_weight(policy, start, cfg))
    units, numbers = fresh(units, start, rows.behaviour(out.trajectories, keys_of(units), cut), cfg)
    numbers |= {"entropy_start": entropy_of(start), "kl_start": kl_of(start), "entropy_weight": cfg.entropy}
    numbers["lost_share"] = lost_share(keys_of(units), found)
    if cfg.turns == "all":
        start = narrowed(start, keys_of(units))
    else:
        start = start_of(out, keys_of(units), moved=moved, turns=cfg, cut=cut)
    length = length_of(cfg, start)
    numbers |= health(units, start, cfg, length)
    job = replace(job, units=tuple(units), cfg=cfg, reference=out.reference, start=start, length=length)
    job = _with_baseline(job, reference, out)
    return numbers | _run(job, to)


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


def _with_baseline(job: Job, reference: Policy, out: store.Round) -> Job:
    """What kto's reference point needs beside the trajectories: the reference as a model, or swapped answers."""
    cfg = job.cfg
    assert isinstance(cfg, config.Train)
    if cfg.loss != "kto":
        return job
    if cfg.z0 == "exact":
        return replace(job, anchor=reference)
    if cfg.z0 in ("kto", "released"):
        keys = sorted(swap(out, job.units, seed=job.seed, cut=job.cut))
        reference_pass.score(reference, out.swapped, keys, cfg, to=out.swapped_reference)
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


def _run(job: Job, to: Path) -> dict[str, float]:
    """Start the ranks, wait for them, publish what rank 0 wrote."""
    _check(job)
    started = time.perf_counter()
    partial = _apart(to)
    cfg = job.cfg
    # the default of 2 s is the pace at which reports are taken and the end is noticed
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    trainer = TorchTrainer(
        _rank,
        train_loop_config={"job": replace(job, to=partial)},
        scaling_config=ScalingConfig(
            num_workers=cfg.workers,
            use_gpu=cfg.worker_gpus > 0,
            resources_per_worker={"CPU": 1, **({"GPU": cfg.worker_gpus} if cfg.worker_gpus else {})},
        ),
        torch_config=TorchConfig(backend="nccl" if cfg.worker_gpus else "gloo"),
        run_config=RunConfig(
            name="ranks",
            storage_path=str(partial),
            failure_config=FailureConfig(max_failures=_RESTARTS if cfg.checkpoint_steps else 0),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            worker_runtime_env={} if cfg.worker_gpus else {"env_vars": _KEEP_MEMORY},
        ),
    )
    trainer.fit()
    shutil.rmtree(partial / "ranks", ignore_errors=True)
    if isinstance(cfg, config.Train):
        (partial / UPDATE).write_text(json.dumps({"loss": cfg.loss, "beta": cfg.beta, "entropy": cfg.entropy}) + "\n")
    numbers = _numbers(partial / STEPS) | {"seconds": time.perf_counter() - started}
    store.publish(partial, to, policy=str(job.policy.path), seed=job.seed)
    return numbers


def _apart(to: Path) -> Path:
    """An empty directory of this start alone: ranks of a killed driver live on for seconds, and may still write."""
    for stale in to.parent.glob(f".{to.name}.*.partial"):
        shutil.rmtree(stale, ignore_errors=True)
    partial = to.with_name(f".{to.name}.{uuid.uuid4().hex[:8]}.partial")
    partial.mkdir(parents=True)
    return partial


def _rank(settings: dict[str, Job]) -> None:
    from entropo_ray.train.worker import train_loop  # here, so that the driver need not import DeepSpeed

    train_loop(settings["job"])


def _numbers(log: Path) -> dict[str, float]:
    """Means over steps; rows and tokens are summed, memory is the peak."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    numbers: dict[str, float] = {"steps": float(len(lines))}
    for name in lines[0].keys() - {"step", "lr", "seconds", "pid", "weights"}:
        values = [line[name] for line in lines]
        total = sum(values)
        numbers[name] = total if name in _SUMS else max(values) if name == "peak_gib" else total / len(values)
    return numbers | {"loss_first": lines[0]["loss"], "loss_last": lines[-1]["loss"]}
