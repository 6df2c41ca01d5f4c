"""The official harness on a real engine: hand-made rows of swebench 5, and what both graders say of the same patches.

Nothing stands in for the harness, its containers or our grader. The rows are ours: no published one was at hand.
"""

from __future__ import annotations

import asyncio
import functools
import json
import subprocess
from dataclasses import dataclass, field, replace
from pathlib import Path

import engine
import pytest

from entropo_ray import config, evaluate, grade, official, store, tasks
from entropo_ray.records import Grade, Graded, Prediction, Stop, Trajectory
from entropo_ray.tasks import rows, scripts, swebench
from entropo_ray.tasks.pack import Mined

pytestmark = [pytest.mark.docker, pytest.mark.usefixtures("docker_host")]
BOX = config.Sandbox(backend="docker", memory_mb=512, disk_mb=64, grade_s=120)
EXPECTED = {
    "gold": Grade.RESOLVED,
    "empty": Grade.EMPTY,
    "wrong": Grade.UNRESOLVED,
    "half": Grade.UNRESOLVED,  # of the tests that fail
    "breaking": Grade.UNRESOLVED,  # mends them all, and breaks one that passed
    "dead": Grade.UNRESOLVED,  # cannot be imported
    "junk": Grade.PATCH_FAILED,
}
Files = dict[str, bytes | None]


@dataclass(frozen=True)
class Case:
    """A repository, its hidden tests, and the states that patches bring it to."""

    base: Files
    tests: Files
    command: str
    fail_to_pass: list[str]
    pass_to_pass: list[str]
    states: dict[str, Files]  # of the kinds in EXPECTED that are not made for all rows alike
    parser: str = "parse_log_pytest"
    main: str = "calc.py"
    extra: dict[str, str] = field(default_factory=dict)  # columns in place of those that are made


PYTEST = "python3 -m pytest -rA --tb=short -p no:cacheprovider"
CALC = b"def add(a, b):\n    return a - b\n\n\ndef twice(a):\n    return a\n\n\ndef half(a):\n    return a / 2\n"
ADDS, DOUBLES = (b"a - b", b"a + b"), (b"    return a\n", b"    return 2 * a\n")
CALC_TESTS = b"import calc\n\n\ndef test_half():\n    assert calc.half(4) == 2\n"
FUNCTIONS = Case(
    base={"calc.py": CALC, "tests/test_calc.py": CALC_TESTS},
    tests={
        "tests/test_calc.py": CALC_TESTS + b"\n\ndef test_add():\n    assert calc.add(1, 2) == 3\n\n\n"
        b"def test_twice():\n    assert calc.twice(3) == 6\n"
    },
    command=f"{PYTEST} tests/test_calc.py",
    fail_to_pass=["tests/test_calc.py::test_add", "tests/test_calc.py::test_twice"],
    pass_to_pass=["tests/test_calc.py::test_half"],
    states={
        "gold": {"calc.py": CALC.replace(*ADDS).replace(*DOUBLES)},
        "half": {"calc.py": CALC.replace(*ADDS)},
        "breaking": {"calc.py": CALC.replace(*ADDS).replace(*DOUBLES).replace(b"a / 2", b"a // 3")},
    },
)

AREA = b"def area(kind, a):\n    return a\n"
SIDES = b"SIDES = {'square': 4, 'long side': 2, 'point': 0}\n"
RIGHT_AREA = b"from shapes.sides import SIDES\n\n\ndef area(kind, a):\n    return a * a if SIDES[kind] else 0\n"
AREA_TESTS = b"""import pytest

from shapes.area import area


class TestArea:
    @pytest.mark.parametrize("kind", ["square", "long side", "point-like thing"])
    def test_area(self, kind):
        assert area(kind.partition("-")[0], 3) == (0 if kind.startswith("point") else 9)

    class TestOne:
        def test_unit(self):
            assert area("square", 1) == 1
"""
CLASSES = Case(
    base={"shapes/__init__.py": b"", "shapes/area.py": AREA, "tests/test_old.py": b"def test_old():\n    pass\n"},
    tests={
        "tests/test_area.py": AREA_TESTS,
        "tests/test_old.py": b"from shapes import area\n\n\ndef test_old():\n    assert area.area('square', 1) == 1\n",
    },
    command=f"{PYTEST} tests/test_area.py tests/test_old.py",
    # as the parser reads them, up to the first blank; the last is cut off as some published ids are
    fail_to_pass=[f"tests/test_area.py::TestArea::test_area[{kind}" for kind in ("square]", "long", "point-l")],
    pass_to_pass=["tests/test_area.py::TestArea::TestOne::test_unit", "tests/test_old.py::test_old"],
    states={
        "gold": {"shapes/area.py": RIGHT_AREA, "shapes/sides.py": SIDES},
        "half": {"shapes/area.py": AREA.replace(b"return a", b"return a * a")},
        "breaking": {
            "shapes/area.py": RIGHT_AREA.replace(b"return", b"assert a != 1\n    return"),
            "shapes/sides.py": SIDES,
        },
    },
    parser="parse_log_pytest_options",
    main="shapes/area.py",
)

