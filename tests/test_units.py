"""What an update learns from: staleness, health before the first step, and reference points through an update."""

import logging
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from entropo_ray import config, store
from entropo_ray.records import Example, Label, Measure, Pair, Reference, Trajectory
from entropo_ray.train import objective, rows
from entropo_ray.train.baseline import Baseline, Seen
from entropo_ray.train.rows import Size
from entropo_ray.train.step import Job, Start
from entropo_ray.train.units import (
    correlation,
    entropy_of,
    fresh,
    health,
    length_of,
    lost_share,
    mismatch,
    start_of,
    swap,
    unit,
    units_of,
)

KEYS = [("a", 0), ("a", 1), ("a", 2), ("b", 0)]
FOUND = {key: Size(tokens=40, actions=n) for key, n in zip(KEYS, (10, 20, 30, 40), strict=True)}


def start(logp=(-5.0, -8.0, -9.0, -12.0), ref=None, nats=(4.0, 6.0, 8.0, 10.0), kl=(0.0, 0.0, 0.0, 0.0)):
    tables = [dict(zip(KEYS, values, strict=True)) for values in (logp, ref or logp, nats, kl)]
    return Start(*tables, {key: FOUND[key].actions for key in KEYS}, tables[2])


def pairs(*places):
    return [unit([KEYS[a], KEYS[b]], FOUND) for a, b in places]


def labels(*desirable):
    return [unit([key], FOUND, desirable=ok) for key, ok in zip(KEYS, desirable, strict=False)]


def test_units_carry_the_weights_of_their_preferences(tmp_path):
    out = store.round_of(tmp_path, 0)
    store.write(out.preferences, Pair, [Pair(task_id="a", chosen=0, rejected=2, weight=1.5)])
    (one,) = units_of(out, config.Train(), FOUND)
    assert (one.keys, one.weight, one.actions, one.shortest) == ((("a", 0), ("a", 2)), 1.5, 40, 10)


def test_rejection_sampling_keeps_what_passed(tmp_path):
    out = store.round_of(tmp_path, 0)
    store.write(out.preferences, Label, [Label(task_id="a", sample=n, desirable=n == 1) for n in range(3)])
    assert [one.keys for one in units_of(out, config.Train(loss="sft"), FOUND)] == [(("a", 1),)]
    assert len(units_of(out, config.Train(loss="kto"), FOUND)) == 3


def test_drift_is_per_action_token_and_drops_only_what_moved():
    behaviour = dict(zip(KEYS, (-5.0, -8.0, -3.0, -12.0), strict=True))  # 6 nats over 30 tokens: .2
    units = pairs((0, 1), (0, 2))
    kept, numbers = fresh(units, start(), behaviour, config.Train(stale="drop", drift=0.1))
    assert kept == units[:1]
    assert numbers["stale_dropped"] == 1
    assert numbers["drift_max"] == pytest.approx(0.2)
    assert fresh(units, start(), behaviour, config.Train())[0] == units  # kept, and measured


def test_stale_pairs_weigh_less_and_fresh_ones_no_more_than_before():
    behaviour = dict(zip(KEYS, (-5.0, -8.0, -3.0, -99.0), strict=True))
    units = [*pairs((0, 1), (0, 2)), unit([KEYS[3]], FOUND)]
    weighed, numbers = fresh(units, start(), behaviour, config.Train(stale="weigh"))
    assert [one.weight for one in weighed] == pytest.approx([1.0, math.exp(-0.2), 1.0])
    assert numbers["ess"] == pytest.approx(objective.effective_size(torch.tensor([1, math.exp(-0.2), 1])) / 3)


def test_an_update_on_what_is_nearly_all_stale_is_refused():
    behaviour = dict.fromkeys(KEYS, 500.0)
    with pytest.raises(ValueError, match=r"train.stale=drop: 0.0 of 1 units.*train.ess_min=0.3"):
        fresh(pairs((0, 1)), start(), behaviour, config.Train(stale="drop"))


