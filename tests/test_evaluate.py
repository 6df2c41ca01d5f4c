"""evaluate: golden measures, joins by key, the choice before the grades, and the numbers of a small evaluation."""

import difflib
import importlib.util
import json
import math
import random
from pathlib import Path

import numpy as np
import pytest

from entropo_ray import config, evaluate, official, select, store, tasks
from entropo_ray.patches import normalised
from entropo_ray.records import Choice, Execution, Grade, Graded, Measure, Prediction, Score, Stop, Task, Trajectory
from entropo_ray.tasks import local

SCORES = (0.9, 0.8, 0.8, 0.5, 0.1, 0.1)
CORRECT = (False, True, False, True, False, True)

# ------------------------------------------------------------------------------------------------------- measures


@pytest.mark.parametrize(
    ("n", "correct", "k", "value"),
    [(16, 1, 1, 0.0625), (16, 1, 4, 0.25), (16, 1, 16, 1), (16, 4, 4, 0.728022), (16, 8, 2, 0.766667), (16, 0, 9, 0)],
)
def test_pass_at_k_golden(n, correct, k, value):
    assert evaluate.pass_at_k(n, correct, k) == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize(("k", "best", "anyone"), [(1, 0.5, 0.5), (2, 0.4, 0.8), (3, 0.275, 0.95), (6, 0, 1)])
def test_best_at_k_golden(k, best, anyone):
    assert evaluate.best_at_k(SCORES, CORRECT, k) == pytest.approx(best, abs=1e-12)
    assert evaluate.pass_at_k(6, 3, k) == pytest.approx(anyone, abs=1e-12)


@pytest.mark.parametrize("k", [0, 7])
def test_more_than_there_are_is_refused(k):
    with pytest.raises(ValueError, match=rf"pass@{k} of 6 .* \[1, 6\]"):
        evaluate.pass_at_k(6, 3, k)
    with pytest.raises(ValueError, match=rf"best@{k} of 6"):
        evaluate.best_at_k(SCORES, CORRECT, k)


def test_best_at_k_agrees_with_drawing_and_choosing():
    rng = np.random.default_rng(1)
    for k in (2, 3, 5):
        keys, correct = rng.integers(0, 4, 9), rng.random(9) < 0.4
        drawn = rng.random((400_000, 9)).argsort(axis=1)[:, :k]  # in random order, so ties are, too
        chosen = np.take_along_axis(drawn, keys[drawn].argmax(axis=1)[:, None], axis=1)
        assert evaluate.best_at_k(keys.tolist(), correct.tolist(), k) == pytest.approx(
            correct[chosen].mean(), abs=0.003
        )


def test_no_selector_beats_the_best_attempt_and_all_alike_is_a_random_pick():
    rng = random.Random(2)
    for _ in range(200):
        n = rng.randint(1, 8)
        k = rng.randint(1, n)
        keys = [rng.randrange(3) for _ in range(n)]
        correct = [rng.random() < 0.5 for _ in range(n)]
        assert evaluate.best_at_k(keys, correct, k) <= evaluate.pass_at_k(n, sum(correct), k) + 1e-12
        assert evaluate.best_at_k([0] * n, correct, k) == pytest.approx(sum(correct) / n)
        assert evaluate.best_at_k(correct, correct, k) == pytest.approx(evaluate.pass_at_k(n, sum(correct), k))


def test_wilson_golden_and_edges():
    assert [round(100 * x, 1) for x in evaluate.wilson(219, 500)] == [39.5, 48.2]
    assert evaluate.wilson(0, 10)[0] == 0
    assert evaluate.wilson(10, 10)[1] == 1
    assert evaluate.wilson(0, 10)[1] > 0.2


def test_mcnemar_golden():
    assert evaluate.mcnemar(15, 5) == pytest.approx(0.041389, abs=1e-6)
    assert evaluate.mcnemar(0, 0) == 1
    assert evaluate.mcnemar(4, 4) == 1


def test_auroc_golden_and_without_both_sides():
    assert evaluate.auroc(SCORES, CORRECT) == pytest.approx(1 / 3)
    assert evaluate.auroc((0.1, 0.9), (False, True)) == 1
    assert evaluate.auroc((0.1, 0.9), (True, True)) is None