DAYS = b"def leap(year):\n    return year % 4 == 0\n\n\ndef days(year):\n    return 365\n"
RIGHT_DAYS = b"""def leap(year):
    return year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)


def days(year):
    return 366 if leap(year) else 365
"""
DAYS_TESTS = b"""import unittest

from days import days, leap


class DaysTest(unittest.TestCase):
    def test_century(self):
        self.assertFalse(leap(1900))

    def test_long(self):
        self.assertEqual(days(2000), 366)

    def test_plain(self):
        self.assertFalse(leap(2001))
"""
UNITTEST = Case(
    base={"days.py": DAYS, "tests/__init__.py": b"", "tests/test_days.py": DAYS_TESTS.replace(b"1900", b"1901")},
    tests={"tests/test_days.py": DAYS_TESTS},
    command="python3 -m unittest -v tests.test_days",
    fail_to_pass=[f"test_{name} (tests.test_days.DaysTest.test_{name})" for name in ("century", "long")],
    pass_to_pass=["test_plain (tests.test_days.DaysTest.test_plain)"],
    states={
        "gold": {"days.py": RIGHT_DAYS},
        "half": {"days.py": DAYS.replace(b"== 0", b"== 0 and year != 1900")},
        "breaking": {"days.py": RIGHT_DAYS.replace(b"return year", b"return year == 2001 or year")},
    },
    parser="parse_log_django",
    main="days.py",
)

TABLE = b"NAMES = ('a', 'b')\r\nSIZE = 2\r\n\r\n\r\ndef size():\r\n    return SIZE\r\n"
TABLE_TESTS = b"""from pathlib import Path

import table


def test_size():
    assert table.size() == 3


def test_icon():
    assert Path("icon.bin").read_bytes()[:4] == bytes([0, 255, 13, 10])


def test_names():
    assert table.NAMES[:2] == ("a", "b")
"""
ICON = bytes([0, 255, 13, 10]) + bytes(range(256)) * 4
BYTES = Case(
    base={"table.py": TABLE, "icon.bin": b"\0old", "tests/test_table.py": b"def test_old():\n    pass\n"},
    tests={"tests/test_table.py": TABLE_TESTS},
    command=f"{PYTEST} tests/test_table.py",
    fail_to_pass=["tests/test_table.py::test_size", "tests/test_table.py::test_icon"],
    pass_to_pass=["tests/test_table.py::test_names"],
    states={
        "gold": {"table.py": TABLE.replace(b"SIZE = 2", b"SIZE = 3"), "icon.bin": ICON},
        "half": {"table.py": TABLE.replace(b"SIZE = 2", b"SIZE = 3"), "icon.bin": None},
        "breaking": {"table.py": TABLE.replace(b"SIZE = 2", b"SIZE = 3").replace(b"'b'", b"'c'"), "icon.bin": ICON},
    },
    main="table.py",
)
CASES = {"t__functions-1": FUNCTIONS, "t__classes-2": CLASSES, "t__unittest-3": UNITTEST, "t__bytes-4": BYTES}


# Rows


def git(home, *words):
    identity = ("-c", "user.name=t", "-c", "user.email=t@localhost", "-c", "core.autocrlf=false")
    return subprocess.run(["git", *identity, *words], cwd=home, check=True, capture_output=True).stdout.decode()


def lay(home, files):
    for path, data in files.items():
        if data is None:
            (home / path).unlink()
        else:
            (home / path).parent.mkdir(parents=True, exist_ok=True)
            (home / path).write_bytes(data)


def diff(home, files):
    """The patch that brings the base to these files, as git makes it; the base is as it was afterwards."""
    lay(home, files)
    git(home, "add", "-A")
    made = git(home, "diff", "--cached", "--binary", "--full-index", "--no-renames", "HEAD")
    git(home, "reset", "-q", "--hard")
    return made


