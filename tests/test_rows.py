"""Laws of the readers of public data sets: what a row becomes, in every form that rows lie in, and what is refused."""

import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from entropo_ray import tasks
from entropo_ray.records import File
from entropo_ray.tasks import diffs, local, pack, rows, scripts, swebench
from entropo_ray.tasks.rows import Images

BASE = "1c0ffee" + "0" * 33
CODE, FIXED = "def f():\n    return 1\n", "def f():\n    return 2\n"
SEEN, MORE = "def test_a():\n    pass\n", "def test_a():\n    pass\n\n\ndef test_b():\n    pass\n"
NEW = "from pkg import f\n\n\ndef test_c():\n    assert f() == 2\n"
PATCH = diffs.between("pkg/mod.py", CODE, FIXED)
CHANGED_TEST = diffs.between("tests/test_mod.py", SEEN, MORE)
TEST_PATCH = CHANGED_TEST + diffs.between("tests/test_new.py", None, NEW)
F2P, P2P = ["tests/test_new.py::test_c"], ["tests/test_mod.py::test_a", "tests/test_mod.py::T::test_p[1.5-x]"]
SCRIPT = f"""#!/bin/bash
set -uxo pipefail
cd /testbed
git checkout {BASE} tests/test_mod.py
git apply -v - <<'EOF_1'
{TEST_PATCH}EOF_1
: '>>>>> Start Test Output'
pytest -rA tests/test_mod.py tests/test_new.py
: '>>>>> End Test Output'
git checkout {BASE} tests/test_mod.py
"""
COMMON = {
    "instance_id": "owner__name-12",
    "repo": "owner/name",
    "base_commit": BASE,
    "patch": PATCH,
    "test_patch": TEST_PATCH,
    "problem_statement": "f is wrong",
    "hints_text": "",
    "created_at": "2024-01-01T00:00:00Z",
    "version": "1.0",
}
OLD = COMMON | {
    "FAIL_TO_PASS": json.dumps(F2P),
    "PASS_TO_PASS": json.dumps(P2P),
    "environment_setup_commit": "f" * 40,
}
SWEBENCH = OLD | {
    "image": "swebench/sweb.eval.x86_64.owner_1776_name-12:latest",
    "log_parser": "parse_log_pytest",
    "eval_type": "pass_and_fail",
    "eval_script": SCRIPT,
    "difficulty": "15 min - 1 hour",
}
SWEGYM = COMMON | {"FAIL_TO_PASS": F2P, "PASS_TO_PASS": P2P}
REBENCH = SWEGYM | {
    "environment_setup_commit": "f" * 40,
    "docker_image": "swerebench/sweb.eval.x86_64.owner_1776_name-12",
    "install_config": {
        "python": "3.9",
        "install": "pip install -e .[dev]",
        "log_parser": "parse_log_pytest",
        "test_cmd": "pytest --no-header -rA --tb=line -p no:cacheprovider",
    },
    "meta": {"is_lite": True},
}
SWESMITH = {
    "instance_id": "owner__name.1a2b3c4d.func_basic__0abc",
    "repo": "swesmith/owner__name.1a2b3c4d",
    "patch": diffs.reverse(PATCH),
    "FAIL_TO_PASS": F2P,
    "PASS_TO_PASS": P2P,
    "image_name": "jyangballin/swesmith.x86_64.owner_1776_name.1a2b3c4d",
    "problem_statement": "f is wrong",
}
R2E_TEST = """import unittest


def test_free():
    pass


class TestF(unittest.TestCase):
    def test_two(self):
        pass

    def test_param(self):
        pass


class TestChild(TestF):
    pass


if True:
    def test_behind_if():
        pass
"""
R2E_OTHER = "def test_free():\n    pass\n\n\ndef test_old():\n    pass\n"
R2EGYM = {
    "repo_name": "name",
    "docker_image": "namanjain12/name_final:0123abcd",
    "commit_hash": "0123abcd" + "0" * 32,
    "parsed_commit_content": json.dumps(
        {
            "file_diffs": [
                {
                    "old_file_content": old,
                    "new_file_content": new,
                    "header": {"file": {"path": path}},
                    "minus_file": {"path": "/dev/null" if old == "" else f"a/{path}"},
                    "plus_file": {"path": f"b/{path}"},
                    "is_binary_file": False,
                }
                for path, old, new in (
                    ("pkg/mod.py", CODE, FIXED),
                    ("pkg/more.py", "", "x = 1\n"),
                    ("tests/test_mod.py", SEEN, MORE),
                )
            ],
            "old_commit_hash": BASE,
            "new_commit_hash": "0123abcd" + "0" * 32,
            "commit_message": "fix f",
        }
    ),
    "execution_result_content": json.dumps(
        {
            "test_file_names": ["test_1.py", "test_2.py"],
            "test_file_codes": [R2E_TEST, R2E_OTHER],
            "old_commit_res_stdout": "= short test summary info =\nPASSED r2e_tests/test_2.py::test_old\n"
            "\x1b[31mFAILED\x1b[0m r2e_tests/test_1.py::TestF::test_two - assert 1 == 2\n",
        }
    ),
    "modified_files": ["pkg/mod.py"],
    "problem_statement": "\n[ISSUE]\nf is wrong\n[/ISSUE]\n",
    "expected_output_json": json.dumps(
        {
            "TestF.test_two": "PASSED",
            "TestF.test_param[a.b]": "PASSED",
            "TestChild.test_two": "FAILED",
            "\x1b[1mtest_old": "PASSED",
            "test_behind_if - x": "ERROR",
        }
    ),
}
FAMILIES = {
    "swebench": SWEBENCH,
    "swebench4": OLD,
    "swegym": SWEGYM,
    "rebench": REBENCH,
    "swesmith": SWESMITH,
    "r2egym": R2EGYM,
}


