"""One stage of sampling: `samples` attempts at each task, graded, as one sealed product.

    requests ─ Episodes (actors) ─ Graders (actors) ─> one part of the product a row, and Answered rows to the driver

Ray Data schedules and streams; it stores nothing. It streams single episodes only with one row a block *and*
batch_size=1. Tokens never reach the driver. After a kill at any moment the same call asks only for what is not on disk.
"""

from __future__ import annotations

import functools
import hashlib
import math
import random
import shutil
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
import ray.data
from ray.data import ActorPoolStrategy, ExecutionResources
from ray.data.exceptions import ExecutionTimeoutError
from ray.exceptions import GetTimeoutError

from entropo_ray import chat, config, grade, observe, store
from entropo_ray.agent.episode import Generate
from entropo_ray.records import (
    Grade,
    Outcome,
    Policy,
    Role,
    RolloutRequest,
    Stop,
    Task,
    Trajectory,
    from_table,
    to_table,
)
from entropo_ray.rollout import engine
from entropo_ray.rollout.episodes import Episodes, Voice, spec_of
from entropo_ray.rollout.graders import LOST, Answered, Graders
from entropo_ray.rollout.lending import keepers, setup_s
from entropo_ray.tasks import pack

ATTEMPTS = "attempts"  # directory inside the product: attempts of this start, one byte each
START_S = 600  # until the actors of both pools run
TOKEN_BYTES = 16  # of one token of a trajectory in Arrow: id, mask, log-probability, and its share of the text
HOPELESS = 16  # so many rows lost and none answered: the stage is broken, not unlucky
LIMITS = (Stop.ABS_STEP, Stop.TOKEN, Stop.WALL_TIME)

Key = tuple[str, int]


def sample(
    policy: Policy,
    suite: Sequence[Task],
    cfg: config.Rollout,
    *,
    seed: int,
    to: Path,
    samples: int | None = None,
    answers: str | None = None,
) -> dict[str, float]:
    """Trajectories of `policy` as a sealed product at `to`, one row a request; its numbers.

    `samples`: attempts a task, instead of cfg.samples. `answers`: the pack whose hidden tests grade; None: no grades.
    Holds its engines until it returns. RuntimeError when infrastructure answers nothing at all.
    """
    words = chat.load(policy.path)
    chosen = drawn(suite, cfg.tasks, seed=seed, round=policy.round)
    asked = requests(chosen, samples or cfg.samples, role=Role.FIX, round=policy.round, seed=seed)
    timing: dict[str, float] = {}
    if missing := unanswered(asked, to):
        with engine.engines(policy, cfg, end_ids=words.end_ids, seed=seed) as names:
            voice = functools.partial(policy_voice, names, policy.path, cfg)
            play = Play(voice=voice, kind="model", temperature=cfg.temperature, answers=answers)
            timing = stream(missing, play, cfg, to=to)
    return seal(asked, to, graded=answers is not None) | timing


def policy_voice(names: Sequence[str], path: Path, cfg: config.Rollout) -> tuple[Generate, chat.Chat]:
    """Who answers in an episode actor of `sample`: the stage's engines."""
    words = chat.load(path)
    return engine.pool(names, words, cfg), words


# --- requests --------------------------------------------------------------------------------------------------------


def seed_of(run_seed: int, role: str, round: int, task_id: str, sample: int) -> int:
    """The seed of one attempt, in [0, 2^63). It fixes the draw, not the tokens: kernels may depend on the batch."""
    text = f"{run_seed}/{role}/{round}/{task_id}/{sample}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def drawn(suite: Sequence[Task], count: int | None, *, seed: int, round: int) -> list[Task]:
    """The tasks of one round: all, or `count` of them by (seed, round), every task once before any twice.

    ValueError on an empty suite.
    """
    if not suite:
        raise ValueError("the suite has no task: tasks.path, tasks.split and tasks.limit leave none")
    tasks = sorted(suite, key=lambda task: task.id)
    if count is None or count >= len(tasks):
        return tasks
    order = random.Random(seed).sample(tasks, len(tasks))
    return [order[(round * count + i) % len(order)] for i in range(count)]


def requests(
    suite: Sequence[Task], samples: int, *, role: Role, round: int, seed: int, word: str = ""
) -> list[RolloutRequest]:
    """Attempts in the order in which they start: every task's first, then every task's second, ...

    `word` stands in place of the role in the seeds, so that a teacher's differ from a policy's.
    """
    return [
        RolloutRequest(
            task=task,
            role=role,
            sample=number,
            round=round,
            seed=seed_of(seed, word or role.value, round, task.id, number),
        )
        for number in range(samples)
        for task in suite
    ]


