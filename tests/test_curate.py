"""Laws of packs of public data sets, on a real engine: leaks are gone, what holds is kept, the rest has a reason."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import engine
import pytest
import registry
from test_rows import R2EGYM, SWEBENCH, SWESMITH
from test_scrub import commit, git, put

from entropo_ray import config, curate, grade, ingest
from entropo_ray.sandbox import BackendDown, SandboxSpec, limits, marks, open_sandbox
from entropo_ray.sandbox import docker as backend
from entropo_ray.sandbox import images as shelves
from entropo_ray.tasks import diffs, pack, rows
from entropo_ray.tasks.pack import Ruling

pytestmark = [pytest.mark.docker, pytest.mark.usefixtures("docker_host")]
HERE = Path(__file__).resolve().parent.parent
BOX = config.Sandbox(backend="docker", memory_mb=512, disk_mb=64, grade_s=60)
PACK = config.Pack(runs=2)
TOKEN = "hush_4711"  # in all that no agent may see
WRONG = "def f():\n    return 1\n\n\ndef g():\n    return 5\n"
RIGHT = WRONG.replace("return 1", f"return 2  # {TOKEN}")
SEEN = "from mod import g\n\n\ndef test_g():\n    assert g() == 5\n"
MORE = SEEN + "\n\ndef test_more():\n    assert g() == 5\n"
HIDDEN = f"from mod import f\n\n\ndef test_f():\n    assert f() == 2, '{TOKEN}'\n"
GOLD = diffs.between("mod.py", WRONG, RIGHT)
COMMAND = "python3 -m pytest -rA --tb=short -p no:cacheprovider"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A repository whose second commit is the base, with its future in every corner."""
    home = tmp_path_factory.mktemp("history")
    git(home, "init", "--quiet", "--initial-branch=main")
    commit(home, "first", {"mod.py": "", "README": "x\n"})
    put(home, {"run.sh": "echo hi\n"})
    (home / "run.sh").chmod(0o755)
    base = commit(home, "base", {"mod.py": WRONG, "tests/test_mod.py": SEEN, ".gitignore": "*.egg-info\n.venv\n"})
    git(home, "checkout", "--quiet", "-b", "future")
    fixed = commit(home, f"the fix {TOKEN}", {"mod.py": RIGHT, "tests/test_new.py": HIDDEN})
    git(home, "tag", "--annotate", "v2", "--message", TOKEN, fixed)
    git(home, "checkout", "--quiet", "main")
    put(home, {"mod.py": RIGHT})
    git(home, "stash", "--quiet")
    git(home, "remote", "add", "origin", "https://example.com/x.git")
    put(home, {"x.egg-info/PKG-INFO": "Name: x\n", "tests/__pycache__/test_new.pyc": TOKEN, "odd name/ä\n": ""})
    (home / "odd name/link").symlink_to("/nowhere/at/all")
    os.link(home / "x.egg-info/PKG-INFO", home / "x.egg-info/same")
    (home / "x.egg-info/PKG-INFO").chmod(0o600)
    os.utime(home / "run.sh", (10**9, 10**9))
    return home, base, fixed


@pytest.fixture(scope="module", autouse=True)
def tidy(docker_host):
    """No prepared image stays in an engine that is not the tests' own."""
    client = backend.engine().client
    before = {image.id for image in client.images.list("entropo-prepared")}
    yield
    for image in client.images.list("entropo-prepared"):
        if image.id not in before:
            client.images.remove(image.id, force=True)


def swebench(home, *, key="owner__name-1", **more):
    home, base, _ = home
    tests = diffs.between("tests/test_mod.py", SEEN, MORE) + diffs.between("tests/test_new.py", None, HIDDEN)
    script = f"""#!/bin/bash
set -uxo pipefail
git config --global --add safe.directory /testbed
cd /testbed
git show {base[:12]} --stat
git checkout {base} tests/test_mod.py
git apply -v - <<'EOF_1'
{tests}EOF_1
: '>>>>> Start Test Output'
{COMMAND} tests/test_mod.py tests/test_new.py
: '>>>>> End Test Output'
git checkout {base} tests/test_mod.py
"""
    row = {
        "instance_id": key,
        "base_commit": base,
        "patch": GOLD,
        "test_patch": tests,
        "FAIL_TO_PASS": ["tests/test_new.py::test_f", "tests/test_mod.py::test_more"],
        "PASS_TO_PASS": ["tests/test_mod.py::test_g"],
        "eval_script": script,
        "image": engine.image_of(home),
    }
    row["FAIL_TO_PASS"] = ["tests/test_new.py::test_f"]
    return SWEBENCH | row | more


