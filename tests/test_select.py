"""select: laws of the test-time choice."""

import dataclasses
import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from entropo_ray import config, records, select
from entropo_ray.records import Candidate, Stop

CFG = config.Select()


def candidate(sample=0, **known):
    facts = {"stop": Stop.AGENT, "num_turns": 5, "verifier": 0.5, "regressed": 0, "reproduced": 0} | known
    return Candidate(task_id="t", sample=sample, patch="p", **facts)


def chosen(*facts, cfg=CFG):
    return select.select([candidate(i, **known) for i, known in enumerate(facts)], cfg).sample


candidates = st.lists(
    st.builds(
        candidate,
        stop=st.sampled_from([Stop.AGENT, Stop.TOKEN]),
        num_turns=st.integers(1, 3),
        verifier=st.none() | st.sampled_from([0.0, 0.005, 0.3, 0.9]),
        regressed=st.none() | st.integers(0, 2),
        reproduced=st.none() | st.integers(0, 2),
    ),
    min_size=1,
    max_size=6,
).map(lambda found: [dataclasses.replace(c, sample=i) for i, c in enumerate(found)])
configs = st.builds(
    config.Select,
    execution=st.booleans(),
    tie=st.sampled_from(["verifier", "most_turns", "fewest_turns", "first"]),
)


@given(candidates, configs, st.randoms())
def test_input_order_never_matters_and_there_is_always_an_answer(found, cfg, rng):
    shuffled = list(found)
    rng.shuffle(shuffled)
    assert select.select(found, cfg) == select.select(shuffled, cfg)
    assert select.select(found, cfg) in found


@given(candidates, configs)
def test_the_stages_said_one_by_one_make_the_same_choice(found, cfg):
    """The hybrid rule written as filters, independently of the keys."""
    keep = lambda cs, good: [c for c in cs if good(c)] or cs  # noqa: E731
    least = lambda cs, f: [c for c in cs if f(c) == min(map(f, cs))]  # noqa: E731
    left = keep(found, lambda c: c.stop.finished)
    if cfg.execution:
        left = least(left, lambda c: math.inf if c.regressed is None else c.regressed)
        left = least(left, lambda c: math.inf if c.reproduced is None else -c.reproduced)
    left = keep(left, lambda c: c.verifier is not None and c.verifier > cfg.verifier_min)
    tie = {
        "verifier": lambda c: math.inf if c.verifier is None else -c.verifier,
        "most_turns": lambda c: -c.num_turns,
        "fewest_turns": lambda c: c.num_turns,
        "first": lambda c: 0,
    }[cfg.tie]
    assert select.select(found, cfg) == min(least(left, tie), key=lambda c: c.sample)


@given(candidates, configs)
def test_removals_leave_exactly_the_candidates_that_tie_for_the_best_key(found, cfg):
    keys = select.rank(found, cfg)
    assert len(found) - sum(select.removals(found, cfg).values()) == keys.count(max(keys))


def test_a_single_candidate_is_chosen_whatever_is_known_of_it():
    worst = candidate(3, stop=Stop.TOKEN, verifier=None, regressed=None, reproduced=None)
    assert select.select([worst], CFG) == worst


def test_the_order_of_criteria():
    assert chosen({"stop": Stop.TOKEN, "verifier": 0.9}, {"verifier": 0.1}) == 1
    assert chosen({"regressed": 1, "verifier": 0.9}, {"verifier": 0.1}) == 1
    assert chosen({"verifier": 0.9}, {"reproduced": 1, "verifier": 0.1}) == 1
    assert chosen({"verifier": 0.4, "num_turns": 9}, {"verifier": 0.6}) == 1
    assert chosen({}, {}) == 0


def test_execution_may_be_left_out():
    assert chosen({"regressed": 1, "verifier": 0.9}, {"verifier": 0.1}, cfg=config.Select(execution=False)) == 0


def test_turns_break_ties_only_above_the_verifier_s_bar():
    cfg = config.Select(tie="most_turns")
    assert chosen({"verifier": 0.005, "num_turns": 9}, {"verifier": 0.02, "num_turns": 2}, cfg=cfg) == 1
    assert chosen({"verifier": 0.005, "num_turns": 2}, {"verifier": 0.0, "num_turns": 9}, cfg=cfg) == 1


def test_missing_scores_rank_last():
    assert chosen({"regressed": None}, {"regressed": 40}) == 1
    assert chosen({"reproduced": None}, {"reproduced": 0}) == 1
    low = config.Select(verifier_min=0.5)
    assert chosen({"verifier": None}, {"verifier": 0.0}, cfg=low) == 1


@pytest.mark.parametrize("score", [math.nan, math.inf, -0.1, 1.1])
def test_a_score_that_is_no_probability_is_refused(score):
    with pytest.raises(ValueError, match="task t sample 1: verifier="):
        chosen({}, {"verifier": score})


def test_none_two_tasks_and_repeated_samples_are_refused():
    other = dataclasses.replace(candidate(1), task_id="u")
    for found, what in (([], "no candidates"), ([candidate(), other], "two tasks"), ([candidate()] * 2, "twice")):
        with pytest.raises(ValueError, match=what):
            select.select(found, CFG)


def test_equal_keys_are_ties_whatever_the_sample():
    assert len(set(select.rank([candidate(i) for i in range(4)], CFG))) == 1


def test_a_candidate_cannot_hold_a_grade():
    fields = {f.name for f in dataclasses.fields(Candidate)}
    graded = {f.name for f in dataclasses.fields(records.Graded)} - {"task_id", "sample"}
    assert not fields & graded
    assert not [f for f, g in itertools.product(fields, ("grade", "verdict", "label", "resolved")) if g in f]