def as_json(path, table):
    path.with_suffix(".json").write_text(json.dumps(table))


def as_jsonl(path, table):
    path.with_suffix(".jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in table))


def as_parquet(path, table):
    pq.write_table(pa.Table.from_pylist(table), path.with_suffix(".parquet"))


FORMATS = [as_json, as_jsonl, as_parquet]


def read_one(tmp_path, row, write=as_jsonl, **how):
    write(tmp_path / "set", [row])
    (m,) = rows.read(tmp_path, **how)
    return m


# What a row becomes


@pytest.mark.parametrize("write", FORMATS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_is_the_same_task_in_every_format_and_survives_a_pack(tmp_path, family, write):
    m = read_one(tmp_path, FAMILIES[family], write)
    assert m == read_one_from_list(tmp_path, family)
    to = tmp_path / "pack"
    tasks.write(to, [m])
    assert pack.tasks(to) == [m.task]
    assert pack.answers(to) == {m.task.id: m.answer}
    assert rows.read(to) == [replace(m, base="", bug="", remove=())]
    assert m.task.problem == "f is wrong"
    assert m.task.visible == ()
    assert m.task.workdir == "/testbed"
    assert m.task.split == ("test" if family.startswith("swebench") else "train")


def read_one_from_list(tmp_path, family):
    other = tmp_path / "other.json"
    other.write_text(json.dumps([FAMILIES[family]]))
    (m,) = rows.read(other)
    other.unlink()
    return m


def test_a_row_of_swebench_5_keeps_its_script_image_and_parser(tmp_path):
    m = read_one(tmp_path, SWEBENCH)
    assert (m.task.id, m.task.source, m.task.repo) == ("owner__name-12", "swebench", "owner/name")
    assert m.task.image == SWEBENCH["image"]
    assert (m.answer.script, m.answer.parser, m.answer.version) == (SCRIPT, "parse_log_pytest", "1.0")
    assert (m.answer.fail_to_pass, m.answer.pass_to_pass) == (tuple(F2P), tuple(P2P))
    assert m.answer.patch == PATCH
    assert m.answer.files == (File(path="tests/test_new.py", text=NEW),)
    assert m.answer.test_patch == CHANGED_TEST  # a file that exists cannot be had whole
    assert m.base == BASE


@pytest.mark.parametrize("assets", ["", None, "{}", {}, {"test_patch": []}])
def test_a_row_without_binary_assets_is_taken(tmp_path, assets):
    assert read_one(tmp_path, SWEBENCH | {"image_assets": assets}).task.id == "owner__name-12"


def test_nothing_of_the_answer_is_in_the_task(tmp_path):
    for family, row in FAMILIES.items():
        (tmp_path / family).mkdir()
        said = repr(read_one(tmp_path / family, row).task)
        assert not any(word in said for word in ("::", "test_new", "test_mod", "return 2", BASE)), family


def test_rows_of_before_swebench_5_are_run_by_pytest_with_a_script_of_their_own(tmp_path):
    m = read_one(tmp_path, OLD)
    assert m.task.image == "swebench/sweb.eval.x86_64.owner_1776_name-12:latest"
    assert m.answer.parser == "pytest"
    assert "python -m pytest -rA --tb=short -p no:cacheprovider tests/test_mod.py tests/test_new.py" in m.answer.script


def test_swegym_names_its_images_in_its_own_way(tmp_path):
    m = read_one(tmp_path, SWEGYM | {"instance_id": "Owner__name-12"})
    assert m.task.image == "xingyaoww/sweb.eval.x86_64.owner_s_name-12:latest"
    assert m.task.source == "swegym"


@pytest.mark.parametrize("command", ["pytest -rA", ["pytest -rA"]])
def test_rebench_runs_its_own_command_on_the_tests_of_the_patch(tmp_path, command):
    m = read_one(tmp_path, REBENCH | {"install_config": {"test_cmd": command, "log_parser": "parse_log_pytest_v2"}})
    assert m.answer.script.splitlines().count("pytest -rA tests/test_mod.py tests/test_new.py") == 1
    assert (m.answer.parser, m.task.test_command) == ("parse_log_pytest_v2", "pytest -rA")
    assert m.task.image == REBENCH["docker_image"]


def test_the_patch_of_swesmith_is_the_bug(tmp_path):
    m = read_one(tmp_path, SWESMITH)
    assert diffs.changes(m.answer.patch)[0].hunks == diffs.changes(PATCH)[0].hunks
    assert m.bug == SWESMITH["patch"]
    assert (m.task.repo, m.task.image) == ("owner/name", SWESMITH["image_name"])


def test_r2egym_wants_exact_statuses_in_the_files_that_hold_the_tests(tmp_path):
    m = read_one(tmp_path, R2EGYM)
    one, two = "r2e_tests/test_1.py", "r2e_tests/test_2.py"
    assert m.answer.fail_to_pass == (f"{one}::TestF::test_two", f"{one}::TestF::test_param[a.b]")
    assert m.answer.pass_to_pass == (f"{two}::test_old",)
    assert m.answer.expected_failures == (f"{one}::TestChild::test_two", f"{one}::test_behind_if")
    assert m.answer.files == (File(path=one, text=R2E_TEST), File(path=two, text=R2E_OTHER))
    assert diffs.paths(m.answer.patch) == ["pkg/mod.py", "pkg/more.py"]
    assert m.task.id == f"name__{R2EGYM['commit_hash']}"
    assert "/r2e_tests" in m.remove  # the published images hold the hidden tests
    assert m.base == BASE


def test_a_test_that_two_files_have_is_expected_in_both(tmp_path):
    m = read_one(tmp_path, R2EGYM | {"expected_output_json": '{"test_free": "PASSED"}'})
    assert m.answer.fail_to_pass == ("r2e_tests/test_1.py::test_free", "r2e_tests/test_2.py::test_free")


def test_a_runner_among_the_tests_runs_them_and_holds_none(tmp_path):
    run = json.loads(R2EGYM["execution_result_content"])
    run["test_file_names"] += ["name_unittest_runner.py", "conftest.py"]
    run["test_file_codes"] += ["class TestF:\n    def test_two(self):\n        pass\n", "x = 1\n"]
    m = read_one(tmp_path, R2EGYM | {"execution_result_content": json.dumps(run)})
    assert m.answer.fail_to_pass[0] == "r2e_tests/test_1.py::TestF::test_two"
    assert ".venv/bin/python -W ignore r2e_tests/name_unittest_runner.py\n" in m.answer.script
    assert len(m.answer.files) == 4


def test_what_a_test_printed_before_the_summary_is_no_status(tmp_path):
    run = json.loads(R2EGYM["execution_result_content"])
    run["old_commit_res_stdout"] = "PASSED x::TestF::test_two\n" + run["old_commit_res_stdout"]
    m = read_one(tmp_path, R2EGYM | {"execution_result_content": json.dumps(run)})
    assert "r2e_tests/test_1.py::TestF::test_two" in m.answer.fail_to_pass


def test_without_a_log_of_before_every_passing_test_counts_as_failing_then(tmp_path):
    run = json.loads(R2EGYM["execution_result_content"]) | {"old_commit_res_stdout": None}
    m = read_one(tmp_path, R2EGYM | {"execution_result_content": json.dumps(run)})
    assert (len(m.answer.fail_to_pass), m.answer.pass_to_pass) == (3, ())


# Scripts


def run_script(script, home):
    merged = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}  # as a container's output comes
    done = subprocess.run(["bash"], input=script.encode(), cwd=home, timeout=60, check=False, **merged)
    return done.returncode, done.stdout.decode()


def test_a_script_that_was_made_tests_what_the_test_patch_says_whatever_lies_there(tmp_path):
    """Run by bash and git: a forged test file is put right, the new one is made, and both go again."""
    for path, text in (("pkg.py", FIXED), ("tests/test_mod.py", SEEN)):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(text)
    person = ["-c", "user.name=x", "-c", "user.email=x@example.com"]
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "x"]):
        subprocess.run(["git", *person, *words], cwd=tmp_path, check=True, timeout=60)
    base = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=tmp_path, text=True).strip()
    script = scripts.made(
        base=base,
        test_patch=TEST_PATCH,
        command=f"{sys.executable} -m pytest -q -rA -p no:cacheprovider tests",
        workdir=str(tmp_path),
    )
    (tmp_path / "tests/test_mod.py").write_text("forged")
    (tmp_path / "tests/test_new.py").mkdir()
    code, said = run_script(script, tmp_path)
    assert code == 0, said
    assert {"PASSED tests/test_mod.py::test_b", "PASSED tests/test_new.py::test_c"} <= set(said.splitlines())
    assert said.index(scripts.START) < said.index("PASSED") < said.index(scripts.END)
    assert (tmp_path / "tests/test_mod.py").read_text() == SEEN
    assert not (tmp_path / "tests/test_new.py").exists()


