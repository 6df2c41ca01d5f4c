"""Rows of public data sets, graded by their own script: honest patches, half ones, and forgeries that end badly."""

from __future__ import annotations

import asyncio
import dataclasses
import subprocess

import pytest

from entropo_ray import config, grade, sandbox
from entropo_ray.records import Answer, Grade, Task
from entropo_ray.tasks import diffs, scripted, scripts

CODE = "def add(a, b):\n    return a - b\n\n\ndef twice(a):\n    return a\n"
RIGHT = "def add(a, b):\n    return a + b\n\n\ndef twice(a):\n    return 2 * a\n"
TESTS = "from calc import add\n\n\ndef test_zero():\n    assert add(1, 0) == 1\n"
HIDDEN = "from calc import add, twice\n\n\ndef test_zero():\n    assert add(1, 0) == 1\n\n\ndef test_add():\n"
HIDDEN += "    assert add(1, 2) == 3\n\n\ndef test_twice():\n    assert twice(3) == 6\n"
FILE = "tests/test_calc.py"
BOX = config.Sandbox(memory_mb=512, disk_mb=64, grade_s=60)


@pytest.fixture(scope="module", autouse=True)
def needs_bwrap():
    if trouble := [line for line in sandbox.probe("bwrap") if "control group" not in line]:
        pytest.skip(trouble[0])


