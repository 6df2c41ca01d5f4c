"""Outcomes to preferences: which trajectories teach, and against which others.

Pure functions of the outcomes of one round. A pair compares two attempts at one task that began with the same prompt;
a task teaches only if it has both sides. Nothing here reads a token.
"""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TypeVar

from entropo_ray.config import Preference
from entropo_ray.records import Grade, Label, Outcome, Pair

K = TypeVar("K")

# Why an outcome does not teach, in the order in which the question is asked.
REASONS = ("tampered", "ungraded", "timeout", "flaky", "patch_failed", "over_length", "unfinished")


def teaching(outcomes: Iterable[Outcome], cfg: Preference) -> tuple[list[Outcome], Counter[str]]:
    """The outcomes that may be chosen or rejected, and how many were dropped by each of REASONS.

    What no test could answer is not a wrong answer: lost sandboxes, time-outs, forged runs, runs that contradict each
    other and patches that do not apply are neither side of a pair.
    """
    kept: list[Outcome] = []
    dropped: Counter[str] = Counter()
    for outcome in outcomes:
        reason = _dropped(outcome, cfg)
        if reason:
            dropped[reason] += 1
        else:
            kept.append(outcome)
    return kept, dropped


def _dropped(outcome: Outcome, cfg: Preference) -> str:
    if outcome.grade is Grade.TAMPERED:
        return "tampered"
    if outcome.grade is None or outcome.stop.infra:
        return "ungraded"
    if outcome.grade in (Grade.TIMEOUT, Grade.FLAKY, Grade.PATCH_FAILED):
        return outcome.grade.value
    if cfg.max_tokens is not None and outcome.num_tokens > cfg.max_tokens:
        return "over_length"
    if cfg.finished_only and not outcome.stop.finished:
        return "unfinished"
    return ""


def pairs(outcomes: Iterable[Outcome], cfg: Preference, *, seed: int) -> list[Pair]:
    """(chosen, rejected) pairs of each task by cfg.pairing, by (task, draw); see PAIRINGS.

    A task's pairs depend on (seed, task) and on its own outcomes alone, not on their order. A teacher's attempts are
    never paired with a policy's. Raises ValueError if no task has both sides, or if two trajectories of a pair began
    with different prompts.
    """
    outcomes = list(outcomes)
    kept = teaching(outcomes, cfg)[0]
    groups = _by(kept, lambda o: (o.task_id, o.kind))
    drawn = [pair for (task_id, _), mine in sorted(groups.items()) for pair in _draw(task_id, mine, cfg, seed)]
    if not drawn:
        raise ValueError(_nothing(outcomes, cfg, "tasks had both sides"))
    if cfg.weights == "pass_k":
        return _weighed(drawn, _by(kept, lambda o: o.task_id), cfg.k)
    return drawn


