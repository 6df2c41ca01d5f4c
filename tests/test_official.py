"""Laws of the official numbers: what is refused before the start, what is read back, and where two graders agree.

The harness's own functions write what is read here; only its containers are missing.
"""

import json
import os
import subprocess
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path

import pytest

from entropo_ray import official
from entropo_ray.records import Grade, Graded, Prediction
from entropo_ray.sandbox import SandboxError
from entropo_ray.tasks import scripts

MODEL, RUN = "owner/model", "run-1"
TESTS = {"FAIL_TO_PASS": ["t.py::test_a", "t.py::test_b"], "PASS_TO_PASS": ["t.py::test_c"]}
SCRIPT = f"#!/bin/bash\n: '{scripts.START}'\npytest -rA\n: '{scripts.END}'\n"


def row(key, **more):
    fixed = {"image": "local/x:1", "repo": "o/n", "version": "1", "log_parser": "parse_log_pytest"}
    return {"instance_id": key, **fixed, **TESTS, "eval_type": "pass_and_fail", "eval_script": SCRIPT, **more}


def prediction(key, patch="diff --git a/x b/x\n"):
    return Prediction(instance_id=key, model_name_or_path=MODEL, model_patch=patch)


def log_of(statuses, code):
    lines = [f"{status} {test}" for test, status in statuses.items()]
    return "\n".join([f"+ : '{scripts.START}'", *lines, f"+ : '{scripts.END}'", f">>>>> Test Exit Code: {code}", ""])


PASSED = dict.fromkeys((*TESTS["FAIL_TO_PASS"], *TESTS["PASS_TO_PASS"]), "PASSED")
CASES = {
    "good": log_of(PASSED, 0),
    "wrong": log_of(PASSED | {"t.py::test_b": "FAILED", "t.py::test_c": "ERROR"}, 1),
    "silent": "nothing at all\n",
    "memory": "OutOfMemoryError\n",
    "junk": ">>>>> Patch Apply Failed:\nerror: patch failed: x:1\nerror: x: patch does not apply",
    "slow": "Test timed out after 7 seconds.",
    "lost": "Image local/x:1 not found for lost",
    "empty": None,
}
RAISED = ("junk", "slow", "lost")


@pytest.fixture
def ended(tmp_path, monkeypatch):
    """A run that ended, in the words of the harness's own functions."""
    from swebench.harness.reporting import make_run_report

    monkeypatch.chdir(tmp_path)
    asked = [prediction(key, "" if text is None else "diff --git a/x b/x\n") for key, text in CASES.items()]
    for key, text in CASES.items():
        if text is not None:
            _instance(key, text)
    lines = {
        p.instance_id: {"model_name_or_path": MODEL, "model_patch": p.model_patch, "instance_id": p.instance_id}
        for p in asked
    }
    make_run_report(lines, [row(key) for key in CASES], RUN, None, "report")
    return tmp_path, asked


def _instance(key, text):
    """What the harness writes for one instance: a report of a log, or the log of an error."""
    from swebench.harness.grading import get_eval_report
    from swebench.harness.utils import EvaluationError, make_test_spec
    from swebench.logger import close_logger, setup_logger

    home = Path("logs/run_evaluation", RUN, MODEL.replace("/", "__"), key)
    home.mkdir(parents=True)
    logger = setup_logger(key, home / "run_instance.log")
    if key in RAISED:
        try:
            raise EvaluationError(key, text, logger)
        except EvaluationError:
            logger.info(traceback.format_exc())
    else:
        (home / "test_output.txt").write_text(text)
        given = {"instance_id": key, "model_patch": "x", "model_name_or_path": MODEL}
        report = get_eval_report(make_test_spec(row(key)), given, str(home / "test_output.txt"), True)
        (home / "report.json").write_text(json.dumps(report, indent=4))
    close_logger(logger)


# What it left


def test_every_ending_is_read_back_in_our_words(ended):
    folder, asked = ended
    report = official.read(folder, asked, run_id=RUN)
    grades = {result.task_id: result.grade for result in report.results}
    assert grades == {
        "good": Grade.RESOLVED,
        "wrong": Grade.UNRESOLVED,
        "silent": Grade.UNRESOLVED,
        "memory": None,  # its surroundings failed, so that it says nothing of the patch
        "junk": Grade.PATCH_FAILED,
        "slow": Grade.TIMEOUT,
        "lost": None,
        "empty": Grade.EMPTY,
    }
    assert [result.task_id for result in report.results if result.resolved] == ["good"]
    assert report.infra == ("memory",)


def test_each_verdict_says_why(ended):
    folder, asked = ended
    said = {result.task_id: result.reason for result in official.read(folder, asked, run_id=RUN).results}
    assert said == {
        "good": "",
        "wrong": "2 tests, t.py::test_b",
        "silent": "no test log",
        "memory": "out_of_memory: no test log",
        "junk": "error: x: patch does not apply",
        "slow": "Test timed out after 7 seconds.",
        "lost": "Image local/x:1 not found for lost",
        "empty": "the patch is empty",
    }