@pytest.fixture(scope="module")
def swesmith(tmp_path_factory, docker_host):
    """The image holds the repaired code, and so does every commit of it."""
    home = tmp_path_factory.mktemp("smith")
    git(home, "init", "--quiet", "--initial-branch=main")
    commit(home, "first", {"mod.py": RIGHT.replace("return 5", "return 4")})
    commit(home, "fix", {"mod.py": RIGHT, "tests/test_mod.py": SEEN, "tests/test_f.py": HIDDEN.replace(TOKEN, "no")})
    bug = diffs.between("mod.py", RIGHT, WRONG)
    tests = {"FAIL_TO_PASS": ["tests/test_f.py::test_f"], "PASS_TO_PASS": ["tests/test_mod.py::test_g"]}
    return SWESMITH | tests | {"patch": bug, "image_name": engine.image_of(home)}


@pytest.fixture(scope="module")
def r2egym(home, tmp_path_factory, docker_host):
    """The image shows its hidden tests in three places, and its interpreter is at home at root's."""
    tree = tmp_path_factory.mktemp("r2e") / "tree"
    subprocess.run(["cp", "-a", str(home[0]), str(tree)], check=True)
    put(tree, {"r2e_tests/test_1.py": HIDDEN, "run_tests.sh": f"echo {TOKEN}\n"})
    (tree / ".venv/bin").mkdir(parents=True)
    (tree / ".venv/bin/python").symlink_to("/root/uv/python")
    outside = tmp_path_factory.mktemp("outside")
    put(outside, {"r2e_tests/test_1.py": HIDDEN})
    (outside / "root/uv").mkdir(parents=True)
    (outside / "root").chmod(0o700)
    (outside / "root/uv/python").symlink_to("/usr/bin/python3")
    change = {
        "old_file_content": WRONG,
        "new_file_content": RIGHT,
        "header": {"file": {"path": "mod.py"}},
        "minus_file": {"path": "a/mod.py"},
        "plus_file": {"path": "b/mod.py"},
        "is_binary_file": False,
    }
    seen = SEEN.replace("test_g", "test_old")
    return R2EGYM | {
        "docker_image": engine.image_of(tree, outside=outside),
        "parsed_commit_content": json.dumps({"file_diffs": [change], "old_commit_hash": home[1]}),
        "execution_result_content": json.dumps(
            {
                "test_file_names": ["test_1.py", "test_2.py"],
                "test_file_codes": [HIDDEN, seen],
                "old_commit_res_stdout": "= short test summary info =\nPASSED r2e_tests/test_2.py::test_old\n",
            }
        ),
        "expected_output_json": json.dumps({"test_f": "PASSED", "test_old": "PASSED"}),
    }


def made(tmp_path, *table, to="pack", **more):
    """A pack of these rows."""
    (tmp_path / "rows.json").write_text(json.dumps(list(table)))
    source = config.Source(kind="rows", rows=str(tmp_path / "rows.json"), held_out=0, **more)
    numbers = ingest.ingest(PACK, BOX, seed=0, to=tmp_path / to, source=source)
    return tmp_path / to, numbers


def inside(image, *commands):
    """Exit code and output of commands in one sandbox of an image."""

    async def whole():
        spec = SandboxSpec(image, limits=limits(BOX, exec_s=60))
        async with open_sandbox(spec, backend="docker") as box:
            found = [await box.exec(command, output_bytes=1 << 20) for command in commands]
        return [(done.exit_code, done.output.decode(errors="replace")) for done in found]

    return asyncio.run(whole())


SEARCH = f"grep -rlsF --exclude-dir=proc --exclude-dir=sys -e {TOKEN} /; true"
OBJECTS = "git -c safe.directory=* cat-file --batch-all-objects --batch-check='%(objecttype)' | sort | uniq -c"


def graded(path, task, patch):
    return asyncio.run(grade.grade(task, patch, pack.answers(path)[task.id], BOX)).grade.name


