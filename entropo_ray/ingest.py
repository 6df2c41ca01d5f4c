"""Task packs: make the tasks of a source, prove each in sandboxes, and keep the pack only if they hold.

A pack is made beside its place and renamed, so that a pack that exists is a pack that was proved.
"""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from entropo_ray import config, grade, observe, sandbox, store, tasks
from entropo_ray.records import Task
from entropo_ray.sandbox import SandboxError, docker
from entropo_ray.tasks import local, pack

Prove = Callable[[Task], Awaitable[list[str]]]  # reasons to refuse a task

_MADE_WITH = "made_with.json"
_TRIES = 3  # times that a validation lost to a sandbox is asked for


def ingest(cfg: config.Pack, box: config.Sandbox, *, seed: int, to: Path) -> dict[str, float]:
    """Make the pack at `to`, unless it is there already; how many tasks it holds and how many were refused.

    ValueError, one line: a task that does not hold, `to` is in the way or was made with other settings, no sandbox.
    """
    settings = _settings(cfg, seed)
    if store.done(to):
        _same(settings, to)
        return _numbers(len(pack.tasks(to)))
    if to.exists() and any(to.iterdir()):
        raise ValueError(f"tasks.path={to}: exists and is no whole pack; remove it, or name another place")
    if box.backend == "docker":
        raise ValueError(
            f"rollout.sandbox.backend=docker: pack.source={cfg.source} makes directories, not images; give bwrap, "
            "or tasks.path of a pack whose images the engine has"
        )
    _ready(box)
    partial = store.fresh(to)
    mined = local.generate(
        count=cfg.count,
        held_out=cfg.held_out,
        ambiguous=cfg.ambiguous,
        hidden=cfg.hidden,
        seed=seed,
        to=partial,
        practice=cfg.practice,
        families=cfg.families,
    )
    answers = {m.task.id: m.answer for m in mined if m.task.split != pack.PRACTICE}

    async def prove(task: Task) -> list[str]:
        return await grade.validate(task, answers[task.id], box, runs=cfg.runs)

    # the local source knows its answers: a task that does not hold is a defect, so none is left out in silence
    _all_hold([m.task for m in mined if m.task.id in answers], prove, where=f"pack.source={cfg.source}")
    (partial / _MADE_WITH).write_text(json.dumps(settings) + "\n")
    tasks.write(partial, mined)
    partial.replace(to)
    return _numbers(len(mined))


def check(cfg: config.Pack, box: config.Sandbox, *, path: Path) -> dict[str, float]:
    """Prove every task of an existing pack again. ValueError, one line, if one does not hold."""
    suite = tasks.load(config.Tasks(path=str(path), split="all"))
    _ready(box)
    answers = grade.answers_of(path)

    async def prove(task: Task) -> list[str]:
        return await answers.validate(task, box, runs=cfg.runs)

    _all_hold(suite, prove, where=f"tasks.path={path}")
    return _numbers(len(suite))


def _numbers(count: int) -> dict[str, float]:
    return {"tasks": float(count), "refused": 0.0}


def _ready(box: config.Sandbox) -> None:
    """Open one sandbox before anything is made. ValueError that says what is missing here."""

    async def trial(layer: str) -> None:
        if box.backend == "docker":  # no directory is an image there
            await asyncio.to_thread(docker.engine)
            return
        async with sandbox.open_sandbox(sandbox.SandboxSpec(layer), backend=box.backend):
            pass

    try:
        with tempfile.TemporaryDirectory() as layer:
            Path(layer, ".git").mkdir()
            asyncio.run(trial(layer))
    except SandboxError as error:
        raise ValueError(str(error)) from error
    problems = sandbox.probe(box.backend) if box.strict else []
    if problems:
        raise ValueError(f"rollout.sandbox.strict=true: {problems[0]}")


def _settings(cfg: config.Pack, seed: int) -> dict[str, Any]:
    """What a pack's bytes depend on."""
    return {f"pack.{key}": value for key, value in config.section(cfg).items() if key not in ("check", "runs")} | {
        "seed": seed
    }


def _same(settings: Mapping[str, Any], to: Path) -> None:
    record = to / _MADE_WITH
    made = json.loads(record.read_text()) if record.is_file() else {}  # a pack of the user's own has none
    for key, value in made.items():
        if settings.get(key) != value:
            raise ValueError(
                f"{key}={settings.get(key)}: {to} was made with {key}={value}; "
                "give another tasks.path, remove the pack, or give the old value"
            )


def _all_hold(suite: Sequence[Task], prove: Prove, *, where: str) -> None:
    """Prove all tasks, twice as many at once as there are cores. ValueError, one line, with the first that fails."""
    refused = asyncio.run(_refused(suite, prove))
    if refused:
        task_id, reasons = next(iter(refused.items()))
        more = f" (and {len(refused) - 1} more)" if len(refused) > 1 else ""
        raise ValueError(f"{where}: task {task_id}{more} does not hold: {'; '.join(reasons)}")


async def _refused(suite: Sequence[Task], prove: Prove) -> dict[str, list[str]]:
    """Task id -> reasons, in the order of the suite, for those that do not hold."""
    turn = asyncio.Semaphore(2 * len(os.sched_getaffinity(0)))

    async def one(task: Task) -> list[str]:
        async with turn:
            reasons = await _retried(task, prove)
        counter.step()
        return reasons

    with observe.progress("validate", len(suite)) as counter:
        found = await asyncio.gather(*(one(task) for task in suite))
    return {task.id: reasons for task, reasons in zip(suite, found, strict=True) if reasons}


async def _retried(task: Task, prove: Prove) -> list[str]:
    for tries_left in range(_TRIES - 1, 0, -1):
        try:
            return await prove(task)
        except SandboxError as error:
            observe.log.info("%s: %s; %d tries left", task.id, error, tries_left)
    return await prove(task)
