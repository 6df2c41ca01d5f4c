"""report: numbers equal those counted by hand, everything is escaped, and what does not exist yet is left out."""

import dataclasses
import itertools
import json
import os
import random
import subprocess
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest

from entropo_ray import config, observe, page, report, store
from entropo_ray.records import Attempt, Grade, Pair, Stop, Trajectory, Turn, Verdict

HERE = Path(__file__).resolve().parent.parent
EVIL = "<script>alert('x')</script>&amp;"


def verdict(grade, passed=(), failed=()):
    return Verdict(
        grade=grade, passed=passed, failed=failed, dropped=(), exit_code=0, runs=1, seconds=0.4, reason="as tests say"
    )


def turn(number, text, start):
    return Turn(
        reply=text,
        tool="shell",
        command=text,
        parse="ok",
        observation="\n".join([f"line {i} of <b>{EVIL}</b>" for i in range(45 if number == 2 else 3)]),
        exit_code=0,
        flags=(),
        start=start,
        stop=start + len(text),
        generate_s=0.4,
        act_s=0.1,
    )


def trajectory(task_id="t", sample=0, round=0, grade=Grade.RESOLVED, **changes):
    rng = random.Random(f"{task_id}/{sample}")
    turns, ids, mask, logp = [], [1] * 20, [False] * 20, [0.0] * 20
    for number in range(3):
        text = f"look at {EVIL} {number}"
        turns.append(turn(number, text, len(ids)))
        ids += [ord(letter) for letter in text] + [1] * 5
        mask += [True] * len(text) + [False] * 5
        logp += [-rng.expovariate(2) for _ in text] + [0.0] * 5
    made = Trajectory(
        task_id=task_id,
        sample=sample,
        round=round,
        seed=1,
        kind="model",
        scaffold="s",
        prompt="p",
        temperature=1.0,
        turns=tuple(turns),
        token_ids=tuple(ids),
        action_mask=tuple(mask),
        behaviour_logp=tuple(logp),
        num_turns=3,
        num_actions=sum(mask),
        num_tokens=9,
        patch_class="",
        patch=f"--- a/f.py\n+++ b/f.py\n@@ -1 +1 @@\n-x = 1\n+x = '{EVIL}'\n",
        files=("f.py",),
        stop=Stop.AGENT,
        reason="",
        wall_s=4.2,
        grade=grade,
        verdict=None if grade is None else verdict(grade, passed=("a::b",), failed=(f"c::{EVIL}",)),
    )
    return dataclasses.replace(made, **changes)


def attempt(sample, grade, *, failed=(), passed=("v1",), stop=Stop.AGENT):
    made = None if grade is None else verdict(grade, passed=passed, failed=failed)
    return Attempt(
        task_id="t",
        sample=sample,
        num_turns=1,
        num_actions=9,
        stop=stop,
        grade=grade,
        patch="p",
        wall_s=1.0,
        verdict=made,
    )


def products(run_dir, t, made):
    out = store.round_of(run_dir, t)
    for one in made:
        store.append(out.trajectories, Trajectory, [one], key=(one.task_id, one.sample))
    store.seal(out.trajectories, Trajectory)
    return out


def steps(policy, count, seed):
    rng = random.Random(seed)
    policy.mkdir(parents=True, exist_ok=True)
    with (policy / "steps.jsonl").open("w") as file:
        for i in range(count):
            done = i / count
            line = {
                "step": i,
                "lr": 1e-4,
                "loss": 0.69 - 0.2 * done + rng.gauss(0, 0.02),
                "accuracy": min(1.0, 0.5 + 0.35 * done + rng.gauss(0, 0.03)),
                "margin": 0.8 * done + rng.gauss(0, 0.05),
                "kl": 0.2 * done,
                "entropy": 0.62 + 0.05 * done + rng.gauss(0, 0.01),
            }
            file.write(json.dumps(line) + "\n")
    store.mark(policy)


