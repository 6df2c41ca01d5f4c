import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from entropo_ray.train.batch import Row, pack
from entropo_ray.train.plan import Layout, endless, plan


def test_a_pack_is_its_rows_end_to_end():
    mask = np.array([False, False, True, False, True])
    rows = [
        Row(("a", 0), np.arange(5, dtype=np.int32), mask),
        Row(("b", 3), np.arange(7, 10, dtype=np.int32), mask[:3]),
    ]
    packed = pack(rows)
    assert packed.keys == (("a", 0), ("b", 3))
    assert packed.input_ids.tolist() == [[0, 1, 2, 3, 4, 7, 8, 9]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2]]
    assert (packed.lengths, packed.actions) == ((5, 3), (2, 1))
    assert packed.predictors.tolist() == [1, 3, 6]
    assert packed.targets.tolist() == [2, 4, 9]


def test_a_first_token_that_nothing_predicts_is_refused_with_its_key():
    with pytest.raises(ValueError, match="'a', 4"):
        pack([Row(("a", 4), np.arange(2, dtype=np.int32), np.array([True, True]))])


def steps(costs, *, ranks=2, batch=8, micro_batch=2, seed=0, epoch=0):
    return plan(Layout(costs, ranks, batch, micro_batch), seed=seed, round=0, epoch=epoch)


def slots(step):
    return [slot for micro in step for packed in micro for slot in packed]


def test_every_unit_counts_once_an_epoch_and_steps_do_not_depend_on_ranks():
    costs = [float(1 + (7 * n) % 13) for n in range(21)]
    shapes = [(1, 1), (1, 8), (2, 1), (2, 4), (4, 2), (8, 1)]
    plans = [steps(costs, ranks=ranks, micro_batch=micro) for ranks, micro in shapes]
    for (ranks, micro_batch), made in zip(shapes, plans, strict=True):
        assert sorted(slot.unit for step in made for slot in slots(step) if slot.weight) == list(range(21))
        for step in made:
            assert len(step) == 8 // (ranks * micro_batch)
            assert all(len(micro) == ranks and all(len(packed) == micro_batch for packed in micro) for micro in step)
    counted = [[{s.unit for s in slots(step) if s.weight} for step in made] for made in plans]
    assert all(made == counted[0] for made in counted)


def test_a_short_step_is_filled_with_repeats_that_count_for_nothing():
    (last,) = steps([3.0, 1.0, 2.0])
    assert len(slots(last)) == 8
    assert sorted(slot.unit for slot in slots(last) if slot.weight) == [0, 1, 2]
    assert {slot.unit for slot in slots(last) if not slot.weight} == {1}  # the cheapest


def test_the_plan_is_drawn_by_seed_and_epoch():
    costs = [1.0] * 40
    assert steps(costs) == steps(costs)
    assert steps(costs) != steps(costs, epoch=1)
    assert steps(costs) != steps(costs, seed=1)


def test_ranks_that_wait_for_each_other_get_packs_of_like_cost():
    rng = np.random.default_rng(0)
    costs = np.exp(rng.normal(0, 0.5, 640)).tolist()
    ratios = [
        max(sums) / (sum(sums) / len(sums))
        for step in steps(costs, ranks=8, batch=64, micro_batch=1)
        for micro in step
        for sums in [[sum(costs[slot.unit] for slot in packed) for packed in micro]]
    ]
    assert sum(ratios) / len(ratios) < 1.3  # a random order waits about 1.8 times the mean here


def test_the_numerical_half_of_the_room_needs_torch_alone():
    code = (
        "import sys\n"
        "from entropo_ray.train import attention, batch, logprob, objective, plan\n"
        "print(sorted({'ray', 'deepspeed', 'pyarrow', 'omegaconf'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"


def test_a_fixed_number_of_steps_is_always_whole_and_takes_every_unit_as_often():
    costs = [1.0] * 6
    found = endless(Layout(costs, 2, 4, 2), 5, seed=0, round=0)
    assert len(found) == 5
    assert all(slot.weight == 1.0 for step in found for slot in slots(step))
    counts = Counter(slot.unit for step in found for slot in slots(step))
    assert sorted(counts.values()) == [3, 3, 3, 3, 4, 4]


def test_packs_by_tokens_hold_no_more_than_asked_and_every_unit_once():
    rng = np.random.default_rng(0)
    sizes = np.exp(rng.normal(8, 0.7, 61)).astype(int).tolist()
    room = int(np.quantile(sizes, 0.95))  # a few units are longer than a pack
    costs = [float(size + size**2 / 4e3) for size in sizes]
    for ranks in (1, 2, 4):
        made = plan(Layout(costs, ranks, 16, 1, pack_tokens=room, sizes=sizes), seed=0, round=0, epoch=0)
        assert [sorted(s.unit for s in slots(step) if s.weight) for step in made] == [
            sorted(s.unit for s in slots(step) if s.weight) for step in steps(costs, ranks=1, batch=16, micro_batch=1)
        ]
        for step in made:
            packs = [packed for micro in step for packed in micro]
            assert all(len(micro) == ranks for micro in step)
            assert all(packs)
            assert all(len(packed) == 1 or sum(sizes[s.unit] for s in packed) <= room for packed in packs)
            used = sum(min(room, sizes[s.unit]) for s in slots(step) if s.weight)
            assert len(step) <= np.ceil(1.35 * used / (room * ranks)) + 1


def test_packs_by_tokens_make_fewer_and_fuller_passes_than_packs_by_count():
    rng = np.random.default_rng(1)
    sizes = np.exp(rng.normal(8, 0.7, 64)).astype(int).tolist()
    costs = [float(size) for size in sizes]
    by_count = plan(Layout(costs, 2, 64, 4), seed=0, round=0, epoch=0)
    room = max(sum(sizes[s.unit] for s in packed) for micro in by_count[0] for packed in micro)  # the same memory
    by_tokens = plan(Layout(costs, 2, 64, 4, pack_tokens=room, sizes=sizes), seed=0, round=0, epoch=0)
    assert len(by_tokens[0]) < len(by_count[0])


def test_a_rank_without_a_unit_repeats_one_that_counts_for_nothing():
    (step,) = plan(Layout([5.0], 2, 8, 1, pack_tokens=10, sizes=[3]), seed=0, round=0, epoch=0)
    assert sorted(slot.weight for slot in slots(step)) == [0.0, 1.0]
