"""Laws of grading: what is right resolves, what is not never does, and what is forged says so."""

import asyncio
import dataclasses
import itertools
import shutil
import subprocess

import engine
import pytest

from entropo_ray import config, grade, sandbox
from entropo_ray.grade import Answers
from entropo_ray.records import Answer, File, Grade, Task
from entropo_ray.sandbox import SandboxError
from entropo_ray.tasks import pack

CFG = config.Sandbox(backend="bwrap" if shutil.which("bwrap") else "plain", grade_s=20.0)

PRODUCT = '''def clamp(value, low, high):
    """Value, but not below low and not above high."""
    if value < low:
        return low
    if value > high:
        return low
    return value


def double(value):
    return 2 * value
'''
VISIBLE = """from shop.numbers import clamp, double


def test_inside():
    assert clamp(2, 1, 3) == 2


def test_double():
    assert double(2) == 4
"""
HIDDEN = """import pytest

from shop.numbers import clamp, double


def test_above():
    assert clamp(9, 1, 3) == 3


@pytest.mark.parametrize("value", [0, -5])
def test_below(value):
    assert clamp(value, 1, 3) == 1


class TestDouble:
    def test_zero(self):
        assert double(0) == 0
"""
F2P = ("tests/test_clamp.py::test_above",)
P2P = (
    "tests/test_clamp.py::test_below[0]",
    "tests/test_clamp.py::test_below[-5]",
    "tests/test_clamp.py::TestDouble::test_zero",
)
SEEN = ("tests/test_numbers.py::test_inside", "tests/test_numbers.py::test_double")


def git(home, *words, text=None):
    command = ["git", "-c", "user.name=t", "-c", "user.email=t@t", "-C", str(home), *words]
    return subprocess.run(command, input=text, capture_output=True, text=True, check=True, timeout=30).stdout


def lay_out(home, files):
    for path, text in files.items():
        target = home / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        target.write_text(text)


@pytest.fixture(scope="session")
def layer(tmp_path_factory):
    home = tmp_path_factory.mktemp("layer") / "shop"
    config_text = '[project]\nname = "shop"\n\n[tool.pytest.ini_options]\ntestpaths = ["tests"]\n'
    lay_out(home, {"shop/__init__.py": "", "shop/numbers.py": PRODUCT, "tests/test_numbers.py": VISIBLE})
    lay_out(home, {"pyproject.toml": config_text, "README.md": "Numbers.\n"})
    git(home, "init", "-q", "-b", "main")
    git(home, "add", "-A")
    git(home, "commit", "-q", "-m", "base")
    return home


@pytest.fixture(scope="session")
def task(layer):
    return Task(
        id="shop-1",
        source="test",
        split="train",
        repo="shop",
        image=str(layer),
        workdir="/testbed",
        problem="clamp returns the wrong bound",
        test_command="python -m pytest",
        visible=SEEN,
    )


@pytest.fixture(scope="session")
def patch_of(layer, tmp_path_factory):
    """Files to the patch that makes them, by git itself."""

    def make(files, removed=()):
        copy = tmp_path_factory.mktemp("edit") / "shop"
        git(layer.parent, "clone", "-q", str(layer), str(copy))
        for path in removed:
            (copy / path).unlink()
        lay_out(copy, files)
        git(copy, "add", "-A", "-f")
        return git(copy, "diff", "--cached", "--binary", "--full-index", "--no-renames", "HEAD")

    return make


@pytest.fixture(scope="session")
def gold(patch_of):
    return patch_of({"shop/numbers.py": fixed()})


@pytest.fixture(scope="session")
def answer(gold):
    return Answer(
        task_id="shop-1",
        patch=gold,
        alternatives=(),
        files=(File(path="tests/test_clamp.py", text=HIDDEN),),
        script="",
        parser="pytest",
        fail_to_pass=F2P,
        pass_to_pass=P2P,
        expected_failures=(),
    )


def fixed(head="", body="return high"):
    before, _, after = PRODUCT.rpartition("return low")
    return head + before + body + after


def graded(task, patch, answer, cfg=CFG):
    return asyncio.run(grade.grade(task, patch, answer, cfg))


def checked(task, patch, cfg=CFG):
    return asyncio.run(grade.check(task, patch, cfg))


def test_the_reference_patch_resolves_and_every_test_is_named(task, gold, answer):
    verdict = graded(task, gold, answer)
    assert (verdict.grade, verdict.reason) == (Grade.RESOLVED, "")
    assert set(verdict.passed) == {*F2P, *P2P, *SEEN}
    assert (verdict.failed, verdict.dropped, verdict.exit_code, verdict.runs) == ((), (), 1, 1)


