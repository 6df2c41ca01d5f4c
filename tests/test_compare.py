"""compare: arms with equal budgets, and paired intervals that know a difference from noise."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from entropo_ray import compare, comparison, config, store
from entropo_ray.records import Execution, Grade, Graded, Stop, Trajectory

HERE = Path(__file__).resolve().parent.parent


def run(tmp_path, *words):
    return config.load(config.Run, [str(HERE / "conf/compare.yaml"), f"run_dir={tmp_path}", *words])


def test_the_whole_grid_is_every_arm_at_every_ratio(tmp_path):
    names = [arm.name for arm in compare.arms(run(tmp_path))]
    assert len(names) == len(set(names)) == 5 + 4 * 4
    assert {"seed", "sft", "dpo", "kto", "divpo", "entropo_kto:0.05", "tempered_dpo:1"} <= set(names)
    assert names.index("dpo") < names.index("tempered_dpo:0.05")


def test_arms_differ_in_what_they_name_and_spend_the_same(tmp_path):
    cfg = run(tmp_path)
    arms = {arm.name: arm for arm in compare.arms(cfg)}
    assert arms["seed"].train is None
    assert arms["tempered_dpo:0.5"].heat == 1.5
    assert arms["dpo"].train.entropy == 0.0
    assert arms["entropo_dpo:0.5"].train == replace(arms["dpo"].train, entropy=0.5 * cfg.train.beta)
    assert arms["divpo"].train == arms["dpo"].train
    assert arms["divpo"].preference.pairing == "rare"
    assert arms["entropo_bco:1"].train.loss == "bco"
    for arm in arms.values():
        if arm.train:  # trajectories a step: a pair holds two
            assert arm.train.batch * (2 if arm.train.loss == "dpo" else 1) == 2 * cfg.train.batch
            assert arm.train.steps == cfg.compare.steps > 0


def test_cells_share_rollouts_and_reference_and_nothing_else(tmp_path):
    cfg = run(tmp_path)
    arms = {arm.name: arm for arm in compare.arms(cfg)}
    cells = [compare.cell(cfg.run_dir, arms["dpo"], seed) for seed in (0, 1)]
    assert cells[0].trajectories == cells[1].trajectories
    assert cells[0].reference == cells[1].reference
    assert len({path for one in cells for path in (one.policy, one.preferences, one.swapped, one.current)}) == 8


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["compare.arms=[dpo,ppo]"], "ppo is unknown"),
        (["compare.arms=[seed,tempered_dpo]", "compare.against=seed"], "name dpo, too"),
        (["compare.seeds=[1,1]"], r"compare.seeds=\[1, 1\]"),
        (["compare.ratios=[0.5,0.5]"], r"compare.ratios=\[0.5, 0.5\]"),
        (["compare.ratios=[0.0]"], r"compare.ratios=\[0.0\]: all must be above 0"),
        (["compare.steps=0"], "compare.steps=0"),
        (["train.length=mean"], "kto cannot have train.z0=exact"),
        (["train.beta=0"], "cannot have train.beta=0 and train.entropy=0"),
        (["compare.against=kro"], "compare.against=kro: is none of seed"),
    ],
)
def test_grids_that_make_no_sense_are_refused(tmp_path, words, said):
    with pytest.raises(ValueError, match=said):
        compare.arms(run(tmp_path, *words))


def cells(rng, shift, seeds=3, tasks=200):
    """Two arms on tasks of very different difficulty; the second is better by `shift` on every task."""
    hard = rng.random(tasks)
    noise = lambda: 0.02 * rng.standard_normal(tasks)  # noqa: E731
    return {
        "dpo": [{"pass@1": hard + noise()} for _ in range(seeds)],
        "other": [{"pass@1": hard + shift + noise()} for _ in range(seeds)],
    }


def test_a_paired_interval_finds_what_two_single_ones_cannot():
    found = compare.table(cells(np.random.default_rng(0), 0.02), "dpo")["other"]["pass@1"]
    assert found["minus"] == pytest.approx(0.02, abs=0.005)
    assert comparison.outside(found)
    assert found["high"] - found["low"] > 4 * (found["minus_high"] - found["minus_low"])
    none = compare.table(cells(np.random.default_rng(1), 0.0), "dpo")["other"]["pass@1"]
    assert not comparison.outside(none)


def test_seeds_that_disagree_widen_the_interval():
    rng = np.random.default_rng(2)
    tasks = rng.random(50)
    steady = [{"x": tasks + 0.1 + 0.01 * rng.standard_normal(50)} for _ in range(3)]
    moody = [{"x": tasks + by + 0.01 * rng.standard_normal(50)} for by in (-0.2, 0.1, 0.4)]
    base = [{"x": tasks} for _ in range(3)]
    found = compare.table({"dpo": base, "steady": steady, "moody": moody}, "dpo")
    assert found["steady"]["x"]["minus"] == pytest.approx(0.1, abs=0.01)
    assert comparison.outside(found["steady"]["x"])
    assert found["moody"]["x"]["minus_low"] < -0.5  # three seeds know little: t with two degrees of freedom


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(3)
    for of_tasks, of_seeds, rest in ((1, 0, 0.3), (0, 1, 0.3), (1, 1, 0.3), (0.2, 0.1, 1)):
        held, draws = 0, 400
        for _ in range(draws):
            noise = [rng.standard_normal(shape) for shape in ((1, 20), (3, 1), (3, 20))]
            values = of_tasks * noise[0] + of_seeds * noise[1] + rest * noise[2]
            _, low, high = compare.interval(values)
            held += low <= 0 <= high
        assert held / draws > 0.9, (of_tasks, of_seeds, rest, held / draws)


@pytest.mark.parametrize(("freedom", "value"), [(1, 12.7062), (2, 4.3027), (5, 2.5706), (19, 2.0930), (2.5, 3.5747)])
def test_student_s_quantile_is_that_of_the_tables(freedom, value):
    assert compare.t_quantile(freedom) == pytest.approx(value, rel=2e-3)


def test_tasks_without_a_value_do_not_count():
    values = np.array([1.0, math.nan, 3.0])
    found = compare.table({"dpo": [{"x": values}], "other": [{"x": values[[0, 0, 0]] + 1}]}, "dpo")
    assert found["dpo"]["x"]["mean"] == 2.0
    assert found["other"]["x"]["mean"] == 2.0
    assert found["other"]["x"]["minus"] == 0.0  # over the two tasks that both have
    nothing = compare.table({"dpo": [{"x": np.array([math.nan, math.nan])}]}, "dpo")["dpo"]["x"]
    assert nothing["mean"] is None


def evaluation(run_dir, name, resolved):
    """Four attempts at each of three tasks; `resolved` says which, `patches` are one solution of two spellings."""
    out = store.evaluation_of(run_dir, name)
    rows, ran, grades = [], [], []
    for t, marks in enumerate(resolved):
        for sample, mark in enumerate(marks):
            patch = f"diff --git a/m.py b/m.py\n--- a/m.py\n+++ b/m.py\n@@ -1 +1 @@\n-x\n+x = {sample % 2}\n"
            rows.append(
                Trajectory(
                    task_id=f"t{t}", sample=sample, round=0, seed=0, kind="model", scaffold="", prompt="",
                    temperature=1.0, turns=(), token_ids=(1,), action_mask=(True,), behaviour_logp=(-1.0,), num_turns=1,
                    num_actions=1, num_tokens=1, patch=patch, patch_class="", files=(), stop=Stop.AGENT, reason="",
                    wall_s=0.0, grade=None, verdict=None,
                )
            )  # fmt: skip
            ran.append(Execution(task_id=f"t{t}", sample=sample, regressed=0 if mark else 1, reproduced=0))
            grade = Grade.RESOLVED if mark else Grade.UNRESOLVED
            grades.append(Graded(task_id=f"t{t}", sample=sample, grade=grade, verdict=None))
    store.write(out.trajectories, Trajectory, rows)
    store.write(out.executions, Execution, ran)
    store.write(out.grades, Graded, grades)
    out.numbers.write_text(json.dumps({"entropy_exact": 0.2, "kl": 0.01}))


def test_columns_are_by_task_and_solutions_are_counted_among_those_that_pass(tmp_path):
    evaluation(tmp_path, "dpo-0", [(1, 1, 0, 0), (0, 0, 0, 0), (1, 0, 1, 0)])
    tasks, found = compare.columns(store.evaluation_of(tmp_path, "dpo-0"), config.Select())
    assert tasks == ["t0", "t1", "t2"]
    assert found["pass@1"].tolist() == [0.5, 0, 0.5]
    assert found["pass@4"].tolist() == [1, 0, 1]
    assert found["best@4"].tolist() == [1, 0, 1]  # the visible tests tell
    assert found["distinct"].tolist() == [2, 0, 1]
    assert found["entropy_passing"][0] == pytest.approx(math.log(2))
    assert math.isnan(found["entropy_passing"][1])


def test_the_result_is_one_file_and_one_page_that_say_what_is_outside(tmp_path):
    cfg = run(
        tmp_path, "compare.arms=[seed,dpo]", "compare.seeds=[0,1]", "evaluate.samples=4", "compare.against=seed"
    )  # fmt: skip
    for seed in (0, 1):
        evaluation(tmp_path, f"seed-{seed}", [(0, 0, 0, 0), (0, 0, 0, 0), (0, 0, 0, 0)])
        evaluation(tmp_path, f"dpo-{seed}", [(1, 1, 0, 0), (1, 0, 0, 0), (1, 0, 1, 0)])
    result = compare.compare(cfg)
    assert result["arms"]["dpo"]["pass@1"]["mean"] == pytest.approx(5 / 12)
    assert all(
        0 <= entry["low"] <= entry["high"] <= 1 for entry in (result["arms"]["dpo"][f"pass@{k}"] for k in (1, 4))
    )
    assert json.loads((tmp_path / "comparison.json").read_text())["tasks"] == 3
    text = comparison.write(tmp_path).read_text()
    assert "dpo: pass@1 above seed" in text
    assert "<svg" in text
    assert "src=" not in text  # nothing is fetched
    said = compare.lines(result)
    assert any(line.startswith("dpo") and "*" in line for line in said)
    assert sum(line.startswith("seed") for line in said) == 1
