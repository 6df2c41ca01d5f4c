"""A fair test of what entropy buys: arms that differ in one setting, trained and judged alike.

All arms start from one policy and one set of rollouts, take the same number of optimizer steps over the same number of
trajectories, and are sampled on the same held-out tasks with the same selector. Differences are paired.
"""

from __future__ import annotations

import functools
import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from entropo_ray import comparison, config, diversity, evaluate, select, store
from entropo_ray.patches import normalised
from entropo_ray.records import Grade, Policy

Floats = NDArray[np.float64]
_WITH_RATIO = ("tempered_dpo", "entropo_dpo", "entropo_kto", "entropo_bco")
KNOWN = ("seed", "sft", "dpo", "kto", "divpo", *_WITH_RATIO)
_LOSS: dict[str, Literal["dpo", "kto", "bco", "sft"]] = {
    "sft": "sft",
    "kto": "kto",
    "entropo_kto": "kto",
    "entropo_bco": "bco",
}


@dataclass(frozen=True)
class Arm:
    """One way to come from the seed policy to an evaluated one."""

    name: str  # as in compare.arms, with lambda / beta behind a colon where it has one
    train: config.Train | None = None  # None: not trained
    preference: config.Preference | None = None
    policy_of: str = ""  # name of the arm whose policy is evaluated; "": its own
    heat: float = 1.0  # times the sampling temperature, at test time

    @property
    def key(self) -> str:
        """The name as a part of a path."""
        return self.name.replace(":", "-")


def arms(cfg: config.Run) -> list[Arm]:
    """The arms of cfg.compare, each trained one before those that use its policy.

    ValueError for an unknown or repeated arm, one that uses the policy of an absent arm, settings of train that an arm
    cannot have, no steps, and where cfg.compare.against is none of the arms.
    """
    asked = cfg.compare
    for key in ("arms", "seeds", "ratios"):
        values = getattr(asked, key)
        if not values or len(set(values)) < len(values):
            raise ValueError(f"compare.{key}={list(values)}: needs one or more, each once")
    unknown = [name for name in asked.arms if name not in KNOWN]
    if unknown:
        raise ValueError(f"compare.arms: {unknown[0]} is unknown; known are {', '.join(KNOWN)}")
    if "tempered_dpo" in asked.arms and "dpo" not in asked.arms:
        raise ValueError("compare.arms: tempered_dpo samples the policy of dpo; name dpo, too")
    if min(asked.ratios) <= 0:
        raise ValueError(f"compare.ratios={list(asked.ratios)}: all must be above 0")
    if asked.steps < 1:
        raise ValueError(f"compare.steps={asked.steps}: must be at least 1, as budgets are equal")
    found: list[Arm] = []
    for name in sorted(asked.arms, key=KNOWN.index):
        found += [_arm(name, ratio, cfg) for ratio in (asked.ratios if name in _WITH_RATIO else (0.0,))]
    if asked.against not in {arm.name for arm in found}:
        raise ValueError(f"compare.against={asked.against}: is none of {', '.join(arm.name for arm in found)}")
    return found


def _arm(name: str, ratio: float, cfg: config.Run) -> Arm:
    full = f"{name}:{ratio:g}" if ratio else name
    if name == "seed":
        return Arm(full)
    if name == "tempered_dpo":
        return Arm(full, policy_of="dpo", heat=1 + ratio)
    loss: Literal["dpo", "kto", "bco", "sft"] = _LOSS.get(name, "dpo")
    train = replace(cfg.train, loss=loss, entropy=ratio * cfg.train.beta, entropy_target=None, steps=cfg.compare.steps)
    if loss != "dpo":  # a pair holds two trajectories: the same number a step
        train = replace(train, batch=2 * train.batch, micro_batch=2 * train.micro_batch)
    try:
        config.check_objective(train)
    except ValueError as error:
        raise ValueError(f"compare.arms: {full} cannot have {error}") from None
    preference = cfg.preference
    if name == "divpo":
        preference = replace(preference, pairing="rare", pairs_per_task=1)
    return Arm(full, train, preference)


def policy_of(cfg: config.Run, arm: Arm, seed: int) -> Policy:
    """The policy that is evaluated."""
    source = next(one for one in arms(cfg) if one.name == (arm.policy_of or arm.name))
    return store.policy(str(cell(cfg.run_dir, source, seed).policy)) if source.train else store.policy(cfg.model)


