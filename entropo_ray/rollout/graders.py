"""The class that grades trajectories and puts them on disk, inside a Ray Data actor.

The row is durable before the driver hears of it: one that dies loses nothing that is finished. What infrastructure left
without an answer goes to a directory beside, so that a stage that is resumed asks for it again.
"""

from __future__ import annotations

import asyncio
import dataclasses
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from entropo_ray import config, grade, store
from entropo_ray.records import Grade, Stop, Task, Trajectory, Verdict, to_table
from entropo_ray.rollout.episodes import BACKOFF_S, from_row_of
from entropo_ray.rollout.lending import borrow_here, setup_s
from entropo_ray.sandbox import SandboxError

LOST = "lost"  # directory inside the product: rows that infrastructure left without an answer


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """What the driver learns of one row. It has no tokens."""

    task_id: str
    sample: int
    stop: Stop
    grade: Grade | None
    lost: bool
    reason: str  # of a lost one


class Graders:
    """Ray Data's UDF: a Trajectory and its Task in, Answered out, the graded Trajectory on disk.

    `answers`: the pack whose hidden tests grade; None: nothing is graded.
    """

    def __init__(self, to: Path, cfg: config.Rollout, answers: str | None) -> None:
        self._to = to
        self._cfg = cfg
        borrow_here(cfg.sandbox)
        self._answers = None if answers is None else grade.answers_of(store.place(answers))

    async def __call__(self, batch: pa.Table) -> pa.Table:
        trajectory, task = from_row_of(batch)
        reason = trajectory.reason or trajectory.stop.value
        lost = trajectory.stop.infra
        if self._answers is not None and not lost:
            verdict = await self._verdict(self._answers, task, trajectory.patch)
            lost = isinstance(verdict, str)
            if isinstance(verdict, str):
                reason = f"no grade: {verdict}"
            else:
                trajectory = dataclasses.replace(trajectory, grade=verdict.grade, verdict=verdict)
        await asyncio.to_thread(self._keep, trajectory, lost=lost)
        answered = Answered(
            task_id=trajectory.task_id,
            sample=trajectory.sample,
            stop=trajectory.stop,
            grade=trajectory.grade,
            lost=lost,
            reason=reason if lost else "",
        )
        return to_table(Answered, [answered])

    def _keep(self, trajectory: Trajectory, *, lost: bool) -> None:
        home = self._to / LOST if lost else self._to
        store.append(home, Trajectory, [trajectory], key=(trajectory.task_id, trajectory.sample))

    async def _verdict(self, answers: grade.Answers, task: Task, patch: str) -> Verdict | str:
        """The verdict, or why there is none after `tries`: a dead sandbox is never a failed grade."""
        limit_s = grade.patience_s(self._cfg.sandbox, setup_s=setup_s(self._cfg.sandbox))
        reason = ""
        for number in range(self._cfg.tries):
            if number:
                await asyncio.sleep(BACKOFF_S * 2 ** (number - 1))
            try:
                async with asyncio.timeout(limit_s):
                    return await answers.grade(task, patch, self._cfg.sandbox)
            except SandboxError as error:
                reason = f"{type(error).__name__}: {error}"
            except TimeoutError:
                reason = f"the grader had not ended after {limit_s:.0f} s, its own limits notwithstanding"
        return reason