def row_of(key, case, home):
    """A row of swebench 5 on an image that the engine has, and a patch of each kind."""
    lay(home, case.base)
    git(home, "init", "-q", "-b", "main")
    git(home, "add", "-A")
    git(home, "commit", "-qm", "base")
    image = engine.image_of(home)  # before anything of the answer was an object of the repository
    base = git(home, "rev-parse", "HEAD").strip()
    test_patch = diff(home, case.tests)
    patches = {kind: diff(home, files) for kind, files in case.states.items()}
    patches |= {"wrong": diff(home, {case.main: case.base[case.main] + b"# nothing\n"})}
    patches |= {"dead": diff(home, {case.main: b"raise RuntimeError\n"}), "empty": "", "junk": "no diff\n"}
    row = {
        "instance_id": key,
        "image": image,
        "repo": key.partition("-")[0].replace("__", "/"),
        "version": "1.0",
        "base_commit": base,
        "patch": patches["gold"],
        "test_patch": test_patch,
        "problem_statement": "it is wrong",
        "FAIL_TO_PASS": json.dumps(case.fail_to_pass),
        "PASS_TO_PASS": json.dumps(case.pass_to_pass),
        "log_parser": case.parser,
        "eval_type": "pass_and_fail",
        "eval_script": scripts.made(base=base, test_patch=test_patch, command=case.command, workdir="/testbed"),
    }
    return row | case.extra, patches


@pytest.fixture(scope="module")
def suite(docker_host, tmp_path_factory):
    """By id, a task with its answer, read from a file of rows, and the patches of each kind."""
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    made = {key: row_of(key, case, tmp_path_factory.mktemp("repository")) for key, case in CASES.items()}
    file.write_text("".join(json.dumps(row) + "\n" for row, _ in made.values()))
    return {mined.task.id: (mined, made[mined.task.id][1]) for mined in rows.read(file)}


def named(mined: Mined, kind: str) -> Mined:
    """The same task by another name: the harness takes one prediction an id."""
    key = f"{mined.task.id}-{kind}"
    return replace(mined, task=replace(mined.task, id=key), answer=replace(mined.answer, task_id=key))


def prediction(key, patch):
    return Prediction(instance_id=key, model_name_or_path="t/model", model_patch=patch)


def ours(asked, box=BOX):
    """Our verdicts on (task with answer, patch), two at a time."""

    async def whole():
        turn = asyncio.Semaphore(2)

        async def one(mined, patch):
            async with turn:
                verdict = await grade.grade(mined.task, patch, mined.answer, box)
            return Graded(task_id=mined.task.id, sample=0, grade=verdict.grade, verdict=verdict)

        return await asyncio.gather(*(one(mined, patch) for mined, patch in asked))

    return asyncio.run(whole())


def theirs(asked, to: Path, **how):
    """The harness's report on the same."""
    table = [swebench.official(mined.task, mined.answer) for mined, _ in asked]
    return official.run(table, [prediction(mined.task.id, patch) for mined, patch in asked], to=to, workers=2, **how)


@pytest.fixture(scope="module")
def verdicts(suite, tmp_path_factory):
    """By id, what both say of each kind of patch of each row."""
    asked = [
        (named(mined, kind), patch) for mined, patches in suite.values() for kind, patch in sorted(patches.items())
    ]
    report = theirs(asked, tmp_path_factory.mktemp("harness") / "run", timeout_s=120)
    return {compared.task_id: compared for compared in official.agreement(report, ours(asked))}


# Agreement


@pytest.mark.parametrize("key", CASES)
def test_both_graders_say_the_same_of_every_kind_of_patch(verdicts, key):
    found = {kind: (verdicts[f"{key}-{kind}"].official, verdicts[f"{key}-{kind}"].ours) for kind in EXPECTED}
    assert found == {kind: (expected, expected) for kind, expected in EXPECTED.items()}
    assert all(verdicts[f"{key}-{kind}"].agree for kind in EXPECTED)


@pytest.mark.parametrize("key", CASES)
def test_each_row_is_a_task_that_holds(suite, key):
    """Its reference resolves it, nothing does not, and its image holds one commit and nothing of the answer."""
    mined, _ = suite[key]
    assert asyncio.run(grade.validate(mined.task, mined.answer, BOX, runs=1)) == []


def test_both_graders_take_a_patch_that_fits_roughly(suite, tmp_path):
    mined, patches = suite["t__functions-1"]
    rough = patches["gold"].replace("@@ -1,9 ", "@@ -31,9 ").replace(" def half(a):", " def third(a):")
    assert rough != patches["gold"]
    (result,) = theirs([(mined, rough)], tmp_path / "run", timeout_s=120).results
    assert [result.grade, *(graded.grade for graded in ours([(mined, rough)]))] == [Grade.RESOLVED] * 2


