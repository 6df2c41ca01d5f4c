"""The driver of a fitting stage: what is learnt from, by whom, and when the new policy is whole."""

from __future__ import annotations

import json
import os
import shutil
import time
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from entropo_ray import config, store
from entropo_ray.records import Label, Pair, Policy
from entropo_ray.train import objective, rows
from entropo_ray.train import reference as reference_pass
from entropo_ray.train.batch import Key
from entropo_ray.train.rows import Size
from entropo_ray.train.step import STEPS, Job, Unit

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
    units = [_unit([key], found) for key in sorted(found) if found[key].actions]
    job = Job("example", policy, examples, tuple(units), cfg, seed, to, read_epochs=read_epochs)
    return _run(job, to) | {"dropped_rows": float(len(found) - len(units))}


def fit(
    policy: Policy, reference: Policy, out: store.Round, cfg: config.Train, *, seed: int, to: Path
) -> dict[str, float]:
    """The EntroPO update of one round: whole Hugging Face weights at `to`.

    `out.preferences` names trajectories of `out.trajectories` by key; their reference log-probs are made first and kept
    in `out.reference`. Raises ValueError for a key without a trajectory, a trajectory longer than `max_tokens` or
    without action tokens, and where there is nothing to learn from.
    """
    found = rows.sizes(out.trajectories)
    units = _pairs(out, found) if cfg.loss == "dpo" else _labels(out, found)
    job = Job("pair" if cfg.loss == "dpo" else "label", policy, out.trajectories, tuple(units), cfg, seed, to)
    _check(job)
    keys = sorted({key for unit in units for key in unit.keys})
    reference_pass.score(reference, out.trajectories, keys, cfg, to=out.reference)
    job = replace(job, reference=out.reference, length=_length(cfg, out.reference))
    return _run(replace(job, baseline=_baseline(job, keys)), to)


def _pairs(out: store.Round, found: Mapping[Key, Size]) -> list[Unit]:
    pairs = sorted(store.read(out.preferences, Pair), key=lambda pair: (pair.task_id, pair.chosen, pair.rejected))
    return [_unit([(pair.task_id, pair.chosen), (pair.task_id, pair.rejected)], found) for pair in pairs]


def _labels(out: store.Round, found: Mapping[Key, Size]) -> list[Unit]:
    labels = sorted(store.read(out.preferences, Label), key=lambda label: (label.task_id, label.sample))
    return [_unit([(label.task_id, label.sample)], found, desirable=label.desirable) for label in labels]


def _unit(keys: Iterable[Key], found: Mapping[Key, Size], *, desirable: bool = True) -> Unit:
    keys = tuple(keys)
    for key in keys:
        if key not in found:
            raise ValueError(f"preferences name {key}, which is not among the trajectories: make both again")
    sizes = [found[key] for key in keys]
    return Unit(
        keys=keys,
        actions=sum(size.actions for size in sizes),
        tokens=sum(size.tokens for size in sizes),
        squares=sum(size.tokens**2 for size in sizes),
        desirable=desirable,
        longest=max(size.tokens for size in sizes),
        shortest=min(size.actions for size in sizes),
    )


def _check(job: Job) -> None:
    """Refuse what cannot be learnt from, before any machine is asked for."""
    if not job.units:
        raise ValueError(f"{job.trajectories}: no {job.kind} to learn from")
    for unit in job.units:
        if unit.longest > job.cfg.max_tokens:
            raise ValueError(
                f"one of {list(unit.keys)} has {unit.longest} tokens, more than max_tokens={job.cfg.max_tokens}: "
                "raise it, or sample shorter episodes (trajectories are never cut)"
            )
        if not unit.shortest:
            raise ValueError(f"one of {list(unit.keys)} has no action token: there is nothing in it to prefer")


def _length(cfg: config.Train, reference: Path) -> dict[str, float]:
    """Length options of the reward, fixed for the round from the reference's own view of its data."""
    sums = rows.entropy_sums(reference).values()
    nats, tokens = sum(nats for nats, _ in sums), sum(tokens for _, tokens in sums)
    return {"raw": {}, "debias": {"hbar": nats / tokens}, "mean": {"scale": tokens / len(sums)}}[cfg.length]


def _baseline(job: Job, keys: list[Key]) -> float:
    """z0 before the first step: the mean reward of the round's trajectories while policy and reference agree."""
    if job.kind != "label" or job.reference is None:
        return 0.0
    cfg = job.cfg
    assert isinstance(cfg, config.Train)
    logp = rows.references(job.reference, keys)
    total = torch.tensor([float(logp[key].sum(dtype="float64")) for key in keys], dtype=torch.float64)
    tokens = torch.tensor([len(logp[key]) for key in keys], dtype=torch.float64)
    rewards = objective.reward(total, total, beta=cfg.beta, entropy=cfg.entropy, tokens=tokens, **(job.length or {}))
    return float(rewards.mean())


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
    for name in lines[0].keys() - {"step", "lr", "seconds", "pid"}:
        values = [line[name] for line in lines]
        total = sum(values)
        numbers[name] = total if name in _SUMS else max(values) if name == "peak_gib" else total / len(values)
    return numbers | {"loss_first": lines[0]["loss"], "loss_last": lines[-1]["loss"]}
