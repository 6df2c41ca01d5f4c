"""SWE-bench (Lite, Verified, Multilingual and their like): rows of swebench 5, rows of before, and the way back.

A row of swebench 5 brings its image, its script and its parser. One of before brings none of them, and the table that
they came from left the library with version 5; it is read only if pytest can run its tests by their names.
"""

from __future__ import annotations

from typing import Any

from entropo_ray.records import Answer, File, Task
from entropo_ray.tasks import diffs, scripts
from entropo_ray.tasks.columns import WORKDIR, Family, Images, Row, pytest_ids
from entropo_ray.tasks.pack import Mined

_EVAL_TYPES = ("pass_and_fail", "fail_only")
_PYTEST = "python -m pytest -rA --tb=short -p no:cacheprovider"
_TESTS = ("FAIL_TO_PASS", "PASS_TO_PASS")
COLUMNS = ("instance_id", "repo", "base_commit", "patch", "test_patch", "problem_statement", "version", *_TESTS)


def mined(row: Row, images: Images) -> Mined:
    """A row of swebench 5."""
    script, eval_type = row.text("eval_script"), row.text("eval_type")
    if scripts.START not in script or scripts.END not in script:
        raise row.odd("eval_script", f"a script with the lines {scripts.START!r} and {scripts.END!r}")
    if eval_type not in _EVAL_TYPES:
        raise row.odd("eval_type", f"one of {', '.join(_EVAL_TYPES)}")
    assets = row.plain("image_assets") if row.values.get("image_assets") else {}
    if any(assets.values()) if isinstance(assets, dict) else assets:
        raise row.odd("image_assets", "none: binary test files cannot be carried")
    name = images.name(row, "swebench", "{image}", image=row.text("image"))
    return assemble(
        row, source="swebench", image=name, script=script, parser=row.text("log_parser"), eval_type=eval_type
    )


def mined_old(row: Row, images: Images) -> Mined:
    """A row of before swebench 5. ValueError where its tests need a script that it does not bring."""
    name = images.name(row, "swebench4", "swebench/sweb.eval.x86_64.{id_1776}:latest")
    return by_pytest(row, source="swebench", image=name, remedy="take the rows that swebench 5 publishes")


def by_pytest(row: Row, *, source: str, image: str, remedy: str) -> Mined:
    """A row in SWE-bench's form that brings no script, for tests that pytest can run by their names."""
    tests = {column: row.texts(column) for column in _TESTS}
    for column, ids in tests.items():
        pytest_ids(row, ids, column, remedy)
    files = sorted({test.partition("::")[0] for ids in tests.values() for test in ids})
    script = scripts.made(
        base=row.commit("base_commit"),
        test_patch=row.patch("test_patch"),
        command=scripts.command(_PYTEST, files),
        workdir=WORKDIR,
    )
    return assemble(row, source=source, image=image, script=script, parser="pytest")


def assemble(
    row: Row,
    *,
    source: str,
    image: str,
    script: str,
    parser: str,
    test_command: str = "python -m pytest -q",
    eval_type: str = "pass_and_fail",
) -> Mined:
    """A row in SWE-bench's form; which visible tests there are has to be found by running them."""
    test_patch = row.patch("test_patch")
    made = [(change, change.created) for change in diffs.changes(test_patch)]
    task = Task(
        id=row.id,
        source=source,
        split="",  # by repository, once all rows are known
        repo=row.text("repo"),
        image=image,
        workdir=WORKDIR,
        problem=row.text("problem_statement"),
        test_command=test_command if parser.startswith(("pytest", "parse_log_pytest")) else "",
        visible=(),
    )
    answer = Answer(
        task_id=row.id,
        patch=row.patch("patch"),
        alternatives=(),
        files=tuple(File(path=str(change.after), text=text) for change, text in made if text is not None),
        script=script,
        parser=parser,
        fail_to_pass=row.texts("FAIL_TO_PASS"),
        pass_to_pass=row.texts("PASS_TO_PASS"),
        expected_failures=(),
        test_patch="".join(change.text for change, text in made if text is None),
        eval_type=eval_type,
        version=row.optional("version"),
    )
    return Mined(task=task, answer=answer, base=row.commit("base_commit"))


def official(task: Task, answer: Answer) -> dict[str, Any]:
    """The row that the harness of swebench 5 grades a patch of this task by. ValueError where it cannot grade it."""
    if answer.expected_failures:
        raise ValueError(f"{task.id}: the official harness cannot ask for tests that must fail")
    if scripts.START not in answer.script or scripts.END not in answer.script:
        raise ValueError(f"{task.id}: its script has no markers, so that the official harness cannot read its log")
    if any(f"b/{file.path}" not in answer.script for file in answer.files):
        raise ValueError(f"{task.id}: its script does not lay out its tests, and the official harness does not either")
    return plain_row(task, answer)


def plain_row(task: Task, answer: Answer) -> dict[str, Any]:
    """The columns of swebench 5, whether its harness can grade by them or not."""
    return {
        "instance_id": task.id,
        "image": task.image,
        "repo": task.repo,
        "version": answer.version,
        "FAIL_TO_PASS": list(answer.fail_to_pass),
        "PASS_TO_PASS": list(answer.pass_to_pass),
        "log_parser": "parse_log_pytest" if answer.parser == "pytest" else answer.parser,
        "eval_type": answer.eval_type,
        "eval_script": answer.script,
        "patch": answer.patch,
    }


FAMILY = Family(
    marks=("eval_script",),
    columns=(*COLUMNS, "image", "log_parser", "eval_type", "eval_script"),
    extra=("image_assets",),
    split="test",
    mined=mined,
)
FAMILY_OLD = Family(
    marks=("test_patch", "base_commit", "environment_setup_commit"),
    others=("meta",),  # a collection of the same form that is no benchmark
    columns=COLUMNS,
    split="test",
    mined=mined_old,
)
