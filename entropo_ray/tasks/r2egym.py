"""R2E-Gym: commits of ten projects, judged by the exact status of every test of theirs, failures among them.

A row has no id, no patch and no list of tests: they are read from the commit's files, from the expected statuses and
from the log of the tests before the commit. Statuses name tests without their file, which the tests' own text tells.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath
from typing import Any

from entropo_ray.records import Answer, File, Task
from entropo_ray.tasks import diffs, scripts
from entropo_ray.tasks.columns import WORKDIR, Family, Images, Row
from entropo_ray.tasks.pack import Mined

_FOLDER = "r2e_tests"
_SHOWN = (f"/{_FOLDER}", f"{WORKDIR}/{_FOLDER}", f"{WORKDIR}/run_tests.sh")  # where the published images keep them
_PYTHON = ".venv/bin/python -W ignore"
_COLOR = re.compile(r"(?:\x1b|\\u001b)\[[0-9;]*m")
_PASSED = re.compile(r"^PASSED (.+)$", re.MULTILINE)
_SUMMARY = "short test summary info"
_FAILING = ("FAILED", "ERROR")


def mined(row: Row, images: Images) -> Mined:
    """A row of R2E-Gym."""
    files = _tests(row)
    expected = {key: str(status) for name, status in row.mapping("expected_output_json").items() if (key := _key(name))}
    for status in expected.values():
        if status != "PASSED" and status not in _FAILING:
            raise row.odd("expected_output_json", f"statuses PASSED, FAILED and ERROR, not {status}")
    ids = _ids(row, list(expected), files)
    before = _passed_before(row)
    passing = [key for key, status in expected.items() if status == "PASSED"]
    commit = row.mapping("parsed_commit_content")
    task = Task(
        id=row.id,
        source="r2egym",
        split="",  # by repository, once all rows are known
        repo=row.text("repo_name"),
        image=images.name(row, "r2egym", "{image}", image=row.text("docker_image")),
        workdir=WORKDIR,
        problem=_issue(row.text("problem_statement")),
        test_command="python -m pytest -q",
        visible=(),
    )
    answer = Answer(
        task_id=row.id,
        patch=_patch(row, commit),
        alternatives=(),
        files=tuple(File(path=path, text=text) for path, text in files.items()),
        script=scripts.made(base="HEAD", test_patch="", command=_command(files), workdir=WORKDIR),
        parser="pytest",
        fail_to_pass=tuple(test for key in passing if key not in before for test in ids[key]),
        pass_to_pass=tuple(test for key in passing if key in before for test in ids[key]),
        expected_failures=tuple(test for key in expected if key not in passing for test in ids[key]),
    )
    return Mined(task=task, answer=answer, base=_base(row, commit), remove=_SHOWN)


def _key(name: str) -> str:
    """The name of a test as the statuses hold it: without colour, and without the reason that may follow."""
    return _COLOR.sub("", name).split(" - ")[0].strip()


def _tests(row: Row) -> dict[str, str]:
    """Path -> text of the hidden tests."""
    run = row.mapping("execution_result_content")
    names, texts = run.get("test_file_names") or [], run.get("test_file_codes") or []
    good = isinstance(names, list) and isinstance(texts, list) and len(names) == len(texts) > 0
    if not good or not all(isinstance(value, str) for value in (*names, *texts)):
        raise row.odd("execution_result_content", "as many test_file_names as test_file_codes, all texts, one or more")
    paths = [PurePosixPath(_FOLDER, name) for name in names]
    if len(set(paths)) < len(paths) or any(".." in path.parts or path.parts[0] != _FOLDER for path in paths):
        raise row.odd("execution_result_content", "different test_file_names inside of one folder")
    return {str(path): text for path, text in zip(paths, texts, strict=True)}


def _command(files: Iterable[str]) -> str:
    """What runs the tests: the runner among their files, or pytest."""
    runner = next((path for path in files if path.endswith("_runner.py")), "")
    return f"{_PYTHON} {runner}" if runner else f"{_PYTHON} -m pytest -rA -p no:cacheprovider {_FOLDER}"


def _passed_before(row: Row) -> set[str]:
    """The tests that passed before the commit, by its log; none where there is no log."""
    log = row.mapping("execution_result_content").get("old_commit_res_stdout") or ""
    if not isinstance(log, str):
        raise row.odd("execution_result_content", "a text old_commit_res_stdout")
    _, _, summary = _COLOR.sub("", log).partition(_SUMMARY)  # what tests print stands before it
    return {_key(".".join(node.split("::")[1:])) for node in _PASSED.findall(summary)}


def _ids(row: Row, keys: list[str], files: Mapping[str, str]) -> dict[str, list[str]]:
    """Key -> the ids of pytest that it stands for, one in every file that has such a test."""
    where: dict[tuple[str, ...], list[str]] = defaultdict(list)  # (class, test), (class,) or (test,) -> files
    tests = [path for path in files if _is_test(PurePosixPath(path).name)]  # runners and fixtures lie there too
    for path in tests:
        for names in _defined(row, path, files[path]):
            where[names].append(path)
    found = {}
    for key in keys:
        names = _names(key)
        bare = (*names[:-1], names[-1].partition("[")[0])
        # an inherited test stands in its class alone
        homes = where.get(bare) or where.get(names[:-1]) or (tests if len(tests) == 1 else [])
        if not homes:
            raise row.odd("expected_output_json", f"tests of the files {', '.join(tests)}, not {key!r}")
        found[key] = ["::".join((path, *names)) for path in homes]
    return found


def _names(key: str) -> tuple[str, ...]:
    """(class ..., test) of a key; dots in the values of a parameter are none between names."""
    head, bracket, values = key.partition("[")
    *classes, test = head.split(".")
    return (*classes, test + bracket + values)


def _defined(row: Row, path: str, text: str) -> set[tuple[str, ...]]:
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError) as error:
        raise row.odd("execution_result_content", f"Python in {path}, but {error}") from error
    found: set[tuple[str, ...]] = set()
    _collect(tree.body, (), found)
    return found


def _collect(body: list[ast.stmt], above: tuple[str, ...], found: set[tuple[str, ...]]) -> None:
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found.add((*above, node.name))
        if isinstance(node, ast.ClassDef):
            _collect(node.body, (*above, node.name), found)
        for inner in ("body", "orelse", "handlers", "finalbody"):  # tests behind `if` and `try`
            if isinstance(node, ast.If | ast.Try | ast.With):
                for part in getattr(node, inner, ()):
                    _collect(part.body if isinstance(part, ast.ExceptHandler) else [part], above, found)


def _base(row: Row, commit: Mapping[str, Any]) -> str:
    base = commit.get("old_commit_hash")
    if not isinstance(base, str) or not re.fullmatch(r"[0-9a-f]{40}\^?", base):
        raise row.odd("parsed_commit_content", "a mapping with a commit id old_commit_hash")
    return base


def _patch(row: Row, commit: Mapping[str, Any]) -> str:
    """What the commit did to files that are no tests, from their texts before and after."""
    wrong = row.odd("parsed_commit_content", "file_diffs with header.file.path, old_file_content, new_file_content")
    try:
        parts = [_file(diff) for diff in commit["file_diffs"]]
    except (KeyError, TypeError, AttributeError):
        raise wrong from None
    patch = "".join(diffs.between(*part) for part in parts if part is not None)
    if not patch:
        raise row.odd("parsed_commit_content", "a commit that changes text files besides tests")
    return patch


def _file(diff: Mapping[str, Any]) -> tuple[str, str | None, str | None] | None:
    """(path, text before, text after) of one file, None for a test or a binary file."""
    path = str(diff["header"]["file"]["path"])
    if _is_test(path) or diff.get("is_binary_file"):
        return None
    sides = (("minus_file", str(diff["old_file_content"])), ("plus_file", str(diff["new_file_content"])))
    before, after = (None if (diff.get(key) or {}).get("path") == "/dev/null" else text for key, text in sides)
    return path, before, after


def _is_test(path: str) -> bool:
    *folders, name = path.lower().split("/")
    return name.startswith("test_") or name.endswith("_test.py") or bool({"test", "tests"} & set(folders))


def _issue(problem: str) -> str:
    """The text between [ISSUE] marks, where there are any."""
    found = re.search(r"\[ISSUE\](.*)\[/ISSUE\]", problem, re.DOTALL)
    return found[1].strip() if found else problem


FAMILY = Family(
    marks=("expected_output_json",),
    key=("repo_name", "commit_hash"),
    columns=(
        "repo_name",
        "docker_image",
        "commit_hash",
        "problem_statement",
        "parsed_commit_content",
        "execution_result_content",
        "expected_output_json",
    ),
    split="train",
    mined=mined,
)