def test_both_graders_give_up_on_a_patch_that_does_not_end(suite, tmp_path):
    mined, _ = suite["t__unittest-3"]
    slow = "diff --git a/days.py b/days.py\n--- a/days.py\n+++ b/days.py\n@@ -1,1 +1,2 @@\n+while True: pass\n"
    slow += f" {DAYS.decode().splitlines()[0]}\n"
    (result,) = theirs([(mined, slow)], tmp_path / "run", timeout_s=5).results
    assert (result.grade, result.reason) == (
        Grade.TIMEOUT,
        "tests_timed_out: Test timed out after 5 seconds.",
    )
    (graded,) = ours([(mined, slow)], replace(BOX, grade_s=5))
    assert (graded.grade, graded.verdict.reason) == (Grade.TIMEOUT, "time-out")


# An evaluation

SKIPS = RIGHT_DAYS.replace(
    b"    return year", b"    if year == 2001:\n        raise __import__('unittest').SkipTest\n    return year"
)


def trajectory(task_id, patch):
    return Trajectory(
        task_id=task_id, sample=0, round=0, seed=0, kind="model", scaffold="", prompt="", temperature=0.7,
        turns=(), token_ids=(1,), action_mask=(True,), behaviour_logp=(-1.0,), num_turns=1, num_actions=1,
        num_tokens=1, patch=patch, patch_class="", files=(), stop=Stop.AGENT, reason="", wall_s=1.0, grade=None,
        verdict=None,
    )  # fmt: skip


def graded(unit, path):
    """As `resolve` has it done in a Ray task."""
    verdict = evaluate._attempt(functools.partial(evaluate._grade, answers=path, cfg=BOX), unit, 1)
    return Graded(task_id=unit.task.id, sample=0, grade=verdict.grade, verdict=verdict)


def test_an_evaluation_gets_official_numbers_and_lists_what_the_graders_do_not_agree_on(
    suite, tmp_path, tmp_path_factory, monkeypatch
):
    """A patch that has a test skipped that passed is resolved for the harness, and not for us."""
    (functions, good), (unittest, other) = suite["t__functions-1"], suite["t__unittest-3"]
    home = tmp_path_factory.mktemp("again")
    lay(home, UNITTEST.base)
    git(home, "init", "-q")
    git(home, "add", "-A")
    git(home, "commit", "-qm", "base")
    patches = {"right": (functions, good["gold"]), "skips": (unittest, diff(home, {"days.py": SKIPS}))}
    patches |= {"half": (unittest, other["half"]), "none": (unittest, "")}
    mined = [named(m, kind) for kind, (m, _) in patches.items()]
    tasks.write(tmp_path / "pack", mined)
    path = str(tmp_path / "pack")
    loaded = tasks.load(config.Tasks(path=path, split="all"))
    out = store.evaluation_of(tmp_path / "run")
    units = [evaluate.Unit(task, patches[task.id.rpartition("-")[2]][1], (0,)) for task in loaded]
    store.write(out.trajectories, Trajectory, [trajectory(unit.task.id, unit.patch) for unit in units])
    evaluate.choose(out, loaded, config.Select(), model="/policies/round-01/policy of mine")
    store.write(out.grades, Graded, [graded(unit, path) for unit in units])
    ask = functools.partial(evaluate.officially, out, loaded, answers=path, workers=2, timeout_s=120)
    numbers = ask()
    assert {key: numbers[key] for key in ("official_resolved", "official_compared", "official_agreement")} == {
        "official_resolved": 2.0,
        "official_compared": 4.0,
        "official_agreement": 0.75,
    }
    text = (out.official / "agreement.txt").read_text()
    test = UNITTEST.pass_to_pass[0]
    assert text.splitlines()[-1] == (
        f"t__unittest-3-skips: official resolved, ours unresolved (1 of 3 tests, {test}: skipped)"
    )
    assert [line.split() for line in text.splitlines()[1:-1]] == [
        ["empty", "empty", "yes", "1"],
        ["resolved", "resolved", "yes", "1"],
        ["resolved", "unresolved", "no", "1"],
        ["unresolved", "unresolved", "yes", "1"],
    ]
    assert (out.official / "harness/report").is_dir()
    monkeypatch.setenv("DOCKER_HOST", "unix:///nowhere.sock")
    assert ask() == numbers  # made once: no engine is asked
