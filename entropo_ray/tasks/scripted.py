"""The hidden tests of public data sets: their own script, their own log parser, and canaries between the two.

A row of SWE-bench's form brings a script that lays out its tests and runs them, whatever runner that is. What it
prints is read by the parser that the row names, but only what stands between two lines that nobody can guess; every
Python test file gets one more test that must pass and one that must fail, where the runner is pytest; and the exit code
of the test command has to fit. The patch cannot touch the tests, what configures their runner, or what Python loads
before them. Other runners than pytest have no canaries: there a forged log is only harder, not evident.
"""

from __future__ import annotations

import re
import secrets
import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

from entropo_ray.records import Answer, Grade, Task
from entropo_ray.tasks import diffs, scripts, swebench

_RUNNER = {"conftest.py", "pytest.ini", ".pytest.ini", "pytest.toml", ".pytest.toml", "tox.ini"}
_START_UP = {"sitecustomize.py", "usercustomize.py"}
_SHADOWED = sys.stdlib_module_names | {"pytest", "_pytest", "pluggy", "iniconfig"}
_FOLDERS = {"test", "tests", "testing"}
_GOOD, _BAD = ("PASSED",), ("FAILED", "ERROR")
_EXPECTED_FAILURE = "XFAIL"


@dataclass(frozen=True, slots=True, kw_only=True)
class Canary:
    """Two tests at the end of one test file."""

    passing: str
    failing: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Log:
    """What one run of the script says."""

    started: bool = False
    tests: str = ""  # what stands between the marks
    code: int | None = None  # exit code of the test command, None where it did not come to its end
    marks: int = 0  # ends: more than one is a forgery


Canaries = Mapping[str, Canary]  # by path


def mine(answer: Answer) -> bool:
    """Whether an answer is to be graded by its own script."""
    return scripts.START in answer.script and scripts.END in answer.script


def decisive(answer: Answer) -> tuple[str, ...]:
    """The tests that a verdict is about."""
    return (*answer.fail_to_pass, *answer.pass_to_pass, *answer.expected_failures)


def admitted(patch: str, answer: Answer) -> tuple[str, tuple[str, ...]]:
    """(the part of a patch that is graded, the paths that are not). ValueError if it is no diff of git."""
    tests = {*diffs.paths(answer.test_patch), *(file.path for file in answer.files)}
    tests |= {_file(test) for test in decisive(answer) if ".py::" in test}
    kept, dropped = [], []
    for change in diffs.changes(patch):
        named = [path for path in (change.before, change.after) if path is not None]
        bad = [path for path in named if _protected(path, tests) or (change.before is None and _shadows(path))]
        dropped += bad
        if not bad:
            kept.append(change.text)
    return "".join(kept), tuple(dict.fromkeys(dropped))


def _protected(path: str, tests: set[str]) -> bool:
    pure = PurePosixPath(path)
    homes = [PurePosixPath(test) for test in tests]
    folders = {folder for home in homes for folder in home.parents if folder.name in _FOLDERS}
    return (
        pure.name in _RUNNER | _START_UP
        or pure.suffix in (".pth", ".pyc")
        or any(pure == home or pure in home.parents or home in pure.parents for home in homes)
        or any(folder in pure.parents for folder in folders)
    )


def _shadows(path: str) -> bool:
    """Whether a new file would stand in for a module that Python or the runner loads."""
    parts = PurePosixPath(path).parts
    return any(part.split(".")[0] in _SHADOWED for part in (parts[0], *(parts[1:2] if parts[0] == "src" else ())))


def _file(test: str) -> str:
    return test.partition("::")[0]


def hatched(answer: Answer) -> Canaries:
    """A canary for each file of tests that pytest runs by its name."""
    tests = [test for test in decisive(answer) if ".py::" in test]
    if "pytest" not in _between(answer.script) or answer.eval_type != "pass_and_fail":
        return {}
    words = sorted({word for test in tests for word in re.findall("[a-z]{3,}", test.lower())})
    found = {}
    for path in dict.fromkeys(map(_file, tests)):
        names = ["_".join(["test", secrets.choice(words), secrets.token_hex(4)]) for _ in range(2)]
        product = secrets.randbelow(900) + 100
        bodies = sorted(zip(names, (product, product + 1), strict=True))  # the order tells nothing
        text = "".join(f"\n\ndef {name}():\n    assert {product} == {value}\n" for name, value in bodies)
        found[path] = Canary(passing=names[0], failing=names[1], text=text)
    return found


def _between(script: str) -> str:
    return script.partition(scripts.START)[2].partition(scripts.END)[0]