def test_the_command_stands_directly_before_the_end_marker():
    """Where a harness puts the line that takes its exit code."""
    from swebench.harness.utils import make_test_spec

    m = swebench.official(*_parted(OLD))
    lines = make_test_spec(m).eval_script.splitlines()
    end = next(i for i, line in enumerate(lines) if scripts.END in line)
    assert lines[end - 1] == "SWEBENCH_TEST_EXIT_CODE=$?"
    assert lines[end - 2].startswith("python -m pytest ")


def _parted(row):
    (m,) = _read_rows([row])
    return m.task, m.answer


def _read_rows(table, **how):
    with tempfile.TemporaryDirectory() as home:
        as_json(Path(home, "set"), table)
        return rows.read(home, **how)


def test_a_script_names_the_new_commit_wherever_it_named_the_old():
    new = "ab" * 20
    script = f"git checkout {BASE} x\ngit diff {BASE[:7]}\ngit show {BASE[:12]}..{'9' * 40}\necho {BASE[:6]} {BASE}00\n"
    assert scripts.rewritten(script, BASE, new) == (
        f"git checkout {new} x\ngit diff {new}\ngit show {new}..{'9' * 40}\necho {BASE[:6]} {BASE}00\n"
    )
    with pytest.raises(ValueError, match="'1c0ffee' is no full commit id"):
        scripts.rewritten(script, "1c0ffee", new)


