"""Which rank trains on what, and when: pure, the same on every rank."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Slot:
    """A place of a pack."""

    unit: int  # index into the list of units
    weight: float  # 0.0: a repeat that fills a short step


Packed = tuple[Slot, ...]
Step = list[list[Packed]]  # [micro-step][rank]; steps may differ in their number of micro-steps


@dataclass(frozen=True)
class Layout:
    """How the units of a step are spread. Which units are in it does not depend on this, apart from `batch`."""

    costs: Sequence[float]  # of each unit
    ranks: int
    batch: int  # units a step
    micro_batch: int  # units a pack, where `pack_tokens` is 0
    pack_tokens: int = 0  # tokens a pack holds at most; a unit that is longer is a pack of its own
    sizes: Sequence[int] = ()  # tokens of each unit, where there are pack_tokens


def plan(layout: Layout, *, seed: int, round: int, epoch: int) -> list[Step]:
    """One epoch. The units of a step depend on (seed, round, epoch, batch) alone; cost only spreads them over ranks.

    What a step lacks is filled with repeats of weight 0, so that every rank runs every collective.
    """
    order = list(range(len(layout.costs)))
    random.Random(f"{seed}/{round}/{epoch}").shuffle(order)
    return [_step(order[start : start + layout.batch], layout) for start in range(0, len(order), layout.batch)]


def endless(layout: Layout, steps: int, *, seed: int, round: int) -> list[Step]:
    """`steps` whole steps, epoch behind epoch: however little data there is, every step has `batch` units."""
    order: list[int] = []
    for epoch in itertools.count():
        if len(order) >= steps * layout.batch:
            break
        more = list(range(len(layout.costs)))
        random.Random(f"{seed}/{round}/{epoch}").shuffle(more)
        order += more
    return [_step(order[s : s + layout.batch], layout) for s in range(0, steps * layout.batch, layout.batch)]


def _step(units: list[int], layout: Layout) -> Step:
    costs, ranks = layout.costs, layout.ranks
    packs = _by_tokens(units, layout) if layout.pack_tokens else _by_count(units, layout)
    packs.sort(key=lambda pack: -sum(costs[slot.unit] for slot in pack))
    # neighbours cost about the same, and ranks wait for each other after every micro-step
    rows = [packs[start : start + ranks] for start in range(0, len(packs), ranks)]
    return [row if number % 2 == 0 else row[::-1] for number, row in enumerate(rows)]


def _by_count(units: list[int], layout: Layout) -> list[Packed]:
    """Packs of `micro_batch` slots each."""
    costs, batch, micro_batch = layout.costs, layout.batch, layout.micro_batch
    assert batch % (layout.ranks * micro_batch) == 0, (
        f"batch {batch} is not a multiple of {layout.ranks} x {micro_batch}"
    )
    slots = [Slot(unit, 1.0) for unit in units] + [_repeat(units, costs)] * (batch - len(units))
    slots.sort(key=lambda slot: (-costs[slot.unit], slot.unit, -slot.weight))
    return _snake(slots, batch // micro_batch)


def _by_tokens(units: list[int], layout: Layout) -> list[Packed]:
    """As few packs of at most `pack_tokens` as fill all ranks evenly, of costs as equal as they can be."""
    sizes, room, ranks = layout.sizes, layout.pack_tokens, layout.ranks
    rounds = max(1, math.ceil(sum(min(sizes[unit], room) for unit in units) / (room * ranks)))
    while (packs := _spread(units, rounds * ranks, layout)) is None:
        rounds += 1
    return [tuple(Slot(unit, 1.0) for unit in pack) or (_repeat(units, layout.costs),) for pack in packs]


def _spread(units: list[int], count: int, layout: Layout) -> list[list[int]] | None:
    """The costliest units first, each to the pack with room that has cost least so far; None where one has none."""
    packs: list[list[int]] = [[] for _ in range(count)]
    cost, used = [0.0] * count, [0] * count
    for unit in sorted(units, key=lambda unit: (-layout.costs[unit], unit)):
        fits = [n for n in range(count) if not packs[n] or used[n] + layout.sizes[unit] <= layout.pack_tokens]
        if not fits:
            return None
        n = min(fits, key=lambda n: (cost[n], n))
        packs[n].append(unit)
        cost[n] += layout.costs[unit]
        used[n] += layout.sizes[unit]
    return packs


def _repeat(units: list[int], costs: Sequence[float]) -> Slot:
    return Slot(min(units, key=lambda unit: (costs[unit], unit)), 0.0)


def _snake(slots: list[Slot], count: int) -> list[Packed]:
    """`count` packs of equal size, the longest units joined with the cheapest."""
    packs: list[list[Slot]] = [[] for _ in range(count)]
    for number, start in enumerate(range(0, len(slots), count)):
        layer = slots[start : start + count]
        for pack, slot in zip(packs, layer if number % 2 == 0 else layer[::-1], strict=True):
            pack.append(slot)
    return [tuple(pack) for pack in packs]