def test_the_bootstrap_pairs_its_columns_and_repeats_itself():
    rng = np.random.default_rng(3)
    first = (rng.random(60) < 0.5).astype(float)
    columns = np.stack([first, first + 0.25, np.full(60, 0.25)], axis=1)
    low, high = evaluate.bootstrap(columns)
    assert np.allclose([low[1] - low[0], high[1] - high[0], low[2], high[2]], 0.25)
    half = 1.96 * first.std() / math.sqrt(60)
    assert low[0] == pytest.approx(first.mean() - half, abs=0.03)
    assert high[0] == pytest.approx(first.mean() + half, abs=0.03)
    assert np.array_equal(evaluate.bootstrap(columns), np.stack([low, high]))


def diff(path, *lines):
    return "\n".join([f"diff --git a/{path} b/{path}", f"--- a/{path}", f"+++ b/{path}", "@@ -1 +1 @@", *lines, ""])


def test_a_patch_is_counted_by_its_code_alone():
    plain = diff("pkg/a.py", " def f(x):", "-    return x", "+    return x + 1")
    spaced = diff("pkg/a.py", " def f(x):", "-    return x", "+    return x+1  # one more", "+    # why")
    tested = plain + diff("tests/test_a.py", "+def test_f(): assert f(1) == 2")
    assert normalised(plain) == normalised(spaced) == normalised(tested) != ""
    other = diff("pkg/a.py", "-    return x", "+    return x + 2")
    elsewhere = plain.replace("pkg/a.py", "pkg/b.py")
    assert len({normalised(p) for p in (plain, other, elsewhere)}) == 3
    assert normalised(diff("conftest.py", "+x = 1")) == ""


def test_a_hash_in_a_string_is_no_comment():
    one, two = (diff("a.py", f'+x = "a#{i}"') for i in (1, 2))
    assert normalised(one) != normalised(two)


# --------------------------------------------------------------------------------------------------------- stages


def task(task_id):
    return Task(
        id=task_id, source="local", split="test", repo="r", image="/x", workdir="/testbed", problem="it is wrong",
        test_command="pytest", visible=("a", "b"),
    )  # fmt: skip


def trajectory(task_id, sample, patch, *, stop=Stop.AGENT, logp=(-1.0, -2.0)):
    return Trajectory(
        task_id=task_id, sample=sample, round=0, seed=0, kind="model", scaffold="", prompt="", temperature=0.7,
        turns=(), token_ids=(1, 2, 3), action_mask=(False, True, True), behaviour_logp=(0.0, *logp), num_turns=2,
        num_actions=2, num_tokens=3, patch=patch, patch_class="", files=(), stop=stop, reason="", wall_s=1.0,
        grade=None, verdict=None,
    )  # fmt: skip


SUITE = [task("t"), task("u")]
PATCHES = {
    (t, i): diff("a.py", f"+x = {i // 2}") if i < 3 else "" for t in ("t", "u") for i in range(4)
}  # 0 and 1 are alike, 3 is empty
GRADES = {
    ("t", 0): Grade.RESOLVED, ("t", 1): Grade.RESOLVED, ("t", 2): Grade.FLAKY, ("t", 3): Grade.EMPTY,
    ("u", 0): Grade.TAMPERED, ("u", 1): None, ("u", 2): Grade.RESOLVED, ("u", 3): Grade.EMPTY,
}  # fmt: skip


@pytest.fixture
def out(tmp_path):
    """An evaluation up to the choice; products are written in another order than the trajectories."""
    out = store.evaluation_of(tmp_path)
    store.write(out.trajectories, Trajectory, [trajectory(t, i, patch) for (t, i), patch in PATCHES.items()])
    ran = [("u", 2, 0), ("t", 2, 1), ("t", 0, 0), ("u", 0, 2), ("t", 1, 0)]
    executions = [Execution(task_id=t, sample=i, regressed=r, reproduced=0) for t, i, r in ran]
    store.write(out.executions, Execution, executions)
    scores = [Score(task_id=t, sample=i, verifier=0.1 + i / 10) for t, i in sorted(PATCHES, reverse=True) if i != 1]
    store.write(out.scores, Score, scores)
    return out