def unanswered(asked: Sequence[RolloutRequest], to: Path) -> list[RolloutRequest]:
    """Those that have no row on disk. The product is not sealed yet."""
    assert not store.done(to), f"{to} is whole already"
    held = store.keys(to)
    if foreign := held - {_key(request) for request in asked}:
        raise ValueError(
            f"{to} has attempts that this start does not ask for ({_some(foreign)}): its tasks are others now, by a "
            f"quarantine perhaps; give them back (tasks.quarantined=true), or remove {to}"
        )
    return [request for request in asked if _key(request) not in held]


def _key(request: RolloutRequest) -> Key:
    return request.task.id, request.sample


# --- the stream ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Play:
    """Who plays, and who grades."""

    voice: Voice
    kind: str  # model | scripted
    temperature: float
    answers: str | None
    patched: bool = True  # False: patches are not read, for attempts that only tokens are wanted of


def stream(missing: Sequence[RolloutRequest], play: Play, cfg: config.Rollout, *, to: Path) -> dict[str, float]:
    """Play and grade what is missing; every row is on disk when its Answered arrives. How long it took."""
    for name in (LOST, ATTEMPTS):  # of an earlier start: what was lost there is asked for again
        shutil.rmtree(to / name, ignore_errors=True)
    waiting = {_key(request) for request in missing}
    seen: Counter[str] = Counter()
    began = tail = time.monotonic()
    coming = [spec_of(request, cfg) for request in missing] if cfg.sandbox.ahead else []
    with observe.progress("episodes", len(missing)) as bar, keepers(cfg.sandbox, coming):
        for row in _answers(_dataset(missing, play, cfg, to), waiting, cfg):
            waiting.discard((row.task_id, row.sample))
            if len(waiting) >= cfg.episodes:
                tail = time.monotonic()
            _count(row, seen, to)
            bar.step(1, **seen)
    assert not waiting, f"the stream ended without {_some(waiting)}"
    seconds = time.monotonic() - began
    return {"stream_s": seconds, "tail_s": time.monotonic() - tail, "episodes_per_s": len(missing) / seconds}


def _count(row: Answered, seen: Counter[str], to: Path) -> None:
    seen["lost" if row.lost else str(row.grade or row.stop)] += 1
    if row.lost:
        observe.append_line(to / "lost.jsonl", {"task_id": row.task_id, "sample": row.sample, "reason": row.reason})
        if seen["lost"] == seen.total() == HOPELESS:
            raise RuntimeError(f"the first {HOPELESS} episodes were all lost, the last one by: {row.reason}")


def _dataset(missing: Sequence[RolloutRequest], play: Play, cfg: config.Rollout, to: Path) -> Any:
    """Requests -> Episodes -> Graders, not yet started."""
    actors = max(1, cfg.episode_actors)
    rows = ray.data.from_arrow([to_table(RolloutRequest, [request]) for request in missing])  # a table is a block
    dataset = rows.map_batches(
        Episodes,
        fn_constructor_args=(play.voice, cfg, to / ATTEMPTS),
        fn_constructor_kwargs={"kind": play.kind, "temperature": play.temperature, "patched": play.patched},
        **_pool(actors, math.ceil(cfg.episodes / actors)),
    ).map_batches(
        Graders, fn_constructor_args=(to, cfg, play.answers), **_pool(actors, math.ceil(cfg.graders / actors))
    )
    context = dataset.context
    context.enable_progress_bars = False
    context.memory_usage_poll_interval_s = None  # a thread a row, for an estimate of what sandboxes do not use
    context.wait_for_min_actors_s = START_S
    context.execution_no_progress_timeout_s = _longest_s(cfg)
    context.execution_options.resource_limits = ExecutionResources(object_store_memory=_store_bytes(cfg))
    return dataset


def _pool(actors: int, each: int) -> dict[str, Any]:
    """Options of one stage: `actors` of them, each with `each` rows at once and one sandbox a row."""
    return {
        "batch_size": 1,
        "batch_format": "pyarrow",
        "zero_copy_batch": True,
        "compute": ActorPoolStrategy(
            size=actors, max_tasks_in_flight_per_actor=each, max_concurrent_calls_per_actor=each
        ),
        "num_cpus": 0.5,
        "resources": {"sandbox": each},
    }


def _longest_s(cfg: config.Rollout) -> float:
    """No row takes longer than this, every try of its episode and of its grade included."""
    setup = setup_s(cfg.sandbox)
    grade_s = grade.patience_s(cfg.sandbox, setup_s=setup)
    return cfg.tries * (cfg.agent.wall_s + cfg.agent.extract_s + grade_s + setup)


def _store_bytes(cfg: config.Rollout) -> int:
    """Twice the rows in flight; Ray Data throttles its source beyond."""
    largest = cfg.agent.max_tokens * TOKEN_BYTES
    return max(256 << 20, 2 * (cfg.episodes + cfg.graders) * largest)