def test_a_row_of_swebench_5_becomes_a_task_that_tells_nothing(home, tmp_path, docker_host):
    row = swebench(home)
    ((_, found),) = inside(row["image"], SEARCH)
    assert "/testbed/.git" in found  # the token would be found
    wrong = swebench(home, key="owner__name-2", patch=diffs.between("mod.py", WRONG, WRONG + "\n# nothing\n"))
    nowhere = swebench(home, key="owner__name-3", image="nowhere.invalid/none:1")
    path, numbers = made(tmp_path, row, wrong, nowhere, pull_tries=1)
    assert (numbers["tasks"], numbers["refused_gold_fails"], numbers["refused_no_image"]) == (1, 1, 1)
    (task,) = pack.tasks(path)
    assert task.visible == ("tests/test_mod.py::test_g",)
    status = "git -c safe.directory=* status --porcelain"
    facts = "stat -c '%a %Y' run.sh; stat -c %i x.egg-info/* | uniq | wc -l; ls -l 'odd name'; ls -A tests"
    search, objects, status, facts = inside(task.image, SEARCH, OBJECTS, status, facts)
    assert search == (0, "")
    assert "1 commit\n" in objects[1]
    assert status == (0, '?? "odd name/"\n')
    assert facts[1].startswith("755 1000000000\n1\n"), facts  # as they were: a build may go by their times
    assert "-> /nowhere/at/all" in facts[1]
    assert facts[1].endswith("test_mod.py\n")
    assert [graded(path, task, patch) for patch in (GOLD, "", diffs.between("x.py", None, "x = 1\n"))] == [
        "RESOLVED", "EMPTY", "UNRESOLVED",
    ]  # fmt: skip
    said = json.loads((path / "report.json").read_text())["swebench owner/name"]
    assert (said["rows"], said["kept"]) == (3, 1)
    assert list(said["refused"]["gold_fails"]) == ["owner__name-2"]
    assert "nowhere.invalid" in said["refused"]["no_image"]["owner__name-3"]
    assert TOKEN not in (path / "tasks.jsonl").read_text() + (path / "provenance.jsonl").read_text()
    assert not list(tmp_path.glob(".pack*"))
    # a container that someone else makes of the image must not be taken for one of our dead
    assert marks.in_use(shelves.shelf().labels(task.image))
    assert ingest.check(PACK, BOX, path=path)["tasks"] == 1


def test_before_a_bug_of_swesmith_there_is_nothing(swesmith, tmp_path):
    """Threat 2: in the published image, HEAD is the fix."""
    path, numbers = made(tmp_path, swesmith)
    assert numbers["tasks"] == 1, (path.parent / "pack/report.json").read_text()
    (task,) = pack.tasks(path)
    code, objects, search = inside(task.image, "cat mod.py", OBJECTS, SEARCH)
    assert code == (0, WRONG)
    assert "1 commit\n" in objects[1]
    assert search == (0, "")
    assert graded(path, task, pack.answers(path)[task.id].patch) == "RESOLVED"


def test_hidden_tests_of_r2egym_are_nowhere(r2egym, tmp_path):
    """Threat 3; the published image holds them, and an interpreter that only root can reach."""
    ((_, found),) = inside(r2egym["docker_image"], SEARCH)
    assert "/r2e_tests/test_1.py" in found
    path, numbers = made(tmp_path, r2egym)
    assert numbers["tasks"] == 1
    (task,) = pack.tasks(path)
    search, files = inside(task.image, SEARCH, "cat /r2e_tests; ls -A; .venv/bin/python -c 'print(6 * 7)'")
    assert search == (0, "")
    assert "r2e_tests" not in files[1]
    assert "run_tests.sh" not in files[1]
    assert files[1].endswith("42\n")
    assert graded(path, task, pack.answers(path)[task.id].patch) == "RESOLVED"


def test_an_interrupted_run_goes_on_where_it_was(home, tmp_path, docker_host, monkeypatch):
    """Nothing that was prepared is prepared again, and nothing that was tried is tried again."""
    table = [swebench(home, key=f"owner__name-{number}") for number in (1, 2)]
    settle, asked = grade.settle, []

    async def settled(task, *rest, **more):
        asked.append(task.id)
        if len(asked) == 2:
            while not (tmp_path / ".pack.journal").is_file():  # noqa: ASYNC110 - no event tells of a file
                await asyncio.sleep(0.1)
            raise BackendDown("the engine is gone")
        return await settle(task, *rest, **more)

    monkeypatch.setattr(grade, "settle", settled)
    with pytest.raises(BackendDown):
        made(tmp_path, *table)
    assert not (tmp_path / "pack").exists()
    with (tmp_path / ".pack.journal").open("a") as journal:
        journal.write('{"key": "cut sho')
    monkeypatch.setattr(curate, "_prepare", None)
    path, numbers = made(tmp_path, *table)
    assert numbers["tasks"] == 2
    assert asked == ["owner__name-1", "owner__name-2", "owner__name-2"]
    assert len({task.image for task in pack.tasks(path)}) == 1
    assert not (tmp_path / ".pack.journal").exists()