def whole_run(run_dir, count=2, tasks=12, samples=4):
    """A run as its jobs would leave it, with invented numbers."""
    rng = random.Random(0)
    words = ["model=m", f"run_dir={run_dir}", f"rounds={count + 1}", f"tasks.path={run_dir / 'nothing'}"]
    config.pin(config.load(config.Run, words))
    stage = observe.stages(run_dir)
    with stage("imitate") as numbers:
        numbers |= {"steps": 90.0, "loss": 0.21, "loss_last": 0.15}
        steps(store.seed_of(run_dir).policy, 90, "imitate")
    for t in range(count):
        with stage("sample", round=t) as numbers:
            made = [
                trajectory(f"calc-{i}", n, t, Grade.RESOLVED if rng.random() < 0.3 + 0.15 * t else Grade.UNRESOLVED)
                for i, n in itertools.product(range(tasks), range(samples))
            ]
            out = products(run_dir, t, made)
            numbers |= {"answered": float(len(made)), "entropy": 0.61 - 0.02 * t}
        with stage("prefer", round=t) as numbers:
            pairs = [Pair(task_id=f"calc-{i}", chosen=0, rejected=1) for i in range(tasks - t)]
            numbers["pairs"] = float(store.write(out.preferences, Pair, pairs))
        with stage("fit", round=t) as numbers:
            steps(out.policy, 30 + 10 * t, t)
            numbers |= {"steps": 30.0, "loss": 0.6}
    for name, shift in (("-seed", 0.0), ("", 0.1)):
        numbers = {
            "tasks": 50.0,
            "resolved_rate": 0.3 + shift,
            "resolved_rate_low": 0.2 + shift,
            "resolved_rate_high": 0.42 + shift,
            "pass_at_1": 0.25 + shift,
            "pass_at_1_low": 0.2 + shift,
            "pass_at_1_high": 0.3 + shift,
            "entropy": 0.6,
        }
        (run_dir / f"evaluation{name}.json").write_text(json.dumps(numbers))
    return run_dir


