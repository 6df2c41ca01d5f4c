"""Test time: candidates and their evidence, the choice, its grades, and the numbers of a finished evaluation.

    trajectories ─ execute ─> executions ┐
                 ─ verify ──> scores ────┴ candidates ─ choose ─> choice, predictions.jsonl ─ resolve ─> grades, numbers
                                                                                            ─ officially ─> official

Everything is joined by (task_id, sample). Hidden tests are opened by the last two alone, after the choice is on disk.
pass@k after Chen et al. 2021 (arXiv 2107.03374); best@k is its exact counterpart for a choice, see `best_at_k`.
"""

from __future__ import annotations

import asyncio
import functools
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.exceptions
from numpy.typing import NDArray

from entropo_ray import config, grade, observe, official, select, store
from entropo_ray.patches import normalised
from entropo_ray.records import (
    Candidate,
    Choice,
    Execution,
    Grade,
    Graded,
    Policy,
    Prediction,
    Score,
    Stop,
    Task,
    Verdict,
)
from entropo_ray.rollout.lending import setup_s
from entropo_ray.sandbox import SandboxError
from entropo_ray.tasks import pack

Floats = NDArray[np.float64]
Key = tuple[str, int]

# ---------------------------------------------------------------------------------------------------- measures, pure


def pass_at_k(n: int, correct: int, k: int) -> float:
    """P(at least one of k attempts, drawn from n of which `correct` resolve the task, resolves it)."""
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} of {n} attempts: k must lie in [1, {n}]; sample more, or ask for a smaller k")
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def best_at_k(keys: Sequence[Any], correct: Sequence[bool], k: int) -> float:
    """P(the choice among k of the attempts resolves the task), exactly; ties are broken by chance.

    `keys`: one comparable key an attempt, the greatest is chosen. With m attempts tied at one key, g of them correct,
    and b strictly below: the tie holds the choice with probability [C(b+m, k) - C(b, k)] / C(n, k).
    """
    n = len(keys)
    if not 1 <= k <= n:
        raise ValueError(f"best@{k} of {n} attempts: k must lie in [1, {n}]; sample more, or ask for a smaller k")
    tied: Counter[Any] = Counter(keys)
    right: Counter[Any] = Counter(key for key, c in zip(keys, correct, strict=True) if c)
    total, below = 0.0, 0
    for key in sorted(tied):
        holds = math.comb(below + tied[key], k) - math.comb(below, k)
        total += holds * right[key] / tied[key]
        below += tied[key]
    return float(total / math.comb(n, k))


