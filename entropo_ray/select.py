"""The test-time choice: one of several attempts at a task, by what may be known without its hidden tests.

Every criterion maps a candidate to a value, and only the candidates with the greatest value go on to the next one. So
the whole choice is one lexicographic key, and best@k can be computed exactly from the keys (evaluate.best_at_k).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from entropo_ray.config import Select
from entropo_ray.records import Candidate

# Comparable within one criterion; greater is better.
Value = tuple[float, ...]
Key = tuple[Value, ...]
_MISSING: Value = (0.0, 0.0)


def select(candidates: Sequence[Candidate], cfg: Select) -> Candidate:
    """The candidate with the greatest key; among equals the lowest sample. ValueError if there are none."""
    keys = rank(candidates, cfg)
    return max(zip(keys, candidates, strict=True), key=lambda pair: (pair[0], -pair[1].sample))[1]


def rank(candidates: Sequence[Candidate], cfg: Select) -> list[Key]:
    """A key for each candidate, in the order given; equal keys are ties, which `select` breaks by sample.

    A missing score ranks below every score. Raises ValueError on no candidates, on candidates of two tasks, on a
    sample that occurs twice, and on a verifier score outside [0, 1] (so on NaN).
    """
    _check(candidates)
    return [tuple(value(c) for _, value in criteria(cfg)) for c in candidates]


def criteria(cfg: Select) -> list[tuple[str, Callable[[Candidate], Value]]]:
    """Name and value of each criterion, the first to be asked first."""
    asked: list[tuple[str, Callable[[Candidate], Value]]] = [("unfinished", lambda c: (float(c.stop.finished),))]
    if cfg.execution:
        asked += [
            ("regressed", lambda c: _value(None if c.regressed is None else -c.regressed)),
            ("reproduced", lambda c: _value(c.reproduced)),
        ]
    # nobody above the bar: all have the same value, and all go on
    asked.append(("verifier_min", lambda c: (float(c.verifier is not None and c.verifier > cfg.verifier_min),)))
    return [*asked, ("tie", _TIES[cfg.tie])]


def removals(candidates: Sequence[Candidate], cfg: Select) -> dict[str, int]:
    """How many candidates each criterion sent away, in the order asked."""
    _check(candidates)
    left = list(candidates)
    removed = {}
    for name, value in criteria(cfg):
        best = max(value(c) for c in left)
        stay = [c for c in left if value(c) == best]
        removed[name] = len(left) - len(stay)
        left = stay
    return removed


def _value(score: float | None) -> Value:
    return _MISSING if score is None else (1.0, float(score))


_TIES: dict[str, Callable[[Candidate], Value]] = {
    "verifier": lambda c: _value(c.verifier),
    "most_turns": lambda c: (float(c.num_turns),),
    "fewest_turns": lambda c: (-float(c.num_turns),),
    "first": lambda c: (0.0,),
}


def _check(candidates: Sequence[Candidate]) -> None:
    if not candidates:
        raise ValueError("select: no candidates; a task without attempts has no choice")
    tasks = sorted({c.task_id for c in candidates})
    if len(tasks) > 1:
        raise ValueError(f"select: candidates of two tasks, {tasks[0]} and {tasks[1]}; choose task by task")
    if len({c.sample for c in candidates}) < len(candidates):
        raise ValueError(f"select: task {tasks[0]} has a sample twice; join scores by (task, sample) first")
    for c in candidates:
        if c.verifier is not None and not 0.0 <= c.verifier <= 1.0:  # NaN fails every comparison
            raise ValueError(f"select: task {c.task_id} sample {c.sample}: verifier={c.verifier} is no probability")
