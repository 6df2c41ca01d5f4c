"""The class that turns requests into trajectories, inside a Ray Data actor: one row in, one row out, no exception.

An actor plays its share of episodes in one event loop. One that infrastructure ended is asked for again here;
what still has no answer after `tries` is a row with an infra stop, which the stage keeps apart (see graders).
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import random
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa

from entropo_ray import config, sandbox
from entropo_ray.agent.episode import Generate, run_episode
from entropo_ray.chat import Chat
from entropo_ray.records import (
    RolloutRequest,
    Stop,
    Task,
    Trajectory,
    arrow_schema,
    from_row,
    from_table,
    to_row,
    to_table,
)
from entropo_ray.rollout.lending import borrow_here, setup_s
from entropo_ray.sandbox import SandboxError, SandboxSpec

TASK = "task"  # the column that carries an episode's task to its grader
BACKOFF_S = 0.5  # before the second try; doubled for each further one, with jitter

Voice = Callable[[], tuple[Generate, Chat]]  # made in the actor: who answers, and the chat of its ids


class Episodes:
    """Ray Data's UDF: a RolloutRequest in, its Trajectory and its Task out."""

    def __init__(
        self,
        voice: Voice,
        cfg: config.Rollout,
        attempts: Path,
        *,
        kind: str,
        temperature: float,
        patched: bool = True,
    ) -> None:
        self._generate, self._chat = voice()
        self._cfg = cfg
        self._attempts = attempts
        self._kind = kind
        self._temperature = temperature
        self._patched = patched
        attempts.mkdir(parents=True, exist_ok=True)
        sandbox.reap(cfg.sandbox.backend, cfg.sandbox.kubernetes)  # what an actor that was killed here left behind
        borrow_here(cfg.sandbox)

    async def __call__(self, batch: pa.Table) -> pa.Table:
        (request,) = from_table(RolloutRequest, batch)
        return to_row_of(await self.play(request), request.task)

    async def play(self, request: RolloutRequest) -> Trajectory:
        """The first trajectory that infrastructure did not end, or the last of `tries` that it did."""
        trajectory = None
        while (number := self._started(request)) <= self._cfg.tries:
            if trajectory is not None:
                await asyncio.sleep(BACKOFF_S * 2 ** (number - 2) * random.uniform(0.5, 1.5))
            trajectory = await self._attempt(request)
            if not trajectory.stop.infra or trajectory.stop is Stop.CONTEXT_OVERFLOW:  # asking again cannot help
                return trajectory
        return trajectory or self._lost(request, f"its actor died in each of {self._cfg.tries} attempts")

    def _started(self, request: RolloutRequest) -> int:
        """The number of this attempt. It is counted in a file: an episode that kills its actor must not do so for ever.

        The files are those of one start of the stage, one byte an attempt.
        """
        key = hashlib.blake2b(f"{request.task.id}/{request.sample}".encode(), digest_size=12).hexdigest()
        with (self._attempts / key).open("ab") as file:
            file.write(b".")
            return file.tell()

    async def _attempt(self, request: RolloutRequest) -> Trajectory:
        agent = self._cfg.agent
        limit_s = agent.wall_s + agent.extract_s + setup_s(self._cfg.sandbox)
        try:
            async with (
                asyncio.timeout(limit_s),
                sandbox.open_sandbox(spec_of(request, self._cfg), backend=self._cfg.sandbox.backend) as box,
            ):
                return await run_episode(
                    request,
                    self._generate,
                    box,
                    self._chat,
                    agent,
                    temperature=self._temperature,
                    kind=self._kind,
                    patched=self._patched,
                )
        except SandboxError as error:
            return self._lost(request, f"{type(error).__name__}: {error}")
        except TimeoutError:
            return self._lost(
                request, f"the episode had not ended after {limit_s:.0f} s, its own limits notwithstanding"
            )

    def _lost(self, request: RolloutRequest, reason: str) -> Trajectory:
        """The row of an episode that never came to be."""
        return Trajectory(
            task_id=request.task.id,
            sample=request.sample,
            round=request.round,
            seed=request.seed,
            kind=self._kind,
            scaffold="",
            prompt="",
            temperature=self._temperature,
            turns=(),
            token_ids=(),
            action_mask=(),
            behaviour_logp=(),
            num_turns=0,
            num_actions=0,
            num_tokens=0,
            patch="",
            patch_class="",
            files=(),
            stop=Stop.INFRA_ERROR,
            reason=reason,
            wall_s=0.0,
            grade=None,
            verdict=None,
        )


def spec_of(request: RolloutRequest, cfg: config.Rollout) -> SandboxSpec:
    """The sandbox that an episode needs."""
    agent, box = cfg.agent, cfg.sandbox
    life_s = agent.wall_s + agent.extract_s + setup_s(box)
    limits = sandbox.limits(box, exec_s=max(agent.tool_s, agent.extract_s), life_s=max(box.life_s, life_s))
    labels = {"role": "episode", "task": request.task.id, "sample": str(request.sample)}
    task = request.task
    where = box.kubernetes
    return SandboxSpec(task.image, workdir=task.workdir, site=task.site, limits=limits, labels=labels, cluster=where)


def to_row_of(trajectory: Trajectory, task: Task) -> pa.Table:
    """One row: the trajectory's columns, and the task that its grader needs."""
    column = pa.array([to_row(task)], type=pa.struct(list(arrow_schema(Task))))
    return to_table(Trajectory, [trajectory]).append_column(TASK, column)


def from_row_of(batch: pa.Table) -> tuple[Trajectory, Task]:
    """What `to_row_of` joined."""
    (trajectory,) = from_table(Trajectory, batch.drop_columns([TASK]))
    return trajectory, from_row(Task, batch[TASK][0].as_py())


def widened(agent: config.Agent, factor: int) -> config.Agent:
    """The same limits for a chat whose tokens are `factor` times shorter."""
    return dataclasses.replace(
        agent,
        max_tokens=factor * agent.max_tokens,
        max_reply_tokens=factor * agent.max_reply_tokens,
        min_reply_tokens=factor * agent.min_reply_tokens,
    )