def test_a_wrong_patch_fails_the_tests_that_it_fails(task, patch_of, answer):
    verdict = graded(task, patch_of({"shop/numbers.py": PRODUCT + "\n# looked at it\n"}), answer)
    assert verdict.grade is Grade.UNRESOLVED
    assert verdict.failed == F2P
    assert "test_above" in verdict.reason
    assert "assert 1 == 3" in verdict.reason


def test_a_broken_visible_test_is_reported_and_decides_nothing_by_itself(task, patch_of, answer):
    text = fixed().replace("2 * value", "3 * value")
    verdict = graded(task, patch_of({"shop/numbers.py": text}), answer)
    assert verdict.grade is Grade.RESOLVED  # no listed test asks for it
    assert verdict.failed == ("tests/test_numbers.py::test_double",)


@pytest.mark.parametrize("patch", ["", "\n", "  \n\n"])
def test_no_patch_is_empty_and_runs_nothing(task, answer, patch):
    nowhere = dataclasses.replace(task, image="/no/such/layer")
    assert graded(nowhere, patch, answer).grade is Grade.EMPTY
    assert checked(nowhere, patch).grade is Grade.EMPTY


def test_a_patch_of_another_file_state_does_not_apply(task, gold, answer):
    verdict = graded(task, gold.replace("value > high", "value >= high"), answer)
    assert verdict.grade is Grade.PATCH_FAILED
    assert "numbers.py" in verdict.reason


def test_prose_is_no_patch(task, answer):
    assert graded(task, "please return high\n", answer).grade is Grade.PATCH_FAILED


def test_a_patch_cannot_leave_the_repository(task, gold, answer):
    text = gold.replace("shop/numbers.py", "../outside.py")
    assert graded(task, text, answer).grade is Grade.PATCH_FAILED


@pytest.mark.parametrize(
    "text", ["def clamp(:\n", "raise ImportError('gone')\n", "x = 1\n", "import sys\nsys.exit(3)\n"]
)
def test_product_code_that_cannot_be_imported_is_unresolved_not_tampered(task, patch_of, answer, text):
    verdict = graded(task, patch_of({"shop/numbers.py": text}), answer)
    assert verdict.grade is Grade.UNRESOLVED, verdict.reason
    assert set(F2P) <= set(verdict.failed)


def test_a_crash_is_unresolved(task, patch_of, answer):
    head = "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n"
    verdict = graded(task, patch_of({"shop/numbers.py": fixed(head)}), answer)
    assert verdict.grade is Grade.UNRESOLVED
    assert verdict.exit_code == 139


def test_an_endless_loop_times_out(task, patch_of, answer):
    text = fixed(body="while True: pass")
    cfg = dataclasses.replace(CFG, grade_s=4.0)
    verdict = graded(task, patch_of({"shop/numbers.py": text}), answer, cfg)
    assert verdict.grade is Grade.TIMEOUT
    assert verdict.exit_code == -1


def test_a_lost_sandbox_is_no_verdict(task, gold, answer):
    with pytest.raises(SandboxError):
        graded(dataclasses.replace(task, image="/no/such/layer"), gold, answer)


@pytest.mark.parametrize("word", ["skip", "xfail"])
def test_a_test_that_excuses_itself_has_not_passed(task, patch_of, answer, word):
    """Threat 7."""
    verdict = graded(task, patch_of({"shop/numbers.py": fixed(body=f"__import__('pytest').{word}('later')")}), answer)
    assert (verdict.grade, verdict.failed) == (Grade.UNRESOLVED, F2P), verdict


# Patches of every shape, and what they cannot do, on both backends


@pytest.fixture(params=["bwrap", pytest.param("docker", marks=pytest.mark.docker)])
def place(request, task, layer):
    """The task as this backend knows it, and its settings."""
    if request.param == "docker":
        request.getfixturevalue("docker_host")
        return dataclasses.replace(task, image=engine.image_of(layer)), dataclasses.replace(CFG, backend="docker")
    if trouble := [line for line in sandbox.probe("bwrap") if "control group" not in line]:
        pytest.skip(trouble[0])
    return task, dataclasses.replace(CFG, backend="bwrap")


def added(path, lines):
    """A patch that makes a file."""
    head = f"diff --git a/{path} b/{path}\nnew file mode 100644\n--- /dev/null\n+++ b/{path}\n"
    return head + f"@@ -0,0 +1,{len(lines)} @@\n" + "".join(f"+{line}\n" for line in lines)


