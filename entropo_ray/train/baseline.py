"""The reference point of kto (z0) and bco (delta) through an update.

It is constant within a step, so that accumulation does not change the loss: each step uses what earlier steps showed,
an exponential mean of the whole batch's value over all ranks, started from the round's data before the first step.
Every rank holds the same state, because it is fed with what all ranks measured.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from entropo_ray import config
from entropo_ray.train import objective
from entropo_ray.train.step import Job, rewards_of, weights_of

_DECAY = 0.9


@dataclass(frozen=True)
class Seen:
    """One unit of a step as measured."""

    unit: int
    margin: float
    reward: float = 0.0
    nats: float = 0.0
    z0_exact: float = 0.0
    ratio: float = 0.0  # of the trajectory with another's last reply: log pi - log pi_ref


class Baseline:
    """z0 or delta of the units of one update."""

    def __init__(self, job: Job) -> None:
        assert isinstance(job.cfg, config.Train)
        assert job.start is not None
        self.job, self.cfg, self.units = job, job.cfg, job.units
        self.kind = job.cfg.z0 if job.cfg.loss == "kto" else job.cfg.delta
        keys = [unit.keys[0] for unit in job.units]
        self.tasks = [task for task, _ in keys]
        self.table = rewards_of(job.start, keys, job.cfg, job.length)
        sizes = Counter(self.tasks)
        self.alone = sum(sizes[task] == 1 for task in self.tasks) if self.kind == "group" else 0  # in their task
        self.value = self._first()
        self._place()

    def _first(self) -> float:
        start, keys = self.job.start, [unit.keys[0] for unit in self.units]
        assert start is not None
        if self.kind in ("none", "released"):
            return 0.0
        if self.kind in ("onpolicy", "mean") or (self.kind == "group" and self.cfg.loss == "kto"):
            return float(self.table.mean())
        if self.cfg.loss == "bco":
            return self._solved()
        kl, nats, tokens = (
            torch.tensor([table[key] for key in keys], dtype=torch.float64)
            for table in (start.kl, start.nats, start.tokens)
        )
        return float(objective.z0_exact(kl, nats, tokens=tokens, **weights_of(self.cfg), **self.job.length).mean())

    def _solved(self) -> float:
        """The delta that minimises bco on the start's rewards."""
        delta, offsets = 0.0, self._offsets()
        for _ in range(100):
            delta += self._newton(self.table - offsets - delta, range(len(self.units)))
        return delta

    def _newton(self, above: Tensor, units: Sequence[int]) -> float:
        """A step of delta towards the minimum of bco, from rewards less delta; at most 1 in size."""
        passed = torch.tensor([self.units[unit].desirable for unit in units])
        weight = torch.where(passed, self.cfg.weight_pass, self.cfg.weight_fail).double()
        weight *= torch.tensor([self.units[unit].weight for unit in units], dtype=torch.float64)
        chance = torch.sigmoid(above)
        slope = (weight * (chance - passed.double())).sum()
        bend = (weight * chance * (1 - chance)).sum().clamp(min=1e-9)
        return float((slope / bend).clamp(-1, 1))

    def _offsets(self) -> Tensor:
        """[N] what a unit's own task adds to delta: the mean reward of the others, where the kind asks for it."""
        if self.kind != "group" or self.cfg.loss == "kto":
            return torch.zeros(len(self.units), dtype=torch.float64)
        return objective.z0_group(self.table, self.tasks, float(self.table.mean()))[0]

    def _place(self) -> None:
        """The points of all units, which hold until the next update."""
        if self.kind == "group" and self.cfg.loss == "kto":
            self.points = objective.z0_group(self.table, self.tasks, self.value)[0]
        else:
            self.points = self._offsets() + self.value

    def of(self, units: Sequence[int]) -> Tensor:
        """[U] float64, without gradient."""
        return self.points[list(units)]

    def update(self, seen: Sequence[Seen]) -> None:
        """Take in what a step measured over all ranks."""
        for one in seen:
            self.table[one.unit] = one.reward
        self._move(seen)
        self._place()

    def _move(self, seen: Sequence[Seen]) -> None:
        rewards, nats, ratio = (
            torch.tensor([getattr(one, name) for one in seen], dtype=torch.float64)
            for name in ("reward", "nats", "ratio")
        )
        if self.kind in ("none", "released"):
            return
        if self.cfg.loss == "bco" and self.kind != "mean":
            units = [one.unit for one in seen]
            self.value += (1 - _DECAY) * self._newton(rewards - self._offsets()[units] - self.value, units)
            return
        if self.kind == "exact":
            found = sum(one.z0_exact for one in seen) / len(seen)
        elif self.kind == "kto":
            if len(seen) < 2:  # the short last step of an epoch: nothing was exchanged
                return
            found = float(objective.z0_mismatched(ratio, nats, beta=self.cfg.beta, entropy=self.cfg.entropy))
        else:
            found = float(rewards.mean())
        self.value = _DECAY * self.value + (1 - _DECAY) * found

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: the value, and the rewards by unit that group means are made of."""
        return {"value": self.value, "table": self.table.tolist()}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a `state`."""
        self.value, self.table = state["value"], torch.tensor(state["table"], dtype=torch.float64)
        self._place()