def test_evidence_is_joined_by_key_and_what_is_missing_stays_missing(out):
    found = evaluate.candidates(out)
    known = {(c.task_id, c.sample): (c.regressed, c.verifier) for of_task in found.values() for c in of_task}
    assert known["t", 2] == (1, pytest.approx(0.3))
    assert known["t", 1] == (0, None)
    assert known["u", 1] == (None, None)
    assert known["u", 3] == (None, pytest.approx(0.4))
    assert {(c.task_id, c.sample): c.patch for of_task in found.values() for c in of_task} == PATCHES


def test_the_choice_is_written_with_its_reason_and_as_swe_bench_predictions(out):
    numbers = evaluate.choose(out, [*SUITE, task("v")], config.Select(), model="m")
    assert {(c.task_id, c.sample) for c in store.read(out.choice, Choice)} == {("t", 0), ("u", 2)}
    lines = [json.loads(line) for line in (out.choice / "predictions.jsonl").read_text().splitlines()]
    assert [set(line) for line in lines] == [{"instance_id", "model_name_or_path", "model_patch"}] * 3
    assert {line["instance_id"]: line["model_patch"] for line in lines} == {
        "t": PATCHES["t", 0],
        "u": PATCHES["u", 2],
        "v": "",
    }
    assert (numbers["chosen"], numbers["without"], numbers["dropped_regressed"]) == (2, 1, 5)
    reasons = {c.task_id: c.reason for c in store.read(out.choice, Choice)}
    assert reasons["u"] == "of 4: 3 by regressed removed"


def test_no_grade_is_looked_at_before_the_choice(out):
    with pytest.raises(ValueError, match="nothing was chosen yet"):
        evaluate.resolve(out, SUITE, config.Rollout(), answers="nowhere", chosen_by=config.Select())


def graded(out, grades=GRADES):
    evaluate.choose(out, SUITE, config.Select())
    rows = [Graded(task_id=t, sample=i, grade=g, verdict=None) for (t, i), g in grades.items()]
    store.write(out.grades, Graded, rows)
    return evaluate.resolve(out, SUITE, config.Rollout(), answers="nowhere", chosen_by=config.Select())


def test_the_numbers_of_a_small_evaluation_by_hand(out):
    numbers = graded(out)
    assert numbers["pass_at_1"] == pytest.approx((2 / 4 + 1 / 4) / 2)
    assert numbers["pass_at_2"] == pytest.approx((1 - 1 / 6 + 1 - 3 / 6) / 2)
    assert numbers["pass_at_4"] == 1
    # t: 0 is best, 1 next (no score), 2, 3; u: 2, then 0 regressed, then 3 by its score, then 1
    assert numbers["best_at_4"] == 1
    assert numbers["best_at_2"] == pytest.approx((5 / 6 + 3 / 6) / 2)
    assert numbers["regret"] == 0
    assert numbers["best_minus_pass_1"] == pytest.approx(1 - 0.375)
    assert numbers["gain"] == pytest.approx(1)
    assert numbers["resolved"] == 2
    assert numbers["resolved_rate_low"] == pytest.approx(evaluate.wilson(2, 2)[0])
    assert (numbers["tampered"], numbers["flaky"], numbers["empty"], numbers["ungraded"]) == (1, 1, 2, 1)
    assert numbers["entropy"] == pytest.approx(1.5)
    assert numbers["distinct_patches"] == pytest.approx(2 / 4)
    assert numbers["distinct_resolved"] == 1
    # t: .1 above neither .3 nor .4; u: .3 above .1, below .4; samples without a score take no part
    assert numbers["auroc"] == pytest.approx((0 + 0.5) / 2)
    for name in ("pass_at_1", "best_at_2", "best_minus_pass_1", "regret", "auroc", "resolved_rate"):
        assert numbers[f"{name}_low"] <= numbers[name] <= numbers[f"{name}_high"]
    assert all(isinstance(value, float) and math.isfinite(value) for value in numbers.values())