def cell(run_dir: str, arm: Arm, seed: int) -> store.Round:
    """Where the products of an arm lie; trajectories and reference are those of all."""
    shared, home = store.round_of(run_dir, 0), store.place(run_dir) / "arms" / f"{arm.key}-{seed}"
    return replace(shared, preferences=home / "preferences", policy=home / "policy")


def judged(run_dir: str, arm: Arm, seed: int) -> store.Evaluation:
    """Where the held-out attempts of an arm lie."""
    return store.evaluation_of(run_dir, f"{arm.key}-{seed}")


# --- numbers ---------------------------------------------------------------------------------------------------------


def columns(out: store.Evaluation, chosen_by: config.Select) -> tuple[list[str], dict[str, Floats]]:
    """Task ids, ascending, and [T] one value a task by name, of one judged cell.

    pass@k and best@k for k = 1 .. n; `patches`: different patches an attempt; `vendi`: effective number of patches by
    the likeness of their text; `distinct`: solutions among resolved attempts; `entropy_passing`: the entropy of their
    distribution in nats. These two grow with the number of resolved attempts; NaN where nothing was resolved.
    """
    found = evaluate.candidates(out)
    marks = {(m.task_id, m.sample): m.grade for m in store.read(out.grades, evaluate.Mark)}
    rows: dict[str, list[float]] = defaultdict(list)
    tasks = sorted(found)
    for task_id in tasks:
        mine = found[task_id]
        right = [marks[task_id, c.sample] is Grade.RESOLVED for c in mine]
        keys = select.rank(mine, chosen_by)
        for k in range(1, len(mine) + 1):
            rows[f"pass@{k}"].append(evaluate.pass_at_k(len(mine), sum(right), k))
            rows[f"best@{k}"].append(evaluate.best_at_k(keys, right, k))
        texts = [normalised(c.patch) for c in mine]
        solutions = [text for text, ok in zip(texts, right, strict=True) if ok]
        rows["distinct"].append(float(len(set(solutions))))
        rows["entropy_passing"].append(diversity.entropy(solutions) if solutions else math.nan)
        rows["patches"].append(len(set(texts) - {""}) / len(mine))
        rows["vendi"].append(diversity.vendi(diversity.likeness(texts)))
    return tasks, {name: np.array(values) for name, values in rows.items()}


def table(cells: Mapping[str, Sequence[Mapping[str, Floats]]], against: str) -> dict[str, dict[str, Any]]:
    """By arm and measure: mean, 95 % interval, and the paired difference to `against` with its interval.

    `cells`: by arm, one set of [T] columns a seed; cell s of two arms has one seed, entry t one task. A task counts
    where all seeds of all that is compared have a value.
    """
    names = list(next(iter(cells.values()))[0])
    result: dict[str, dict[str, Any]] = {arm: {} for arm in cells}
    for name in names:
        base = np.stack([one[name] for one in cells[against]])
        for arm, mine in cells.items():
            values = np.stack([one[name] for one in mine])
            mean, low, high = interval(values)
            if "@" in name and low is not None and high is not None:  # a probability
                low, high = max(0.0, low), min(1.0, high)
            result[arm][name] = {"mean": mean, "low": low, "high": high}
            if arm != against:
                gap = zip(("minus", "minus_low", "minus_high"), interval(values - base), strict=True)
                result[arm][name] |= dict(gap)
    return result


def interval(values: Floats) -> tuple[float | None, float | None, float | None]:
    """Mean of [S, T] values over seeds and tasks and its 95 % interval, both being drawn at random; None without any.

    Variances of tasks and of seeds add up (crossed random effects): with the mean squares of a two-way layout,
    (MS_tasks + MS_seeds - MS_rest) / (S T), at least the larger of the two, and Student's t with Satterthwaite's
    degrees of freedom; with 20 tasks and 3 seeds they held the truth in 92 to 96 % of simulated draws
    (tests/test_compare.py). A single seed has no variance to show: its interval is over tasks alone.
    """
    known = values[:, ~np.isnan(values).any(axis=0)]
    seeds, tasks = known.shape
    if not tasks:
        return None, None, None
    mean = float(known.mean())
    if tasks == 1:
        return mean, None, None
    by_task, by_seed = known.mean(axis=0), known.mean(axis=1)
    of_tasks = seeds * float(((by_task - mean) ** 2).sum()) / (tasks - 1)
    if seeds == 1:
        half = t_quantile(tasks - 1) * math.sqrt(of_tasks / tasks)
        return mean, mean - half, mean + half
    of_seeds = tasks * float(((by_seed - mean) ** 2).sum()) / (seeds - 1)
    rest = float(((known - by_task[None, :] - by_seed[:, None] + mean) ** 2).sum()) / ((seeds - 1) * (tasks - 1))
    total = of_tasks + of_seeds - rest
    if total <= max(of_tasks, of_seeds):
        total, freedom = max((of_tasks, float(tasks - 1)), (of_seeds, float(seeds - 1)))
    else:
        parts = ((of_tasks, tasks - 1), (of_seeds, seeds - 1), (rest, (tasks - 1) * (seeds - 1)))
        freedom = total**2 / sum(square**2 / degrees for square, degrees in parts)
    half = t_quantile(max(1.0, freedom)) * math.sqrt(total / (seeds * tasks)) if total else 0.0
    return mean, mean - half, mean + half