def test_the_job_makes_a_pack_of_rows_though_it_is_interrupted(home, tmp_path, docker_host):
    quick, slow = swebench(home), swebench(home, key="owner__name-2")
    slow["eval_script"] = slow["eval_script"].replace(COMMAND, f"sleep 5; {COMMAND}")
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(quick)}\n{json.dumps(slow)}\n")
    words = ["conf/rows.yaml", f"source.rows={tmp_path}/rows.jsonl", f"tasks.path={tmp_path}/pack"]
    words += ["pack.runs=1", "source.held_out=0", "rollout.sandbox.memory_mb=512", "rollout.sandbox.disk_mb=64"]
    command = [sys.executable, str(HERE / "jobs/pack.py"), *words]
    how = {"cwd": HERE, "env": {**os.environ, "PYTHONPATH": str(HERE)}, "text": True}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **how) as first:
        deadline = time.monotonic() + 120
        while not (tmp_path / ".pack.journal").is_file() and first.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        first.send_signal(signal.SIGINT)
        _, said = first.communicate(timeout=60)
    assert (first.returncode, said.splitlines()[-1][:11]) == (130, "interrupted"), said
    assert len((tmp_path / ".pack.journal").read_text().split("\n\n")) == 1
    done = subprocess.run(command, capture_output=True, timeout=200, check=False, **how)
    assert done.returncode == 0, done.stderr
    assert "tasks 2  refused 0  test 2" in done.stdout
    assert len(pack.tasks(tmp_path / "pack")) == 2
    found = backend.engine().client.containers.list(all=True, filters={"label": "entropo.role"})
    assert found == [], "a sandbox outlived the interrupted job"


def bare(home, tmp_path, name):
    """An image of the repository alone: nothing in it could run."""
    with tarfile.open(tmp_path / "image.tar", "w") as archive:
        archive.add(home, "testbed")
    repository, _, tag = name.rpartition(":")
    backend.engine().client.api.import_image(src=str(tmp_path / "image.tar"), repository=repository, tag=tag)


async def good(m):
    return Ruling()


def test_images_come_from_a_busy_registry_and_go_to_one_for_other_nodes(home, tmp_path, docker_host, monkeypatch):
    monkeypatch.setattr(curate, "_PAUSE_S", 0.05)
    shelf = shelves.shelf()
    with registry.running() as remote:
        there = f"{remote.address}/owner/raw:1"
        bare(home[0], tmp_path, there)
        shelf.push(there, within_s=60)
        shelf.remove(there)
        (tmp_path / "rows.json").write_text(json.dumps([swebench(home, image="owner/raw:1")]))
        mined = rows.read(tmp_path / "rows.json", images=rows.Images(mirror=remote.address))
        push = f"{remote.address}/tasks"
        source = config.Source(kind="rows", mirror=remote.address, push=push, pull_tries=4, pull_s=60)
        remote.busy = 3
        journal = curate.Journal(tmp_path / "journal")
        (outcome,) = asyncio.run(curate.Curator(source, journal, good, version="1").curate(mined))
        assert outcome.reasons == ()
        name = outcome.mined.task.image
        assert name.startswith(f"{push}/entropo-prepared:")
        shelf.remove(name)  # as on another node
        assert shelf.labels(name) == {}
        asyncio.run(curate.fetch({name}, source))
        assert shelf.labels(name)["entropo.replaced"] == home[1]
        shelf.remove(name)
        shelf.remove(there)
        remote.busy = 9
        (outcome,) = asyncio.run(
            curate.Curator(source, curate.Journal(tmp_path / "other"), good, version="1").curate(mined)
        )
        assert outcome.reasons[0].startswith(f"no_image: pull of {there}: ")
        assert outcome.reasons[0].endswith("(4 tries)")
        remote.busy = 0
        remote.manifests.clear()
        (outcome,) = asyncio.run(
            curate.Curator(source, curate.Journal(tmp_path / "other"), good, version="1").curate(mined)
        )
        assert "tries" not in outcome.reasons[0], "asking for what is not there again does not help"