def wilson(successes: int, n: int) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson's score interval)."""
    z = 1.959963984540054
    centre = (successes + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * math.sqrt(successes * (n - successes) / n + z * z / 4)
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap(columns: Floats, *, seed: int = 0, draws: int = 10_000) -> Floats:
    """[2, M] 95 % intervals of the means of [T, M] columns over tasks.

    The same tasks are drawn for every column, so that the interval of a difference column is a paired one.
    """
    tasks = len(columns)
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(tasks, np.full(tasks, 1 / tasks), size=draws) / tasks
    interval: Floats = np.quantile(weights @ columns, [0.025, 0.975], axis=0)
    return interval


def auroc(scores: Sequence[float], correct: Sequence[bool]) -> float | None:
    """P(a correct attempt of one task scores above an incorrect one), ties a half; None without both."""
    right = np.array([s for s, c in zip(scores, correct, strict=True) if c])
    wrong = np.array([s for s, c in zip(scores, correct, strict=True) if not c])
    if not len(right) or not len(wrong):
        return None
    difference = right[:, None] - wrong[None, :]
    return float(((difference > 0) + 0.5 * (difference == 0)).mean())


def mcnemar(only_first: int, only_second: int) -> float:
    """Exact two-sided p of `only_first` tasks resolved by one side alone against `only_second` by the other."""
    n = only_first + only_second
    tail = sum(math.comb(n, i) for i in range(min(only_first, only_second) + 1)) / 2**n
    return float(min(1.0, 2 * tail))


# ------------------------------------------------------------------------------------------------- evidence, by key


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempted:
    """What the choice needs of a trajectory; a projection without any grade."""

    task_id: str
    sample: int
    patch: str
    stop: Stop
    num_turns: int


@dataclass(frozen=True, slots=True)
class Unit:
    """One patch of one task and the attempts that made it: what is run once."""

    task: Task
    patch: str
    samples: tuple[int, ...]


def asked(ask: config.Evaluate, policy: Policy) -> dict[str, Any]:
    """By key, what makes this evaluation this one."""
    tasks_ = {f"evaluate.tasks.{key}": value for key, value in config.section(ask.tasks).items()}
    select = {f"evaluate.select.{key}": value for key, value in config.section(ask.select).items()}
    heat = {"evaluate.heat": ask.heat}
    return {"evaluate.model": str(policy.path), "evaluate.samples": ask.samples, **heat, **tasks_, **select}


def pin(out: store.Evaluation, asked: dict[str, Any]) -> None:
    """Remember what an evaluation is asked for, or hold this start against it.

    ValueError names the first key that differs: products of one policy must not be taken for those of another, and a
    choice is not made again once its grades are known.
    """
    path = out.trajectories.with_name("asked.json")
    if path.is_file():
        for key, old in json.loads(path.read_text(encoding="utf-8")).items():
            if asked[key] != old:
                raise ValueError(
                    f"{key}={asked[key]}: {path.parent} was made with {old}; give another evaluate.name or run_dir"
                )
        return
    store.save(path, json.dumps(asked, indent=2) + "\n")


def execute(trajectories: Path, suite: Sequence[Task], cfg: config.Rollout, *, to: Path) -> dict[str, float]:
    """The visible tests on every candidate patch; product Execution.

    An empty patch is not run, and a lost sandbox is asked again `tries` times: both leave no row, which ranks last.
    """
    attempts = list(store.read(trajectories, Attempted))
    todo = [a for a in attempts if a.patch.strip() and not a.stop.infra]
    units = _units(todo, suite, store.keys(to))
    grades: Counter[Grade] = Counter()
    lost = 0
    for unit, verdict in _run(units, functools.partial(_check, cfg=cfg.sandbox), cfg, "execute"):
        if verdict is None:
            lost += len(unit.samples)
            continue
        grades[verdict.grade] += len(unit.samples)
        broken = _regressed(unit.task, verdict)
        rows = [Execution(task_id=unit.task.id, sample=s, regressed=broken, reproduced=0) for s in unit.samples]
        store.append(to, Execution, rows, key=(unit.task.id, unit.samples[0]))
    return {
        "checked": float(store.seal(to, Execution)),
        "runs": float(len(units)),
        "timeouts": float(grades[Grade.TIMEOUT]),
        "tampered": float(grades[Grade.TAMPERED]),
        "skipped": float(len(attempts) - len(todo)),
        "lost": float(lost),
    }


def _regressed(task: Task, verdict: Verdict) -> int:
    """Visible tests that do not pass; a test without a result, or without an honest one, did not pass."""
    if verdict.grade is Grade.TAMPERED:
        return len(task.visible)
    return len(set(task.visible) - set(verdict.passed))


def candidates(out: store.Evaluation) -> dict[str, list[Candidate]]:
    """The candidates of each task with what is known of them; a product that was not made is knowledge missing."""
    executions = _by_key(store.read(out.executions, Execution)) if store.done(out.executions) else {}
    scores = _by_key(store.read(out.scores, Score)) if store.done(out.scores) else {}
    found: dict[str, list[Candidate]] = defaultdict(list)
    for attempt in store.read(out.trajectories, Attempted):
        key = attempt.task_id, attempt.sample
        ran, score = executions.get(key), scores.get(key)
        found[attempt.task_id].append(
            Candidate(
                **asdict(attempt),
                verifier=score.verifier if score else None,
                regressed=ran.regressed if ran else None,
                reproduced=ran.reproduced if ran else None,
            )
        )
    return dict(sorted(found.items()))


def _by_key(records: Iterable[Any]) -> dict[Key, Any]:
    return {(r.task_id, r.sample): r for r in records}


# ---------------------------------------------------------------------------------------------------------- choice


def choose(
    out: store.Evaluation, suite: Sequence[Task], cfg: config.Select, *, model: str = "entropo_ray"
) -> dict[str, float]:
    """One candidate a task; product Choice with predictions.jsonl, SWE-bench's own format, beside it.

    A task without candidates has no choice and an empty prediction.
    """
    found = candidates(out)
    choices: list[Choice] = []
    predictions: list[Prediction] = []
    dropped: Counter[str] = Counter()
    for task in sorted(suite, key=lambda t: t.id):
        of_task = found.get(task.id, [])
        patch = ""
        if of_task:
            chosen, removed = select.select(of_task, cfg), select.removals(of_task, cfg)
            dropped.update(removed)
            choices.append(Choice(task_id=task.id, sample=chosen.sample, reason=_reason(len(of_task), removed)))
            patch = chosen.patch
        predictions.append(Prediction(instance_id=task.id, model_name_or_path=model, model_patch=patch))
    partial = store.fresh(out.choice)
    rows = store.write(partial, Choice, choices)
    lines = (json.dumps(asdict(p)) + "\n" for p in predictions)
    (partial / "predictions.jsonl").write_text("".join(lines), encoding="utf-8")
    store.publish(partial, out.choice, rows=rows, parts=1)
    return {
        "chosen": float(rows),
        "without": float(len(suite) - rows),
        **{f"dropped_{name}": float(dropped[name]) for name, _ in select.criteria(cfg)},
    }


def _reason(n: int, removed: dict[str, int]) -> str:
    said = [f"{count} by {name}" for name, count in removed.items() if count]
    left = n - sum(removed.values())
    tie = f", {left} alike: the lowest sample" if left > 1 else ""
    return f"of {n}: {', '.join(said) or 'none'} removed{tie}"


# ----------------------------------------------------------------------------------------------------- hidden tests


def resolve(
    out: store.Evaluation, suite: Sequence[Task], cfg: config.Rollout, *, answers: str, chosen_by: config.Select
) -> dict[str, float]:
    """Hidden tests on every candidate patch (product Graded, made once), then the numbers of the evaluation.

    `answers`: the pack that holds them. Raises ValueError if no choice is on disk.
    """
    if not store.done(out.choice):
        raise ValueError(f"{out.choice}: nothing was chosen yet; grades may not be seen before the choice")
    if not store.done(out.grades):
        _grade_all(out, suite, cfg, answers)
    return numbers(out, chosen_by)


def _grade_all(out: store.Evaluation, suite: Sequence[Task], cfg: config.Rollout, answers: str) -> None:
    attempts = list(store.read(out.trajectories, Attempted))
    units = _units([a for a in attempts if not a.stop.infra], suite, store.keys(out.grades))
    for unit, verdict in _run(units, functools.partial(_grade, answers=answers, cfg=cfg.sandbox), cfg, "resolve"):
        if verdict is not None:
            _append_grades(out.grades, unit.task.id, unit.samples, verdict)
    # last, so that a stage that is started again asks for the lost ones again
    for task_id, sample in sorted({(a.task_id, a.sample) for a in attempts} - store.keys(out.grades)):
        _append_grades(out.grades, task_id, (sample,), None)
    store.seal(out.grades, Graded)
    pack.list_flaky(out.grades.with_name("flaky.jsonl"), store.read(out.grades, Graded))


def _append_grades(to: Path, task_id: str, samples: Sequence[int], verdict: Verdict | None) -> None:
    grade_ = verdict.grade if verdict else None
    rows = [Graded(task_id=task_id, sample=s, grade=grade_, verdict=verdict) for s in samples]
    store.append(to, Graded, rows, key=(task_id, samples[0]))


def _units(attempts: Iterable[Attempted], suite: Sequence[Task], there: set[Key]) -> list[Unit]:
    """Attempts that are not there yet, those with one patch together. ValueError on a task that the suite lacks."""
    tasks = {task.id: task for task in suite}
    samples: dict[tuple[str, str], list[int]] = defaultdict(list)
    for a in attempts:
        if a.task_id not in tasks:
            raise ValueError(
                f"evaluate.tasks: task {a.task_id} was sampled but is not in this suite; "
                "give the suite that was sampled, or another evaluate.name"
            )
        if (a.task_id, a.sample) not in there:
            samples[a.task_id, a.patch].append(a.sample)
    return [Unit(tasks[task_id], patch, tuple(sorted(s))) for (task_id, patch), s in samples.items()]


async def _check(unit: Unit, cfg: config.Sandbox) -> Verdict:
    return await grade.check(unit.task, unit.patch, cfg)


async def _grade(unit: Unit, answers: str, cfg: config.Sandbox) -> Verdict:
    return await _answers(answers).grade(unit.task, unit.patch, cfg)


@functools.cache
def _answers(path: str) -> grade.Answers:
    """Read once a process."""
    return grade.answers_of(Path(path))


def _run(
    units: Sequence[Unit], work: Callable[[Unit], Coroutine[Any, Any, Verdict]], cfg: config.Rollout, what: str
) -> Iterator[tuple[Unit, Verdict | None]]:
    """Each unit with its verdict as it comes; None where every sandbox of `tries` was lost.

    One Ray task a unit, at most `graders` at once: a test run takes seconds, and any node may take it. Raises
    TimeoutError if nothing comes for as long as one unit may take.
    """
    # where nodes are marked as able to hold sandboxes, only those may take a unit
    box = {"sandbox": 1} if ray.cluster_resources().get("sandbox") else {}
    attempt = ray.remote(_attempt).options(
        num_cpus=1, resources=box, max_retries=cfg.tries, scheduling_strategy="SPREAD"
    )
    deadline_s = cfg.tries * max(cfg.sandbox.life_s, grade.patience_s(cfg.sandbox, setup_s=setup_s(cfg.sandbox)))
    waiting = list(reversed(units))
    running: dict[Any, Unit] = {}
    with observe.progress(what, len(units)) as done:
        while waiting or running:
            while waiting and len(running) < max(1, cfg.graders):
                unit = waiting.pop()
                running[attempt.remote(work, unit, cfg.tries)] = unit
            ready, _ = ray.wait(list(running), num_returns=1, timeout=deadline_s)
            if not ready:
                keys = ", ".join(f"{u.task.id}/{u.samples[0]}" for u in running.values())
                raise TimeoutError(f"{what}: no test run ended for {deadline_s:.0f} s; open: {keys}")
            unit = running.pop(ready[0])
            verdict = _result(ready[0], unit, what)
            done.step()
            yield unit, verdict


def _attempt(work: Callable[[Unit], Coroutine[Any, Any, Verdict]], unit: Unit, tries: int) -> Verdict | str:
    """In a Ray task: the verdict, or why there is none."""
    said = ""
    for _ in range(max(1, tries)):
        try:
            return asyncio.run(work(unit))
        except SandboxError as error:
            said = f"{type(error).__name__}: {error}"
    return said


def _result(reference: Any, unit: Unit, what: str) -> Verdict | None:
    try:
        said = ray.get(reference)
    except ray.exceptions.RayTaskError:
        raise  # a fault of ours, not of a machine
    except ray.exceptions.RayError as error:
        said = f"{type(error).__name__}: {error}"
    if isinstance(said, Verdict):
        return said
    observe.log.warning("%s: no verdict for %s/%s: %s", what, unit.task.id, unit.samples[0], said)
    return None


# ------------------------------------------------------------------------------------------------ official numbers


def check_official(suite: Sequence[Task]) -> None:
    """ValueError, one line, where tasks run in directories; nothing is asked of an engine, and no answer is opened."""
    for task in suite:
        if Path(task.image).is_absolute():
            raise ValueError(
                f"evaluate.official=true: task {task.id} runs in a directory, {task.image}, and the official harness "
                "in images of an engine; give evaluate.tasks.path of a pack of images, or evaluate.official=false"
            )


def officially(
    out: store.Evaluation, suite: Sequence[Task], *, answers: str, workers: int, timeout_s: int
) -> dict[str, float]:
    """The choices through the official harness on this node (product Comparison, made once), and their numbers.

    Beside the product: agreement.txt, and harness/ with all that the harness was given and left.
    """
    if not store.done(out.official):
        check_official(suite)
        lines = (out.choice / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
        predictions = [_labelled(Prediction(**json.loads(line))) for line in lines]
        chosen = {(c.task_id, c.sample) for c in store.read(out.choice, Choice)}
        ours = [g for g in store.read(out.grades, Graded) if (g.task_id, g.sample) in chosen]
        left = store.fresh(out.official.with_name("harness"))
        rows = _answers(answers).official(suite)
        report = official.run(rows, predictions, to=left, workers=workers, timeout_s=timeout_s)
        compared = official.agreement(report, ours)
        partial = store.fresh(out.official)
        store.write(partial, official.Comparison, compared)
        (partial / "agreement.txt").write_text(official.table(compared), encoding="utf-8")
        left.replace(partial / "harness")
        store.publish(partial, out.official, rows=len(compared), parts=1)
    return official_numbers(list(store.read(out.official, official.Comparison)))


def _labelled(prediction: Prediction) -> Prediction:
    """With a name of its policy that the harness can make a directory of; only words of its path are left."""
    words = re.findall(r"[A-Za-z0-9][\w.@+-]*", prediction.model_name_or_path)[-3:]
    return replace(prediction, model_name_or_path="/".join(words) or "entropo_ray")


def official_numbers(compared: Sequence[official.Comparison]) -> dict[str, float]:
    """`official_agreement`: the share of the `official_compared`, which both graders have a verdict on."""
    resolved = sum(c.official is Grade.RESOLVED for c in compared)
    low, high = wilson(resolved, len(compared))
    agreed = [c.agree for c in compared if c.agree is not None]
    return {
        "official_resolved": float(resolved),
        "official_resolved_rate": resolved / len(compared),
        "official_resolved_rate_low": low,
        "official_resolved_rate_high": high,
        "official_compared": float(len(agreed)),
        **({"official_agreement": sum(agreed) / len(agreed)} if agreed else {}),
    }


# --------------------------------------------------------------------------------------------------------- numbers


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """A projection of Graded."""

    task_id: str
    sample: int
    grade: Grade | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """A projection of Trajectory: the log-probabilities of what was sampled, 0 on all other tokens."""

    num_actions: int
    behaviour_logp: tuple[float, ...]


def numbers(out: store.Evaluation, chosen_by: config.Select) -> dict[str, float]:
    """The numbers of a graded evaluation: means over tasks, each `x` with its 95 % interval `x_low`, `x_high`.

    An attempt without a grade counts as not resolved (and in `ungraded`), so that every task has its n attempts.
    `entropy` is -log pi of the sampled tokens at T = 1, in nats per action token, of draws at the sampling temperature.
    """
    found = candidates(out)
    marks = {(m.task_id, m.sample): m.grade for m in store.read(out.grades, Mark)}
    chosen = {c.task_id: c.sample for c in store.read(out.choice, Choice)}
    if not found:
        raise ValueError(f"{out.trajectories}: no trajectories; look at evaluate.tasks and evaluate.samples")
    columns = _columns(found, marks, chosen, chosen_by)
    resolved = int(columns["resolved"].sum())
    low, high = wilson(resolved, len(found))
    grades = Counter(marks.values())
    result = {
        "tasks": float(len(found)),
        "attempts": float(len(marks)),
        "resolved": float(resolved),
        "resolved_rate": resolved / len(found),
        "resolved_rate_low": low,
        "resolved_rate_high": high,
        "tampered": float(grades[Grade.TAMPERED]),
        "timeouts": float(grades[Grade.TIMEOUT]),
        "flaky": float(grades[Grade.FLAKY]),
        "empty": float(grades[Grade.EMPTY]),
        "ungraded": float(grades[None]),
        "entropy": _entropy(out.trajectories),
        **_means({name: column for name, column in columns.items() if name != "resolved"}),
        **_within(found, marks),
    }
    headroom = result[f"pass_at_{_attempts(found)}"] - result["pass_at_1"]
    if headroom > 0:  # the share of it that the selector gains; undefined without any
        result["gain"] = result["best_minus_pass_1"] / headroom
    return result


def _attempts(found: dict[str, list[Candidate]]) -> int:
    """n: the number of attempts that every task has."""
    return min(len(of_task) for of_task in found.values())


def _columns(
    found: dict[str, list[Candidate]], marks: dict[Key, Grade | None], chosen: dict[str, int], cfg: config.Select
) -> dict[str, Floats]:
    """[T] one value a task, by name."""
    n = _attempts(found)
    ks = sorted({2**i for i in range(n.bit_length())} | {n})
    rows: dict[str, list[float]] = defaultdict(list)
    for task_id, of_task in found.items():
        correct = [marks[task_id, c.sample] is Grade.RESOLVED for c in of_task]
        keys = select.rank(of_task, cfg)
        for k in ks:
            rows[f"pass_at_{k}"].append(pass_at_k(len(of_task), sum(correct), k))
            rows[f"best_at_{k}"].append(best_at_k(keys, correct, k))
        words = {normalised(c.patch) for c in of_task} - {""}
        right = {normalised(c.patch) for c, ok in zip(of_task, correct, strict=True) if ok}
        rows["distinct_patches"].append(len(words) / len(of_task))
        rows["distinct_resolved"].append(float(len(right)))
        rows["resolved"].append(float(marks.get((task_id, chosen.get(task_id, -1))) is Grade.RESOLVED))
    columns = {name: np.array(values) for name, values in rows.items()}
    columns["best_minus_pass_1"] = columns[f"best_at_{n}"] - columns["pass_at_1"]
    columns["regret"] = columns[f"pass_at_{n}"] - columns[f"best_at_{n}"]
    return columns


def _means(columns: dict[str, Floats]) -> dict[str, float]:
    names = sorted(columns)
    table = np.stack([columns[name] for name in names], axis=1)
    low, high = bootstrap(table)
    result: dict[str, float] = {}
    for i, name in enumerate(names):
        result |= {name: float(table[:, i].mean()), f"{name}_low": float(low[i]), f"{name}_high": float(high[i])}
    return result


def _within(found: dict[str, list[Candidate]], marks: dict[Key, Grade | None]) -> dict[str, float]:
    """The verifier's AUROC within tasks that have both kinds of scored attempts; nothing where there is none."""
    values = []
    for task_id, of_task in found.items():
        scored = [(c.verifier, marks[task_id, c.sample] is Grade.RESOLVED) for c in of_task if c.verifier is not None]
        value = auroc([s for s, _ in scored], [right for _, right in scored])
        if value is not None:
            values.append(value)
    return {"auroc_tasks": float(len(values)), **(_means({"auroc": np.array(values)}) if values else {})}


def _entropy(trajectories: Path) -> float:
    nats, tokens = 0.0, 0
    for drawn in store.read(trajectories, Drawn):
        nats -= sum(drawn.behaviour_logp)
        tokens += drawn.num_actions
    return nats / max(1, tokens)


def compare(first: store.Evaluation, second: store.Evaluation) -> dict[str, float]:
    """`second` minus `first` over the tasks that both graded, paired by task, with 95 % intervals.

    Empty if they share no task; `mcnemar` is the exact p of the tasks that one side's choice alone resolves.
    """
    sides = [_shares(first), _shares(second)]
    tasks = sorted(sides[0].keys() & sides[1].keys())
    if not tasks:
        return {}
    a, b = (np.array([side[task] for task in tasks]) for side in sides)
    difference = _means({"pass_at_1_difference": (b - a)[:, 0], "resolved_difference": (b - a)[:, 1]})
    only = int(((a - b)[:, 1] > 0).sum()), int(((b - a)[:, 1] > 0).sum())
    return {"tasks": float(len(tasks)), **difference, "mcnemar": mcnemar(*only)}


def _shares(out: store.Evaluation) -> dict[str, tuple[float, float]]:
    """By task: the share of attempts that resolve it, and whether the chosen one does."""
    chosen = {(c.task_id, c.sample) for c in store.read(out.choice, Choice)}
    right: dict[str, list[float]] = defaultdict(list)
    best: dict[str, float] = defaultdict(float)
    for mark in store.read(out.grades, Mark):
        resolved = float(mark.grade is Grade.RESOLVED)
        right[mark.task_id].append(resolved)
        if (mark.task_id, mark.sample) in chosen:
            best[mark.task_id] = resolved
    return {task: (sum(values) / len(values), best[task]) for task, values in right.items()}