def test_saturated_pairs_are_warned_about_by_their_knob(caplog):
    logp = (-5.0, -500.0, -400.0, -12.0)
    with caplog.at_level(logging.WARNING, logger="entropo_ray"):
        numbers = health(pairs((0, 1), (0, 2)), start(logp), config.Train(entropy=0.05, length="raw"), {})
    assert numbers["useful_start"] == 0
    assert "train.entropy=0.05" in caplog.text
    assert "train.length=debias" in caplog.text
    caplog.clear()
    health(pairs((0, 1), (0, 2)), start(logp), config.Train(entropy=0.0), {})
    assert caplog.text == ""


def test_the_margin_of_a_pure_length_effect_correlates_with_length():
    lengths = start(logp=tuple(-0.25 * FOUND[key].actions for key in KEYS))
    units = pairs((0, 1), (2, 0), (1, 2))
    cfg = config.Train(entropy=0.05, length="raw")
    assert health(units, lengths, cfg, {})["margin_length_corr"] == pytest.approx(-1.0)
    assert health(units, lengths, cfg, {"hbar": 0.25})["margin_length_corr"] == 0.0
    assert correlation(torch.ones(3), torch.arange(3.0)) == 0.0


def test_length_options_come_from_the_round():
    assert length_of(config.Train(length="raw"), start()) == {}
    assert length_of(config.Train(length="debias"), start()) == {"hbar": 28 / 100}
    assert length_of(config.Train(length="mean"), start()) == {"scale": 25.0}
    assert length_of(config.Train(length="mean", length_tokens=1.0), start()) == {"scale": 1.0}
    assert entropy_of(start()) == 0.28


def test_lost_action_tokens_are_a_share_of_all():
    cut = {("a", 0): Size(tokens=9, actions=6, lost=4), ("a", 1): Size(tokens=9, actions=10)}
    assert lost_share(list(cut), cut) == 0.2


def test_swapped_answers_come_from_other_trajectories_and_once(tmp_path):
    out = store.round_of(tmp_path, 0)
    mask = (False, True, False, True)
    rows = [
        Example(task_id=t, sample=s, token_ids=(9, n, 9, 100 + n), action_mask=mask) for n, (t, s) in enumerate(KEYS)
    ]
    store.write(out.trajectories, Example, rows)
    sizes = swap(out, labels(True, False, True, False), seed=0, cut=None)
    assert sizes.keys() == set(KEYS)
    told = {(row.task_id, row.sample): row.token_ids for row in store.read(out.swapped, Example)}
    for n, key in enumerate(KEYS):
        assert told[key][:3] == (9, n, 9)
        assert told[key][3] != 100 + n
        other = KEYS[told[key][3] - 100]
        assert other[0] != key[0]
    alone = [unit([key], FOUND) for key in KEYS[:3]]
    with pytest.raises(ValueError, match=r"trajectories of two tasks; give train\.z0=onpolicy"):
        swap(store.round_of(tmp_path / "other", 0), alone, seed=0, cut=None)


def test_swapped_answers_are_made_again_where_trajectories_are_newer(tmp_path):
    out = store.round_of(tmp_path, 0)
    for first in (0, 50):
        rows = [
            Example(task_id=t, sample=s, token_ids=(9, first), action_mask=(False, True)) for t, s in KEYS
        ]  # fmt: skip
        if first:
            shutil.rmtree(out.trajectories)
        store.write(out.trajectories, Example, rows)
        swap(out, labels(True, False, True, False), seed=0, cut=None)
        assert {row.token_ids for row in store.read(out.swapped, Example)} == {(9, first)}


# --- reference points ------------------------------------------------------------------------------------------------


def baseline(*desirable, begin=None, **train):
    cfg = config.Train(**{"loss": "kto", "beta": 0.1, "entropy": 0.05, "length": "raw"} | train)
    units = tuple(labels(*desirable))
    return Baseline(Job("label", None, None, units, cfg, 0, None, start=begin or start()))


ALL = (True, False, True, False)


def seen(rewards, **more):
    return [Seen(unit=n, margin=0.0, reward=reward, **more) for n, reward in enumerate(rewards)]