def test_every_family_that_the_harness_can_grade_gives_it_a_row_it_takes(tmp_path):
    from swebench.harness.log_parsers import PARSER_REGISTRY
    from swebench.harness.utils import make_test_spec

    for family in ("swebench", "swebench4", "swegym", "rebench", "swesmith"):
        task, answer = _parted(FAMILIES[family])
        spec = make_test_spec(swebench.official(task, answer))
        assert (spec.instance_id, spec.image, spec.FAIL_TO_PASS) == (task.id, task.image, F2P)
        assert spec.log_parser in PARSER_REGISTRY
    with pytest.raises(ValueError, match="cannot ask for tests that must fail"):
        swebench.official(*_parted(R2EGYM))


def test_a_row_of_another_language_keeps_what_its_harness_needs():
    more = {
        "log_parser": "parse_log_eslint",
        "eval_type": "fail_only",
        "version": "9.5",
        "FAIL_TO_PASS": ["should: x y"],
    }
    task, answer = _parted(SWEBENCH | more)
    assert task.test_command == ""  # its command names the hidden tests
    row = swebench.official(task, answer)
    assert {key: row[key] for key in ("log_parser", "eval_type", "version")} == {
        key: more[key] for key in ("log_parser", "eval_type", "version")
    }
    assert row["FAIL_TO_PASS"] == ["should: x y"]
    assert row["eval_script"] == SCRIPT