class Page(HTMLParser):
    """The text of a page, its tags, links, and what it would load."""

    VOID = frozenset({"meta", "line", "circle", "polyline", "br"})

    def __init__(self, path):
        super().__init__()
        self.tags, self.links, self.loads, self.text, self.open = [], [], [], [], []
        self.feed(path.read_text())
        assert self.open == [], "unclosed"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        attrs = dict(attrs)
        self.links += [attrs["href"]] if tag == "a" else []
        self.loads += [v for k, v in attrs.items() if k in ("src", "srcset") or (k == "href" and tag != "a")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def says(self, words):
        return words in "".join(self.text)


def test_a_run_without_anything_is_a_page_too(tmp_path):
    page = Page(report.write(tmp_path / "empty"))
    assert page.says("No round is sampled yet.")
    assert "table" not in page.tags
    assert "no round is sampled yet" in report.table(tmp_path / "empty")


def test_a_round_without_preferences_or_policy_is_shown(tmp_path):
    products(tmp_path, 0, [trajectory(sample=0), trajectory(sample=1, grade=Grade.UNRESOLVED)])
    (row,) = report.rounds(tmp_path)
    assert (row.pairs, row.entropy, row.best_k, row.seconds) == (None, None, None, {})
    assert (row.pass_1, row.pass_k, row.both) == (0.5, 1.0, 1)
    page = Page(report.write(tmp_path))
    assert page.says("pass@2")


def test_numbers_equal_those_counted_by_hand(tmp_path):
    grades = {
        "a": [Grade.RESOLVED, Grade.RESOLVED, Grade.UNRESOLVED, Grade.EMPTY],
        "b": [Grade.UNRESOLVED, Grade.TIMEOUT, Grade.FLAKY, Grade.TAMPERED],
        "c": [Grade.RESOLVED, None, None, Grade.UNRESOLVED],  # two lost: they are no failures
    }
    products(tmp_path, 0, [trajectory(task, n, grade=g) for task, gs in grades.items() for n, g in enumerate(gs)])
    (row,) = report.rounds(tmp_path)
    assert row.pass_1 == pytest.approx((2 / 4 + 0 / 4 + 1 / 2) / 3)
    assert row.pass_k == pytest.approx(2 / 3)
    assert (row.tasks, row.attempts, row.samples, row.lost, row.flaky, row.both) == (3, 12, 4, 2, 1, 2)
    # 1.96 x standard error of (.5, 0, .5)
    assert row.pass_1_error == pytest.approx(1.96 * (1 / 12) ** 0.5 / 3**0.5)


def test_the_best_attempt_is_chosen_by_visible_tests_alone():
    right = attempt(0, Grade.RESOLVED, failed=("hidden",))
    wrong = attempt(1, Grade.UNRESOLVED, failed=("v1",))
    assert report.best_of([right, wrong], ["v1", "v2"]) == 1.0
    assert report.best_of([right, wrong], ["v2"]) == 0.5  # nothing visible tells them apart
    hidden = attempt(2, Grade.UNRESOLVED, failed=("hidden", "more"))
    assert report.best_of([right, hidden], ["v1"]) == 0.5  # hidden tests must not tell


def test_unfinished_and_unrun_attempts_rank_last():
    unfinished = attempt(0, Grade.RESOLVED, stop=Stop.TOKEN)
    broken = attempt(1, Grade.UNRESOLVED, failed=("v1", "v2"))
    assert report.best_of([unfinished, broken], ["v1", "v2"]) == 0.0
    empty = attempt(2, Grade.EMPTY, passed=())
    assert report.best_of([empty, attempt(3, Grade.RESOLVED, failed=("v1", "v2"))], ["v1", "v2"]) == 1.0


def test_ties_are_averaged_whatever_their_order():
    grades = [Grade.RESOLVED, Grade.UNRESOLVED, Grade.RESOLVED]
    tied = [attempt(n, g) for n, g in enumerate(grades)]
    assert {report.best_of(order, ["v1"]) for order in itertools.permutations(tied)} == {2 / 3}


def test_the_table_of_the_terminal_has_a_line_for_each_round(tmp_path):
    run_dir = whole_run(tmp_path / "run")
    head, *lines = report.table(run_dir).splitlines()
    assert [word for word in head.split() if word.endswith("@4")] == ["pass@4", "best@4"]
    assert [line.split()[0] for line in lines] == ["0", "1"]
    assert len({len(line) for line in [head, *lines]}) == 1  # columns are aligned


def test_the_page_of_a_whole_run_is_whole_and_stands_alone(tmp_path):
    run_dir = whole_run(tmp_path / "run")
    path = report.write(run_dir)
    assert path == run_dir / "report.html"
    page = Page(path)
    assert page.loads == []
    assert "script" not in page.tags
    assert "url(" not in path.read_text()
    for words in ("pass@1", "Held-out tasks", "[0.300, 0.520]", "Loss of imitation", "Training", "imitate"):
        assert page.says(words), words
    assert page.links
    assert all((run_dir / link).is_file() for link in page.links)
    assert report.write(run_dir).read_text() == path.read_text()  # the same products, the same page


def test_failed_stages_are_said(tmp_path):
    stage = observe.stages(tmp_path)
    with pytest.raises(OSError, match="full"), stage("sample", round=0):
        raise OSError(f"disk full {EVIL}")
    page = Page(report.write(tmp_path))
    assert page.says(f"OSError: disk full {EVIL}")
    assert "script" not in page.tags


def test_what_policies_and_tests_say_is_escaped(tmp_path):
    products(tmp_path, 0, [trajectory("../evil/<b>", 0), trajectory("../evil/<b>", 1, grade=Grade.UNRESOLVED)])
    page = Page(report.write(tmp_path))
    assert len(page.links) == 2
    for link in page.links:
        path = tmp_path / link
        assert path.parent == tmp_path / "report"  # a task's name leads nowhere else
        attempt_page = Page(path)
        assert "script" not in attempt_page.tags
        assert attempt_page.tags.count("b") == 1  # our own, around the grade
        assert attempt_page.says(EVIL)


def test_long_observations_are_folded_and_none_is_cut(tmp_path):
    products(tmp_path, 0, [trajectory()])
    page = Page(report.trajectory(tmp_path, round=0, task_id="t", sample=0))
    assert page.tags.count("details") == 1
    assert page.says("line 44 of")


def test_an_attempt_that_does_not_exist_is_refused(tmp_path):
    products(tmp_path, 0, [trajectory()])
    with pytest.raises(ValueError, match="task=t sample=7: not among the trajectories of round 0"):
        report.trajectory(tmp_path, round=0, task_id="t", sample=7)


def test_shade_grows_with_surprise_and_no_letter_is_lost():
    def decode(ids):
        return bytes(ids).decode(errors="replace")

    text = "a <é> b"
    ids = list(text.encode())
    html = report.shaded(ids, [-0.001] * 3 + [-1.0, -2.0] + [-3.0] * (len(ids) - 5), decode)
    shown = ET.fromstring(f"<p>{html}</p>")
    assert "".join(shown.itertext()) == text
    shades = [float(span.get("style").rpartition(",")[2].rstrip(")")) for span in shown]
    assert shades == sorted(shades)
    assert shown.find("span").text == "é"  # two bytes, two tokens, one letter


def test_contrasts_have_both_sides_and_the_most_even_task_comes_first():
    def of(task, resolved, count):
        grades = [Grade.RESOLVED] * resolved + [Grade.UNRESOLVED] * (count - resolved)
        return [dataclasses.replace(attempt(n, g), task_id=task) for n, g in enumerate(grades)]

    found = report.contrasts([*of("all", 4, 4), *of("odd", 1, 4), *of("even", 2, 4), *of("none", 0, 4)])
    assert [good.task_id for good, _ in found] == ["even", "odd"]
    assert all(good.grade is Grade.RESOLVED and bad.grade is Grade.UNRESOLVED for good, bad in found)


@pytest.mark.parametrize(("xs", "ys"), [([0], [0.5]), ([0, 1], [0.0, 0.0]), ([3, 9], [-5.0, 1e6]), ([0, 1], [1e-9, 0])])
def test_plots_hold_their_points(xs, ys):
    svg = ET.fromstring(page.plot([page.Series("a<b", xs, ys)], x="step"))
    dots = [(float(c.get("cx")), float(c.get("cy"))) for c in svg.iter("circle")]
    assert len(dots) == len(xs)
    width, height = (float(v) for v in svg.get("viewBox").split()[2:])
    assert all(0 <= x <= width and 0 <= y <= height for x, y in dots)
    assert len(list(svg.iter("text"))) >= 4


def test_a_plot_of_nothing_is_nothing():
    assert page.plot([page.Series("a", [], [])], x="round") == ""


def job(*words):
    command = [sys.executable, "jobs/report.py", *words]
    env = os.environ | {"PYTHONPATH": str(HERE)}
    return subprocess.run(command, cwd=HERE, env=env, capture_output=True, text=True, timeout=60)


def test_the_job_prints_table_and_page(tmp_path):
    run_dir = whole_run(tmp_path / "run", tasks=3)
    words = [str(run_dir / "config.yaml")]
    done = job(*words)
    assert done.returncode == 0, done.stderr
    assert f"report: {run_dir / 'report.html'}" in done.stdout
    one = job(*words, "round=1", "task=calc-2", "sample=3")
    assert one.returncode == 0, one.stderr
    assert Path(one.stdout.strip().removeprefix("report: ")).is_file()
    bad = job(*words, "task=calc-2", "sample=x")
    assert (bad.returncode, bad.stderr) == (2, "error: sample=x: must be a whole number, at least 0\n")


def test_a_scatter_names_its_points_and_keeps_them_inside():
    svg = ET.fromstring(page.scatter([("seed", 30.0, 80.0), ("dpo:<1>", 55.0, 76.0)], x="pass@1", y="pass@8"))
    circles = [node for node in svg.iter() if node.tag.endswith("circle")]
    assert len(circles) == 2
    width, height = map(float, svg.get("viewBox").split()[2:])
    assert all(0 < float(node.get("cx")) < width and 0 < float(node.get("cy")) < height for node in circles)
    assert float(circles[0].get("cx")) < float(circles[1].get("cx"))
    assert float(circles[0].get("cy")) < float(circles[1].get("cy"))  # higher is less far down
    assert "dpo:<1>" in "".join(svg.itertext())
    assert page.scatter([], x="a", y="b") == ""