def test_the_tests_that_failed_are_named(ended):
    folder, asked = ended
    found = {result.task_id: result.failed for result in official.read(folder, asked, run_id=RUN).results}
    assert found["wrong"] == ("t.py::test_b", "t.py::test_c")
    assert found["good"] == found["junk"] == ()


def test_a_report_that_was_cut_off_is_no_verdict(ended):
    folder, asked = ended
    path = folder / "logs/run_evaluation" / RUN / "owner__model/wrong/report.json"
    path.write_text(path.read_text()[:40])
    assert {r.task_id: r.grade for r in official.read(folder, asked, run_id=RUN).results}["wrong"] is None


def test_a_run_without_a_summary_is_no_run(ended):
    folder, asked = ended
    with pytest.raises(
        ValueError, match=r"owner__model\.run-2\.json is missing: the run run-2 did not come to its end"
    ):
        official.read(folder, asked, run_id="run-2")


def test_a_summary_that_contradicts_its_parts_is_named(ended):
    folder, asked = ended
    path = folder / f"report/owner__model.{RUN}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"resolved_ids": ["good", "wrong"]}))
    with pytest.raises(ValueError, match="wrong is resolved there or in its own report, not in both"):
        official.read(folder, asked, run_id=RUN)


# Agreement


def graded(key, grade):
    return Graded(task_id=key, sample=0, grade=grade, verdict=None)


def test_graders_agree_where_both_say_resolved_or_both_do_not(ended):
    folder, asked = ended
    report = official.read(folder, asked, run_id=RUN)
    ours = [graded("slow", Grade.UNRESOLVED), graded("wrong", Grade.RESOLVED), graded("good", Grade.RESOLVED)]
    ours += [graded("silent", Grade.TAMPERED), graded("memory", Grade.RESOLVED), graded("more", Grade.EMPTY)]
    ours += [graded("junk", None)]
    compared = official.agreement(report, ours)
    assert {c.task_id: c.agree for c in compared} == {
        "good": True,
        "wrong": False,
        "silent": True,
        "memory": None,
        "junk": None,
        "slow": True,
        "lost": None,
        "empty": None,
        "more": None,
    }
    lines = official.table(compared).splitlines()
    parted = "wrong: official unresolved (2 tests, t.py::test_b), ours resolved"
    assert sum(int(line.split()[-1]) for line in lines[1 : lines.index(parted)]) == 9
    assert lines[lines.index(parted) + 1 :] == [
        "empty: official empty (the patch is empty), ours none",
        "junk: official patch_failed (error: x: patch does not apply), ours none",
        "lost: official none (Image local/x:1 not found for lost), ours none",
        "memory: official none (out_of_memory: no test log), ours resolved",
        "more: official none (no prediction), ours empty",
    ]


def test_two_verdicts_of_ours_on_a_task_are_refused(ended):
    folder, asked = ended
    report = official.read(folder, asked, run_id=RUN)
    with pytest.raises(ValueError, match="two verdicts of ours on good; the harness takes one prediction a task"):
        official.agreement(report, [graded("good", Grade.EMPTY)] * 2)


# Before the start

GOOD = prediction("a")
REFUSED = {
    "unknown id": ([row("a")], [GOOD, prediction("b")], "b: a prediction without a row"),
    "id twice": ([row("a")], [GOOD, GOOD], "two predictions share an id: 'a'"),
    "row twice": ([row("a"), row("a")], [GOOD], "two rows share an id: 'a'"),
    "no line feed": ([row("a")], [prediction("a", "diff")], "a: its patch does not end in a line feed"),
    "white space": ([row("a")], [prediction("a", " \n")], "a: its patch is white space; an empty one is ''"),
    "no UTF-8": ([row("a")], [prediction("a", "\udcff\n")], "a: its patch is no UTF-8: "),
    "no parser": ([row("a", log_parser=None)], [GOOD], "row a: column log_parser is missing; see swebench 5"),
    "no F2P": ([row("a", FAIL_TO_PASS="[]")], [GOOD], "row a: FAIL_TO_PASS is empty: every patch would resolve it"),
    "two models": (
        [row("a"), row("b")],
        [GOOD, replace(prediction("b"), model_name_or_path="x")],
        "model_name_or_path=owner/model, x: give all one name",
    ),
    "no model": ([row("a")], [], "model_name_or_path=none"),
    "way out": ([row("a")], [replace(GOOD, model_name_or_path="../x")], "model_name_or_path=../x: give all one name"),
    "odd id": ([row("../a")], [prediction("../a")], "'../a': letters, digits and _ . - make an id"),
}