def test_parsers_are_checked_where_asked(tmp_path):
    m = read_one(tmp_path, SWEBENCH)
    rows.check_parsers([m, read_one_from_list(tmp_path, "swegym")])
    with pytest.raises(ValueError, match=r"owner__name-12: parser=parse_log_x: not among the \d+ of swebench"):
        rows.check_parsers([replace(m, answer=replace(m.answer, parser="parse_log_x"))])


# Images


@pytest.mark.parametrize(
    ("images", "name"),
    [
        (Images(mirror="mirror:5000/cache"), "mirror:5000/cache/swerebench/sweb.eval.x86_64.owner_1776_name-12"),
        (Images(mirror="mirror/"), "mirror/swerebench/sweb.eval.x86_64.owner_1776_name-12"),
        (Images(templates={"rebench": "mine/{id}:1"}), "mine/owner__name-12:1"),
        (Images(templates={"rebench": "reg.example/{image}-x"}, mirror="m:1"), f"m:1/{REBENCH['docker_image']}-x"),
        (Images(templates={"swegym": "mine/{id}"}), REBENCH["docker_image"]),
    ],
)
def test_images_are_named_by_template_and_mirror(tmp_path, images, name):
    assert read_one(tmp_path, REBENCH, images=images).task.image == name


@pytest.mark.parametrize(
    ("images", "complaint"),
    [
        (Images(templates={"swe": "{id}"}), r"images\.templates\.swe: no such family; known: r2egym, rebench, "),
        (Images(templates={"swegym": "fixed"}), r"images\.templates\.swegym=fixed: a template holds one of \{image\}"),
        (Images(templates={"swegym": "{tag}"}), r"images\.templates\.swegym=\{tag\}: a template holds one of"),
        (Images(mirror="https://m"), r"images\.mirror='https://m': give host\[:port\]\[/path\]"),
    ],
)
def test_images_that_cannot_be_named_are_refused(tmp_path, images, complaint):
    with pytest.raises(ValueError, match=complaint):
        read_one(tmp_path, SWEGYM, images=images)


def test_a_row_without_an_image_says_what_helps(tmp_path):
    row = REBENCH | {"docker_image": None}
    with pytest.raises(ValueError, match=r"set\.jsonl, row owner__name-12: has no image; .*images\.templates\.rebench"):
        read_one(tmp_path, row)
    assert (
        read_one(tmp_path, row, images=Images(templates={"rebench": "mine/{id}"})).task.image == "mine/owner__name-12"
    )


# Splits


def many(repositories, each=2, start=SWEGYM):
    return [start | {"instance_id": f"o__{r}-{i}", "repo": f"o/{r}"} for r in repositories for i in range(each)]


@given(st.integers(2, 30), st.integers(0, 5), st.floats(0, 0.99))
def test_a_repository_has_one_split_and_the_share_is_of_repositories(number, seed, share):
    table = many([f"r{i}" for i in range(number)])
    expected = max(1, round(share * number)) if share else 0
    if expected == number:
        with pytest.raises(ValueError, match=r"repositories cannot be split"):
            _read_rows(table, held_out=share, seed=seed)
        return
    found = {(m.task.repo, m.task.split) for m in _read_rows(table, held_out=share, seed=seed)}
    assert len(found) == number
    assert sum(split == "test" for _, split in found) == expected


def test_the_seed_draws_the_repositories_and_the_order_of_rows_does_not(tmp_path):
    table = many([f"r{i}" for i in range(12)])

    def held_out(seed, order):
        return {m.task.repo for m in _read_rows(order, held_out=0.5, seed=seed) if m.task.split == "test"}

    assert held_out(1, table) == held_out(1, table[::-1])
    assert len({frozenset(held_out(seed, table)) for seed in range(5)}) > 1


def test_a_repository_of_a_benchmark_is_never_trained_on(tmp_path):
    as_jsonl(tmp_path / "bench", [SWEBENCH])
    as_jsonl(tmp_path / "gym", many(["name", "other"]))
    as_jsonl(tmp_path / "r2e", [R2EGYM])  # names no owner
    split = {m.task.id: m.task.split for m in rows.read(tmp_path)}
    assert {key for key, value in split.items() if value == "train"} == {"o__other-0", "o__other-1"}


@pytest.mark.parametrize("share", [-0.1, 1, 1.5])
def test_a_share_is_a_share(tmp_path, share):
    with pytest.raises(ValueError, match=rf"held_out={share}: give a share of the repositories"):
        rows.read(tmp_path, held_out=share)


