"""What an update learns from: preferences to units, what of them is stale, and how healthy they look at the start."""

from __future__ import annotations

import logging
import math
import random
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from entropo_ray import config, store
from entropo_ray.records import Example, Label, Pair
from entropo_ray.train import objective, rows
from entropo_ray.train.batch import Key, swapped
from entropo_ray.train.rows import Size
from entropo_ray.train.step import Start, Unit, rewards_of, turn_weights

log = logging.getLogger("entropo_ray")

_USEFUL = 0.5  # of the pairs; below it an update teaches little


def units_of(out: store.Round, cfg: config.Train, found: Mapping[Key, Size]) -> list[Unit]:
    """Units of the round's preferences, by key. ValueError for a key without a trajectory."""
    if cfg.kind == "pair":
        pairs = sorted(store.read(out.preferences, Pair), key=lambda pair: (pair.task_id, pair.chosen, pair.rejected))
        return [
            unit([(pair.task_id, pair.chosen), (pair.task_id, pair.rejected)], found, weight=pair.weight)
            for pair in pairs
        ]
    labels = sorted(store.read(out.preferences, Label), key=lambda label: (label.task_id, label.sample))
    return [
        unit(
            [(label.task_id, label.sample)],
            found,
            desirable=label.desirable,
            weight=1.0 if cfg.loss == "sft" else label.weight,  # there is one side, so nothing to balance
        )
        for label in labels
        if label.desirable or cfg.loss != "sft"
    ]


def unit(keys: Iterable[Key], found: Mapping[Key, Size], *, desirable: bool = True, weight: float = 1.0) -> Unit:
    """A unit of the trajectories `keys` (chosen first), with their sizes. ValueError for a key without one."""
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
        weight=weight,
        longest=max(size.tokens for size in sizes),
        shortest=min(size.actions for size in sizes),
    )


def keys_of(units: Iterable[Unit]) -> list[Key]:
    """The trajectories of the units, each once, ascending."""
    return sorted({key for one in units for key in one.keys})


# --- before the first step -------------------------------------------------------------------------------------------


def start_of(
    out: store.Round, keys: Sequence[Key], *, moved: bool, turns: config.Train | None = None, cut: int | None = None
) -> Start:
    """Sums under the policy and its reference; `moved`: they are not the same, and out.current tells the policy's.

    `turns`: weigh turns as this configuration does, where a trajectory's weights are its own (not with turns=branch).
    """
    counts = rows.turns(out.trajectories, keys, cut)
    weights = None
    if turns is not None:
        weights = {key: np.repeat(turn_weights(len(counts[key]), turns), counts[key]) for key in keys}
    reference = rows.column_sums(out.reference, ["ref_logp", "ref_entropy"], keys, weights)
    tokens = {key: float(weights[key].sum() if weights else sum(counts[key])) for key in keys}
    ref_logp, ref_nats = reference["ref_logp"], reference["ref_entropy"]
    if not moved:
        return Start(ref_logp, ref_logp, ref_nats, dict.fromkeys(keys, 0.0), tokens, ref_nats)
    mine = rows.column_sums(out.current, ["logp", "entropy", "kl"], keys, weights)
    return Start(mine["logp"], ref_logp, mine["entropy"], mine["kl"], tokens, ref_nats)


def narrowed(start: Start, keys: Sequence[Key]) -> Start:
    """The start of some of its trajectories."""
    return Start(*({key: getattr(start, field.name)[key] for key in keys} for field in fields(start)))


def length_of(cfg: config.Train, start: Start) -> dict[str, float]:
    """Length options of the reward, fixed for the round from the reference's own view of its data."""
    nats, tokens = math.fsum(start.ref_nats.values()), sum(start.tokens.values())
    scale = cfg.length_tokens or tokens / len(start.tokens)
    return {"raw": {}, "debias": {"hbar": nats / tokens}, "mean": {"scale": scale}}[cfg.length]


def fresh(
    units: Sequence[Unit], start: Start, behaviour: Mapping[Key, float], cfg: config.Train
) -> tuple[list[Unit], dict[str, float]]:
    """Units after the staleness rule of cfg.stale, and its numbers: drift in nats per action token, since sampling.

    ValueError where too few are left in effect (cfg.ess_min).
    """
    keys = sorted(behaviour)
    now, then, tokens = (
        torch.tensor([table[key] for key in keys], dtype=torch.float64)
        for table in (start.logp, behaviour, start.tokens)
    )
    drift = objective.staleness(now, then, tokens)
    numbers = {"drift": float(drift.mean()), "drift_max": float(drift.abs().max())}
    of_key = dict(zip(keys, drift.tolist(), strict=True))
    if cfg.stale == "drop":
        kept = [one for one in units if all(abs(of_key[key]) <= cfg.drift for key in one.keys)]
        return _enough(kept, [1.0] * len(kept), len(units), cfg), numbers | {"stale_dropped": len(units) - len(kept)}
    if cfg.stale == "weigh":
        weights = dict(zip(keys, objective.wpo_weights(drift).tolist(), strict=True))
        products = [math.prod(weights[key] for key in one.keys) for one in units]
        numbers["ess"] = objective.effective_size(torch.tensor(products)) / len(units)
        return _enough(units, products, len(units), cfg), numbers
    return list(units), numbers