@pytest.mark.parametrize(("table", "asked", "complaint"), REFUSED.values(), ids=REFUSED.keys())
def test_what_the_harness_would_stumble_over_is_refused_before_the_start(tmp_path, table, asked, complaint):
    with pytest.raises(ValueError, match=r"^official: [^\n]*$") as caught:
        official.run(table, asked, to=tmp_path / "run")
    assert complaint in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_the_harness_itself_does_stumble_over_a_missing_column():
    """Why they are checked: its own word is a bare name."""
    from swebench.harness.utils import make_test_spec

    for column in ("image", "version", "log_parser", "eval_type", "eval_script"):
        broken = {key: value for key, value in row("a").items() if key != column}
        with pytest.raises(KeyError, match=f"^'{column}'$"):
            make_test_spec(broken)
        with pytest.raises(ValueError, match=f"column {column} is missing"):
            official.check([broken], [GOOD], run_id=RUN)


@pytest.mark.parametrize(
    ("how", "complaint"),
    [
        ({"workers": 0}, "workers=0, timeout_s=1800: both have to be 1 or more"),
        ({"timeout_s": 0}, "workers=1, timeout_s=0: both have to be 1 or more"),
        ({"run_id": "a/b"}, "run_id='a/b': letters, digits and _ . - make a run id"),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path, how, complaint):
    with pytest.raises(ValueError, match=complaint):
        official.run([row("a")], [GOOD], to=tmp_path / "run", **how)


def test_a_directory_that_holds_something_is_in_the_way(tmp_path):
    (tmp_path / "logs").mkdir()
    with pytest.raises(ValueError, match="is in the way; give an empty or a new directory"):
        official.run([row("a")], [GOOD], to=tmp_path)


# The engine


def command(folder, text):
    """A `docker` command in front of all others."""
    folder.mkdir()
    (folder / "docker").write_text(f'#!/bin/sh\necho "$@" >> {folder}/words\n{text}\n')
    (folder / "docker").chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def test_a_node_without_the_command_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="official: no `docker` command on PATH"):
        official.run([row("a")], [GOOD], to=tmp_path / "run")


def test_an_engine_that_does_not_answer_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/none.sock")
    monkeypatch.setenv("PATH", command(tmp_path / "bin", "echo 'Cannot connect to the Docker daemon' >&2; exit 1"))
    with pytest.raises(SandboxError, match=r"no Docker engine at DOCKER_HOST=unix://.*none\.sock: Cannot connect"):
        official.run([row("a")], [GOOD], to=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_missing_image_is_named_before_anything_starts(tmp_path, monkeypatch):
    has = 'case "$*" in *lacking*) exit 1;; esac'
    monkeypatch.setenv("PATH", command(tmp_path / "bin", has))
    table = [row("a"), row("b", image="lacking:1"), row("c", image="lacking:2")]
    with pytest.raises(ValueError, match=r"image lacking:1 is not on this node; load it first: docker pull lacking:1"):
        official.run(table, [GOOD, prediction("b")], to=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    official._check_engine({"local/x:1"})


def test_a_harness_that_fails_is_the_machines_fault_and_keeps_its_last_words(tmp_path, monkeypatch):
    """The harness is the real one: it finds no engine where the command said there is one."""
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/none.sock")
    monkeypatch.setenv("PATH", command(tmp_path / "bin", "exit 0"))
    with pytest.raises(SandboxError, match=r"ended with exit code 1: .*(No such file|Connection)"):
        official.run([row("a"), row("b")], [GOOD], to=tmp_path / "run", run_id=RUN)
    assert [json.loads(line) for line in (tmp_path / "run/rows.jsonl").read_text().splitlines()] == [row("a")]
    assert f"ps --all --format {{{{.ID}}}} {{{{.Names}}}} --filter name={RUN}" in (tmp_path / "bin/words").read_text()


def test_a_harness_that_does_not_end_is_killed_with_all_its_children(tmp_path):
    began = time.monotonic()
    with pytest.raises(SandboxError, match=r"official: waited 1 s for the harness in "):
        official._harness(["bash", "-c", "sleep 600 & echo $!; wait"], tmp_path, deadline_s=1)
    assert time.monotonic() - began < 30
    child = int((tmp_path / "harness.log").read_text())
    while _alive(child) and time.monotonic() - began < 30:
        time.sleep(0.05)
    assert not _alive(child)


def _alive(pid):
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_only_containers_of_the_run_are_removed(tmp_path, monkeypatch):
    names = [
        "1 sweb.eval.a.run-1",
        "2 sweb.eval.b.run-1.1700000000",
        "3 sweb.eval.a.run-11",
        "4 mine-run-1",
        "5 sweb.eval.a.xrun-1",
    ]
    listing = "\n".join(f"[ $1 = ps ] && echo '{name}'" for name in names)
    monkeypatch.setenv("PATH", command(tmp_path / "bin", listing + "\nexit 0"))
    official._remove_containers("run-1")
    assert (tmp_path / "bin/words").read_text().splitlines()[1:] == ["rm --force 1 2"]


def test_the_module_does_not_load_the_harness():
    program = "import sys\nfrom entropo_ray import official\nprint('swebench' in sys.modules, 'docker' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["False", "False"]