# Refusals


def edited(family, column, value):
    if value is ...:
        return {key: old for key, old in FAMILIES[family].items() if key != column}
    return FAMILIES[family] | {column: value}


ODD = {
    "missing": ("swebench", "patch", ..., "expected a value; found no such column"),
    "null": ("swebench", "image", None, "expected a text that is not empty; found None"),
    "empty": ("swesmith", "problem_statement", " ", "expected a text that is not empty; found ' '"),
    "no JSON": ("swebench", "FAIL_TO_PASS", "a, b", "expected JSON; found 'a, b'"),
    "no list": ("swegym", "FAIL_TO_PASS", '{"a": 1}', "expected a list of texts, or one as a JSON string"),
    "no texts": ("swegym", "PASS_TO_PASS", [1], "expected a list of texts, or one as a JSON string; found [1]"),
    "no diff": ("swegym", "patch", "fix it", "expected a diff of git, but it is no diff of git: it starts with 'fix"),
    "short commit": ("swegym", "base_commit", "1c0ffee", "expected a full commit id, 40 letters of 0-9a-f"),
    "no marker": ("swebench", "eval_script", "pytest", "expected a script with the lines '>>>>> Start Test Output'"),
    "eval type": ("swebench", "eval_type", "any", "expected one of pass_and_fail, fail_only; found 'any'"),
    "binary assets": ("swebench", "image_assets", '{"test_patch": [{"path": "x.png"}]}', "expected none: binary test"),
    "django's names": ("swebench4", "FAIL_TO_PASS", ["test_x (a.B)"], "expected tests as path.py::name, since the row"),
    "other tests": (
        "swesmith",
        "FAIL_TO_PASS",
        ["should work"],
        "brings no script that runs them; found 'should work'",
    ),
    "binary bug": (
        "swesmith",
        "patch",
        "diff --git a/x b/x\nBinary files a/x and b/x differ\n",
        "expected a bug that can be taken back, but cannot be taken back as text",
    ),
    "no recipe": ("rebench", "install_config", None, "expected a mapping, or one as a JSON string; found None"),
    "no parser": ("rebench", "install_config", {"test_cmd": "pytest"}, "expected a mapping with a text log_parser"),
    "no command": ("rebench", "install_config", {"log_parser": "p"}, "expected a mapping with test_cmd, one line"),
    "another language": ("rebench", "language", "go", "expected python: images of other languages"),
    "status": ("r2egym", "expected_output_json", '{"test_old": "XFAIL"}', "expected statuses PASSED, FAILED and ERROR"),
    "unknown test": ("r2egym", "expected_output_json", '{"test_z": "PASSED"}', "not 'test_z'"),
    "no tests": ("r2egym", "execution_result_content", "{}", "expected as many test_file_names as test_file_codes"),
    "way out": (
        "r2egym",
        "execution_result_content",
        '{"test_file_names": ["../../x.py"], "test_file_codes": [""]}',
        "expected different test_file_names inside of one folder",
    ),
    "no Python": (
        "r2egym",
        "execution_result_content",
        '{"test_file_names": ["test_x.py"], "test_file_codes": ["def"]}',
        "expected Python in r2e_tests/test_x.py, but invalid syntax",
    ),
    "no diffs": (
        "r2egym",
        "parsed_commit_content",
        f'{{"old_commit_hash": "{BASE}"}}',
        "expected file_diffs with header",
    ),
    "no base": ("r2egym", "parsed_commit_content", '{"file_diffs": []}', "expected a commit that changes text files"),
}


@pytest.mark.parametrize(("family", "column", "value", "complaint"), ODD.values(), ids=ODD.keys())
def test_an_odd_column_is_one_line_with_file_row_and_column(tmp_path, family, column, value, complaint):
    good = FAMILIES[family]
    key = "__".join(good[name] for name in rows.FAMILIES[family].key)
    as_json(tmp_path / "set", [good, edited(family, column, value)])  # the first row tells the family
    with pytest.raises(ValueError, match=r"^[^\n]*$") as caught:
        rows.read(tmp_path / "set.json")
    assert str(caught.value).startswith(f"{tmp_path}/set.json, row {key}, column {column}: expected")
    assert complaint in str(caught.value)


