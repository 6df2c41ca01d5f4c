"""preference: which trajectories teach, and how pairs are drawn."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from entropo_ray import config, preference
from entropo_ray.records import Grade, Outcome, Stop, Verdict

CFG = config.Preference()


def outcome(
    sample, grade, *, task="t", stop=Stop.AGENT, prompt="p", kind="model", actions=9, tokens=20, patch="", verdict=None
):
    return Outcome(
        task_id=task, sample=sample, kind=kind, prompt=prompt, num_turns=3, num_actions=actions, num_tokens=tokens,
        patch_class=patch, stop=stop, grade=grade, verdict=verdict,
    )  # fmt: skip


def round_of(resolved, unresolved, task="t"):
    grades = [Grade.RESOLVED] * resolved + [Grade.UNRESOLVED] * unresolved
    return [outcome(i, grade, task=task) for i, grade in enumerate(grades)]


def drawn(outcomes, most=8, seed=0):
    return preference.pairs(outcomes, config.Preference(pairs_per_task=most), seed=seed)


def test_only_tasks_with_both_sides_teach():
    outcomes = [*round_of(2, 0, "all"), *round_of(0, 2, "none"), *round_of(1, 1, "both")]
    assert [(p.task_id, p.chosen, p.rejected) for p in drawn(outcomes)] == [("both", 0, 1)]
    assert preference.counts(outcomes, CFG)["tasks"] == 3
    assert preference.counts(outcomes, CFG)["tasks_both"] == 1


@given(st.integers(1, 7), st.integers(1, 7), st.integers(1, 60), st.integers(0, 3))
def test_pairs_are_distinct_go_the_right_way_and_use_each_side_evenly(resolved, unresolved, most, seed):
    pairs = drawn(round_of(resolved, unresolved), most, seed)
    assert len(pairs) == min(most, resolved * unresolved)
    assert len({(p.chosen, p.rejected) for p in pairs}) == len(pairs)
    assert all(p.chosen < resolved <= p.rejected for p in pairs)
    for used, size in ((Counter(p.chosen for p in pairs), resolved), (Counter(p.rejected for p in pairs), unresolved)):
        assert max(used.values()) - min(used.values() if len(used) == size else [0]) <= 1


def test_a_task_s_pairs_depend_on_that_task_alone():
    task = round_of(3, 4)
    assert drawn(task, 5) == drawn(task[::-1], 5)
    assert drawn(task, 5) == [p for p in drawn([*round_of(2, 2, "a"), *task], 5) if p.task_id == "t"]


def test_another_seed_draws_other_pairs():
    assert len({tuple(drawn(round_of(6, 6), 4, seed)) for seed in range(5)}) > 1


@pytest.mark.parametrize(
    ("grade", "stop", "reason"),
    [
        (Grade.TAMPERED, Stop.AGENT, "tampered"),
        (Grade.TIMEOUT, Stop.AGENT, "timeout"),
        (Grade.PATCH_FAILED, Stop.AGENT, "patch_failed"),
        (Grade.FLAKY, Stop.AGENT, "flaky"),
        (None, Stop.AGENT, "ungraded"),
        (None, Stop.INFRA_ERROR, "ungraded"),
        (Grade.RESOLVED, Stop.TOKEN, "unfinished"),
        (Grade.EMPTY, Stop.ABS_STEP, "unfinished"),
    ],
)
def test_what_no_test_answered_is_neither_chosen_nor_rejected(grade, stop, reason):
    outcomes = [*round_of(1, 1), outcome(2, grade, stop=stop)]
    assert {(p.chosen, p.rejected) for p in drawn(outcomes)} == {(0, 1)}
    assert {label.sample for label in preference.labels(outcomes, CFG)} == {0, 1}
    numbers = preference.counts(outcomes, CFG)
    assert {k: v for k, v in numbers.items() if k.endswith("_dropped") and v} == {f"{reason}_dropped": 1}
    assert numbers["teaching"] == 2


def test_an_empty_patch_after_finish_is_a_wrong_answer():
    assert [(p.chosen, p.rejected) for p in drawn([outcome(0, Grade.RESOLVED), outcome(1, Grade.EMPTY)])] == [(0, 1)]


def test_unfinished_episodes_teach_where_the_configuration_says_so():
    outcomes = [outcome(0, Grade.RESOLVED), outcome(1, Grade.UNRESOLVED, stop=Stop.TOKEN)]
    assert len(preference.pairs(outcomes, config.Preference(finished_only=False), seed=0)) == 1


def test_a_pair_of_two_prompts_is_refused_by_name():
    outcomes = [outcome(0, Grade.RESOLVED), outcome(7, Grade.UNRESOLVED, prompt="other")]
    with pytest.raises(ValueError, match="task t: sample 7 began with another prompt than sample 0"):
        drawn(outcomes)


def test_a_round_without_a_pair_says_its_yield():
    outcomes = [*round_of(2, 0, "a"), outcome(0, None, task="b"), outcome(1, Grade.RESOLVED, task="b")]
    with pytest.raises(ValueError, match=r"0 of 2 tasks had both sides \(of 4 .* 3 teach; dropped: 1 ungraded"):
        drawn(outcomes)
    with pytest.raises(ValueError, match=r"0 of 2 tasks .* all 3 labels are alike"):
        preference.labels(outcomes, CFG)


def test_labels_keep_tasks_with_one_side():
    found = preference.labels([*round_of(0, 1, "b"), *round_of(1, 1, "a")], CFG)
    assert [(label.task_id, label.sample, label.desirable) for label in found] == [
        ("a", 0, True),
        ("a", 1, False),
        ("b", 0, False),
    ]


def verdict(passed, failed):
    tests = tuple(f"t{n}" for n in range(passed + failed))
    return Verdict(
        grade=Grade.UNRESOLVED, passed=tests[:passed], failed=tests[passed:], dropped=(), exit_code=1, runs=1,
        seconds=1.0, reason="",
    )  # fmt: skip


def paired(outcomes, seed=0, **cfg):
    return preference.pairs(outcomes, config.Preference(**cfg), seed=seed)


def test_all_pairs_are_every_combination_and_one_is_a_single_draw():
    outcomes = round_of(3, 4)
    assert {(p.chosen, p.rejected) for p in paired(outcomes, pairing="all")} == {
        (c, r) for c in range(3) for r in range(3, 7)
    }
    assert len(paired(outcomes, pairing="one")) == 1


def test_best_against_worst_is_the_shortest_success_against_the_failure_that_broke_most():
    outcomes = [
        outcome(0, Grade.RESOLVED, actions=30),
        outcome(1, Grade.RESOLVED, actions=12),
        outcome(2, Grade.UNRESOLVED, verdict=verdict(3, 1)),
        outcome(3, Grade.UNRESOLVED, verdict=verdict(1, 3)),
        outcome(4, Grade.EMPTY),
    ]
    assert [(p.chosen, p.rejected) for p in paired(outcomes[:4], pairing="best_worst")] == [(1, 3)]
    assert [(p.chosen, p.rejected) for p in paired(outcomes, pairing="best_worst")] == [(1, 4)]  # nothing was run


def test_divpo_takes_the_rarest_solution_against_the_commonest_mistake():
    patches = ["x", "x", "y", "a", "b", "b", "b"]
    outcomes = [
        outcome(n, Grade.RESOLVED if n < 3 else Grade.UNRESOLVED, patch=patch) for n, patch in enumerate(patches)
    ]
    for seed in range(5):
        (pair,) = paired(outcomes, seed, pairing="rare", pairs_per_task=1)
        assert pair.chosen == 2
        assert patches[pair.rejected] == "b"
    assert len({paired(outcomes, s, pairing="rare", pairs_per_task=1)[0].rejected for s in range(12)}) > 1


def test_a_teacher_s_attempt_is_never_paired_with_a_policy_s():
    mixed = [
        outcome(0, Grade.RESOLVED, kind="scripted"),
        outcome(1, Grade.UNRESOLVED, kind="scripted"),
        outcome(2, Grade.RESOLVED),
        outcome(3, Grade.UNRESOLVED),
    ]
    assert {(p.chosen, p.rejected) for p in paired(mixed, pairing="all")} == {(0, 1), (2, 3)}
    with pytest.raises(ValueError, match="had both sides"):
        paired([mixed[0], mixed[3]], pairing="all")


def test_pass_k_weight_is_the_golden_number_and_falls_to_zero_for_solved_tasks():
    assert preference.pass_k_weight(16, 4, 4) == pytest.approx(1.571429, abs=1e-6)
    assert preference.pass_k_weight(8, 8, 4) == 0
    assert preference.pass_k_weight(8, 3, 1) == 1
    with pytest.raises(ValueError, match=r"preference.k=9: a task has 8 attempts"):
        preference.pass_k_weight(8, 1, 9)


def test_pass_k_weights_favour_hard_tasks_average_one_and_leave_easy_ones_out():
    outcomes = [*round_of(1, 7, "hard"), *round_of(4, 4, "half"), *round_of(7, 1, "easy")]
    pairs = paired(outcomes, weights="pass_k", k=4, pairs_per_task=2)
    weights = {p.task_id: p.weight for p in pairs}
    assert weights.keys() == {"hard", "half"}
    assert weights["hard"] / weights["half"] == pytest.approx(
        preference.pass_k_weight(8, 1, 4) / preference.pass_k_weight(8, 4, 4)
    )
    assert sum(p.weight for p in pairs) == pytest.approx(len(pairs))
    with pytest.raises(ValueError, match=r"lower preference\.k"):
        paired(round_of(7, 1), weights="pass_k", k=8)


def test_balanced_labels_weigh_the_same_on_both_sides():
    found = preference.labels(round_of(1, 3), config.Preference(balance=True))
    assert [label.weight for label in found] == pytest.approx([2.0, 2 / 3, 2 / 3, 2 / 3])


def test_over_long_trajectories_are_dropped_only_on_request_and_counted():
    outcomes = [*round_of(1, 1), outcome(2, Grade.RESOLVED, tokens=99)]
    assert preference.counts(outcomes, CFG)["over_length_dropped"] == 0
    cfg = config.Preference(max_tokens=50)
    assert preference.counts(outcomes, cfg)["over_length_dropped"] == 1
    assert {label.sample for label in preference.labels(outcomes, cfg)} == {0, 1}
