"""What one pack contributes to a step, by the kind of data: an example, a pair or a label."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from entropo_ray import config
from entropo_ray.records import Policy
from entropo_ray.train import objective
from entropo_ray.train.batch import Key, Pack, Row, branch
from entropo_ray.train.logprob import Scores, sums, turn_sums

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
    weight: float = 1.0  # of its loss; about 1 on average


@dataclass(frozen=True)
class Start:
    """The round's data under the policy and its reference before the first step, sums over action tokens by key."""

    logp: Mapping[Key, float]
    ref_logp: Mapping[Key, float]
    nats: Mapping[Key, float]  # the policy's entropy
    kl: Mapping[Key, float]  # to the reference
    tokens: Mapping[Key, float]
    ref_nats: Mapping[Key, float]  # the reference's entropy


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
    length: Mapping[str, float] = field(default_factory=dict)  # keyword arguments of objective.reward
    start: Start | None = None
    anchor: Policy | None = None  # the reference as a model, where its distributions are needed (z0=exact)
    swapped: Path | None = None  # trajectories whose last reply is another's, where z0 needs them
    swapped_reference: Path | None = None
    cut: int | None = None  # tokens kept of the head of each trajectory; none: all of it
    read_epochs: int = 0  # of examples: epochs at the start that fit all tokens, not only the actions


@dataclass(frozen=True)
class Side:
    """One trajectory of each unit as the loss sees it: sums over its action tokens, turns weighed. [U] float64."""

    logp: Tensor  # with gradient
    ref_logp: Tensor  # equals logp exactly where policy and reference agree
    tokens: Tensor
    nats: Tensor  # exact entropy
    kl: Tensor | None  # exact, to the reference


@dataclass(frozen=True)
class Batch:
    """One scored pack and the units in it. A trajectory of several units lies in it once."""

    pack: Pack
    scores: Scores
    units: tuple[Unit, ...]
    weights: Tensor  # [U] float64; 0.0 for a repeat that fills a step
    turns: tuple[tuple[Tensor | None, ...], ...]  # [U][place] weights of a trajectory's turns [M]; none: all 1
    columns: dict[str, list[Tensor]]  # name -> [B] of [M] sums by turn

    def side(self, place: int) -> Side:
        """The trajectory number `place` of each unit."""
        found = {key: number for number, key in enumerate(self.pack.keys)}
        chosen = [(found[unit.keys[place]], turns[place]) for unit, turns in zip(self.units, self.turns, strict=True)]

        def column(name: str) -> Tensor:
            values = self.columns[name]
            return torch.stack([(values[b] if w is None else values[b] * w).sum() for b, w in chosen])

        logp = column("logp")
        return Side(
            logp=logp,
            ref_logp=(logp - column("ratio")).detach(),
            tokens=column("tokens"),
            nats=column("nats"),
            kl=column("kl") if "kl" in self.columns else None,
        )

    @property
    def importance(self) -> Tensor:
        """[U] weight of each unit's loss."""
        return self.weights * torch.tensor([u.weight for u in self.units], dtype=torch.float64).to(self.weights.device)

    @property
    def desirable(self) -> Tensor:
        """[U] bool labels."""
        return torch.tensor([unit.desirable for unit in self.units], device=self.weights.device)

    def present(self) -> Tensor:
        """[B] 1.0 for trajectories of at least one unit that counts."""
        real = {
            key for unit, weight in zip(self.units, self.weights.tolist(), strict=True) if weight for key in unit.keys
        }
        return torch.tensor([float(key in real) for key in self.pack.keys], device=self.weights.device).double()


def batch_of(
    packed: Pack,
    scores: Scores,
    units: tuple[Unit, ...],
    weights: list[float],
    reference: Mapping[Key, Tensor],
    turns: tuple[tuple[Tensor | None, ...], ...],
) -> Batch:
    """Sums per turn. `reference` [A] log-probs by key, empty where the loss needs none."""
    device = scores.logp.device
    ratio = torch.zeros_like(scores.logp)
    if reference:
        ratio = _ratio(packed, scores, reference)
    columns = {
        "logp": turn_sums(scores.logp, packed),
        "ratio": turn_sums(ratio, packed),
        "nats": turn_sums(scores.entropy.detach(), packed),
        "tokens": [torch.tensor(counts, dtype=torch.float64, device=device) for counts in packed.turns],
    }
    if scores.kl is not None:
        columns["kl"] = turn_sums(scores.kl, packed)
    there = tuple(tuple(None if w is None else w.to(device) for w in places) for places in turns)
    return Batch(packed, scores, units, torch.tensor(weights, dtype=torch.float64, device=device), there, columns)