def test_z0_starts_from_the_round_s_data():
    mean_reward = 0.05 * -34 / 4
    assert baseline(*ALL, z0="onpolicy").value == pytest.approx(mean_reward)
    exact = baseline(*ALL, z0="exact", begin=start(kl=(1.0, 1.0, 2.0, 4.0)))
    assert exact.value == pytest.approx(0.1 * 2 - 0.05 * 7)
    assert exact.value < 0
    assert baseline(*ALL, z0="none").value == 0.0


def test_z0_is_constant_within_a_step_and_moves_by_a_tenth_after_it():
    one = baseline(*ALL, z0="onpolicy")
    before = one.value
    assert one.of([0, 3]).tolist() == [before, before]
    one.update(seen([1.0, 2.0, 3.0, 4.0]))
    assert one.value == pytest.approx(0.9 * before + 0.1 * 2.5)
    exact = baseline(*ALL, z0="exact")
    before = exact.value
    exact.update(seen([0.0] * 4, z0_exact=-3.0))
    assert exact.value == pytest.approx(0.9 * before - 0.3)


def test_group_z0_leaves_an_example_s_own_reward_out_and_counts_who_is_alone():
    one = baseline(*ALL, z0="group")
    one.update(seen([1.0, 2.0, 3.0, 10.0]))
    assert one.of([0, 1, 2]).tolist() == [2.5, 2.0, 1.5]
    assert float(one.of([3])) == one.value  # b has one trajectory
    assert one.alone == 1


def test_mismatched_z0_clamps_only_its_kl_and_skips_a_batch_of_one():
    one = baseline(*ALL, z0="kto")
    before = one.value
    one.update(seen([0.0] * 2, nats=100.0, ratio=-7.0))
    assert one.value == pytest.approx(0.9 * before + 0.1 * (0.0 - 5.0))
    after = one.value
    one.update(seen([0.0], nats=100.0, ratio=50.0))
    assert one.value == after


def test_delta_starts_at_the_minimum_of_the_loss_and_follows_it():
    one = baseline(*ALL, loss="bco")
    rewards = one.table

    def slope(delta):
        at = torch.tensor(delta, dtype=torch.float64, requires_grad=True)
        desirable = torch.tensor(ALL)
        loss = objective.bco(rewards / 0.05, rewards / 0.05, desirable, at, beta=0.1, entropy=0.05)
        return float(torch.autograd.grad(loss.values.sum(), at)[0])

    assert slope(one.value) == pytest.approx(0.0, abs=1e-9)
    balanced = [replace(one, weight=2.0 if one.desirable else 2 / 3) for one in labels(True, False, False, False)]
    flat = Start(*[dict.fromkeys(KEYS, 0.0)] * 4, dict.fromkeys(KEYS, 1.0), dict.fromkeys(KEYS, 0.0))
    asked = Job("label", None, None, tuple(balanced), config.Train(loss="bco", length="raw"), 0, None, start=flat)
    assert Baseline(asked).value == pytest.approx(0.0, abs=1e-9)  # both sides weigh the same
    rewards = rewards + 2.0
    for _ in range(200):
        one.update(seen(rewards.tolist()))
    assert slope(one.value) == pytest.approx(0.0, abs=1e-6)


def test_a_mean_delta_is_the_running_mean_reward_and_a_group_delta_adds_the_task():
    mean = baseline(*ALL, loss="bco", delta="mean")
    assert mean.value == pytest.approx(float(mean.table.mean()))
    group = baseline(*ALL, loss="bco", delta="group")
    others = objective.z0_group(group.table, ["a", "a", "a", "b"], float(group.table.mean()))[0]
    assert torch.allclose(group.of([0, 1, 2, 3]), others + group.value)


def test_a_reference_point_survives_a_checkpoint():
    one, other = baseline(*ALL, z0="group"), baseline(*ALL, z0="group")
    one.update(seen([1.0, 2.0, 3.0, 10.0]))
    other.restore(one.state())
    assert other.of([0, 1, 2, 3]).tolist() == one.of([0, 1, 2, 3]).tolist()
    assert other.value == one.value


# --- columns by key --------------------------------------------------------------------------------------------------