@pytest.mark.parametrize("value", [None, "", "../x", "a b", "a/b", ".x"])
def test_an_id_can_name_a_directory(tmp_path, value):
    with pytest.raises(ValueError, match=r"set\.jsonl, row number 1, column instance_id: expected"):
        read_one(tmp_path, SWEGYM | {"instance_id": value})


def test_rows_that_cannot_be_read_are_left_out_where_asked(tmp_path):
    as_json(tmp_path / "set", [SWESMITH, SWESMITH | {"instance_id": "x__y.1.z", "problem_statement": ""}])
    refused = {}
    assert [m.task.id for m in rows.read(tmp_path, refused=refused)] == [SWESMITH["instance_id"]]
    assert list(refused) == ["x__y.1.z"]
    assert "column problem_statement" in refused["x__y.1.z"]


def test_repeated_ids_are_refused(tmp_path):
    as_jsonl(tmp_path / "a", [SWEGYM])
    as_jsonl(tmp_path / "b", [SWEGYM])
    with pytest.raises(ValueError, match=r"1 ids stand on two rows or more, first owner__name-12; read them apart"):
        rows.read(tmp_path)


@pytest.mark.parametrize("write", FORMATS)
def test_an_unknown_family_is_told_by_its_columns(tmp_path, write):
    write(tmp_path / "set", [{"question": "?", "answer": "!"}])
    with pytest.raises(
        ValueError, match=r"columns of no known family: answer, question; known: r2egym by expected_"
    ) as e:
        rows.read(tmp_path)
    assert all(family in str(e.value) for family in rows.FAMILIES)


def test_a_training_set_in_the_form_of_a_benchmark_is_not_taken_for_one(tmp_path):
    with pytest.raises(ValueError, match="columns of no known family"):
        read_one(tmp_path, OLD | {"meta": {"is_lite": True}})


@pytest.mark.parametrize(
    ("name", "data", "complaint"),
    [
        ("x.json", b"{", r"x\.json: expected JSON: "),
        ("x.json", b'{"a": 1}', r"x\.json: expected a list of rows, each a mapping of columns"),
        ("x.jsonl", b'{"a": 1}\n\n[]\n', r"x\.jsonl: expected a list of rows"),
        ("x.jsonl", b'{"a": 1}\n{\n', r"x\.jsonl, line 2: expected JSON: "),
        ("x.jsonl", b'"\xff"\n', r"x\.jsonl, line 1: expected JSON: "),
        ("x.parquet", b"PAR1", r"x\.parquet: expected a parquet file: "),
        ("x.csv", b"a,b", r"x\.csv: expected a file that ends in \.json, \.jsonl, \.parquet"),
        ("x.json", b"[]", r"x\.json: columns of no known family: none"),
    ],
)
def test_files_that_hold_no_rows_are_named(tmp_path, name, data, complaint):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=complaint):
        rows.read(tmp_path / name)


def test_places_that_hold_no_rows_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"no file that ends in \.json, \.jsonl, \.parquet, and no whole pack"):
        rows.read(tmp_path)
    with pytest.raises(ValueError, match=r"nowhere: no such file or directory, and no name on the hub"):
        rows.read(tmp_path / "nowhere")


def test_a_name_on_the_hub_fails_in_one_line_without_a_network(tmp_path):
    program = (
        "from entropo_ray.tasks import rows\n"
        "try:\n    rows.read('owner/name:test')\n"
        "except ValueError as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={"HF_HUB_OFFLINE": "1", "HOME": str(tmp_path), "PATH": "/usr/bin", "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    (line,) = done.stdout.splitlines()
    assert line.startswith("owner/name:test: cannot be read from the hub ("), done.stderr
    assert line.endswith("; give a local file or directory")


# Packs


def test_a_pack_is_read_as_it_is(tmp_path):
    mined = local.generate(count=2, held_out=1, practice=1, ambiguous=0, hidden=0, seed=1, to=tmp_path)
    tasks.write(tmp_path, mined)
    assert rows.read(tmp_path) == [m for m in mined if m.task.split != pack.PRACTICE]


def test_packs_of_before_still_load(tmp_path):
    mined = local.generate(count=1, held_out=0, ambiguous=0, hidden=0, seed=1, to=tmp_path)
    tasks.write(tmp_path, mined)
    later = ("test_patch", "eval_type", "version")
    table = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    stripped = [{key: value for key, value in row.items() if key not in later} for row in table]
    (tmp_path / "answers.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in stripped))
    assert pack.answers(tmp_path) == {m.task.id: m.answer for m in mined}
