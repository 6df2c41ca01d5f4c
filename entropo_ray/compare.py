"""A fair test of what entropy buys: arms that differ in one setting, trained and judged alike.

All arms start from one policy and one set of rollouts, take the same number of optimizer steps over the same number of
trajectories, and are sampled on the same held-out tasks with the same selector. Intervals are paired: tasks and seeds
are drawn together for all arms, so that the interval of a difference is one of a difference.
"""

from __future__ import annotations

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
_DRAWS = 10_000
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
        return self.name.replace(":", "-")


def arms(cfg: config.Run) -> list[Arm]:
    """The arms of cfg.compare, each trained one before those that use its policy.

    ValueError for an unknown arm, for one that uses the policy of an absent arm, and where cfg.compare.against is none.
    """
    asked = cfg.compare
    unknown = [name for name in asked.arms if name not in KNOWN]
    if unknown:
        raise ValueError(f"compare.arms: {unknown[0]} is unknown; known are {', '.join(KNOWN)}")
    if "tempered_dpo" in asked.arms and "dpo" not in asked.arms:
        raise ValueError("compare.arms: tempered_dpo samples the policy of dpo; name dpo, too")
    if not asked.seeds or len(set(asked.seeds)) < len(asked.seeds):
        raise ValueError(f"compare.seeds={list(asked.seeds)}: needs one or more different seeds")
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
    return store.evaluation_of(run_dir, f"{arm.key}-{seed}")


# --- numbers ---------------------------------------------------------------------------------------------------------


def columns(out: store.Evaluation, chosen_by: config.Select) -> tuple[list[str], dict[str, Floats]]:
    """Task ids, ascending, and [T] one value a task by name, of one judged cell.

    pass@k and best@k for k = 1 .. n; `distinct`: solutions among resolved attempts; `entropy_passing`: the entropy of
    their distribution in nats, and NaN where nothing was resolved.
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
        solutions = [normalised(c.patch) for c, ok in zip(mine, right, strict=True) if ok]
        rows["distinct"].append(float(len(set(solutions))))
        rows["entropy_passing"].append(diversity.entropy(solutions) if solutions else math.nan)
        rows["patches"].append(len({normalised(c.patch) for c in mine} - {""}) / len(mine))
    return tasks, {name: np.array(values) for name, values in rows.items()}


def table(cells: Mapping[str, Sequence[Mapping[str, Floats]]], against: str) -> dict[str, dict[str, Any]]:
    """By arm and measure: mean, 95 % interval, and the paired difference to `against` with its interval.

    `cells`: by arm, one set of [T] columns a seed. Tasks and seeds are drawn with replacement, the same for all arms;
    NaN entries do not count.
    """
    names = list(next(iter(cells.values()))[0])
    tasks, seeds = len(next(iter(cells.values()))[0][names[0]]), len(next(iter(cells.values())))
    rng = np.random.default_rng(0)
    of_tasks = rng.multinomial(tasks, np.full(tasks, 1 / tasks), size=_DRAWS).astype(float)
    of_seeds = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=_DRAWS).astype(float)
    result: dict[str, dict[str, Any]] = {arm: {} for arm in cells}
    for name in names:
        drawn = {arm: _draws(np.stack([one[name] for one in mine]), of_tasks, of_seeds) for arm, mine in cells.items()}
        for arm, (mean, values) in drawn.items():
            result[arm][name] = {"mean": mean, "low": _quantile(values, 0.025), "high": _quantile(values, 0.975)}
            if arm != against:
                gap = values - drawn[against][1]
                low, high = _quantile(gap, 0.025), _quantile(gap, 0.975)
                result[arm][name] |= {"minus": mean - drawn[against][0], "minus_low": low, "minus_high": high}
    return result


def _draws(values: Floats, of_tasks: Floats, of_seeds: Floats) -> tuple[float, Floats]:
    """Mean over [S, T] values without NaN, and the same of each draw."""
    known = (~np.isnan(values)).astype(float)
    filled = np.nan_to_num(values)
    total = np.einsum("ds,st,dt->d", of_seeds, filled, of_tasks, optimize=True)
    count = np.einsum("ds,st,dt->d", of_seeds, known, of_tasks, optimize=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        return float(filled.sum() / known.sum()) if known.any() else math.nan, total / count


def _quantile(values: Floats, q: float) -> float:
    known = values[~np.isnan(values)]
    return float(np.quantile(known, q)) if len(known) else math.nan


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
    path = store.place(cfg.run_dir) / "comparison.json"
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(result, indent=1, allow_nan=True) + "\n")
    partial.replace(path)
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
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


def lines(result: Mapping[str, Any]) -> list[str]:
    """The main numbers as a table for people; a star marks differences whose interval leaves out 0."""
    n = result["samples"]
    shown = ["pass@1", f"pass@{n}", f"best@{n}", "distinct", "entropy_passing"]
    head = f"{'arm':18}" + "".join(f"{name:>26}" for name in shown) + f"{'nats/token':>12}{'KL/token':>10}"
    rows = [head]
    for name, measures in result["arms"].items():
        row = f"{name:18}"
        for measure in shown:
            entry, percent = measures[measure], measure.startswith(("pass@", "best@"))
            scale = 100 if percent else 1
            star = "*" if "minus" in entry and comparison.outside(entry) else " "
            row += f"{scale * entry['mean']:10.2f} [{scale * entry['low']:5.1f}, {scale * entry['high']:5.1f}]{star}"
        facts = result["facts"][name]
        rows.append(row + f"{facts.get('entropy_exact', math.nan):12.4f}{facts.get('kl', math.nan):10.4f}")
    return [*rows, f"* differs from {result['against']} by more than its paired 95 % interval"]