def played(mask, logp):
    return Trajectory(
        task_id="a", sample=0, round=0, seed=0, kind="model", scaffold="", prompt="", temperature=1.0, turns=(),
        token_ids=tuple(range(len(mask))), action_mask=tuple(map(bool, mask)), behaviour_logp=logp, num_turns=2,
        num_actions=sum(mask), num_tokens=len(mask), patch="", patch_class="", files=(), stop="agent", reason="",
        wall_s=0.0, grade=None, verdict=None,
    )  # fmt: skip


def test_engines_and_trainer_are_held_against_each_other_by_token(tmp_path):
    out = store.round_of(tmp_path, 0)
    rows_ = [
        replace(played((0, 1, 1, 0, 1), (0.0, -1.0, -2.0, 0.0, -3.0)), sample=n, kind=kind, round=round)
        for n, (kind, round) in enumerate([("model", 2), ("scripted", 2), ("model", 1)])
    ]
    store.write(out.trajectories, Trajectory, rows_)
    drawn = rows.drawn(out.trajectories, [("a", n) for n in range(3)], 2)
    assert {key: values.tolist() for key, values in drawn.items()} == {("a", 0): [-1.0, -2.0, -3.0]}
    cut = rows.drawn(out.trajectories, [("a", 0)], 2, cut=3)
    assert cut["a", 0].tolist() == [-1.0, -2.0]

    scored = {("a", 0): np.array([-1.5, -2.0, -2.9])}
    found = mismatch(drawn, scored, 0.25)
    assert found["mismatch"] == pytest.approx(0.2)
    assert found["mismatch_max"] == pytest.approx(0.5)
    assert found["mismatch_p99"] == pytest.approx(0.492)
    with pytest.raises(ValueError, match=r"differ by 0\.2 nats.*mismatch_max=0\.1.*'a', 0"):
        mismatch(drawn, scored, 0.1)
    assert mismatch(drawn, scored, 0.0) == found
    assert mismatch({}, {}, 0.1) == {}


def test_the_start_weighs_turns_as_the_update_will(tmp_path):
    out, key = store.round_of(tmp_path, 0), ("a", 0)
    store.write(out.trajectories, Trajectory, [played((0, 1, 1, 0, 1), (0.0,) * 5)])
    scored = Reference(task_id="a", sample=0, ref_logp=(-1.0, -2.0, -4.0), ref_entropy=(0.5, 0.5, 2.0))
    store.write(out.reference, Reference, [scored])
    plain = start_of(out, [key], moved=False)
    assert (plain.logp[key], plain.tokens[key], plain.kl[key]) == (-7.0, 3, 0.0)
    last = start_of(out, [key], moved=False, turns=config.Train(turns="last"))
    assert (last.logp[key], last.nats[key], last.tokens[key]) == (-4.0, 2.0, 1)
    early = start_of(out, [key], moved=False, turns=config.Train(turns="dmpo", gamma=1.0))
    assert (early.logp[key], early.tokens[key]) == (-3.0 - 0.5 * 4.0, 2.5)

    measured = Measure(task_id="a", sample=0, logp=(-2.0, -2.0, -2.0), entropy=(1.0,) * 3, kl=(0.5, 0.0, 0.25))
    store.write(out.current, Measure, [measured])
    moved = start_of(out, [key], moved=True)
    assert (moved.logp[key], moved.ref_logp[key], moved.kl[key], moved.nats[key]) == (-6.0, -7.0, 0.75, 3.0)
    assert moved.ref_nats[key] == 3.0


def test_rows_are_read_by_behaviour_up_to_the_cut(tmp_path):
    from entropo_ray.train import rows

    store.write(tmp_path / "p", Trajectory, [played((0, 1, 0, 1), (0.0, -1.0, 0.0, -2.0))])
    assert rows.behaviour(tmp_path / "p", [("a", 0)]) == {("a", 0): -3.0}
    assert rows.behaviour(tmp_path / "p", [("a", 0)], 3) == {("a", 0): -1.0}
    assert rows.sizes(tmp_path / "p", 3) == {("a", 0): Size(tokens=3, actions=1, lost=1)}
    found = rows.read(tmp_path / "p", [("a", 0)])["a", 0]
    assert np.array_equal(found.head(3).action_mask, [False, True, False])
