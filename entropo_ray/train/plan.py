"""Which rank trains on what, and when: pure, the same on every rank."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Slot:
    """A place of a pack."""

    unit: int  # index into the list of units
    weight: float  # 0.0: a repeat that fills a short step


Step = list[list[tuple[Slot, ...]]]  # [micro-step][rank], each a pack of `micro_batch` slots


def plan(
    costs: Sequence[float], *, ranks: int, batch: int, micro_batch: int, seed: int, round: int, epoch: int
) -> list[Step]:
    """One epoch. The units of a step depend on (seed, round, epoch, batch) alone; cost only spreads them over ranks.

    A short last step is filled with repeats of weight 0, so that every rank runs every collective.
    """
    assert batch % (ranks * micro_batch) == 0, f"batch {batch} is not a multiple of {ranks} x {micro_batch}"
    order = list(range(len(costs)))
    random.Random(f"{seed}/{round}/{epoch}").shuffle(order)
    return [
        _step(order[start : start + batch], costs, ranks=ranks, batch=batch, micro_batch=micro_batch)
        for start in range(0, len(order), batch)
    ]


def endless(
    costs: Sequence[float], steps: int, *, ranks: int, batch: int, micro_batch: int, seed: int, round: int
) -> list[Step]:
    """`steps` whole steps, epoch behind epoch: however little data there is, every step has `batch` units."""
    assert batch % (ranks * micro_batch) == 0, f"batch {batch} is not a multiple of {ranks} x {micro_batch}"
    order: list[int] = []
    for epoch in itertools.count():
        if len(order) >= steps * batch:
            break
        more = list(range(len(costs)))
        random.Random(f"{seed}/{round}/{epoch}").shuffle(more)
        order += more
    starts = range(0, steps * batch, batch)
    return [_step(order[s : s + batch], costs, ranks=ranks, batch=batch, micro_batch=micro_batch) for s in starts]


def _step(units: list[int], costs: Sequence[float], *, ranks: int, batch: int, micro_batch: int) -> Step:
    cheapest = min(units, key=lambda unit: (costs[unit], unit))
    slots = [Slot(unit, 1.0) for unit in units] + [Slot(cheapest, 0.0)] * (batch - len(units))
    slots.sort(key=lambda slot: (-costs[slot.unit], slot.unit, -slot.weight))
    packs = _snake(slots, batch // micro_batch)
    packs.sort(key=lambda pack: -sum(costs[slot.unit] for slot in pack))
    # neighbours cost about the same, and ranks wait for each other after every micro-step
    rows = [packs[start : start + ranks] for start in range(0, len(packs), ranks)]
    return [row if number % 2 == 0 else row[::-1] for number, row in enumerate(rows)]


def _snake(slots: list[Slot], count: int) -> list[tuple[Slot, ...]]:
    """`count` packs of equal size, the longest units joined with the cheapest."""
    packs: list[list[Slot]] = [[] for _ in range(count)]
    for number, start in enumerate(range(0, len(slots), count)):
        layer = slots[start : start + count]
        for pack, slot in zip(packs, layer if number % 2 == 0 else layer[::-1], strict=True):
            pack.append(slot)
    return [tuple(pack) for pack in packs]
