"""Laws of packs: what is kept was proved, what is there is left alone, and a bad task is named in one line."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from entropo_ray import config, ingest, tasks
from entropo_ray.records import File, Grade, Graded, Verdict
from entropo_ray.sandbox import SandboxError, SandboxLost
from entropo_ray.tasks import local, pack

HERE = Path(__file__).resolve().parent.parent
PACK = config.Pack(count=3, held_out=1, ambiguous=0.34, hidden=0.0)
BOX = config.Sandbox(backend="bwrap" if shutil.which("bwrap") else "plain", grade_s=30.0)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    to = tmp_path_factory.mktemp("packs") / "local"
    return to, ingest.ingest(PACK, BOX, seed=0, to=to)


def copy_of(made, tmp_path, change):
    """A copy of the pack whose first answer is changed."""
    to = tmp_path / "copy"
    subprocess.run(["cp", "-r", str(made[0]), str(to)], check=True, timeout=30)
    found = pack.tasks(to)
    answers = pack.answers(to)
    answers[found[0].id] = change(answers[found[0].id])
    pack.write(to, [pack.Mined(task, answers[task.id]) for task in found])
    return to, found[0].id


def job(*words, path=None):
    env = {**os.environ, "PYTHONPATH": str(HERE), "PATH": path or os.environ["PATH"]}
    command = [sys.executable, str(HERE / "jobs" / "pack.py"), "model=x", "rollout.sandbox.grade_s=30", *words]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=100, check=False)


def test_a_pack_that_holds_is_whole(made):
    to, numbers = made
    assert numbers == {"tasks": 4.0, "refused": 0.0}
    assert len(tasks.load(config.Tasks(path=str(to), split="all"))) == 4
    assert [path.name for path in to.parent.iterdir()] == ["local"]


def test_a_whole_pack_is_left_alone(made, monkeypatch):
    to, numbers = made
    monkeypatch.setattr(local, "generate", None)
    before = {path: path.stat().st_mtime_ns for path in to.rglob("*")}
    assert ingest.ingest(PACK, BOX, seed=0, to=to) == numbers
    assert {path: path.stat().st_mtime_ns for path in to.rglob("*")} == before


def test_a_pack_keeps_its_settings(made):
    to, _ = made
    with pytest.raises(ValueError, match=r"pack.count=5: .* was made with pack.count=3"):
        ingest.ingest(dataclasses.replace(PACK, count=5), BOX, seed=0, to=to)
    with pytest.raises(ValueError, match=r"seed=1: .* was made with seed=0"):
        ingest.ingest(PACK, BOX, seed=1, to=to)
    ingest.ingest(dataclasses.replace(PACK, runs=3), BOX, seed=0, to=to)


def test_what_lies_in_the_way_is_not_removed(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="no whole pack"):
        ingest.ingest(PACK, BOX, seed=0, to=tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("backend", ["docker", "kubernetes"])
def test_directories_are_no_images(tmp_path, backend):
    box = dataclasses.replace(BOX, backend=backend)
    with pytest.raises(ValueError, match=rf"rollout\.sandbox\.backend={backend}: source\.kind=local"):
        ingest.ingest(PACK, box, seed=0, to=tmp_path / "pack")
    assert not any(tmp_path.iterdir())


def test_one_bad_task_refuses_the_pack_and_is_named(tmp_path, monkeypatch):
    generate = local.generate
    bad = []

    def spoiled(**words):
        first, *rest = generate(**words)
        bad.append(first.task.id)
        wrong = first.answer.patch.replace("\n+", "\n+# ")
        return [pack.Mined(first.task, dataclasses.replace(first.answer, patch=wrong)), *rest]

    monkeypatch.setattr(local, "generate", spoiled)
    to = tmp_path / "pack"
    with pytest.raises(ValueError, match=r"source.kind=local: task .* does not hold: gold_fails") as error:
        ingest.ingest(dataclasses.replace(PACK, count=2, held_out=0), BOX, seed=1, to=to)
    assert bad[0] in str(error.value)
    assert not to.exists()


def test_a_sandbox_lost_twice_is_asked_for_again_and_no_more(monkeypatch, made):
    to, _ = made
    suite = tasks.load(config.Tasks(path=str(to), split="test"))
    asked = []

    async def lost(task):
        asked.append(task.id)
        if len(asked) < 3:
            raise SandboxLost("gone")
        return []

    ingest._all_hold(suite, lost, where="here")
    assert len(asked) == 3

    async def always_lost(task):
        raise SandboxLost("gone")

    with pytest.raises(SandboxLost):
        ingest._all_hold(suite, always_lost, where="here")


@pytest.mark.skipif(BOX.backend != "bwrap", reason="the job knows bubblewrap alone, which is not installed")
def test_check_proves_a_pack_again(made, tmp_path):
    good = job("pack.check=true", f"tasks.path={made[0]}", f"run_dir={tmp_path}/run")
    assert (good.returncode, good.stderr) == (0, "")
    assert "tasks 4" in good.stdout
    to, task_id = copy_of(made, tmp_path, lambda answer: dataclasses.replace(answer, patch=""))
    bad = job("pack.check=true", f"tasks.path={to}", f"run_dir={tmp_path}/run")
    assert bad.returncode == 2
    assert bad.stderr.startswith("error: ")
    assert len(bad.stderr.splitlines()) == 1
    assert task_id in bad.stderr
    assert "gold_fails" in bad.stderr


def test_check_finds_a_hidden_test_that_was_broken(made, tmp_path):
    def change(answer):
        return dataclasses.replace(answer, files=(File(path=answer.files[0].path, text="def test_nothing(:\n"),))

    to, task_id = copy_of(made, tmp_path, change)
    with pytest.raises(ValueError, match=f"task {task_id} does not hold: gold_fails"):
        ingest.check(PACK, BOX, path=to)


def test_without_bubblewrap_the_job_says_what_to_install(tmp_path):
    words = [f"tasks.path={tmp_path}/pack", f"run_dir={tmp_path}/run", "pack.count=2", "pack.held_out=0"]
    ended = job(*words, path="/nonexistent")
    assert ended.returncode == 2
    assert len(ended.stderr.splitlines()) == 1
    assert "bubblewrap" in ended.stderr
    assert "install" in ended.stderr
    assert not (tmp_path / "pack").exists()


def test_a_pack_names_its_settings_beside_its_tasks(made):
    said = json.loads((made[0] / "made_with.json").read_text())
    assert said["pack.count"] == 3
    assert said["seed"] == 0


# Quarantine


def test_check_puts_what_no_longer_holds_in_quarantine_and_the_rest_goes_on(made, tmp_path, caplog):
    to, task_id = copy_of(made, tmp_path, lambda answer: dataclasses.replace(answer, patch=""))
    cfg = dataclasses.replace(PACK, check=True, quarantine=True)
    assert ingest.check(cfg, BOX, path=to) == {"tasks": 3.0, "refused": 0.0, "quarantined": 1.0}
    (line,) = [json.loads(line) for line in (to / "quarantine.jsonl").read_text().splitlines()]
    assert (line["id"], line["reasons"][0].partition(":")[0]) == (task_id, "gold_fails")
    assert datetime.fromisoformat(line["when"]).utcoffset() == timedelta(0)
    caplog.set_level("INFO", logger="entropo_ray")
    caplog.clear()
    suite = tasks.load(config.Tasks(path=str(to), split="all"))
    assert (len(suite), task_id in {task.id for task in suite}) == (3, False)
    assert [record.getMessage() for record in caplog.records] == [
        f"tasks.path={to}: 1 of 4 tasks are in quarantine and left out"
    ]
    assert len(tasks.load(config.Tasks(path=str(to), split="all", quarantined=True))) == 4
    assert ingest.check(PACK, BOX, path=to) == {"tasks": 3.0, "refused": 0.0}  # what is left holds


def test_a_sandbox_that_is_lost_puts_nothing_in_quarantine(made, tmp_path):
    to, _ = copy_of(made, tmp_path, lambda answer: answer)
    shutil.rmtree(pack.tasks(to)[1].image)
    with pytest.raises(SandboxError):
        ingest.check(dataclasses.replace(PACK, check=True, quarantine=True), BOX, path=to)
    assert not (to / "quarantine.jsonl").exists()


def test_lists_of_a_run_are_left_out_where_they_are_named(made, tmp_path):
    to = made[0]
    first, second, *_ = [task.id for task in pack.tasks(to)]
    lists = [tmp_path / "a" / "flaky.jsonl", tmp_path / "b.jsonl"]
    lists[0].parent.mkdir()
    assert [pack.quarantine(lists[0], {first: ["flaky: x"]}), pack.quarantine(lists[0], {first: ["again"]})] == [1, 0]
    assert pack.quarantined(lists[0])[first].reasons == ("flaky: x",)
    pack.quarantine(lists[1], {second: ["y"], "of another pack": []})
    asked = config.Tasks(path=str(to), split="all", quarantine=list(map(str, lists)))
    assert {first, second}.isdisjoint(task.id for task in tasks.load(asked))
    assert len(tasks.load(asked)) == 2
    pack.quarantine(lists[1], {task.id: ["all"] for task in pack.tasks(to)})
    with pytest.raises(ValueError, match=r"no task with split=all and limit=None, 4 in quarantine; "):
        tasks.load(asked)
    with pytest.raises(ValueError, match=r"tasks\.quarantine=/no/list: no such file"):
        tasks.load(dataclasses.replace(asked, quarantine=["/no/list"]))
    lists[1].write_text("nonsense\n")
    with pytest.raises(ValueError, match=r"b\.jsonl: expected one object a line, with id, reasons and when"):
        tasks.load(asked)


def test_flaky_verdicts_are_listed_in_the_form_of_a_quarantine(tmp_path):
    def graded(key, sample, grade):
        verdict = Verdict(
            grade=grade, passed=(), failed=("t",), dropped=(), exit_code=1, runs=2, seconds=1.0, reason=f"r{sample}"
        )
        return Graded(task_id=key, sample=sample, grade=grade, verdict=verdict)

    file = tmp_path / "flaky.jsonl"
    pack.list_flaky(file, [graded("a", 0, Grade.UNRESOLVED), Graded(task_id="b", sample=0, grade=None, verdict=None)])
    assert not file.exists()
    pack.list_flaky(file, [graded("a", 0, Grade.FLAKY), graded("b", 1, Grade.RESOLVED), graded("a", 2, Grade.FLAKY)])
    assert {key: one.reasons for key, one in pack.quarantined(file).items()} == {"a": ("flaky: r0", "flaky: r2")}