def test_best_at_n_is_what_the_choice_gets_where_nothing_ties(out):
    numbers = graded(out)
    keys = [select.rank(of_task, config.Select()) for of_task in evaluate.candidates(out).values()]
    assert all(k.count(max(k)) == 1 for k in keys)
    assert numbers["resolved_rate"] == numbers["best_at_4"]


def test_without_headroom_there_is_no_gain_and_without_both_sides_no_auroc(out):
    numbers = graded(out, dict.fromkeys(GRADES, Grade.UNRESOLVED))
    assert "gain" not in numbers
    assert "auroc" not in numbers
    assert numbers["pass_at_4"] == numbers["resolved"] == 0


def test_an_evaluation_against_itself_differs_by_nothing_and_signs_follow_the_order(out, tmp_path):
    graded(out)
    worse = store.evaluation_of(tmp_path, "worse")
    evaluate_again = dict(GRADES) | {("t", 0): Grade.UNRESOLVED}
    store.write(worse.trajectories, Trajectory, [trajectory(t, i, patch) for (t, i), patch in PATCHES.items()])
    graded(worse, evaluate_again)
    same, less = evaluate.compare(out, out), evaluate.compare(out, worse)
    assert same["pass_at_1_difference"] == same["resolved_difference_high"] == 0
    assert same["mcnemar"] == 1
    assert less["pass_at_1_difference"] == pytest.approx(-1 / 8)
    assert less["tasks"] == 2


def test_a_task_that_the_suite_lacks_is_named(out):
    with pytest.raises(ValueError, match=r"evaluate\.tasks: task t was sampled but is not in this suite"):
        evaluate.execute(out.trajectories, [task("u")], config.Rollout(), to=out.executions.with_name("again"))


# ------------------------------------------------------------------------------------------------------------ job


@pytest.fixture
def job(tmp_path, monkeypatch):
    """jobs/evaluate.py over stages that leave whole products, and what each of them was given."""
    place = Path(__file__).resolve().parent.parent / "jobs" / "evaluate.py"
    spec = importlib.util.spec_from_file_location("job_evaluate", place)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    calls = []

    def sample(policy, suite, cfg, *, seed, to, samples, answers=None):
        calls.append(("sample", samples, answers, cfg.tasks))
        store.write(to, Trajectory, [trajectory(t, i, patch) for (t, i), patch in PATCHES.items()])
        return {}

    def execute(trajectories, suite, cfg, *, to):
        calls.append(("execute",))
        store.write(to, Execution, [Execution(task_id="t", sample=0, regressed=0, reproduced=0)])
        return {}

    def measure(policy, other, trajectories, keys, cfg, *, to):
        calls.append(("measure", other.path.name))
        store.write(to, Measure, [Measure(task_id="t", sample=0, logp=(-1.0,), entropy=(0.5,), kl=(0.0,))])
        return {}

    def score(trajectories, suite, cfg, *, policy, to):
        calls.append(("verify", policy.parent.name))
        store.write(to, Score, [Score(task_id="t", sample=2, verifier=0.9)])
        return {}

    def grade_all(out, suite, cfg, answers):
        assert store.done(out.choice)
        calls.append(("grade", answers))
        rows = [Graded(task_id=t, sample=i, grade=g, verdict=None) for (t, i), g in GRADES.items()]
        store.write(out.grades, Graded, rows)

    monkeypatch.setattr(module, "sample", sample)
    monkeypatch.setattr(module, "score", score)
    monkeypatch.setattr(module, "measure", measure)
    monkeypatch.setattr(module.chat, "load", lambda path: None)
    monkeypatch.setattr(module.diversity, "entropies", lambda trajectories, measures, words: {"entropy_exact": 0.5})
    monkeypatch.setattr(module.tasks, "load", lambda cfg: SUITE)
    monkeypatch.setattr(evaluate, "execute", execute)
    monkeypatch.setattr(evaluate, "_grade_all", grade_all)
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    words = [f"model={model}", f"run_dir={tmp_path / 'run'}", "evaluate.samples=4", "rollout.tasks=1"]

    def run(*more):
        calls.clear()
        cfg = config.load(config.Run, [*words, *more])
        return module.run(cfg), list(calls), module.table, module.beside(cfg)

    run.main = lambda *more: module.main(config.load(config.Run, [*words, *more]))
    return run