def _draw(task_id: str, outcomes: Sequence[Outcome], cfg: Preference, seed: int) -> list[Pair]:
    chosen, rejected = _sides(outcomes)
    if not chosen or not rejected:
        return []
    _same_prompt(task_id, outcomes)
    order, most = PAIRINGS[cfg.pairing]
    chosen, rejected = order(chosen, rejected, random.Random(f"{seed}/{task_id}"))
    most = most or (cfg.pairs_per_task if cfg.pairing in ("random", "rare") else len(chosen) * len(rejected))
    # Walk the table of combinations along its diagonals, one further each time the walk closes: every combination
    # occurs once, and in any first part the uses of two trajectories of one side differ by at most one.
    lap = math.lcm(len(chosen), len(rejected))
    walk = range(min(most, len(chosen) * len(rejected)))
    picks = [(chosen[i % len(chosen)], rejected[(i + i // lap) % len(rejected)]) for i in walk]
    return [Pair(task_id=task_id, chosen=one.sample, rejected=other.sample) for one, other in picks]


Sides = tuple[list[Outcome], list[Outcome]]


def _random(chosen: list[Outcome], rejected: list[Outcome], rng: random.Random) -> Sides:
    rng.shuffle(chosen)
    rng.shuffle(rejected)
    return chosen, rejected


def _extremes(chosen: list[Outcome], rejected: list[Outcome], rng: random.Random) -> Sides:
    """The shortest way to success first, and the failure that broke most first."""
    return sorted(chosen, key=lambda o: (o.num_actions, o.sample)), sorted(
        rejected, key=lambda o: (_passed(o), o.sample)
    )


def _passed(outcome: Outcome) -> float:
    """Share of the hidden tests that passed; 0 where none was run."""
    verdict = outcome.verdict
    ran = len(verdict.passed) + len(verdict.failed) if verdict else 0
    return len(verdict.passed) / ran if verdict and ran else 0.0


def _rarest(chosen: list[Outcome], rejected: list[Outcome], rng: random.Random) -> Sides:
    """DivPO (arXiv 2501.18101): the rarest solution first, the commonest mistake first; chance decides among equals."""
    chosen, rejected = _random(chosen, rejected, rng)
    right, wrong = (Counter(o.patch_class for o in side) for side in (chosen, rejected))
    return sorted(chosen, key=lambda o: right[o.patch_class]), sorted(rejected, key=lambda o: -wrong[o.patch_class])


# How the sides of a task are ordered before they are walked, and the most pairs of a task (0: pairs_per_task, or all).
PAIRINGS: dict[str, tuple[Callable[[list[Outcome], list[Outcome], random.Random], Sides], int]] = {
    "random": (_random, 0),
    "all": (_random, 0),
    "one": (_random, 1),
    "best_worst": (_extremes, 1),
    "rare": (_rarest, 0),
}


def pass_k_weight(n: int, resolved: int, k: int) -> float:
    """What one more resolved attempt adds to pass@k: k C(n - c, k - 1) / C(n, k - 1), unbiased for k (1 - p)^(k - 1).

    0 where n - c < k - 1 attempts failed. ValueError unless 1 <= k <= n.
    """
    if not 1 <= k <= n:
        raise ValueError(f"preference.k={k}: a task has {n} attempts; k must lie in [1, {n}]")
    return k * math.comb(n - resolved, k - 1) / math.comb(n, k - 1)


def _weighed(drawn: Sequence[Pair], tasks: dict[str, list[Outcome]], k: int) -> list[Pair]:
    """Pairs with the weight of their task, 1 on average; those of weight 0 are left out. ValueError if none is left."""
    weights = {}
    for task_id in {pair.task_id for pair in drawn}:
        chosen, rejected = _sides(tasks[task_id])
        n = len(chosen) + len(rejected)
        weights[task_id] = pass_k_weight(n, len(chosen), min(k, n))
    heavy = [pair for pair in drawn if weights[pair.task_id]]
    if not heavy:
        raise ValueError(f"preference.k={k}: every task is resolved too often for pass@{k} to rise; lower preference.k")
    mean = sum(weights[pair.task_id] for pair in heavy) / len(heavy)
    return [replace(pair, weight=weights[pair.task_id] / mean) for pair in heavy]


def labels(outcomes: Iterable[Outcome], cfg: Preference) -> list[Label]:
    """A label for each outcome that teaches, by (task, sample); tasks with a single side are kept.

    With cfg.balance each side's weights add up to half of the labels. Raises ValueError if the round as a whole has a
    single side.
    """
    outcomes = list(outcomes)
    kept, _ = teaching(outcomes, cfg)
    found = [
        Label(task_id=o.task_id, sample=o.sample, desirable=o.grade is Grade.RESOLVED)
        for o in sorted(kept, key=lambda o: (o.task_id, o.sample))
    ]
    sides = Counter(label.desirable for label in found)
    if len(sides) < 2:
        raise ValueError(_nothing(outcomes, cfg, f"tasks had both sides and all {len(found)} labels are alike"))
    if not cfg.balance:
        return found
    return [replace(label, weight=len(found) / (2 * sides[label.desirable])) for label in found]


def counts(outcomes: Iterable[Outcome], cfg: Preference) -> dict[str, float]:
    """Yield of a round: tasks, tasks with both sides, outcomes that teach, and `<reason>_dropped` for each reason."""
    outcomes = list(outcomes)
    kept, dropped = teaching(outcomes, cfg)
    both = [all(_sides(of_task)) for of_task in _by(kept, lambda o: o.task_id).values()]
    return {
        "tasks": float(len({o.task_id for o in outcomes})),
        "tasks_both": float(sum(both)),
        "teaching": float(len(kept)),
        **{f"{reason}_dropped": float(dropped[reason]) for reason in REASONS},
    }


def _by(outcomes: Iterable[Outcome], key: Callable[[Outcome], K]) -> dict[K, list[Outcome]]:
    groups: dict[K, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        groups[key(outcome)].append(outcome)
    return groups


def _sides(outcomes: Iterable[Outcome]) -> Sides:
    """The resolved and the other outcomes, by sample."""
    ordered = sorted(outcomes, key=lambda o: o.sample)
    return [o for o in ordered if o.grade is Grade.RESOLVED], [o for o in ordered if o.grade is not Grade.RESOLVED]


def _same_prompt(task_id: str, outcomes: Sequence[Outcome]) -> None:
    first, *others = sorted(outcomes, key=lambda o: o.sample)
    for other in others:
        if other.prompt != first.prompt:
            raise ValueError(
                f"task {task_id}: sample {other.sample} began with another prompt than sample {first.sample}; "
                "a pair needs one prompt: sample the round again with one scaffold"
            )


def _nothing(outcomes: Sequence[Outcome], cfg: Preference, what: str) -> str:
    numbers = counts(outcomes, cfg)
    dropped = ", ".join(f"{numbers[f'{r}_dropped']:.0f} {r}" for r in REASONS if numbers[f"{r}_dropped"]) or "none"
    return (
        f"{numbers['tasks_both']:.0f} of {numbers['tasks']:.0f} {what} (of {len(outcomes)} trajectories "
        f"{numbers['teaching']:.0f} teach; dropped: {dropped}): raise rollout.samples, or give tasks nearer the "
        "policy's reach"
    )
