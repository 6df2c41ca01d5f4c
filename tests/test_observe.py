"""observe: stage lines survive what happens in a stage, progress is short, and a job ends by whose fault it is."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from entropo_ray import config, observe

HERE = Path(__file__).resolve().parent.parent


def said(run_dir, *, starts=False):
    return [line for line in observe.lines(run_dir) if starts or line["stage"] != "start"]


def test_the_start_line_says_what_was_called_with_what(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["jobs/iterate.py", "conf/local.yaml"])
    observe.stages(tmp_path / "run")
    (line,) = said(tmp_path / "run", starts=True)
    assert line["argv"] == ["jobs/iterate.py", "conf/local.yaml"]
    assert line["package"] == str(HERE / "entropo_ray")
    assert line["versions"]["python"] == sys.version.split()[0]
    assert {"ray", "torch"} <= line["versions"].keys()


def test_a_stage_leaves_its_numbers(tmp_path, capsys):
    stage = observe.stages(tmp_path)
    with stage("fit", round=2) as numbers:
        numbers |= {"loss": 0.25, "steps": 4.0, "kl": float("nan")}
    (line,) = said(tmp_path)
    assert (line["stage"], line["round"], line["ok"], line["loss"], line["steps"]) == ("fit", 2, True, 0.25, 4.0)
    assert line["kl"] is None  # NaN is no JSON
    assert line["seconds"] >= 0
    assert line["at"].endswith("Z")
    out = capsys.readouterr().out.splitlines()
    assert out[-2][10:] == "round 2  fit  started"
    assert "loss 0.25" in out[-1]


def run_stage(stage, error):
    with stage("sample") as numbers:
        numbers |= {"answered": 3.0, "seconds": -1.0}
        raise error


@pytest.mark.parametrize("error", [RuntimeError("no\nmemory"), KeyboardInterrupt(), SystemExit(3)])
def test_a_stage_that_raises_leaves_its_line_and_raises_on(tmp_path, error):
    stage = observe.stages(tmp_path)
    with pytest.raises(type(error)):
        run_stage(stage, error)
    (line,) = said(tmp_path)
    assert (line["ok"], line["answered"], line["round"]) == (False, 3.0, None)
    assert line["seconds"] >= 0  # the stage's own clock is not the stage line's
    assert line["error"].startswith(type(error).__name__)
    assert "\n" not in line["error"]


def test_a_stage_reports_the_memory_of_our_processes_unless_it_says_better(tmp_path):
    if not Path("/proc/self/statm").exists():
        pytest.skip("no /proc here")
    stage = observe.stages(tmp_path)
    child = "x = bytearray(300 << 20); import sys; print(1, flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", child]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        with stage("with"):
            time.sleep(0.3)
        with stage("own") as numbers:
            numbers["peak_gib"] = 42.0
        process.stdin.close()
    measured, own = said(tmp_path)
    assert 0.29 < measured["peak_gib"] < 4
    assert own["peak_gib"] == 42.0


def test_a_torn_line_spoils_neither_the_lines_before_nor_after(tmp_path):
    stage = observe.stages(tmp_path)
    with stage("first"):
        pass
    with stage.path.open("a") as file:
        file.write('{"at": "2026-01-01T00:00:00Z", "stage": "to')
    with stage("second"):
        pass
    assert [line["stage"] for line in said(tmp_path)] == ["first", "second"]


def test_a_run_without_stages_has_no_lines(tmp_path):
    assert observe.lines(tmp_path) == []


def test_the_log_of_the_driver_is_kept_beside_the_run(tmp_path):
    stage = observe.stages(tmp_path)
    with stage("fit"):
        observe.log.warning("a rank was lost")
    (file,) = (tmp_path / "logs").glob("driver-*.log")
    assert "WARNING a rank was lost" in file.read_text()


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_progress_says_a_line_at_most_every_ten_seconds_and_the_last(capsys):
    clock = Clock()
    done = observe.progress("sample", 100, clock=clock)
    for _ in range(100):
        clock.now += 0.4
        done.step(resolved=0.5)
    lines = [line[10:] for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 4  # 40 s: three in between, and the end
    assert lines[0] == "sample  25/100  2.5/s  30.0 s left  resolved 0.5"
    assert lines[-1] == "sample  100/100  2.5/s  in 40.0 s  resolved 0.5"


def test_progress_that_is_cut_short_says_how_far_it_came(capsys):
    clock = Clock()
    with observe.progress("grade", 10, clock=clock) as done:
        clock.now += 60
        done.step(3)
    assert capsys.readouterr().out.splitlines()[-1][10:] == "grade  3/10  3.0/min  2 min 20 s left"


def test_nothing_done_says_nothing(capsys):
    with observe.progress("grade", 0):
        pass
    assert capsys.readouterr().out == ""


def test_a_terminal_has_one_line_rewritten_in_place(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    clock = Clock()
    with observe.progress("sample", 3, clock=clock) as done:
        clock.now += 1
        done.step()
        observe.log.info("in between")
    out = capsys.readouterr().out
    assert out.count("\n") == 2  # the line in between and the last one
    drawn = "\r\x1b[Ksample  1/3"
    assert out.startswith(drawn)
    assert out.count("sample  1/3") == 3  # drawn, drawn again below the line in between, and the last line


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (59.94, "59.9 s"), (61, "1 min 01 s"), (3600, "1 h 00 min"), (7625, "2 h 07 min")],
)
def test_durations_are_for_people(seconds, text):
    assert observe.duration(seconds) == text


JOB = '''"""A job for a test.

    python job.py [key=value ...]