@functools.cache
def t_quantile(freedom: float) -> float:
    """The 0.975 quantile of Student's t; `freedom`, at least 1, need not be whole."""
    # with t = sqrt(freedom) tan(angle) the density is cos(angle)^(freedom - 1): bounded, and on a finite range
    angle = np.linspace(0.0, math.pi / 2, 200_001)
    density = np.cos(angle) ** (freedom - 1)
    mass = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return float(math.sqrt(freedom) * math.tan(float(np.interp(0.95, mass / mass[-1], angle))))


def compare(cfg: config.Run) -> dict[str, Any]:
    """Everything that is known of all arms, and what was spent on each; also comparison.json of the run."""
    cells: dict[str, list[dict[str, Floats]]] = {}
    scalars: dict[str, list[dict[str, float]]] = {}
    suite: list[str] = []
    for arm in arms(cfg):
        for seed in cfg.compare.seeds:
            tasks, found = columns(judged(cfg.run_dir, arm, seed), cfg.evaluate.select)
            assert not suite or suite == tasks, f"{arm.name}: judged on other tasks than the arms before"
            suite = tasks
            cells.setdefault(arm.name, []).append(found)
            scalars.setdefault(arm.name, []).append(_facts(cfg, arm, seed))
    result = {
        "against": cfg.compare.against,
        "seeds": list(cfg.compare.seeds),
        "tasks": len(suite),
        "samples": cfg.evaluate.samples,
        "arms": table(cells, cfg.compare.against),
        "facts": {name: _averaged(rows) for name, rows in scalars.items()},
    }
    store.save(store.place(cfg.run_dir) / "comparison.json", json.dumps(result, indent=1, allow_nan=False) + "\n")
    return result


def _facts(cfg: config.Run, arm: Arm, seed: int) -> dict[str, float]:
    """Scalars of a cell: entropies and KL of its own held-out attempts, and what its update cost."""
    numbers = json.loads(judged(cfg.run_dir, arm, seed).numbers.read_text())
    keep = ("entropy_exact", "entropy_thought", "entropy_tool", "entropy_arguments", "kl", "empty", "ungraded")
    facts = {name: float(numbers[name]) for name in keep if name in numbers}
    steps = cell(cfg.run_dir, arm, seed).policy / "steps.jsonl"
    if arm.train and steps.is_file():
        lines = [json.loads(line) for line in steps.read_text().splitlines()]
        for name in ("rows", "tokens", "action_tokens"):
            facts[f"trained_{name}"] = float(sum(line[name] for line in lines))
        facts["steps"] = float(len(lines))
    return facts


def _averaged(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Means over the seeds that have a value."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: float(np.mean([row[name] for row in rows if name in row])) for name in names}


def lines(result: Mapping[str, Any]) -> list[str]:
    """The main numbers as a table for people; a star marks differences whose interval leaves out 0."""
    n = result["samples"]
    shown = ["pass@1", f"pass@{n}", f"best@{n}", "distinct", "entropy_passing"]
    rows = [f"{'arm':18}" + "".join(f"{name:>26}" for name in shown) + f"{'nats/token':>12}{'KL/token':>10}"]
    for name, measures in result["arms"].items():
        facts = result["facts"][name]
        cells = "".join(_cell(measures[measure], 100 if "@" in measure else 1) for measure in shown)
        rows.append(f"{name:18}{cells}{facts['entropy_exact']:12.4f}{facts['kl']:10.4f}")
    return [*rows, comparison.caution(result)]


def _cell(entry: Mapping[str, float | None], scale: int) -> str:
    if entry["mean"] is None:
        return f"{'–':>26}"
    star = "*" if comparison.outside(entry) else " "
    bounds = "" if entry["low"] is None else f"[{scale * entry['low']:.1f}, {scale * (entry['high'] or 0.0):.1f}]"
    return f"{scale * entry['mean']:10.2f} {bounds:>14}{star}"