ASKED = [("sample", 4, None, None), ("execute",), ("measure", "model"), ("grade", "runs/packs/local")]


def test_every_task_is_sampled_without_answers_and_graded_after_the_choice(job, tmp_path):
    numbers, calls, table, _ = job()
    assert calls == ASKED
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text()) == numbers
    assert f"[{numbers['pass_at_1_low']:.3f}, {numbers['pass_at_1_high']:.3f}]" in table(numbers)
    assert job()[:2] == (numbers, [])  # a finished evaluation runs nothing


def test_entropies_are_measured_unless_they_are_not_wanted(job, tmp_path):
    assert job()[0]["entropy_exact"] == 0.5
    numbers, calls, _, _ = job("evaluate.measure=false", "evaluate.name=plain")
    assert ("measure", "model") not in calls
    assert "entropy_exact" not in numbers


def test_a_policy_over_another_vocabulary_is_refused_before_anything_is_sampled(job, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"vocab_size": 7}')
    (tmp_path / "model" / "config.json").write_text('{"vocab_size": 9}')
    with pytest.raises(ValueError, match=r"has 7 .* has 9, .*evaluate\.measure=false"):
        job(f"evaluate.model={other}")
    assert not (tmp_path / "run" / "evaluation").exists()


def test_a_verifier_takes_part_if_it_was_there_before_the_choice(job, tmp_path):
    job()
    judge = store.verifier_of(tmp_path / "run")
    store.publish(store.fresh(judge), judge)
    assert job()[1] == []
    assert job("evaluate.name=second")[1] == [*ASKED[:3], ("verify", "verifier"), ASKED[3]]


def test_another_evaluation_is_not_taken_for_this_one(job):
    job()
    with pytest.raises(ValueError, match=r"evaluate\.samples=8: .* was made with 4; give another evaluate\.name"):
        job("evaluate.samples=8")
    with pytest.raises(ValueError, match=r"evaluate\.select\.tie=first: .* was made with verifier"):
        job("evaluate.select.tie=first")
    *_, beside = job("evaluate.name=second", "evaluate.select.tie=first")
    assert "minus evaluation:" in beside
    assert "pass_at_1_difference" in beside


def test_the_official_harness_is_not_asked_about_directories(tmp_path, job):
    """The job says so before it asks for a machine; SUITE has an absolute path as its image."""
    with pytest.raises(ValueError, match=r"evaluate\.official=true: task t runs in a directory, /x, .*=false"):
        job.main("evaluate.official=true")
    assert not (tmp_path / "run").exists()


def test_official_numbers_stand_beside_ours_and_stay_there(job, tmp_path, monkeypatch):
    asked = []

    def officially(out, suite, *, answers, workers, timeout_s):
        assert store.done(out.grades)
        if not store.done(out.official):
            asked.append((answers, workers, timeout_s))
            one = official.Comparison(
                task_id="t", official=Grade.RESOLVED, ours=Grade.RESOLVED, agree=True, official_reason="", our_reason=""
            )
            store.write(out.official, official.Comparison, [one])
        return evaluate.official_numbers(list(store.read(out.official, official.Comparison)))

    monkeypatch.setattr(evaluate, "officially", officially)
    assert "official_agreement" not in job()[0]
    numbers, calls, table, _ = job("evaluate.official=true", "evaluate.official_workers=3", "evaluate.official_s=60")
    assert (numbers["official_agreement"], calls) == (1, [])
    assert f"[{numbers['official_resolved_rate_low']:.3f}, " in table(numbers)
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text()) == job()[0] == numbers
    assert asked == [("runs/packs/local", 3, 60)]


