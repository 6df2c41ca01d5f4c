"""Outcomes to preferences: which trajectories teach, and against which others.

Pure functions of the outcomes of one round. A pair compares two attempts at one task that began with the same prompt;
a task teaches only if it has both sides. Nothing here reads a token.
"""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from entropo_ray.config import Preference
from entropo_ray.records import Grade, Label, Outcome, Pair

# Why an outcome does not teach, in the order in which the question is asked.
REASONS = ("tampered", "ungraded", "timeout", "patch_failed", "unfinished")


def teaching(outcomes: Iterable[Outcome], cfg: Preference) -> tuple[list[Outcome], Counter[str]]:
    """The outcomes that may be chosen or rejected, and how many were dropped by each of REASONS.

    What no test could answer is not a wrong answer: lost sandboxes, time-outs, forged runs and patches that do not
    apply are neither side of a pair.
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
    if outcome.grade is Grade.TIMEOUT:
        return "timeout"
    if outcome.grade is Grade.PATCH_FAILED:
        return "patch_failed"
    if cfg.finished_only and not outcome.stop.finished:
        return "unfinished"
    return ""


def pairs(outcomes: Iterable[Outcome], cfg: Preference, *, seed: int) -> list[Pair]:
    """At most `pairs_per_task` (chosen, rejected) pairs of each task, by (task, draw).

    A task's pairs depend on (seed, task) and on its own outcomes alone, not on their order. Raises ValueError if no
    task has both sides, or if two trajectories of a pair began with different prompts.
    """
    outcomes = list(outcomes)
    tasks = _by_task(teaching(outcomes, cfg)[0])
    drawn = [pair for task_id in sorted(tasks) for pair in _draw(task_id, tasks[task_id], cfg.pairs_per_task, seed)]
    if not drawn:
        raise ValueError(_nothing(outcomes, cfg, "tasks had both sides"))
    return drawn


def _draw(task_id: str, outcomes: Sequence[Outcome], most: int, seed: int) -> list[Pair]:
    chosen, rejected = _sides(outcomes)
    if not chosen or not rejected:
        return []
    _same_prompt(task_id, outcomes)
    rng = random.Random(f"{seed}/{task_id}")
    rng.shuffle(chosen)
    rng.shuffle(rejected)
    # Walk the table of combinations along its diagonals, one further each time the walk closes: every combination
    # occurs once, and in any first part the uses of two trajectories of one side differ by at most one.
    lap = math.lcm(len(chosen), len(rejected))
    walk = range(min(most, len(chosen) * len(rejected)))
    return [
        Pair(task_id=task_id, chosen=chosen[i % len(chosen)], rejected=rejected[(i + i // lap) % len(rejected)])
        for i in walk
    ]


def labels(outcomes: Iterable[Outcome], cfg: Preference) -> list[Label]:
    """A label for each outcome that teaches, by (task, sample); tasks with a single side are kept.

    Raises ValueError if the round as a whole has a single side.
    """
    outcomes = list(outcomes)
    kept, _ = teaching(outcomes, cfg)
    found = [
        Label(task_id=o.task_id, sample=o.sample, desirable=o.grade is Grade.RESOLVED)
        for o in sorted(kept, key=lambda o: (o.task_id, o.sample))
    ]
    if len({label.desirable for label in found}) < 2:
        raise ValueError(_nothing(outcomes, cfg, f"tasks had both sides and all {len(found)} labels are alike"))
    return found


def counts(outcomes: Iterable[Outcome], cfg: Preference) -> dict[str, float]:
    """Yield of a round: tasks, tasks with both sides, outcomes that teach, and `<reason>_dropped` for each reason."""
    outcomes = list(outcomes)
    kept, dropped = teaching(outcomes, cfg)
    both = [all(_sides(of_task)) for of_task in _by_task(kept).values()]
    return {
        "tasks": float(len({o.task_id for o in outcomes})),
        "tasks_both": float(sum(both)),
        "teaching": float(len(kept)),
        **{f"{reason}_dropped": float(dropped[reason]) for reason in REASONS},
    }


def _by_task(outcomes: Iterable[Outcome]) -> dict[str, list[Outcome]]:
    tasks: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        tasks[outcome.task_id].append(outcome)
    return tasks


def _sides(outcomes: Iterable[Outcome]) -> tuple[list[int], list[int]]:
    """Sample numbers of the resolved and of the other outcomes, ascending."""
    ordered = sorted(outcomes, key=lambda o: o.sample)
    chosen = [o.sample for o in ordered if o.grade is Grade.RESOLVED]
    rejected = [o.sample for o in ordered if o.grade is not Grade.RESOLVED]
    return chosen, rejected


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