def mismatch(drawn: Mapping[Key, np.ndarray], scored: Mapping[Key, np.ndarray], bound: float) -> dict[str, float]:
    """|trainer - engine| of the log-probs of fresh action tokens in nats: mean, 99th percentile and maximum.

    Both saw the same weights, so this is what their kernels and precisions differ by; nothing where nothing is fresh.
    ValueError where the mean is above `bound` (train.mismatch_max; 0: none).
    """
    if not drawn:
        return {}
    assert all(len(scored[key]) == len(values) for key, values in drawn.items()), "scored from other trajectories"
    apart = np.concatenate([np.abs(scored[key].astype(np.float64) - drawn[key]) for key in sorted(drawn)])
    mean = float(apart.mean())
    if bound and mean > bound:
        worst = max(sorted(drawn), key=lambda key: float(np.abs(scored[key] - drawn[key]).mean()))
        raise ValueError(
            f"engines and trainer differ by {mean:.3g} nats per action token, above train.mismatch_max={bound:g} "
            f"(worst: {worst}): did the engines load these weights, in this precision? train.mismatch_max=0 skips this"
        )
    return {
        "mismatch": mean,
        "mismatch_p99": float(np.quantile(apart, 0.99)),
        "mismatch_max": float(apart.max()),
    }


def _enough(units: Sequence[Unit], weights: Sequence[float], of: int, cfg: config.Train) -> list[Unit]:
    left = objective.effective_size(torch.tensor(weights)) if units else 0.0
    if left < cfg.ess_min * of or not units:
        raise ValueError(
            f"train.stale={cfg.stale}: {left:.1f} of {of} units are left in effect, below train.ess_min={cfg.ess_min}: "
            "the policy has moved away from these trajectories; sample again, or raise train.drift"
        )
    return [replace(one, weight=one.weight * w) for one, w in zip(units, weights, strict=True)]


def health(units: Sequence[Unit], start: Start, cfg: config.Train, length: Mapping[str, float]) -> dict[str, float]:
    """Of pairs before the first step: the share that can learn, and how far the margin is only length.

    Warns, naming the knob, where most pairs are saturated at once.
    """
    if cfg.kind != "pair" or cfg.turns == "branch":
        return {}
    sides = [rewards_of(start, [one.keys[place] for one in units], cfg, length) for place in (0, 1)]
    margin = sides[0] - sides[1] - (cfg.gap if cfg.loss == "dpo" else 0.0)
    lengths = [torch.tensor([start.tokens[one.keys[i]] for one in units], dtype=torch.float64) for i in (0, 1)]
    useful = float(objective.useful(margin).mean())
    if useful < _USEFUL and cfg.loss == "dpo":
        log.warning(
            "%.0f %% of the pairs can learn (the others' weights are near 0 or 1 before the first step): "
            "lower train.entropy=%g or train.beta=%g%s",
            100 * useful,
            cfg.entropy,
            cfg.beta,
            ", or give train.length=debias" if cfg.length == "raw" else "",
        )
    return {"useful_start": useful, "margin_length_corr": correlation(margin, lengths[0] - lengths[1])}


def correlation(first: Tensor, second: Tensor) -> float:
    """Pearson's; 0 where one of them does not vary."""
    a, b = first - first.mean(), second - second.mean()
    norm = float(a.norm() * b.norm())
    return float(a @ b) / norm if norm > 1e-12 else 0.0


# --- answers that do not belong to their prompts ---------------------------------------------------------------------


def swap(out: store.Round, units: Sequence[Unit], *, seed: int, cut: int | None) -> dict[Key, Size]:
    """Trajectories whose last reply is another one's, as Examples at out.swapped under the keys of the first; sizes.

    Each takes the reply of the last one before it that is of another task, in an order drawn by the seed, as KTO's
    estimators rotate a batch. Made again where the trajectories are newer. ValueError where all are of one task.
    """
    keys = keys_of(units)
    if len({task for task, _ in keys}) < 2:
        raise ValueError("train.z0: mismatched answers need trajectories of two tasks; give train.z0=onpolicy")
    if store.done(out.swapped) and _time(out.swapped) < _time(out.trajectories):
        shutil.rmtree(out.swapped)
    if not store.done(out.swapped):
        found = rows.read(out.trajectories, keys)
        order = random.Random(f"{seed}/swap").sample(keys, len(keys))
        told = (swapped(found[key].head(cut), found[_other(order, n)].head(cut)) for n, key in enumerate(order))
        store.write(
            out.swapped,
            Example,
            [
                Example(
                    task_id=row.key[0],
                    sample=row.key[1],
                    token_ids=tuple(row.token_ids.tolist()),
                    action_mask=tuple(row.action_mask.tolist()),
                )
                for row in told
            ],
        )
    return rows.sizes(out.swapped)


def _other(order: Sequence[Key], place: int) -> Key:
    task = order[place][0]
    return next(order[place - back] for back in range(1, len(order)) if order[place - back][0] != task)


def _time(product: Path) -> int:
    return (product / "done").stat().st_mtime_ns


def lost_share(keys: Sequence[Key], found: Mapping[Key, Size]) -> float:
    """Share of the action tokens that lie behind the cut."""
    lost = sum(found[key].lost for key in keys)
    return lost / max(1, lost + sum(found[key].actions for key in keys))


def entropy_of(start: Start) -> float:
    """The policy's entropy in nats per action token, exact, over the data of the round."""
    return math.fsum(start.nats.values()) / sum(start.tokens.values())


def kl_of(start: Start) -> float:
    """KL to the reference in nats per action token, exact."""
    return math.fsum(start.kl.values()) / sum(start.tokens.values())