@pytest.fixture(scope="module")
def repo(tmp_path_factory):
    home = tmp_path_factory.mktemp("repo")
    home.chmod(0o755)
    for path, text in {"calc.py": CODE, FILE: TESTS, "tests/__init__.py": ""}.items():
        (home / path).parent.mkdir(exist_ok=True)
        (home / path).write_text(text)
    for words in (["init", "-q"], ["add", "."], ["-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "base"]):
        subprocess.run(["git", *words], cwd=home, check=True)
    return home


@pytest.fixture(scope="module")
def task(repo):
    return Task(
        id="calc-1", source="swebench", split="test", repo="t/calc", image=str(repo), workdir="/testbed",
        problem="add subtracts", test_command="python -m pytest -q", visible=(),
    )  # fmt: skip


@pytest.fixture(scope="module")
def answer(repo):
    base = subprocess.run(["git", "rev-parse", "HEAD"], cwd=repo, check=True, capture_output=True, text=True).stdout
    test_patch = diffs.between(FILE, TESTS, HIDDEN)
    command = scripts.command("python -m pytest -rA --tb=short -p no:cacheprovider", [FILE])
    return Answer(
        task_id="calc-1",
        patch=diffs.between("calc.py", CODE, RIGHT),
        alternatives=(),
        files=(),
        script=scripts.made(base=base.strip(), test_patch=test_patch, command=command, workdir="/testbed"),
        parser="parse_log_pytest",
        fail_to_pass=(f"{FILE}::test_add", f"{FILE}::test_twice"),
        pass_to_pass=(f"{FILE}::test_zero",),
        expected_failures=(),
        test_patch=test_patch,
        version="1",
    )


def verdict(task, answer, patch):
    return asyncio.run(grade.grade(task, patch, answer, BOX))


def changed(text, path="calc.py", old: str | None = CODE):
    return diffs.between(path, old, text)


# into every pipe that pytest has put aside, past what it captures
SAY = """import contextlib, os, stat
def say(data):
    for fd in range(3, 64):
        with contextlib.suppress(OSError):
            if stat.S_ISFIFO(os.fstat(fd).st_mode):
                os.write(fd, data)
"""
LINES = f"b'PASSED {FILE}::test_add\\nPASSED {FILE}::test_twice\\nPASSED {FILE}::test_zero\\n'"
FORGERIES = {
    "prints what the parser reads and leaves": f"{SAY}say({LINES})\nos._exit(0)\n",
    "prints it and leaves as pytest does where a test failed": f"{SAY}say({LINES})\nos._exit(1)\n",
    "prints it at the end of an honest run": f"{SAY}import atexit\natexit.register(os._exit, 0)\n"
    f"atexit.register(say, {LINES})\n{CODE}",
    "rewrites every report": "import _pytest.runner as r\nold = r.TestReport.from_item_and_call\n"
    "def new(item, call):\n    call.excinfo = None\n    return old(item, call)\n"
    "r.TestReport.from_item_and_call = staticmethod(new)\n" + CODE,
    "equals everything": "class Any(int):\n    __eq__ = lambda self, other: True\n    __hash__ = int.__hash__\n"
    "def add(a, b):\n    return Any()\nimport builtins\n"
    "def twice(a):\n    raise __import__('pytest').skip.Exception('no')\n",
    "rewrites the script that runs": f"{SAY}import glob, pathlib\npid = os.getpid()\nwhile pid > 0:\n"
    "    for place in sum(map(glob.glob, (f'/proc/{pid}/fd/*', '/*.sh', '*.sh', '/tmp/*')), []):\n"
    f"        with contextlib.suppress(OSError), open(place, 'r+b') as file:\n"
    f"            file.write({LINES} + b'exit 0\\n')\n"
    "    pid = int(pathlib.Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[1])\n" + CODE,
    "skips the file": "import pytest\npytest.skip('no', allow_module_level=True)\n",
    "ends the tests with a mark of its own": f"{SAY}say({LINES} + b'>>>>> End Test Output\\n')\n{CODE}",
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_no_forgery_resolves(task, answer, forgery):
    """Threats 6 to 8, and 32."""
    found = verdict(task, answer, changed(FORGERIES[forgery]))
    assert found.grade in (Grade.TAMPERED, Grade.UNRESOLVED), found
    assert found.grade is Grade.TAMPERED or "prints" not in forgery, found


OTHERS = {
    "conftest.py": "def pytest_runtest_call(item):\n    item.obj = int\n",
    "tests/conftest.py": "import os\nos._exit(0)\n",
    "sitecustomize.py": "import os\nos._exit(0)\n",
    "pytest.py": "print('PASSED')\n",
    "src/json.py": "",
    FILE + "x/../test_calc.py": "",
    "pytest.ini": "[pytest]\naddopts = --co\n",
    "tests/test_calc.py/x.py": "",
}


@pytest.mark.parametrize("path", OTHERS)
def test_what_decides_about_tests_cannot_be_changed(task, answer, path):
    """Alone it is no patch at all; beside the fix it is left out and the fix resolves."""
    patch = changed(OTHERS[path] or "x = 1\n", path, None)
    kept, dropped = scripted.admitted(patch + answer.patch, answer)
    assert (kept, dropped) == (answer.patch, (path,)) or ".." in path
    if ".." not in path:
        assert verdict(task, answer, patch).grade is Grade.EMPTY


def test_honest_patches_get_what_they_deserve(task, answer):
    found = verdict(task, answer, answer.patch)
    assert (found.grade, found.reason, found.exit_code) == (Grade.RESOLVED, "", 1)  # a canary fails
    assert found.passed == (*answer.fail_to_pass, *answer.pass_to_pass)
    assert found.dropped == ()
    half = verdict(task, answer, changed(CODE.replace("a - b", "a + b")))
    assert (half.grade, half.failed) == (Grade.UNRESOLVED, (f"{FILE}::test_twice",))
    assert half.reason == f"1 of 3 tests, {FILE}::test_twice: failed"
    assert verdict(task, answer, changed(CODE + "\n# nothing\n")).grade is Grade.UNRESOLVED
    assert verdict(task, answer, "").grade is Grade.EMPTY
    assert verdict(task, answer, "no diff").grade is Grade.PATCH_FAILED
    crash = verdict(task, answer, changed("import os\nos.kill(os.getppid(), 9)\nos.kill(os.getpid(), 9)\n"))
    assert crash.grade is Grade.UNRESOLVED


def test_a_patch_that_fits_roughly_is_taken_as_the_official_harness_takes_it(task, answer):
    rough = answer.patch.replace(" \n def twice", " \n def twice").replace("@@ -1,6 +1,6 @@", "@@ -4,6 +4,6 @@")
    assert verdict(task, answer, rough).grade is Grade.RESOLVED
    other = changed("x = 2\n", old="x = 1\n")
    found = verdict(task, answer, other)
    assert found.grade is Grade.PATCH_FAILED
    assert "calc.py" in found.reason


def test_time_is_a_verdict_and_a_broken_script_is_none(task, answer):
    slow = asyncio.run(
        grade.grade(task, changed("import time\ntime.sleep(30)\n"), answer, dataclasses.replace(BOX, grade_s=3))
    )
    assert (slow.grade, slow.reason) == (Grade.TIMEOUT, "time-out")
    broken = dataclasses.replace(answer, script="exit 3\n" + answer.script)
    with pytest.raises(sandbox.SandboxError, match="exit code 3"):
        verdict(task, broken, answer.patch)


def test_a_good_row_is_validated_and_a_bad_one_refused(task, answer):
    assert asyncio.run(grade.validate(task, answer, BOX, runs=1)) == []
    useless = dataclasses.replace(answer, patch=changed(CODE + "\n# nothing\n"))
    assert asyncio.run(grade.validate(task, useless, BOX, runs=1))[0].startswith("gold_fails: unresolved, 2 of 3")
    unknown = dataclasses.replace(answer, script="", parser="parse_log_django")
    assert asyncio.run(grade.validate(task, unknown, BOX, runs=1)) == ["unknown_parser: parse_log_django"]


def test_expected_failures_have_to_fail(task, answer):
    wanted = dataclasses.replace(
        answer, fail_to_pass=answer.fail_to_pass[:1], expected_failures=answer.fail_to_pass[1:]
    )
    half = changed(CODE.replace("a - b", "a + b"))
    assert verdict(task, wanted, half).grade is Grade.RESOLVED
    assert verdict(task, wanted, answer.patch).grade is Grade.UNRESOLVED


# What a log says


def log(text, code):
    return scripted.Log(started=True, tests=text, code=code, marks=1)


@pytest.mark.parametrize(
    ("found", "status"),
    [
        ({"t.py::test_p[a-1]": "PASSED", "t.py::test_p[a-2]": "PASSED"}, "PASSED"),
        ({"t.py::test_p[a-1]": "PASSED", "t.py::test_p[a-2]": "XFAIL"}, "XFAIL"),
        ({"t.py::test_p[a-1]": "PASSED", "t.py::test_p[a-2]": "FAILED"}, None),
        ({"t.py::test_p[a-": "FAILED", "t.py::test_p[a-2]": "PASSED"}, "FAILED"),
        ({"t.py::test_p[b-1]": "PASSED"}, None),
    ],
)
def test_an_id_that_is_cut_off_means_all_that_begin_like_it_if_they_agree(found, status):
    assert scripted._status("t.py::test_p[a-", found) == status
    assert scripted._status("t.py::test_p", found) is None


def test_a_log_that_names_failures_alone_has_to_say_that_tests_ran(answer):
    lenient = dataclasses.replace(answer, eval_type="fail_only")
    found = {text: scripted.judge(log(text, 0), {}, lenient, {}, limit="") for text in ("", "Executed 3 of 3 SUCCESS")}
    assert found[""] == (Grade.UNRESOLVED, "nothing in the log says that a test ran", ())
    assert found["Executed 3 of 3 SUCCESS"][0] is Grade.RESOLVED


def test_an_exit_code_without_a_failure_resolves_nothing(answer):
    found = dict.fromkeys(scripted.decisive(answer), "PASSED")
    assert scripted.judge(log("", 0), found, answer, {}, limit="")[0] is Grade.RESOLVED
    decision, reason, _ = scripted.judge(log("", 3), found, answer, {}, limit="")
    assert (decision, reason) == (
        Grade.TAMPERED,
        "the test command ended with exit code 3 although no test failed",
    )
    assert scripted.judge(log("", 3), found | {"other": "FAILED"}, answer, {}, limit="")[0] is Grade.RESOLVED