"""
import os, signal, sys, time
from pathlib import Path
from entropo_ray import config, observe

def main(cfg):
    what = cfg.sft.base
    if what == "refuse":
        raise ValueError("tasks.path=x: nothing\\nthere")
    stage = observe.stages(cfg.run_dir)
    with stage("work"):
        if what == "break":
            raise OSError("disk")
        if what == "refuse late":
            raise ValueError("train.lr=1: too\\nhigh")
        if what == "wait":
            Path(cfg.run_dir, "ready").write_text("")
            time.sleep(60)

observe.entry(main)
'''


def job(tmp_path, *words):
    file = tmp_path / "job.py"
    file.write_text(JOB)
    command = [sys.executable, str(file), "model=m", f"run_dir={tmp_path / 'run'}", *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, text=True, cwd=HERE, env=os.environ | {"PYTHONPATH": str(HERE)}, **pipes)


def ended(process):
    out, err = process.communicate(timeout=30)
    return process.returncode, out, err


def test_a_job_that_ends_well_returns_zero(tmp_path):
    code, out, err = ended(job(tmp_path))
    assert (code, err) == (0, "")
    assert "work  started" in out


@pytest.mark.parametrize("words", [["modle=x"], ["sft.base=refuse"], ["train.lr=0"], ["nothere.yaml"]])
def test_the_users_mistake_is_one_line_and_exit_code_two(tmp_path, words):
    code, _, err = ended(job(tmp_path, *words))
    assert code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_a_late_refusal_keeps_its_traceback_in_the_log(tmp_path):
    code, _, err = ended(job(tmp_path, "sft.base=refuse late"))
    assert code == 2
    first, second = err.splitlines()
    assert first == "error: train.lr=1: too high"
    assert "Traceback" in Path(second.removeprefix("traceback: ")).read_text()


def test_what_nobody_expected_keeps_its_traceback(tmp_path):
    code, _, err = ended(job(tmp_path, "sft.base=break"))
    assert code == 1
    assert err.strip().endswith("OSError: disk")
    assert said(tmp_path / "run")[0]["ok"] is False


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_job_leaves_its_line_and_says_how_to_go_on(tmp_path, number, code):
    process = job(tmp_path, "sft.base=wait")
    deadline = time.monotonic() + 20
    while not (tmp_path / "run" / "ready").exists():
        assert time.monotonic() < deadline, "the job did not start"
        time.sleep(0.02)
    process.send_signal(number)
    returned, _, err = ended(process)
    assert returned == code
    assert err == "interrupted: what is finished is kept; the same command goes on from there\n"
    assert said(tmp_path / "run")[0]["ok"] is False


def test_help_says_what_the_job_does_and_every_key(tmp_path):
    code, out, _ = ended(job(tmp_path, "--help"))
    assert code == 0
    assert out.startswith("A job for a test.")
    shown = {line.split("=")[0].strip() for line in out.splitlines() if "=" in line}
    assert set(config.keys(config.Run)) <= shown


def test_what_is_in_the_environment_already_stays(tmp_path, monkeypatch):
    for key in ("PYTHONPATH", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "HF_HUB_OFFLINE", "RAY_ADDRESS"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setattr(os, "environ", os.environ.copy() | {"RAY_DATA_DISABLE_PROGRESS_BARS": "0"})
    cfg = config.load(config.Run, ["model=org/name", "run_dir=r"])
    observe._environment(cfg)
    assert os.environ["RAY_DATA_DISABLE_PROGRESS_BARS"] == "0"
    assert os.environ["PYTHONPATH"].split(os.pathsep)[0] == str(HERE)
    assert "HF_HUB_OFFLINE" not in os.environ  # a hub name may have to be fetched
    observe._environment(config.load(config.Run, [f"model={tmp_path}", "run_dir=r"]))
    assert os.environ["HF_HUB_OFFLINE"] == "1"


CLUSTER = """
import logging, os, signal, sys
from entropo_ray import config, observe
cfg = config.load(config.Run, ["model=m", "run_dir=r", "ray_cpus=3", "rollout.episodes=5", "rollout.graders=2"])

def here(row):
    import entropo_ray
    return {"package": [entropo_ray.__file__]}

signal.signal(signal.SIGTERM, observe._terminate)
with observe.cluster(cfg):
    import ray
    assert ray.cluster_resources()["CPU"] == 3 and ray.cluster_resources()["sandbox"] == 7
    assert signal.getsignal(signal.SIGTERM) is observe._terminate
    rows = ray.data.range(1).map_batches(here, batch_size=1).take_all()
    print(rows[0]["package"])
    gauge = observe.gauge("entropo_test", "a test", ["room"])
    gauge.set(1, {"room": "observe"})
assert not ray.is_initialized()
"""


@pytest.mark.ray
def test_a_local_cluster_carries_our_package_and_no_chatter(tmp_path):
    clean = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", CLUSTER],
        cwd=tmp_path,
        env=clean | {"PYTHONPATH": str(HERE)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() == str(HERE / "entropo_ray" / "__init__.py")


def test_numbers_of_stages_are_strict_json(tmp_path):
    stage = observe.stages(tmp_path)
    with stage("x") as numbers:
        numbers["bad"] = float("inf")
    for line in stage.path.read_text().splitlines():
        json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
