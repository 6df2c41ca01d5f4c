"""What one pack contributes to a step, by the kind of data: an example, a pair or a label."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from entropo_ray import config
from entropo_ray.records import Policy
from entropo_ray.train import objective
from entropo_ray.train.batch import Key, Pack
from entropo_ray.train.logprob import Scores, sums

STEPS = "steps.jsonl"  # one line a step, inside the new policy's directory


@dataclass(frozen=True)
class Unit:
    """What the loss cannot take apart: an example, a labelled trajectory, or a pair (chosen, then rejected)."""

    keys: tuple[Key, ...]
    actions: int  # action tokens over its trajectories
    tokens: int
    squares: int  # sum of squared lengths: attention's share of the cost
    longest: int  # tokens of its longest trajectory
    shortest: int  # action tokens of the one that has fewest
    desirable: bool = True


@dataclass(frozen=True)
class Job:
    """Everything that a rank needs to know."""

    kind: str  # example | pair | label
    policy: Policy
    trajectories: Path  # any product with task_id, sample, token_ids and action_mask
    units: tuple[Unit, ...]
    cfg: config.Fit
    seed: int
    to: Path  # a directory that the driver publishes
    reference: Path | None = None
    length: Mapping[str, float] | None = None  # keyword arguments of objective.reward
    baseline: float = 0.0  # z0 before the first step
    read_epochs: int = 0  # of examples: epochs at the start that fit all tokens, not only the actions


@dataclass(frozen=True)
class Batch:
    """One scored pack and the units in it. A trajectory of several units lies in it once."""

    pack: Pack
    scores: Scores
    units: tuple[Unit, ...]
    weights: Tensor  # [U] float64; 0.0 for a repeat that fills a step
    logp: Tensor  # [B] float64, with gradient
    ref_logp: Tensor  # [B] float64, without; equals logp exactly where policy and reference agree
    tokens: Tensor  # [B] action tokens, float64

    def members(self, place: int) -> Tensor:
        """[U] where in the pack the trajectory number `place` of each unit is."""
        found = {key: number for number, key in enumerate(self.pack.keys)}
        return torch.tensor([found[unit.keys[place]] for unit in self.units], device=self.logp.device)

    def present(self) -> Tensor:
        """[B] 1.0 for trajectories of at least one unit that counts."""
        real = {
            key for unit, weight in zip(self.units, self.weights.tolist(), strict=True) if weight for key in unit.keys
        }
        return torch.tensor([float(key in real) for key in self.pack.keys], device=self.logp.device).double()


def batch_of(
    packed: Pack, scores: Scores, units: tuple[Unit, ...], weights: list[float], reference: Mapping[Key, Tensor]
) -> Batch:
    """Sums per trajectory. `reference` [A] log-probs by key, empty where the loss needs none."""
    logp = sums(scores.logp, packed)
    ratio = torch.zeros_like(logp)
    if reference:
        # subtract per token, then add in double: sums of a long trajectory in fp32 drown a small difference
        ratio = sums(scores.logp - torch.cat([reference[key] for key in packed.keys]).to(logp.device), packed)
    return Batch(
        pack=packed,
        scores=scores,
        units=units,
        weights=torch.tensor(weights, dtype=torch.float64, device=logp.device),
        logp=logp,
        ref_logp=(logp - ratio).detach(),
        tokens=torch.tensor(packed.actions, dtype=torch.float64, device=logp.device),
    )


def _example(batch: Batch, job: Job, baseline: float) -> objective.Loss:
    one = batch.members(0)
    return objective.imitation(batch.logp[one], batch.tokens[one])


def _pair(batch: Batch, job: Job, baseline: float) -> objective.Loss:
    cfg = cast(config.Train, job.cfg)
    chosen, rejected = batch.members(0), batch.members(1)
    return objective.dpo(
        batch.logp[chosen],
        batch.logp[rejected],
        batch.ref_logp[chosen],
        batch.ref_logp[rejected],
        beta=cfg.beta,
        entropy=cfg.entropy,
        smoothing=cfg.smoothing,
        nll=cfg.nll,
        chosen_tokens=batch.tokens[chosen],
        rejected_tokens=batch.tokens[rejected],
        **(job.length or {}),
    )


def _label(batch: Batch, job: Job, baseline: float) -> objective.Loss:
    cfg = cast(config.Train, job.cfg)
    one = batch.members(0)
    return objective.kto(
        batch.logp[one],
        batch.ref_logp[one],
        torch.tensor([unit.desirable for unit in batch.units], device=one.device),
        torch.tensor(baseline, dtype=torch.float64, device=one.device),
        beta=cfg.beta,
        entropy=cfg.entropy,
        weight_pass=cfg.weight_pass,
        weight_fail=cfg.weight_fail,
        tokens=batch.tokens[one],
        **(job.length or {}),
    )


LOSSES: dict[str, Callable[[Batch, Job, float], objective.Loss]] = {"example": _example, "pair": _pair, "label": _label}


def totals(batch: Batch, loss: objective.Loss) -> dict[str, float]:
    """Sums over the pack of what a step reports; repeats count for nothing."""
    present = batch.present()
    found = {
        "loss": (batch.weights * loss.values.detach()).sum(),
        "units": batch.weights.sum(),
        "rows": present.sum(),
        "tokens": (present * torch.tensor(batch.pack.lengths, device=present.device)).sum(),
        "action_tokens": (present * batch.tokens).sum(),
        "entropy": (present * sums(batch.scores.entropy.detach(), batch.pack)).sum(),
    }
    found |= {f"mean {name}": (batch.weights * values).sum() for name, values in loss.measures.items()}
    return dict(zip(found, torch.stack([value.double() for value in found.values()]).tolist(), strict=True))
