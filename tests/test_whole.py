"""The whole loop with every real part: pack, teacher, vLLM, sandboxes, DeepSpeed, Serve, and resume after SIGKILL.

A handful of tasks is learnt by heart, so that the policy solves some attempts and not others within minutes; what this
does not cover is generalisation, which `make iterate` and `make evaluate` show.
"""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from entropo_ray import store
from entropo_ray.records import Outcome, Pair, Trajectory

HERE = Path(__file__).resolve().parent.parent
SMALL = [
    "conf/local.yaml",
    "rounds=1",
    "pack.count=6",
    "pack.held_out=2",
    "pack.practice=0",
    "sft.split=train",
    "sft.samples=8",
    "sft.epochs=30",
    "rollout.tasks=6",
    "rollout.samples=8",
    "evaluate.samples=2",
    "evaluate.tasks.split=train",
    "evaluate.tasks.limit=3",
    "verifier.epochs=1",
]


def words(home):
    return [*SMALL, f"run_dir={home}/run", f"tasks.path={home}/pack", f"evaluate.tasks.path={home}/pack"]


def job(name, home, *more, timeout=420):
    command = [sys.executable, f"jobs/{name}.py", *words(home), *more]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def stages(home):
    lines = [json.loads(line) for line in (home / "run" / "stages.jsonl").read_text().splitlines()]
    return [(line["stage"], line["ok"]) for line in lines if line["stage"] != "start"]


def killed_while(home, reached, *, timeout_s=240):
    """jobs/iterate.py, killed by SIGKILL once `reached()` holds."""
    command = [sys.executable, "jobs/iterate.py", *words(home)]
    driver = subprocess.Popen(command, cwd=HERE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    give_up = time.monotonic() + timeout_s
    try:
        while not reached():
            assert driver.poll() is None, "the job ended before it was killed"
            assert time.monotonic() < give_up, f"not reached in {timeout_s} s"
            time.sleep(0.2)
    finally:
        driver.kill()
        driver.wait(30)
    assert driver.returncode == -signal.SIGKILL


@pytest.mark.ray
@pytest.mark.slow
def test_an_agent_is_trained_killed_resumed_and_evaluated(tmp_path):
    job("pack", tmp_path)
    job("sft", tmp_path)
    out = store.round_of(tmp_path / "run", 0)

    killed_while(tmp_path, lambda: len(list(out.trajectories.glob("part-*.parquet"))) >= 12)
    kept = {part.name: part.stat().st_mtime_ns for part in out.trajectories.glob("part-*.parquet")}
    keys = store.keys(out.trajectories)
    assert len(keys) == len(kept) < 48

    # killed in the update: trajectories and preferences are whole, and only the update is done again
    killed_while(tmp_path, lambda: list(out.policy.parent.glob(".policy*.partial/steps.jsonl")))
    assert store.done(out.trajectories)
    assert store.done(out.preferences)
    assert not store.done(out.policy)
    rows = list(store.read(out.trajectories, Outcome))
    assert len(rows) == len({(row.task_id, row.sample) for row in rows}) == 48  # none lost, none twice
    assert keys <= {(row.task_id, row.sample) for row in rows}

    job("iterate", tmp_path)
    assert [name for name, _ in stages(tmp_path)][-1:] == ["fit"]
    assert [name for name, ok in stages(tmp_path) if ok].count("sample") == 1
    assert store.done(out.policy)
    assert (tmp_path / "run" / "report.html").is_file()
    resolved = {(row.task_id, row.sample): row.resolved for row in rows}
    for pair in store.read(out.preferences, Pair):
        assert resolved[pair.task_id, pair.chosen]
        assert resolved[pair.task_id, pair.rejected] is False

    before = len(stages(tmp_path))
    job("iterate", tmp_path)
    assert len(stages(tmp_path)) == before  # a finished run computes nothing

    job("verifier", tmp_path)
    job("evaluate", tmp_path)
    numbers = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert 0 <= numbers["pass_at_1"] <= numbers["pass_at_2"] <= 1
    assert numbers["pass_at_1_low"] <= numbers["pass_at_1"] <= numbers["pass_at_1_high"]
    predictions = (tmp_path / "run" / "evaluation" / "choice" / "predictions.jsonl").read_text().splitlines()
    assert [set(json.loads(line)) for line in predictions] == [{"instance_id", "model_name_or_path", "model_patch"}] * 3
    for trajectory in store.read(out.trajectories, Trajectory):
        spans = sum(turn.stop - turn.start for turn in trajectory.turns)
        assert spans == trajectory.num_actions == sum(trajectory.action_mask)
    assert not [home for home in Path("/proc").glob("[0-9]*") if _mentions(home, str(tmp_path))]


def _mentions(home, text):
    """Whether a process's command line holds a text; this process and its ancestors do not count."""
    try:
        return text in (home / "cmdline").read_text() and "pytest" not in (home / "cmdline").read_text()
    except OSError:
        return False  # it ended while we looked