def turns_of(unit: Unit, rows: Mapping[Key, Row], cfg: config.Fit) -> tuple[Tensor | None, ...]:
    """Weights of the turns of each of a unit's trajectories, by train.turns; None where all count alike."""
    if not isinstance(cfg, config.Train) or cfg.turns == "all":
        return (None,) * len(unit.keys)
    counts = [len(rows[key].turns()) for key in unit.keys]
    if cfg.turns != "branch":
        return tuple(torch.tensor(turn_weights(n, cfg), dtype=torch.float64) for n in counts)
    places = branch(*(rows[key] for key in unit.keys))
    if places is None:  # two attempts that never part teach nothing: their margin is 0 whatever the policy does
        places = (-1, -1)
    return tuple(torch.tensor(_only(p, n), dtype=torch.float64) for p, n in zip(places, counts, strict=True))


def turn_weights(count: int, cfg: config.Train) -> list[float]:
    """Weights of the turns of a trajectory, where they do not depend on another one."""
    if cfg.turns == "dmpo":
        return objective.turn_weights(count, cfg.gamma)
    return _only(count - 1, count) if cfg.turns == "last" else [1.0] * count


def _only(place: int, count: int) -> list[float]:
    return [float(turn == place) for turn in range(count)]


def weights_of(cfg: config.Train) -> dict[str, float]:
    """beta and entropy of the reward. What was published has no entropy in the reward of its kto."""
    return {"beta": cfg.beta, "entropy": 0.0 if cfg.variant == "released" and cfg.loss == "kto" else cfg.entropy}


def _example(batch: Batch, job: Job, baseline: Tensor) -> objective.Loss:
    side = batch.side(0)
    return objective.imitation(side.logp, side.tokens)


def _pair(batch: Batch, job: Job, baseline: Tensor) -> objective.Loss:
    cfg = cast(config.Train, job.cfg)
    chosen, rejected = batch.side(0), batch.side(1)
    tensors = (chosen.logp, rejected.logp, chosen.ref_logp, rejected.ref_logp)
    options = {
        **weights_of(cfg),
        "gap": cfg.gap,
        "nll": cfg.nll,
        "chosen_tokens": chosen.tokens,
        "rejected_tokens": rejected.tokens,
        **job.length,
    }
    if cfg.loss == "ipo":
        return objective.ipo(*tensors, **options)  # type: ignore[arg-type]
    return objective.dpo(*tensors, smoothing=cfg.smoothing, **options)  # type: ignore[arg-type]


def _label(batch: Batch, job: Job, baseline: Tensor) -> objective.Loss:
    cfg = cast(config.Train, job.cfg)
    side = batch.side(0)
    compute: Callable[..., objective.Loss] = objective.kto if cfg.loss == "kto" else objective.bco
    loss = compute(
        side.logp,
        side.ref_logp,
        batch.desirable,
        baseline.to(side.logp.device),
        weight_pass=cfg.weight_pass,
        weight_fail=cfg.weight_fail,
        tokens=side.tokens,
        **weights_of(cfg),
        **job.length,
    )
    found = {"nats": side.nats}
    if side.kl is not None:
        found["kl"] = side.kl
        found["z0_exact"] = objective.z0_exact(side.kl, side.nats, tokens=side.tokens, **weights_of(cfg), **job.length)
    return objective.Loss(loss.values, loss.measures | found)


LOSSES: dict[str, Callable[[Batch, Job, Tensor], objective.Loss]] = {
    "example": _example,
    "pair": _pair,
    "label": _label,
}


def totals(batch: Batch, loss: objective.Loss) -> dict[str, float]:
    """Sums over the pack of what a step reports; repeats count for nothing."""
    present = batch.present()
    found = {
        "loss": (batch.importance * loss.values.detach()).sum(),
        "units": batch.weights.sum(),
        "rows": present.sum(),
        "tokens": (present * torch.tensor(batch.pack.lengths, device=present.device)).sum(),
        "action_tokens": (present * torch.tensor(batch.pack.actions, device=present.device)).sum(),
        "entropy": (present * sums(batch.scores.entropy.detach(), batch.pack)).sum(),
    }
    found |= {f"mean {name}": (batch.weights * values).sum() for name, values in loss.measures.items()}
    return dict(zip(found, torch.stack([value.double() for value in found.values()]).tolist(), strict=True))


def ratios(packed: Pack, scores: Scores, reference: Mapping[Key, Tensor]) -> tuple[Tensor, Tensor]:
    """[B] log pi and log pi_ref of a pack that is scored without gradient."""
    logp = sums(scores.logp, packed)
    return logp, logp - sums(_ratio(packed, scores, reference), packed)


def _ratio(packed: Pack, scores: Scores, reference: Mapping[Key, Tensor]) -> Tensor:
    """[A] log pi - log pi_ref: by token, as sums of a long trajectory in fp32 drown a small difference."""
    return scores.logp - torch.cat([reference[key] for key in packed.keys]).to(scores.logp.device)


def rewards_of(start: Start, keys: Sequence[Key], cfg: config.Train, length: Mapping[str, float]) -> Tensor:
    """[len(keys)] rewards before the first step."""
    logp, ref_logp, tokens = (
        torch.tensor([table[key] for key in keys], dtype=torch.float64)
        for table in (start.logp, start.ref_logp, start.tokens)
    )
    return objective.reward(logp, ref_logp, tokens=tokens, **weights_of(cfg), **length)