def test_official_numbers_count_only_what_both_graders_judged():
    grades = [(Grade.RESOLVED, Grade.RESOLVED, True), (Grade.RESOLVED, Grade.TAMPERED, False), (None, None, None)]
    grades += [(Grade.EMPTY, Grade.EMPTY, True)]
    compared = [
        official.Comparison(task_id=f"t{i}", official=a, ours=b, agree=c, official_reason="", our_reason="")
        for i, (a, b, c) in enumerate(grades)
    ]
    numbers = evaluate.official_numbers(compared)
    assert (numbers["official_resolved"], numbers["official_resolved_rate"]) == (2, 0.5)
    assert (numbers["official_compared"], numbers["official_agreement"]) == (3, pytest.approx(2 / 3))
    assert "official_agreement" not in evaluate.official_numbers(compared[2:3])


@pytest.mark.parametrize(
    ("path", "name"), [("/a/b/c/d e", "c/d/e"), ("owner/name", "owner/name"), ("//", "entropo_ray")]
)
def test_a_policy_gets_a_name_that_the_harness_takes(path, name):
    labelled = evaluate._labelled(Prediction(instance_id="t", model_name_or_path=path, model_patch=""))
    assert labelled.model_name_or_path == name
    assert official._MODEL.fullmatch(name)


# ------------------------------------------------------------------------------------------------ in real sandboxes


@pytest.fixture
def pack(tmp_path):
    """Two tasks of the local source and, by task, their reference patch."""
    to = tmp_path / "pack"
    to.mkdir()
    mined = local.generate(count=1, held_out=2, ambiguous=0.0, hidden=0.0, seed=5, to=to)
    tasks.write(to, mined)
    suite = tasks.load(config.Tasks(path=str(to), split="test"))
    return str(to), suite, {m.task.id: m.answer.patch for m in mined}


def breaking(task, gold):
    """A patch after which the file that the reference patch mends cannot be imported."""
    path = gold.split("+++ b/")[1].split("\n")[0]
    lines = (Path(task.image) / path).read_text().splitlines(keepends=True)
    changed = difflib.unified_diff(lines, ["raise RuntimeError\n"], f"a/{path}", f"b/{path}")
    return f"diff --git a/{path} b/{path}\n" + "".join(changed)


@pytest.mark.ray
def test_visible_then_hidden_tests_of_every_patch_once(pack, cluster, tmp_path):
    path, suite, gold = pack
    cfg = config.Rollout(graders=2, tries=1, sandbox=config.Sandbox(grade_s=60.0))
    out = store.evaluation_of(tmp_path)
    one, two = suite
    broken = breaking(two, gold[two.id])
    patches = [(one, 0, gold[one.id]), (one, 1, gold[one.id]), (one, 2, ""), (two, 0, gold[two.id]), (two, 1, broken)]
    attempts = [trajectory(t.id, i, patch) for t, i, patch in patches]
    store.write(out.trajectories, Trajectory, [*attempts, trajectory(two.id, 2, "", stop=Stop.INFRA_ERROR)])
    ran = evaluate.execute(out.trajectories, suite, cfg, to=out.executions)
    evaluate.choose(out, suite, config.Select())
    numbers = evaluate.resolve(out, suite, cfg, answers=path, chosen_by=config.Select())
    found = {(e.task_id, e.sample): e.regressed for e in store.read(out.executions, Execution)}
    assert 0 < found.pop((two.id, 1)) <= len(two.visible)
    assert found == {(one.id, 0): 0, (one.id, 1): 0, (two.id, 0): 0}
    assert (ran["checked"], ran["runs"], ran["skipped"], ran["lost"]) == (4, 3, 2, 0)
    assert {g.task_id: g.sample for g in store.read(out.choice, Choice)} == {one.id: 0, two.id: 0}
    grades = {(g.task_id, g.sample): g.grade for g in store.read(out.grades, Graded)}
    assert grades == {
        (one.id, 0): Grade.RESOLVED, (one.id, 1): Grade.RESOLVED, (one.id, 2): Grade.EMPTY,
        (two.id, 0): Grade.RESOLVED, (two.id, 1): Grade.UNRESOLVED, (two.id, 2): None,
    }  # fmt: skip
    assert (numbers["resolved"], numbers["ungraded"], numbers["pass_at_1"]) == (2, 1, pytest.approx(0.5))