SHAPES = {
    "no last newline": (lambda gold, of: gold.removesuffix("\n"), Grade.PATCH_FAILED, "corrupt"),
    "turned into CRLF": (lambda gold, of: gold.replace("\n", "\r\n"), Grade.PATCH_FAILED, ""),
    "3 MB": (lambda gold, of: gold + added("words.txt", ["x" * 99] * 30_000), Grade.RESOLVED, ""),
    "100 MB": (lambda gold, of: gold + added("words.txt", ["x" * 99] * 1_000_000), Grade.PATCH_FAILED, "8 MiB"),
    "binary file": (lambda gold, of: of({"shop/numbers.py": fixed(), "a.bin": "\0\x01" * 999}), Grade.RESOLVED, ""),
    "file of CRLF lines": (lambda gold, of: of({"shop/numbers.py": fixed("x = 1\r\n")}), Grade.RESOLVED, ""),
    "file without last newline": (lambda gold, of: of({"shop/numbers.py": fixed().rstrip()}), Grade.RESOLVED, ""),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_patches_of_every_shape_get_a_named_verdict(place, gold, patch_of, answer, shape):
    """Threats 20 to 22."""
    make, decision, why = SHAPES[shape]
    verdict = graded(place[0], make(gold, patch_of), answer, place[1])
    assert verdict.grade is decision, verdict
    assert why in verdict.reason


PREPARED = """
mkdir -p ~/.local/lib/python3.11/site-packages ~/.config /tmp/bin
for file in sitecustomize.py usercustomize.py pytest.py json.py; do
    echo 'import os; os._exit(0)' | tee ~/.local/lib/python3.11/site-packages/$file /tmp/$file > $file
done
cp $(command -v true) /tmp/bin/python; echo 'export PATH=/tmp/bin:$PATH' | tee ~/.bashrc > ~/.profile
for place in /usr/bin /usr/local/bin /opt/runner/bin /etc; do cp /tmp/bin/python $place/ && echo wrote $place; done
setsid bash -c 'while :; do for f in tests/*.py; do echo "def test_above(): pass" > $f; done; done' &
sed -i 's/return 2/return  2/' shop/numbers.py
echo prepared
"""


def test_what_an_agent_prepares_in_its_box_does_not_reach_the_grader(place, answer):
    """Threat 9: watchers, start-up files and patched programs stay where they were; only the patch crosses."""
    boxed, cfg = place

    async def whole():
        async with sandbox.open_sandbox(grade._spec(boxed, cfg), backend=cfg.backend) as box:
            done = await box.exec(PREPARED)
            assert done.output.endswith(b"prepared\n"), done.output
            assert b"wrote" not in done.output
            patch = await box.extract_patch()
            watcher = asyncio.create_task(box.exec("while :; do touch tests/test_clamp.py /tmp/seen; done", timeout=60))
            verdict = await grade.grade(boxed, patch.text, answer, cfg)
            assert not watcher.done()
            watcher.cancel()
        return patch, verdict

    patch, verdict = asyncio.run(whole())
    assert "shop/numbers.py" in patch.files
    assert (verdict.grade, verdict.failed) == (Grade.UNRESOLVED, F2P), verdict
    assert set(verdict.dropped) == set(patch.files) - {"shop/numbers.py"}


def test_no_file_of_a_rollout_holds_a_word_of_the_hidden_tests(place, answer, gold, tmp_path):
    """Threat 3: neither before a grading nor beside it nor afterwards."""
    boxed, cfg = place
    pack.write(tmp_path, [pack.Mined(task=boxed, answer=answer)])
    assert "test_below" in (tmp_path / "answers.jsonl").read_text()
    # all but the host's programs
    search = (
        "env | grep test_b[e]low; cd /; grep -rsl test_b[e]low testbed tmp home opt etc var run dev/shm; echo looked"
    )

    async def looks():
        async with sandbox.open_sandbox(grade._spec(boxed, cfg), backend=cfg.backend) as box:
            await box.exec("echo 'def test_below(): pass' > mine.py")
            assert (await box.exec(search)).output == b"testbed/mine.py\nlooked\n"  # it would be found
            await box.exec("rm mine.py")
            first = asyncio.create_task(grade.grade(boxed, gold, answer, cfg))
            seen = {(await box.exec(search)).output}
            while not first.done():
                seen.add((await box.exec(search)).output)
            assert (await first).grade is Grade.RESOLVED
            return seen | {(await box.exec(search)).output}

    assert asyncio.run(looks()) == {b"looked\n"}


DICE = """import time


def test_seen():
    seen = [time.tzname, hash("seed"), list({"one", "two", "three"})]
    assert seen == 0, f"saw {seen}"
"""


def test_two_runs_of_one_patch_are_one_verdict(place, gold, answer):
    """Threat 33: neither the order of sets nor the time zone is a die."""
    boxed, cfg = place
    strange = dataclasses.replace(
        answer,
        files=(*answer.files, File(path="tests/test_seen.py", text=DICE)),
        fail_to_pass=(*F2P, "tests/test_seen.py::test_seen"),
    )
    first, second = (dataclasses.replace(graded(boxed, gold, strange, cfg), seconds=0.0) for _ in range(2))
    assert first == second
    assert "UTC" in first.reason


# Forgeries: each would have every test reported as passed, or no test run at all, without mending anything.

REWRITE = """
import pytest

@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(item, call):
    report = yield
    report.outcome, report.longrepr = "passed", None
    return report
"""
PATCH_REPORTS = """
import _pytest.reports as reports
_make = reports.TestReport.from_item_and_call.__func__

def _green(cls, item, call):
    report = _make(cls, item, call)
    report.outcome, report.longrepr = "passed", None
    return report

reports.TestReport.from_item_and_call = classmethod(_green)
"""
# knows the tests that it wants, and leaves alone what it does not know
PATCH_LIKELY_REPORTS = PATCH_REPORTS.replace("report.outcome,", "if item.name == 'test_above': report.outcome,")
PATCH_ASSERTIONS = """
import _pytest.python

def _call(pyfuncitem):
    return True

import gc
from _pytest.config import PytestPluginManager
for manager in [o for o in gc.get_objects() if isinstance(o, PytestPluginManager)]:
    for hook in manager.hook.pytest_pyfunc_call.get_hookimpls():
        hook.function = _call
        hook.argnames = ("pyfuncitem",)
"""
VANISH = """
import _pytest.python
_collect = _pytest.python.PyCollector.collect
_pytest.python.PyCollector.collect = lambda self: [t for t in _collect(self) if t.name != "test_above"]
"""
SKIP_TESTS = "import pytest\npytest.skip('later', allow_module_level=True)\n"
EXIT_ZERO = "import os\nos._exit(0)\n"
SYSTEM_EXIT = "import sys\nsys.exit(0)\n"
SUMMARY = """
import os, sys
text = "\\n==== 6 passed in 0.01s ====\\nPASSED tests/test_clamp.py::test_above\\n"
for fd in range(1, 30):
    try:
        os.write(fd, text.encode())
    except OSError:
        pass
os._exit(1)
"""
AT_EXIT = """
import atexit, glob, os
def _rewrite():
    for path in glob.glob("*.xml") + glob.glob("*.json"):
        open(path, "w").write('{"passed": "all"}')
    os._exit(0)
atexit.register(_rewrite)
"""
FORK = """
import os
if os.fork():
    os.wait()
    os._exit(1)
"""
STEAL_NONCE = """
import gc, os
for thing in gc.get_objects():
    if type(thing).__name__ == "Recorder":
        for test in ["tests/test_clamp.py::test_above"]:
            for phase in ["setup", "call", "teardown"]:
                thing._say(phase, "passed", test, "")
            thing._say("ran", "passed", test)
"""
FAKE_JSON = "def load(file): raise SystemExit(0)\ndef loads(text): raise SystemExit(0)\n"
QUIET = "def test_above():\n    pass\n"
PLUGIN = "[pytest]\naddopts = -p shop.plugin\n"

PRODUCT_FORGERIES = {
    "reports": PATCH_REPORTS,
    "likely reports": PATCH_LIKELY_REPORTS,
    "calls": PATCH_ASSERTIONS,
    "vanishing": VANISH,
    "skip": SKIP_TESTS,
    "exit 0": EXIT_ZERO,
    "system exit": SYSTEM_EXIT,
    "summary": SUMMARY,
    "at exit": AT_EXIT,
    "fork": FORK,
    "nonce": STEAL_NONCE,
}
FILE_FORGERIES = {
    "conftest": {"conftest.py": REWRITE},
    "conftest of the tests": {"tests/conftest.py": REWRITE},
    "ini": {"pytest.ini": PLUGIN, "shop/plugin.py": REWRITE},
    "hidden ini": {".pytest.ini": PLUGIN, "shop/plugin.py": REWRITE},
    "tox": {"tox.ini": PLUGIN, "shop/plugin.py": REWRITE},
    "sitecustomize": {"sitecustomize.py": EXIT_ZERO, "usercustomize.py": EXIT_ZERO},
    "path file": {"shop.pth": "import os; os._exit(0)\n"},
    "collision": {"tests/test_clamp.py": QUIET},
    "collision with a folder": {"tests/test_clamp.py/__init__.py": QUIET},
    "visible": {"tests/test_numbers.py": QUIET},
    "json": {"json.py": FAKE_JSON},
    "runner": {"pytest.py": "import os\nos._exit(0)\n", "_pytest/__init__.py": EXIT_ZERO, "pluggy.py": EXIT_ZERO},
    "entry point": {"x.egg-info/entry_points.txt": "[pytest11]\nx = shop.plugin\n", "shop/plugin.py": REWRITE},
}


@pytest.mark.parametrize("name", PRODUCT_FORGERIES)
def test_product_code_that_forges_its_run_is_never_resolved(task, patch_of, answer, name):
    verdict = graded(task, patch_of({"shop/numbers.py": PRODUCT_FORGERIES[name] + PRODUCT}), answer)
    assert verdict.grade in (Grade.TAMPERED, Grade.UNRESOLVED), verdict
    tampering = {"reports", "likely reports", "calls", "vanishing", "skip", "exit 0", "nonce"}
    assert (verdict.grade is Grade.TAMPERED) == (name in tampering), verdict


@pytest.mark.parametrize("name", FILE_FORGERIES)
def test_files_that_steer_the_runner_are_not_graded(task, patch_of, answer, name):
    """Alone they are nothing, beside a wrong edit that edit stays wrong, beside the right one it stays right."""
    files = FILE_FORGERIES[name]
    edit = {"shop/numbers.py": PRODUCT + "\n# looked at it\n"}
    verdict = graded(task, patch_of(files | edit), answer)
    assert (verdict.grade, verdict.failed) == (Grade.UNRESOLVED, F2P), verdict
    assert set(verdict.dropped) == {path for path in files if not path.startswith("shop/")}


def test_product_code_that_rewrites_tests_before_they_are_read_is_seen(task, patch_of, answer):
    """Canaries stay as they are, for only what mentions the product is rewritten."""
    rewrite = """
import pathlib, re
for path in pathlib.Path("tests").glob("*.py"):
    path.write_text(re.sub("assert (clamp|double).*", "assert True", path.read_text()))
"""
    late = (File(path="tests/test_z.py", text=HIDDEN),)
    ids = tuple(test.replace("test_clamp.py", "test_z.py") for test in P2P)
    moved = dataclasses.replace(answer, files=late, fail_to_pass=("tests/test_z.py::test_above",), pass_to_pass=ids)
    verdict = graded(task, patch_of({"shop/numbers.py": rewrite + PRODUCT}), moved)
    assert verdict.grade is Grade.TAMPERED
    assert "tests/test_z.py" in verdict.reason


def test_a_patch_of_protected_files_alone_is_empty(task, patch_of, answer):
    verdict = graded(task, patch_of({"conftest.py": REWRITE}), answer)
    assert (verdict.grade, verdict.dropped) == (Grade.EMPTY, ("conftest.py",))


def test_the_right_fix_resolves_beside_protected_files(task, patch_of, answer):
    files = {"shop/numbers.py": fixed(), "conftest.py": REWRITE, "tests/test_new.py": QUIET}
    verdict = graded(task, patch_of(files, removed=["tests/test_numbers.py"]), answer)
    assert verdict.grade is Grade.RESOLVED, verdict.reason
    assert verdict.dropped == ("conftest.py", "tests/test_new.py", "tests/test_numbers.py")


def test_shared_configuration_may_change_but_not_what_it_says_to_the_runner(task, patch_of, answer, layer):
    text = (layer / "pyproject.toml").read_text()
    edit = {"shop/numbers.py": fixed()}
    harmless = graded(task, patch_of(edit | {"pyproject.toml": text.replace('"shop"', '"shop2"')}), answer)
    assert (harmless.grade, harmless.dropped) == (Grade.RESOLVED, ())
    runner = text.replace("testpaths", 'addopts = "-p shop.plugin"\ntestpaths')
    steered = graded(task, patch_of(edit | {"pyproject.toml": runner, "shop/plugin.py": REWRITE}), answer)
    assert (steered.grade, steered.dropped) == (Grade.RESOLVED, ("pyproject.toml",))


def test_a_link_in_the_place_of_the_tests_is_not_followed(task, layer, tmp_path, answer):
    copy = tmp_path / "shop"
    git(tmp_path, "clone", "-q", str(layer), str(copy))
    git(copy, "rm", "-rq", "tests")
    (copy / "tests").symlink_to("shop")
    git(copy, "add", "-A")
    verdict = graded(task, git(copy, "diff", "--cached", "--binary", "--no-renames", "HEAD"), answer)
    assert verdict.grade is Grade.EMPTY
    assert set(verdict.dropped) == {"tests", "tests/test_numbers.py"}


# check


def test_check_sees_what_breaks_and_knows_no_answer(task, patch_of, gold):
    assert checked(task, gold).grade is Grade.RESOLVED
    broken = checked(task, patch_of({"shop/numbers.py": PRODUCT.replace("2 * value", "3 * value")}))
    assert (broken.grade, broken.failed) == (Grade.UNRESOLVED, ("tests/test_numbers.py::test_double",))
    forged = checked(task, patch_of({"shop/numbers.py": PATCH_REPORTS + PRODUCT}))
    assert forged.grade is Grade.TAMPERED


# Answers


def test_equal_patches_of_a_task_cost_one_run(task, gold, answer, monkeypatch):
    opened = []
    open_sandbox = sandbox.open_sandbox

    def counted(*args, **kwargs):
        opened.append(1)
        return open_sandbox(*args, **kwargs)

    monkeypatch.setattr(sandbox, "open_sandbox", counted)

    async def grades():
        answers = Answers({"shop-1": answer})
        together = await asyncio.gather(*(answers.grade(task, gold, CFG) for _ in range(4)))
        later = await answers.grade(task, gold, CFG)
        await answers.grade(task, gold.replace("return high", "return  high"), CFG)
        return {id(verdict) for verdict in (*together, later)}

    assert len(asyncio.run(grades())) == 1
    assert len(opened) == 2


def test_a_lost_sandbox_is_asked_for_again(task, gold, answer):
    async def grades():
        answers = Answers({"shop-1": answer})
        lost = dataclasses.replace(task, image="/no/such/layer")
        results = await asyncio.gather(*(answers.grade(lost, gold, CFG) for _ in range(2)), return_exceptions=True)
        await asyncio.sleep(0)
        return results, answers._runs

    results, kept = asyncio.run(grades())
    assert [type(result).__mro__.index(SandboxError) >= 0 for result in results] == [True, True]
    assert kept == {}


def test_an_unknown_task_is_the_users_mistake(task, gold):
    with pytest.raises(ValueError, match="shop-1 has no answer"):
        asyncio.run(Answers({}).grade(task, gold, CFG))


SECOND = {
    "a time-out, and none with more room": ([Grade.TIMEOUT, Grade.RESOLVED], (), Grade.RESOLVED, 2),
    "two time-outs": ([Grade.TIMEOUT] * 2, (), Grade.TIMEOUT, 2),
    "a time-out, then a regression that stays": (
        [Grade.TIMEOUT, *[Grade.UNRESOLVED] * 3],
        P2P[:1],
        Grade.UNRESOLVED,
        4,
    ),
    "a regression that stays": ([Grade.UNRESOLVED] * 3, P2P[:1], Grade.UNRESOLVED, 3),
    "a regression that comes and goes": ([Grade.UNRESOLVED] * 2 + [Grade.RESOLVED], P2P[:1], Grade.FLAKY, 3),
    "a regression, and a time-out": ([Grade.UNRESOLVED, Grade.TIMEOUT], P2P[:1], Grade.FLAKY, 2),
    "a regression, and a forgery": ([Grade.UNRESOLVED, Grade.TAMPERED], P2P[:1], Grade.TAMPERED, 2),
    "no fix": ([Grade.UNRESOLVED], F2P, Grade.UNRESOLVED, 1),
    "no fix, and a regression": ([Grade.UNRESOLVED], (*F2P, *P2P), Grade.UNRESOLVED, 1),
    "a fix": ([Grade.RESOLVED], (), Grade.RESOLVED, 1),
}


@pytest.mark.parametrize(("found", "failed", "expected", "runs"), SECOND.values(), ids=SECOND.keys())
def test_what_may_be_the_machine_or_chance_is_run_again(task, gold, answer, monkeypatch, found, failed, expected, runs):
    """The decisions alone; the runs are stood in for."""
    coming = iter(found)

    async def grade_(task, patch, answer, cfg):
        one = next(coming)
        wrong = failed if one is Grade.UNRESOLVED else ()
        passed = tuple(test for test in (*F2P, *P2P) if test not in wrong)
        return dataclasses.replace(grade._verdict(one, "why"), passed=passed, failed=tuple(wrong), runs=1, seconds=2.0)

    monkeypatch.setattr(grade, "grade", grade_)
    verdict = asyncio.run(Answers({"shop-1": answer}).grade(task, gold, dataclasses.replace(CFG, confirm=2)))
    assert (verdict.grade, verdict.runs, verdict.seconds) == (expected, runs, 2.0 * runs)
    assert list(coming) == []
    if expected is Grade.FLAKY:
        assert (set(verdict.passed), verdict.failed) == ({*F2P, *P2P[1:]}, P2P[:1])
        assert verdict.reason == f"unresolved (why), and {found[-1]} in run {runs}"


def test_a_time_out_is_asked_again_when_less_runs_beside_it(task, gold, answer, monkeypatch):
    """At most as long as one run may take: others may keep coming."""
    going, seen = 0, []

    async def grade_(task, patch, answer, cfg):
        nonlocal going
        going += 1
        if patch == gold:
            seen.append(going)
        await asyncio.sleep(0 if patch == gold else 0.3)
        going -= 1
        return grade._verdict(Grade.TIMEOUT if patch == gold and len(seen) == 1 else Grade.RESOLVED, "")

    monkeypatch.setattr(grade, "grade", grade_)

    async def together(grade_s):
        answers, cfg = Answers({"shop-1": answer}), dataclasses.replace(CFG, grade_s=grade_s)
        patches = [*(f"{gold}{n}" for n in range(4)), gold]
        return (await asyncio.gather(*(answers.grade(task, patch, cfg) for patch in patches)))[-1].grade

    assert asyncio.run(together(20.0)) is Grade.RESOLVED
    assert seen == [5, 1]
    seen.clear()
    asyncio.run(together(0.05))
    assert seen == [5, 5]


def test_a_patch_that_does_not_end_is_given_a_second_run_and_is_not_kept(task, answer, patch_of):
    endless = patch_of({"shop/numbers.py": "while True:\n    pass\n"})

    async def one():
        answers = Answers({"shop-1": answer})
        verdict = await answers.grade(task, endless, dataclasses.replace(CFG, grade_s=3.0))
        await asyncio.sleep(0)
        return verdict, answers._runs

    verdict, kept = asyncio.run(one())
    assert (verdict.grade, verdict.reason, verdict.runs) == (Grade.TIMEOUT, "time-out", 2)
    assert verdict.seconds > 6
    assert kept == {}


def test_a_test_that_is_decided_by_chance_is_flaky(task, answer, patch_of):
    """In real runs: half of them break a test that passed. A patch that nothing was seen of at first is tried again."""
    chance = f"import os\n\n{fixed()}".replace("return 2 * value", "return 2 * value + os.urandom(1)[0] % 2")
    for number in range(20):
        patch = patch_of({"shop/numbers.py": f"{chance}# {number}\n"})
        cfg = dataclasses.replace(CFG, confirm=20)
        verdict = asyncio.run(Answers({"shop-1": answer}).grade(task, patch, cfg))
        if verdict.runs > 1:
            break
    assert verdict.grade is Grade.FLAKY, verdict
    assert set(F2P) <= set(verdict.passed)
    assert P2P[-1] in verdict.failed
    assert verdict.reason.endswith(f"and resolved in run {verdict.runs}")


# validate


def reasons(task, answer, runs=1):
    return [reason.partition(":")[0] for reason in asyncio.run(grade.validate(task, answer, CFG, runs=runs))]


def test_a_good_task_gives_no_reason(task, answer):
    assert asyncio.run(grade.validate(task, answer, CFG, runs=2)) == []


def test_validate_names_what_is_wrong_with_a_task(task, answer, patch_of):
    wrong = patch_of({"shop/numbers.py": PRODUCT + "\n# looked at it\n"})
    change = dataclasses.replace
    assert reasons(task, change(answer, fail_to_pass=())) == ["no_f2p"]
    assert reasons(task, change(answer, parser="go")) == ["unknown_parser"]
    assert reasons(task, change(answer, patch=wrong)) == ["gold_fails"]
    assert reasons(task, change(answer, fail_to_pass=P2P[:1], pass_to_pass=())) == ["empty_passes"]
    absent = (*SEEN, "tests/test_numbers.py::test_absent")
    assert "visible_fails" in reasons(change(task, visible=absent), answer)
    protected = patch_of({"shop/numbers.py": fixed(), "conftest.py": "x = 1\n"})
    assert reasons(task, change(answer, patch=protected)) == ["gold_protected"]


def test_validate_tells_chance_from_fault(task, gold, answer, patch_of):
    """Two runs of one patch that disagree are flaky; the runs here are real, their disagreement is put together."""
    good = graded(task, gold, answer)
    bad = graded(task, patch_of({"shop/numbers.py": PRODUCT + "\n# looked at it\n"}), answer)
    slow = dataclasses.replace(bad, grade=Grade.TIMEOUT)
    mute = graded(task, patch_of({"shop/numbers.py": "import os\nos._exit(9)\n"}), answer)
    for runs, name in {(good, bad): "gold_flaky", (bad, bad): "gold_fails", (slow,): "too_slow"}.items():
        assert grade._gold_refusals(runs)[0].startswith(name)
    assert grade._gold_refusals([mute])[0].startswith("nothing_parsed")
    assert grade._gold_refusals([good, good]) == grade._empty_refusals([bad, bad]) == []
    assert grade._empty_refusals([good, bad])[0].startswith("empty_flaky")
    assert grade._empty_refusals([good, good])[0].startswith("empty_passes")


def test_a_test_that_passes_by_chance_refuses_its_task(task, gold, answer, monkeypatch):
    """Threat 30: chance is a number that every second run finds odd."""
    lots, spec = itertools.count(), grade._spec

    def numbered(*words):
        found = spec(*words)
        return dataclasses.replace(found, env={**found.env, "LOT": str(next(lots))})

    monkeypatch.setattr(grade, "_spec", numbered)
    dice = "import os\n\n\ndef test_lot():\n    assert int(os.environ['LOT']) % 2\n"
    flaky = dataclasses.replace(
        answer,
        files=(*answer.files, File(path="tests/test_lot.py", text=dice)),
        fail_to_pass=(*F2P, "tests/test_lot.py::test_lot"),
    )
    (refusal,) = asyncio.run(grade.validate(task, flaky, CFG, runs=2))
    assert refusal.startswith("gold_flaky: 1 of 2 runs: unresolved, 1 of 5 tests, tests/test_lot.py::test_lot")


@pytest.mark.parametrize("leak", ["history", "blob", "name", "residue"])
def test_validate_finds_leaks(task, answer, layer, tmp_path, leak):
    copy = tmp_path / "shop"
    git(tmp_path, "clone", "-q", str(layer), str(copy))
    if leak == "history":
        git(copy, "commit", "-q", "--allow-empty", "-m", "the fix")
    elif leak == "blob":
        git(copy, "hash-object", "-w", "--stdin", text=fixed())
    elif leak == "name":
        lay_out(copy, {".cache/lastfailed": '{"tests/test_clamp.py::test_above": true}'})
    else:
        lay_out(copy, {"tests/__pycache__/test_clamp.cpython-311.pyc": "x"})
    found = asyncio.run(grade.validate(dataclasses.replace(task, image=str(copy)), answer, CFG, runs=1))
    assert found, leak
    assert found[0].startswith("not_one_commit" if leak == "history" else "leak_found"), found


# on another backend


@pytest.mark.docker
def test_docker_gives_the_same_verdicts(docker_host, task, layer, patch_of, gold, answer):
    boxed, cfg = dataclasses.replace(task, image=engine.image_of(layer)), dataclasses.replace(CFG, backend="docker")
    patches = {
        "reference": (gold, Grade.RESOLVED),
        "wrong": (patch_of({"shop/numbers.py": PRODUCT + "\n# looked at it\n"}), Grade.UNRESOLVED),
        "reports": (patch_of({"shop/numbers.py": PATCH_REPORTS + PRODUCT}), Grade.TAMPERED),
        "runner": (patch_of(FILE_FORGERIES["runner"]), Grade.EMPTY),
    }
    for name, (patch, decision) in patches.items():
        there, here = graded(boxed, patch, answer, cfg), graded(task, patch, answer)
        assert there.grade is decision, (name, there)
        assert [there.passed, there.failed, there.dropped] == [here.passed, here.failed, here.dropped], name
    assert graded(boxed, "", answer, cfg).grade is Grade.EMPTY
    assert asyncio.run(grade.validate(boxed, answer, cfg, runs=1)) == []
    with pytest.raises(SandboxError):
        graded(dataclasses.replace(task, image="entropo-test:none"), gold, answer, cfg)