def armed(script: str, nonce: str, canaries: Canaries) -> str:
    """The script with canaries laid before the tests start, and marks of its own around them."""
    lines = script.split("\n")
    start = next(place for place, line in enumerate(lines) if scripts.START in line)
    end = max(place for place, line in enumerate(lines) if scripts.END in line)
    laid = []
    for path, canary in canaries.items():
        name = shlex.quote(path)
        laid += [f"[ -f {name} ] && cat >> {name} <<'EOF_{nonce}'", canary.text, f"EOF_{nonce}"]
    before, tests, after = lines[:start], lines[start + 1 : end], lines[end + 1 :]
    return "\n".join([*before, *laid, f"echo '{nonce} start'", *tests, f'echo "{nonce} end $?"', *after])


def read(log: str, nonce: str) -> Log:
    """What stands between the marks of the script."""
    _, start, rest = f"\n{log}".partition(f"\n{nonce} start\n")
    ends = list(re.finditer(rf"^(?:.*\D)?{nonce} end (\d+)$", rest, re.MULTILINE))
    if not start or not ends:
        return Log(started=bool(start), tests=rest)
    return Log(started=True, tests=rest[: ends[0].start()], code=int(ends[0][1]), marks=len(ends))


def statuses(log: Log, task: Task, answer: Answer) -> dict[str, str]:
    """Test -> PASSED, FAILED, ERROR, SKIPPED or XFAIL, by the parser that the answer names."""
    from swebench.harness.log_parsers import PARSER_REGISTRY
    from swebench.harness.utils import make_test_spec

    row = swebench.plain_row(task, answer)
    parse: Callable[..., Mapping[str, str]] = PARSER_REGISTRY[row["log_parser"]]
    return dict(parse(log.tests, make_test_spec(row)))


def judge(
    log: Log, found: Mapping[str, str], answer: Answer, canaries: Canaries, *, limit: str
) -> tuple[Grade, str, tuple[str, ...]]:
    """The grade, one line that says why, and the tests that are as they should be."""
    passed = tuple(test for test in answer.fail_to_pass if _passes(test, found, answer))
    passed += tuple(test for test in answer.pass_to_pass if _passes(test, found, answer, lenient=True))
    passed += tuple(test for test in answer.expected_failures if _status(test, found) in _BAD)
    if limit and log.code is None:
        return Grade.TIMEOUT, limit, passed
    if complaint := _contradiction(log, found, canaries):
        return Grade.TAMPERED, complaint, passed
    if log.code is None:
        return Grade.UNRESOLVED, "the test command did not come to its end", passed
    if answer.eval_type == "fail_only" and not found and not _ran(log):
        return Grade.UNRESOLVED, "nothing in the log says that a test ran", ()
    wrong = [test for test in decisive(answer) if test not in passed]
    if not wrong and log.code and found and not any(status in _BAD for status in found.values()):
        return Grade.TAMPERED, f"the test command ended with exit code {log.code} although no test failed", passed
    if not wrong:
        return Grade.RESOLVED, "", passed
    if limit:
        return Grade.TIMEOUT, limit, passed
    status = _status(wrong[0], found) or "did not run"
    return Grade.UNRESOLVED, f"{len(wrong)} of {len(passed) + len(wrong)} tests, {wrong[0]}: {status.lower()}", passed


def _ran(log: Log) -> bool:
    """Whether a log that names failures alone, and none, is one of tests that ran."""
    from swebench.harness.grading import SUITE_RAN

    return SUITE_RAN.search(log.tests) is not None


def _status(test: str, found: Mapping[str, str]) -> str | None:
    """Of a test; hundreds of published ids are cut off within their parameters, and mean all that begin like them."""
    if test in found or test.count("[") <= test.count("]"):
        return found.get(test)
    statuses = {status for name, status in found.items() if name.startswith(test)}
    agreed = len({status in (*_GOOD, _EXPECTED_FAILURE) for status in statuses}) == 1
    return max(statuses) if agreed else None  # the stricter of PASSED and XFAIL


def _passes(test: str, found: Mapping[str, str], answer: Answer, *, lenient: bool = False) -> bool:
    """`lenient`: an expected failure counts, as in the official harness; one that the fix should mend does not."""
    status = _status(test, found)
    if answer.eval_type == "fail_only":  # the log names failures alone
        return status not in _BAD
    return status in _GOOD or (lenient and status == _EXPECTED_FAILURE)


def _contradiction(log: Log, found: Mapping[str, str], canaries: Canaries) -> str:
    """How the log contradicts itself, "" if it does not."""
    if log.marks > 1:
        return "the end of the tests was printed twice"
    read_files = {_file(test) for test, status in found.items() if status in _GOOD}
    for path, canary in canaries.items():
        failing, passing = found.get(f"{path}::{canary.failing}"), found.get(f"{path}::{canary.passing}")
        if path in read_files and failing not in _BAD:
            return f"{path}: a test that must fail did not"
        if path in read_files and passing not in _GOOD:
            return f"{path}: a test that must pass did not, others did"
    if canaries and read_files and log.code == 0:
        return "the test command ended with exit code 0 although a test must fail"
    return ""