def _answers(dataset: Any, waiting: set[Key], cfg: config.Rollout) -> Iterator[Answered]:
    """Rows as they come. TimeoutError names what is still waited for."""
    try:
        # prefetching would hold a finished row until the next one comes
        for block in dataset.iter_batches(batch_size=None, prefetch_batches=0, batch_format="pyarrow"):
            yield from from_table(Answered, block)
    except ExecutionTimeoutError:
        raise TimeoutError(
            f"no episode and no grade ended in {_longest_s(cfg):.0f} s; still waiting for {_some(waiting)}"
        ) from None
    except GetTimeoutError:
        need = f"{cfg.episodes + cfg.graders} sandboxes and {max(1, cfg.episode_actors)} CPUs"
        raise TimeoutError(
            f"episode and grader actors did not start in {START_S} s: they need {need} beside the engines; "
            f"the cluster has free {engine.resources(ray.available_resources())}"
        ) from None


def _some(keys: set[Key]) -> str:
    names = [f"{task}/{sample}" for task, sample in sorted(keys)]
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


# --- the product -----------------------------------------------------------------------------------------------------


def seal(asked: Sequence[RolloutRequest], to: Path, *, graded: bool) -> dict[str, float]:
    """Bring in the lost rows, seal, and count: one row for each request."""
    lost = sorted((to / LOST).glob("part-*.parquet"))
    for part in lost:
        if not (to / part.name).exists():  # an actor that was killed may have played it once more, to the end
            part.replace(to / part.name)
    held = store.keys(to)
    expected = {_key(request) for request in asked}
    assert held == expected, f"{to}: rows without a request or without an answer: {_some(held ^ expected)}"
    for name in (LOST, ATTEMPTS):
        shutil.rmtree(to / name, ignore_errors=True)
    store.seal(to, Trajectory)
    pack.list_flaky(to.with_name("flaky.jsonl"), store.read(to, Outcome))
    return numbers(to, graded=graded)


def numbers(product: Path, *, graded: bool) -> dict[str, float]:
    """What a sealed product says of itself; the token columns are summed in Ray tasks."""
    outcomes = list(store.read(product, Outcome))
    lost = [o for o in outcomes if o.stop.infra or (graded and o.grade is None)]
    stops = Counter(o.stop for o in outcomes)
    found: dict[str, float] = {"requested": len(outcomes), "answered": len(outcomes) - len(lost), "lost": len(lost)}
    if graded:
        found |= _grades(outcomes)
    found["turns_mean"] = sum(o.num_turns for o in outcomes) / len(outcomes)
    found["format_stops"] = stops[Stop.MALFORMED_LIMIT]
    found["limit_stops"] = sum(stops[stop] for stop in LIMITS)
    sums = _sums(product)
    found["tokens"], found["action_tokens"] = sums["tokens"], sums["actions"]
    found["entropy"] = sums["surprise"] / max(1.0, sums["actions"])
    for name in ("episode_s", "generate_s", "act_s", "grade_s"):
        found[name] = sums[name] / len(outcomes)
    return found


def _grades(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """resolved_rate is over rows with a label; tasks_both counts tasks that have one of each."""
    labels: defaultdict[str, set[bool]] = defaultdict(set)
    resolved = [o.resolved for o in outcomes if o.resolved is not None]
    for outcome in outcomes:
        if outcome.resolved is not None:
            labels[outcome.task_id].add(outcome.resolved)
    return {
        "resolved_rate": sum(resolved) / max(1, len(resolved)),
        "tasks_both": sum(len(both) == 2 for both in labels.values()),
        "tampered": sum(o.grade is Grade.TAMPERED for o in outcomes),
        "flaky": sum(o.grade is Grade.FLAKY for o in outcomes),
    }


def _sums(product: Path) -> dict[str, float]:
    """Sums over all rows, read where Ray finds room: tokens, seconds, and -log pi of the sampled tokens."""
    add_up = ray.remote(num_cpus=0.5)(_part_sums)
    total: defaultdict[str, float] = defaultdict(float)
    for part in ray.get([add_up.remote(part) for part in store.parts_of(product)], timeout=START_S):
        for name, value in part.items():
            total[name] += value
    return dict(total)


def _part_sums(part: Path) -> dict[str, float]:
    columns = ["token_ids", "num_actions", "behaviour_logp", "wall_s", "turns", "verdict"]
    total: defaultdict[str, float] = defaultdict(float)
    for batch in pq.ParquetFile(part).iter_batches(batch_size=64, columns=columns):
        turns = pc.list_flatten(batch["turns"])
        total["tokens"] += _sum(pc.list_value_length(batch["token_ids"]))
        total["actions"] += _sum(batch["num_actions"])
        total["surprise"] -= _sum(pc.list_flatten(batch["behaviour_logp"]))
        total["episode_s"] += _sum(batch["wall_s"])
        total["generate_s"] += _sum(pc.struct_field(turns, "generate_s"))
        total["act_s"] += _sum(pc.struct_field(turns, "act_s"))
        total["grade_s"] += _sum(pc.struct_field(batch["verdict"], "seconds"))
    return dict(total)


def _sum(values: pa.Array) -> float:
    return float(pc.sum(values).as_py() or 0.0)
